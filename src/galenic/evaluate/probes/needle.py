"""Needle in a haystack: one sentence of a long text tells the value that is asked for at its end.

The text tells the values of three other things as well, at places of their own: whoever copies any value of the
text is right once in four. The idea: G. Kamradt's "Needle in a haystack" (2023); values among distractors as in RULER
(arXiv 2404.06654, "multi-keys").
"""

import itertools
from typing import Any

from galenic.evaluate.multiple_choice import PromptFormat

from .asked import Item, Row, Subject, answer, numbers
from .config import NeedleConfig
from .haystack import Source, item, random_of, some

COLOURS = {
    "en": "red blue green white black brown yellow grey".split(),
    "zh": "红色 蓝色 绿色 白色 黑色 棕色 黄色 灰色".split(),
}
HOLDERS = {
    "en": "cabinet drawer locker cupboard chest box".split(),
    "zh": "柜子 抽屉 储物柜 橱柜 箱子 盒子".split(),
}
FACT = {"en": "The code of the {thing} is {value}.", "zh": "{thing}的密码是{value}。"}
QUESTION = {"en": "What is the code of the {thing}?", "zh": "{thing}的密码是多少？"}

PROTOCOL = (
    "a sentence in a text of the given number of tokens tells the code of one thing, at the given depth, and three "
    "sentences elsewhere tell those of others; asked at the end, the likeliest of the four codes, all equally long, "
    "is the pick; longer than the model's context counts as wrong and as too_long"
)


def make(config: NeedleConfig, tokenizer: Any, prompt: PromptFormat, filler: Source, seed: int) -> list[Item]:
    """Makes the items of every length, depth and language; the same seed makes the same."""
    cells = itertools.product(config.contexts, config.depths, config.languages, range(config.items))
    made = []
    for context, depth, language, number in cells:
        key = f"{language}-{context}-{depth:g}-{number}"
        random = random_of(seed, "needle", key)
        things = [
            f"{colour} {holder}" if language == "en" else colour + holder
            for colour, holder in itertools.product(COLOURS[language], HOLDERS[language])
        ]
        asked = some(random, things, 4)
        codes = some(random, [str(code) for code in range(1000, 10000)], 4)
        right = int(random.integers(4))
        facts = [
            (
                depth if place == right else float(random.random()),
                FACT[language].format(thing=thing, value=code),
            )
            for place, (thing, code) in enumerate(zip(asked, codes, strict=True))
        ]
        about = {"context": context, "depth": depth, "language": language}
        question = QUESTION[language].format(thing=asked[right])
        text = filler(random, language)
        made.append(
            item(tokenizer, prompt, text, facts, question, codes, right, key, about, config.written_tokens)
        )
    return made


def measure(
    config: NeedleConfig, subject: Subject, filler: Source, seed: int
) -> tuple[dict[str, Any], list[Row]]:
    """Returns the accuracy by length, depth and language, and the rows."""
    items = make(config, subject.tokenizer, subject.prompt, filler, seed)
    rows = answer(subject, items, "needle", config.written_tokens)
    return numbers(rows, ("context", "depth", "language")), rows
