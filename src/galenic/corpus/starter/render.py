"""Knowledge becomes text: an entity as anchor with its names, type, codes, definition and related entities.

Source: Baichuan-M1 report, section 2.2.2 (knowledge graphs are rendered by a Markdown template). The template's
wording is not published; this one is ours.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from galenic.corpus.records import Entity

_HAN = re.compile("[\u3400-\u9fff]")
_MOST_SYNONYMS, _MOST_CHILDREN, _MOST_SIBLINGS, _MOST_ITEMS = 8, 6, 3, 12

_LABELS = {
    "en": {"type": "Type", "code": "Code", "synonyms": "Also called", "parents": "Kind of"},
    "zh": {"type": "类型", "code": "代码", "synonyms": "别名", "parents": "属于"},
}


class Family:
    """The entities that may be named in text, and who is whose child.

    Rendering prints a related entity only if it is in the family, so an entity left out of it (one that is held out)
    cannot be printed as somebody's parent, child or sibling.
    """

    def __init__(self, entities: Iterable[Entity]) -> None:
        self.entities = {entity.id: entity for entity in entities}
        self.children: dict[str, list[str]] = defaultdict(list)
        for entity in self.entities.values():
            for parent in dict.fromkeys(entity.parents):
                self.children[parent].append(entity.id)

    def names(self, ids: Iterable[str]) -> list[str]:
        """Returns the names of those ids that are in the family, repeated names once."""
        return list(dict.fromkeys(self.entities[key].name for key in ids if key in self.entities))

    def siblings(self, entity: Entity) -> list[str]:
        """Returns ids of the siblings nearest to an entity in the terminology's own order."""
        found: list[str] = []
        for parent in entity.parents:
            group = self.children[parent]
            place = group.index(entity.id) if entity.id in group else 0
            found += group[max(0, place - 1) : place] + group[place + 1 : place + 1 + _MOST_SIBLINGS]
        return [key for key in dict.fromkeys(found) if key != entity.id][:_MOST_SIBLINGS]


def _distinct(names: Iterable[str]) -> list[str]:
    """Returns names that differ by more than word order, case, hyphens and plural s."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for name in names:
        words = re.findall(r"\w+", name.lower())
        bag = tuple(sorted(word[:-1] if word.endswith("s") else word for word in words))
        if bag not in seen:
            seen.add(bag)
            kept.append(name)
    return kept


def render(entity: Entity, family: Family) -> str:
    """Returns the Markdown text of an entity.

    Args:
        entity: pruned (`holdout.prune`) of what may not be printed.
        family: the entities that may be named as relatives.
    """
    labels = _LABELS["zh" if _HAN.search(entity.name) else "en"]
    facts = [f"{labels['type']}: {entity.kind}"]
    if entity.codes:
        facts.append(f"{labels['code']}: {entity.codes[0]}")
    synonyms = _distinct([entity.name, *entity.synonyms])[1 : 1 + _MOST_SYNONYMS]
    if synonyms:
        facts.append(f"{labels['synonyms']}: {'; '.join(synonyms)}")
    parents = family.names(entity.parents)
    if parents:
        facts.append(f"{labels['parents']}: {'; '.join(parents)}")

    relations: dict[str, list[str]] = defaultdict(list)
    for relation, text in entity.related:
        relations[relation].append(text)
    children = family.names(family.children.get(entity.id, ()))[:_MOST_CHILDREN]
    siblings = family.names(family.siblings(entity))
    if children:
        relations["more specific"] = children
    if siblings:
        relations["see also"] = siblings
    related = [f"{_title(label)}: {'; '.join(items[:_MOST_ITEMS])}" for label, items in relations.items()]

    blocks = [f"# {entity.name}", _bullets(facts), entity.definition, entity.comment, _bullets(related)]
    return "\n\n".join(block for block in blocks if block)


def _title(label: str) -> str:
    return label[:1].upper() + label[1:]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
