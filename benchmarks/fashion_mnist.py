"""Reads Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence) from Debian's package, which is data alone.

    sudo apt-get install dataset-fashion-mnist

or, without the rights to install:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb data/fashion-mnist
"""

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
PLACE = Path("usr/share/datasets/fashion-mnist")
FOLDERS = (Path("data/fashion-mnist") / PLACE, Path("data/fashion-mnist"), "/" / PLACE)
PREFIX = {"train": "train", "test": "t10k"}


def fashion_mnist(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Returns the 60,000 images of the training split, or the 10,000 of the test split.

    Returns:
        Images (N, 28, 28) uint8, 0 where there is nothing, and labels (N,) int64, indices of CLASSES.
    """
    files = [f"{PREFIX[split]}-images-idx3-ubyte.gz", f"{PREFIX[split]}-labels-idx1-ubyte.gz"]
    for folder in FOLDERS:
        if all((folder / file).exists() for file in files):
            images, labels = (torch.from_numpy(idx(folder / file)) for file in files)
            return images, labels.long()
    raise SystemExit(
        f"Fashion-MNIST is neither in {FOLDERS[1]} nor in {FOLDERS[2]}: apt-get install dataset-fashion-mnist, "
        f"or apt-get download it and dpkg-deb -x dataset-fashion-mnist_*.deb {FOLDERS[1]}"
    )


def idx(file: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes: 0, 0, 8, number of axes, their big-endian lengths, the data."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{file} is not an IDX file of unsigned bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
