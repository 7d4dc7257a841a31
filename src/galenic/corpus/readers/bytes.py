"""From bytes to text and JSON, with errors that name the file."""

import gzip
import json
import zlib
from typing import Any

from galenic.runtime import UserError


def decode(data: bytes, name: str) -> str:
    """Decodes UTF-8, a byte-order mark removed.

    Raises:
        UserError: the bytes are not UTF-8 (offset named).
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None


def gunzip(data: bytes, name: str) -> bytes:
    """Decompresses gzip.

    Raises:
        UserError: the bytes are not gzip, or end too early.
    """
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: not a whole gzip file ({error})") from None


def parse_json(data: bytes, name: str, kind: type) -> Any:
    """Parses JSON whose outermost value is a `kind` (dict or list).

    Raises:
        UserError: not JSON (line and column named), or another outermost value.
    """
    try:
        value = json.loads(decode(data, name))
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{name}: expected {wanted} at the top, got {type(value).__name__}")
    return value


def texts(value: Any) -> list[str]:
    """Returns the non-empty strings of a JSON list, stripped; anything else gives an empty list."""
    if not isinstance(value, list):
        return []
    return [item.strip() for item in value if isinstance(item, str) and item.strip()]


def text(record: dict[str, Any], key: str) -> str:
    """Returns a string field of a JSON object, stripped; a missing field or another type gives an empty string."""
    value = record.get(key)
    return value.strip() if isinstance(value, str) else ""
