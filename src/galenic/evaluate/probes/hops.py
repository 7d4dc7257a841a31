"""Multi-hop retrieval: the answer follows from one to four facts that stand scattered over a long text.

    patient --is in--> ward --belongs to--> house --is led by--> person --lives in--> town

Four such chains stand in the text, with different ends each, so that every option is told equally often; only who
follows the links from the patient is right more than once in four. After "variable tracking" of RULER (arXiv
2404.06654) and bAbI's chained facts (arXiv 1502.05698), with sentences of our own.
"""

import itertools
from typing import Any

from galenic.evaluate.multiple_choice import PromptFormat

from .asked import Item, Row, Subject, answer, numbers
from .config import HopsConfig
from .haystack import Source, item, random_of, some

NAMES = {
    "patient": {
        "en": "Aron Bela Carla Dino Elsa Frida Goran Hanna Igor Jana Kofi Lena".split(),
        "zh": "小安 小贝 小川 小东 小峰 小光 小海 小佳 小康 小兰 小明 小楠".split(),
    },
    "ward": {
        "en": [f"ward {number}" for number in range(1, 21)],
        "zh": [f"{number}号病房" for number in range(1, 21)],
    },
    "house": {
        "en": "Cedar House, Maple House, Willow House, Birch House, Poplar House, Linden House".split(", "),
        "zh": "雪松楼 枫树楼 柳树楼 白桦楼 杨树楼 椴树楼".split(),
    },
    "person": {
        "en": "Dr Abel, Dr Brandt, Dr Costa, Dr Dahl, Dr Engel, Dr Fontana, Dr Gray, Dr Hoang".split(", "),
        "zh": "赵医生 钱医生 孙医生 李医生 周医生 吴医生 郑医生 王医生".split(),
    },
    "town": {
        "en": "Arlen Bexford Corvale Dunmore Elmstead Farrow Glinton Harwick".split(),
        "zh": "青石镇 白沙镇 南桥镇 东湖镇 清水镇 长岭镇 双溪镇 北坡镇".split(),
    },
}
LINKS = ("patient", "ward", "house", "person", "town")
FACTS = {
    "en": (
        "{0} is in {1}.",
        "The beds of {0} belong to {1}.",
        "The head of {0} is {1}.",
        "The home of {0} is in {1}.",
    ),
    "zh": ("{0}住在{1}。", "{0}属于{1}。", "{0}的负责人是{1}。", "{0}的家在{1}。"),
}
QUESTIONS = {
    "en": (
        "In which ward is {0}?",
        "To which house does the ward of {0} belong?",
        "Who is the head of the house to which the ward of {0} belongs?",
        "In which town does the head of the house live to which the ward of {0} belongs?",
    ),
    "zh": (
        "{0}住在哪个病房？",
        "{0}住的病房属于哪栋楼？",
        "{0}住的病房所属的楼由谁负责？",
        "{0}住的病房所属的楼的负责人家在哪个镇？",
    ),
}

PROTOCOL = (
    "four chains of the given number of facts, in any order at any place of a text of the given number of tokens; "
    "asked for the end of one chain by its beginning, the likeliest of the four ends, by "
    "log-likelihood over UTF-8 bytes, is the pick; longer than the model's context counts as wrong and as too_long"
)


def make(config: HopsConfig, tokenizer: Any, prompt: PromptFormat, filler: Source, seed: int) -> list[Item]:
    """Makes the items of every length, number of hops and language; the same seed makes the same."""
    cells = itertools.product(config.contexts, config.hops, config.languages, range(config.items))
    made = []
    for context, hops, language, number in cells:
        key = f"{language}-{context}-{hops}-{number}"
        random = random_of(seed, "hops", key)
        chains = [some(random, NAMES[link][language], 4) for link in LINKS[: hops + 1]]
        right = int(random.integers(4))
        told = [
            FACTS[language][hop].format(chains[hop][place], chains[hop + 1][place])
            for hop in range(hops)
            for place in range(4)
        ]
        facts = [(float(random.random()), fact) for fact in some(random, told, len(told))]
        question = QUESTIONS[language][hops - 1].format(chains[0][right])
        about = {"context": context, "hops": hops, "language": language}
        text = filler(random, language)
        made.append(
            item(
                tokenizer, prompt, text, facts, question, chains[-1], right, key, about, config.written_tokens
            )
        )
    return made


def measure(
    config: HopsConfig, subject: Subject, filler: Source, seed: int
) -> tuple[dict[str, Any], list[Row]]:
    """Returns the accuracy by length, number of hops and language, and the rows."""
    items = make(config, subject.tokenizer, subject.prompt, filler, seed)
    rows = answer(subject, items, "hops", config.written_tokens)
    return numbers(rows, ("context", "hops", "language")), rows
