"""What can be known to be wrong before any work: asked by `--plan`, and by a run before its first hour."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.mixtures.sampling import Sampling
from galenic.corpus.stages import REPLACED, clean_schema
from galenic.runtime import UserError, nearest

MODEL_FILES = ("config.json", "tokenizer.json")
"""Of a causal language model's folder, beside its weights."""


def check(config: CorpusConfig, known: Mapping[str, SourceConfig]) -> list[str]:
    """Opens everything that the work will need; returns what the user should know before it starts.

    Args:
        config: of the run.
        known: every source by name.

    Raises:
        UserError: something is missing, or is not what it should be.
    """
    _check_places(config)
    if config.address:
        _check_cluster(config)
    if config.decontamination.evaluations:
        from galenic.corpus.contamination.evaluation_items import read_items

        for _ in read_items(config.decontamination.evaluations):
            pass
    told = _deidentification(config)
    scorer = None
    if config.scorer:
        from galenic.corpus.scores.scoring import Scorer

        scorer = Scorer.load(config.scorer)
    if config.difficulty_model:
        _check_model(Path(config.difficulty_model))
    check_sampling(config.sampling, scorer, known, difficulty=bool(config.difficulty_model))
    return told


def _check_places(config: CorpusConfig) -> None:
    out = Path(config.out).absolute()
    for source in config.sources:
        if "://" not in source.path and out.is_relative_to(source.folder().absolute()):
            raise UserError(
                f"out: {config.out} lies inside {source.folder()}, which source '{source.name}' reads, so that a "
                "second run would read the first one's result; choose a place beside it"
            )


def _check_cluster(config: CorpusConfig) -> None:
    if find_spec("ray") is None:
        raise UserError(
            "address: a cluster needs Ray: pip install 'galenic[cluster]' (here and on its nodes)"
        )
    paths = [config.out, *(source.path for source in config.sources), config.scorer, config.difficulty_model]
    for path in [*paths, *config.deidentification.names]:
        if path and "://" not in path and not Path(path).expanduser().is_absolute():
            raise UserError(f"address: the nodes of a cluster need absolute paths, '{path}' is relative")


def _check_model(folder: Path) -> None:
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise UserError(f"difficulty_model: {folder} is not a model folder (no {', '.join(missing)})")


def _deidentification(config: CorpusConfig) -> list[str]:
    names = [source.name for source in config.sources if source.deidentify]
    if not names:
        return []
    from galenic.corpus.privacy.deidentify import Deidentifier

    Deidentifier(config.deidentification)  # opens the lists and models
    if config.deidentification.names or config.deidentification.models:
        return []
    return [
        f"{', '.join(names)}: without deidentification.names (your lists) or .models, rules alone miss most names in "
        "running text (docs/corpus-deidentification.md)"
    ]


# ---------------------------------------------------------------------------- sampling


def check_sampling(
    sampling: Sampling, scorer: Any, known: Mapping[str, SourceConfig], *, difficulty: bool
) -> None:
    """Checks that the documents will have what the rules of sampling name.

    Args:
        sampling: the rules.
        scorer: a `Scorer`, or None.
        known: every source by name.
        difficulty: whether a model measures difficulty.

    Raises:
        UserError: a score, column or class that there will not be, with those that there are.
    """
    import pyarrow

    columns = clean_schema(scorer, difficulty=difficulty)
    kinds = {field.name: field.type for field in columns if field.name not in ("id", "text")}
    classes = [name for name, kind in kinds.items() if kind == pyarrow.large_string()] + ["source", "group"]
    scores = [name for name in kinds if name not in classes and name != "difficulty"]  # that is not in [0, 1]
    way_out = "" if scorer else "; others need `scorer`, a folder that `galenic scorer` made"
    for name in sampling.score:
        if REPLACED.get(name, name) != name:
            raise UserError(
                f"sampling.score: the column of '{name}' is called '{REPLACED[name]}'; write that"
            )
        _among(f"sampling.score: no score '{name}'", name, scores, way_out)
    if sampling.rank_within:
        _among(
            f"sampling.rank_within: no column '{sampling.rank_within}'",
            sampling.rank_within,
            classes,
            way_out,
        )
    values = {"source": list(known), "group": sorted({source.group for source in known.values()})}
    if scorer is not None:  # categories and departments may be what a source says they are
        values |= {name: scorer.classes[name] for name in ("general", "content") if name in scorer.classes}
    for name, factors in sampling.class_factors.items():
        _among(f"sampling.class_factors: no column '{name}' of classes", name, classes, way_out)
        for value in factors if name in values else ():
            _among(f"sampling.class_factors.{name}: no '{value}'", value, values[name], "")


def _among(told: str, word: str, options: Iterable[str], way_out: str) -> None:
    options = list(options)
    if word not in options:
        raise UserError(f"{told}{nearest(word, options)}; they are {', '.join(options)}{way_out}")
