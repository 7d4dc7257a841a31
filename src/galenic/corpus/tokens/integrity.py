"""Whether the files of token shards are those that the tokenizer step wrote.

`meta.json` holds the size and SHA-256 of each. A size is checked whenever a shard is opened; before training starts
`check_shards` reads what is small, and looks at tokens here and there where that would take too long. Folders made
before there were hashes are looked at in the second way.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galenic.runtime import UserError, sha256_file

HASHED_BYTES = 2 * 10**9
"""Files of up to this size together are read whole: a second or two."""
SAMPLED = 2**16
"""Tokens, and documents, of a larger shard that are looked at."""


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> {"bytes", "sha256"} of the arrays in a folder, for `meta.json`."""
    files = sorted(folder.glob("*.npy"))
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files}


def check_size(file: Path, meta: Mapping[str, Any]) -> None:
    """Refuses a file that is missing or of another size than was written.

    Raises:
        UserError: naming the file.
    """
    facts = meta.get("files", {}).get(file.name)
    if facts is None:
        return
    if not file.exists():
        raise UserError(f"{file}: this shard file is missing; run the tokenizer step again")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise UserError(
            f"{file}: shard files disagree, it has {size} bytes where {facts['bytes']} were written; "
            "run the tokenizer step again"
        )


def check_shards(
    tokenizer_folder: str | Path, names: Iterable[str], split: str = "train", most: int = HASHED_BYTES
) -> None:
    """Refuses shards that are not what was written, before anything is computed with them.

    Args:
        tokenizer_folder: of the tokenizer step.
        names: sources.
        split: of the documents.
        most: bytes; more than that is looked at here and there.

    Raises:
        UserError: naming the file that is missing, cut short, or holds other bytes.
    """
    from galenic.corpus.tokens.shards import read_meta, read_shard

    meta, names = read_meta(tokenizer_folder), sorted(set(names))
    shards = {name: read_shard(tokenizer_folder, name, split) for name in names}  # minds the sizes
    stems = tuple(f"{name}.{split}." for name in names)
    facts = {file: fact for file, fact in meta.get("files", {}).items() if file.startswith(stems)}
    folder = Path(tokenizer_folder) / "tokens"
    if facts and sum(fact["bytes"] for fact in facts.values()) <= most:
        for name, fact in facts.items():
            if sha256_file(folder / name) != fact["sha256"]:
                raise UserError(
                    f"{folder / name}: damaged shard, not the bytes that were written (SHA-256 differs); "
                    "run the tokenizer step again"
                )
        return
    for name, shard in shards.items():
        _look(shard, folder / f"{name}.{split}", meta.get("vocab_size"))


def _look(shard: Any, stem: Path, vocabulary: int | None) -> None:
    """Looks at evenly spaced tokens and documents of a shard."""
    tokens = shard.tokens[:: max(1, len(shard.tokens) // SAMPLED)]
    if vocabulary is not None and len(tokens) and int(tokens.max()) >= vocabulary:
        raise UserError(
            f"{stem}.tokens.npy: damaged shard, token {int(tokens.max())} of a vocabulary of {vocabulary}; "
            "run the tokenizer step again"
        )
    offsets = shard.offsets[:: max(1, len(shard.offsets) // SAMPLED)]
    if int(shard.offsets[0]) != 0 or (np.diff(offsets) < 0).any():
        raise UserError(
            f"{stem}.offsets.npy: damaged shard, documents out of order; run the tokenizer step again"
        )
    weights = shard.weights[:: max(1, len(shard.weights) // SAMPLED)]
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise UserError(
            f"{stem}.weights.npy: damaged shard, a weight is no number from 0 on; run the tokenizer step again"
        )
