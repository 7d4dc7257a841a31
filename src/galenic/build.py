"""Runs a recipe folder's steps in order, skips what is done, resumes what was cut.

    recipes/starter/30-pretrain.yaml  ->  RUN/30-pretrain/{config.yaml, provenance.json, ..., done.json}

A step is `NN-verb[-label].yaml`. Strings that begin with `RUN/` mean the run folder. `config.yaml` (resolved) and
`provenance.json` are written before the work starts, `done.json` last; its fingerprint covers the config, the
inputs (fingerprints of earlier steps, contents of other files) and the source code the verb imports. Another
fingerprint reruns the step and so, through their inputs, all that depend on it.
"""

import argparse
import ast
import dataclasses
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from galenic import __version__
from galenic.cli import VERBS, parse_config, print_plan
from galenic.ranks import TIMEOUT_SECONDS, gathered, process_group, rank, ranks
from galenic.runtime import (
    UserError,
    atomic_path,
    duration,
    human_bytes,
    load_yaml,
    nearest,
    peak_memory_bytes,
    read_json,
    remove,
    sha256_file,
    write_json,
)

PACKAGE = Path(__file__).parent
STEP_NAME = re.compile(r"(\d\d)-([a-z]+)(-[a-z0-9-]+)?")
SHARED = ("merge", "pretrain", "sft", "reward", "elo", "tdpo", "ppo")
"""Verbs whose work several processes can share."""
HASH_WHOLE_BELOW = 64 * 2**20
"""Bytes: larger input files are known by size and time of change, as hashing them would take minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One YAML of a recipe, read and checked."""

    name: str
    verb: str
    config: Any


# ---------------------------------------------------------------------------- recipe


def read_recipe(folder: Path, run_dir: Path) -> list[Step]:
    """Reads and checks every step of a recipe before any work.

    Raises:
        UserError: no such folder, a misnamed file, an unknown verb or key, a reference to a later or missing step.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such recipe folder")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{folder}: no NN-verb.yaml files in it")
    steps: list[Step] = []
    for file in files:
        match = STEP_NAME.fullmatch(file.stem)
        if not match or match[2] not in VERBS:
            verb = match[2] if match else file.stem
            raise UserError(
                f"{file}: a step is named NN-verb[-label].yaml with a known verb{nearest(verb, VERBS)}"
            )
        try:
            values = load_yaml(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise UserError(f"{file}: expected options as 'key: value' lines")
        done = [step.name for step in steps]
        values = _resolve(values, run_dir, done, file)
        try:
            config, _ = parse_config(match[2], {**values, "out": str(run_dir / file.stem)})
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        steps.append(Step(name=file.stem, verb=match[2], config=config))
    return steps


def _resolve(value: Any, run_dir: Path, done: list[str], file: Path) -> Any:
    """Replaces `RUN/step/...` by its path; the step must come earlier in the recipe."""
    if isinstance(value, dict):
        return {key: _resolve(item, run_dir, done, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, run_dir, done, file) for item in value]
    if isinstance(value, str) and "+RUN/" in value:  # a model and an adapter of it
        model, adapter = value.split("+RUN/", 1)
        return "+".join(_resolve(part, run_dir, done, file) for part in (model, f"RUN/{adapter}"))
    if isinstance(value, str) and value.startswith("RUN/"):
        step = value.split("/")[1]
        if step not in done:
            raise UserError(f"{file}: '{value}' is not an earlier step of this recipe{nearest(step, done)}")
        return str(run_dir / value.removeprefix("RUN/"))
    return value


# ---------------------------------------------------------------------------- fingerprints


@cache
def code_files(module: str) -> frozenset[Path]:
    """Returns the source files of the package that a module imports, directly or not, itself included."""
    found: set[Path] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        base = PACKAGE.parent / Path(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not name.startswith("galenic") or path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                home = name.split(".") if base.is_dir() else name.split(".")[:-1]
                above = home[: len(home) - node.level + 1] if node.level else []
                target = ".".join([*above, *([node.module] if node.module else [])])
                todo += [target, *(f"{target}.{alias.name}" for alias in node.names)]
    return frozenset(found)


def code_digest(module: str) -> str:
    """Hashes the sources a verb's module imports: a change to the report does not retrain a model."""
    digest = hashlib.sha256()
    for path in sorted(code_files(module)):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    if status.st_size > HASH_WHOLE_BELOW:
        return f"{status.st_size}:{status.st_mtime_ns}"
    return sha256_file(path)


def input_digest(path: Path, run_dir: Path | None) -> str:
    """Fingerprint of one input: an earlier step's fingerprint, or a hash of the file or folder.

    Raises:
        UserError: the input does not exist.
    """
    if run_dir is not None and path.is_relative_to(run_dir):
        step = run_dir / path.relative_to(run_dir).parts[0]
        return read_json(step / "done.json")["fingerprint"]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return _hash([[str(file.relative_to(path)), _file_digest(file)] for file in files])
    if not path.exists():
        hint = (
            "; RUN/ is the run folder of `galenic build`, give a real path here"
            if path.parts[0] == "RUN"
            else ""
        )
        raise UserError(f"{path}: no such file or folder{hint}")
    return _file_digest(path)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(verb: str, config: Any, run_dir: Path | None) -> dict[str, Any]:
    """Returns {"fingerprint", "config", "inputs", "code"} of a verb with its config, without doing its work."""
    values = dataclasses.asdict(config)
    for name in ("out", *getattr(config, "incidental", ())):
        values.pop(name)
    # The same run moved to another folder is the same run.
    text = json.dumps(values, sort_keys=True)
    if run_dir is not None:
        text = text.replace(json.dumps(str(run_dir))[1:-1] + "/", "RUN/")
    inputs = {}
    for path in config.reads():
        name = path if run_dir is None else path.replace(f"{run_dir}/", "RUN/")
        inputs[name] = input_digest(Path(path), run_dir)
    parts = {"config": _hash(text), "inputs": inputs, "code": code_digest(VERBS[verb][1])}
    return {"fingerprint": _hash([verb, parts]), **parts}


# ---------------------------------------------------------------------------- one step


def run_step(verb: str, config: Any, marks: dict[str, Any]) -> None:
    """Does a verb's work in `config.out`: config and provenance first, `done.json` last."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))
    provenance = {"verb": verb, **marks, "versions": versions()}
    write_json(out / "provenance.json", provenance)
    started = time.monotonic()
    try:
        importlib.import_module(VERBS[verb][1]).run(config)
    except (UserError, OSError):
        _remove_marks(out)
        raise
    seconds = round(time.monotonic() - started, 1)
    write_json(out / "done.json", {**provenance, "seconds": seconds, "peak_rss_bytes": peak_memory_bytes()})
    _afterwards(verb, config)


def _afterwards(verb: str, config: Any) -> None:
    """Does what a verb was asked to do outside its folder, such as an upload; also where the folder was done before."""
    afterwards = getattr(importlib.import_module(VERBS[verb][1]), "afterwards", None)
    if afterwards is not None:
        afterwards(config)


def _remove_marks(out: Path) -> None:
    """Empties a folder in which nothing but its marks was written: a mended configuration may have it."""
    left = list(out.iterdir())
    if {path.name for path in left} <= {"config.yaml", "provenance.json"}:
        for path in left:
            path.unlink()


def versions() -> dict[str, str]:
    """Versions of Galenic, Python and what decides the numbers."""
    found = {"galenic": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "daft", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def is_done(out: Path, marks: dict[str, Any]) -> bool:
    """Whether the folder holds the finished result of exactly this fingerprint."""
    return (out / "done.json").exists() and read_json(out / "done.json")["fingerprint"] == marks[
        "fingerprint"
    ]


def run_verb(verb: str, config: Any) -> None:
    """Runs one verb outside a recipe: resumes its own folder, refuses a folder of another configuration.

    Raises:
        UserError: the output folder holds something else.
    """
    if ranks() > 1 and verb not in SHARED:
        raise UserError(f"{verb}: runs in one process, but {ranks()} were started; leave the launcher out")
    parallel = getattr(config, "parallel", None)
    with process_group(parallel.timeout_seconds if parallel else TIMEOUT_SECONDS):
        state, marks = "", {}
        refused: Exception | None = None
        if rank() == 0:
            try:
                marks = _checked(verb, config)
                state = "run" if marks else "done"
            except (UserError, OSError) as error:
                state, refused = "refused", error
        state = gathered(state)[0]  # what process 0 found
        if refused:
            raise refused
        if state == "refused":
            sys.exit(2)  # process 0 says why
        if state == "done":
            if rank() == 0:
                _afterwards(verb, config)
            return
        if rank() == 0:
            run_step(verb, config, marks)
            print(f"{config.out}: done")
        else:
            importlib.import_module(VERBS[verb][1]).run(config)


def _checked(verb: str, config: Any) -> dict[str, Any]:
    """Returns the marks of what is to be run; none if it is done."""
    out = Path(config.out)
    marks = fingerprint(verb, config, None)
    if is_done(out, marks):
        print(f"{out}: already done")
        return {}
    if out.exists() and any(out.iterdir()):
        ours = (out / "provenance.json").exists()
        if ours and getattr(config, "renewed", False) and read_json(out / "provenance.json")["verb"] == verb:
            return marks
        if not ours or read_json(out / "provenance.json")["fingerprint"] != marks["fingerprint"]:
            what = "the result" if (out / "done.json").exists() else "unfinished work"
            raise UserError(
                f"{out}: holds {f'{what} of another configuration' if ours else 'other files'}; "
                "choose another --out or remove it"
            )
    return marks


# ---------------------------------------------------------------------------- a whole recipe


@contextmanager
def _locked(run_dir: Path, recipe: str) -> Iterator[None]:
    """Holds the run folder for this process; refuses one in use or made by another recipe."""
    owner = run_dir / "recipe.json"
    if run_dir.exists() and any(run_dir.iterdir()):
        if not owner.exists():
            raise UserError(f"{run_dir}: is not a run folder (no recipe.json); choose another --run-dir")
        if read_json(owner).get("recipe") != recipe:
            other = read_json(owner).get("recipe")
            raise UserError(
                f"{run_dir}: belongs to recipe '{other}', not '{recipe}'; choose another --run-dir"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    if not owner.exists():
        write_json(owner, {"recipe": recipe})
    with open(run_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another build is running in it") from None
        yield


def build(recipe: Path, run_dir: Path) -> None:
    """Builds a recipe: every step done, in order, in `run_dir`."""
    if ranks() > 1:
        raise UserError(f"build: runs in one process, but {ranks()} were started; leave the launcher out")
    steps = read_recipe(recipe, run_dir)
    started = time.monotonic()
    with _locked(run_dir, recipe.name):
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            out = Path(step.config.out)
            marks = fingerprint(step.verb, step.config, run_dir)
            if is_done(out, marks):
                print(f"{title}: already done", flush=True)
                continue
            part = out / "provenance.json"
            resumes = part.exists() and read_json(part)["fingerprint"] == marks["fingerprint"]
            if out.exists() and not resumes:
                remove(out)
            print(f"{title}: {'continues' if resumes else 'starts'}", flush=True)
            step_started = time.monotonic()
            run_step(step.verb, step.config, marks)
            print(f"{title}: done in {duration(time.monotonic() - step_started)}", flush=True)
    print(
        f"built {run_dir} in {duration(time.monotonic() - started)}, "
        f"peak memory {human_bytes(peak_memory_bytes())}",
        flush=True,
    )
    for step in steps:
        if step.verb == "report":
            print(f"report: {Path(step.config.out) / 'report.html'}", flush=True)


def plan(recipe: Path, run_dir: Path) -> None:
    """Prints what each step would do; a step whose inputs are not there yet says which.

    A configuration that says what it expects of its inputs is planned without them. What the user has to bring and
    is not there is told without stopping.
    """
    for step in read_recipe(recipe, run_dir):
        module = importlib.import_module(VERBS[step.verb][1])
        waits = [path for path in step.config.reads() if not Path(path).exists()]
        inside = [path for path in waits if Path(path).is_relative_to(run_dir)]
        if inside and getattr(step.config, "expected", None) is None:
            print(f"{step.name}\n  waits for  {', '.join(p.replace(f'{run_dir}/', 'RUN/') for p in inside)}")
            continue
        try:
            planned = module.plan(step.config)
        except UserError as error:
            if not set(waits) - set(inside):
                raise
            print(f"{step.name}\n  needs      {error}")
            continue
        print_plan(step.name, planned)


def main(argv: list[str]) -> int:
    """Entry of `galenic build`."""
    parser = argparse.ArgumentParser(
        prog="galenic build",
        description="Runs a recipe folder's steps in order, skips what is done, resumes what was cut.",
    )
    parser.add_argument("recipe", type=Path, help="folder of NN-verb[-label].yaml files")
    parser.add_argument("--run-dir", type=Path, help="where results go (default: runs/<recipe name>)")
    parser.add_argument("--plan", action="store_true", help="print what would be done and do nothing")
    arguments = parser.parse_args(argv)
    recipe = arguments.recipe.resolve()
    run_dir = (arguments.run_dir or Path("runs") / recipe.name).resolve()
    if arguments.plan:
        plan(recipe, run_dir)
    else:
        build(recipe, run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
