"""The reward of an answer: what rules, the reward model and the judge say of it, weighed by the domain of its task."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from galenic.align.config import RewardsConfig
from galenic.align.data.tasks import Messages, Task
from galenic.align.rewards.rules import check, contradiction
from galenic.corpus.synthesis.synthesise_config import BudgetConfig
from galenic.ranks import rank
from galenic.runtime import UserError


class Rewards:
    """Rewards answers.

    reward = weights["rule"] * rule in {0, 1} + weights["model"] * score of the reward model
             + weights["judge"] * points of the judge / most points

    An answer that did not end, or that cannot be shown to a reward model that counts (see `readable`), is worth
    `config.cut_off`, whatever it says.

    Args:
        config: weights, limits, the reward model's folder and the judge.
        out: folder in which a judge's replies are kept, `judged-<process>.jsonl`.
        budget: what requests to the judge may cost. Default: no limit.
        model: something else to score with: `score(conversations) -> list of numbers`, `refusal(conversation) -> why
            it cannot be scored, or ""`. Default: the reward model of `config.model`, opened when it is first needed.
    """

    def __init__(
        self,
        config: RewardsConfig,
        *,
        out: str | Path | None = None,
        budget: BudgetConfig | None = None,
        model: Any = None,
    ) -> None:
        self.config, self._model, self._judge = config, model, None
        if config.judge is not None:
            from galenic.align.rewards.judge import Judge

            if out is None:
                raise ValueError("out: a judge needs a folder for its replies")
            self._judge = Judge(config.judge, Path(out) / f"judged-{rank()}.jsonl", budget)

    @property
    def model(self) -> Any:
        """The reward model."""
        if self._model is None:
            from galenic.align.reward import RewardModel

            if self.config.model is None:
                raise UserError("rewards.model: no folder of a reward model is named")
            self._model = RewardModel(self.config.model)
        return self._model

    def weights(self, task: Task) -> Mapping[str, float]:
        """Returns what each part counts in a task's reward; parts that count nothing are left out."""
        domains = self.config.weights
        chosen = domains.get(task.domain, domains.get("*"))
        if chosen is None:
            modelled = self._judge is None or self.config.model is not None or self._model is not None
            chosen = {"rule" if task.rule else "model" if modelled else "judge": 1.0}
        return {part: weight for part, weight in chosen.items() if weight}

    def ready(self, tasks: Sequence[Task]) -> None:
        """Looks whether all of these tasks can be rewarded, before anything is sampled.

        Raises:
            UserError: a task has neither rule nor model nor judge; its true answer fails its own rule; its prompt
                cannot be shown to the reward model; a model or judge that is named counts nowhere; code cannot be
                isolated.
        """
        for task in tasks:
            weights = self.weights(task)
            if not weights:
                raise UserError(
                    f"rewards.weights: nothing counts in domain '{task.domain}' of task {task.id}"
                )
            if "rule" in weights and task.rule is None:
                raise UserError(
                    f"task {task.id} has no answer and no tests, but rewards.weights counts its rule: give it one, or "
                    f"weigh domain '{task.domain}' by the model alone"
                )
            if "model" in weights and self.config.model is None and self._model is None:
                raise UserError(
                    f"task {task.id} has no rule that could reward it, or rewards.weights counts a model: name the "
                    "folder of a reward model in rewards.model (verb `reward`), or a judge in rewards.judge"
                )
            if "model" in weights and (wrong := self.model.refusal(_answered(task, "."))):
                raise UserError(
                    f"task {task.id}: cannot be shown to the reward model ({wrong}); change its prompt, or leave the "
                    f"model out of domain '{task.domain}' in rewards.weights"
                )
            if "judge" in weights and self._judge is None:
                raise UserError(
                    f"rewards.weights: counts a judge in domain '{task.domain}' of task {task.id}; name its endpoint "
                    "in rewards.judge"
                )
            if "rule" in weights and (wrong := contradiction(task, self.config)):
                raise UserError(f"task {task.id}: {wrong}")
        counted = {part for task in tasks for part in self.weights(task)}
        for part in ("model", "judge"):
            if getattr(self.config, part) is not None and part not in counted:
                raise UserError(
                    f"rewards.{part}: is named, but no task's reward looks at it; say in rewards.weights what it "
                    "counts (by default a task is rewarded by its rule, if it has one)"
                )
        if any(task.rule == "code" and "rule" in self.weights(task) for task in tasks):
            from galenic.align.rewards.sandbox import require

            require(seconds=self.config.code_seconds, memory_mb=self.config.code_memory_mb)

    def readable(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[bool]:
        """Tells which answers can be shown to the reward model, where it counts.

        An answer may spell out a marker of the reward model's chat format, which would forge a turn.
        """
        return [
            "model" not in self.weights(task) or not self.model.refusal(_answered(task, text))
            for task, text in zip(tasks, texts, strict=True)
        ]

    def __call__(self, tasks: Sequence[Task], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """Rewards answers.

        Args:
            tasks: what was asked; a task may stand here several times.
            texts: the answers.
            ended: whether each came to its end.

        Returns:
            One reward an answer.

        Raises:
            UserError: a reward is not a number, or the judge failed; the task is named.
        """
        valid = [done and shown for done, shown in zip(ended, self.readable(tasks, texts), strict=True)]
        weights = [self.weights(task) if looked else {} for task, looked in zip(tasks, valid, strict=True)]
        found = [0.0 if looked else self.config.cut_off for looked in valid]
        for part, values in (("rule", self._rules), ("model", self._scores), ("judge", self._judged)):
            rows = [row for row, counted in enumerate(weights) if part in counted]
            if not rows:
                continue
            told = values([tasks[row] for row in rows], [texts[row] for row in rows])
            for row, value in zip(rows, told, strict=True):
                if not math.isfinite(value):
                    where = f"; look at {self.config.model}" if part == "model" else ""
                    raise UserError(
                        f"task {tasks[row].id}: the {part} rewards its answer with {value}, which is no number to "
                        f"learn from{where}"
                    )
                found[row] += weights[row][part] * value
        return found

    def _rules(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[float]:
        """What rules say, code in as many processes as there are cores."""
        values = [0.0] * len(tasks)
        code = [row for row, task in enumerate(tasks) if task.rule == "code"]
        for row in set(range(len(tasks))) - set(code):
            values[row] = check(tasks[row], texts[row], self.config)
        if code:
            with ThreadPoolExecutor(min(len(code), os.cpu_count() or 1)) as pool:
                told = pool.map(lambda row: check(tasks[row], texts[row], self.config), code)
                for row, value in zip(code, told, strict=True):
                    values[row] = value
        return values

    def _scores(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[float]:
        """What the reward model says."""
        return [
            float(score)
            for score in self.model.score(
                [_answered(task, text) for task, text in zip(tasks, texts, strict=True)]
            )
        ]

    def _judged(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[float]:
        """What the judge says."""
        if self._judge is None:
            raise UserError("rewards.judge: no endpoint of a judge is named")
        return self._judge(tasks, texts)


def _answered(task: Task, text: str) -> Messages:
    """A task's conversation with an answer."""
    return [*task.messages, {"role": "assistant", "content": text}]
