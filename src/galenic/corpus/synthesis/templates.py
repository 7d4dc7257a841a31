"""Knowledge graphs without an endpoint: questions and texts by templates, English and Chinese.

    entity, siblings --choice, term--> questions whose answer is the entity    --note, card, comparison--> texts

Wordings here are used neither by `questions.py` nor by `conversations.py`.
"""

from galenic.corpus.records import Entity
from galenic.corpus.starter.facts import Tree
from galenic.corpus.starter.holdout import stable_key, stable_shuffle
from galenic.corpus.synthesis.knowledge_graph import asked_for, description, names_itself, shuffled_options
from galenic.corpus.synthesis.steps import Draft, choice_text

WORDINGS = {
    "choice": {
        "en": (
            "{given}\n\nWhat is described here?",
            "Pick the term that this belongs to.\n\n{given}",
            "A textbook says: {given}\n\nOf what is this said?",
        ),
        "zh": ("{given}\n\n以上描述的是什么？", "请选出与下列描述相符的一项。\n\n{given}"),
    },
    "term": {
        "en": (
            "{given}\n\nGive the term.",
            "I have forgotten the word for this: {given}",
            "Fill in the heading of this entry: {given}",
        ),
        "zh": ("{given}\n\n请说出对应的术语。", "下面这条释义的词条是什么？\n\n{given}"),
    },
}
"""Genre -> language -> stems."""

_WORDS = {
    "en": {
        "is": "{name} belongs to: {kind}.",
        "parents": "Among the broader terms is {parents}.",
        "synonyms": "It is also known as {synonyms}.",
        "code": "Its code is {code}.",
        "siblings": "Related but different: {siblings}.",
        "fits": "{name} fits: {given}",
        "other": "{name} does not fit; of it one would say: {given}",
        "plain": "{name} is another entry of the same group.",
        "answer": "Answer: {letter}. {name}",
        "card": "Front: {front}\nBack: {back}",
        "compared": "# How to tell apart: {names}",
        "columns": ("Term", "What it is"),
        "comma": "; ",
    },
    "zh": {
        "is": "{name}属于{kind}。",
        "parents": "其上位概念为{parents}。",
        "synonyms": "又称{synonyms}。",
        "code": "代码为{code}。",
        "siblings": "相近但不同的概念有：{siblings}。",
        "fits": "{name}符合：{given}",
        "other": "{name}不符合，其特点是：{given}",
        "plain": "{name}是同类中的另一个词条。",
        "answer": "答案：{letter}. {name}",
        "card": "正面：{front}\n背面：{back}",
        "compared": "# 鉴别：{names}",
        "columns": ("概念", "说明"),
        "comma": "、",
    },
}


def offline(tree: Tree, key: str, genre: str, language: str, seed: int) -> Draft | None:
    """Returns what one entity becomes in a genre, or None where it does not suffice for it.

    Args:
        tree: of all entities.
        key: the entity's id.
        genre: one of `OFFLINE_GENRES`.
        language: `en` or `zh`.
        seed: of the choices among wordings and relatives.
    """
    entity = tree.entities[key]
    given = description(entity)
    if not given or names_itself(given, entity):
        return None
    if genre == "choice":
        return _choice(tree, entity, given, language, seed)
    if genre == "term":
        stem = _stem("term", entity, given, language, seed)
        return Draft(
            question=stem, answer=f"{entity.name}\n\n{_about(tree, entity, language, seed)}", reference=""
        )
    words = _WORDS[language]
    if genre == "card":
        text = words["card"].format(
            front=given, back=f"{entity.name}. {_about(tree, entity, language, seed)}"
        )
        return Draft(question="", answer=text, reference="")
    if genre == "comparison":
        return _comparison(tree, entity, given, language, seed)
    return Draft(
        question="",
        answer=f"# {entity.name}\n\n{given}\n\n{_about(tree, entity, language, seed)}",
        reference="",
    )


def _stem(genre: str, entity: Entity, given: str, language: str, seed: int) -> str:
    wordings = WORDINGS[genre][language]
    return wordings[stable_key(seed, entity.id, genre) % len(wordings)].format(given=given)


def _choice(tree: Tree, entity: Entity, given: str, language: str, seed: int) -> Draft | None:
    wrong = asked_for(tree, entity.id, given, seed)
    if wrong is None:
        return None
    words = _WORDS[language]
    options = shuffled_options(entity.name, wrong, seed, entity.id)
    by_name = {tree.entities[k].name: k for k in (*tree.cousins(entity.id), *tree.siblings(entity.id))}
    lines = []
    for letter, option in zip("ABCD", options, strict=True):
        right = option == entity.name
        told = given if right else description(tree.entities[by_name[option]])
        wording = words["fits" if right else "other" if told and told != given else "plain"]
        lines.append(f"{letter}. {wording.format(name=option, given=told)}")
    letter = "ABCD"[options.index(entity.name)]
    lines.append(f"\n{words['answer'].format(letter=letter, name=entity.name)}")
    stem = _stem("choice", entity, given, language, seed)
    return Draft(question=choice_text(stem, options), answer="\n".join(lines), reference="")


def _about(tree: Tree, entity: Entity, language: str, seed: int) -> str:
    """What else is known: type, broader terms, names, code, siblings."""
    words = _WORDS[language]
    parents = [tree.entities[key].name for key in entity.parents if key in tree.entities]
    siblings = stable_shuffle(tree.siblings(entity.id), str, seed, entity.id, "about")[:2]
    comma = words["comma"]
    parts = [words["is"].format(name=entity.name, kind=entity.kind)]
    if parents:
        parts.append(words["parents"].format(parents=comma.join(parents[:2])))
    if entity.synonyms:
        parts.append(words["synonyms"].format(synonyms=comma.join(entity.synonyms[:3])))
    if entity.codes:
        parts.append(words["code"].format(code=entity.codes[0]))
    if siblings:
        parts.append(words["siblings"].format(siblings=comma.join(tree.entities[k].name for k in siblings)))
    return ("" if language == "zh" else " ").join(parts)


def _comparison(tree: Tree, entity: Entity, given: str, language: str, seed: int) -> Draft | None:
    """A table of the entity and up to three siblings that can be described."""
    words = _WORDS[language]
    near = stable_shuffle(tree.siblings(entity.id), str, seed, entity.id, "comparison")
    rows = {entity.name: given}
    for other in (tree.entities[key] for key in near):
        told = description(other)
        if told and other.name not in rows and len(rows) < 4:
            rows[other.name] = told
    if len(rows) < 2:
        return None
    names = stable_shuffle(rows, str, seed, entity.id, "rows")
    title = words["compared"].format(names=words["comma"].join(names))
    header = f"| {words['columns'][0]} | {words['columns'][1]} |\n|---|---|"
    table = "\n".join(f"| {name} | {rows[name].replace('|', '/')} |" for name in names)
    return Draft(question="", answer=f"{title}\n\n{header}\n{table}", reference="")
