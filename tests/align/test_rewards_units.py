"""Numbers with units: against values worked out by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galenic.align.rewards.units import UNITS, Quantity, parse, quantities, unified

SAME = [
    # A quantity, and the same in another unit.
    ("2.5 mg/kg", "2500 μg/kg"),
    ("2.5 mg/kg", "0.0025 g per kg"),
    ("10 mg/kg/d", "10 mg/(kg·d)"),
    ("10 mg/kg/day", "10毫克/公斤/天"),
    ("24 mg per kg per day", "1 mg/kg/h"),
    ("10毫克每公斤", "10 mg/kg"),
    ("500 mg", "0.5 g"),
    ("500mcg", "0.5 mg"),
    ("500 µg", "0.5 MG"),
    ("５００ｍｇ", "0.5克"),
    ("1,000 mL", "1 L"),
    ("5 cc", "5 mL"),
    ("100 mL/h", "2.4 L/day"),
    ("6.2 × 10⁹/L", "6200/μL"),
    ("6.2 x 10^9 / L", "6.2e3/mm3"),
    ("10^9/L", "1000 cells/μL"),
    ("140 mmol/L", "0.14 M"),
    ("140 mEq/L", "0.14 eq/l"),
    ("37 ℃", "98.6 °F"),
    ("37 ℃", "310.15 K"),
    ("7.5 kPa", "7500 Pa"),
    ("1 torr", "1 mm Hg"),
    ("120毫米汞柱", "120 mmHg"),
    ("72/min", "72 bpm"),
    ("72 beats per minute", "72次/分"),
    ("2 years", "24 months"),
    ("3周岁", "36个月"),
    ("90分钟", "1.5 hours"),
    ("1.73 m²", "17300 cm^2"),
    ("2000 kcal", "8368 kJ"),
    ("50000国际单位", "50,000 IU"),
    (r"5\,\text{mg}", "5 mg"),
    (r"6.2 \times 10^{9}/L", "6.2 × 10⁹/L"),
    ("50 %", "0.5 time"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_quantity(one, other):
    first, second = parse(one), parse(other)
    assert first.unit is not None and second.unit is not None
    assert second.to(first.unit) == first.value
    assert first.to(second.unit) == second.value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5 mg", "5 mL"),
        ("5 mg/kg", "5 mg"),
        ("5 mg/kg/d", "5 mg/kg"),
        ("5 IU", "5 mg"),
        ("5 mM", "5 mm"),
        ("5 mmol/L", "5 mEq/L"),
    ],
)
def test_other_dimensions(one, other):
    with pytest.raises(ValueError, match="dimension"):
        parse(one).to(parse(other).unit)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("-5", [-5]),
        ("−5", [-5]),
        ("(-5)", [-5]),
        ("5-10 mg", [5, 10]),
        ("120/80 mmHg", [120, 80]),
        ("B12 300 pg/mL, HbA1c 7.5%", [300, Fraction("7.5")]),
        ("1,234,567", [1234567]),
        (".5", [Fraction(1, 2)]),
        ("1.5e-3", [Fraction("0.0015")]),
        ("约5毫克", [5]),
        ("5.", [5]),
        ("none", []),
        ("1.2.3", []),
        ("1e999999999", []),
        ("9" * 100_000, []),
        ("", []),
    ],
)
def test_numbers_in_a_text(text, values):
    assert [quantity.value for quantity in quantities(text)] == values


def test_a_word_that_is_no_unit_is_none():
    assert parse("5 doses").unit is None
    assert parse("5 mg of morphine per patient").unit == UNITS["mg"]
    assert parse("120").unit is None


@pytest.mark.parametrize("text", ["", "mg", "5 or 6 mg"])
def test_not_one_number(text):
    with pytest.raises(ValueError, match="not one number"):
        parse(text)


@given(
    st.fractions(-(10**6), 10**6, max_denominator=1000),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(sorted(UNITS)),
)
def test_there_and_back_is_exact(value, name, other):
    quantity, unit = Quantity(value, UNITS[name]), UNITS[other]
    if quantity.unit.powers == unit.powers:
        assert Quantity(quantity.to(unit), unit).to(quantity.unit) == value


@pytest.mark.parametrize("name", sorted(UNITS))
def test_every_unit_is_read_by_its_name(name):
    assert parse(f"3 {name}").unit == UNITS[name]


@given(st.text(max_size=200))
def test_any_text_is_read(text):
    quantities(text)
    assert unified(unified(text)) is not None
