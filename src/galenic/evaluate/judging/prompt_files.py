"""Judge prompts: files that say what a judge reads and what it may reply.

---                                                a reply is one JSON object; `reason` is a text, the other field holds
reply: {reason: text, points: [0, 1, 2, 3, 4]}     the verdict: one of a list, or `options`: a letter of the item's
---                                                options, or none
... <answer>
{answer}
</answer> ...

points, whole numbers: the score is the share of the way from the least to the most
words, or options:     the score is 1 for the item's truth, else 0
first, second, tie:    two answers in the places {first} and {second}; 1 if the item's answer is preferred, tie 1/2
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from galenic.corpus.synthesis.checks import Problem, json_object
from galenic.corpus.synthesis.client import Reply
from galenic.corpus.synthesis.filling import PLACE, require_places
from galenic.runtime import UserError, load_yaml

NONE = "none"
"""The judge's word where an answer chooses no option."""
PREFERENCES = ("first", "second", "tie")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FOLDER = Path(__file__).parent / "prompts"
_PLACES = {"question", "answer", "truth", "options", "lower", "upper"}

Value = str | int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A judge prompt."""

    text: str
    field: str
    """Of the reply: holds the verdict."""
    values: tuple[Value, ...]
    """It may be; empty: the letters of the item's options, and none."""
    reason: bool
    """Whether a reason is asked for."""
    language: str
    """`en` or `zh`: in which a judge is told what is wrong with its reply."""

    @property
    def places(self) -> set[str]:
        """Names of the places."""
        return set(PLACE.findall(self.text))

    @property
    def pair(self) -> bool:
        """Whether it compares two answers."""
        return self.values == PREFERENCES

    @property
    def ordered(self) -> bool:
        """Whether it shows something that could stand in another order."""
        return self.pair or "options" in self.places


def load(name: str, language: str, folder: str = "") -> Prompt:
    """Finds a prompt: one's own before the package's, in the language before any, else in English.

    Args:
        name: such as `mcq`.
        language: `en` or `zh`.
        folder: of one's own.

    Raises:
        UserError: there is none of the name, or it cannot be used.
    """
    folders = [Path(folder), _FOLDER] if folder else [_FOLDER]
    for place in folders:
        for file in (f"{name}.{language}.md", f"{name}.md", f"{name}.en.md"):
            if (place / file).is_file():
                return read(place / file, "zh" if language == "zh" and not file.endswith(".en.md") else "en")
    known = sorted({path.name.split(".")[0] for place in folders for path in place.glob("*.md")})
    where = f" in {folder} or" if folder else ""
    raise UserError(f"judge: no prompt '{name}'{where} in the package; there are {', '.join(known)}")


def read(path: Path, language: str) -> Prompt:
    """Reads a prompt file.

    Raises:
        UserError: it is no text, does not say what may be replied, or has places that cannot be filled.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"), path, language)
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text in UTF-8") from None


@functools.cache
def _parse(content: str, path: Path, language: str) -> Prompt:
    start, head, text = [*content.split("---\n", 2), "", ""][:3]
    fields = _fields(head) if not start.strip() else None
    if fields is None:
        raise UserError(
            f"{path}: begin with a line ---, a line such as 'reply: {{reason: text, points: [0, 1, 2]}}' (one field "
            "with what it may be: whole numbers, words, or `options`) and a line ---"
        )
    reason, field, values = fields
    found = Prompt(text=text.strip(), field=field, values=values, reason=reason, language=language)
    if found.pair:
        require_places(str(path), found.text, {"first", "second"}, {"question", "truth", "first", "second"})
    else:
        require_places(str(path), found.text, {"answer"} if values else {"answer", "options"}, _PLACES)
    return found


def _fields(head: str) -> tuple[bool, str, tuple[Value, ...]] | None:
    """Returns whether a reply has a reason, the name of its other field, and what that may be; None of another head."""
    try:
        reply = dict(load_yaml(head)["reply"])
        reason = reply.pop("reason", None) is not None
        ((field, listed),) = reply.items()
        values = () if listed == "options" else tuple(listed)
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        return None
    one_kind = {type(value) for value in values} in ({str}, {int}, set())
    if isinstance(listed, str) != (listed == "options") or not isinstance(field, str) or not one_kind:
        return None
    return (reason, field, values) if len(set(values)) == len(values) != 1 else None


def schema(prompt: Prompt, values: Sequence[Value]) -> dict[str, Any]:
    """Returns the JSON schema of a reply; the reason comes first, so that it is thought of first."""
    kind = "integer" if isinstance(values[0], int) else "string"
    verdict = {prompt.field: {"type": kind, "enum": list(values)}}
    properties = {"reason": {"type": "string"}, **verdict} if prompt.reason else verdict
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_reply(reply: Reply, field: str, values: Sequence[Value]) -> tuple[Value, str] | Problem:
    """Returns the verdict of a reply and its reason, or why it cannot be used.

    A number written as a text, a letter with a full stop, and other capitals are let pass; anything else is not.
    """
    if reply.finish == "length":
        return Problem("cut off")
    if not reply.text.strip():
        return Problem("empty")
    found = json_object(reply.text)
    if found is None:
        return Problem("not JSON")
    said = found.get(field)
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    if isinstance(said, bool) or not isinstance(said, str | int):
        return Problem("missing field", field)
    words = str(said).strip(" \t\n.()（）。").casefold()
    for value in values:
        if str(value).casefold() == words:
            return value, str(found.get("reason") or "").strip()
    allowed = ", ".join(str(value) for value in values)
    return Problem("out of range", f"{field} is {str(said)[:50]!r}, not one of {allowed}")
