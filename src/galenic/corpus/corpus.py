"""Verb `corpus`: from what people have to documents that a model can learn from.

    sources --units--> read, clean, decontaminate, score --> duplicates --> decide --> write    (each --> in workers)

Every unit of work leaves its files in the hidden folder `.work`, so a killed run goes on where it stopped and ends
with the same bytes, on one machine or on a cluster. Everything that goes in is in `documents.parquet` or, with its
reason, in `ledger.parquet`.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galenic.corpus.checks import check
from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.decisions import decide
from galenic.corpus.duplicates.files import find_duplicates
from galenic.corpus.engine import Unit, cores, map_units
from galenic.corpus.output import (
    write_contamination,
    write_ledger,
    write_made,
    write_notices,
    write_sources,
    write_statistics,
)
from galenic.corpus.readers.sources import PACKAGES, SOURCES
from galenic.corpus.records import Document
from galenic.corpus.stages import (
    ASSEMBLED,
    FOLDERS,
    RESULT,
    clean_unit,
    finish_unit,
    forget,
    name,
    save_config,
    sources,
    write_prepared,
)
from galenic.corpus.starter import starter
from galenic.corpus.starter.wheels import Wheels
from galenic.corpus.units import plan_units
from galenic.runtime import Bar, Plan, UserError, human, human_bytes, progress, read_json, remove, write_json

PREPARED_DOCUMENTS = 20_000
"""Documents of the starter in one unit."""
FEWEST_FOR_FAILURE = 1000
"""Records seen before the run stops early because too many are unreadable."""


def plan(config: CorpusConfig) -> Plan:
    """What the verb would do; lists files, reads the heads of Parquet files only."""
    known = sources(config)
    told = check(config, known)
    units = plan_units(config.sources, config.unit_bytes)
    facts = {"sources": ", ".join(known)}
    reads = [f"{source.path} ({source.format})" for source in config.sources]
    reads += [*config.decontamination.evaluations, *config.deidentification.names]
    reads += [path for path in (config.scorer, config.difficulty_model) if path]
    if config.starter is not None:
        wheels = Wheels(config.starter.wheels, config.starter.requirements)
        paths = [wheels.path(package) for package in PACKAGES]
        reads += [config.starter.requirements, *map(str, paths)]
        facts["wheels"] = f"{len(paths)}, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"
        facts["limits"] = ", ".join(f"{s} {n}" for s, n in config.starter.limits.items()) or "none"
        facts["held out"] = (
            f"{config.heldout_share:.0%} of documents, {config.starter.transfer_share:.0%} of entities, "
            f"{config.starter.pair_share:.0%} of translation pairs"
        )
    if units:
        files = {file for unit in units for file in unit["files"]}
        facts["input"] = (
            f"{human(len(files))} files in {len(units)} units of about {human_bytes(config.unit_bytes)}"
        )
    steps = [
        "de-identify" if any(source.deidentify for source in config.sources) else "",
        "clean",
        f"decontaminate against {', '.join(Path(p).name for p in config.decontamination.evaluations)}"
        if config.decontamination.evaluations
        else "",
        "score and classify" if config.scorer else "",
        "measure difficulty" if config.difficulty_model else "",
        f"near duplicates from {config.near_duplicate}",
        "sample",
    ]
    facts["steps"] = ", ".join(step for step in steps if step)
    facts["runs on"] = f"a Ray cluster ({config.address})" if config.address else "this machine"
    if told:
        facts["warning"] = "; ".join(told)
    outputs = ["documents.parquet", "ledger.parquet", "sources.json", "stats.json", "NOTICES.md"]
    if config.decontamination.evaluations:
        outputs += ["contamination.parquet", "contamination.json"]
    if config.starter is not None:
        outputs += ["preferences.jsonl", "sft/", "tasks/", "questions/"]
    return Plan(reads=reads, writes=[f"{config.out}/{file}" for file in outputs], facts=facts)


def preview(config: CorpusConfig) -> list[str]:
    """What an earlier run of this folder came to, as a tree of groups and sources."""
    path = Path(config.out) / "sources.json"
    if not path.exists():
        return [
            f"{config.out}: nothing was built yet; a second --plan shows how many documents each source gave"
        ]
    groups: dict[str, dict[str, Any]] = {}
    for source, row in read_json(path).items():
        groups.setdefault(row["group"], {})[source] = row
    told = [f"{'':<26}{'documents':>12}{'characters':>12}{'repeats':>9}{'dropped':>12}"]
    for group, members in groups.items():
        told.append(_branch(group, list(members.values())))
        told += [_branch(f"  {source}", [row]) for source, row in members.items()]
    return told


def _branch(name: str, rows: list[dict[str, Any]]) -> str:
    documents, characters = (sum(row[key] for row in rows) for key in ("documents", "characters"))
    repeats = sum(row["weighted_characters"] for row in rows) / max(characters, 1)
    dropped = sum(sum(row["dropped"].values()) for row in rows)
    return f"{name:<26}{documents:>12,}{human(characters):>12}{repeats:>9.2f}{dropped:>12,}"


def _workers(config: CorpusConfig) -> int:
    return config.workers or cores(config.address)


def run(config: CorpusConfig) -> None:
    """Builds the corpus.

    Raises:
        UserError: a source or wheel is missing, altered or malformed; too many records are unreadable; or nothing is
            left after cleaning.
    """
    out = Path(config.out)
    known = sources(config)
    for warning in check(config, known):
        print(f"galenic: warning: {warning}", file=sys.stderr)
    with progress(100, "corpus", "") as bar:
        # ---- what there is to do
        bar.update(0, "reading")
        planned = plan_units(config.sources, config.unit_bytes)
        if (out / ".work" / ASSEMBLED).exists() and _same_work(config, planned, out / ".work"):
            _publish(out / ".work", out)
            return
        prepared = None
        if config.starter is not None:
            prepared = starter.prepare(config.starter, config.seed, config.heldout_share)
        work = _work_folder(config, planned)
        units = _starter_units(prepared.documents, work) if prepared else []
        units += [{**unit, "number": unit["number"] + len(units)} for unit in planned]
        units = [{**unit, "work": str(work)} for unit in units]
        bar.update(10)

        # ---- everything that needs no other document
        _prepare_tools(config, work)
        results = _stage(clean_unit, units, config, work / "results", bar, 60, "cleaning", known)
        _check_failures(results, config, last=True)
        if not any(result["kept"] for result in results):
            raise UserError(_nothing_left(results, config))

        # ---- what needs all of them
        bar.update(0, "finding duplicates")
        find_duplicates(
            [work / "signatures" / f"{name(unit)}.npy" for unit in units],
            work / "duplicates",
            threshold=config.near_duplicate,
            workers=_workers(config),
            address=config.address,
        )
        bar.update(10, "deciding")
        decide(units, known, config, work)
        finished = _stage(finish_unit, units, config, work / "finished", bar, 15, "writing", known)

        # ---- what is made of it
        made = None
        if prepared is not None and config.starter is not None:
            bar.update(0, "generating")
            mine = [unit for unit in units if unit.get("prepared")]
            made = starter.generate(config.starter, config.seed, prepared, _splits(mine))
            bar.update(0, "proving that nothing leaked")
            starter.prove(prepared, made, _texts(units))
        bar.update(5, "publishing")
        _assemble(config, prepared, made, results, finished, work)
        _publish(work, out)


# ---------------------------------------------------------------------------- work


def _same_work(config: CorpusConfig, planned: list[Unit], work: Path) -> bool:
    """Whether the folder of unfinished work is that of this configuration and these files."""
    if not (work / "key.json").exists():
        return False
    return read_json(work / "key.json") == _key(config, planned)


def _key(config: CorpusConfig, planned: list[Unit]) -> dict[str, Any]:
    return json.loads(json.dumps({"config": asdict(config), "units": planned}))


def _work_folder(config: CorpusConfig, planned: list[Unit]) -> Path:
    """Returns the folder of unfinished work; what another configuration left there is removed."""
    work = Path(config.out).absolute() / ".work"
    forget()
    if not _same_work(config, planned, work):
        remove(work)
        for folder in FOLDERS:
            (work / folder).mkdir(parents=True)
        save_config(config, work)
        write_json(work / "key.json", _key(config, planned))
    return work


def _starter_units(documents: list[Document], work: Path) -> list[Unit]:
    """Writes the starter's documents where units can read them, source by source, sorted by id."""
    units: list[Unit] = []
    for source in SOURCES:
        group = sorted((d for d in documents if d.source == source), key=lambda document: document.id)
        for start in range(0, len(group), PREPARED_DOCUMENTS):
            path = work / "prepared" / f"{source}.{start:08d}.parquet"
            write_prepared(group[start : start + PREPARED_DOCUMENTS], path)
            units.append({"number": len(units), "source": source, "files": [str(path)], "prepared": True})
    return units


def _prepare_tools(config: CorpusConfig, work: Path) -> None:
    if config.decontamination.evaluations:
        from galenic.corpus.contamination.decontaminate import Evaluations

        policy = config.decontamination
        Evaluations.read(policy.evaluations, policy).save(work / "evaluations.npz")


def _stage(
    function: Callable[[Unit], Unit],
    units: Sequence[Unit],
    config: CorpusConfig,
    done: Path,
    bar: Bar,
    percent: float,
    note: str,
    known: dict[str, SourceConfig],
) -> list[Unit]:
    """Maps a function over the units that are not done; returns all results in the units' order."""
    files = [done / f"{name(unit)}.json" for unit in units]
    there = [file.exists() for file in files]
    todo = [unit for unit, found in zip(units, there, strict=True) if not found]
    step = percent / max(len(units), 1)
    bar.update(step * (len(units) - len(todo)), note)
    results = [read_json(file) for file, found in zip(files, there, strict=True) if found]
    for result in map_units(function, todo, workers=_workers(config), address=config.address):
        results.append(result)
        bar.update(step, f"{note} {known[result['source']].name}")
        if result.get("failed"):
            _check_failures(results, config, last=False)
    return sorted(results, key=lambda result: result["number"])


def _check_failures(results: list[Unit], config: CorpusConfig, *, last: bool) -> None:
    """Stops the run when too many records could not be read."""
    read, failed = sum(r["read"] for r in results), sum(r["failed"] for r in results)
    if not failed or failed <= config.max_failures * read or (read < FEWEST_FOR_FAILURE and not last):
        return
    worst = max(results, key=lambda result: result["failed"])
    reason = max(worst["dropped"], key=lambda key: worst["dropped"][key])
    raise UserError(
        f"{config.out}: {failed} of {read} records could not be read, more than max_failures "
        f"{config.max_failures:.0%}; most of them in source '{worst['source']}' ({reason}). "
        f"See {config.out}/.work/ledger; mend the files or raise max_failures"
    )


def _nothing_left(results: list[Unit], config: CorpusConfig) -> str:
    reasons: Counter[str] = Counter()
    for result in results:
        reasons.update(result["dropped"])
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(4)) or "nothing was read"
    limits = f"; see the limits {config.starter.limits}" if config.starter and config.starter.limits else ""
    return f"{config.out}: no document is left after cleaning ({told}){limits}"


# ---------------------------------------------------------------------------- results


def _splits(units: Sequence[Unit]) -> dict[str, str]:
    from pyarrow import parquet

    found: dict[str, str] = {}
    for unit in units:
        table = parquet.read_table(_document_file(unit), columns=["id", "split"])
        found.update(zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True))
    return found


def _texts(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    from pyarrow import parquet

    for unit in units:
        with parquet.ParquetFile(_document_file(unit)) as file:
            for batch in file.iter_batches(columns=["id", "text"]):
                yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _document_file(unit: Unit) -> Path:
    return Path(unit["work"]) / RESULT / "documents.parquet" / f"{name(unit)}.parquet"


def _assemble(
    config: CorpusConfig,
    prepared: starter.Prepared | None,
    made: starter.Made | None,
    results: list[Unit],
    finished: list[Unit],
    work: Path,
) -> None:
    """Writes everything that is told of the documents beside them; the mark says that nothing is missing."""
    folder = work / RESULT
    earlier = prepared.ledger.rows if prepared else []
    if prepared:
        write_ledger(earlier, folder / "ledger.parquet" / "starter.parquet")
    if made:
        write_made(folder, made)
    write_sources(folder, config, sources(config), earlier, results, finished)
    write_statistics(folder, earlier, results, finished, made, prepared)
    write_notices(folder, sources(config), finished)
    if config.decontamination.evaluations:
        write_contamination(folder, work, results)
    (work / ASSEMBLED).touch()


def _publish(work: Path, out: Path) -> None:
    """Moves the result to where it belongs; done again after a kill, it moves what is left."""
    for path in sorted((work / RESULT).iterdir()):
        remove(out / path.name)
        os.replace(path, out / path.name)
    remove(work)
