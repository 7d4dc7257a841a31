"""Graded Chinese sentences with English: a JSON list."""

from galenic.corpus.readers import Drop, Line
from galenic.corpus.readers.bytes import parse_json, text
from galenic.corpus.starter.holdout import Pair


def hsk_lines(data: bytes, name: str, drop: Drop) -> list[Line]:
    """Reads sentence pairs, grouped by level, Chinese and English on a line each.

    Raises:
        UserError: the file is not a JSON list.
    """
    lines = []
    for index, record in enumerate(parse_json(data, name, list)):
        fields = record if isinstance(record, dict) else {}
        translation = fields.get("translation")
        english = text(translation, "en") if isinstance(translation, dict) else ""
        key, chinese = f"hsk/{text(fields, 'id') or f'record {index}'}", text(fields, "chinese")
        if english.strip(" .").lower() == "placeholder":  # 65 sentences were never translated
            english = ""
        if not chinese or not english:
            missing = "English" if chinese else "Chinese"
            drop(key, "hsk", "malformed record", f"{name}: no {missing} text", chinese or english)
            continue
        lines.append(
            Line(
                pair=Pair(id=key, source="hsk", zh=chinese, en=english),
                text=f"{chinese}\n{english}",
                group=f"HSK {fields.get('hsk_level', '?')}",
            )
        )
    return lines
