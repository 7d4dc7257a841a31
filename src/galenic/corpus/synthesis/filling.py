"""Templates with `{places}`, and what may stand in them."""

import re
from collections.abc import Collection, Mapping

from galenic.runtime import UserError

PLACE = re.compile(r"\{([a-z_]+)\}")
_MARK = re.compile(r"</?([a-z_]+)>")
_TURN = r"<[|｜][^<>|｜\n]{1,60}[|｜]>|</?s>|<(?:B_SYS|B_USYS|C_Q|C_A|start_of_turn|end_of_turn)>|\[/?INST\]"
"""Tokens that begin and end turns: a server may take them for its own wherever they stand."""


def fill(template: str, values: Mapping[str, str]) -> str:
    """Puts values into the places of a template; braces inside a value stay as they are."""
    return PLACE.sub(lambda match: values[match[1]], template)


def framed(template: str, values: Mapping[str, str]) -> str:
    """As `fill`, but what would end its frame is taken out of each value, which is stripped.

    That is the template's own marks such as `<answer>` and `</answer>`, in any case and with blanks or more words
    inside, and tokens that end a turn; also those that appear only once others have been taken out.

    Args:
        template: with marks around its places.
        values: of the places.
    """
    names = "|".join(sorted(set(_MARK.findall(template))))
    ends = re.compile((rf"<\s*/?\s*(?:{names})\b[^<>]*>|" if names else "") + _TURN, re.IGNORECASE)

    def clean(text: str) -> str:
        while (less := ends.sub("", text)) != text:
            text = less
        return text.strip()

    return fill(template, {name: clean(value) for name, value in values.items()})


def require_places(where: str, text: str, needed: Collection[str], allowed: Collection[str]) -> None:
    """Checks the places of a template that a user wrote.

    Raises:
        UserError: one that is needed is not there, or one that is there cannot be filled.
    """
    there = set(PLACE.findall(text))
    for places, verb in ((set(needed) - there, "lacks"), (there - set(allowed), "cannot have")):
        if places:
            raise UserError(f"{where} {verb} {{{'}, {'.join(sorted(places))}}}")
