r"""Whether an answer is right, where the right one is known.

    exact      the same text, but for Unicode form, width, case, articles and punctuation
    option     the text, letter or number of the right option; "(B)", "B. aspirin", "option 2"
    numeric    the same numbers in the same order, within a relative tolerance, in any unit of the same dimension
    diagnosis  one of the names or ICD-10 codes that the true answer lists with `|`; "infarction, myocardial" too
    code       Python that passes the task's tests; see `sandbox.py`

In a longer text **the answer** is the line behind the last "Answer:", "the answer is", "答案" (or, for a diagnosis,
"Diagnosis:", "诊断") or inside the last \boxed{}; without any of these it is the whole text. Code is the last block
between ``` fences, else the whole text. Whatever else stands there makes an answer wrong: who names two options, two
diagnoses or two numbers has not answered.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from galenic.align.config import RewardsConfig
from galenic.align.data.tasks import Task
from galenic.align.rewards.units import Quantity, quantities, unified

_ANSWER = r"\banswer\b[\s*_]*(?:is\b[\s*_]*:?|:)|答案[\s*_]*(?:[是为][\s*_]*:?|:)"
_DIAGNOSIS = r"\bdiagnosis\b[\s*_]*(?:is\b[\s*_]*:?|:)|诊断[\s*_]*(?:[是为][\s*_]*:?|:)"
_BOXED = r"\\boxed\s*\{"
_MARKERS = re.compile(f"{_BOXED}|{_ANSWER}", re.IGNORECASE)
_DIAGNOSIS_MARKERS = re.compile(f"{_BOXED}|{_ANSWER}|{_DIAGNOSIS}", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:(?:option|choice)\b|选项|选择|选)?\s*[(\[]?\s*([A-Za-z]|\d{1,2})\s*(?:[)\]:、]|\.(?!\d)|$)",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"\b[A-Za-z]\d[0-9A-Za-z](?:\.[0-9A-Za-z]{1,4}|\d{1,2})?\b")
"""ICD-10: a letter, two places, and up to four behind a dot, which is often left out."""
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def check(task: Task, text: str, config: RewardsConfig) -> float:
    """Checks an answer by its task's rule.

    Args:
        task: with a rule.
        text: what was answered, in full.
        config: tolerance, where the task has none, and the limits of code.

    Returns:
        1 if it is right, else 0.
    """
    if task.rule == "code":
        from galenic.align.rewards.sandbox import run_tests

        verdict = run_tests(
            code_of(text), task.tests, seconds=config.code_seconds, memory_mb=config.code_memory_mb
        )
        return float(verdict.passed)
    assert task.rule is not None and task.answer is not None, f"task {task.id} has no rule"
    markers = _DIAGNOSIS_MARKERS if task.rule == "diagnosis" else _MARKERS
    said = answer_of(text, markers, lines=1 + task.answer.strip().count("\n"))
    if not said:
        return 0.0
    if task.rule == "option":
        chosen = option(said, task.options or [task.answer])
        right = chosen is not None and (task.options or [task.answer])[chosen] == task.answer
    elif task.rule == "numeric":
        right = same_numbers(
            said, task.answer, config.tolerance if task.tolerance is None else task.tolerance
        )
    elif task.rule == "diagnosis":
        right = same_diagnosis(said, task.answer)
    else:
        right = normal(said) == normal(task.answer) != ""
    return float(right)


def contradiction(task: Task, config: RewardsConfig) -> str:
    """Says why not even the true answer of a task would be right; empty if it would be."""
    if task.rule in (None, "code"):
        return ""
    assert task.answer is not None
    answer = task.answer.split("|")[0] if task.rule == "diagnosis" else task.answer
    if check(task, answer, config) == 1:
        return ""
    return f"its own answer {task.answer!r} does not pass its rule '{task.rule}'"


def answer_of(text: str, markers: re.Pattern[str] = _MARKERS, *, lines: int = 1) -> str:
    """Returns the part of a text that is its answer; see above.

    Args:
        text: all that was said.
        markers: what an answer stands behind.
        lines: lines that an answer may have.
    """
    text = unified(text)
    found = list(markers.finditer(text))
    if not found:
        return text.strip()
    last = found[-1]
    rest = text[last.end() :]
    if last[0].startswith("\\"):
        return _inside(rest)
    return "\n".join(rest.strip().split("\n")[:lines]).strip(" \t*_$")


def _inside(text: str) -> str:
    """Returns a text up to the brace that closes the one before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place].strip(" $")
    return text.strip(" $")


def normal(text: str) -> str:
    """Returns a text without what does not distinguish answers.

    Unicode form NFKC (full-width characters become narrow ones), lower case, no articles, no punctuation but a
    decimal point, a sign and symbols that mean something; no spaces between Chinese characters.
    """
    text = re.sub(r"['’`]", "", unified(text).casefold())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(
        r"((?<=\d)\.(?=\d)|(?<![\w.])-(?=[\d.])|[%‰+<>=≤≥±°^])|[^\w\s]|_", lambda found: found[1] or " ", text
    )
    text = re.sub(r"\bthe\b|^\s*an?\b(?=\s+\w)", " ", text)
    text = re.sub(r"(?<=[\u4e00-\u9fff])\s+|\s+(?=[\u4e00-\u9fff])", "", text)
    return " ".join(text.split())


def option(answer: str, options: Sequence[str]) -> int | None:
    """Returns which option an answer names; None if none, or more than one.

    An option's own text counts before letters and numbers, as options may be numbers themselves. In a sentence one
    option, and no other, has to be named.
    """
    names, said = [normal(name) for name in options], normal(answer)
    if answer.strip() in options:
        return options.index(answer.strip())
    if said and said in names:
        return names.index(said)
    label = _LABEL.match(answer.strip())
    if label:
        index = int(label[1]) - 1 if label[1].isdigit() else ord(label[1].upper()) - ord("A")
        rest = normal(answer.strip()[label.end() :])
        others = [name for number, name in enumerate(names) if number != index]
        if not 0 <= index < len(names):
            return None
        contradicts = _LABEL.match(rest) or any(_names(rest, name, start=True) for name in others)
        return index if rest == names[index] or not contradicts else None
    if re.search(r"\b(?:not|no|isnt|never|except)\b|不|非", said):
        return None
    found = [name for name in names if _names(said, name)]
    found = [name for name in found if not any(name != other and name in other for other in found)]
    return names.index(found[0]) if len(set(found)) == 1 else None


def _names(text: str, name: str, *, start: bool = False) -> bool:
    """Whether a normal text has a normal name in it (at its start), as whole words."""
    if not name:
        return False
    if _CHINESE.search(name):
        return text.startswith(name) if start else name in text
    padded = f" {text} "
    return padded.startswith(f" {name} ") if start else f" {name} " in padded


def same_numbers(answer: str, truth: str, tolerance: float) -> bool:
    """Whether an answer has the true numbers, in their order, and no others.

    Each may be off by `tolerance` relative to the true one. One without a unit is read in the true one's unit; where
    the truth has none, the answer's is not looked at. Of a calculation, what follows the last "=" counts.
    """
    answer = result_of(answer)
    given, wanted = quantities(answer), quantities(truth)
    signs = [re.findall(r"[<>≤≥]", text) for text in (answer, unified(truth))]
    if not wanted or len(given) != len(wanted) or signs[0] != signs[1]:
        return False
    return all(_near(one, other, tolerance) for one, other in zip(given, wanted, strict=True))


def result_of(answer: str) -> str:
    """Returns what counts of an answer that calculates: what follows the last "="."""
    return unified(answer).rsplit("=", 1)[-1]


def _near(given: Quantity, wanted: Quantity, tolerance: float) -> bool:
    value = given.value
    if given.unit is not None and wanted.unit is not None:
        if given.unit.powers != wanted.unit.powers:
            return False
        value = given.to(wanted.unit)
    return abs(value - wanted.value) <= Fraction(str(tolerance)) * abs(wanted.value)


def same_diagnosis(answer: str, truth: str) -> bool:
    """Whether an answer names one of the diagnoses that the truth lists with `|`.

    A code that the truth lists is met by itself and by finer ones under it. An answer with a name and a code needs
    both right, unless the truth lists no code.
    """
    listed = [part.strip() for part in truth.split("|") if part.strip()]
    codes = [_digits(part) for part in listed if _CODE.fullmatch(part)]
    names = set().union(*(_turned(part) for part in listed)) - {""}
    if _turned(answer) & names:
        return True
    given = [_digits(code) for code in _CODE.findall(answer)]
    if not given:
        return False
    rest = normal(re.sub(r"\bicd\b(?:-?10)?(?:-?cm)?", " ", _CODE.sub(" ", answer), flags=re.IGNORECASE))
    coded = all(any(code.startswith(known) for known in codes) for code in given)
    return (coded or not codes) and rest in names if rest else coded and bool(codes)


def _digits(code: str) -> str:
    return code.replace(".", "").upper()


def _turned(name: str) -> set[str]:
    """Returns a name as it stands and with its one comma resolved: "infarction, myocardial"."""
    parts = name.split(",")
    return {normal(name)} | ({normal(f"{parts[1]} {parts[0]}")} if len(parts) == 2 else set())


def code_of(text: str) -> str:
    """Returns the code of an answer: its last block between fences, else all of it."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text
