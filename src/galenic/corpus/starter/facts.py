"""Facts about entities, and the wrong answers that lie nearest to the right ones.

    entity --fact--> (kind, given, answer) --distractors--> texts of siblings, then cousins

Questions, conversations and preference pairs are worded from the same facts, each in its own words.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from galenic.corpus.records import Entity
from galenic.corpus.starter.holdout import stable_shuffle, tokens

_FUNCTION_WORDS = frozenset(
    "a an and by due for from in of on or other specified the to unspecified with".split()
)

STEM_WORDS = 60
"""Longest definition a stem quotes, in words; longer ones are cut after a sentence."""
OPTION_WORDS = 25
"""Longest definition as an option, in words."""
NAME_WORDS = 12
"""Longest name or synonym as an option, in words."""

_PLENTY = 16  # candidates to choose lengths from
_ENOUGH = 6  # siblings that make cousins unnecessary

# ---------------------------------------------------------------------------- the tree


class Tree:
    """Parents, children and near relatives among entities."""

    def __init__(self, entities: Iterable[Entity]) -> None:
        """Indexes entities by id and by parent; a parent may be absent from the entities and still join siblings."""
        self.entities = {entity.id: entity for entity in sorted(entities, key=lambda e: e.id)}
        self._children: dict[str, list[str]] = defaultdict(list)
        for key, entity in self.entities.items():
            for parent in dict.fromkeys(entity.parents):
                self._children[parent].append(key)
        self._ancestors: dict[str, frozenset[str]] = {}

    def parents(self, key: str) -> tuple[str, ...]:
        """Returns the direct parents; none for an unknown id."""
        return self.entities[key].parents if key in self.entities else ()

    def children(self, key: str) -> list[str]:
        """Returns the ids directly below."""
        return self._children.get(key, [])

    def siblings(self, key: str) -> list[str]:
        """Returns the other children of the entity's parents."""
        found = dict.fromkeys(c for parent in self.parents(key) for c in self.children(parent))
        found.pop(key, None)
        return list(found)

    def cousins(self, key: str) -> list[str]:
        """Returns the children of the parents' siblings."""
        uncles = dict.fromkeys(u for parent in self.parents(key) for u in self.siblings(parent))
        found = dict.fromkeys(c for uncle in uncles for c in self.children(uncle))
        near = {key, *self.siblings(key)}
        return [c for c in found if c not in near]

    def ancestors(self, key: str) -> frozenset[str]:
        """Returns every id above the entity."""
        if key not in self._ancestors:
            above: dict[str, None] = {}
            stack = list(self.parents(key))
            while stack:
                parent = stack.pop()
                if parent not in above:
                    above[parent] = None
                    stack.extend(self.parents(parent))
            self._ancestors[key] = frozenset(above)
        return self._ancestors[key]


# ---------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Fact:
    """Something to ask of an entity: given one side, the answer is the other."""

    entity: Entity
    kind: str
    given: str
    answer: str
    answer_id: str
    """The entity that the answer names: itself, or its parent."""


KINDS = (
    "definition-name",
    "name-definition",
    "name-synonym",
    "synonym-name",
    "brand-name",
    "name-parent",
    "code-name",
    "name-code",
)


def fact(tree: Tree, key: str, kind: str, seed: int) -> Fact | None:
    """Returns the fact of one kind about an entity, or None where it has none worth asking."""
    entity = tree.entities[key]
    given_side, answer_side = kind.split("-")
    if answer_side == "parent":
        named = [p for p in entity.parents if p in tree.entities]
        if not named:
            return None
        parent = tree.entities[stable_shuffle(named, str, seed, key)[0]]
        return _asked(Fact(entity, kind, entity.name, parent.name, parent.id))
    given = aspect(entity, given_side, seed, STEM_WORDS)
    answer = aspect(entity, answer_side, seed, OPTION_WORDS)
    return _asked(Fact(entity, kind, given, answer, key)) if given and answer else None


def _asked(found: Fact) -> Fact | None:
    """Drops facts that answer themselves: spelling variants, one side inside the other; and endless names."""
    if ("synonym" in found.kind or "brand" in found.kind) and alike(found.given, found.answer):
        return None
    return found if _short(found.answer, found.kind) else None


def _short(option: str, kind: str) -> bool:
    return len(option.split()) <= (OPTION_WORDS if kind == "name-definition" else NAME_WORDS)


def aspect(entity: Entity, side: str, seed: int, words: int) -> str:
    """Returns one side of an entity as text, or an empty string.

    Args:
        entity: the entity.
        side: `name`, `definition`, `synonym`, `brand` (a drug's) or `code` (ICD-10-CM only: other codes are bare
            serial numbers).
        seed: of the choice among synonyms; those that only respell the name are passed over.
        words: longest definition, in words.
    """
    if side == "name":
        return entity.name
    if side == "definition":
        return shorten(entity.definition, words)
    if side == "code":
        # Sections and chapters have ranges of codes, which no one writes into a chart.
        code = entity.codes[0] if entity.source == "icd10cm" and entity.codes else ""
        return "" if "-" in code else code
    if side == "brand":
        names: Iterable[str] = (text for relation, text in entity.related if relation == "brand name")
    else:
        names = entity.synonyms
    other = [s for s in dict.fromkeys(names) if not alike(s, entity.name)]
    return stable_shuffle(other, str, seed, entity.id)[0] if other else ""


def shorten(text: str, words: int) -> str:
    """Returns the leading whole sentences of at most `words` words, or an empty string where even one is longer.

    Very short definitions (under five words) are refused as well.
    """
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip()):
        if len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    short = " ".join(kept)
    return short if len(short.split()) >= 5 else ""


def alike(a: str, b: str) -> bool:
    """True if two names are spelling variants of each other, or one holds all the words of the other."""
    first, second = tokens(a), tokens(b)
    if not set(first) - set(second) or not set(second) - set(first):
        return True
    return difflib.SequenceMatcher(None, " ".join(first), " ".join(second)).ratio() > 0.72


# ---------------------------------------------------------------------------- distractors


def distractors(
    tree: Tree, asked: Fact, *, allowed: Callable[[str], bool], seed: int, rank: int, n: int = 3
) -> list[str] | None:
    """Chooses wrong answers among siblings, then cousins, of the entity that the right answer names.

    Args:
        tree: of all entities.
        asked: the fact.
        allowed: which ids may serve.
        seed: of the choice.
        rank: how many of the wrong answers should be shorter than the right one, so that length tells nothing.
        n: how many wrong answers.

    Returns:
        The texts, or None where fewer than `n` suit or one side of the fact stands in the other.
    """
    if phrase_in(asked.answer, asked.given) or phrase_in(asked.given, asked.answer):
        return None  # the stem says it
    texts: list[str] = []
    for tier in (tree.siblings, tree.cousins):
        for key in stable_shuffle(tier(asked.answer_id), str, seed, asked.entity.id, asked.kind):
            if len(texts) < _PLENTY and allowed(key) and not _unfit(tree, asked, key):
                text = _option(tree.entities[key], asked.kind, seed)
                apart = all(distinct(text, other, asked.kind) for other in (asked.answer, *texts))
                if text and apart and not phrase_in(text, asked.given):
                    texts.append(text)
        if len(texts) >= _ENOUGH:
            break
    return wrong_answers(asked.answer, asked.given, texts, rank, n)


def _echo(option: str, given: str) -> float:
    """Returns the share of an option's words that the stem already holds."""
    words = set(tokens(option)) - _FUNCTION_WORDS
    return len(words & set(tokens(given))) / len(words) if words else 0.0


def _option(entity: Entity, kind: str, seed: int) -> str:
    side = kind.split("-")[1]
    text = aspect(entity, "name" if side == "parent" else side, seed, OPTION_WORDS)
    return text if _short(text, kind) else ""


def _unfit(tree: Tree, asked: Fact, other: str) -> bool:
    """True if the other entity would be right too (an ancestor, a descendant, one sharing a name) or plainly wrong."""
    key = asked.entity.id
    if asked.answer_id != key and not tree.children(other):
        return True  # a heading without anything under it is no broader term
    if other == key or other in tree.ancestors(key) or key in tree.ancestors(other):
        return True
    names = {_words(n) for n in (asked.entity.name, *asked.entity.synonyms, asked.answer)}
    rival = tree.entities[other]
    if any(_words(n) in names for n in (rival.name, *rival.synonyms)):
        return True
    return bool(rival.definition) and _words(rival.definition) == _words(asked.entity.definition)


def distinct(a: str, b: str, kind: str = "") -> bool:
    """True if neither text holds the other as a phrase (codes only need to differ)."""
    if kind == "name-code":
        return a != b
    return not phrase_in(a, b) and not phrase_in(b, a)


def phrase_in(phrase: str, text: str) -> bool:
    """True if the words of the phrase stand in the text in their order, punctuation ignored."""
    return f" {_words(phrase)} " in f" {_words(text)} "


@lru_cache(maxsize=200_000)
def _words(text: str) -> str:
    return " ".join(tokens(text))


def wrong_answers(answer: str, given: str, texts: Sequence[str], rank: int, n: int = 3) -> list[str] | None:
    """Picks `n` of the candidate texts so that neither length nor words shared with the stem betray the answer.

    Returns:
        The texts, or None where fewer than `n` suit or the answer alone repeats the stem.
    """
    echo = _echo(answer, given)
    echoes = {text: _echo(text, given) for text in texts}
    ordered = sorted(texts, key=lambda text: round(abs(echoes[text] - echo), 1))
    wrong = pick_lengths(answer, ordered, rank, n)
    return wrong if wrong and max(echoes[text] for text in wrong) > echo - 0.3 else None


def pick_lengths(answer: str, texts: Sequence[str], rank: int, n: int) -> list[str] | None:
    """Picks `n` texts in order of preference, `rank` of them not longer than the answer and the others not shorter."""
    if len(texts) < n:
        return None
    shorter = [t for t in texts if len(t) <= len(answer)][:rank]
    longer = [t for t in texts if len(t) >= len(answer) and t not in shorter][: n - rank]
    chosen = shorter + longer
    rest = sorted(
        (t for t in texts if t not in chosen), key=lambda t: abs(len(t) - len(answer)) > len(answer) // 2
    )
    return (chosen + rest)[:n]
