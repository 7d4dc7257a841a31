"""Tasks with options on training entities, for rewards: what the model says must be one of them, and the right one.

    entity --fact--> question, the right text among three siblings' {"id", "question", "options", "answer", "domain"}

Worded as conversations are, never as questions are; another fact of the entity than the one that conversations give
options for.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from galenic.corpus.records import Entity
from galenic.corpus.starter.conversations import choice_kind, prompt
from galenic.corpus.starter.facts import KINDS, Tree, distractors, fact
from galenic.corpus.starter.holdout import Mentions, stable_key, stable_shuffle
from galenic.corpus.starter.questions import take_in_turn

DOMAIN = "choices"


def choice_tasks(
    entities: Iterable[Entity], *, forbidden: Mentions, count: int, heldout: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes tasks with four options, each terminology in turn, one an entity.

    Args:
        entities: entities whose document is in the training split.
        forbidden: the transfer entities; a task that mentions one is left out.
        count: how many at most, for training.
        heldout: how many more to hold out, at most a fifth of all.
        seed: of every choice.

    Returns:
        (training tasks, held-out tasks), of different entities.
    """
    tree = Tree(entities)
    by_source: dict[str, list[str]] = defaultdict(list)
    for key, entity in tree.entities.items():
        by_source[entity.source].append(key)
    streams = [_choices(tree, by_source[source], forbidden, seed) for source in sorted(by_source)]
    rows = take_in_turn(streams, count + heldout)
    set_aside = min(heldout, len(rows) // 5)
    return rows[set_aside:], rows[:set_aside]


def _choices(tree: Tree, keys: Iterable[str], forbidden: Mentions, seed: int) -> Iterator[dict[str, Any]]:
    for key in stable_shuffle(keys, str, seed, DOMAIN):
        row = _choice(tree, key, seed)
        if row is not None and forbidden.first("\n".join((row["question"], *row["options"]))) is None:
            yield row


def _choice(tree: Tree, key: str, seed: int) -> dict[str, Any] | None:
    """Asks for the first of the entity's facts, in an order drawn for it, that has three wrong answers."""
    rank = stable_key(seed, key, DOMAIN, "rank") % 4
    for kind in stable_shuffle(KINDS, str, seed, key, DOMAIN, "kind"):
        if kind in ("name-definition", choice_kind(key, seed)):
            continue
        asked = fact(tree, key, kind, seed)
        if asked is None:
            continue
        wrong = distractors(tree, asked, allowed=lambda _: True, seed=seed, rank=rank)
        if wrong is not None:
            options = stable_shuffle([asked.answer, *wrong], str, seed, key, DOMAIN)
            return {
                "id": f"{DOMAIN}/{key}",
                "question": prompt(asked, seed),
                "options": options,
                "answer": options.index(asked.answer),
                "domain": DOMAIN,
                "source": asked.entity.source,
                "department": asked.entity.department,
            }
    return None
