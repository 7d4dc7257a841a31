"""Clinical guideline summaries in Markdown, and the differentials and renal dosing tables beside them in JSON.

Tables become one sentence-like line a row, decision trees drawn in characters become nested lists: a small model
learns nothing from the ruling.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import decode, parse_json, text, texts
from galenic.corpus.readers.departments import of_text
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document

_SHORTEST_SECTION = 300
_TREE_MARKS = re.compile(r"^[\s|+`>\-─-╿→]*")
_RULE = re.compile(r"^\|?[\s:|-]+\|?$")
_EMPHASIS = re.compile(r"\*\*|`")
_TOOL_NOTE = re.compile(r"^>.*\bcalculator\b.*$", re.IGNORECASE)


def linearise(markdown: str) -> str:
    """Rewrites tables as lines `column: value; column: value`, drawn trees as nested lists, and drops emphasis."""
    out: list[str] = []
    header: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            marks = _TREE_MARKS.match(line)
            width = len(marks[0]) if marks else 0
            words = line[width:].rstrip()
            if words:
                out.append(f"{'  ' * min(width // 4, 6)}- {words}")
        elif line.lstrip().startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if _RULE.match(line.strip()):
                continue
            if not header:
                header = cells
            else:
                named = [f"{h}: {c}" if h else c for h, c in zip(header, cells, strict=False) if c]
                out.append("- " + "; ".join(named))
        else:
            header = []
            if not _TOOL_NOTE.match(line) and line.strip() != "---":
                out.append(line.rstrip())
    return _EMPHASIS.sub("", "\n".join(out))


def _sections(markdown: str) -> Iterator[str]:
    """Yields second-level sections under the document's title; a short one is joined to the next."""
    title, *_ = re.findall(r"^# .+$", markdown, re.MULTILINE) or [""]
    body = markdown.replace(title, "", 1) if title else markdown
    waiting = ""
    for section in re.split(r"^(?=## )", body, flags=re.MULTILINE):
        waiting = f"{waiting}\n\n{section.strip()}".strip()
        if len(waiting) >= _SHORTEST_SECTION:
            yield f"{title}\n\n{waiting}"
            waiting = ""
    if waiting:
        yield f"{title}\n\n{waiting}"


def guideline_documents(data: bytes, name: str, *, key: str) -> list[Document]:
    """Reads one guideline file as a document per section.

    Args:
        data: Markdown.
        name: what to call it in errors.
        key: `guideline/section`, for the ids.

    Raises:
        UserError: the file is not UTF-8.
    """
    markdown = linearise(decode(data, name))
    department = of_text(markdown)
    return [
        _document(f"{key}/{number:02d}", section, "guideline", department)
        for number, section in enumerate(_sections(markdown))
    ]


def differential_documents(data: bytes, name: str, drop: Drop) -> list[Document]:
    """Reads one differential diagnosis: a document per candidate disease, features and red flags listed.

    Raises:
        UserError: the file is not a JSON object.
    """
    table = parse_json(data, name, dict)
    complaint = text(table, "title") or text(table, "differential_id")
    diagnoses = table.get("diagnoses")
    documents = []
    for index, row in enumerate(diagnoses if isinstance(diagnoses, list) else []):
        fields = row if isinstance(row, dict) else {}
        key = f"differential/{text(table, 'differential_id')}/{index:02d}"
        if not text(fields, "name") or not texts(fields.get("key_features")):
            drop(
                f"guidelines/{key}",
                "guidelines",
                "malformed record",
                f"{name}: no name or features",
                str(row),
            )
            continue
        likelihood = text(fields, "likelihood").replace("_", " ")
        parts = [f"# {complaint}: {text(fields, 'name')}", f"Likelihood: {likelihood}." if likelihood else ""]
        for title, field in (("Key features", "key_features"), ("Red flags", "red_flags")):
            parts.append(_listed(title, texts(fields.get(field))))
        tests = [t for t in texts(fields.get("recommended_tests")) if not t.startswith("calculate_")]
        parts.append(_listed("Recommended tests", tests))
        body = "\n\n".join(part for part in parts if part)
        documents.append(_document(key, body, "differential diagnosis", of_text(body)))
    return documents


def dosing_documents(data: bytes, name: str, drop: Drop) -> list[Document]:
    """Reads renal dosing: one document per drug, a line per range of creatinine clearance.

    Raises:
        UserError: the file is not a JSON object.
    """
    documents = []
    for key, row in parse_json(data, name, dict).items():
        fields = row if isinstance(row, dict) else {}
        tiers = fields.get("tiers")
        if not text(fields, "drug_name") or not isinstance(tiers, list):
            drop(
                f"guidelines/dosing/{key}",
                "guidelines",
                "malformed record",
                f"{name}: no drug or tiers",
                str(row),
            )
            continue
        facts = [
            f"{text(fields, 'drug_name')} ({', '.join(texts(fields.get('brand_names')))}) is an "
            f"{text(fields, 'drug_class')} given {text(fields, 'route')}.",
            f"Usual dose: {text(fields, 'normal_dose')}.",
        ]
        lines = [f"- {_tier(tier)}" for tier in tiers if isinstance(tier, dict)]
        parts = [f"# Renal dosing of {text(fields, 'drug_name')}", " ".join(facts), "\n".join(lines)]
        parts.append(_listed("Monitoring", texts(fields.get("monitoring_parameters"))))
        body = "\n\n".join(part for part in parts if part)
        documents.append(_document(f"dosing/{key}", body, "renal dosing", "nephrology and urology"))
    return documents


def _tier(tier: Mapping[str, Any]) -> str:
    low, high = tier.get("min"), tier.get("max")
    where = f"of {low} mL/min or more" if high is None else f"from {low} to {high} mL/min"
    words = f"Creatinine clearance {where}: {tier.get('dose')}"
    return ". ".join([words, *texts(tier.get("warnings"))]) + "."


def _listed(title: str, items: list[str]) -> str:
    return f"{title}:\n" + "\n".join(f"- {item}" for item in items) if items else ""


def _document(key: str, body: str, category: str, department: str) -> Document:
    return Document(
        id=f"guidelines/{key}",
        text=body,
        source="guidelines",
        licence=SOURCES["guidelines"].licence,
        language="en",
        category=category,
        department=department,
    )
