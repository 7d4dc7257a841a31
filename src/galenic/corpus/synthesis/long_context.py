"""Long contexts: a question on one text that stands among others, which fill the conversation to so many tokens.

    text --ask--> question, answer, and what must stand in no other text   (or a conversation about that text)
    other texts --surround--> before, main text, after: at most `tokens` tokens, the answer included

Source: Baichuan-M1 report, section 5.1: random documents are concatenated before and after the main text. Where the
main text stands is drawn evenly. Questions stay answerable: a text in which what is asked for stands too is not taken.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from galenic.corpus.starter.holdout import stable_key, stable_shuffle, tokens
from galenic.corpus.synthesis.filling import fill
from galenic.corpus.synthesis.knowledge_graph import parse
from galenic.corpus.synthesis.outcome import Outcome, conversation_row, dropped, id_of
from galenic.corpus.synthesis.seeds import Selection
from galenic.corpus.synthesis.steps import Seed
from galenic.runtime import UserError, numbered_jsonl

BETWEEN = "\n\n---\n\n"
"""Stands between two texts."""

WORDINGS = {
    "en": {
        "quote": "One of the texts has a sentence that begins “{start}”. Quote the whole sentence.",
        "title": "One of the texts says: “{sentence}” What is the title of that text?",
        "definition": "How is {name} defined in the texts?",
        "code": "Which code do the texts give for {name}?",
        "synonyms": "By what other names do the texts call {name}?",
        "last": "Read these texts.\n\n{texts}\n\n{question}",
        "first": "{question} The answer stands in one of these texts.\n\n{texts}",
    },
    "zh": {
        "quote": "其中一篇文章里有一句话以“{start}”开头，请完整引用这句话。",
        "title": "其中一篇文章写道：“{sentence}”这篇文章的标题是什么？",
        "definition": "文中是怎样定义{name}的？",
        "code": "文中给出的{name}的代码是什么？",
        "synonyms": "文中{name}还有哪些别名？",
        "last": "请阅读以下文章。\n\n{texts}\n\n{question}",
        "first": "{question}答案就在下面的某一篇文章中。\n\n{texts}",
    },
}

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])|(?<=[。！？])")
_HAN = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question on a text."""

    task: str
    question: str
    answer: str
    unique: tuple[str, ...] = ()
    """Words that may stand in no other text: another one would answer the question too."""


def outcomes(selection: Selection, seed: int) -> Iterator[Outcome]:
    """Makes conversations of a selection's texts, as many as its limit, and ledgers what comes to nothing."""
    from galenic.model import load_tokenizer

    pipeline, made = selection.pipeline, 0
    builder = _Builder(selection, load_tokenizer(pipeline.tokenizer), seed)
    for name, text, asked in _asked(selection, seed):
        if made == pipeline.limit:
            return
        if isinstance(asked, str):
            yield dropped(pipeline, name, asked, "", text.text if text else "")
            continue
        assert text is not None
        found = builder.build(name, text, asked)
        made += found.ledger is None
        yield found


def _asked(selection: Selection, seed: int) -> Iterator[tuple[str, Seed | None, Asked | str]]:
    """Yields (id, text, question), or the reason why there is none."""
    pipeline, texts = selection.pipeline, {text.id: text for text in selection.seeds}
    if not pipeline.conversations:
        for text in selection.seeds:
            yield id_of(pipeline, text), text, ask(text, seed) or "nothing to ask"
        return
    for number, row in numbered_jsonl(pipeline.conversations):
        name = f"synthetic-long-context/line-{number}"
        if isinstance(row, UserError):
            raise row
        turns = _turns(row.get("messages"))
        text = texts.get(str(row.get("document")))
        if turns is None:
            yield name, None, "not one question with one answer"
        elif text is None:
            yield name, None, "its document is not there"
        else:
            yield name, text, Asked(task="given", question=turns[0], answer=turns[1])


def _turns(messages: Any) -> tuple[str, str] | None:
    """Returns question and answer of a conversation that has one of each."""
    match messages:
        case [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]:
            return question, answer
    return None


# ---------------------------------------------------------------------------- questions


def ask(text: Seed, seed: int) -> Asked | None:
    """Asks a text for one of what it holds: a quotation, its title, a fact of its entity."""
    tasks = (_quote, _title, _definition, _code, _synonyms)
    for task in stable_shuffle(tasks, lambda t: t.__name__, seed, text.id, "task"):
        if found := task(text, seed):
            return found
    return None


def _sentences(text: Seed, seed: int) -> list[str]:
    """Sentences of running text, of 10 to 60 words or Chinese characters, in a stable disorder."""
    lines = [line for line in text.text.split("\n") if line and line[0] not in "#-|*>"]
    found = [s.strip() for line in lines for s in _SENTENCE_END.split(line)]
    ended = [s for s in found if s.endswith((".", "!", "?", "。", "！", "？")) and 10 <= len(tokens(s)) <= 60]
    return stable_shuffle(dict.fromkeys(ended), str, seed, text.id, "sentence")


def _quote(text: Seed, seed: int) -> Asked | None:
    whole = _phrase(text.text)
    for sentence in _sentences(text, seed):
        start = sentence[:8] if text.language == "zh" else " ".join(sentence.split()[:5])
        if whole.count(_phrase(start)) == 1 and len(tokens(sentence)) >= len(tokens(start)) + 4:
            question = fill(WORDINGS[text.language]["quote"], {"start": start})
            return Asked(task="quote", question=question, answer=sentence, unique=(start,))
    return None


def _title(text: Seed, seed: int) -> Asked | None:
    first, _, rest = text.text.partition("\n")
    title = first.removeprefix("# ").strip()
    if not first.startswith("# ") or not tokens(title) or not rest.strip():
        return None
    for sentence in _sentences(text, seed):
        if _phrase(title) not in _phrase(sentence):
            question = fill(WORDINGS[text.language]["title"], {"sentence": sentence})
            return Asked(task="title", question=question, answer=title, unique=(sentence,))
    return None


def _entity(text: Seed) -> Any:
    return parse({"id": text.id, "text": text.text, "source": text.source, "department": text.department})


def _definition(text: Seed, seed: int) -> Asked | None:
    entity = _entity(text)
    return _fact(text, "definition", entity.name, entity.definition) if entity else None


def _code(text: Seed, seed: int) -> Asked | None:
    entity = _entity(text)
    return _fact(text, "code", entity.name, entity.codes[0]) if entity and entity.codes else None


def _synonyms(text: Seed, seed: int) -> Asked | None:
    entity = _entity(text)
    return _fact(text, "synonyms", entity.name, "; ".join(entity.synonyms)) if entity else None


def _fact(text: Seed, task: str, name: str, answer: str) -> Asked | None:
    if not answer or not tokens(name):
        return None
    question = fill(WORDINGS[text.language][task], {"name": name})
    return Asked(task=task, question=question, answer=answer, unique=(name,))


def _phrase(text: str) -> str:
    """The words of a text, each between blanks: where a phrase stands in it, it stands in the text as whole words."""
    return f" {' '.join(tokens(text))} "


# ---------------------------------------------------------------------------- texts around


class _Builder:
    """Makes one conversation after the other of the same texts."""

    def __init__(self, selection: Selection, tokenizer: Any, seed: int) -> None:
        self.pipeline, self.others = selection.pipeline, selection.others
        self.tokenizer, self.seed = tokenizer, seed
        self._phrases: dict[str, str] = {}

    def build(self, name: str, text: Seed, asked: Asked) -> Outcome:
        """Puts other texts around a text until the conversation is full."""
        from galenic.corpus.tokens.chat_template import encode_chat

        taken: list[str] = []
        question_first = stable_key(self.seed, name, "question first") % 3 == 0
        wording = WORDINGS[text.language]["first" if question_first else "last"]

        def prompt(texts: Sequence[str]) -> str:
            return fill(wording, {"texts": BETWEEN.join(texts), "question": asked.question})

        def length(texts: Sequence[str]) -> int:
            turns = (
                {"role": "user", "content": prompt(texts)},
                {"role": "assistant", "content": asked.answer},
            )
            return len(encode_chat(self.tokenizer, list(turns))[0])

        try:
            texts = surround(
                text.text,
                self._fitting(name, text, asked, taken),
                length=length,
                count=lambda part: len(self.tokenizer(part, add_special_tokens=False)["input_ids"]),
                budget=self.pipeline.tokens,
                before=stable_key(self.seed, name, "before") / 2**64,
            )
        except ValueError as error:
            return dropped(self.pipeline, name, "not a conversation", str(error), text.text)
        if texts is None:
            detail = f"{length([text.text])} tokens by itself, {self.pipeline.tokens} allowed"
            return dropped(self.pipeline, name, "too long", detail, text.text)
        row = conversation_row(
            self.pipeline,
            name,
            (prompt(texts), asked.answer),
            department=text.department,
            task=asked.task,
            document=text.id,
            around=taken[: len(texts) - 1],  # what was taken last had no room, not for a word
            tokens=length(texts),
        )
        return Outcome(id=name, conversation=row)

    def _fitting(self, name: str, text: Seed, asked: Asked, taken: list[str]) -> Iterator[str]:
        """Yields texts that do not answer the question too, each once, the same language first; notes their ids."""
        keys = [_phrase(part) for part in asked.unique]
        document = text.id.partition("#")[0]
        shuffled = stable_shuffle(self.others, lambda o: o.id, self.seed, name)
        for other in sorted(shuffled, key=lambda o: o.language != text.language):
            if other.id.partition("#")[0] == document:
                continue
            if other.id not in self._phrases:
                self._phrases[other.id] = _phrase(other.text)
            if not any(key in self._phrases[other.id] for key in keys):
                taken.append(other.id)
                yield other.text


def surround(
    main: str,
    others: Iterable[str],
    *,
    length: Callable[[Sequence[str]], int],
    count: Callable[[str], int],
    budget: int,
    before: float,
) -> list[str] | None:
    """Puts texts before and after a main one until a conversation has `budget` tokens; the outermost two are cut.

    Args:
        main: stays whole.
        others: taken in turn while there is room.
        length: texts in their order -> tokens of the whole conversation.
        count: tokens of a text by itself, near what it adds to a conversation.
        budget: tokens that the conversation has at most.
        before: share of the room that is in front of the main text, from 0 to 1.

    Returns:
        The texts in their order; None if the main one alone has no room. Cuts fall between words, so that what is
        missing from `budget` has no room for a word more, unless the others run out.
    """
    least = length([main])
    if least > budget:
        return None
    supply, most = iter(others), least + round(before * (budget - least))
    taken = _taken(supply, most - least, count)
    front = _trimmed(taken[::-1], lambda texts: length([*texts, main]) <= most, at_start=True)
    # Those that had no room in front, not for a word, come first behind.
    back = _taken(chain(taken[len(front) :], supply), budget - length([*front, main]), count)
    back = _trimmed(back, lambda texts: length([*front, main, *texts]) <= budget, at_start=False)
    return [*front, main, *back]


def _taken(supply: Iterator[str], room: int, count: Callable[[str], int]) -> list[str]:
    """Takes texts until there is no more room for a whole one: the last is too long by what must be cut."""
    found: list[str] = []
    while room > 0 and (text := next(supply, None)) is not None:
        found.append(text)
        room -= count(BETWEEN + text)
    return found


def _trimmed(texts: list[str], fits: Callable[[list[str]], bool], *, at_start: bool) -> list[str]:
    """Cuts texts at their outer end until they fit."""
    while texts and not fits(texts):
        if at_start:
            cut = cut_to_fit(texts[0][::-1], lambda part, rest=texts[1:]: fits([part[::-1], *rest]))[::-1]
            texts = [*([cut] if _says(cut) else []), *texts[1:]]
        else:
            cut = cut_to_fit(texts[-1], lambda part, rest=texts[:-1]: fits([*rest, part]))
            texts = [*texts[:-1], *([cut] if _says(cut) else [])]
    return texts


def _says(text: str) -> bool:
    """Whether more than punctuation is left."""
    return any(map(str.isalnum, text))


def cut_to_fit(text: str, fits: Callable[[str], bool]) -> str:
    """Returns the longest beginning of a text that ends with a word and fits; it may be empty, which is not tried."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    while low and not (_ends_word(text, low) and fits(text[:low].rstrip())):
        low -= 1
    return text[:low].rstrip()


def _ends_word(text: str, place: int) -> bool:
    if place == len(text) or not (text[place - 1].isalnum() and text[place].isalnum()):
        return True
    return bool(_HAN.match(text[place - 1]) or _HAN.match(text[place]))
