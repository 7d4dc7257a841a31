"""Safety: what is asked with bad intent or would end badly, in the guise of attacks, and what only looks like it.

    label, principle --requests--> in the guise of each attack --> answered by the principle: refuse or warn
                     --safe ones-> in the same guises          --> answered: help

The files `prompts/safety.*.yaml` hold labels, principles, attacks and wordings; a folder of prompts may replace them.
A model that sees only attacks learns to refuse a guise or a word: so each label has harmless requests that share both.
Source: Baichuan-M1 report, section 5.1; its labels and attacks are not printed, those here are ours. Its prompts were
written by a language model and its answers checked by experts: here both are templates.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from galenic.corpus.duplicates.dedup import deduplicate
from galenic.corpus.records import Document
from galenic.corpus.starter.holdout import stable_key, stable_shuffle, tokens
from galenic.corpus.starter.questions import take_in_turn
from galenic.corpus.synthesis.filling import fill
from galenic.corpus.synthesis.outcome import Outcome, conversation_row, dropped
from galenic.corpus.synthesis.synthesise_config import PipelineConfig
from galenic.runtime import UserError, load_yaml

LANGUAGES = ("en", "zh")
SIMILAR = 0.8
"""Share of common runs of five words from which on two prompts are the same."""
Behaviour = Literal["refuse", "warn", "help"]
_SLOT = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One conversation."""

    id: str
    label: str
    attack: str
    behaviour: Behaviour
    """What its last answer does; `help` in all that only looks unsafe."""
    turns: tuple[str, ...]
    language: str

    @property
    def prompt(self) -> str:
        """What is asked in the end."""
        return self.turns[-2]


def outcomes(pipeline: PipelineConfig, folder: str, seed: int) -> Iterator[Outcome]:
    """Makes conversations, as many as the limit and evenly of labels, attacks and behaviours; ledgers duplicates."""
    items = [item for language in LANGUAGES for item in items_of(load(language, folder), language, seed)]
    kept, removed = without_duplicates(items, seed)
    for item, other in removed:
        yield dropped(pipeline, item.id, "duplicate", other, item.prompt)
    for item in evenly(kept, pipeline.limit, seed):
        row = conversation_row(
            pipeline,
            item.id,
            item.turns,
            department="",
            language=item.language,
            label=item.label,
            attack=item.attack,
            behaviour=item.behaviour,
        )
        yield Outcome(id=item.id, conversation=row)


# ---------------------------------------------------------------------------- what there is to ask


@dataclass(frozen=True)
class _Request:
    """What is asked, in plain words."""

    name: str
    text: str
    answers: list[str]
    safe: bool


def items_of(book: Mapping[str, Any], language: str, seed: int) -> Iterator[Item]:
    """Puts every request of every label, and every harmless one, into every guise.

    Args:
        book: what `load` returns.
        language: of it.
        seed: of the choice among an answer's wordings.
    """
    guises = [
        (attack, f"{attack}-{number}", template)
        for attack, templates in book["attacks"].items()
        for number, template in enumerate(templates, start=1)
    ]
    for label, rule in book["labels"].items():
        requests = _requests(rule, book["slots"])
        harmless = [request for request in requests if request.safe]
        for request in requests:
            before = harmless[stable_key(seed, label, request.name) % len(harmless)]
            for attack, guise, template in guises:
                if request.safe and isinstance(template, list):
                    continue  # one that leads from harmless to harmful has no harmless form
                name = f"{language}/{label}/{request.name}/{guise}"
                answer = request.answers[stable_key(seed, name) % len(request.answers)]
                if request.safe and isinstance(template, dict):
                    answer = fill(template["helped"], {"request": request.text, "answer": answer})
                yield Item(
                    id=f"synthetic-safety/{name}",
                    label=label,
                    attack=attack,
                    behaviour="help" if request.safe else rule["behaviour"],
                    turns=(*_turns(template, request.text, before), answer),
                    language=language,
                )


def _requests(rule: Mapping[str, Any], slots: Mapping[str, list[str]]) -> list[_Request]:
    """Returns the requests of a label, harmful and harmless, in every way to fill their slots."""
    found = []
    for kind, requests in (("unsafe", rule["requests"]), ("safe", rule["safe"])):
        for place, one in enumerate(requests, start=1):
            text, answers = (
                (one, rule["answers"]) if isinstance(one, str) else (one["request"], [one["answer"]])
            )
            names = list(dict.fromkeys(_SLOT.findall(text)))
            for number, values in enumerate(product(*(slots[name] for name in names)), start=1):
                words = dict(zip(names, values, strict=True))
                filled = [fill(answer, words) for answer in answers]
                found.append(_Request(f"{kind}-{place}.{number}", fill(text, words), filled, kind == "safe"))
    return found


def _turns(template: Any, request: str, before: _Request) -> tuple[str, ...]:
    """Puts a request into a guise: the turns up to the user's last, after a harmless question where it has several."""
    values = {"request": request, "spelled": spelled(request)}
    values |= {"safe": before.text, "safe_answer": before.answers[0]}
    return tuple(fill(turn, values) for turn in _asked(template))


def _asked(template: Any) -> list[str]:
    """Returns the turns of a guise: a text, turns, or {ask, helped}."""
    if isinstance(template, list):
        return template
    return [template["ask"] if isinstance(template, dict) else template]


def spelled(text: str) -> str:
    """Writes words letter by letter, with hyphens.

    >>> spelled("Take it?")
    'T-a-k-e i-t-?'
    """
    return " ".join("-".join(word) for word in text.split())


# ---------------------------------------------------------------------------- duplicates, balance


def without_duplicates(items: list[Item], seed: int) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Removes prompts that say what another one says.

    Under one label and attack, a prompt that is another one with more words in front or behind; anywhere, a prompt that
    shares most runs of five words with another (`galenic.corpus.duplicates`).

    Returns:
        (what is kept, in order; what is not, with the id of what it is a duplicate of).
    """
    groups: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.language, item.label, item.attack].append(item)
    gone: dict[str, str] = {}
    for group in groups.values():
        gone |= affixed({item.id: " ".join(tokens(item.prompt)) for item in group})
    left = [item for item in items if item.id not in gone]
    for one in deduplicate([_document(item) for item in left], threshold=SIMILAR, seed=seed)[1]:
        gone[one.document.id] = one.kept
    return [i for i in items if i.id not in gone], [(i, gone[i.id]) for i in items if i.id in gone]


def affixed(texts: Mapping[str, str]) -> dict[str, str]:
    """Returns the keys of texts that begin or end with another one (of equal ones, all but the first): key -> that.

    >>> affixed({"a": "may I take it", "b": "well may I take it", "c": "may I"})
    {'a': 'c', 'b': 'a'}
    """
    keys = sorted(
        texts, key=lambda key: len(texts[key])
    )  # a stable sort: of equal ones the first stays first
    whole: dict[str, str] = {}
    found: dict[str, str] = {}
    for key in keys:
        words = texts[key].split()
        ends = (" ".join(part) for n in range(len(words), 0, -1) for part in (words[:n], words[-n:]))
        if other := next((whole[end] for end in ends if end in whole), None):
            found[key] = other
        whole.setdefault(texts[key], key)
    return {key: found[key] for key in texts if key in found}


def _document(item: Item) -> Document:
    return Document(
        id=item.id, text=item.prompt, source="safety", licence="", language="", category="", department=""
    )


def evenly(items: Iterable[Item], limit: int, seed: int) -> list[Item]:
    """Takes items in turn: of what is answered and what is not, of each of these by label, attack and language."""
    groups: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        groups[str(item.behaviour == "help"), item.label, item.attack, item.language].append(item)
    sides = []
    for side in ("False", "True"):
        keys = stable_shuffle((key for key in groups if key[0] == side), str, seed, "safety")
        streams = [iter(stable_shuffle(groups[key], lambda item: item.id, seed)) for key in keys]
        sides.append(iter(take_in_turn(streams, sum(len(groups[key]) for key in keys))))
    return take_in_turn(sides, limit)


# ---------------------------------------------------------------------------- files


def load(language: str, folder: str = "") -> dict[str, Any]:
    """Reads labels, principles, attacks and wordings.

    Args:
        language: `en` or `zh`.
        folder: `safety.{language}.yaml` there replaces ours.

    Raises:
        UserError: the file is not of this form; what is wrong is named.
    """
    import yaml

    name, names = f"safety.{language}.yaml", [f"safety.{language}.yaml" for language in LANGUAGES]
    for given in sorted(Path(folder).glob("*.yaml")) if folder else []:
        if given.name not in names:
            raise UserError(f"{given}: no such file of prompts; there are {', '.join(names)}")
    path = Path(folder) / name
    if not folder or not path.exists():
        path = Path(__file__).parent / "prompts" / name
    try:
        book = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})") from None
    try:
        _check(book)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {said}; see the file of this name in galenic") from None
    return book


def _check(book: Any) -> None:
    """Checks a file's form.

    Raises:
        ValueError: what is wrong, and where.
    """
    slots = book["slots"]
    for name, values in slots.items():
        _texts(values, f"slots.{name}", set())
    for label, told in book["labels"].items():
        _texts([told["principle"]], f"{label}.principle", set())
        if told["behaviour"] not in get_args(Behaviour)[:2]:
            raise ValueError(f"{label}.behaviour is '{told['behaviour']}', not refuse or warn")
        if told.get("answers"):
            _texts(told["answers"], f"{label}.answers", set())
        for kind in ("requests", "safe"):
            if not told[kind]:
                raise ValueError(f"{label}.{kind} is empty")
            for one in told[kind]:
                if isinstance(one, str) and (kind == "safe" or not told.get("answers")):
                    raise ValueError(f"{label}.{kind}: '{one}' has no answer")
                request, answer = (one, one) if isinstance(one, str) else (one["request"], one["answer"])
                _texts([request], f"{label}.{kind}", set(slots))
                _texts([answer], f"{label}.{kind}", set(_SLOT.findall(request)))
    for attack, templates in book["attacks"].items():
        for template in templates:
            turns = _asked(template)
            _texts(turns, f"attacks.{attack}", {"request", "spelled", "safe", "safe_answer"})
            if isinstance(template, dict):
                _texts([template["helped"]], f"attacks.{attack}.helped", {"request", "answer"})
                if "{answer}" not in template["helped"]:
                    raise ValueError(f"attacks.{attack}.helped: holds no {{answer}}")
            if len(turns) % 2 == 0 or not {"request", "spelled"} & set(_SLOT.findall(turns[-1])):
                raise ValueError(f"attacks.{attack}: its last turn is the user's and holds {{request}}")


def _texts(values: Any, where: str, places: set[str]) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} is not a list of texts")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {value!r} is not a text")
        if other := set(_SLOT.findall(value)) - places:
            raise ValueError(f"{where}: '{value}' cannot have {{{'}, {'.join(sorted(other))}}}")
