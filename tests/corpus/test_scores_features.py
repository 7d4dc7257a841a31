import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.scores.features import HEAD, LONGEST, MOST, PIECES, SHAPES, features
from galenic.corpus.texts import column

BITS = 20
MASK = 2**64 - 1
PRIME, START, KIND = 0x100000001B3, 0xCBF29CE484222325, 0x9E3779B97F4A7C15


def mixed(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def fnv(data, value=START):
    for byte in data:
        value = (value ^ byte) * PRIME & MASK
    return value


def expected(text):
    """The features of a text of ASCII and Han characters, written the slow way."""
    found, before, before2, run = Counter(), 0, 0, 0
    for match in re.finditer(r"[A-Za-z0-9]{1,64}|[\u3400-\u9fff]|\n[\n ]*?(?=[^\n])|([^\w\s])\1*|\n+", text):
        token = match[0]
        han = "\u3400" <= token[0] <= "\u9fff"
        word = token[0].isalnum() and not han
        plain = re.sub("[0-9]", "0", token.lower()).encode()
        value = fnv(plain if word or han else plain[:1])
        bucket = [mixed(value)]
        if before:
            bucket.append(mixed((before * PRIME & MASK) ^ value))
            if han and run >= 2:
                bucket.append(mixed((((before2 * PRIME & MASK) ^ before) * PRIME & MASK) ^ value))
        if word and len(token) >= 7:
            folded = bytes(b | 32 for b in token.encode())
            bucket += [mixed(fnv(folded[:5], KIND)), mixed(fnv(folded[-4:], KIND ^ MASK))]
        found.update(b >> 64 - BITS for b in bucket)
        before2, before, run = before, value, run + 1 if han else 0
    return found


def of(*texts):
    ids, ends, shapes = features(column(texts), BITS)
    return [Counter(ids[a:b].tolist()) for a, b in pairwise(ends)], shapes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Asthma",
        "Cardiomyopathy, J45.9; see (below)!!!",
        "哮喘是一种慢性病",
        "用药 Metformin 500 mg 二甲双胍",
        "Type 2 Diabetes\n\n- Code: E11.9",
    ],
)
def test_features_equal_the_slow_ones(text):
    assert of(text)[0][0] == expected(text)


def test_case_and_digits_do_not_matter_order_does():
    a, b, c = of("Give 5 tablets daily", "give 7 TABLETS daily", "daily give 5 tablets")[0]
    assert a == b
    assert a != c


def test_neighbours_and_slices_change_nothing():
    texts = ["one two three", "哮喘。", "", "x" * 9000, "last one here"]
    whole, shapes = of(*texts)
    for text, counted, shape in zip(texts, whole, shapes, strict=True):
        alone, alone_shape = of(text)
        assert alone[0] == counted
        assert (alone_shape[0] == shape).all()
    ids, ends, _ = features(column(texts)[1:4], BITS)
    assert Counter(ids[: ends[1]].tolist()) == whole[1]


def test_long_texts_are_read_at_the_beginning_and_in_pieces():
    words = " ".join(
        f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676 % 26)}" for i in range(20_000)
    )
    (counted,), _ = of(words)
    assert counted.total() < LONGEST
    changed = words[:HEAD] + "zzzzz" + words[HEAD + 5 :]  # the first piece begins here
    assert of(changed)[0][0] != counted
    gap = HEAD + 3000  # between two pieces
    assert of(words[:gap] + "zzzzz" + words[gap + 5 :])[0][0] == counted
    fits = words[: HEAD + PIECES * 100]
    assert of(fits[:-3] + "zzz")[0][0] != of(fits)[0][0]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="ab1 .\n哮喘é😀ひ한、Ａ", max_size=5000))
def test_any_text_is_read_and_its_shape_lies_between_0_and_1(text):
    text = text.encode("utf-8", "ignore").decode()
    ids, _, shapes = features(column([text]), BITS)
    assert len(ids) <= MOST
    assert ((ids >= 0) & (ids < 2**BITS)).all()
    assert np.isfinite(shapes).all() and shapes.min() >= 0 and shapes.max() <= 1


@pytest.mark.parametrize(
    "data", [b"\xf0\xa0", b"\xe4\xb8", b"\xff\xf0\xf0\xa0\x80", b"\x80\x80", b"a\xf0\xa0\x80"]
)
def test_bytes_that_are_no_text_do_not_hang(data):
    import pyarrow as pa

    texts = pa.array([data], type=pa.large_binary()).view(pa.large_string())
    _, ends, shapes = features(texts, BITS)
    assert len(ends) == 2 and np.isfinite(shapes).all()


def shape(text):
    return dict(zip(SHAPES, of(text)[1][0].tolist(), strict=True))


def test_shapes_tell_what_they_say():
    assert shape("Aa BB")["capitals"] == pytest.approx(0.75)
    assert shape("哮喘病")["han"] == 1
    assert shape("今天。")["ends a sentence"] == 1 and shape("Yes.\n")["ends a sentence"] == 1
    assert shape("the end is")["ends a sentence"] == 0 and shape("哮喘")["ends a sentence"] == 0
    assert shape("again and so " * 20)["repeated pairs"] > 0.8
    assert shape("one two three four five")["repeated pairs"] == 0
    assert shape("xkcd qwrt")["words without a vowel"] == 1
    assert shape("  ")["empty"] == 1 and shape("a")["empty"] == 0
