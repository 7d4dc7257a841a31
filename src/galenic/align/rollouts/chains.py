"""A question, a chain of thought and the true answer as the tokens of one row, for ELO.

    Q   the conversation up to the model's turn
    c   what the model was sampled: until the marker stands in its text, its turn ends, or there is no more room
    A   the true answer as it follows the marker, and the end of the turn

    the model wrote the marker              Q c A
    it did not                              Q c marker A
    it ended its turn instead               Q c marker A, without the end in c, which is scored where it was sampled

So every token that was sampled has a probability in the row, and the answer always follows the marker. A token that
goes on behind the marker leaves no clean place for the answer: the marker is put again, as if there were none.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from galenic.align.config import EloConfig
from galenic.align.data.order import Epochs
from galenic.align.data.tasks import Task, read_tasks
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.runtime import UserError

if TYPE_CHECKING:
    from galenic.align.rollouts.sampling import Rollout, Sampler

_LEAD = "So"
"""Any text: the marker is encoded as it follows one."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A task as token ids."""

    task: Task
    prompt: list[int]
    """Q."""
    marker: list[int]
    """As the tokenizer writes it between a chain and this answer; never empty."""
    answer: list[int]
    """A."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One row: a question, what was sampled for it, and its answer."""

    ids: list[int]
    """All of it."""
    prompt: int
    """Tokens of the question."""
    sampled: list[int]
    """Tokens that were sampled, the end of the turn included; the first one's place in the row is `prompt`."""
    answer: int
    """Tokens of the answer, the row's last."""
    ended: bool
    """Whether the model came to an end by itself: wrote the marker, or ended its turn."""
    empty: bool
    """Whether nothing but white space stands before the marker."""
    log_probs: Sequence[float]
    """What the sampler told of the sampled tokens, nats; empty if it did not."""

    @property
    def tokens(self) -> tuple[tuple[int, ...], int, tuple[int, ...], int]:
        """All that its probabilities depend on."""
        return tuple(self.ids), self.prompt, tuple(self.sampled), self.answer


def read_questions(
    path: str, tokenizer: Any, *, marker: str, room: int, context: int, limit: int | None = None
) -> tuple[list[Question], dict[str, int]]:
    """Reads and encodes a file of tasks.

    Args:
        path: JSON lines; see `galenic.align.data.tasks`.
        tokenizer: of the model.
        marker: between chain and answer.
        room: tokens that a chain may have.
        context: tokens that a whole row may have.
        limit: tasks at most, from the beginning.

    Returns:
        The questions, and how many were left out, by reason.

    Raises:
        UserError: a line that is no task or has no answer, or that the tokenizer cannot write, named; none is left.
    """
    questions, dropped = [], Counter()
    for task in read_tasks(path, answers=True, limit=limit):
        try:
            question = encode_question(task, tokenizer, marker)
        except ValueError as error:
            raise UserError(f"{path}: task {task.id}: {error}") from None
        if question is None:
            dropped["the tokenizer joins the marker with the answer"] += 1
        elif len(question.prompt) + room + len(question.marker) + len(question.answer) > context:
            dropped[f"longer than context with {room} tokens of chain"] += 1
        else:
            questions.append(question)
    if not questions:
        why = ", ".join(f"{count}: {reason}" for reason, count in dropped.items())
        raise UserError(
            f"{path}: no question is left ({why}); raise context, lower sampling.max_new_tokens or change the marker"
        )
    return questions, dict(dropped)


def encode_question(task: Task, tokenizer: Any, marker: str) -> Question | None:
    """Encodes a task with an answer; None if a token reaches over an edge of the marker.

    A space stands between marker and answer, but not behind a character of East Asian width.

    Raises:
        ValueError: the conversation cannot be written with this tokenizer.
    """
    assert task.answer is not None
    answer = task.answer.split("|")[0] if task.rule == "diagnosis" else task.answer  # the first of its names
    wide = unicodedata.east_asian_width(marker[-1]) in ("W", "F")
    text = f"{_LEAD}{marker}{'' if wide else ' '}{answer.strip()}"
    prompt = encode_chat(tokenizer, task.messages)[0]
    ids, said = encode_chat(tokenizer, [*task.messages, {"role": "assistant", "content": text}])
    if ids[: len(prompt)] != prompt:
        raise ValueError("the tokenizer writes the prompt differently once an answer follows")
    turn = [token for token, own in zip(ids[len(prompt) :], said[len(prompt) :], strict=True) if own]
    first, last = (_tokens_of(tokenizer, turn, end) for end in (_LEAD, _LEAD + marker))
    if first is None or last is None:
        return None
    return Question(task=task, prompt=prompt, marker=turn[first:last], answer=turn[last:])


def _tokens_of(tokenizer: Any, ids: list[int], text: str) -> int | None:
    """How many first tokens make exactly this text."""
    return next((n for n in range(1, len(ids)) if decode(tokenizer, ids[:n]) == text), None)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of tokens as it is, without markers."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chain_row(
    question: Question, rollout: "Rollout", tokenizer: Any, *, marker: str, ends: Collection[int]
) -> Chain:
    """Puts a question, a chain and the answer together; see above.

    Args:
        question: what was asked.
        rollout: what was sampled; what follows the marker, if it is in the text, is not part of the chain.
        tokenizer: of the model.
        marker: its text.
        ends: tokens that end a turn.
    """
    sampled = list(rollout.ids)
    text = decode(tokenizer, sampled)
    marked = marker in text
    if marked:
        while marker in (before := decode(tokenizer, sampled[:-1])):
            sampled, text = sampled[:-1], before
    ended = not marked and bool(sampled) and sampled[-1] in ends
    kept = sampled[:-1] if ended else sampled
    written = text.endswith(marker)
    row = [*question.prompt, *kept, *([] if written else question.marker), *question.answer]
    return Chain(
        ids=row,
        prompt=len(question.prompt),
        sampled=sampled,
        answer=len(question.answer),
        ended=marked or ended,
        empty=not text.partition(marker)[0].strip(),
        log_probs=rollout.log_probs[: len(sampled)],
    )


def collate_chains(chains: Sequence[Chain]) -> dict[str, Any]:
    """Lays chains into tensors; those that are the same share a row, since a sure model samples one again and again.

    Returns:
        `row` (chains,) int64, where each chain lies. Of these rows `input_ids` (rows, longest) int64, filled up on the
        right; of the same shape `chains` and `answers`, bool, places of what was sampled and of the answer;
        `targets`, int64, what was sampled or stands there; `told`, float32, log-probabilities that the sampler told,
        else NaN; `ended` and `empty` (rows,), bool.
    """
    import torch

    from galenic.align.policy import padded

    distinct: dict[Any, Chain] = {}
    for chain in chains:
        distinct.setdefault(chain.tokens, chain)
    numbers = {tokens: number for number, tokens in enumerate(distinct)}
    row = torch.tensor([numbers[chain.tokens] for chain in chains])
    chains = list(distinct.values())
    ids = padded([chain.ids for chain in chains], PAD)
    targets, told = ids.clone(), torch.full(ids.shape, torch.nan)
    scored, answers = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
    for number, chain in enumerate(chains):
        places = slice(chain.prompt, chain.prompt + len(chain.sampled))
        scored[number, places] = True
        targets[number, places] = torch.tensor(chain.sampled, dtype=torch.long)
        answers[number, len(chain.ids) - chain.answer : len(chain.ids)] = True
        if chain.log_probs:
            told[number, places] = torch.tensor(chain.log_probs, dtype=torch.float32)
    flags = {name: torch.tensor([getattr(c, name) for c in chains]) for name in ("ended", "empty")}
    return {
        "row": row,
        "input_ids": ids,
        "targets": targets,
        "chains": scored,
        "answers": answers,
        "told": told,
        **flags,
    }


class Questions:
    """The batches of a run (`galenic.pretrain.loop.Batches`): questions in a new order each epoch, chains of this step.

    Args:
        questions: all of them.
        sampler: of chains.
        config: of the verb.
        own: rows of a batch that this process computes; they are sampled together.
    """

    domains: Sequence[str] = ()

    def __init__(
        self, questions: Sequence[Question], sampler: "Sampler", config: EloConfig, own: list[int]
    ) -> None:
        self.questions, self.sampler, self.config, self.own = questions, sampler, config, own
        self.steps, self.rows, self.context = config.steps, config.rows, config.context
        self._order = Epochs(len(questions), seed=config.seed, name="questions")
        self._sampled: tuple[int, dict[int, list[Chain]]] = (-1, {})

    def _question(self, place: int) -> Question:
        return self.questions[self._order[place]]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Returns the chains of these rows, sampled from the policy as it is when the step is first asked for."""
        if self._sampled[0] != step:
            self._sampled = step, self._sample(step)
        return collate_chains([chain for row in rows for chain in self._sampled[1][row]])

    def _sample(self, step: int) -> dict[int, list[Chain]]:
        questions = [self._question(step * self.rows + row) for row in self.own]
        found = self.sampler(
            [question.task.messages for question in questions],
            step=step,
            numbers=self.own,
            copies=self.config.samples,
            stop=self.config.marker,
        )
        tokenizer, marker, ends = self.sampler.run.tokenizer, self.config.marker, self.sampler.end
        return {
            row: [chain_row(question, rollout, tokenizer, marker=marker, ends=ends) for rollout in rollouts]
            for row, question, rollouts in zip(self.own, questions, found, strict=True)
        }

    def documents(self, step: int) -> list[str]:
        """Names the tasks of a batch."""
        return [self._question(step * self.rows + row).task.id for row in range(self.rows)]

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step."""
        return {"question": step * self.rows}
