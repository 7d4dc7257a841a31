"""Preference pairs {"prompt", "chosen", "rejected", "source", "department"}; the rejected answer is a sibling's."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from galenic.corpus.records import Entity
from galenic.corpus.starter.conversations import prompt
from galenic.corpus.starter.facts import KINDS, Tree, distractors, fact
from galenic.corpus.starter.holdout import Mentions, stable_key, stable_shuffle
from galenic.corpus.starter.questions import take_in_turn

Preference = dict[str, Any]


def preference_pairs(
    entities: Iterable[Entity], *, forbidden: Mentions, count: int, seed: int
) -> list[Preference]:
    """Makes preference pairs on training entities: chosen is right, rejected is a sibling's or cousin's answer.

    Args:
        entities: entities whose document is in the training split.
        forbidden: the transfer entities; a pair that mentions one is left out.
        count: how many at most.
        seed: of every choice.
    """
    tree = Tree(entities)
    by_source: dict[str, list[str]] = defaultdict(list)
    for key, entity in tree.entities.items():
        by_source[entity.source].append(key)
    streams = [
        _pairs(tree, by_source[source], kind, forbidden, seed)
        for source in sorted(by_source)
        for kind in KINDS
    ]
    return take_in_turn(streams, count)


def _pairs(
    tree: Tree, keys: Iterable[str], kind: str, forbidden: Mentions, seed: int
) -> Iterator[Preference]:
    for key in stable_shuffle(keys, str, seed, "preferences", kind):
        asked = fact(tree, key, kind, seed)
        if asked is None:
            continue
        # Half of the rejected answers are shorter and half longer, so that length earns no preference.
        rank = stable_key(seed, key, kind, "rejected") % 2
        wrong = distractors(tree, asked, allowed=lambda _: True, seed=seed, rank=rank, n=1)
        if wrong is None:
            continue
        row = {
            "prompt": prompt(asked, seed),
            "chosen": asked.answer,
            "rejected": wrong[0],
            "source": asked.entity.source,
            "department": asked.entity.department,
        }
        if forbidden.first(f"{row['prompt']}\n{row['chosen']}\n{row['rejected']}") is None:
            yield row
