"""The starter's own labels: what its sources say of themselves, kinds that are made, and good text made bad.

| head | where its label comes from |
|---|---|
| general | topic of Wikipedia's editors, split by words (`taxonomy.VITAL_WORDS`); source elsewhere; made texts |
| medical | source; for Wikipedia's topic of biology and health by words |
| content | source and category; made texts for notes, abstracts and advertisements |
| department | ICD-10-CM chapters, HPO branches, MeSH trees, specialty in the disease tables, radiology, drugs |
| quality | real text against corruptions of it |
| the other scores | a prior for each source (`priors.py`), less for entries that tell little and for corrupted text |

A prior is our opinion of a source. Agreement with it says that the network recognises the source, not that it judges.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from galenic.corpus.cleaning.clean import repair
from galenic.corpus.readers.collect import Raw, collect
from galenic.corpus.readers.departments import DEPARTMENTS, GENERAL
from galenic.corpus.readers.disease_tables import disease_entities
from galenic.corpus.readers.python_source import code_documents
from galenic.corpus.records import Document, Entity
from galenic.corpus.scores.corruptions import CORRUPTIONS
from galenic.corpus.scores.labels import Labelled, part, title_of
from galenic.corpus.scores.priors import CONTENT_OF, DIALOGUE_CLASSES, GENERAL_OF, PRIORS, QUALITY, TRUST
from galenic.corpus.scores.taxonomy import CLASSES, vital_class
from galenic.corpus.starter.conversations import Disease, conversation_text, medical_conversations
from galenic.corpus.starter.holdout import Mentions, stable_key
from galenic.corpus.starter.reasoning import arithmetic_documents, arithmetic_questions, code_questions
from galenic.corpus.starter.render import Family, render
from galenic.corpus.starter.selection import together
from galenic.corpus.starter.wheels import Wheels

PROSE = ("wikipedia", "wikipedia-health", "guidelines", "radiology", "hpo", "python-docs")
"""Origins whose texts are also shown in passages."""
CORRUPTED = 0.3
"""Share of the texts that are corrupted once."""
_MADE = 20
"""Texts made of each template."""
MADE: dict[str, tuple[str, ...]] = {
    "note": ("note.en", "note.zh"),
    "abstract": ("abstract.en", "abstract.zh"),
    "knowledge": ("knowledge.zh",),
    "health-advertisement": ("health-advertisement",),
    "e-commerce": ("e-commerce",),
    "news": ("news",),
    "social-media": ("social-media",),
    "entertainment": ("entertainment",),
}
"""Kind -> its files in `templates/`."""


def starter_labels(
    wheels: str, requirements: str, *, per_source: int, seed: int, modules: int | None = None
) -> list[Labelled]:
    """Returns labelled texts from the data wheels.

    Args:
        wheels: folder of the wheels.
        requirements: file that pins them.
        per_source: at most this many texts of an origin, chosen by hash.
        seed: of every choice.
        modules: most Python modules to read.
    """
    return labels_of(
        collect(Wheels(wheels, requirements), lambda *_: None, modules=modules), per_source, seed
    )


def labels_of(raw: Raw, per_source: int, seed: int) -> list[Labelled]:
    """Returns labelled texts from what the readers found, passages and corruptions of them included."""
    rows: dict[str, list[Labelled]] = {}
    for row in _all(raw, per_source, seed):
        rows.setdefault(row.origin, []).append(row)
    kept = []
    for group in rows.values():
        group.sort(key=lambda row: stable_key(seed, "scorer limit", row.text))
        kept += group[:per_source]
    kept += passages(kept, seed)
    return kept + list(corrupted(kept, CORRUPTED, seed))


def _all(raw: Raw, per_source: int, seed: int) -> Iterator[Labelled]:
    for document in [
        *raw.documents,
        *arithmetic_documents(per_source // 4, seed),
        *code_documents(raw.modules),
    ]:
        yield from _document(document)
    tables = [disease_entities(disease, translated=True) for disease in raw.diseases]
    entities = [*raw.entities, *(entity for pair in tables for entity in pair)]
    family = Family(entities)
    by_source: dict[str, list[Entity]] = {}
    for entity in entities:
        by_source.setdefault(entity.source, []).append(entity)
    for group in by_source.values():
        group.sort(key=lambda entity: stable_key(seed, "scorer entity", entity.id))
        for entity in group[: 2 * per_source]:
            yield _entity(entity, family)
    yield from _lines(raw, seed)
    yield from _questions(raw, min(per_source, 1500), seed)
    yield from _talk(raw)
    yield from _made(raw.diseases, seed)


def _row(
    text: str,
    origin: str,
    group: str,
    *,
    medical: bool | None,
    title: str = "",
    told: float = 1.0,
    general: str = "",
    department: str = "",
) -> Labelled:
    """Returns a labelled text; what its origin says fills what is not given.

    Args:
        text: as the corpus would hold it.
        origin: key of the tables above.
        group: of the split.
        medical: whether it is; None leaves the medical heads without a label.
        title: folded, of near copies.
        told: how much of what its source could tell it does, in [0, 1].
        general: class, if not its origin's.
        department: if there is one.
    """
    educational, reasoning, knowledge = PRIORS[origin]
    scores = {
        "quality": QUALITY.get(origin, 1.0),
        "educational": educational * told,
        "reasoning": reasoning,
        "knowledge": knowledge * told,
    }
    general = general or GENERAL_OF.get(origin, "") or ("medicine" if medical else "")
    named = {"general": general, "content": CONTENT_OF.get(origin, ""), "department": department}
    labels = {name: CLASSES[name].index(label) for name, label in named.items() if label}
    if medical is not None:
        trust = TRUST.get(origin, 0.0) if medical else 0.0
        labels["medical"] = int(medical)
        scores["medical_value"] = trust * told
        scores["medical_quality"] = scores["quality"] * (0.4 + 0.6 * trust) if medical else 0.0
    return Labelled(text=repair(text), group=group, origin=origin, title=title, scores=scores, labels=labels)


def _document(document: Document) -> Iterator[Labelled]:
    source, medical, general = document.source, bool(document.department), ""
    department = document.department if source in ("radiology",) else ""
    if source in ("wikipedia", "wikipedia-health"):
        general = vital_class(document.category, document.text.partition("\n")[2])
        if source == "wikipedia-health":
            medical = {"medicine": True, "biology": False}.get(general)
        if not general:
            medical = None if source == "wikipedia-health" else False
        yield _row(
            document.text,
            source,
            document.id,
            medical=medical,
            title=title_of(document.text),
            general=general,
        )
        return
    if document.category == "renal dosing":
        department = "nephrology and urology"
    group = source + "/" + together(document.id, source).removeprefix(source + "/").split("/")[0]
    yield _row(document.text, source, group, medical=medical, department=department)


def _entity(entity: Entity, family: Family) -> Labelled:
    text = "\n".join(
        line
        for line in render(entity, family).split("\n")
        if not line.startswith(("- Department:", "- 科室:"))
    )
    richness = sum(map(bool, (entity.definition, entity.synonyms, entity.related, entity.comment)))
    substance = entity.kind == "chemical substance"
    department = "" if substance else entity.department
    if department == GENERAL and entity.source != "icd10cm":  # what gave no hint
        department = ""
    return _row(
        text,
        entity.source,
        f"{entity.source}/{(entity.parents or (entity.id.removesuffix(':zh').removesuffix(':en'),))[0]}",
        medical=None if substance else True,
        title=title_of(text),
        told=0.6 + 0.1 * richness,
        general="chemistry and materials" if substance else "medicine",
        department=department if department in DEPARTMENTS else "",
    )


def _lines(raw: Raw, seed: int) -> Iterator[Labelled]:
    """Dictionary entries and sentences in both languages and in Chinese alone, few and many to a text."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for line in raw.lines:
        groups.setdefault((line.pair.source, line.group), []).append(line)
    for (source, group), lines in groups.items():
        lines.sort(key=lambda line: stable_key(seed, "scorer line", line.pair.id))
        medical = bool(lines[0].pair.department)
        start = 0
        while start < len(lines):
            size = (1, 2, 4, 8, 20)[stable_key(seed, source, group, start) % 5]
            some = lines[start : start + size]
            start += size
            joined = "\n\n" if source == "hsk" else "\n"
            key = f"{source}/{some[0].pair.id}"
            general = "medicine" if medical else ""
            yield _row(joined.join(line.text for line in some), source, key, medical=medical, general=general)
            chinese = "".join(line.pair.zh + ("" if source == "hsk" else "；") for line in some)
            yield _row(chinese, source, key, medical=medical, general=general)


def _questions(raw: Raw, count: int, seed: int) -> Iterator[Labelled]:
    nothing = Mentions.of(())
    for row in medical_conversations(raw.entities, raw.diseases, forbidden=nothing, count=count, seed=seed):
        yield _row(conversation_text(row), "questions", f"questions/{_asked(row)}", medical=True)
    modules = dict(sorted(raw.modules.items())[:60])
    for general, rows in (
        ("mathematics", arithmetic_questions(count // 4, seed)),
        ("programming", code_questions(modules, count // 4, seed)),
    ):
        for number, row in enumerate(rows):
            letters = "ABCDEFGH"
            options = "\n".join(f"{letters[i]}. {option}" for i, option in enumerate(row["options"]))
            text = f"{row['question']}\n{options}\nAnswer: {letters[row['answer']]}"
            key = f"questions/{general}/{number // 10}"
            yield _row(text, "questions", key, medical=False, general=general)


def _asked(row: dict[str, Any]) -> str:
    return title_of(row["messages"][-1]["content"])


def _talk(raw: Raw) -> Iterator[Labelled]:
    for dialogue in raw.dialogues:
        key = "small talk/" + title_of(dialogue.turns[0])
        general = DIALOGUE_CLASSES.get(dialogue.category, "")
        if dialogue.category in ("trivia", "science"):
            text = "\n".join(dialogue.turns)
            yield _row(text, "questions", key, medical=None, general=general)
            continue
        yield _row("\n".join(dialogue.turns), "small talk", key, medical=False, general=general)


# ---------------------------------------------------------------------------- made texts


@cache
def templates(kind: str) -> tuple[str, ...]:
    r"""Returns the templates of a kind: one a line, line ends written as `\n`."""
    path = Path(__file__).parent / "templates" / f"{kind}.txt"
    return tuple(line.replace("\\n", "\n") for line in path.read_text(encoding="utf-8").splitlines() if line)


def _made(diseases: list[Disease], seed: int) -> Iterator[Labelled]:
    """Fills templates; a text is made of templates of one part of the split, so that wordings are checked too.

    Notes and abstracts are one template or the halves of two, facts one, the loose kinds up to four in a row.
    """
    for kind, files in MADE.items():
        for file in files:
            lines = templates(file)
            places = [f"made/{file}/{number}" for number in range(len(lines))]
            for number, line in enumerate(lines):
                chinese = _is_chinese(line)
                mates = [
                    i
                    for i in range(len(lines))
                    if part(places[i], seed) == part(places[number], seed)
                    and _is_chinese(lines[i]) == chinese
                ]
                draw = random.Random(stable_key(seed, places[number]))
                for _ in range(_MADE):
                    disease = diseases[draw.randrange(len(diseases))]
                    mate = lines[draw.choice(mates)]
                    if kind in ("note", "abstract"):
                        chosen = [_crossed(line, mate) if draw.random() < 0.7 else line]
                    else:
                        more = 0 if kind == "knowledge" else draw.choice((0, 1, 3))
                        chosen = [
                            line,
                            *([mate] * min(more, 1)),
                            *(lines[draw.choice(mates)] for _ in range(more - 1)),
                        ]
                    with_department = kind in ("note", "knowledge") and disease.department != GENERAL
                    yield _row(
                        draw.choice((" ", "\n")).join(
                            _filled(each, disease, chinese, draw) for each in chosen
                        ),
                        f"made: {kind}",
                        # In facts the wording is not the point, the disease is.
                        f"disease-tables/{disease.id}" if kind == "knowledge" else places[number],
                        medical=kind in ("note", "abstract", "knowledge", "health-advertisement"),
                        department=disease.department if with_department else "",
                    )


def _crossed(first: str, second: str) -> str:
    """Returns the first half of one template's sentences and the second half of another's."""
    a, b = (re.split(r"(?<=[.。;；\n])", text) for text in (first, second))
    return "".join([*a[: (len(a) + 1) // 2], " ", *b[len(b) // 2 :]])


def _is_chinese(text: str) -> bool:
    return any("\u3400" <= c <= "\u9fff" for c in text)


def _filled(template: str, disease: Disease, chinese: bool, draw: random.Random) -> str:
    symptoms = list(disease.symptoms_zh if chinese else [s.lower() for s in disease.symptoms]) or ["疼痛"]
    drugs = list(disease.drugs_zh if chinese else disease.drugs) or (["阿司匹林"] if chinese else ["aspirin"])
    draw.shuffle(symptoms)
    draw.shuffle(drugs)
    words = {
        "{d}": disease.name_zh if chinese else disease.name,
        "{s}": symptoms[0],
        "{t}": symptoms[-1],
        "{m}": drugs[0],
        "{k}": drugs[-1],
    }
    for slot, word in words.items():
        template = template.replace(slot, word)
    for slot, low, high in (("{n}", 2, 9), ("{y}", 18, 90), ("{p}", 10, 99)):
        while slot in template:
            template = template.replace(slot, str(draw.randint(low, high)), 1)
    return template


def passages(rows: Iterable[Labelled], seed: int) -> list[Labelled]:
    """Returns one to three sentences in a row of each second text of the origins in `PROSE`, without heading and marks.

    What a text is shall not be read off the form that its source has; the content type, which is that form, is not
    told.
    """
    found = []
    for row in rows:
        key = stable_key(seed, "passage", row.text)
        if row.origin not in PROSE or key % 2:
            continue
        body = re.sub(r"(?m)^[#>*-]+ +", "", row.text.partition("\n")[2])
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", body) if len(s.strip()) >= 40]
        if not sentences:
            continue
        start = key // 2 % len(sentences)
        text = " ".join(sentences[start : start + 1 + key // 2**20 % 3])
        labels = {name: label for name, label in row.labels.items() if name != "content"}
        found.append(replace(row, text=text, origin=f"passage: {row.origin}", labels=labels))
    return found


def corrupted(rows: Iterable[Labelled], share: float, seed: int) -> Iterator[Labelled]:
    """Yields a corruption of some of the rows; all scores fall by what it leaves of the quality.

    What only cuts or blurs a text leaves its classes; of the rest none is told.
    """
    names = list(CORRUPTIONS)
    for row in rows:
        key = stable_key(seed, "corrupt", row.text)
        if len(row.text) < 60 or key % 1000 >= 1000 * share:
            continue
        name = names[key // 1000 % len(names)]
        function, left = CORRUPTIONS[name]
        text = function(row.text, random.Random(key))
        scores = {head: value * left for head, value in row.scores.items()}
        labels = row.labels if name in ("cut", "scanned") else {}
        yield replace(row, text=text, origin=f"corrupted: {name}", scores=scores, labels=labels)
