"""What PPO learns from: answers sampled from the policy, with what each of their tokens was worth.

    tasks --sampler--> answers --rewards, reference, value head--> rewards of tokens --gae--> advantages --> minibatches

For the tokens y_1 ... y_T of an answer, policy p, reference q, reward s of the whole answer, value V_t of what stands
before y_t:

    r_t = [t = T] s - b (log p(y_t) - log q(y_t))                  arXiv 2203.02155, eq. 2, token by token
    A_t                                                            generalised advantage estimation, `advantages.py`
    R_t = A_t + V_t                                                what V_t should have been

An answer that was cut off ends where it was cut: `rewards.cut_off` says what it is worth. One that cannot be shown to
the reward model, as it spells out a marker of that model's chat format, is worth the same and counted as `unreadable`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from galenic.align.config import PpoConfig
from galenic.align.data.order import Epochs
from galenic.align.data.tasks import Task
from galenic.align.policy import Reference, laid
from galenic.align.rollouts.advantages import adapted_kl, gae, whiten
from galenic.align.rollouts.sampling import stale
from galenic.align.rollouts.values import with_values
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.ranks import gathered
from galenic.runtime import UserError

TOLD = ("reward", "reward_deviation", "kl", "kl_weight", "length", "ended", "unreadable", "stale")
"""What is told of all answers that were sampled together; not a number where there is nothing to tell."""
COLUMNS = ("log_probs", "values", "advantages", "returns")
"""Numbers of each token of an answer."""

# ---------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True)
class Question:
    """A task as token ids."""

    task: Task
    ids: list[int]
    """Up to where the model's turn begins."""


def fitting(tasks: Sequence[Task], tokenizer: Any, room: int) -> tuple[list[Question], dict[str, int]]:
    """Encodes the tasks whose prompts have `room` tokens at most.

    Returns:
        The questions, and how many were left out, by reason.

    Raises:
        UserError: the tokenizer cannot write one, named; none fits.
    """
    questions = []
    for task in tasks:
        try:
            ids = encode_chat(tokenizer, task.messages)[0]
        except ValueError as error:
            raise UserError(f"{task.id}: not a prompt for this tokenizer ({error})") from None
        if len(ids) <= room:
            questions.append(Question(task=task, ids=ids))
    if not questions:
        raise UserError(
            f"context: no prompt of {len(tasks)} has {room} tokens at most, which context leaves beside "
            "sampling.max_new_tokens; raise context, or lower the other"
        )
    return questions, {"longer than context": len(tasks) - len(questions)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was sampled for a question, as JSON values."""

    question: str
    """Its task's id."""
    ids: list[int]
    """The prompt's tokens, then the answer's."""
    prompt: int
    """Tokens of the prompt."""
    ended: bool
    reward: float
    log_probs: list[float]
    """log p of each token of the answer, nats."""
    log_ratios: list[float]
    """log p - log q of each."""
    values: list[float]
    """V of each."""
    stale: tuple[float, int]
    """How far the server that sampled was from the policy; see `galenic.align.rollouts.sampling.stale`."""
    unreadable: bool = False
    """Whether it came to an end, but cannot be shown to the reward model."""

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.prompt


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Answers that were sampled together; rows of tensors are answers, from their first token on."""

    answers: list[Answer]
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    """Whitened over all tokens; centred only, where all answers are worth the same."""
    returns: torch.Tensor
    told: dict[str, float]
    """Of `TOLD`."""


def experience(answers: list[Answer], config: PpoConfig, kl_weight: float) -> Experience:
    """Turns answers and their rewards into what a policy and its values can learn from, in float64.

    Raises:
        UserError: no answer holds a token.
    """
    lengths = torch.tensor([answer.length for answer in answers])[:, None]
    tokens, places = int(lengths.sum()), torch.arange(int(lengths.max()))
    if not tokens:
        raise UserError(
            "nothing was sampled: every answer is empty, without even an end; look at what samples"
        )
    wanted = places < lengths

    def laid(name: str) -> torch.Tensor:
        table = torch.zeros(wanted.shape, dtype=torch.float64)
        numbers = [number for answer in answers for number in getattr(answer, name)]
        table[wanted] = torch.tensor(numbers, dtype=torch.float64)
        return table

    scores = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
    deviation = float(scores.std(correction=0))
    differ = deviation > 1e-8 * float(scores.abs().max())  # by more than rounding
    worth = whiten(scores, shift=False) if config.whiten_rewards and differ else scores
    log_ratios, values = laid("log_ratios"), laid("values")
    rewards = torch.where(places == lengths - 1, worth[:, None], 0.0) - kl_weight * log_ratios
    advantages = gae(rewards, values, wanted, discount=config.discount, lam=config.lam)
    returns = advantages + values
    of_tokens = advantages[wanted]
    # Where no answer is better than another, whitening would blow up what is left: the errors of values and penalties.
    advantages[wanted] = whiten(of_tokens) if differ else of_tokens - of_tokens.mean()
    compared = sum(answer.stale[1] for answer in answers)
    unreadable = sum(answer.unreadable for answer in answers)
    return Experience(
        answers=answers,
        log_probs=laid("log_probs"),
        values=values,
        advantages=advantages,
        returns=returns,
        told={
            "reward": float(scores.mean()),
            "reward_deviation": deviation if differ else 0.0,
            "kl": float(log_ratios.sum()) / tokens,
            "kl_weight": kl_weight,
            "length": tokens / len(answers),
            "ended": sum(answer.ended for answer in answers) / len(answers),
            "unreadable": unreadable / len(answers) if unreadable else math.nan,
            "stale": sum(answer.stale[0] for answer in answers) / compared if compared else math.nan,
        },
    )


def collate_answers(found: Experience, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """Lays answers into a part of a batch.

    Returns:
        `input_ids` (rows, longest), prompts first; `answers`, of the same shape, bool, tokens of the answer; each of
        `COLUMNS`, of the same shape, float32; `told` (rows, len(TOLD)) float64, all rows alike.
    """
    answers = [found.answers[number] for number in chosen]
    ids, wanted = laid([answer.ids for answer in answers], [answer.prompt for answer in answers], PAD)
    part = {"input_ids": ids, "answers": wanted}
    for name in COLUMNS:
        part[name] = torch.zeros(ids.shape)
        part[name][wanted] = torch.cat(
            [
                getattr(found, name)[number, : answer.length].float()
                for number, answer in zip(chosen, answers, strict=True)
            ]
        )
    part["told"] = torch.tensor([found.told[name] for name in TOLD], dtype=torch.float64).repeat(
        len(answers), 1
    )
    return part


# ---------------------------------------------------------------------------- batches


class Experiences:
    """The batches of a run (`galenic.pretrain.loop.Batches`): minibatches of answers, sampled as they are due.

    Every `together` steps share answers, which follow from the weights before the first of them, the seed and the
    number of the rollout; the weight of the KL penalty is in the reader's state. No checkpoint may fall between them.

    Args:
        run: the run, whose trainer will be there when a batch is asked for.
        config: of the verb.
        questions: to be answered.
        sampler: samples answers (`galenic.align.rollouts.sampling.Sampler`).
        rewards: what each is worth (`galenic.align.rewards.rewards.Rewards`).
        reference: what the policy is held against.
    """

    domains: Sequence[str] = ()

    def __init__(
        self,
        run: Any,
        config: PpoConfig,
        questions: Sequence[Question],
        *,
        sampler: Any,
        rewards: Any,
        reference: Reference,
    ) -> None:
        self.run, self.config, self.questions = run, config, questions
        self.sampler, self.rewards, self.reference = sampler, rewards, reference
        self.rows, self.context = config.rows // config.minibatches, config.context
        self.together = config.epochs * config.minibatches
        self.steps = config.rollouts * self.together
        self.kl_weight = config.kl
        """Of the next rollout."""
        self._tasks = Epochs(len(questions), seed=config.seed, name="ppo/tasks")
        self._answers = Epochs(config.rows, seed=config.seed, name="ppo/answers")
        self._rollout = -1
        self._found: Experience

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns these rows of a minibatch; samples first, if it is the first of its rollout."""
        rollout = step // self.together
        if self._rollout != rollout:
            self._rollout, self._found = rollout, self._sampled(rollout)
        chosen = self._chosen(step)
        return collate_answers(self._found, [chosen[row] for row in rows])

    def documents(self, step: int) -> list[str]:
        """Names the tasks of a minibatch."""
        return [self._found.answers[number].question for number in self._chosen(step)]

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step."""
        return {"rollout": step // self.together, "kl": self.kl_weight}

    def _chosen(self, step: int) -> list[int]:
        """Which answers of a rollout are in a minibatch; each is in one of an epoch."""
        return [self._answers[step * self.rows + row] for row in range(self.rows)]

    def _questions(self, rollout: int, rows: Sequence[int]) -> list[Question]:
        """The questions of some rows of a rollout."""
        return [self.questions[self._tasks[rollout * self.config.rows + row]] for row in rows]

    def _sampled(self, rollout: int) -> Experience:
        """Samples answers, each process its share, and tells everyone of all of them."""
        # As the step before, or a checkpoint, left it.
        kl_weight = self.run.trainer.reader.get("kl", self.config.kl)
        training = self.run.model.training
        self.run.model.eval()
        own = self.run.parallel.rows(self.config.rows)
        answers = self._answered(self._questions(rollout, own), rollout, own)
        self.run.model.train(training)
        everyone = gathered([asdict(answer) for answer in answers])
        found = experience([Answer(**answer) for part in everyone for answer in part], self.config, kl_weight)
        self.kl_weight = kl_weight
        if self.config.kl_target is not None:
            divergence = found.told["kl"] * found.told["length"]
            self.kl_weight = adapted_kl(kl_weight, divergence, self.config.kl_target)
        return found

    def _answered(self, questions: list[Question], rollout: int, rows: Sequence[int]) -> list[Answer]:
        """Samples an answer to each question, and finds out what it is worth and how likely."""
        tasks = [question.task for question in questions]
        sampled = self.sampler([task.messages for task in tasks], step=rollout, numbers=rows)
        replies = [copies[0] for copies in sampled]
        texts = [self.sampler.text(reply) for reply in replies]
        rewards = self.rewards(tasks, texts, [reply.ended for reply in replies])
        readable = self.rewards.readable(tasks, texts)
        sequences = [[*question.ids, *reply.ids] for question, reply in zip(questions, replies, strict=True)]
        prompts = [len(question.ids) for question in questions]
        numbers: list[Mapping[str, list[float]]] = []
        size = self.config.parallel.micro_rows or self.rows
        for start in range(0, len(sequences), size):
            part = slice(start, start + size)
            numbers += self._numbers(sequences[part], prompts[part])
        return [
            Answer(
                question=question.task.id,
                ids=ids,
                prompt=len(question.ids),
                ended=reply.ended,
                reward=float(reward),
                unreadable=reply.ended and not shown,
                # Only a server's distribution may be another than the policy's.
                stale=stale(reply, own["log_probs"]) if self.config.sampling.endpoint else (0.0, 0),
                **own,
            )
            for question, ids, reply, reward, shown, own in zip(
                questions, sequences, replies, rewards, readable, numbers, strict=True
            )
        ]

    @torch.no_grad()
    def _numbers(self, sequences: list[list[int]], prompts: list[int]) -> list[Mapping[str, list[float]]]:
        """What policy, reference and value head say of each token that follows its prompt."""
        ids, answers = laid(sequences, prompts, PAD)
        device = self.run.trainer.device
        found, values = with_values(
            self.run.model,
            ids.to(device),
            answers.to(device),
            product=self.run.product,
            temperature=self.config.sampling.temperature,
            reference=self.reference,
        )
        assert found.reference_log_probs is not None
        columns = {
            "log_probs": found.log_probs,
            "log_ratios": found.log_probs - found.reference_log_probs,
            "values": values,
        }
        split = {name: column.cpu().split(answers.sum(1).tolist()) for name, column in columns.items()}
        return [{name: parts[row].tolist() for name, parts in split.items()} for row in range(len(sequences))]
