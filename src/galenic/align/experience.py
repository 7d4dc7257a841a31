"""What PPO learns from: answers sampled from the policy, with what each of their tokens was worth.

    tasks --sampler--> answers --rewards, reference, value head--> rewards of tokens --gae--> advantages --> minibatches

For the tokens y_1 ... y_T of an answer, policy p, reference q, reward s of the whole answer, value V_t of what stands
before y_t:

    r_t = [t = T] s - b (log p(y_t) - log q(y_t))                  arXiv 2203.02155, eq. 2, token by token
    A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}),  V_{T+1} = 0        arXiv 1506.02438, eq. 16
    R_t = A_t + V_t                                                what V_t should have been

An answer that was cut off ends where it was cut: `rewards.cut_off` says what it is worth.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from galenic.align.config import PpoConfig
from galenic.align.policy import Reference, padded, plain, statistics
from galenic.align.rollouts import stale
from galenic.align.tasks import Task
from galenic.align.token_statistics import TokenStatistics
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.pretrain.data.drawing import stable_hash
from galenic.ranks import gathered
from galenic.runtime import UserError

TOLD = ("reward", "reward_deviation", "kl", "kl_weight", "length", "ended", "stale")
"""What is told of all answers that were sampled together; not a number where it is not known."""
COLUMNS = ("log_probs", "values", "advantages", "returns")
"""Numbers of each token of an answer."""

# ---------------------------------------------------------------------------- mathematics


def gae(
    rewards: torch.Tensor, values: torch.Tensor, answers: torch.Tensor, *, discount: float, lam: float
) -> torch.Tensor:
    """Computes generalised advantage estimates; see above for the equation.

    Args:
        rewards: (rows, length) of each token.
        values: (rows, length) of what stands before it.
        answers: (rows, length) bool, tokens of the answer, which stand together in their row.
        discount: gamma.
        lam: lambda.

    Returns:
        (rows, length) advantages, 0 outside answers.
    """
    advantages = torch.zeros_like(values)
    later = following = values.new_zeros(len(values))
    for place in reversed(range(values.shape[1])):
        error = rewards[:, place] + discount * following - values[:, place]
        later = torch.where(answers[:, place], error + discount * lam * later, 0.0)
        following = torch.where(answers[:, place], values[:, place], 0.0)
        advantages[:, place] = later
    return advantages


def whiten(values: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """Divides numbers by their standard deviation, where they have one; `shift`: and moves their mean to 0."""
    centred = values - values.mean()
    deviation = centred.square().mean().sqrt()
    result = centred if shift else values
    # Of equal numbers only rounding errors would be left, blown up.
    return result / deviation if deviation > 1e-8 * values.abs().max() else result


def adapted_kl(weight: float, kl: float, target: float) -> float:
    """Returns the penalty's next weight: larger after a divergence above the target, by 2% at most.

    b <- b (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)). Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Args:
        weight: b, of this batch of answers.
        kl: their mean divergence from the reference, nats an answer.
        target: what it should be.
    """
    return weight * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


# ---------------------------------------------------------------------------- values


class ValueHead(torch.nn.Module):
    """A value of each of a model's last hidden states: (..., width) -> (...), 0 to begin with.

    A vector and a number: optimizers that treat matrices in their own way leave it alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes values, at least in float32."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(exact) @ self.weight.to(exact) + self.bias.to(exact)


def add_value_head(model: Any) -> None:
    """Makes a value head a part of the model, which is trained, sharded and kept in checkpoints with it."""
    model.value_head = ValueHead(plain(model).get_output_embeddings().weight.shape[-1])


@contextmanager
def _heard(model: Any) -> Iterator[list[torch.Tensor]]:
    """Keeps what is given to the model's head in passes meanwhile: last hidden states (rows, length, width)."""
    kept: list[torch.Tensor] = []
    head = plain(model).get_output_embeddings()
    listener = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        listener.remove()


def with_values(
    model: Any,
    ids: torch.Tensor,
    answers: torch.Tensor,
    *,
    product: bool,
    temperature: float,
    reference: Reference | None = None,
) -> tuple[TokenStatistics, torch.Tensor]:
    """Computes the statistics of the answers' tokens, and the value of what stands before each.

    Args:
        model: with a value head.
        ids: (rows, length) token ids.
        answers: (rows, length) bool, never a row's first.
        product: what `head_is_product` says of the model.
        temperature: that tokens were sampled at.
        reference: what the model is held against.

    Returns:
        The statistics and (tokens,) values, in the order of `answers.nonzero()`, all from one pass.
    """
    with _heard(model) as hidden:
        found = statistics(
            model,
            {"input_ids": ids},
            answers,
            product=product,
            reference=reference,
            temperature=temperature,
        )
    # The last pass is the policy's: a reference that is the base under its adapter comes before.
    return found, model.value_head(hidden[-1][answers.roll(-1, 1)])


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
    """How far the server that sampled was from the policy; see `galenic.align.rollouts.stale`."""

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
    """Whitened over all tokens."""
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
        raise UserError("nothing was sampled: every answer is empty, without even an end; look at what samples")
    wanted = places < lengths

    def laid(name: str) -> torch.Tensor:
        table = torch.zeros(wanted.shape, dtype=torch.float64)
        table[wanted] = torch.tensor([x for answer in answers for x in getattr(answer, name)]).double()
        return table

    scores = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
    worth = whiten(scores, shift=False) if config.whiten_rewards else scores
    log_ratios, values = laid("log_ratios"), laid("values")
    rewards = torch.where(places == lengths - 1, worth[:, None], 0.0) - kl_weight * log_ratios
    advantages = gae(rewards, values, wanted, discount=config.discount, lam=config.lam)
    returns = advantages + values
    advantages[wanted] = whiten(advantages[wanted])
    compared = sum(answer.stale[1] for answer in answers)
    return Experience(
        answers=answers,
        log_probs=laid("log_probs"),
        values=values,
        advantages=advantages,
        returns=returns,
        told={
            "reward": float(scores.mean()),
            "reward_deviation": float(scores.std(correction=0)),
            "kl": float(log_ratios.sum()) / tokens,
            "kl_weight": kl_weight,
            "length": tokens / len(answers),
            "ended": sum(answer.ended for answer in answers) / len(answers),
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
    ids = padded([answer.ids for answer in answers], PAD)
    places = torch.arange(ids.shape[1])[None]
    first = torch.tensor([answer.prompt for answer in answers])[:, None]
    wanted = (places >= first) & (places < torch.tensor([len(answer.ids) for answer in answers])[:, None])
    part = {"input_ids": ids, "answers": wanted}
    for name in COLUMNS:
        part[name] = torch.zeros(ids.shape)
        part[name][wanted] = torch.cat(
            [
                getattr(found, name)[number, : answer.length].float()
                for number, answer in zip(chosen, answers, strict=True)
            ]
        )
    part["told"] = torch.tensor([found.told[name] for name in TOLD], dtype=torch.float64).repeat(len(answers), 1)
    return part


# ---------------------------------------------------------------------------- batches


class Experiences:
    """The batches of a run (`galenic.pretrain.loop.Batches`): minibatches of answers, which are sampled as they are due.

    Every `together` steps share answers, which follow from the weights before the first of them, the seed and the
    number of the rollout; the weight of the KL penalty is in the reader's state. No checkpoint may fall between them.

    Args:
        run: the run, whose trainer will be there when a batch is asked for.
        config: of the verb.
        questions: to be answered.
        sampler: samples answers (`galenic.align.rollouts.Sampler`).
        rewards: (tasks, texts, ended) -> what each is worth.
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
        rewards: Callable[[Sequence[Task], Sequence[str], Sequence[bool]], Sequence[float]],
        reference: Reference,
    ) -> None:
        self.run, self.config, self.questions = run, config, questions
        self.sampler, self.rewards, self.reference = sampler, rewards, reference
        self.rows, self.context = config.rows // config.minibatches, config.context
        self.together = config.epochs * config.minibatches
        self.steps = config.rollouts * self.together
        self.kl_weight = config.kl
        """Of the next rollout."""
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
        epoch, number = divmod(step, self.config.minibatches)
        order = self._permutation(f"answers/{epoch}", self.config.rows)
        return order[number * self.rows : (number + 1) * self.rows]

    def _questions(self, rollout: int, rows: Sequence[int]) -> list[Question]:
        """The questions of some rows of a rollout; all are read before one is read again, each time in a new order."""
        places = [divmod(rollout * self.config.rows + row, len(self.questions)) for row in rows]
        orders = {
            epoch: self._permutation(f"tasks/{epoch}", len(self.questions)) for epoch in {e for e, _ in places}
        }
        return [self.questions[orders[epoch][within]] for epoch, within in places]

    def _permutation(self, name: str, count: int) -> list[int]:
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, stable_hash(f"ppo/{name}")]))
        return generator.permutation(count).tolist()

    def _sampled(self, rollout: int) -> Experience:
        """Samples answers, each process its share, and tells everyone of all of them."""
        kl_weight = self.run.trainer.reader.get("kl", self.config.kl)  # as the step before, or a checkpoint, left it
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
        """Samples an answer to each question, and looks at what policy, reference and value head say of it."""
        tasks = [question.task for question in questions]
        sampled = self.sampler([task.messages for task in tasks], step=rollout, numbers=rows)
        replies = [copies[0] for copies in sampled]
        texts = [self.sampler.text(reply) for reply in replies]
        rewards = self.rewards(tasks, texts, [reply.ended for reply in replies])
        sequences = [[*question.ids, *reply.ids] for question, reply in zip(questions, replies, strict=True)]
        numbers: list[Mapping[str, list[float]]] = []
        size = self.config.parallel.micro_rows or self.rows
        for start in range(0, len(sequences), size):
            part = slice(start, start + size)
            numbers += self._numbers(sequences[part], [len(reply.ids) for reply in replies[part]])
        return [
            Answer(
                question=question.task.id,
                ids=ids,
                prompt=len(question.ids),
                ended=reply.ended,
                reward=float(reward),
                # Only a server's distribution may be another than the policy's.
                stale=stale(reply, own["log_probs"]) if self.config.sampling.endpoint else (0.0, 0),
                **own,
            )
            for question, ids, reply, reward, own in zip(
                questions, sequences, replies, rewards, numbers, strict=True
            )
        ]

    @torch.no_grad()
    def _numbers(self, sequences: list[list[int]], lengths: list[int]) -> list[Mapping[str, list[float]]]:
        """What is known of each token of the answers at the sequences' ends."""
        ids = padded(sequences, PAD)
        ends = torch.tensor([len(sequence) for sequence in sequences])[:, None]
        places = torch.arange(ids.shape[1])[None]
        answers = (places < ends) & (places >= ends - torch.tensor(lengths)[:, None])
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
        split = {name: column.cpu().split(lengths) for name, column in columns.items()}
        return [
            {name: parts[row].tolist() for name, parts in split.items()} for row in range(len(sequences))
        ]
