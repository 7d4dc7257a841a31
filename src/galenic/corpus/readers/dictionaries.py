"""The two entity dictionaries (MeSH diseases, drugs): bzip2-compressed pickles of plain dicts, lists and strings.

Both map names to canonical names and canonical names to data, with MeSH tree numbers that say what is a kind of what.
"""

import bz2
import io
import pickle
import re
from collections import Counter, defaultdict
from typing import Any

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import text, texts
from galenic.corpus.readers.departments import of_mesh
from galenic.corpus.records import Entity
from galenic.runtime import UserError

_TREE_NUMBER = re.compile(r"[A-Z]\d\d(?:\.\d{3})*")


class _PlainUnpickler(pickle.Unpickler):
    """Builds only what pickle has opcodes for; whatever would import a name is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module_name}.{global_name}")


def unpickle(data: bytes, name: str) -> dict[str, Any]:
    """Returns the dict in a bzip2-compressed pickle of plain values.

    Only ever called on a member of a wheel whose hash was verified; still, nothing but plain values can come out.

    Raises:
        UserError: not bzip2, not a pickle, a pickle that names a class or function, or not a dict.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(bz2.decompress(data))).load()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{name}: refused, not a pickle of plain values ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a dict, got {type(value).__name__}")
    return value


def _table(dictionary: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    table = dictionary.get(key)
    if not isinstance(table, dict):
        raise UserError(f"{name}: no table '{key}'")
    return table


def _names(variants: dict[str, Any]) -> dict[str, list[str]]:
    """Returns canonical name -> its variants, sorted."""
    names: dict[str, list[str]] = defaultdict(list)
    for variant, canonicals in variants.items():
        for canonical in texts(canonicals):
            names[canonical].append(variant)
    return {canonical: sorted(group) for canonical, group in names.items()}


def _straight(name: str, variants: list[str]) -> str:
    """Turns an inverted heading round where the result is a known name: `Arthritis, Psoriatic`."""
    head, comma, rest = name.partition(", ")
    turned = f"{rest} {head}"
    return turned if comma and "," not in rest and turned.lower() in variants else name


def _parents(tree_numbers: list[str], owner: dict[str, str]) -> tuple[str, ...]:
    found = [owner.get(number.rpartition(".")[0], "") for number in tree_numbers]
    return tuple(dict.fromkeys(parent for parent in found if parent))


def mesh_entities(data: bytes, name: str, drop: Drop) -> list[Entity]:
    """Reads MeSH diseases with their entry terms and tree parents.

    Raises:
        UserError: the dictionary cannot be read.
    """
    dictionary = unpickle(data, name)
    rows = _table(dictionary, "disease_canonical_to_data", name)
    variants = _names(_table(dictionary, "disease_variant_to_canonical", name))
    return _entities(rows, variants, "mesh", name, drop)


def drug_entities(data: bytes, name: str, drop: Drop) -> list[Entity]:
    """Reads drugs and drug classes with their other names, identifiers and formula.

    Raises:
        UserError: the dictionary cannot be read.
    """
    dictionary = unpickle(data, name)
    rows = _table(dictionary, "drug_canonical_to_data", name)
    variants = _names(_table(dictionary, "drug_variant_to_canonical", name))
    flags = _table(dictionary, "drug_variant_to_variant_data", name)
    brands = {variant for variant, flag in flags.items() if isinstance(flag, dict) and flag.get("is_brand")}
    return _entities(rows, variants, "drugs", name, drop, frozenset(brands))


def _entities(
    rows: dict[str, Any],
    variants: dict[str, list[str]],
    source: str,
    name: str,
    drop: Drop,
    brands: frozenset[str] = frozenset(),
) -> list[Entity]:
    prefix = "MESH" if source == "mesh" else "DRUG"
    fields = {canonical: row for canonical, row in rows.items() if isinstance(row, dict)}
    trees = {
        canonical: [n for n in texts(row.get("mesh_tree")) if _TREE_NUMBER.fullmatch(n)]
        for canonical, row in fields.items()
    }
    owner = {number: f"{prefix}:{canonical}" for canonical, numbers in trees.items() for number in numbers}
    # Some identifiers stand beside several names; such a one identifies nothing and is left out.
    uses = Counter(text(row, key) for row in fields.values() for key in _IDENTIFIERS)
    entities = []
    for canonical, row in sorted(rows.items()):
        label = text(row, "name") if isinstance(row, dict) else ""
        if not label:
            drop(f"{source}/{prefix}:{canonical}", source, "malformed record", f"{name}: no name", canonical)
            continue
        known = variants.get(canonical, [])
        label = _straight(label, known)
        synonyms = [v for v in known if "," not in v and v != label.lower()]
        formula = text(row, "formula")
        entities.append(
            Entity(
                id=f"{prefix}:{canonical}",
                source=source,
                name=label,
                kind=_kind(source, row, trees[canonical]),
                department="pharmacology" if source == "drugs" else of_mesh(trees[canonical]),
                synonyms=tuple(synonyms),
                codes=tuple(c for key in _IDENTIFIERS if uses[c := text(row, key)] == 1 and c),
                parents=_parents(trees[canonical], owner),
                related=(
                    *(("brand name", v) for v in synonyms if v in brands),
                    *([("molecular formula", formula)] if formula else []),
                ),
            )
        )
    return entities


_IDENTIFIERS = ("drugbank_id", "mesh_id")
_MEDICINE_REGISTERS = ("medline_plus_id", "nhs_url")


def _kind(source: str, row: dict[str, Any], tree_numbers: list[str]) -> str:
    """Says what an entry is: not everything in a disease list is a disease, nor in a drug list a drug.

    A medicine is in use (MedlinePlus or the NHS describe it), a drug is registered in DrugBank.
    """
    if source == "drugs":
        if any(text(row, key) for key in _MEDICINE_REGISTERS):
            return "medicine"
        return "drug" if text(row, "drugbank_id") else "chemical substance"
    letters = {number[:1] for number in tree_numbers}
    if "C" in letters or any(number.startswith("F03") for number in tree_numbers):
        return "disease"
    return "behavior or mental process" if "F" in letters else "medical concept"
