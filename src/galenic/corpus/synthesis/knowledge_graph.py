"""Knowledge graphs: entities back out of their Markdown, rewritten in genres, asked for by what they are.

    documents --parse--> entities --Tree--> siblings
    entity + siblings --endpoint--> genres; a question whose answer is the entity, siblings as the other options

Source: Baichuan-M1 report, section 2.2.2 and figure 6. `corpus/starter/render.py` writes the Markdown, and only of what
training may see: an entity that was held out is in no document, so in no tree here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from galenic.corpus.records import Entity
from galenic.corpus.starter.facts import STEM_WORDS, Fact, Tree, distractors, phrase_in, shorten
from galenic.corpus.starter.holdout import stable_key, stable_shuffle
from galenic.corpus.synthesis.checks import Problem, language_of
from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Seed, choice_text

_TYPE, _CODE, _SYNONYMS, _PARENTS = (
    ("Type", "类型"),
    ("Code", "代码"),
    ("Also called", "别名"),
    ("Kind of", "属于"),
)
_GROUPS = ("department", "科室")
_TELLING = ("symptom", "medication", "症状", "药物")
_BULLET = re.compile(r"- ([^:\n]+): (.+)")


def parse(document: Mapping[str, Any]) -> Entity | None:
    """Returns the entity that a document was rendered of, parents by name, or None where it is no entity.

    Args:
        document: `id`, `text`, `source`, `department`.
    """
    blocks = document["text"].strip().split("\n\n")
    if len(blocks) < 2 or not blocks[0].startswith("# ") or "\n" in blocks[0]:
        return None
    facts = _bullets(blocks[1])
    kind = _of(facts, _TYPE)
    if not kind:
        return None
    related = _bullets(blocks[-1]) if len(blocks) > 2 else {}
    texts = blocks[2:-1] if related else blocks[2:]
    code, synonyms, parents = _of(facts, _CODE), _of(facts, _SYNONYMS), _of(facts, _PARENTS)
    return Entity(
        id=document["id"],
        source=document["source"],
        name=blocks[0][2:].strip(),
        kind=kind,
        department=document["department"] or "",
        definition=texts[0] if texts else "",
        comment=texts[1] if len(texts) > 1 else "",
        codes=(code,) if code else (),
        synonyms=tuple(synonyms.split("; ")) if synonyms else (),
        parents=tuple(parents.split("; ")) if parents else (),
        related=tuple(
            (label.lower(), text) for label, items in related.items() for text in items.split("; ")
        ),
    )


def _bullets(block: str) -> dict[str, str]:
    """Returns label -> text if every line of a block is `- Label: text`, else nothing."""
    matches = [_BULLET.fullmatch(line) for line in block.split("\n")]
    return {match[1]: match[2] for match in matches if match} if all(matches) else {}


def _of(facts: dict[str, str], labels: tuple[str, ...]) -> str:
    return next((facts[label] for label in labels if label in facts), "")


def tree_of(documents: Iterable[Mapping[str, Any]]) -> Tree:
    """Parses documents and links parents by their names within a source; a name nobody has still joins siblings.

    Entities without parents, such as the rows of a table, are siblings within their department.
    """
    found = [entity for entity in map(parse, documents) if entity is not None]
    ids = {(entity.source, entity.name): entity.id for entity in found}
    linked = []
    for entity in found:
        names = entity.parents or tuple(text for label, text in entity.related if label in _GROUPS)
        parents = tuple(ids.get((entity.source, name), f"{entity.source}: {name}") for name in names)
        linked.append(replace(entity, parents=parents))
    return Tree(linked)


def description(entity: Entity) -> str:
    """Returns what an entity can be told by: its definition, at most 60 words of it, or else symptoms and drugs."""
    if entity.definition:
        if language_of(entity.definition) == "en":
            return shorten(entity.definition, STEM_WORDS)
        return entity.definition if len(entity.definition) <= 2 * STEM_WORDS else ""
    told: dict[str, list[str]] = {}
    for label, text in entity.related:
        if label in _TELLING:
            told.setdefault(label, []).append(text)
    chinese = language_of(entity.name) == "zh"
    lines = (
        f"{label}：{'、'.join(texts)}" if chinese else f"{label.title()}: {', '.join(texts)}"
        for label, texts in told.items()
    )
    return ("；" if chinese else "; ").join(lines)


def asked_for(tree: Tree, key: str, given: str, seed: int) -> list[str] | None:
    """Returns the names of three relatives that may stand beside an entity's name as wrong options, or None."""
    entity = tree.entities[key]
    fact = Fact(entity, "definition-name", given, entity.name, key)
    rank = stable_key(seed, key, "rank") % 4
    return distractors(tree, fact, allowed=lambda _: True, seed=seed, rank=rank)


def shuffled_options(answer: str, wrong: list[str], *parts: object) -> list[str]:
    """Returns the options in a stable order that the answer's place follows from nothing."""
    return stable_shuffle([answer, *wrong], str, *parts)


def names_itself(text: str, entity: Entity) -> str:
    """Returns the first name of an entity that stands in a text, or ''."""
    return next((name for name in (entity.name, *entity.synonyms) if phrase_in(name, text)), "")


class KnowledgeGraph:
    """The pipeline with an endpoint; see `templates.py` for the one without."""

    def __init__(self, tree: Tree, genres: tuple[str, ...], seed: int) -> None:
        self.tree, self.genres, self.seed = tree, genres, seed

    @staticmethod
    def requests(items: int) -> int:
        """Requests of one seed that becomes so many items, without judge and second tries."""
        return items

    async def works(self, seed: Seed, ask: Ask) -> list[dict[str, Any]]:
        """One for each genre."""
        return [{"genre": genre} for genre in self.genres][: seed.most]

    async def draft(self, seed: Seed, work: dict[str, Any], ask: Ask) -> Draft:
        """Rewrites the entity with its neighbours in a genre, or asks for it."""
        entity = self.tree.entities[seed.id]
        if work["genre"] == "question":
            return await self._question(seed, entity, ask)
        text = await ask.text(
            work["genre"], novel=seed.text, text=seed.text, neighbours=self._neighbours(entity)
        )
        if not phrase_in(entity.name, text) and not names_itself(text, entity):
            raise Dropped("another subject", f"{entity.name} is not named", text)
        return Draft(question="", answer=text, reference=seed.text)

    def _neighbours(self, entity: Entity) -> str:
        """The sub-graph around the anchor: siblings and children with their definitions, a few of each."""
        near = [
            *stable_shuffle(self.tree.siblings(entity.id), str, self.seed, entity.id)[:3],
            *stable_shuffle(self.tree.children(entity.id), str, self.seed, entity.id)[:3],
        ]
        others = [self.tree.entities[key] for key in near]
        lines = [f"- {other.name}{': ' + other.definition if other.definition else ''}" for other in others]
        return "\n".join(lines) or "-"

    async def _question(self, seed: Seed, entity: Entity, ask: Ask) -> Draft:
        def check(found: dict[str, Any]) -> Problem | None:
            said = names_itself(found["question"], entity)
            if said:
                return Problem("missing field", f"question (must not say '{said}')")
            if not phrase_in(entity.name, found["explanation"]):
                return Problem("missing field", f"explanation (has to name '{entity.name}')")
            wrong_language = language_of(found["question"] + found["explanation"]) != seed.language
            return Problem("another language") if wrong_language else None

        wrong = asked_for(self.tree, seed.id, "", self.seed)
        if wrong is None:
            raise Dropped("too few siblings", "", seed.text)
        options = shuffled_options(entity.name, wrong, self.seed, seed.id)
        found = await ask.json(
            "question",
            {"question": str, "explanation": str},
            check,
            text=seed.text,
            name=entity.name,
            options="\n".join(f"- {option}" for option in options),
        )
        letter = "ABCDEFGH"[options.index(entity.name)]
        ending = {"en": "Answer: {}. {}", "zh": "答案：{}. {}"}[seed.language].format(letter, entity.name)
        return Draft(
            question=choice_text(found["question"].strip(), options),
            answer=f"{found['explanation'].strip()}\n\n{ending}",
            reference=seed.text,
        )
