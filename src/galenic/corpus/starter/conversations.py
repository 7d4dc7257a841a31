"""Conversations for supervised fine-tuning: {"messages": [{"role", "content"}], "source", "department", "category"}.

Wordings here are never used in `questions`: what is asked there was never asked here.

    entity --fact--> prompt and short answer (alone, with options, or two in a row) --> medical
    pairs, dialogues --> translation both ways, small talk                          --> dialogue
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from galenic.corpus.records import Entity
from galenic.corpus.starter.facts import KINDS, Fact, Tree, distractors, fact, shorten
from galenic.corpus.starter.holdout import Mentions, Pair, stable_key, stable_shuffle

Conversation = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Disease:
    """One row of the disease tables, English and Chinese in parallel."""

    id: str
    name: str
    name_zh: str
    code: str
    """ICD-10 code."""
    symptoms: tuple[str, ...]
    symptoms_zh: tuple[str, ...]
    drugs: tuple[str, ...]
    drugs_zh: tuple[str, ...]
    department: str
    department_zh: str


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One short dialogue; even turns are the user's, odd turns the assistant's."""

    id: str
    language: str
    """`en` or `zh`."""
    category: str
    turns: tuple[str, ...]


ANSWER_WORDS = 50
"""Longest answer, in words: the models are small."""

WORDINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("icd10cm", "name-synonym"): (
        'Give me a condition that ICD-10-CM lists below "{given}".',
        "{given}: name one inclusion term.",
    ),
    ("icd10cm", "synonym-name"): (
        "A patient has: {given}. What is the title of the category in ICD-10-CM?",
        'Where does ICD-10-CM put "{given}"?',
    ),
    ("icd10cm", "name-parent"): (
        'Go one level up in ICD-10-CM from "{given}".',
        'What is the chapter or category above "{given}"?',
    ),
    ("icd10cm", "code-name"): ("Decode {given}.", "A chart says {given}. What is the diagnosis?"),
    ("icd10cm", "name-code"): ("Code this diagnosis in ICD-10-CM: {given}", "ICD-10-CM code for {given}?"),
    ("drugs", "name-synonym"): ("Tell me another name of {given}.", "{given} - any other names?"),
    ("drugs", "synonym-name"): (
        'A pharmacist reads "{given}". What is the substance?',
        "{given} is another name for what?",
    ),
    ("drugs", "brand-name"): (
        'The prescription says "{given}". What is the generic name?',
        "{given}: what is in it?",
    ),
    ("drugs", "name-parent"): ("What class does {given} fall into?", "Classify {given}."),
    ("", "definition-name"): (
        "I am looking for the medical word for this: {given}",
        "Name the finding. {given}",
        "{given} What do we call it?",
    ),
    ("", "name-definition"): ("Define {given}.", "Explain {given} briefly.", "{given}: what does that mean?"),
    ("", "name-synonym"): ("Give a synonym of {given}.", "How else can I say {given}?"),
    ("", "synonym-name"): (
        'What is the standard term for "{given}"?',
        '"{given}" - how do textbooks name it?',
    ),
    ("", "name-parent"): ("What kind of thing is {given}?", "Name a broader term for {given}."),
}
"""(source, kind) -> prompts; the empty source serves every other one."""

_TERMS = ("name-synonym", "synonym-name", "brand-name", "code-name", "name-code")
"""Kinds that find a standard term or a code: the category of understanding. What others ask is knowledge."""

CHOICE = "{prompt}\nChoose one: {options}."
"""A prompt with options; the answer is the option's text, not its letter."""

DEPARTMENT = (
    "Which department should see a patient with {name}?",
    "To whom do I refer someone with {name}?",
    "{name}: which specialty?",
)
_REFERRED = ("hpo", "icd10cm", "mesh")  # sources of conditions one sees a doctor with
LAY = ("How do I say {name} in plain words?", "Explain {name} to a patient in a few words.")

TABLE_WORDINGS: dict[str, tuple[str, ...]] = {
    "symptoms": ("What are common symptoms of {name}?", "How does {name} show itself?"),
    "drugs": ("Which drugs are used for {name}?", "Name medicines given for {name}."),
    "department": ("Which clinic treats {name}?", "Where should I go with {name}?"),
    "code": ("ICD-10 code of {name}?", "How is {name} coded in ICD-10?"),
    "symptoms_zh": ("{name}有哪些常见症状？", "得了{name}会有什么表现？"),
    "drugs_zh": ("{name}常用哪些药物？", "治疗{name}可以用什么药？"),
    "department_zh": ("{name}应该挂哪个科？", "得了{name}看什么科？"),
    "code_zh": ("{name}的ICD-10编码是什么？",),
}
"""Column of the disease tables -> prompts in the column's language. Translations of names are `Pair`s."""

TRANSLATE: dict[str, tuple[str, ...]] = {
    "zh-en": ("Translate into English: {given}", "请翻译成英文：{given}", "用英语怎么说：{given}"),
    "en-zh": ("Translate into Chinese: {given}", "请翻译成中文：{given}", "In Chinese, please: {given}"),
}


def _row(turns: Sequence[tuple[str, str]], source: str, department: str, category: str) -> Conversation:
    messages = []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "source": source, "department": department, "category": category}


def _about(entity: Entity, turns: Sequence[tuple[str, str]], category: str) -> Conversation:
    return _row(turns, entity.source, entity.department, category)


def _category(kind: str) -> str:
    return "understanding" if kind in _TERMS else "knowledge"


def conversation_text(row: Conversation) -> str:
    """Returns the messages of a conversation joined by newlines: what is searched for mentions and leaks."""
    return "\n".join(message["content"] for message in row["messages"])


def prompt(asked: Fact, seed: int) -> str:
    """Words the prompt for a fact."""
    options = WORDINGS.get((asked.entity.source, asked.kind)) or WORDINGS["", asked.kind]
    return _pick(options, seed, asked.entity.id, asked.kind).format(given=asked.given)


def _pick(options: Sequence[str], *parts: object) -> str:
    return options[stable_key(*parts) % len(options)]


# ---------------------------------------------------------------------------- medical


def medical_conversations(
    entities: Iterable[Entity],
    diseases: Iterable[Disease],
    *,
    forbidden: Mentions,
    count: int,
    seed: int,
) -> list[Conversation]:
    """Makes medical conversations: definitions, synonyms, coding, choices among siblings, triage, tables (en, zh).

    Args:
        entities: entities whose document is in the training split (those of the disease tables are passed over).
        diseases: rows of the disease tables.
        forbidden: the transfer entities; a conversation that mentions one is left out.
        count: how many at most.
        seed: of every choice.
    """
    tree = Tree(entities)
    by_source: dict[str, list[str]] = defaultdict(list)
    for key, entity in tree.entities.items():
        if entity.source != "disease-tables":
            by_source[entity.source].append(key)
    makers: list[Callable[[Tree, str, int], Conversation | None]] = [
        *(_single(kind) for kind in KINDS),
        _choice,
        _double,
        _department,
        _lay,
    ]
    streams: list[Iterator[Conversation]] = [_tables(diseases, seed)]
    for source in sorted(by_source):
        for number, maker in enumerate(makers):
            keys = stable_shuffle(by_source[source], str, seed, "medical", number)
            streams.append(_made(tree, keys, maker, seed))
    return _fill(streams, forbidden, count)


def _made(
    tree: Tree, keys: Iterable[str], maker: Callable[[Tree, str, int], Conversation | None], seed: int
) -> Iterator[Conversation]:
    return (row for key in keys if (row := maker(tree, key, seed)) is not None)


def _fill(streams: Iterable[Iterator[Conversation]], forbidden: Mentions, count: int) -> list[Conversation]:
    """Takes rows from each stream in turn; leaves out repeated prompts and what mentions a held-out entity."""
    rows: list[Conversation] = []
    seen: set[str] = set()
    live = list(streams)
    while live and len(rows) < count:
        for stream in list(live):
            row = next(stream, None)
            if row is None:
                live.remove(stream)
                continue
            text = conversation_text(row)
            if len(rows) < count and text not in seen and forbidden.first(text) is None:
                seen.add(text)
                rows.append(row)
    return rows


def _answer(asked: Fact) -> str:
    """Returns the answer as a sentence where it is one, else as the bare term."""
    if asked.kind == "name-definition":
        return shorten(asked.entity.definition, ANSWER_WORDS) or asked.answer
    return asked.answer


def _single(kind: str) -> Callable[[Tree, str, int], Conversation | None]:
    def make(tree: Tree, key: str, seed: int) -> Conversation | None:
        asked = fact(tree, key, kind, seed)
        if asked is None:
            return None
        return _about(asked.entity, [(prompt(asked, seed), _answer(asked))], _category(kind))

    return make


def choice_kind(key: str, seed: int) -> str:
    """Returns the kind of fact about an entity that a conversation gives options for."""
    return KINDS[stable_key(seed, key, "choice") % len(KINDS)]


def _choice(tree: Tree, key: str, seed: int) -> Conversation | None:
    """Asks with four options, all of them siblings or cousins."""
    kind = choice_kind(key, seed)
    asked = fact(tree, key, kind, seed) if kind != "name-definition" else None
    if asked is None:
        return None
    rank = stable_key(seed, key, "choice rank") % 4
    wrong = distractors(tree, asked, allowed=lambda _: True, seed=seed, rank=rank)
    if wrong is None:
        return None
    options = stable_shuffle([asked.answer, *wrong], str, seed, key, "options")
    text = CHOICE.format(prompt=prompt(asked, seed), options="; ".join(options))
    return _about(asked.entity, [(text, asked.answer)], _category(kind))


def _double(tree: Tree, key: str, seed: int) -> Conversation | None:
    """Asks two things about one entity, one after the other."""
    kinds = stable_shuffle(("name-definition", "name-synonym", "name-parent", "name-code"), str, seed, key)
    facts = [asked for kind in kinds if (asked := fact(tree, key, kind, seed)) is not None]
    if len(facts) < 2:
        return None
    turns = [(prompt(asked, seed), _answer(asked)) for asked in facts[:2]]
    return _about(facts[0].entity, turns, _category(facts[0].kind))


def _department(tree: Tree, key: str, seed: int) -> Conversation | None:
    entity = tree.entities[key]
    if entity.source not in _REFERRED or entity.department in ("", "general medicine", "public health"):
        return None
    text = _pick(DEPARTMENT, seed, key, "department").format(name=entity.name)
    return _about(entity, [(text, entity.department.capitalize())], "knowledge")


def _lay(tree: Tree, key: str, seed: int) -> Conversation | None:
    entity = tree.entities[key]
    terms = [text for relation, text in entity.related if relation == "lay term"]
    if not terms:
        return None
    text = _pick(LAY, seed, key, "lay").format(name=entity.name)
    return _about(entity, [(text, _pick(terms, seed, key, "term"))], "understanding")


def _tables(diseases: Iterable[Disease], seed: int) -> Iterator[Conversation]:
    """Asks for each column of the disease tables, in the language of the column, in every wording."""
    rows = []
    for disease in diseases:
        for column, wordings in TABLE_WORDINGS.items():
            field = "code" if column == "code_zh" else column
            items = getattr(disease, field)
            if not items:
                continue
            chinese = column.endswith("_zh")
            answer = items if isinstance(items, str) else ("、" if chinese else ", ").join(items)
            answer = answer.capitalize() if column == "department" else answer
            name = disease.name_zh if chinese else disease.name
            for wording in wordings:
                turns = [(wording.format(name=name), answer)]
                category = "understanding" if field == "code" else "knowledge"
                row = _row(turns, "disease-tables", disease.department, category)
                rows.append((f"{disease.id} {wording}", row))
    return (row for _, row in stable_shuffle(rows, lambda item: item[0], seed, "tables"))


# ---------------------------------------------------------------------------- dialogue


def dialogue_conversations(
    pairs: Iterable[Pair], dialogues: Iterable[Dialogue], *, forbidden: Mentions, count: int, seed: int
) -> list[Conversation]:
    """Makes conversations of translation (training pairs only) and small talk, some of several turns.

    Args:
        pairs: the training side of `holdout.split_pairs`.
        dialogues: small talk, English and Chinese.
        forbidden: the transfer entities; a conversation that mentions one is left out.
        count: how many at most.
        seed: of every choice.
    """
    by_source: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if len(pair.en.split()) <= ANSWER_WORDS and len(pair.zh) <= 3 * ANSWER_WORDS:
            by_source[pair.source].append(pair)
    streams = [_talk(dialogues, seed)]
    for source in sorted(by_source):
        for direction in TRANSLATE:
            streams.append(_translations(by_source[source], direction, seed))
        streams.append(_translations_in_a_row(by_source[source], seed))
    return _fill(streams, forbidden, count)


def _talk(dialogues: Iterable[Dialogue], seed: int) -> Iterator[Conversation]:
    for dialogue in stable_shuffle(dialogues, lambda d: d.id, seed, "talk"):
        turns = list(zip(dialogue.turns[::2], dialogue.turns[1::2], strict=False))
        if turns and all(len(answer.split()) <= ANSWER_WORDS for _, answer in turns):
            yield _row(turns, f"dialogue-{dialogue.language}", "", "general")


def _translation(pair: Pair, direction: str, seed: int) -> tuple[str, str]:
    given, answer = pair.zh, pair.en
    if direction == "en-zh":
        given, answer = answer, given
    return _pick(TRANSLATE[direction], seed, pair.id, direction).format(given=given), answer


def _translations(pairs: Iterable[Pair], direction: str, seed: int) -> Iterator[Conversation]:
    for pair in stable_shuffle(pairs, lambda p: p.id, seed, direction):
        yield _row([_translation(pair, direction, seed)], pair.source, "", "general")


def _translations_in_a_row(pairs: Iterable[Pair], seed: int) -> Iterator[Conversation]:
    """Asks for the translation of three pairs, one after the other, each way."""
    ordered = stable_shuffle(pairs, lambda p: p.id, seed, "in a row")
    for start in range(0, len(ordered) - 2, 3):
        three = ordered[start : start + 3]
        directions = [_pick(tuple(TRANSLATE), seed, pair.id, "way") for pair in three]
        turns = [_translation(pair, way, seed) for pair, way in zip(three, directions, strict=True)]
        yield _row(turns, three[0].source, "", "general")


# ---------------------------------------------------------------------------- split


def split_rows(
    rows: Sequence[Conversation], *, heldout: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits rows into (train, held out); rows with the same first user message stay together.

    Args:
        rows: conversations, or preference pairs.
        heldout: how many to hold out; at most one group of equal prompts more.
        seed: of the choice.
    """
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for row in rows:
        groups[row["prompt"] if "prompt" in row else row["messages"][0]["content"]].append(row)
    chosen: list[Conversation] = []
    left: list[Conversation] = []
    for first in stable_shuffle(groups, str, seed, "held out"):
        (chosen if len(chosen) < heldout else left).extend(groups[first])
    return left, chosen
