"""What an answer is refused for: pure functions on text, none of them asks anybody.

    answer --form--> empty, cut off, refusal, no id, another item's answer, not JSON, missing field
           --text--> another language, repeats itself, repeats the prompt, numbers missing or invented, foreign quotes

A `Problem` goes back to the model as feedback, and into the ledger if that does not help.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from galenic.corpus.starter.holdout import tokens

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_THINKING = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_ID_LINE = re.compile(r"\A\W*(?:ID|编号)\W*\s*[:：]\W*([0-9a-f]{8})\b[ \t*_`.,;，。]*\n?", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_ENGLISH = frozenset("the of and is with that for this are be to was by an not which as or from has".split())
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e)\b[^.\n]{0,40}\b(?:can(?:no|')t|can\s?not|unable|not able|won't)\b"
    r"|\b(?:i|we)(?: am|'m|’m| are)? (?:cannot|can't|can’t|unable to|not able to|won't|will not) (?:help|assist|provide"
    r"|fulfil|comply|answer|give|do|create|generate|write|discuss|offer|continue)"
    r"|\bas an? (?:ai|artificial intelligence|language model)\b"
    r"|(?:抱歉|对不起|很遗憾)[^。\n]{0,20}(?:无法|不能|不可以|没有办法)"
    r"|我(?:无法|不能)(?:提供|回答|协助|帮助|满足|完成|生成)"
    r"|作为(?:一个|一款|一名)?(?:人工智能|AI|语言模型|大模型)",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 200  # characters; later on it may be part of a text


@dataclass(frozen=True)
class Problem:
    """Why an answer is refused."""

    reason: str
    detail: str = ""

    def told(self, language: str) -> str:
        """Words it for the model."""
        wording = FEEDBACK[language].get(self.reason, FEEDBACK[language][""])
        return wording.format(detail=self.detail)


FEEDBACK = {
    "en": {
        "": "Your answer cannot be used: {detail}. Answer again.",
        "empty": "Your answer was empty. Answer again.",
        "cut off": "Your answer was too long and was cut off. Answer again, shorter.",
        "refusal": "The text is for teaching doctors and names no patient. Please do the task.",
        "no id": "Your answer does not give the ID {detail}. Answer again and give it as asked.",
        "another item's answer": "Your answer gives another ID than {detail}. Do the task with that ID only.",
        "not JSON": "Your answer is not one JSON object. Answer again with nothing but the JSON object.",
        "missing field": "The JSON object lacks what was asked for: {detail}. Answer again.",
        "another language": "Answer again in English.",
        "repeats itself": "Your answer repeats itself. Answer again, each thing once.",
        "repeats the prompt": "Your answer only repeats the task. Answer again in your own words.",
        "numbers missing": "Your answer does not use these numbers of the question: {detail}. Answer again.",
        "invented numbers": "These numbers are not in the text: {detail}. Answer with those of the text only.",
        "quote not in the text": 'This is not in the text word for word: "{detail}". Quote the text exactly.',
    },
    "zh": {
        "": "你的回答不能使用：{detail}。请重新回答。",
        "empty": "你的回答是空的。请重新回答。",
        "cut off": "你的回答太长，被截断了。请更简短地重新回答。",
        "refusal": "这段文字用于医生教学，不涉及任何具体病人。请完成任务。",
        "no id": "你的回答没有给出编号{detail}。请按要求写出编号，重新回答。",
        "another item's answer": "你的回答给出的编号不是{detail}。请只完成该编号的任务。",
        "not JSON": "你的回答不是一个JSON对象。请只输出JSON对象，重新回答。",
        "missing field": "JSON对象缺少所要求的内容：{detail}。请重新回答。",
        "another language": "请用中文重新回答。",
        "repeats itself": "你的回答不断重复。请重新回答，每件事只说一次。",
        "repeats the prompt": "你的回答只是重复题目。请用自己的话重新回答。",
        "numbers missing": "你的回答没有用到题目中的这些数字：{detail}。请重新回答。",
        "invented numbers": "这些数字不在原文中：{detail}。请只用原文中的数字重新回答。",
        "quote not in the text": "原文中没有这句话：“{detail}”。请逐字引用原文。",
    },
}
"""Language -> reason -> what the model is told."""


# ---------------------------------------------------------------------------- form


def read_reply(text: str, finish: str, identity: str, as_json: bool) -> tuple[Any, Problem | None]:
    """Returns what an answer holds, or why it holds nothing.

    Args:
        text: the answer.
        finish: why it ended, as the endpoint says.
        identity: the id that the prompt carried.
        as_json: whether a JSON object was asked for, or else text after a line `ID: ...`.

    Returns:
        (dict or text without its ID line, None), or (None, problem).
    """
    text = _THINKING.sub("", text).strip()
    if finish == "length":
        return None, Problem("cut off")
    if not text:
        return None, Problem("refusal" if finish == "content_filter" else "empty")
    if finish == "content_filter":
        return None, Problem("refusal", text[:100])
    found = json_object(text) if as_json else None
    if found is None:
        if refuses(_ID_LINE.sub("", text)):
            return None, Problem("refusal", text[:100])
        if as_json:
            return None, Problem("not JSON")
    if found is not None:
        given = str(found.pop("id", "") or "")
        content: Any = found
    else:
        match = _ID_LINE.match(text)
        given = match[1] if match else ""
        content = text[match.end() :].strip() if match else text
    if not given:
        return None, Problem("no id", identity)
    if given.lower() != identity.lower():
        return None, Problem("another item's answer", identity)
    return (content, None) if content else (None, Problem("empty"))


def json_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object in a text, which fences or a few words may surround; raw line breaks are forgiven.

    What a model thinks before it answers is passed over.
    """
    text = _THINKING.sub("", text)
    decoder = json.JSONDecoder(strict=False)
    start = text.find("{")
    if start < 0:
        return None
    try:
        found, _ = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def fields_problem(found: dict[str, Any], fields: Mapping[str, Any]) -> Problem | None:
    """Checks that fields are there, of their types, and texts not blank; a list may be empty."""
    for name, kind in fields.items():
        value = found.get(name)
        blank = isinstance(value, str) and not value.strip()
        if blank or isinstance(value, bool) or not isinstance(value, kind):
            return Problem("missing field", name)
    return None


# ---------------------------------------------------------------------------- text


def refuses(text: str) -> bool:
    """True if a text begins like a refusal."""
    return bool(_REFUSAL.search(text[:_REFUSAL_WITHIN].replace("’", "'")))


def han_share(text: str) -> float:
    """Returns the share of Chinese characters among the letters."""
    letters = len(_LETTER.findall(text))
    return len(_HAN.findall(text)) / letters if letters else 0.0


def language_of(text: str) -> str:
    """Returns `zh` where a third of the letters is Chinese, else `en`: the language of prompts and answers."""
    return "zh" if han_share(text) > 1 / 3 else "en"


def speaks(text: str, language: str) -> bool:
    """True if a text is in the language, as far as its letters and, from 40 words on, its commonest words tell."""
    letters = _LETTER.findall(text)
    if len(letters) < 10:
        return True
    if language == "zh":
        return han_share(text) > 0.25
    if sum(letter.isascii() for letter in letters) / len(letters) < 0.8:
        return False
    words = re.findall(r"[a-z]+", text.lower())
    return len(words) < 40 or sum(word in _ENGLISH for word in words) / len(words) > 0.08


def _shingles(text: str, n: int = 8) -> list[tuple[str, ...]]:
    words = tokens(text)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def repeats_itself(text: str) -> bool:
    """True if more than half of the eight-word runs of a text stand in it before."""
    runs = _shingles(text)
    return len(runs) > 20 and len(set(runs)) < len(runs) / 2


def repeats(text: str, prompt: str) -> bool:
    """True if more than 60% of the eight-word runs of a text stand in the prompt."""
    runs = _shingles(text)
    if len(runs) < 4:
        return bool(tokens(text)) and " ".join(tokens(text)) in " ".join(tokens(prompt))
    told = set(_shingles(prompt))
    return sum(run in told for run in runs) / len(runs) > 0.6


def numbers(text: str) -> set[str]:
    """Returns the numbers of a text, as written, thousands separators removed."""
    return {re.sub(r",(?=\d{3}\b)", "", number) for number in _NUMBER.findall(text)}


def missing_numbers(question: str, answer: str) -> list[str]:
    """Returns the numbers of a question that an answer leaves out, where it leaves out more than half of them.

    Few answers need every number of a question; one that uses hardly any answers something else.
    """
    asked = numbers(question)
    missing = asked - numbers(answer)
    return sorted(missing) if len(asked) >= 2 and len(missing) > len(asked) / 2 else []


def foreign_quote(quotes: Iterable[str], text: str) -> str:
    """Returns the first quote that is not in the text word for word (case and punctuation ignored), or ''."""
    whole = f" {' '.join(tokens(text))} "
    for quote in quotes:
        words = tokens(quote)
        if not words or f" {' '.join(words)} " not in whole:
            return quote.strip() or "(nothing)"
    return ""


def text_problem(text: str, language: str, *, prompt: str = "", question: str = "") -> Problem | None:
    """Checks a written text.

    Args:
        text: the text.
        language: `en` or `zh`.
        prompt: what it must not merely repeat.
        question: whose numbers it has to use.
    """
    if refuses(text):
        return Problem("refusal", text[:100])
    if not speaks(text, language):
        return Problem("another language", text[:100])
    if repeats_itself(text):
        return Problem("repeats itself", text[-100:])
    if prompt and repeats(text, prompt):
        return Problem("repeats the prompt", text[:100])
    if missing := missing_numbers(question, text):
        return Problem("numbers missing", ", ".join(missing))
    return None
