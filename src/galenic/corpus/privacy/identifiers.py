"""What identifies a person in a clinical note, as patterns: here what is the same in every language.

Each rule is (category, pattern, test): what its group `x` matches, or the whole match, is an identifier if it passes
the test. `identifiers_en.py` and `identifiers_zh.py` add how notes are written in English and in Chinese. Rules lean
on labels, titles and forms of numbers, as no list of names or places comes with them. They err on the side of taking
too much: a lost word costs a training text little.

The categories cover what Safe Harbor, 45 CFR 164.514(b)(2)(i), lists: (A) names NAME; (B) places smaller than a state
ADDRESS, HOSPITAL; (C) dates, ages over 89 DATE, AGE; (D, E) telephone and fax numbers PHONE; (F) e-mail EMAIL; (G)
social security, (H) medical record, (I) health plan, (J) account, (K) certificate and licence numbers, (R) any other
unique number ID; (L) vehicles VEHICLE; (M) devices DEVICE; (N) URL; (O) IP. Biometric identifiers (P) and
photographs (Q) are no text.
"""

import re
from collections.abc import Callable, Sequence

Rule = tuple[str, re.Pattern[str], Callable[[str], bool] | None]

YEAR, MONTH, DAY = r"(?:19|20)\d\d", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
HAN = re.compile(r"[\u3400-\u9fff]")


def rules(category: str, patterns: Sequence[str], test: Callable[[str], bool] | None = None) -> list[Rule]:
    """Compiles patterns of one category and one test."""
    return [(category, re.compile(pattern), test) for pattern in patterns]


def resident_id(text: str) -> bool:
    """True for a Chinese resident number with the right check character (GB 11643-1999, ISO 7064 MOD 11-2).

    >>> resident_id("11010519491231002X"), resident_id("110105194912310021")
    (True, False)
    """
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(digit) for weight, digit in zip(weights, text, strict=False))
    return "10X98765432"[total % 11] == text[17].upper()


def luhn(text: str) -> bool:
    """True for a card number with the right check digit (ISO/IEC 7812-1).

    >>> luhn("4111 1111 1111 1111"), luhn("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(digit) for digit in reversed(text) if digit.isdigit()]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def _octets(text: str) -> bool:
    return all(int(part) < 256 for part in text.split("."))


ANY = [
    *rules(
        "EMAIL", [r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"]
    ),
    *rules("URL", [r"\b(?:https?://|www\.)[^\s<>\"'，。；）)]+"]),
    *rules("IP", [r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"], _octets),
    *rules("IP", [r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])"]),
    *rules("DEVICE", [r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])"]),
    *rules("ID", [r"(?<![\dXx])[1-9]\d{5}(?:18|19|20)\d{9}[\dXx](?!\d)"], resident_id),
    *rules("ID", [r"(?<![\d.])(?:\d{4}[ -]){3}\d{3,4}(?![\d.])"], luhn),
    *rules(
        "ID",
        [
            # Chinese resident numbers of 15 digits, before 1999; social security numbers.
            r"(?<!\d)[1-9]\d{5}\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?!\d)",
            r"(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])",
            # A long number that nothing explains; a count of cells or copies has its unit behind it.
            r"(?<![\d.,/])[A-Z]{0,3}\d{8,40}(?!\d)(?![\d.]{0,9}\s?(?:/|copies|cells|IU|units|×|个|拷贝))",
        ],
    ),
    *rules(
        "DATE",
        [
            rf"(?<![\d./-]){YEAR}([-/.]){MONTH}\1{DAY}(?![\d/-])",
            rf"(?<![\d./-]){DAY}([-/.]){DAY}\1(?:{YEAR}|\d\d)(?![\d/-])",
        ],
    ),
    *rules(
        "PHONE",
        [
            r"(?<![\d.-])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)",
            r"(?<![\d.-])[(（]?0\d{2,3}[)）]?[-－ ]?\d{7,8}(?:[-－转]\d{1,5})?(?!\d)",
            r"(?<![\d.-])(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?:,?\s*(?:x|ext\.?)\s*\d+)?(?!\d)",
            r"(?<![\w.])\+\d{1,3}(?:[ -]?\(?\d{1,4}\)?){2,5}(?!\d)",
        ],
    ),
]
