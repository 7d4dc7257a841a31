"""Procedural arithmetic and code: training text, conversations and questions that share no operands and no module.

problem (kind, operands) --hash of the operands--> training (documents, conversations) | questions
library module           --hash of the name-----> training (documents, conversations) | questions
"""

import ast
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from galenic.corpus.records import Document
from galenic.corpus.starter.facts import wrong_answers
from galenic.corpus.starter.holdout import stable_key, stable_shuffle
from galenic.corpus.starter.questions import seal, take_in_turn

QUESTION_SHARE = 0.15
"""Share of all operand pairs that belong to questions."""

# ---------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Problem:
    """One calculation: what is asked, how it is worked, what comes out."""

    kind: str
    operands: tuple[int, ...]
    """Decide the side; those of sums and products in ascending order, so that 3 + 5 and 5 + 3 stay together."""
    prompts: tuple[str, ...]
    working: str
    value: Fraction
    unit: str = ""

    @property
    def answer(self) -> str:
        """The result with its unit."""
        return quantity(self.value, self.unit)

    @property
    def for_questions(self) -> bool:
        """True if the operands belong to the questions, false if to training."""
        return stable_key("arithmetic", self.kind, *self.operands) < QUESTION_SHARE * 2**64


def quantity(value: Fraction, unit: str = "") -> str:
    """Writes a number that ends within four decimals, with its unit.

    >>> quantity(Fraction(5, 2), "mg")
    '2.5 mg'
    """
    number = f"{float(value):.4f}".rstrip("0").rstrip(".") if value.denominator > 1 else str(value.numerator)
    return f"{number} {unit}" if unit else number


def _add(draw: random.Random) -> Problem:
    a, b = draw.randint(2, 199), draw.randint(2, 199)
    prompts = (f"What is {a} + {b}?", f"Add {a} and {b}.")
    return Problem("add", (min(a, b), max(a, b)), prompts, f"{a} + {b} = {a + b}", Fraction(a + b))


def _subtract(draw: random.Random) -> Problem:
    a, b = sorted((draw.randint(2, 199), draw.randint(2, 199)), reverse=True)
    prompts = (f"What is {a} - {b}?", f"Subtract {b} from {a}.")
    return Problem("subtract", (a, b), prompts, f"{a} - {b} = {a - b}", Fraction(a - b))


def _multiply(draw: random.Random) -> Problem:
    a, b = draw.randint(2, 12), draw.randint(3, 99)
    prompts = (f"What is {a} * {b}?", f"Multiply {a} by {b}.")
    return Problem("multiply", (min(a, b), max(a, b)), prompts, f"{a} * {b} = {a * b}", Fraction(a * b))


_UNITS = (
    ("g", "mg", 1000),
    ("mg", "mcg", 1000),
    ("L", "mL", 1000),
    ("kg", "g", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("m", "cm", 100),
    ("cm", "mm", 10),
)


def _convert(draw: random.Random) -> Problem:
    row = draw.randrange(len(_UNITS))
    large, small, factor = _UNITS[row]
    # Half units make decimals where the small unit stays whole.
    amount = Fraction(draw.randint(3, 120), 2 if factor % 2 == 0 else 1)
    a, b = quantity(amount, large), quantity(amount * factor, small)
    if draw.random() < 0.5:
        prompts = (f"Convert {a} to {small}.", f"How many {small} are {a}?")
        working = f"1 {large.rstrip('s') if len(large) > 2 else large} = {factor} {small}, so {a} = {b}"
        return Problem("convert", (row, int(2 * amount)), prompts, working, amount * factor, small)
    prompts = (f"Convert {b} to {large}.", f"How many {large} are {b}?")
    working = f"{factor} {small} = 1 {large.rstrip('s') if len(large) > 2 else large}, so {b} = {a}"
    return Problem("convert", (row, int(2 * amount)), prompts, working, amount, large)


def _dose(draw: random.Random) -> Problem:
    per_kg, weight = draw.choice((2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25)), draw.randint(3, 95)
    prompts = (
        f"A patient weighs {weight} kg and needs {per_kg} mg/kg. What is the dose?",
        f"Dose {per_kg} mg/kg, body weight {weight} kg. How many mg?",
    )
    working = f"{per_kg} mg/kg * {weight} kg = {per_kg * weight} mg"
    return Problem("dose", (per_kg, weight), prompts, working, Fraction(per_kg * weight), "mg")


def _daily(draw: random.Random) -> Problem:
    single, times = 5 * draw.randint(1, 200), draw.choice((2, 3, 4, 6))
    prompts = (
        f"A patient takes {single} mg {times} times a day. What is the daily dose?",
        f"{single} mg, {times} times a day. How many mg a day?",
    )
    working = f"{single} mg * {times} = {single * times} mg a day"
    return Problem("daily dose", (single, times), prompts, working, Fraction(single * times), "mg")


def _volume(draw: random.Random) -> Problem:
    strength, volume = draw.choice((2, 4, 5, 10, 20, 25, 40, 50)), Fraction(draw.randint(1, 200), 2)
    dose = strength * volume
    prompts = (
        f"A solution holds {strength} mg/mL. How many mL give {quantity(dose, 'mg')}?",
        f"Order: {quantity(dose, 'mg')}. Stock: {strength} mg/mL. What volume?",
    )
    working = f"{quantity(dose, 'mg')} / {strength} mg/mL = {quantity(volume, 'mL')}"
    return Problem("volume", (strength, int(2 * volume)), prompts, working, volume, "mL")


_PROBLEMS: tuple[Callable[[random.Random], Problem], ...] = (
    _add,
    _subtract,
    _multiply,
    _convert,
    _dose,
    _daily,
    _volume,
)


def _problems(label: str, seed: int, *, for_questions: bool) -> Iterator[Problem]:
    """Yields problems of one side, each kind in turn, without end."""
    draw = random.Random(stable_key(seed, label))
    while True:
        for make in _PROBLEMS:
            problem = make(draw)
            while problem.for_questions != for_questions:
                problem = make(draw)
            yield problem


def arithmetic_documents(count: int, seed: int) -> list[Document]:
    """Writes worked examples as text, six to a document, source `arithmetic`."""
    problems = _problems("documents", seed, for_questions=False)
    draw = random.Random(stable_key(seed, "document wording"))
    documents = []
    for index in range(count):
        lines = []
        for _ in range(6):
            problem = next(problems)
            lines.append(f"{draw.choice(problem.prompts)} {problem.working}.")
        documents.append(
            Document(
                id=f"arithmetic/{index:05d}",
                text="\n".join(lines),
                source="arithmetic",
                licence="Apache-2.0",
                language="en",
                category="mathematics",
                department="",
            )
        )
    return documents


def arithmetic_conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Writes conversations that ask for one result: mostly the bare result, sometimes with the working after it."""
    problems = _problems("conversations", seed, for_questions=False)
    draw = random.Random(stable_key(seed, "conversation wording"))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    tries = 0
    while len(rows) < count and tries < 20 * count:  # the supply of small problems is finite
        tries += 1
        problem = next(problems)
        prompt = draw.choice(problem.prompts)
        answer = problem.answer if draw.random() < 0.8 else f"{problem.answer}, because {problem.working}."
        if prompt not in seen:
            seen.add(prompt)
            rows.append(_conversation(prompt, answer, "arithmetic"))
    return rows


def _conversation(prompt: str, answer: str, source: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source, "department": "", "category": "general"}


def arithmetic_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Writes multiple-choice questions with near-miss distractors; operands never used in training."""
    problems = _problems("questions", seed, for_questions=True)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    tries = 0
    while len(rows) < count and tries < 50 * count:
        tries += 1
        problem = next(problems)
        stem = problem.prompts[stable_key(seed, problem.prompts[0]) % len(problem.prompts)]
        wrong = near_misses(problem, random.Random(stable_key(seed, "misses", stem)))
        if stem in seen or len(wrong) < 3:
            continue
        seen.add(stem)
        rows.append(
            {
                "id": f"arithmetic/{len(rows):05d}",
                "question": stem,
                "options": [problem.answer, *wrong],
                "answer": 0,
                "source": "arithmetic",
                "department": "",
                "entity": problem.kind,
            }
        )
    return seal(rows, seed)


def near_misses(problem: Problem, draw: random.Random) -> list[str]:
    """Returns three wrong results: off by one or ten, digits swapped, a neighbouring factor.

    How many of them are smaller than the right one is drawn, so that its rank among the options tells nothing.
    """
    value = problem.value
    step = 1 if value.denominator == 1 else Fraction(1, 2)
    misses = {value + k * step for k in (-10, -2, -1, 1, 2, 10)}
    if problem.kind == "convert":
        misses |= {value * 10, value / 10, value * 100, value / 100}
    elif problem.kind != "add" and problem.kind != "subtract":
        misses |= {value + k * operand for operand in problem.operands for k in (-1, 1)}
    if value.denominator == 1 and value >= 10:
        digits = str(value.numerator)
        at = draw.randrange(len(digits) - 1)
        misses.add(Fraction(int(digits[:at] + digits[at + 1] + digits[at] + digits[at + 2 :])))
    exact = {m for m in misses if m > 0 and m != value and (m * 10**4).denominator == 1}
    below = draw.sample(sorted(m for m in exact if m < value), k=sum(m < value for m in exact))
    above = draw.sample(sorted(m for m in exact if m > value), k=sum(m > value for m in exact))
    smaller = draw.randrange(4)
    chosen = below[:smaller] + above[: 3 - smaller]
    spare = below[smaller:] + above[3 - smaller :]
    return [quantity(m, problem.unit) for m in (chosen + spare)[:3]]


# ---------------------------------------------------------------------------- code


@dataclass(frozen=True)
class Function:
    """One function or method of a module."""

    module: str
    name: str
    signature: str
    """The `def` line, without indentation; empty if long."""
    summary: str
    """First line of the docstring; empty unless it is one short sentence."""
    body: tuple[str, ...]
    """Lines after the docstring, dedented, without blank lines and comments."""


CODE_PROMPTS = {
    "summary-signature": (
        "Write the def line of a Python function in {module}: {given}",
        "Which def line fits? {given}",
    ),
    "signature-summary": ("What does this do? {given}", "Describe in one line: {given}"),
    "line-next": ("Continue this Python code with one line:\n{given}", "What is the next line?\n{given}"),
}
CODE_STEMS = {
    "summary-signature": "Which Python function is described by: {given}",
    "signature-summary": "What is the purpose of `{given}` in Python?",
    "line-next": "Which line of Python comes after these?\n{given}\n",
}
_LINES = ("line-next/0", "line-next/1", "line-next/2")  # up to three places in one function
_CANDIDATES = 12  # distractors to choose lengths from


def question_modules(modules: Iterable[str], *, share: float, seed: int) -> frozenset[str]:
    """Chooses the modules set aside for code questions; the training corpus must not contain their source."""
    return frozenset(m for m in modules if stable_key(seed, "module", m) < share * 2**64)


def functions(module: str, source: str) -> list[Function]:
    """Returns the functions and methods of a module, in file order, the last of each name.

    A module that does not parse has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines()
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            found[node.name] = _function(module, node, lines)
    return list(found.values())


def _function(module: str, node: ast.FunctionDef, lines: list[str]) -> Function:
    docstring = ast.get_docstring(node)
    summary = (docstring or "").strip().split("\n")[0].strip()
    if not (re.fullmatch(r"[A-Z][^>]*\.", summary) and 3 <= len(summary.split()) <= 20):
        summary = ""
    signature = f"def {node.name}({ast.unparse(node.args)}):"
    first = node.body[0]
    after = first.end_lineno if docstring is not None else first.lineno - 1
    code = lines[after or 0 : node.end_lineno]
    body = tuple(
        line[node.col_offset + 4 :].rstrip()
        for line in code
        if line.strip() and not line.strip().startswith("#")
    )
    return Function(module, node.name, signature if len(signature) <= 80 else "", summary, body)


def _sides(function: Function, kind: str, seed: int) -> tuple[str, str] | None:
    """Returns (given, answer) of one kind, or None."""
    if kind not in _LINES:
        described = (function.summary, function.signature)
        if not all(described):
            return None
        return described if kind == "summary-signature" else described[::-1]
    places = [i for i in range(2, len(function.body)) if _good_line(function.body[i])]
    number = _LINES.index(kind)
    if number >= len(places):
        return None
    at = stable_shuffle(places, str, seed, function.module, function.name)[number]
    return "\n".join(function.body[max(0, at - 3) : at]), function.body[at].strip()


def _good_line(line: str) -> bool:
    text = line.strip()
    return 8 <= len(text) <= 60 and re.search(r"[A-Za-z]{3}", text) is not None and '"""' not in text


def _in_order(sources: Mapping[str, str], label: str, seed: int) -> list[Function]:
    every = [f for module in sorted(sources) for f in functions(module, sources[module])]
    return stable_shuffle(every, lambda f: f"{f.module} {f.name} {f.signature}", seed, label)


def code_conversations(sources: Mapping[str, str], count: int, seed: int) -> list[dict[str, Any]]:
    """Writes conversations on functions: description to def line, def line to description, next line.

    Args:
        sources: module name -> source text of the training modules.
        count: how many at most.
        seed: of every choice.
    """
    ordered = _in_order(sources, "code conversations", seed)

    def stream(kind: str) -> Iterator[dict[str, Any]]:
        for function in ordered:
            sides = _sides(function, kind, seed)
            if sides:
                prompts = CODE_PROMPTS[kind.split("/")[0]]
                wording = prompts[stable_key(seed, kind, function.name) % len(prompts)]
                prompt = wording.format(module=function.module, given=sides[0])
                yield _conversation(prompt, sides[1], "python-code")

    return take_in_turn([stream(kind) for kind in ("summary-signature", "signature-summary", *_LINES)], count)


def code_questions(sources: Mapping[str, str], count: int, seed: int) -> list[dict[str, Any]]:
    """Writes multiple-choice questions of the same kinds on the set-aside modules.

    Distractors come from the same module.

    Args:
        sources: module name -> source text of the modules chosen by `question_modules`.
        count: how many at most.
        seed: of every choice.
    """
    ordered = _in_order(sources, "code questions", seed)
    by_module: dict[str, list[Function]] = defaultdict(list)
    for function in ordered:
        by_module[function.module].append(function)

    def stream(kind: str) -> Iterator[dict[str, Any]]:
        asked: set[str] = set()
        for function in ordered:
            row = _code_question(function, kind, by_module[function.module], seed)
            if row and row["question"] not in asked:
                asked.add(row["question"])
                yield row

    return seal(
        take_in_turn([stream(kind) for kind in ("summary-signature", "signature-summary", *_LINES)], count),
        seed,
    )


def _code_question(function: Function, kind: str, others: list[Function], seed: int) -> dict[str, Any] | None:
    sides = _sides(function, kind, seed)
    if sides is None:
        return None
    given, answer = sides
    texts: dict[str, None] = {}
    for other in stable_shuffle(others, lambda f: f.name, seed, function.name, kind):
        rival = _sides(other, kind, seed)
        # The same name or the same description elsewhere would be right as well.
        if rival and other.name != function.name and other.summary != function.summary and rival[0] != given:
            if rival[1] != answer and rival[1] not in function.body:
                texts[rival[1]] = None
        if len(texts) == _CANDIDATES:
            break
    key = f"{function.module}/{function.name}"
    wrong = wrong_answers(answer, given, list(texts), stable_key(seed, key, kind) % 4, 3)
    if wrong is None:
        return None
    return {
        "id": f"code/{key}/{kind}",
        "question": CODE_STEMS[kind.split("/")[0]].format(given=given),
        "options": [answer, *wrong],
        "answer": 0,
        "source": "python-code",
        "department": "",
        "entity": f"{function.module}.{function.name}",
    }
