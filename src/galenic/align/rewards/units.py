"""Numbers with units as medicine writes them: "2.5 mg/kg/d", "6.2 × 10⁹/L", "37.5 ℃", "每天5毫克", "120/80 mmHg".

A unit is a factor and powers of a few bases. All that follows the first "/" (or "per", "每") stands in the denominator:
"mg/kg/d", "mg/(kg·d)" and "mg per kg per day" are the same. Numbers are fractions, so that 0.5 g is 500 mg exactly.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """A unit: a value in it is `value * factor + offset` in the bases."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]
    """Base -> power, sorted: g, m, s, mol, K, IU, Eq, Osm."""
    offset: Fraction = Fraction(0)
    """Of temperatures."""


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, if it has one."""

    value: Fraction
    unit: Unit | None = None

    def to(self, unit: Unit) -> Fraction:
        """Returns the value in another unit.

        Raises:
            ValueError: the quantity has no unit, or one of another dimension.
        """
        if self.unit is None or self.unit.powers != unit.powers:
            raise ValueError("not of the same dimension")
        return (self.value * self.unit.factor + self.unit.offset - unit.offset) / unit.factor


def parse(text: str) -> Quantity:
    """Reads a text that is one number, with or without a unit.

    Raises:
        ValueError: it is not.
    """
    found = quantities(text)
    if len(found) != 1:
        raise ValueError(f"{text!r} is not one number")
    return found[0]


def quantities(text: str) -> list[Quantity]:
    """Finds the numbers in a text, each with the unit that follows it."""
    text = unified(text)
    return [Quantity(_value(match), _unit(text, match.end())) for match in _NUMBER.finditer(text)]


def unified(text: str) -> str:
    """Returns a text in one writing: NFKC, powers as `^`, one kind of minus, LaTeX's marks resolved."""
    text = re.sub(
        "[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text
    )  # NFKC alone would make 109 of 10⁹
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("µ", "μ")
    if "\\" in text:
        text = re.sub(r"\\(?:text|mathrm|mathbf|mathit)\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"^\1", text)
        text = re.sub(r"\\[,;:! ]", " ", text).replace("\\times", "×").replace("\\cdot", "·")
        text = text.replace("\\%", "%").replace("\\mu", "μ")
    return text


# ---------------------------------------------------------------------------- numbers

_NUMBER = re.compile(
    r"""(?P<sign>(?<![\w.)%])[-+])?
    (?<![A-Za-z\d.^])
    (?: 10\s?\^\s?(?P<power>[-+]?\d{1,2})
      | (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d{1,30})? | \d{1,30}(?:\.\d{1,30})? | \.\d{1,30})
        (?: [eE](?P<e>[-+]?\d{1,2}) | \s?[x×*·]\s?10\s?\^\s?(?P<ten>[-+]?\d{1,2}) )?
    )(?!\d|\.\d|[eE][-+]?\d)""",
    re.VERBOSE,
)  # the numbers of digits are limited: an answer must not keep us busy with 1e999999999


def _value(match: re.Match[str]) -> Fraction:
    power = int(match["power"] or match["e"] or match["ten"] or 0)
    digits = (match["digits"] or "1").replace(",", "")
    return (-1 if match["sign"] == "-" else 1) * Fraction(digits) * Fraction(10) ** power


# ---------------------------------------------------------------------------- units

_OPERATOR = re.compile(r"\s*\)?\s*(/|per\b|每|[·⋅*])?\s*\(?\s*", re.IGNORECASE)
_WORD = re.compile(r"mm\s?Hg|cm\s?H2O|°\s?[CF]\b|[%‰]|[A-Za-zμ]+", re.IGNORECASE)
_POWER = re.compile(r"\^?(-?[1-9])(?![\d.])")


def _unit(text: str, place: int) -> Unit | None:
    """Reads the unit at a place, as far as it is one."""
    factor, powers, below, found = Fraction(1), Counter(), False, []
    while True:
        operator = _OPERATOR.match(text, place)
        assert operator is not None
        if found and operator[1] is None:
            break
        below = below or (operator[1] is not None and operator[1] not in "·⋅*")
        unit, place = _named(text, operator.end())
        if unit is None:
            break
        power = _POWER.match(text, place)
        exponent = (int(power[1]) if power else 1) * (-1 if below else 1)
        place = power.end() if power else place
        factor *= unit.factor**exponent
        powers.update({base: exponent * times for base, times in unit.powers})
        found.append((unit, exponent))
    if not found:
        return None
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0]
    return Unit(factor, tuple(sorted((base, times) for base, times in powers.items() if times)))


def _named(text: str, place: int) -> tuple[Unit | None, int]:
    """Finds the unit whose name stands at a place, and where the name ends."""
    word = _WORD.match(text, place)
    if word:
        name = re.sub(r"\s", "", word[0])
        lower = name.lower()
        for known in (name, lower, lower.removesuffix("s")):
            unit = UNITS.get(known) or _LOWER.get(known)
            if unit:
                return unit, word.end()
        return None, place
    for length in range(_LONGEST, 0, -1):
        unit = _CHINESE_UNITS.get(text[place : place + length])
        if unit and len(text) >= place + length:
            return unit, place + length
    return None, place


_PREFIXES = {"k": 3, "d": -1, "c": -2, "m": -3, "μ": -6, "u": -6, "mc": -6, "n": -9, "p": -12, "f": -15}
_LONG_PREFIXES = {"kilo": 3, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "pico": -12}
_CHINESE_PREFIXES = {"千": 3, "分": -1, "厘": -2, "毫": -3, "微": -6, "纳": -9, "皮": -12}
_METRIC = (
    # symbols, names, in Chinese, factor, powers
    ("g", "gram", "克", "1", {"g": 1}),
    ("L", "liter litre", "升", "1e-3", {"m": 3}),
    ("m", "meter metre", "米", "1", {"m": 1}),
    ("mol", "mole", "摩尔", "1", {"mol": 1}),
    ("M", "molar", "", "1e3", {"mol": 1, "m": -3}),
    ("Pa", "pascal", "帕", "1e3", {"g": 1, "m": -1, "s": -2}),
    ("J", "joule", "焦", "1e3", {"g": 1, "m": 2, "s": -2}),
    ("cal", "calorie", "卡", "4184", {"g": 1, "m": 2, "s": -2}),
    ("Eq", "equivalent", "当量", "1", {"Eq": 1}),
    ("Osm", "osmole", "渗透摩尔", "1", {"Osm": 1}),
    ("IU U", "unit", "单位 国际单位", "1", {"IU": 1}),
    ("s", "second sec", "秒", "1", {"s": 1}),
)
_OTHERS = (
    # names, factor, powers; a month is a twelfth of a year of 365.25 days
    ("min minute 分钟 分", "60", {"s": 1}),
    ("h hr hour 小时", "3600", {"s": 1}),
    ("d day 天 日", "86400", {"s": 1}),
    ("wk week 周 星期", "604800", {"s": 1}),
    ("mo month 月 个月", "2629800", {"s": 1}),
    ("y yr year 年 岁 周岁", "31557600", {"s": 1}),
    ("公斤", "1e3", {"g": 1}),
    ("cc", "1e-6", {"m": 3}),
    ("lb pound 磅", "453.59237", {"g": 1}),
    ("mmhg torr 毫米汞柱", "133322.387415", {"g": 1, "m": -1, "s": -2}),
    ("cmh2o 厘米水柱", "98066.5", {"g": 1, "m": -1, "s": -2}),
    ("K kelvin", "1", {"K": 1}),
    ("% percent", "0.01", {}),
    ("‰", "0.001", {}),
    ("cell copy copies cfu time beat breath tablet 个 次 片 粒", "1", {}),
)
_ZERO = {"°C C celsius degc 摄氏度": ("1", "273.15"), "°F F fahrenheit degf 华氏度": ("5/9", "45967/180")}


def _tables() -> dict[str, Unit]:
    """Lays all names out."""
    table = {}

    def put(names: str, factor: Fraction, powers: dict[str, int], offset: Fraction = Fraction(0)) -> None:
        for name in names.split():
            table[name] = Unit(factor, tuple(sorted(powers.items())), offset)

    for symbols, names, chinese, factor, powers in _METRIC:
        for spelled, prefixes in (
            (symbols, _PREFIXES),
            (names, _LONG_PREFIXES),
            (chinese, _CHINESE_PREFIXES),
        ):
            for name in spelled.split():
                put(name, Fraction(factor), powers)
                for prefix, power in prefixes.items():
                    put(prefix + name, Fraction(factor) * Fraction(10) ** power, powers)
    for names, factor, powers in _OTHERS:
        put(names, Fraction(factor), powers)
    for names, (factor, offset) in _ZERO.items():
        put(names, Fraction(factor), {"K": 1}, Fraction(offset))
    put("bpm", Fraction(1, 60), {"s": -1})
    return table


UNITS = _tables()
"""Name -> unit. Case tells mM from mm; what is not found so is looked up without case."""
_LOWER = {name.lower(): unit for name, unit in reversed(UNITS.items()) if name.isascii() or name[0] in "μ°"}
_CHINESE_UNITS = {name: unit for name, unit in UNITS.items() if "\u4e00" <= name[0] <= "\u9fff"}
_LONGEST = max(map(len, _CHINESE_UNITS))
