"""Tables of common diseases in English and Chinese, written as Python literals.

The file is parsed, never run: `name: type = {...}` with a literal on the right.
"""

import ast
from typing import Any

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import decode, text, texts
from galenic.corpus.readers.departments import GENERAL
from galenic.corpus.records import Entity
from galenic.corpus.starter.conversations import Disease
from galenic.corpus.starter.holdout import Pair
from galenic.runtime import UserError

_SPECIALTIES: dict[str, str] = {
    "Allergy": "allergy and immunology",
    "Cardiology": "cardiology",
    "Critical Care": "emergency medicine",
    "Dermatology": "dermatology",
    "Endocrinology": "endocrinology",
    "Gastroenterology": "gastroenterology",
    "Gynecology": "obstetrics and gynecology",
    "Hematology": "hematology",
    "Infectious Disease": "infectious diseases",
    "Nephrology": "nephrology and urology",
    "Neurology": "neurology",
    "Obstetrics": "obstetrics and gynecology",
    "Oncology": "oncology",
    "Ophthalmology": "ophthalmology",
    "Orthopedics": "orthopedics and rheumatology",
    "Otolaryngology": "otolaryngology",
    "Pediatrics": "neonatology",
    "Psychiatry": "psychiatry",
    "Pulmonology": "pulmonology",
    "Rheumatology": "orthopedics and rheumatology",
    "Urology": "nephrology and urology",
    "Vascular Medicine": "cardiology",
    "Vascular Surgery": "cardiology",
}


def literal(data: bytes, variable: str, name: str) -> dict[str, Any]:
    """Returns the dict literal assigned to a module-level variable, without running the module.

    Raises:
        UserError: not Python, no such variable, or not a literal dict.
    """
    try:
        tree = ast.parse(decode(data, name))
    except SyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: not valid Python ({error.msg})") from None
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            try:
                value = ast.literal_eval(getattr(node, "value", None) or ast.Constant(value=None))
            except ValueError:
                raise UserError(f"{name}:{node.lineno}: {variable} is not a plain literal") from None
            if not isinstance(value, dict):
                raise UserError(f"{name}:{node.lineno}: {variable} is not a dict")
            return value
    raise UserError(f"{name}: no variable {variable}")


def diseases(english: bytes, chinese: bytes, name: str, drop: Drop) -> list[Disease]:
    """Reads the diseases of both tables, paired by position.

    The tables run in parallel; a position whose ICD codes differ is dropped, since then they do not.

    Raises:
        UserError: a file is not a literal table, or the tables differ in length.
    """
    table_en = list(literal(english, "DISEASE_CORRELATIONS", f"{name} (en)").items())
    table_zh = list(literal(chinese, "DISEASE_CORRELATIONS", f"{name} (zh)").items())
    if len(table_en) != len(table_zh):
        raise UserError(
            f"{name}: {len(table_en)} English and {len(table_zh)} Chinese diseases, expected as many"
        )
    rows = []
    for index, ((name_en, en), (name_zh, zh)) in enumerate(zip(table_en, table_zh, strict=True), start=1):
        key = f"DISEASE:{index:03d}"
        if not (isinstance(en, dict) and isinstance(zh, dict)) or en.get("icd10") != zh.get("icd10"):
            detail = f"{name}: rows {index} of the two tables differ"
            drop(
                f"disease-tables/{key}", "disease-tables", "malformed record", detail, f"{name_en}\n{name_zh}"
            )
            continue
        rows.append(
            Disease(
                id=key,
                name=str(name_en),
                name_zh=str(name_zh),
                code=text(en, "icd10"),
                symptoms=tuple(texts(en.get("symptoms"))),
                symptoms_zh=tuple(texts(zh.get("symptoms"))),
                drugs=tuple(texts(en.get("medications"))),
                drugs_zh=tuple(texts(zh.get("medications"))),
                department=_SPECIALTIES.get(text(en, "medical_specialty"), GENERAL),
                department_zh=text(zh, "medical_specialty"),
            )
        )
    return rows


def disease_pair(disease: Disease) -> Pair:
    """Returns the Chinese and the English name of a disease as a translation pair."""
    return Pair(
        id=f"disease-tables/{disease.id}",
        source="disease-tables",
        zh=disease.name_zh,
        en=disease.name,
        department=disease.department,
    )


def disease_entities(disease: Disease, *, translated: bool) -> tuple[Entity, Entity]:
    """Returns the English and the Chinese entity of a disease.

    Args:
        disease: a row of the tables.
        translated: whether each tells the other's name; false for held-out translation pairs.
    """
    shared = {
        "source": "disease-tables",
        "department": disease.department,
        "codes": (disease.code,) if disease.code else (),
    }
    english = Entity(
        id=f"{disease.id}:en",
        name=disease.name,
        kind="disease",
        related=(
            *(("symptom", item) for item in disease.symptoms),
            *(("medication", item) for item in disease.drugs),
            ("department", disease.department),
            *([("Chinese name", disease.name_zh)] if translated else []),
        ),
        **shared,
    )
    chinese = Entity(
        id=f"{disease.id}:zh",
        name=disease.name_zh,
        kind="疾病",
        related=(
            *(("症状", item) for item in disease.symptoms_zh),
            *(("药物", item) for item in disease.drugs_zh),
            *([("科室", disease.department_zh)] if disease.department_zh else []),
            *([("英文名", disease.name)] if translated else []),
        ),
        **shared,
    )
    return english, chinese
