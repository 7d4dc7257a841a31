"""Multiple-choice questions about entities and translations; distractors are siblings, then cousins.

A question is {"id", "question", "options" (4), "answer" (index), "source", "department", "entity"}. It is scored by the
likelihood of each option's text after the stem, so stems end where the option naturally follows.

    entity --facts--> (kind, given, answer) --distractors (siblings, cousins)--> options --seal--> balanced positions
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from galenic.corpus.records import Entity
from galenic.corpus.starter.facts import (
    KINDS,
    Fact,
    Tree,
    distinct,
    distractors,
    fact,
    phrase_in,
    pick_lengths,
)
from galenic.corpus.starter.holdout import Pair, stable_key, stable_shuffle, tokens
from galenic.corpus.starter.render import Family, render

Question = dict[str, Any]
T = TypeVar("T")

WORDINGS: dict[tuple[str, str], str] = {
    ("hpo", "definition-name"): "Which phenotype fits this description? {given}",
    ("hpo", "name-definition"): 'What is meant by "{given}" in a patient?',
    ("hpo", "name-synonym"): 'Which of these terms means the same as "{given}"?',
    ("hpo", "synonym-name"): 'Which phenotype is also called "{given}"?',
    ("hpo", "name-parent"): '"{given}" is a special case of which broader phenotype?',
    ("icd10cm", "name-synonym"): 'Which of these conditions is coded together with "{given}"?',
    ("icd10cm", "synonym-name"): 'Under which ICD-10-CM title does "{given}" fall?',
    ("icd10cm", "name-parent"): 'Under which heading of ICD-10-CM does "{given}" stand?',
    ("icd10cm", "code-name"): "Which diagnosis does the ICD-10-CM code {given} stand for?",
    ("icd10cm", "name-code"): 'Which ICD-10-CM code belongs to "{given}"?',
    ("mesh", "name-synonym"): 'Which of these terms is an entry term of the MeSH heading "{given}"?',
    ("mesh", "synonym-name"): 'Which MeSH heading covers "{given}"?',
    ("mesh", "name-parent"): 'Which broader MeSH heading contains "{given}"?',
    ("drugs", "name-synonym"): "Which of these names means the same substance as {given}?",
    ("drugs", "synonym-name"): "Which substance goes by the name {given}?",
    ("drugs", "brand-name"): "Which substance is sold as {given}?",
    ("drugs", "name-parent"): "Which group of substances includes {given}?",
    ("", "definition-name"): "Which concept fits this description? {given}",
    ("", "name-definition"): 'What is meant by "{given}"?',
    ("", "name-synonym"): 'Which of these terms means the same as "{given}"?',
    ("", "synonym-name"): 'Which concept is also called "{given}"?',
    ("", "name-parent"): '"{given}" is a special case of which broader concept?',
}
"""(source, kind) -> stem; the empty source serves every other one. Training text never uses these wordings."""

TRANSLATION_WORDS = 15
"""Longest English side, in words."""
TRANSLATION_WORDINGS = {
    "zh-en": "What is the English for: {given}",
    "en-zh": "What is the Chinese for: {given}",
}


# ---------------------------------------------------------------------------- questions


def recall_questions(entities: Iterable[Entity], *, count: int, seed: int) -> list[Question]:
    """Makes questions on entities whose text is in the training corpus; the wording never is.

    Args:
        entities: entities whose document is in the training split (pruned, not transfer, not held out).
        count: how many at most; every answer position occurs count / 4 times within one.
        seed: of every choice.
    """
    tree = Tree(entities)
    family = Family(tree.entities.values())

    def told(asked: Fact) -> bool:
        """True if the rendered text says both sides: rendering leaves out the last of many synonyms."""
        text = render(asked.entity, family)
        return phrase_in(asked.given, text) and phrase_in(asked.answer, text)

    return _entity_questions(tree, list(tree.entities), lambda _: True, told, "recall", 2, count, seed)


def transfer_questions(
    entities: Iterable[Entity], transfer: frozenset[str], *, count: int, seed: int
) -> list[Question]:
    """Makes the same types of questions on entities that appear nowhere in training.

    Options that name entities all come from the held-out ones (for "broader" questions all come from training), so
    seen versus unseen gives nothing away.

    Args:
        entities: every entity (the tree is needed), unpruned.
        transfer: ids chosen by `holdout.choose_transfer`.
        count: how many at most; at most three per entity.
        seed: of every choice.
    """
    tree = Tree(entities)
    ids = [key for key in tree.entities if key in transfer]
    return _entity_questions(tree, ids, transfer.__contains__, lambda _: True, "transfer", 3, count, seed)


def _entity_questions(
    tree: Tree,
    ids: list[str],
    allowed: Callable[[str], bool],
    worth: Callable[[Fact], bool],
    label: str,
    per_entity: int,
    count: int,
    seed: int,
) -> list[Question]:
    """Takes questions from each (source, kind) in turn until there are enough."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for key in ids:
        by_source[tree.entities[key].source].append(key)
    used: dict[str, int] = defaultdict(int)

    def stream(source: str, kind: str) -> Iterator[Question]:
        for key in stable_shuffle(by_source[source], str, seed, label, kind):
            if used[key] < per_entity:
                asked = fact(tree, key, kind, seed)
                if asked is None or not worth(asked):
                    continue
                question = _entity_question(tree, asked, allowed, label, seed)
                if question:
                    used[key] += 1
                    yield question

    streams = [stream(source, kind) for source in sorted(by_source) for kind in KINDS]
    return seal(take_in_turn(streams, count), seed)


def _entity_question(
    tree: Tree, asked: Fact, allowed: Callable[[str], bool], label: str, seed: int
) -> Question | None:
    entity, kind = asked.entity, asked.kind
    key = entity.id
    # Broader headings are training's on both sides; everything else comes from the entity's own side.
    suits = allowed if asked.answer_id == key else (lambda i: label == "recall" or not allowed(i))
    rank = stable_key(seed, key, kind, "rank") % 4
    wrong = distractors(tree, asked, allowed=suits, seed=seed, rank=rank)
    if wrong is None:
        return None
    wording = WORDINGS.get((entity.source, kind)) or WORDINGS["", kind]
    return {
        "id": f"{label}/{key}/{kind}",
        "question": wording.format(given=asked.given),
        "options": [asked.answer, *wrong],
        "answer": 0,
        "source": entity.source,
        "department": entity.department,
        "entity": key,
    }


def take_in_turn(streams: Iterable[Iterator[T]], count: int) -> list[T]:
    """Takes one item from each stream in turn until `count` are taken or all are empty."""
    taken: list[T] = []
    live = list(streams)
    while live and len(taken) < count:
        for stream in list(live):
            item = next(stream, None)
            if item is None:
                live.remove(stream)
            elif len(taken) < count:
                taken.append(item)
    return taken


def seal(questions: list[Question], seed: int) -> list[Question]:
    """Shuffles questions and options so that every answer position occurs equally often, within one.

    Args:
        questions: rows whose right answer is option 0.
        seed: of the shuffles.
    """
    rows = stable_shuffle(questions, lambda q: q["id"], seed, "order")
    positions = [i % 4 for i in range(len(rows))]
    random.Random(stable_key(seed, "positions")).shuffle(positions)
    sealed = []
    for row, position in zip(rows, positions, strict=True):
        wrong = stable_shuffle(row["options"][1:], str, seed, row["id"])
        options = [*wrong[:position], row["options"][0], *wrong[position:]]
        sealed.append({**row, "options": options, "answer": position})
    return sealed


# ---------------------------------------------------------------------------- translation


def translation_questions(pairs: Iterable[Pair], *, count: int, seed: int) -> list[Question]:
    """Makes zh -> en and en -> zh questions from held-out pairs; options of similar length from the same source."""
    by_source: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: p.id):
        # A single character has too many senses, a long gloss too many synonyms, for one answer to be the right one.
        if len(tokens(pair.zh)) >= 2 and len(pair.en.split()) <= TRANSLATION_WORDS:
            by_source[pair.source].append(pair)
    streams = [
        _translations(by_source[source], direction, seed)
        for source in sorted(by_source)
        for direction in TRANSLATION_WORDINGS
    ]
    return seal(take_in_turn(streams, count), seed)


def _translations(pairs: list[Pair], direction: str, seed: int) -> Iterator[Question]:
    sides = [(p.zh, p.en) if direction == "zh-en" else (p.en, p.zh) for p in pairs]
    at_index = {pair.id: index for index, pair in enumerate(pairs)}
    # Neighbours in length make the pool, so that no option stands out.
    ordered = sorted(range(len(pairs)), key=lambda i: (len(sides[i][1]), pairs[i].id))
    place = {index: at for at, index in enumerate(ordered)}
    for pair in stable_shuffle(pairs, lambda p: p.id, seed, direction):
        index = at_index[pair.id]
        given, answer = sides[index]
        near = ordered[max(0, place[index] - 20) : place[index] + 21]
        texts: list[str] = []
        for i in stable_shuffle(near, lambda i: pairs[i].id, seed, pair.id, direction):
            other = sides[i]
            if tokens(other[0]) != tokens(given) and all(
                distinct(other[1], text) for text in (answer, *texts)
            ):
                texts.append(other[1])
        wrong = pick_lengths(answer, texts, stable_key(seed, pair.id, direction) % 4, 3)
        if wrong:
            yield {
                "id": f"translation/{pair.id}/{direction}",
                "question": TRANSLATION_WORDINGS[direction].format(given=given),
                "options": [answer, *wrong],
                "answer": 0,
                "source": pair.source,
                "department": pair.department,
                "entity": pair.id,
            }
