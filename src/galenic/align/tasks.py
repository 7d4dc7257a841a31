"""Tasks: what a model is asked where the right answer, or how to check one, is known. For ELO and PPO.

A line of a file, `prompt` as text or as messages that end with the user's:

    {"prompt", "answer"}                                 a text; what is right is that text
    {"question", "options", "answer": index}             options are shown, what is right is one of them
    {"prompt", "answer", "rule": "numeric", "tolerance"} see `galenic.align.rewards.rules`
    {"prompt", "tests"}                                  Python that must run without error after the answer's code

`domain` names what a task belongs to: rewards are weighed and told by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from galenic.runtime import UserError, numbered_jsonl

Rule = Literal["exact", "option", "numeric", "diagnosis", "code"]
RULES: tuple[Rule, ...] = get_args(Rule)
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of them."""

    id: str
    """Its own, or `file:line`."""
    messages: Messages
    """The conversation up to the model's turn."""
    answer: str | None = None
    """The true answer; none where only tests or a reward model can tell."""
    options: tuple[str, ...] = ()
    """Texts to choose from, in the order they are shown."""
    rule: Rule | None = None
    """How an answer is checked; none: only a reward model can tell."""
    tolerance: float | None = None
    """Relative error that a number may have."""
    tests: str = ""
    """Python code, for rule `code`."""
    domain: str = ""
    """What it belongs to."""


def read_tasks(path: str, *, answers: bool = False, limit: int | None = None) -> list[Task]:
    """Reads a file of tasks.

    Args:
        path: JSON lines; see above.
        answers: whether every task needs the text of its answer.
        limit: tasks at most, from the beginning.

    Raises:
        UserError: a line that is no task, named; an empty file.
    """
    tasks = []
    for number, row in numbered_jsonl(path):
        if isinstance(row, UserError):
            raise row
        try:
            task = task_of(row, f"{Path(path).name}:{number}")
            if answers and not task.answer:
                raise ValueError("it has no answer")
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a task ({error})") from None
        tasks.append(task)
        if limit is not None and len(tasks) == limit:
            break
    if not tasks:
        raise UserError(f"{path}: no tasks in it")
    return tasks


def task_of(row: dict[str, Any], name: str) -> Task:
    """Understands one line.

    Args:
        row: the line.
        name: of the task, if it has no `id`.

    Raises:
        ValueError: what is wrong with it.
    """
    prompt = row.get("prompt", row.get("question"))
    options = row.get("options") or []
    if not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
        raise ValueError("options is not a list of texts")
    messages = messages_of(prompt)
    answer = row.get("answer")
    if options:
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
            raise ValueError(f"answer {answer!r} is not the index of one of {len(options)} options")
        answer = options[answer]
        messages = [
            *messages[:-1],
            {"role": "user", "content": with_options(messages[-1]["content"], options)},
        ]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"answer {answer!r} is not a text")
    tests = row.get("tests") or ""
    rule = row.get("rule") or ("code" if tests else "option" if options else "exact" if answer else None)
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule {rule!r} is not known: {', '.join(RULES)}")
    if rule == "code" and not (isinstance(tests, str) and tests.strip()):
        raise ValueError("rule code needs tests")
    if rule not in (None, "code") and answer is None:
        raise ValueError(f"rule {rule} needs an answer")
    tolerance = row.get("tolerance")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance):
        raise ValueError(f"tolerance {tolerance!r} is not a number from 0 on")
    return Task(
        id=str(row.get("id") or name),
        messages=messages,
        answer=answer,
        options=tuple(options),
        rule=rule,
        tolerance=tolerance,
        tests=tests,
        domain=str(row.get("domain") or row.get("source") or ""),
    )


def messages_of(prompt: Any) -> Messages:
    """Returns a prompt, a text or messages, as messages that end with the user's.

    Raises:
        ValueError: it is neither, or its roles are out of order.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("no prompt: a text, or messages")
    for message in prompt:
        known = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not known or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{message!r} is not a message of a role and a content")
    roles = [message["role"] for message in prompt if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] or "system" in [
        m["role"] for m in prompt[1:]
    ]:
        raise ValueError(
            f"roles are {', '.join(m['role'] for m in prompt)}: user and assistant in turn, the user last"
        )
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def with_options(question: str, options: Sequence[str]) -> str:
    """Shows options behind a question, as the starter's conversations do."""
    return f"{question}\nChoose one: {'; '.join(options)}."
