"""What workers do: one unit in, its files out. Each file appears whole or not at all; the last one says it is done.

    clean_unit    a slice of a source --> clean/N.parquet, ledger/N.parquet, spans/N.parquet, facts/N.npz, signatures
    finish_unit   what was decided   --> result/documents.parquet/N.parquet, result/ledger.parquet/N.parquet

`facts` are a few bytes a document, which is all that the deciding process holds of it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.cleaning.clean import STARTER, clean_table
from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.duplicates.files import sign, write_signatures
from galenic.corpus.engine import Unit
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.starter.holdout import stable_key
from galenic.corpus.starter.selection import together
from galenic.corpus.units import read_unit
from galenic.runtime import atomic_path, write_json

LEDGER_TEXT = 2000
"""Characters of a dropped text that the ledger keeps."""
REPLACED = {"quality": "quality", "medical_value": "value"}
"""Score -> the column it takes the place of: first guesses that rules and the source's trust make without a scorer."""
FAILURES = ("unreadable file", "malformed record", "broken encoding")
"""Reasons that speak of a broken input rather than of a document that is not wanted."""
COUNTED = ("language", "category", "department", "split", "general", "content")
"""Columns whose values are counted."""
RESULT, ASSEMBLED = "result", "assembled"
"""In the work folder: what will be the corpus, and the mark that nothing of it is missing."""
FOLDERS = (
    *("prepared", "clean", "ledger", "spans", "facts", "signatures", "results", "decisions", "finished"),
    *(f"{RESULT}/documents.parquet", f"{RESULT}/ledger.parquet"),
)
"""Of the work folder."""


def name(unit: Unit) -> str:
    """Returns the name of a unit's files."""
    return f"{unit['number']:06d}"


def sources(config: CorpusConfig) -> dict[str, SourceConfig]:
    """Returns every source by name: the starter's own ones as if they had been configured."""
    known = {source.name: source for source in config.sources}
    if config.starter is not None:
        for key, source in SOURCES.items():
            known[key] = SourceConfig(
                name=key,
                path=source.package or "galenic",
                format="parquet",
                licence=source.licence,
                title=source.title,
                group=source.group,
                form=source.form,
                trust=source.trust,
                weight=config.starter.weights.get(key, 1.0),
            )
    return known


@cache
def _config(work: str) -> CorpusConfig:
    """Reads the resolved configuration that the run left for its workers."""
    from galenic.cli import parse_config

    return parse_config("corpus", json.loads((Path(work) / "config.json").read_text(encoding="utf-8")))[0]


def save_config(config: CorpusConfig, work: Path) -> None:
    """Leaves the resolved configuration for the workers."""
    write_json(work / "config.json", asdict(config))


# ---------------------------------------------------------------------------- stage 1


class _Ledger:
    """Dropped documents of a unit, in order."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.rows: list[tuple[str, str, str, str]] = []
        self.reasons: Counter[str] = Counter()

    def drop(self, id: str, reason: str, detail: str, text: str) -> None:
        self.rows.append((id, reason, detail, text[:LEDGER_TEXT]))
        self.reasons[reason] += 1

    def add(self, table: Any) -> None:
        """Takes a table of the columns id, reason, detail, text."""
        for row in table.select(["id", "reason", "detail", "text"]).to_pylist():
            self.drop(**row)

    def table(self) -> Any:
        import pyarrow

        columns = list(zip(*self.rows, strict=True)) or [()] * 4
        id, reason, detail, text = (pyarrow.array(c, type=pyarrow.large_string()) for c in columns)
        source = pyarrow.array([self.source] * len(self.rows), type=pyarrow.large_string())
        return pyarrow.table({"id": id, "source": source, "reason": reason, "detail": detail, "text": text})


def clean_unit(unit: Unit) -> Unit:
    """Reads a slice of a source and does everything that needs no other document."""
    import pyarrow
    from pyarrow import parquet

    work = Path(unit["work"])
    config = _config(unit["work"])
    source = sources(config)[unit["source"]]
    rules = STARTER if unit.get("prepared") else config.rules
    tools = _tools(unit["work"])
    ledger = _Ledger(source.name)
    schema = tools.schema
    facts: list[dict[str, np.ndarray]] = [_facts(schema.empty_table(), unit, config.seed)]
    signed, spans, searched = [_signed(schema.empty_table(), config)], [], 0
    masked: Counter[str] = Counter()
    with (
        atomic_path(work / "clean" / f"{name(unit)}.parquet") as temporary,
        parquet.ParquetWriter(temporary, schema, compression="lz4") as writer,
    ):
        for table in _tables(unit, source, ledger):
            if source.deidentify:
                table, counts = tools.deidentify(table)
                masked.update(counts)
            table, dropped = clean_table(table, form=source.form, rules=rules)
            ledger.add(dropped)
            searched += len(table)
            if tools.evaluations is not None:
                table, dropped, found = tools.decontaminate(table, source)
                ledger.add(dropped)
                spans.append(found)
            if not len(table):
                continue
            writer.write_table(tools.labelled(table, source).select(schema.names).cast(schema))
            facts.append(_facts(table, unit, config.seed))
            signed.append(_signed(table, config))
    with atomic_path(work / "ledger" / f"{name(unit)}.parquet") as temporary:
        parquet.write_table(ledger.table(), temporary, compression="zstd")
    if spans:
        with atomic_path(work / "spans" / f"{name(unit)}.parquet") as temporary:
            parquet.write_table(pyarrow.concat_tables(spans), temporary, compression="zstd")
    with atomic_path(work / "facts" / f"{name(unit)}.npz") as temporary, open(temporary, "wb") as file:
        columns: dict[str, Any] = {key: np.concatenate([part[key] for part in facts]) for key in facts[0]}
        np.savez(file, **columns)
    write_signatures(work / "signatures" / f"{name(unit)}.npy", signed)
    kept = sum(len(part["group"]) for part in facts)
    result = {
        "number": unit["number"],
        "source": source.name,
        "read": kept + len(ledger.rows),
        "searched": searched,
        "kept": kept,
        "dropped": dict(sorted(ledger.reasons.items())),
        "failed": sum(ledger.reasons[reason] for reason in FAILURES),
        "masked": dict(sorted(masked.items())),
    }
    write_json(work / "results" / f"{name(unit)}.json", result)
    return result


def _signed(table: Any, config: CorpusConfig) -> Any:
    """Returns what duplicates are found by."""
    ids, texts = (table[key].combine_chunks() for key in ("id", "text"))
    return sign(ids, texts, threshold=config.near_duplicate, seed=config.seed)


def _facts(table: Any, unit: Unit, seed: int) -> dict[str, np.ndarray]:
    """Returns two random numbers of each document, of what it must not be separated from and its own; and its bytes."""
    from pyarrow import compute

    ids = table["id"].to_pylist()
    # A user's source may be called `guidelines`, too; only the starter's keeps sections of a text together.
    keys = [together(id, unit["source"]) for id in ids] if unit.get("prepared") else ids
    return {
        "group": np.array([stable_key(seed, "heldout", key) for key in keys], dtype=np.uint64),
        "order": np.array([stable_key(seed, "limit", id) for id in ids], dtype=np.uint64),
        "bytes": compute.binary_length(table["text"]).to_numpy().astype(np.int64),  # pyrefly: ignore
    }


def _tables(unit: Unit, source: SourceConfig, ledger: _Ledger) -> Iterator[Any]:
    """Yields a unit's documents; those that the starter prepared lie in a file of the work folder."""
    if not unit.get("prepared"):
        # What cannot be read cannot be masked: the ledger must not quote it.
        quote = 0 if source.deidentify else LEDGER_TEXT
        yield from read_unit(
            unit, source, lambda id, reason, detail, text: ledger.drop(id, reason, detail, text[:quote])
        )
        return
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(unit["files"][0]) as file:
        for batch in file.iter_batches(batch_size=2000):
            yield pyarrow.Table.from_batches([batch])


def clean_schema(scorer: Any, *, difficulty: bool) -> Any:
    """Returns the columns of a cleaned unit, the same for every source of a run.

    Args:
        scorer: a `Scorer`, or None.
        difficulty: whether a model measures difficulty.
    """
    import pyarrow

    text, number = pyarrow.large_string(), pyarrow.float64()
    fields = [(key, text) for key in ("id", "text", "language", "category", "department")]
    fields += [("quality", number), ("value", number)]
    if scorer is not None:
        fields += [(key, text) for key in ("general", "content") if key in scorer.classes]
        fields += [("medical", number)] if "medical" in scorer.classes else []
        fields += [(key, number) for key in scorer.scores if key not in REPLACED]
    if difficulty:
        fields += [("difficulty", number)]
    return pyarrow.schema(fields)


class _Tools:
    """What a worker loads once."""

    def __init__(self, work: str) -> None:
        config = _config(work)
        self.evaluations: Any = None
        self._scorer: Any = None
        self._difficulty: Any = None
        self._identities: Any = None
        if config.decontamination.evaluations:
            from galenic.corpus.contamination.decontaminate import Evaluations

            self.evaluations = Evaluations.load(Path(work) / "evaluations.npz")
        if config.scorer:
            from galenic.corpus.scores.scoring import Scorer

            self._scorer = Scorer.load(config.scorer)
        if config.difficulty_model:
            from galenic.corpus.scores.difficulty import Difficulty

            self._difficulty = Difficulty(config.difficulty_model)
        if any(source.deidentify for source in config.sources):
            from galenic.corpus.privacy.deidentify import Deidentifier

            self._identities = Deidentifier(config.deidentification)
        self.schema = clean_schema(self._scorer, difficulty=self._difficulty is not None)

    def deidentify(self, table: Any) -> tuple[Any, dict[str, int]]:
        """Masks what identifies a patient; returns the table and how often each kind was found."""
        from galenic.corpus.privacy.deidentify import deidentify_table

        return deidentify_table(table, self._identities)

    def decontaminate(self, table: Any, source: SourceConfig) -> tuple[Any, Any, Any]:
        """Takes evaluation items out; returns (kept, dropped, spans)."""
        from galenic.corpus.contamination.decontaminate import decontaminate_table

        named = _with(table, "source", source.name)
        kept, dropped, spans = decontaminate_table(named, self.evaluations)
        return kept.select(table.column_names), _with(dropped, "reason", "contaminated"), spans

    def labelled(self, table: Any, source: SourceConfig) -> Any:
        """Fills in category, department, quality and value, and adds what a scorer and a model say."""
        import pyarrow

        length = len(table)
        columns: dict[str, Any] = {key: table[key] for key in ("id", "text", "language")}
        category = _filled(table["category"].to_pylist(), [source.category] * length)
        department = _filled(table["department"].to_pylist(), [source.department] * length)
        columns["quality"] = table["quality"]
        medical = [bool(found) or source.group.startswith("medical") for found in department]
        columns["value"] = [source.trust if yes else 0.0 for yes in medical]
        if self._scorer is not None:
            found = self._scorer(table["text"])
            columns |= {REPLACED.get(key, key): found[key].astype(np.float64) for key in self._scorer.scores}
            names = {key: _names(labels, found[key]) for key, labels in self._scorer.classes.items()}
            columns |= {key: names[key] for key in ("general", "content") if key in names}
            likely = found.get("medical_probability", np.ones(length)).astype(np.float64)
            columns["medical"] = likely
            category = _filled(category, names.get("content", [""] * length))
            guessed = np.where(likely >= 0.5, names.get("department", [""] * length), "")
            department = _filled(department, guessed.tolist())
        if self._difficulty is not None:
            columns["difficulty"] = self._difficulty(table["text"].to_pylist())
        columns |= {"category": category, "department": department}
        return pyarrow.table(columns)


def _with(table: Any, name: str, value: str) -> Any:
    """Returns a table with one more column, the same value in each row."""
    import pyarrow

    return table.append_column(name, pyarrow.array([value] * len(table), pyarrow.large_string()))


def _names(labels: Sequence[str], chosen: np.ndarray) -> list[str]:
    return np.asarray(labels, dtype=object)[chosen].tolist()


def _filled(given: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    """Returns what is given, and where nothing is, what else is known."""
    return [one or other for one, other in zip(given, otherwise, strict=True)]


@cache
def _tools(work: str) -> _Tools:
    return _Tools(work)


def forget() -> None:
    """Forgets what an earlier run of this process loaded: a folder of the same name may hold another configuration."""
    _config.cache_clear()
    _tools.cache_clear()


# ---------------------------------------------------------------------------- stage 3


def finish_unit(unit: Unit) -> Unit:
    """Writes the documents of a unit that stay, and the ledger of those that do not."""
    import pyarrow
    from pyarrow import parquet

    work = Path(unit["work"])
    source = sources(_config(unit["work"]))[unit["source"]]
    reasons = json.loads((work / "reasons.json").read_text(encoding="utf-8"))
    with np.load(work / "decisions" / f"{name(unit)}.npz", allow_pickle=False) as file:
        decisions = {key: file[key] for key in file.files}
    told = _Told()
    dropped = [parquet.read_table(work / "ledger" / f"{name(unit)}.parquet")]
    start = 0
    target = work / RESULT / "documents.parquet" / f"{name(unit)}.parquet"
    with parquet.ParquetFile(work / "clean" / f"{name(unit)}.parquet") as clean, atomic_path(target) as path:
        schema = _document_schema(clean.schema_arrow)
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in clean.iter_batches(batch_size=8192):
                part = {key: value[start : start + len(batch)] for key, value in decisions.items()}
                start += len(batch)
                table = pyarrow.Table.from_batches([batch])
                columns = _documents(table, part, source)
                kept = pyarrow.table({name: columns[name] for name in schema.names}).cast(schema)
                writer.write_table(kept)
                told.add(kept)
                dropped.append(_dropped(table, part, source, reasons, work))
    ledger = pyarrow.concat_tables(dropped)
    with atomic_path(work / RESULT / "ledger.parquet" / f"{name(unit)}.parquet") as path:
        parquet.write_table(ledger, path, compression="zstd")
    late = Counter(pyarrow.concat_tables(dropped[1:])["reason"].to_pylist() if dropped[1:] else ())
    result = {"number": unit["number"], "source": source.name, "dropped": dict(sorted(late.items()))}
    result |= told.counts()
    write_json(work / "finished" / f"{name(unit)}.json", result)
    return result


def write_prepared(documents: list[Document], path: Path) -> None:
    """Writes documents of one source for `clean_unit`."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.large_string()
    columns = {key: [getattr(d, key) for d in documents] for key in ("id", "text", "category", "department")}
    # Listings of names look like many languages; where two are mixed, the script of each text tells.
    columns["language"] = ["en" if d.language == "en" else "" for d in documents]
    table = pyarrow.table({key: pyarrow.array(column, text) for key, column in columns.items()})
    with atomic_path(path) as temporary:
        parquet.write_table(table, temporary)


def _document_schema(clean: Any) -> Any:
    """The contract's columns first, then what scorers added."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    types = {key: text for key in ("id", "source", "licence", "language", "category", "department", "split")}
    types |= {"text": pyarrow.large_string(), "duplicates": pyarrow.int64()}
    added = [name for name in clean.names if name not in types and name not in ("quality", "value")]
    types |= {name: text if clean.field(name).type == pyarrow.large_string() else number for name in added}
    names = [field.name for field in fields(Document)] + added
    return pyarrow.schema([(name, types.get(name, number)) for name in names])


def _documents(table: Any, part: dict[str, np.ndarray], source: SourceConfig) -> Any:
    """Returns the documents that stay, with what was decided about them."""
    import pyarrow

    kept = part["fate"] == 0
    table = table.filter(pyarrow.array(kept))
    columns = {name: table[name] for name in table.column_names}
    columns["source"] = pyarrow.array([source.name] * len(table), pyarrow.string())
    columns["licence"] = pyarrow.array([source.licence] * len(table), pyarrow.string())
    columns["duplicates"] = pyarrow.array(part["count"][kept].astype(np.int64))
    columns["weight"] = pyarrow.array(part["weight"][kept])
    columns["split"] = pyarrow.array(np.where(part["heldout"][kept], "heldout", "train"))
    return columns


def _dropped(
    table: Any, part: dict[str, np.ndarray], source: SourceConfig, reasons: list[str], work: Path
) -> Any:
    """Returns the ledger rows of the documents that go; a duplicate's detail is the id of what stands for it."""
    import pyarrow
    from pyarrow import ipc

    gone = part["fate"] != 0
    table = table.filter(pyarrow.array(gone))
    why = [reasons[fate] for fate in part["fate"][gone]]
    with pyarrow.memory_map(str(work / "keepers.arrow")) as file:
        keepers = ipc.open_file(file).read_all()
        places = np.searchsorted(keepers["row"].to_numpy(), part["keeper"][gone])
        known = pyarrow.array(
            places, mask=np.array(["duplicate" not in reason for reason in why], dtype=bool)
        )
        detail = keepers["id"].take(known).fill_null("").to_pylist()
    text = pyarrow.large_string()
    return pyarrow.table(
        {
            "id": table["id"],
            "source": pyarrow.array([source.name] * len(why), text),
            "reason": pyarrow.array(why, text),
            "detail": pyarrow.array(detail, text),
            "text": pyarrow.array([one[:LEDGER_TEXT] for one in table["text"].to_pylist()], text),
        }
    )


class _Told:
    """What is counted of the documents that stay."""

    def __init__(self) -> None:
        self.documents = self.characters = self.duplicates = 0
        self.weighted = 0.0
        self.by: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}

    def add(self, table: Any) -> None:
        self.documents += len(table)
        lengths = np.array([len(text) for text in table["text"].to_pylist()], dtype=np.int64)
        self.characters += int(lengths.sum())
        self.weighted += float((lengths * table["weight"].to_numpy()).sum())
        self.duplicates += int(table["duplicates"].to_numpy().sum()) - len(table)
        for key, counter in self.by.items():
            if key in table.column_names:
                for pair in table[key].value_counts().to_pylist():
                    counter[pair["values"]] += pair["counts"]

    def counts(self) -> Unit:
        """Returns everything as JSON values."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "weighted_characters": round(self.weighted, 1),
            "duplicates": self.duplicates,
            **{f"by_{key}": dict(sorted(counter.items())) for key, counter in self.by.items() if counter},
        }
