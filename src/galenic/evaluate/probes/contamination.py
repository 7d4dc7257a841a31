"""Contamination: which of the evaluation's questions stand in the training corpus?

The search is the corpus step's own (`corpus/contamination`): runs of 13 words or 20 Han characters, whole short items
with their answer near, and near copies. It asks nothing of a model, so it is made once for all of them; what a model
adds is its accuracy on the questions that were not found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galenic.corpus.contamination.decontaminate import Evaluations, find_spans
from galenic.corpus.texts import column
from galenic.evaluate.statistics import summary
from galenic.runtime import UserError, read_json, write_json

from .haystack import documents

PROTOCOL = (
    "share of the questions asked that occur in training documents: a run of 13 words or 20 Han characters, the whole "
    "of a shorter one with its answer near, or a near copy (docs/corpus-decontamination.md); unsearched: too short "
    "to be looked for; clean and found: accuracy on the questions that were not found and on those that were"
)


def search(files: Sequence[Path], corpus: str) -> dict[str, dict[str, list[str]]]:
    """Returns {kind: {"found": ids in the training documents, "unsearched": ids too short to be looked for}}.

    Raises:
        UserError: no corpus step's folder, or no training documents in it.
    """
    if not (Path(corpus) / "documents.parquet").exists():
        raise UserError(
            f"probes.contamination.corpus: {corpus} is no corpus step's folder (no documents.parquet)"
        )
    evaluations = Evaluations.read([str(file) for file in files])
    owners, starts = evaluations.piece_items
    found: set[int] = set()
    read = 0
    for texts in documents(Path(corpus), heldout=False):
        read += len(texts)
        for spans in find_spans(column(texts), evaluations).values():
            for span in spans:
                found |= set(owners[starts[span.piece] : starts[span.piece + 1]].tolist())
    if not read:
        raise UserError(f"probes.contamination.corpus: {corpus} holds no training documents")
    searched = set(owners.tolist())
    told: dict[str, dict[str, list[str]]] = {file.stem: {"found": [], "unsearched": []} for file in files}
    for number, (name, file) in enumerate(zip(evaluations.items, evaluations.files, strict=True)):
        kind, key = Path(file).stem, name.removeprefix(f"{file}:")
        if number in found:
            told[kind]["found"].append(key)
        elif number not in searched:
            told[kind]["unsearched"].append(key)
    return told


def remembered(place: Path, files: Sequence[Path], corpus: str) -> dict[str, dict[str, list[str]]]:
    """Returns what `search` finds, kept in a file of the evaluation's folder for the models that follow."""
    if not place.exists():
        write_json(place, search(files, corpus))
    return read_json(place)


def measure(
    told: Mapping[str, Mapping[str, Sequence[str]]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns {kind: share of the questions asked that were found, accuracy on those and on the others}.

    Args:
        told: of `search`.
        rows: of multiple choice, with `kind`, `id` and `right`.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in told}
    for row in rows:
        if row["kind"] in kinds:
            kinds[row["kind"]].append(row)
    numbers = {}
    for kind, inside in kinds.items():
        found, unsearched = set(told[kind]["found"]), set(told[kind]["unsearched"])
        hits = [float(row["id"] in found) for row in inside]
        numbers[kind] = {
            **summary(hits),
            "unsearched": sum(row["id"] in unsearched for row in inside),
            "clean": summary([row["right"] for row in inside if row["id"] not in found]),
            "found": summary([row["right"] for row in inside if row["id"] in found]),
        }
    return numbers
