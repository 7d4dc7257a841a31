"""What free text says, against answers whose meaning is plain to a reader."""

import datetime

import pytest

from galenic.evaluate.benchmarks import scoring

OPTIONS = {"A": "aspirin", "B": "ramipril", "C": "beta blocker", "D": "no drug", "E": "vitamin C"}


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "c.",
        "(C)",
        "**C**",
        "C. beta blocker",
        "The answer is C",
        "The answer is (C).",
        "The answer is: **C**",
        "the correct answer is option C, because A and B do harm.",
        "Answer: c",
        "Answer:\nC",
        "A lowers fever. B lowers the pressure.\n\nFinal answer: C",
        "The correct option is C.",
        "I would choose C.",
        '{"select": "C"}',
        '```json\n{"answer": "C"}\n```',
        r"So we get $\boxed{C}$.",
        r"\boxed{\text{C}}",
        "答案：C",
        "答案是C。",
        "正确答案为（C）",
        "【答案】C",
        "分析：A项错误，B项错误。故选C。",
        "综上所述，因此本题应选择 C",
        "选项C正确，其余均不正确。",
        "C项正确",
        "Ｃ",
        "答案：Ｃ、beta blocker",
        "The answer is beta blocker.",
        "beta blocker",
        "Beta blocker is what helps.",
        "A. aspirin: no.\nB. ramipril: no.\nC. beta blocker: yes.\nSo **C** it is.",
        "A. wrong\nB. wrong\nTherefore C is correct.",
        "The answer is C. Once more: the answer is C.",
        "The answer is not A. The answer is C.",
        "The answer is C, A is wrong.",
        "The answer is C, an ACE inhibitor being option B.",
    ],
)
def test_an_option_is_found(text):
    assert scoring.chosen(text, OPTIONS) == ["C"]
    assert scoring.score_option(text, OPTIONS, ["C"]) == scoring.Verdict(right=1.0, read="C")
    assert scoring.score_option(text, OPTIONS, ["A"]).right == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "I do not know.",
        "A patient has come. It may be anything.",
        "All of them could be right.",
        "A. aspirin\nB. ramipril\nC. beta blocker\nD. no drug",
        "The answer is not C.",
        "The answer is H.",
        "答案尚不明确。",
    ],
)
def test_no_option(text):
    found = scoring.score_option(text, OPTIONS, ["C"])
    assert (found.right, found.problem) == (0.0, "none"), found


@pytest.mark.parametrize(
    "text, read",
    [
        ("The answer is C. No, the answer is B.", "B, C"),
        ("A and C", "A, C"),
        ("The answer is A, C", "A, C"),
        ("The answer is A or C.", "A, C"),
        ("答案：AC", "A, C"),
        ("答案是A。所以选C。", "A, C"),
        ("B is correct, but C is correct as well.", "B, C"),
        ("Answer: aspirin\nAnswer: C", "A, C"),
    ],
)
def test_contradictory_options_are_unanswered(text, read):
    assert scoring.score_option(text, OPTIONS, ["C"]) == scoring.Verdict(
        right=0.0, read=read, problem="several"
    )


@pytest.mark.parametrize("text", ["答案：ABD", "The answer is A, B and D.", "答案：A、B、D", "A,B,D"])
def test_where_several_are_right_all_are_needed(text):
    assert scoring.score_option(text, OPTIONS, ["A", "B", "D"]) == scoring.Verdict(right=1.0, read="A, B, D")
    assert scoring.score_option(text, OPTIONS, ["A", "B"]).right == 0.0
    assert scoring.score_option("答案：A", OPTIONS, ["A", "B"]) == scoring.Verdict(right=0.0, read="A")


NLI = ["entailment", "contradiction", "neutral"]


@pytest.mark.parametrize(
    "text, labels, said",
    [
        ("yes", ["yes", "no", "maybe"], "yes"),
        ("The answer is: no", ["yes", "no", "maybe"], "no"),
        ("There is no doubt that it helps.\nThe answer is: yes", ["yes", "no", "maybe"], "yes"),
        ("Maybe. The trials were small and no effect was seen.", ["yes", "no", "maybe"], "maybe"),
        ("No, it does not.", ["yes", "no", "maybe"], "no"),
        ("The groups differed.\n**Yes**", ["yes", "no", "maybe"], "yes"),
        ("Entailment", NLI, "entailment"),
        ("The premise says nothing of it, so it is neutral.", NLI, "neutral"),
        ("Answer: contradiction (the patient denies it; entailment would need pain)", NLI, "contradiction"),
        ("科室：消化内科", ["内科", "消化内科", "儿科"], "消化内科"),
        ("建议去消化内科就诊。", ["内科", "消化内科", "儿科"], "消化内科"),
        ("答案是：儿科", ["内科", "消化内科", "儿科"], "儿科"),
    ],
)
def test_a_label_is_found(text, labels, said):
    assert scoring.score_label(text, labels, said) == scoring.Verdict(right=1.0, read=said)


@pytest.mark.parametrize(
    "text, labels, problem",
    [
        ("It depends.", NLI, "none"),
        ("The answer is not entailment.", NLI, "none"),
        ("", NLI, "none"),
        ("yes/no", ["yes", "no", "maybe"], "several"),
        ("Entailment or neutral.", NLI, "several"),
        ("儿科或消化内科", ["内科", "消化内科", "儿科"], "several"),
        ("Either neutral or contradiction.", NLI, "several"),
        ("The answer is yes.\nThe answer is no.", ["yes", "no", "maybe"], "several"),
        ("可以去儿科或消化内科", ["内科", "消化内科", "儿科"], "several"),
    ],
)
def test_no_label_or_two(text, labels, problem):
    for label in labels:
        found = scoring.score_label(text, labels, label)
        assert (found.right, found.problem) == (0.0, problem)


@pytest.mark.parametrize(
    "text, number",
    [
        ("The final answer is: 12.5", 12.5),
        ("The final answer is: 12.5 mg/dL", 12.5),
        ("BMI = 70 / 1.75^2 = 22.86\nThe final answer is: 22.86 kg/m^2", 22.86),
        ("The final answer is: 72 mL/min/1.73 m²", 72),
        ("The final answer is: 3 out of 5", 3),
        ("The final answer is: 3/5", 3),
        ("The final answer is: 70 / 3.0625 = 22.86", 22.86),
        ("**The final answer is:** 1,250", 1250),
        (r"\boxed{4}", 4),
        ("最终答案是：4 分", 4),
        ("Answer: -2", -2),
        ("7", 7),
        ("Two points for age.\nThree in all:\n3", 3),
        ("1.2e3", 1200),
    ],
)
def test_a_number_is_found(text, number):
    assert scoring.numbers(text) == [number]
    assert scoring.score_number(text, number, number).right == 1.0
    assert scoring.score_number(text, number + 0.1, number + 1).right == 0.0


def test_a_number_is_right_up_to_its_limits():
    for text, right in (("9.5", 1.0), ("10.5", 1.0), ("9.49", 0.0), ("10.51", 0.0)):
        assert scoring.score_number(f"The final answer is: {text}", 9.5, 10.5).right == right
    assert scoring.score_number("-10", -9.5, -10.5).right == 1.0  # limits of a negative one are often turned
    assert scoring.score_number("The final answer is: 9 or 10", 9, 9).problem == "several"
    assert scoring.score_number("It cannot be said.", 9, 9).problem == "none"


@pytest.mark.parametrize(
    "text",
    [
        "The final answer is: 03/09/2021",
        "The final answer is: 3/9/21",
        "The final answer is: 2021-03-09",
        "March 9, 2021",
        "Mar. 9th, 2021",
        "9 March 2021",
        "最终答案是：2021年3月9日",
    ],
)
def test_a_date_is_found(text):
    day = datetime.date(2021, 3, 9)
    assert scoring.score_date(text, day) == scoring.Verdict(right=1.0, read="2021-03-09")
    assert scoring.score_date(text, datetime.date(2021, 9, 3)).right == 0.0


def test_no_date_or_two():
    day = datetime.date(2021, 3, 9)
    assert scoring.score_date("13/13/2021", day).problem == "none"
    assert scoring.score_date("The final answer is: 03/09/2021 or 03/10/2021", day).problem == "several"


def test_weeks_and_days():
    for text in (
        "The final answer is: 17 weeks, 4 days",
        "('17 weeks', '4 days')",
        "17周4天",
        "17 weeks and 4 days",
    ):
        assert scoring.score_weeks(text, (17, 4)).right == 1.0, text
        assert scoring.score_weeks(text, (17, 3)).right == 0.0
    assert scoring.score_weeks("17 weeks", (17, 0)).problem == "none"


FIVE = """Here are the most likely diagnoses:
1. **Wilson disease** (hepatolenticular degeneration) - low ceruloplasmin
2. Autoimmune hepatitis: raised IgG
3) Infarction, myocardial
4. Gaucher's disease;
5. Haemochromatosis
6. Sarcoidosis
"""


@pytest.mark.parametrize(
    "accepted, right",
    [
        (["Wilson disease"], 1),
        (["Hepatolenticular degeneration"], 1),
        (["Morbus X", "autoimmune Hepatitis"], 1),
        (["myocardial infarction"], 1),
        (["Gauchers disease"], 1),
        (["Sarcoidosis"], 0),  # the sixth
        (["hepatitis"], 0),  # a word of a name is no name
        (["Menkes disease"], 0),
    ],
)
def test_one_of_five_diagnoses_has_an_accepted_name(accepted, right):
    assert scoring.score_diagnosis(FIVE, accepted).right == right


def test_diagnoses_without_numbers():
    assert scoring.score_diagnosis("Asthma\nCOPD", ["COPD"]).right == 1.0
    assert scoring.score_diagnosis("1、哮喘；\n2、肺炎；", ["肺炎"]).right == 1.0
    assert scoring.score_diagnosis("诊断：肺炎", ["肺炎"]).right == 1.0
    assert scoring.score_diagnosis(" \n", ["肺炎"]) == scoring.Verdict(right=0.0, problem="none")
