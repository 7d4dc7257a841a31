import random
import re
from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.starter.holdout import check_no_leak
from galenic.corpus.starter.reasoning import (
    _PROBLEMS,
    CODE_PROMPTS,
    CODE_STEMS,
    arithmetic_conversations,
    arithmetic_documents,
    arithmetic_questions,
    code_conversations,
    code_questions,
    functions,
    near_misses,
    quantity,
    question_modules,
)

MODULE = '''
"""A module."""
import os

def area(width, height):
    """Return the area of a rectangle."""
    checked = [width, height]
    for side in checked:
        if side < 0:
            raise ValueError("negative side")
    return width * height

class Shape:
    def grow(self, factor=2):
        """Make the shape larger by a factor.

        Any factor goes.
        """
        # not a line of code
        self.width *= factor

        self.height *= factor
        return self.redraw()

    def area_of_all(self, *, unit="cm"):
        """area() -> float"""
        total = sum(self.parts)
        return convert(total, unit)

    def __repr__(self):
        """Return the source of the shape."""
        return "Shape()"
'''


def numbers(text):
    return [Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def test_quantities():
    assert quantity(Fraction(12)) == "12"
    assert quantity(Fraction(5, 2), "mg") == "2.5 mg"
    assert quantity(Fraction(1, 8)) == "0.125"


@given(st.integers(0, 10**6), st.sampled_from(_PROBLEMS))
@settings(deadline=None, max_examples=30)
def test_the_working_computes_what_the_answer_says(seed, make):
    problem = make(random.Random(seed))
    assert problem.working.split(" a day")[0].endswith(f"= {problem.answer}")
    a, b, result = numbers(problem.working)[:3]
    expected = {
        "add": lambda: a + b,
        "subtract": lambda: a - b,
        "multiply": lambda: a * b,
        "dose": lambda: a * b,
        "daily dose": lambda: a * b,
        "volume": lambda: a / b,
    }
    if problem.kind == "convert":
        one, factor, given_amount, converted = sorted_conversion(problem.working)
        assert one == 1
        assert given_amount * factor == converted or given_amount == converted * factor
        assert converted == problem.value
    else:
        assert expected[problem.kind]() == result == problem.value
    assert all(quantity(problem.value, problem.unit) not in prompt.split() for prompt in problem.prompts)


def sorted_conversion(working):
    first, second, amount, converted = numbers(working)
    return min(first, second), max(first, second), amount, converted


@given(st.integers(0, 10**6), st.sampled_from(_PROBLEMS))
@settings(deadline=None, max_examples=30)
def test_near_misses_are_wrong_positive_and_in_the_same_unit(seed, make):
    problem = make(random.Random(seed))
    wrong = near_misses(problem, random.Random(seed))
    assert len({*wrong, problem.answer}) == 4
    for option in wrong:
        assert numbers(option)[0] > 0
        assert option.removeprefix(option.split(" ")[0]) == problem.answer.removeprefix(
            problem.answer.split(" ")[0]
        )


def test_questions_and_training_share_no_operands():
    questions = arithmetic_questions(300, 1)
    conversations = arithmetic_conversations(800, 1)
    documents = arithmetic_documents(200, 1)
    texts = [(d.id, d.text) for d in documents]
    texts += [(str(i), "\n".join(m["content"] for m in c["messages"])) for i, c in enumerate(conversations)]
    check_no_leak(questions, [], texts)
    asked = {frozenset(numbers(q["question"])) for q in questions if "+" in q["question"]}
    asked |= {frozenset(numbers(q["question"])) for q in questions if q["question"].startswith("Add")}
    taught = {frozenset(numbers(a + b)) for _, t in texts for a, b in re.findall(r"(\d+ )\+( \d+)", t)}
    assert asked
    assert taught
    assert not asked & taught


def test_arithmetic_questions_are_balanced_and_answer_rank_tells_nothing():
    rows = arithmetic_questions(800, 1)
    assert len(rows) == len({row["question"] for row in rows}) == 800
    assert set(Counter(row["answer"] for row in rows).values()) == {200}
    ranks = Counter()
    for row in rows:
        values = [numbers(option)[0] for option in row["options"]]
        assert len(set(values)) == 4
        ranks[sorted(values).index(values[row["answer"]])] += 1
    assert all(0.18 < ranks[i] / 800 < 0.32 for i in range(4))
    assert set(Counter(row["entity"] for row in rows)) == {
        "add", "subtract", "multiply", "convert", "dose", "daily dose", "volume"
    }  # fmt: skip


def test_arithmetic_is_the_same_for_the_same_seed():
    assert arithmetic_documents(5, 1) == arithmetic_documents(5, 1)
    assert arithmetic_documents(5, 1) != arithmetic_documents(5, 2)
    assert arithmetic_questions(9, 1) == arithmetic_questions(9, 1)
    assert len(arithmetic_documents(5, 1)[0].text.splitlines()) == 6


def test_functions_of_a_module():
    found = {f.name: f for f in functions("shapes", MODULE)}
    assert sorted(found) == ["area", "area_of_all", "grow"]
    assert found["area"].signature == "def area(width, height):"
    assert found["area"].summary == "Return the area of a rectangle."
    assert found["area"].body[0] == "checked = [width, height]"
    assert found["area"].body[2] == "    if side < 0:"
    assert found["grow"].signature == "def grow(self, factor=2):"
    assert found["grow"].body == ("self.width *= factor", "self.height *= factor", "return self.redraw()")
    assert found["area_of_all"].summary == ""  # not a sentence
    assert functions("broken", "def f(:") == []


def library():
    """Returns eight modules of eight functions, no two alike."""
    verbs = ("Open", "Close", "Move", "Count", "Fold", "Paint", "Weigh", "Send")
    things = ("door", "lamp", "ship", "bird", "leaf", "coin", "drum", "rope")
    modules = {}
    for thing in things:
        parts = []
        for verb in verbs:
            name = f"{verb.lower()}_{thing}"
            parts.append(
                f'def {name}(self, {thing}_{len(verb)}):\n    """{verb} one {thing} of the set."""\n'
                f"    item_{name} = self.find({thing!r})\n    item_{name}.check()\n"
                f"    self.log({verb!r})\n    return item_{name}.{verb.lower()}()\n"
            )
        modules[f"{thing}s"] = "\n\n".join(parts)
    return modules


def test_code_questions_are_right_and_balanced():
    sources = library()
    rows = code_questions(sources, 100, 1)
    assert len(rows) == 100
    assert set(Counter(row["answer"] for row in rows).values()) == {25}
    assert len({row["id"] for row in rows}) == 100
    for row in rows:
        module, name = row["entity"].split(".")
        function = next(f for f in functions(module, sources[module]) if f.name == name)
        right = row["options"][row["answer"]]
        if row["id"].endswith("summary-signature"):
            assert right == function.signature and function.summary in row["question"]
        elif row["id"].endswith("signature-summary"):
            assert right == function.summary and function.signature in row["question"]
        else:
            at = [line.strip() for line in function.body].index(right)
            assert row["question"].endswith("\n".join(function.body[max(0, at - 3) : at]) + "\n")
            assert not set(row["options"]) - {right} & {line.strip() for line in function.body}


def test_code_modules_are_disjoint_and_conversations_stay_in_theirs():
    sources = library()
    asked = question_modules(sources, share=0.4, seed=3)
    assert 0 < len(asked) < len(sources)
    assert question_modules(reversed(list(sources)), share=0.4, seed=3) == asked
    rows = code_conversations({k: v for k, v in sources.items() if k not in asked}, 50, 1)
    assert len(rows) == 50
    text = "\n".join(m["content"] for row in rows for m in row["messages"])
    assert not any(module.removesuffix("s") in text for module in asked)
    assert not {t for ts in CODE_PROMPTS.values() for t in ts} & set(CODE_STEMS.values())
