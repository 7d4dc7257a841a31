"""What `alignment.py` measures of a model: what it answers, prefers and has forgotten, all on held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small
import torch

from galenic.align.config import ReferenceConfig, RewardsConfig
from galenic.align.data.pairs import collate_pairs, read_pairs
from galenic.align.data.tasks import Task, read_tasks
from galenic.align.policy import Reference, padded, per_row, statistics
from galenic.align.rewards.rules import check
from galenic.align.rollouts.chains import chain_row, collate_chains, read_questions
from galenic.align.rollouts.sampling import Rollout, end_tokens, sample
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.corpus.tokens.shards import read_meta
from galenic.evaluate import multiple_choice
from galenic.evaluate.inputs import read_questions as read_choices
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.model.head import head_is_product
from galenic.runtime import read_jsonl

MARKER = "\nAnswer:"
TASKS = 200
"""Held-out tasks of each kind that are answered."""
SAMPLED = 60
"""Of each, those whose answers are sampled, for the divergence."""
QUESTIONS = {"recall": 160, "transfer": 160}
"""Multiple-choice questions of each kind; their wordings are in no training text."""
ROOM = 48
"""Tokens an answer may have."""
CONTEXT = 256
HELDOUT = 1000
"""Held-out tokens of each source."""
BATCH = 32


def measure(folder: str, yardstick: str, run: Path) -> dict[str, float]:
    """Measures one model.

    Args:
        folder: of the model.
        yardstick: model folder that the divergence is measured from.
        run: a starter run.

    Returns:
        Name -> mean.
    """
    model, tokenizer = load_any(folder), load_tokenizer(folder)
    model.eval()
    corpus, product = run / "10-corpus", head_is_product(model)
    tasks = heldout_tasks(run)
    with torch.no_grad():
        return {
            **_answers(model, tokenizer, tasks),
            **_likelihoods(model, tokenizer, corpus / "tasks" / "chains.heldout.jsonl", product),
            **_divergence(model, tokenizer, folder, yardstick, [*tasks["chains"], *tasks["choices"]]),
            **_preference(model, tokenizer, corpus / "preferences.heldout.jsonl", product),
            **{kind: _choice(model, tokenizer, corpus, kind) for kind in QUESTIONS},
            **_text(model, run / "20-tokenizer"),
        }


def written(
    model: Any, tokenizer: Any, tasks: Sequence[Task], temperature: float
) -> tuple[list[list[int]], list[Rollout]]:
    """Returns the prompts of tasks, and what the model answers."""
    prompts = [encode_chat(tokenizer, task.messages)[0] for task in tasks]
    found = sample(
        model,
        prompts,
        keys=[(0, place) for place in range(len(prompts))],
        max_new_tokens=ROOM,
        end=set(end_tokens(tokenizer, model)),
        temperature=temperature,
    )
    return prompts, found


def answers_right(folder: str, run: Path) -> list[float]:
    """Lets a model answer the held-out calculations greedily; 1 for each that the tasks' rule finds right, else 0."""
    model, tokenizer = load_any(folder), load_tokenizer(folder)
    tasks = heldout_tasks(run)["chains"]
    with torch.no_grad():
        return _right(tokenizer, tasks, written(model.eval(), tokenizer, tasks, 0.0)[1])


def heldout_tasks(run: Path) -> dict[str, list[Task]]:
    """Returns the starter's held-out calculations and choices."""
    mixed = read_tasks(str(run / "10-corpus" / "tasks" / "rewarded.heldout.jsonl"), answers=True)
    return {name: [task for task in mixed if task.domain == name][:TASKS] for name in ("chains", "choices")}


def _answers(model: Any, tokenizer: Any, tasks: dict[str, list[Task]]) -> dict[str, float]:
    """Greedy answers: the share that the tasks' rules find right, their length and whether they end."""
    found = {}
    for name, some in tasks.items():
        _, replies = written(model, tokenizer, some, 0.0)
        found[name] = _mean(_right(tokenizer, some, replies))
        found[f"{name} length"] = _mean([len(reply.ids) for reply in replies])
        found[f"{name} ended"] = _mean([reply.ended for reply in replies])
    return found


def _right(tokenizer: Any, tasks: Sequence[Task], replies: Sequence[Rollout]) -> list[float]:
    texts = [tokenizer.decode(reply.ids, skip_special_tokens=True) for reply in replies]
    return [float(check(task, text, RewardsConfig())) for task, text in zip(tasks, texts, strict=True)]


def _likelihoods(model: Any, tokenizer: Any, path: Path, product: bool) -> dict[str, float]:
    """Mean log-likelihood of the true answers, nats: after the chain that the model writes greedily, and after none."""
    questions = read_questions(
        str(path), tokenizer, marker=MARKER, room=ROOM, context=2 * CONTEXT, limit=TASKS
    )[0]
    ends = end_tokens(tokenizer, model)
    _, replies = written(model, tokenizer, [question.task for question in questions], 0.0)
    nothing = [Rollout() for _ in questions]
    found = {}
    for name, rollouts in (("log-likelihood", replies), ("log-likelihood without", nothing)):
        rows = [
            chain_row(question, rollout, tokenizer, marker=MARKER, ends=ends)
            for question, rollout in zip(questions, rollouts, strict=True)
        ]
        sums: list[float] = []
        for start in range(0, len(rows), BATCH):
            part = collate_chains(rows[start : start + BATCH])
            told = statistics(model, {"input_ids": part["input_ids"]}, part["answers"], product=product)
            sums += per_row(told.log_probs, part["answers"])[part["row"]].tolist()
        found[name] = _mean(sums)
    return found


def _divergence(
    model: Any, tokenizer: Any, folder: str, yardstick: str, tasks: list[Task]
) -> dict[str, float]:
    """KL from the yardstick and entropy, nats a token of sampled answers: the mean of log p - log q."""
    some = tasks[:SAMPLED] + tasks[-SAMPLED:]
    prompts, replies = written(model, tokenizer, some, 1.0)
    reference = Reference(model, ReferenceConfig(model=yardstick), base=folder)
    product, sums, tokens = head_is_product(model), torch.zeros(2), 0
    for start in range(0, len(some), BATCH):
        rows = range(start, min(start + BATCH, len(some)))
        ids = padded([prompts[row] + replies[row].ids for row in rows], PAD)
        places = torch.arange(ids.shape[1])[None]
        first = torch.tensor([len(prompts[row]) for row in rows])[:, None]
        last = first + torch.tensor([len(replies[row].ids) for row in rows])[:, None]
        wanted = (places >= first) & (places < last)
        told = statistics(model, {"input_ids": ids}, wanted, product=product, reference=reference)
        assert told.reference_log_probs is not None
        sums += torch.stack([(told.log_probs - told.reference_log_probs).sum(), told.entropy.sum()])
        tokens += int(wanted.sum())
    kl, entropy = (sums / tokens).tolist()
    return {"kl": kl, "entropy": entropy}


def _preference(model: Any, tokenizer: Any, path: Path, product: bool) -> dict[str, float]:
    """Share of held-out pairs whose chosen answer is the likelier one: of calculations, and of facts."""
    rows = list(read_jsonl(path))
    pairs, dropped = read_pairs(str(path), tokenizer, CONTEXT)
    if len(pairs) != len(rows):
        raise ValueError(f"{path}: pairs that cannot be measured: {dropped}")
    right: list[bool] = []
    for start in range(0, len(pairs), BATCH):
        part = collate_pairs(pairs[start : start + BATCH])
        told = statistics(model, {"input_ids": part["input_ids"]}, part["answers"], product=product)
        chosen, rejected = per_row(told.log_probs, part["answers"]).view(-1, 2).unbind(1)
        right += (chosen > rejected).tolist()
    calculations = [row["source"] == "chains" for row in rows]
    return {
        "pairs of calculations": _mean([r for r, is_one in zip(right, calculations, strict=True) if is_one]),
        "pairs of facts": _mean([r for r, is_one in zip(right, calculations, strict=True) if not is_one]),
    }


def _choice(model: Any, tokenizer: Any, corpus: Path, kind: str) -> float:
    """Accuracy of multiple choice by likelihood, as the starter evaluates it: chat prompt, pmi."""
    rows = read_choices(corpus / "questions" / f"{kind}.jsonl")[: QUESTIONS[kind]]
    form, context = PromptFormat(name="chat"), int(model.config.max_position_embeddings)

    def encode(question: str | None, options: list[str]) -> Any:
        return multiple_choice.tokenize(tokenizer, form, question, options, context)

    def log_probs(prompts: list[Any]) -> list[list[float]]:
        return multiple_choice.option_log_probs(model, prompts, batch_tokens=2048)

    texts = sorted({option for row in rows for option in row["options"]})
    bare = {
        text: value
        for text, (value,) in zip(texts, log_probs([encode(None, [t]) for t in texts]), strict=True)
    }
    totals = log_probs([encode(row["question"], row["options"]) for row in rows])
    right = []
    for row, total in zip(rows, totals, strict=True):
        scores = multiple_choice.scores(total, [bare[option] for option in row["options"]], row["options"])
        right.append(multiple_choice.best(scores["pmi"]) == row["answer"])
    return _mean(right)


def _text(model: Any, tokenizer: Path) -> dict[str, float]:
    """Held-out bits per byte of documents, by group of sources: what alignment costs."""
    sources = [
        name for name, facts in read_meta(tokenizer)["sources"].items() if facts["heldout"]["documents"]
    ]
    documents = small.heldout(tokenizer, sources, HELDOUT)
    scored = small.by_source(
        small.score(model, documents, tokenizer, int(model.config.max_position_embeddings))
    )
    return small.by_group(scored, small.groups(tokenizer))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))
