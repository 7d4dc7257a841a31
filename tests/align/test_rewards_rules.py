"""Rules: what is right, what is wrong, and what tries to be right by saying everything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galenic.align.config import RewardsConfig
from galenic.align.rewards.rules import answer_of, check, code_of, contradiction
from galenic.align.tasks import Task

CONFIG = RewardsConfig()


def task(rule, answer, options=(), **more):
    return Task(
        id="t",
        messages=[{"role": "user", "content": "?"}],
        answer=answer,
        options=tuple(options),
        rule=rule,
        **more,
    )


def right(rule, answer, text, options=(), **more):
    return check(task(rule, answer, options, **more), text, CONFIG) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("aspirin", "aspirin"),
        ("  aspirin\n", "aspirin"),
        ("It hurts.\nAnswer: aspirin", "aspirin"),
        ("**Answer:** aspirin", "aspirin"),
        ("Answer: A\nno, wait\nAnswer: B\n", "B"),
        ("Answer: aspirin\nIt helps.", "aspirin"),
        ("So the answer is B", "B"),
        ("The answer is: B", "B"),
        ("the answer isn't B", "the answer isn't B"),
        ("病人发热。答案：阿司匹林", "阿司匹林"),
        ("答案是阿司匹林", "阿司匹林"),
        (r"so \boxed{5 \text{ mg}}.", "5   mg"),
        (r"Answer: 4, no: \boxed{a{b}c}", "a{b}c"),
        (r"\boxed{4} and then Answer: 5", "5"),
        (r"\boxed{4", "4"),
        ("Answer:", ""),
        ("answers are many", "answers are many"),
    ],
)
def test_what_the_answer_is(text, answer):
    assert answer_of(text) == answer


def test_several_lines_where_the_answer_has_them():
    assert right("exact", "one\ntwo", "Answer: one\ntwo\nthree")
    assert not right("exact", "one", "one\ntwo")


@pytest.mark.parametrize(
    ("answer", "text", "passes"),
    [
        ("Myocardial infarction", "the myocardial infarction.", True),
        ("Crohn's disease", "crohn’s disease", True),
        ("x-ray", "X ray", True),
        ("ＣＴ", "CT", True),
        ("心肌梗死", "心肌梗死。", True),
        ("5 毫克", "５毫克", True),
        ("vitamin A", "vitamin a", True),
        ("vitamin A", "vitamin", False),
        ("A", "A", True),
        ("3.5", "35", False),
        ("1/2", "12", False),
        ("-5", "5", False),
        ("5%", "5", False),
        ("< 5", "> 5", False),
        ("HER2+", "HER2", False),
        ("1,000", "1000", True),
        ("aspirin", "aspirin or ibuprofen", False),
        ("aspirin", "", False),
        ("aspirin", "Answer: ", False),
    ],
)
def test_exact(answer, text, passes):
    assert right("exact", answer, text) is passes


DRUGS = ("aspirin", "ibuprofen", "morphine", "aspirin and morphine")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("ibuprofen", True),
        ("Ibuprofen.", True),
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("B.", True),
        ("B) ibuprofen", True),
        ("B. Because it is mild.", True),
        ("Option B", True),
        ("选B", True),
        ("选项 B", True),
        ("2", True),
        ("2. ibuprofen", True),
        ("The answer is B", True),
        ("I think.\nAnswer: (B) ibuprofen", True),
        ("One should give ibuprofen here", True),
        ("A", False),
        ("B) aspirin", False),
        ("B or C", False),
        ("B, C", False),
        ("B. C.", False),
        ("A B C D", False),
        ("ibuprofen or morphine", False),
        ("aspirin; ibuprofen; morphine", False),
        ("not ibuprofen", False),
        ("2.5 mg", False),
        ("A drug like ibuprofen helps", True),
        ("E", False),
        ("9", False),
        ("", False),
    ],
)
def test_option(text, passes):
    assert right("option", "ibuprofen", text, DRUGS) is passes


def test_options_that_hold_one_another_and_numbers():
    assert right("option", "aspirin and morphine", "We give aspirin and morphine", DRUGS)
    assert right("option", "4", "4", ("1", "2", "4", "3"))
    assert not right("option", "3", "4", ("1", "2", "4", "3"))
    assert right("option", "糖尿病", "诊断为糖尿病", ("高血压", "糖尿病"))
    assert not right("option", "糖尿病", "不是糖尿病", ("高血压", "糖尿病"))


@pytest.mark.parametrize(
    ("truth", "text", "passes"),
    [
        ("500 mg", "0.5 g", True),
        ("500 mg", "504 mg", True),
        ("500 mg", "506 mg", False),
        ("500 mg", "500", True),
        ("500", "500 mg", True),
        ("500 mg", "500 g", False),
        ("500 mg", "500 mL", False),
        ("350 mg", "Answer: 5 mg/kg × 70 kg = 350 mg", True),
        ("350 mg", "5 mg/kg for 70 kg, 350 mg", False),
        ("350 mg", "340 mg, 350 mg, 360 mg", False),
        ("120/80 mmHg", "120/80", True),
        ("120/80 mmHg", "60/40 mmHg", False),
        ("37 ℃", "98.6 °F", True),
        ("37 ℃", "38 ℃", False),
        ("0", "0", True),
        ("0", "0.001", False),
        ("-5", "5", False),
        ("5", ">5", False),
        ("<5 mg", "< 5 mg", True),
        ("6.2 × 10⁹/L", "6200/μL", True),
        ("5 mg", "five", False),
        ("5 mg", r"\boxed{5\,\text{mg}}", True),
    ],
)
def test_numeric(truth, text, passes):
    assert right("numeric", truth, text) is passes


def test_tolerance_of_the_task_comes_first():
    assert right("numeric", "100", "110", tolerance=0.1)
    assert not right("numeric", "100", "100.5", tolerance=0.0)
    assert right("numeric", "500 mg", "0.5 g", tolerance=0.0)
    assert check(task("numeric", "100"), "104", RewardsConfig(tolerance=0.05)) == 1.0


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Myocardial infarction", True),
        ("heart attack", True),
        ("Infarction, myocardial", True),
        ("I21", True),
        ("I21.9", True),
        ("i219", True),
        ("Diagnosis: heart attack (I21.0)", True),
        ("诊断：心肌梗死", True),
        ("ICD-10: I21", True),
        ("heart attack (J45)", False),
        ("asthma (I21)", False),
        ("I22", False),
        ("I21, J45", False),
        ("heart attack or asthma", False),
        ("heart attack; myocardial infarction", False),
        ("heart", False),
        ("", False),
    ],
)
def test_diagnosis(text, passes):
    assert right("diagnosis", "myocardial infarction|heart attack|心肌梗死|I21", text) is passes


def test_diagnosis_without_a_code():
    assert right("diagnosis", "asthma", "Asthma (J45.9)")
    assert not right("diagnosis", "asthma", "J45.9")
    assert right("diagnosis", "B12 deficiency", "B12 deficiency")
    assert not right("diagnosis", "I21.9", "I21"), "a coarser code does not say it"


def test_code_is_the_last_block():
    assert code_of("First\n```python\na = 1\n```\nthen\n```\nb = 2\n```\n") == "b = 2\n"
    assert code_of("a = 1") == "a = 1"


@pytest.mark.parametrize(
    ("bad", "rule"), [("no number", "numeric"), ("...", "exact"), ("...|asthma", "diagnosis")]
)
def test_an_answer_that_contradicts_its_rule(bad, rule):
    assert "does not pass its rule" in contradiction(task(rule, bad), CONFIG)
    assert contradiction(task("numeric", "5 mg"), CONFIG) == ""
    assert contradiction(task("diagnosis", "asthma|J45"), CONFIG) == ""


@given(st.text(max_size=80), st.sampled_from(["exact", "option", "numeric", "diagnosis"]))
def test_any_text_is_judged(text, rule):
    assert check(task(rule, "5 mg", ("5 mg", "6 mg") if rule == "option" else ()), text, CONFIG) in (0.0, 1.0)


def test_an_option_is_found_by_text_letter_and_number():
    options = ("first thing", "second thing", "third thing")
    for number, (letter, name) in enumerate(zip("ABC", options, strict=True)):
        for said in (name, letter, f"({letter})", str(number + 1), f"{letter}. {name}"):
            for other, truth in enumerate(options):
                assert right("option", truth, said, options) is (other == number)
