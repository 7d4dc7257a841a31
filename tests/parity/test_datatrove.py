"""Cleaning against datatrove's Gopher filters: where a text is clearly good or clearly bad, both say so."""

import json
import random
import subprocess

import pytest
from parity_helpers import DRIVERS, executable

from galenic.corpus.cleaning.clean import clean_table
from galenic.corpus.cleaning.rules import Rules

pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.parity

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 8)))


def sentence(rng):
    """Distinct words between the stop words of running text, so that no n-gram repeats by chance."""
    words = [word(rng) for _ in range(rng.randint(8, 14))]
    for stop in ("the", "of", "and"):
        words.insert(rng.randrange(len(words)), stop)
    return " ".join(words).capitalize() + "."


def good(rng):
    return "\n".join(" ".join(sentence(rng) for _ in range(4)) for _ in range(6))


def repeated_lines(rng):
    line = " ".join(sentence(rng) for _ in range(2))
    return "\n".join([line] * 8 + [sentence(rng) for _ in range(4)])


def repeated_phrase(rng):
    phrase = " ".join(word(rng) for _ in range(6))
    return " ".join(f"{phrase} and {sentence(rng)}" for _ in range(30))


def one_pair(rng):
    pair = f"{word(rng)} {word(rng)}"
    return " ".join(f"{pair} {word(rng)}" for _ in range(120)) + " the of."


def symbols(rng):
    return " ".join(f"# {word(rng)} ... {rng.randrange(10**6)} the of" for _ in range(60))


def no_stop_words(rng):
    return " ".join(word(rng) + "q" for _ in range(200)) + "."


def long_words(rng):
    return (
        " ".join("the of and" if n % 20 == 0 else word(rng) + word(rng) + word(rng) for n in range(200)) + "."
    )


BAD = {
    "repetition": (repeated_lines, repeated_phrase, one_pair),
    "quality": (symbols, no_stop_words, long_words),
}


def test_clear_cases_are_judged_alike():
    rng = random.Random(5)
    cases = [(make, make(rng)) for _ in range(15) for make in (good, *BAD["repetition"], *BAD["quality"])]
    texts = [text for _, text in cases]
    command = [str(executable("datatrove")), str(DRIVERS / "datatrove_filters.py")]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout)
    column = pa.array(texts, pa.large_string())
    ids = pa.array([str(number) for number in range(len(texts))], pa.large_string())
    table = pa.table(
        {"id": ids, "text": column, "language": pa.array(["en"] * len(texts), pa.large_string())}
    )
    _, dropped = clean_table(table, form="prose", rules=Rules())
    ours = {row["id"]: row["reason"] for row in dropped.to_pylist()}
    for number, ((make, text), (repetition, quality)) in enumerate(zip(cases, theirs, strict=True)):
        said = ours.get(str(number), "")
        told = f"{make.__name__}: ours {said!r}, theirs {repetition!r} and {quality!r}\n{text[:300]}"
        assert (said == "") == (repetition == "" and quality == ""), told
        if make in BAD["repetition"]:
            assert said == "repetition" and repetition, told
