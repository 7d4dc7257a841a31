"""What the verbs of alignment read: conversations to begin with, tasks with right answers, preference pairs.

worked calculations + some of every kind of conversation --> sft/alignment.*.jsonl        sft
calculations of several steps                            --> tasks/chains.*.jsonl         elo
the same, and choices on entities                        --> tasks/rewarded.*.jsonl       ppo
siblings' answers, calculations that slip                --> preferences*.jsonl           tdpo, reward
"""

from collections.abc import Mapping
from typing import Any

from galenic.corpus.config import StarterConfig
from galenic.corpus.records import Entity
from galenic.corpus.starter.chains import chain_conversations, chain_pairs, chain_tasks
from galenic.corpus.starter.choices import choice_tasks
from galenic.corpus.starter.conversations import conversation_text, split_rows
from galenic.corpus.starter.holdout import Mentions, stable_shuffle
from galenic.corpus.starter.preferences import preference_pairs

Row = dict[str, Any]
Splits = tuple[list[Row], list[Row]]
"""(training rows, held-out rows)"""
CATEGORIES = {"medical": "knowledge", "dialogue": "general", "reasoning": "reasoning"}
"""Kind of conversation -> what the report calls it (section 5.1)."""


def alignment_conversations(config: StarterConfig, seed: int, others: Mapping[str, Splits]) -> Splits:
    """Puts worked calculations and some of every other kind of conversation together, each side from its own.

    Args:
        config: how many.
        seed: of every choice.
        others: kind -> its conversations.
    """
    half = config.heldout_conversations // 2
    sizes = ((config.alignment_conversations, config.worked_chains), (config.heldout_conversations, half))
    both: list[list[Row]] = []
    for side, (total, worked) in enumerate(sizes):
        steps = chain_conversations(worked, seed, "heldout" if side else "train")
        rows = [{**row, "category": "reasoning"} for row in steps]
        each = max(1, (total - worked) // len(others))
        for kind, splits in others.items():
            chosen = stable_shuffle(splits[side], conversation_text, seed, "alignment")[:each]
            rows += [{**row, "category": CATEGORIES[kind]} for row in chosen]
        both.append(stable_shuffle(rows, conversation_text, seed, "alignment order"))
    return both[0], both[1]


def alignment_tasks(
    config: StarterConfig, seed: int, entities: list[Entity], forbidden: Mentions
) -> dict[str, Splits]:
    """Makes calculations of several steps, and these and choices together: rules tell right from wrong.

    Args:
        config: how many.
        seed: of every choice.
        entities: entities whose document is in the training split.
        forbidden: the transfer entities.
    """
    train = chain_tasks(config.tasks, seed, "train")
    heldout = chain_tasks(config.heldout_tasks, seed, "heldout")
    choices = choice_tasks(
        entities, forbidden=forbidden, count=config.tasks, heldout=config.heldout_tasks, seed=seed
    )
    return {
        "chains": (train, heldout),
        "rewarded": (_mixed([*train, *choices[0]], seed), _mixed([*heldout, *choices[1]], seed)),
    }


def alignment_pairs(config: StarterConfig, seed: int, entities: list[Entity], forbidden: Mentions) -> Splits:
    """Makes preference pairs: three quarters on training entities, one on calculations that slip.

    Args:
        config: how many.
        seed: of every choice.
        entities: entities whose document is in the training split.
        forbidden: the transfer entities.
    """
    slips = max(1, config.preferences // 4)
    pairs = preference_pairs(entities, forbidden=forbidden, count=config.preferences - slips, seed=seed)
    train, heldout = split_rows(pairs, heldout=min(config.heldout_tasks, len(pairs) // 5), seed=seed)
    heldout += chain_pairs(max(1, len(heldout) // 3), seed, "heldout")
    return _mixed(train + chain_pairs(slips, seed, "train"), seed), _mixed(heldout, seed)


def _mixed(rows: list[Row], seed: int) -> list[Row]:
    return stable_shuffle(rows, lambda row: " ".join(map(str, row.values())), seed, "alignment order")
