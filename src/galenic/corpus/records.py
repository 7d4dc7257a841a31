"""The two records that walk through the corpus: documents (text) and entities (knowledge)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with its origin; the columns of `documents.parquet`."""

    id: str
    """Unique and stable: `<source>/<key in the source>`."""
    text: str
    source: str
    """The domain: the unit of mixtures and of held-out losses."""
    licence: str
    language: str
    """`en`, `zh`, `en-zh`, `code`, or another ISO 639-1 code."""
    category: str
    department: str
    """Medical department, or an empty string outside medicine."""
    quality: float = 1.0
    value: float = 0.0
    """Medical value in [0, 1]."""
    duplicates: int = 1
    """How many documents this one stands for, itself included."""
    weight: float = 1.0
    """How many times an epoch of its source repeats it."""
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class Entity:
    """One concept of a terminology (ICD-10-CM category, HPO term, MeSH disease, drug ...)."""

    id: str
    """Unique: the code with its vocabulary, such as `HP:0001250` or `ICD10CM:J45`."""
    source: str
    name: str
    kind: str
    """Semantic type in words: `phenotypic abnormality`, `disease category`, `drug` ..."""
    department: str
    definition: str = ""
    synonyms: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    """Codes as they may be written in text, such as `J45.9`."""
    parents: tuple[str, ...] = ()
    """Ids of the direct parents; siblings share one."""
    related: tuple[tuple[str, str], ...] = ()
    """(relation in words, text) pairs, such as ("excludes", "bronchiectasis (J47.-)")."""
    comment: str = ""
