"""Hold-out: which entities and pairs training never sees, finding their mentions, and proof that nothing leaked.

entities --choose_transfer--> transfer ids --Mentions.of--> every training text is searched --> dropped or pruned
questions + transfer entities + training texts --check_no_leak--> silence, or an error naming file and id
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from galenic.corpus.records import Entity
from galenic.runtime import UserError

T = TypeVar("T")

# A Han character is a token by itself, so a phrase match in Chinese is a substring match.
_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_HAN}]|[^\\W_{_HAN}]+")

# Sibling groups smaller than four cannot fill four options; very large ones are catch-alls.
_GROUP_SIZES = range(4, 31)
_NAME_WORDS = 12
# How many candidate groups are searched for, as a multiple of what is needed: the rest is thrown away as too costly.
_CANDIDATES = 6


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One Chinese text and its English translation (a sentence, a dictionary entry, a disease name)."""

    id: str
    source: str
    """`hsk`, `cedict` or `disease-tables`."""
    zh: str
    en: str
    department: str = ""


# ---------------------------------------------------------------------------- words and choices


def _fold(word: str) -> str:
    """Drops a plural s, so that holding out `febrile seizure` also finds `febrile seizures`."""
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] not in "siu" else word


def tokens(text: str) -> list[str]:
    """Splits a text into folded words: case, plural `s`, punctuation ignored; each Han character is a token.

    >>> tokens("Febrile seizures (J45.9), 上火")
    ['febrile', 'seizure', 'j45', '9', '上', '火']
    """
    return [_fold(word) for word in _TOKEN.findall(text.casefold())]


def stable_key(*parts: object) -> int:
    """Returns a 64-bit number that depends only on the parts, on every machine: for stable random choices."""
    joined = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def stable_shuffle(items: Iterable[T], key: Callable[[T], object], *parts: object) -> list[T]:
    """Orders items by a stable hash of their keys: independent of the order they came in."""
    return sorted(items, key=lambda item: (stable_key(*parts, key(item)), str(key(item))))


# ---------------------------------------------------------------------------- mentions


def surface_forms(entity: Entity) -> tuple[str, ...]:
    """Returns every string that names an entity: name, synonyms (ICD inclusion terms belong there) and codes."""
    return tuple(dict.fromkeys((entity.name, *entity.synonyms, *entity.codes)))


class Mentions:
    """Finds which of many names occur in a text as whole words, in one pass over its words.

    The names form a trie of words, entered at each word of the text that begins one of them.
    """

    def __init__(self, forms: Mapping[str, Iterable[str]]) -> None:
        """Indexes the surface forms of each key."""
        self._trie: dict[str, Any] = {}
        for key, names in sorted(forms.items()):
            for name in names:
                words = tokens(name)
                node = self._trie
                for word in words:
                    node = node.setdefault(word, {})
                if words:
                    node.setdefault("", []).append(key)  # no word is empty: the place of the ends

    @classmethod
    def of(cls, entities: Iterable[Entity]) -> "Mentions":
        """Indexes names, synonyms and codes of entities under their ids."""
        return cls({entity.id: surface_forms(entity) for entity in entities})

    def find(self, text: str) -> frozenset[str]:
        """Returns the keys of which a form occurs in the text."""
        return frozenset(self._scan(text, stop=False))

    def first(self, text: str) -> str | None:
        """Returns the key of the first mention in the text, or None: the fast test."""
        return next(iter(self._scan(text, stop=True)), None)

    def _scan(self, text: str, *, stop: bool) -> list[str]:
        words, trie = tokens(text), self._trie
        found: list[str] = []
        for start, word in enumerate(words):
            node = trie.get(word)
            position = start + 1
            while node is not None:
                if "" in node:
                    found.extend(node[""])
                    if stop:
                        return found
                node = node.get(words[position]) if position < len(words) else None
                position += 1
        return found


def prune(entity: Entity, forbidden: Mentions) -> Entity | None:
    """Removes what mentions a held-out entity: synonyms, relations, comment.

    Returns:
        The entity without them, or None if its name, a code or its definition mentions one.
    """
    if any(forbidden.first(text) for text in (entity.name, entity.definition, *entity.codes)):
        return None
    return replace(
        entity,
        synonyms=tuple(s for s in entity.synonyms if forbidden.first(s) is None),
        related=tuple((r, t) for r, t in entity.related if forbidden.first(t) is None),
        comment="" if forbidden.first(entity.comment) else entity.comment,
    )


# ---------------------------------------------------------------------------- choosing what is held out


def _specific(entity: Entity) -> bool:
    """True if no name is so short and common that finding it in a text means little, or too long to ask for."""
    names = [tokens(name) for name in (entity.name, *entity.synonyms)]
    return len(names[0]) <= _NAME_WORDS and all(
        len(words) > 1 or (len(words) == 1 and len(words[0]) >= 8) for words in names
    )


def _sibling_groups(entities: Mapping[str, Entity]) -> dict[str, list[str]]:
    """Returns parent -> all its children, where all are leaves with specific names."""
    children: dict[str, list[str]] = defaultdict(list)
    for key in sorted(entities):
        for parent in dict.fromkeys(entities[key].parents):
            children[parent].append(key)
    return {
        parent: group
        for parent, group in children.items()
        if len(group) in _GROUP_SIZES
        and all(key not in children and _specific(entities[key]) for key in group)
    }


def choose_transfer(
    entities: Iterable[Entity], texts: Iterable[str], *, share: float, seed: int, minimum: int
) -> frozenset[str]:
    """Chooses the ids of the entities held out for transfer questions, in whole groups of sibling leaves.

    Whole groups, because a held-out entity among trained siblings would be known by being the unfamiliar option.
    Of six times the groups needed, drawn at random, those are taken that cost training the fewest texts: the
    texts that mention a member, per member.

    Args:
        entities: every entity of every terminology.
        texts: every text that training might see (rendered entities included).
        share: share of the entities of each source to hold out, in (0, 1).
        seed: of the draw.
        minimum: fewest entities wanted in all.

    Raises:
        UserError: the terminologies hold fewer than `minimum` entities in suitable groups.
    """
    if not 0 < share < 1:
        raise UserError(f"transfer share: got {share}, must lie between 0 and 1")
    known = {entity.id: entity for entity in entities}
    groups = _sibling_groups(known)
    wanted: dict[str, float] = defaultdict(float)
    for entity in known.values():
        wanted[entity.source] += share
    candidates: dict[str, list[list[str]]] = defaultdict(list)
    drawn: dict[str, int] = defaultdict(int)
    for parent in stable_shuffle(groups, str, seed, "transfer"):
        source = known[groups[parent][0]].source
        if drawn[source] < _CANDIDATES * wanted[source]:
            candidates[source].append(groups[parent])
            drawn[source] += len(groups[parent])
    cost = _text_cost(known, [group for many in candidates.values() for group in many], texts)

    chosen: set[str] = set()
    for source in sorted(candidates):
        taken: set[str] = set()
        for group in sorted(candidates[source], key=lambda g: sum(cost[key] for key in g) / len(g)):
            if len(taken) < wanted[source]:
                taken.update(group)
        chosen |= taken
    if len(chosen) < minimum:
        raise UserError(
            f"transfer hold-out: only {len(chosen)} entities in sibling groups with specific names, "
            f"{minimum} are needed; raise the share (now {share}) or add terminologies"
        )
    return frozenset(chosen)


def _text_cost(
    entities: Mapping[str, Entity], groups: list[list[str]], texts: Iterable[str]
) -> dict[str, int]:
    """Returns for each candidate how many texts mention it."""
    cost = {key: 0 for group in groups for key in group}
    mentions = Mentions.of(entities[key] for key in cost)
    for text in texts:
        for key in mentions.find(text):
            cost[key] += 1
    return cost


def split_pairs(pairs: Iterable[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into (training, held out); pairs linked by the same Chinese or the same English stay together."""
    rows = sorted(pairs, key=lambda pair: pair.id)
    root: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        while root.setdefault(node, node) != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for pair in rows:
        ends = sorted((find(("zh", " ".join(tokens(pair.zh)))), find(("en", " ".join(tokens(pair.en))))))
        root[ends[1]] = ends[0]
    training, heldout = [], []
    for pair in rows:
        cluster = find(("zh", " ".join(tokens(pair.zh))))
        (heldout if stable_key(seed, "pairs", *cluster) < share * 2**64 else training).append(pair)
    return training, heldout


# ---------------------------------------------------------------------------- proof


def check_no_leak(
    questions: Iterable[Mapping[str, Any]],
    transfer_entities: Iterable[Entity],
    training_texts: Iterable[tuple[str, str]],
) -> None:
    """Proves that no question and no transfer entity occurs in training.

    Args:
        questions: rows of every question file.
        transfer_entities: the entities chosen by `choose_transfer`.
        training_texts: (label, text) of every training text: documents, conversations (messages joined by
            newlines), preference pairs. The label (file and id) is named in the error.

    Raises:
        RuntimeError: a question's stem, or its stem and answer, or a name, synonym or code of a transfer entity
            occurs in a training text (case, white space and punctuation ignored).
    """
    # A stem with its answer contains the stem, so looking for stems is enough. Words find the candidates fast; the
    # exact test then minds the punctuation, which tells 7 + 5 from 7 - 5.
    rows = {str(row["id"]): _spaced(str(row["question"])) for row in questions}
    stems = Mentions({key: [stem] for key, stem in rows.items()})
    named = Mentions.of(transfer_entities)
    for label, text in training_texts:
        entity = named.first(text)
        if entity is not None:
            raise RuntimeError(f"{label}: mentions the held-out entity {entity}")
        candidates = stems.find(text)
        if candidates:
            spaced = _spaced(text)
            leaked = min((key for key in candidates if rows[key] in spaced), default=None)
            if leaked is not None:
                raise RuntimeError(f"{label}: contains the text of question {leaked}")


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())
