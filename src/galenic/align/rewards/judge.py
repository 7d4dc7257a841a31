"""Points for answers from a model behind an OpenAI-compatible endpoint.

    task, answer --prompts/judge.md--> endpoint, temperature 0 --> {"points": n, "reason": ...} --> n / most points
                                           ^-- what cannot be used is sent back once with what is wrong

All that the endpoint said is kept on disk, unusable replies too: a resumed run goes the same way through them.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galenic.align.config import JudgeConfig
from galenic.align.data.tasks import Messages, Task
from galenic.corpus.synthesis.asking import ask
from galenic.corpus.synthesis.budget import Budget, BudgetSpent
from galenic.corpus.synthesis.cache import Cache
from galenic.corpus.synthesis.checks import Problem, json_object
from galenic.corpus.synthesis.client import Client, Reply, RequestFailed
from galenic.corpus.synthesis.filling import framed, require_places
from galenic.corpus.synthesis.synthesise_config import BudgetConfig
from galenic.runtime import UserError

UNKNOWN = "(none is known)"
"""In the place of the true answer."""
_NEEDED, _PLACES = {"question", "answer", "points"}, {"question", "answer", "points", "truth"}
_ATTEMPTS = 2  # requests about one answer, those of earlier runs not counted
_SHOWN = 200  # characters of it that the user sees


class Judge:
    """Gives points.

    Args:
        config: who is asked, and how.
        kept: file of what it said.
        budget: what may be spent, by all runs on this file together. Default: no limit.

    Raises:
        UserError: the prompt cannot be used.
    """

    def __init__(self, config: JudgeConfig, kept: Path, budget: BudgetConfig | None = None) -> None:
        self.config, self.kept, self.limits = config, kept, budget or BudgetConfig()
        self.prompt = read_prompt(config.prompt)

    def __call__(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[float]:
        """Returns for each answer its share of the most points, in [0, 1]; equal ones are asked about once.

        Args:
            tasks: what was asked.
            texts: the answers.

        Raises:
            UserError: the endpoint failed, said nothing usable, or the budget is spent; the task is named.
        """
        prompts = [
            prompt_for(self.prompt, task, text, self.config.points)
            for task, text in zip(tasks, texts, strict=True)
        ]
        asked = dict(zip(prompts, tasks, strict=True))
        points = asyncio.run(self._all(asked))
        return [points[prompt] / self.config.points for prompt in prompts]

    async def _all(self, asked: dict[str, Task]) -> dict[str, float]:
        """Prompt -> points."""
        cache = Cache(self.kept)
        try:
            budget = Budget(self.limits)
            budget.add((cache.requests, cache.tokens, cache.money))
            async with Client(self.config.endpoint, cache, budget) as client:
                points = await asyncio.gather(
                    *(self._points(client, prompt, task) for prompt, task in asked.items())
                )
            return dict(zip(asked, points, strict=True))
        finally:
            cache.close()

    async def _points(self, client: Client, prompt: str, task: Task) -> float:
        endpoint, most = self.config.endpoint, self.config.points
        sampling: dict[str, Any] = {} if endpoint.temperature is None else {"temperature": 0}
        if endpoint.json_mode:
            sampling["response_format"] = {"type": "json_object"}
        who = f"rewards.judge: {endpoint.base_url}: asked {endpoint.model} about an answer to task {task.id}"
        again = f"what it judged is kept in {self.kept}, and the same command continues"
        try:
            found, reply = await ask(
                client,
                prompt,
                lambda reply: read_points(reply, most),
                key="judge",
                attempts=_ATTEMPTS,
                anew=True,
                **sampling,
            )
        except RequestFailed as error:
            raise UserError(f"{who}, which failed ({error}); mend it: {again}") from None
        except BudgetSpent:
            raise UserError(f"{who}, but the budget is spent; raise `budget`: {again}") from None
        if not isinstance(found, Problem):
            return found
        raise UserError(
            f"{who}, which {_ATTEMPTS} times gave no points from 0 to {most} ({found.reason}) but said "
            f"{reply.text[:_SHOWN]!r}; {again} and asks anew; if it stays so, start a new run with "
            "endpoint.json_mode, another rewards.judge.prompt, or another judge"
        )


def prompt_for(template: str, task: Task, text: str, points: int) -> str:
    """Writes what the judge reads.

    The marks around the parts are taken out of the parts, so that an answer cannot end before its end.

    Args:
        template: with the places `{question}`, `{answer}`, `{points}` and perhaps `{truth}`.
        task: what was asked.
        text: the answer.
        points: at most.
    """
    parts = {"question": conversation(task.messages), "truth": task.answer or UNKNOWN, "answer": text}
    return framed(template, {**parts, "points": str(points)})


def conversation(messages: Messages) -> str:
    """Writes a prompt as one text: a single message as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def read_points(reply: Reply, most: int) -> float | Problem:
    """Returns the points that a reply gives, or why it gives none."""
    if reply.finish == "length":
        return Problem("cut off")
    if not reply.text.strip():
        return Problem("empty")
    found = json_object(reply.text)
    if found is None:
        return Problem("not JSON")
    points = found.get("points")
    if isinstance(points, bool) or not isinstance(points, int | float):
        return Problem("missing field", "points, a number")
    if not 0 <= points <= most:  # nor not a number
        return Problem("out of range", f"points are {points}, not from 0 to {most}")
    return float(points)


def read_prompt(path: str | None) -> str:
    """Reads the package's prompt, or one's own.

    Raises:
        UserError: there is none, or its `{places}` are not those that can be filled.
    """
    if path is None:
        return (Path(__file__).parent / "prompts" / "judge.md").read_text(encoding="utf-8").strip()
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise UserError(f"rewards.judge.prompt: {path} cannot be read: {reason}") from None
    require_places(f"rewards.judge.prompt: {path}", text, _NEEDED, _PLACES)
    return text
