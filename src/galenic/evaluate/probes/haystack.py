"""Long texts with facts in them: sentences from templates or from held-out documents, to a length in tokens."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.tokens.chat_format import encode_text
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.runtime import UserError, numbered_jsonl

from .asked import Item, tokens_of

DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "zh": "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split(),
}
THINGS = {
    "en": "gauze, soap, tea, paper, blankets, gloves, pillows, towels, apples, batteries, lamps, curtains".split(
        ", "
    ),
    "zh": "纱布 肥皂 茶叶 纸张 毯子 手套 枕头 毛巾 苹果 电池 台灯 窗帘".split(),
}
FILLER = {
    "en": (
        "On {day} the store room received {n} boxes of {thing}.",
        "The corridor was cleaned on {day}, and {n} people walked through it afterwards.",
        "Nobody had ordered {thing} for {n} weeks.",
        "A visitor asked for {thing} and waited for {n} minutes.",
        "It rained on {day}, so the garden stayed empty for {n} hours.",
        "The kitchen served {n} bowls of soup on {day}.",
        "Somebody counted the {thing} twice and came to {n} both times.",
        "The lift stopped on {day} and was repaired after {n} hours.",
        "There were {n} chairs in the waiting room, and some {thing} on a shelf.",
        "The meeting on {day} was about {thing} and lasted {n} minutes.",
    ),
    "zh": (
        "{day}库房收到了{n}箱{thing}。",
        "走廊在{day}打扫过，之后有{n}个人走过。",
        "已经有{n}个星期没有人订购{thing}了。",
        "一位访客问{thing}放在哪里，等了{n}分钟。",
        "{day}下了雨，花园里有{n}个小时没有人。",
        "食堂在{day}盛出了{n}碗汤。",
        "有人把{thing}数了两遍，两次都是{n}。",
        "电梯在{day}停了，{n}个小时后修好。",
        "候诊室里有{n}把椅子和一篮{thing}。",
        "{day}的会议讨论了{thing}，开了{n}分钟。",
    ),
}
"""Sentences that tell nothing of what is asked; numbers in them have two digits at most."""

TRIES = 20
"""Sentences that are passed over in a row, as too long or as naming an option, before a text counts as full."""

Source = Callable[[np.random.Generator, str], Iterator[str]]
"""Gives sentences without end, of a random state and a language."""


def random_of(*key: object) -> np.random.Generator:
    """Returns the random state of a key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16])))


def some(random: np.random.Generator, values: Sequence[str], count: int) -> list[str]:
    """Draws different values."""
    return [values[i] for i in random.permutation(len(values))[:count]]


def made(random: np.random.Generator, language: str) -> Iterator[str]:
    """Gives sentences made by templates."""
    while True:
        (form,) = some(random, FILLER[language], 1)
        values = {"day": DAYS[language], "thing": THINGS[language], "n": [str(n) for n in range(2, 100)]}
        yield form.format(**{name: some(random, given, 1)[0] for name, given in values.items()})


def source(path: str | None) -> Source:
    """Returns where sentences come from.

    Raises:
        UserError: see `read`.
    """
    if path is None:
        return made
    texts = [found for text in read(path) if (found := sentences(text))]
    if not texts:
        raise UserError(f"probes.haystack: {path} holds no text")

    def given(random: np.random.Generator, language: str) -> Iterator[str]:
        while True:
            for place in random.permutation(len(texts)):
                yield from texts[place]

    return given


def read(path: str) -> list[str]:
    """Reads the documents of a .txt file, of a .jsonl file, or those held out in a corpus step's folder.

    Raises:
        UserError: no such file, another kind of file, a row without text, or nothing is held out.
    """
    place = Path(path)
    if (place / "documents.parquet").exists():
        texts = [text for batch in documents(place, heldout=True) for text in batch]
        if not texts:
            raise UserError(
                f"probes.haystack: {path} holds no held-out documents; raise the corpus' held-out share"
            )
        return texts
    if place.suffix not in (".txt", ".jsonl") or not place.is_file():
        raise UserError(f"probes.haystack: {path} is no .txt or .jsonl file and no corpus step's folder")
    if place.suffix == ".txt":
        try:
            return [place.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
    texts = []
    for number, row in numbered_jsonl(place):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row.get("text"), str):
            raise UserError(f"{path}:{number}: 'text' must be a text, got {row.get('text')!r}")
        texts.append(row["text"])
    return texts


def documents(corpus: Path, *, heldout: bool) -> Iterator[list[str]]:
    """Yields the texts of a corpus step's held-out documents, or of all others, in batches of a few thousand."""
    from pyarrow import dataset

    found = dataset.dataset(str(corpus / "documents.parquet"), format="parquet")
    if "split" in found.schema.names:
        split = dataset.field("split")
        chosen = split == "heldout" if heldout else (split != "heldout") | split.is_null()
    elif heldout:
        return
    else:
        chosen = None
    for batch in found.to_batches(columns=["text"], filter=chosen, batch_size=4096):
        if len(batch):
            yield batch.column("text").to_pylist()


def sentences(text: str) -> list[str]:
    """Splits a text after the ends of its sentences and lines."""
    parts = re.split(r"(?<=[。!?！？])|(?<=[.!?])\s+|\n+", text)
    return [part.strip() for part in parts if part and part.strip()]


def hide(
    tokenizer: Any,
    prompt: PromptFormat,
    filler: Iterator[str],
    language: str,
    facts: Sequence[tuple[float, str]],
    question: str,
    options: Sequence[str],
    context: int,
    reserve: int = 0,
) -> tuple[str, int]:
    """Puts facts into a text and the question after it, in `context` tokens at most.

    Args:
        tokenizer: the models' tokenizer.
        prompt: how questions are put.
        filler: gives sentences without end; one that names an option is passed over.
        language: decides whether spaces stand between sentences.
        facts: (depth, sentence): at depth d a sentence follows the share d of the filler.
        question: asked after the text.
        options: the longest of which has to fit as well.
        context: tokens of prompt and option together.
        reserve: tokens that are kept free for an answer, if that is more than the longest option has.

    Returns:
        (text with question, tokens of the prompt and the longest option or the reserve); facts alone may be longer
        than `context`.
    """
    join = "" if language == "zh" else " "
    longest = max(reserve, *(len(encode_text(tokenizer, prompt.join + option)) for option in options))

    def lay(filled: Sequence[str]) -> tuple[str, int]:
        places = sorted(
            ((round(depth * len(filled)), number) for number, (depth, _) in enumerate(facts)), reverse=True
        )
        told = list(filled)
        for place, number in places:
            told.insert(place, facts[number][1])
        text = f"{join.join(told)}\n\n{question}"
        return text, len(tokens_of(tokenizer, prompt, text)) + longest

    room, filled = context - lay([])[1], []
    passed = 0
    while passed < TRIES:
        sentence = next(filler)
        named = any(option in sentence for option in options)
        size = 0 if named else len(encode_text(tokenizer, join + sentence))
        if named or size > room:
            passed += 1
            continue
        passed, room = 0, room - size
        filled.append(sentence)
    text, tokens = lay(filled)
    while tokens > context and filled:  # tokens of sentences apart are fewer only in odd cases
        filled.pop()
        text, tokens = lay(filled)
    return text, tokens


def item(
    tokenizer: Any,
    prompt: PromptFormat,
    filler: Iterator[str],
    facts: Sequence[tuple[float, str]],
    question: str,
    options: list[str],
    answer: int,
    key: str,
    about: dict[str, Any],
    reserve: int,
) -> Item:
    """Makes an item of `about["context"]` tokens in `about["language"]`; see `hide`."""
    language, context = about["language"], about["context"]
    text, tokens = hide(tokenizer, prompt, filler, language, facts, question, options, context, reserve)
    return Item(id=key, text=text, options=options, answer=answer, tokens=max(tokens, context), about=about)
