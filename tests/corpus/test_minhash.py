import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.duplicates.minhash import (
    bands,
    bands_for,
    hashed,
    least_agreement,
    signatures,
    sketches,
)
from galenic.corpus.texts import column


def signed(*texts, **options):
    return signatures(column(texts), **{"seed": 1, **options})


def same(a, b):
    result = signed(a, b)
    return (result.exact[0] == result.exact[1]).all(), (result.hashes[0] == result.hashes[1]).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The  Heart\n\tpumps ", "the heart pumps"),
        ("ÉCOLE Straße ДОМ", "école straße дом"),
        ("ΟΔΟΣ", "οδος"),
        ("心脏 泵血", "心 脏泵\u3000血"),
        ("高血压hypertension病", "高 血 压 Hypertension 病"),
        ("ひらがな カタカナ", "ひ らがなカ タカ ナ"),
        ("ภาษาไทย", "ภ า ษ า ไทย"),
        ("𠀀𠀁b", "𠀀 𠀁 B"),
    ],
)
def test_case_and_space_do_not_count(a, b):
    assert same(a, b) == (True, True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("7 + 5", "7 - 5"),
        ("ab c", "a bc"),
        ("a b", "b a"),
        ("straße", "strasse"),
        ("heart", "heart."),
        ("心脏", "脏心"),
        ("a", ""),
        ("a", "a a"),
        ("\u0430", "a"),
    ],
)
def test_what_counts(a, b):
    assert same(a, b) == (False, False)


words = st.lists(
    st.text(st.sampled_from("abé ß.7Ж"), min_size=1).filter(lambda w: not w.isspace()), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(words, st.integers(2, 6))
def test_minima_are_those_of_all_windows(words, n):
    words = " ".join(words).split()
    windows = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
    whole = signed(" ".join(words), ngram=n).hashes[0]
    assert (whole == signed(*windows, ngram=n).hashes.min(axis=0)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=8), st.data())
def test_a_text_alone_or_in_a_slice_of_a_batch(texts, data):
    first = data.draw(st.integers(0, len(texts)))
    batch = signed(*texts)
    part = signatures(column(texts)[first:], seed=1)
    for whole, tail in zip(batch, part, strict=True):
        assert (whole[first:] == tail).all()
    for i, text in enumerate(texts):
        assert all((one[0] == many[i]).all() for one, many in zip(signed(text), batch, strict=True))
    assert batch.characters.tolist() == [len(text) for text in texts]


def test_equal_sets_of_shingles_are_one_near_text_and_two_exact_ones():
    assert same("a b c d e a b c d e", "a b c d e a b c d e a") == (False, True)


def test_estimates_are_unbiased_and_vary_as_theory_says():
    rng = np.random.default_rng(0)
    estimates, coarse, true = [], [], 80 / 120
    for seed in range(400):
        vocabulary = [f"{w:x}" for w in rng.integers(0, 2**62, 120)]  # one word a shingle
        result = signed(" ".join(vocabulary[:100]), " ".join(vocabulary[20:]), ngram=1, seed=seed)
        estimates.append((result.hashes[0] == result.hashes[1]).mean())
        bytes_ = sketches(result.hashes)
        coarse.append(((bytes_[0] == bytes_[1]).mean() - 1 / 256) / (1 - 1 / 256))
    deviation = (true * (1 - true) / 128) ** 0.5
    for values in (estimates, coarse):
        assert abs(np.mean(values) - true) < 4 * deviation / 400**0.5
        assert 0.9 < np.std(values) / deviation < 1.1


EXACT = ["8558a9e656a91478", "e7a9e135760a7616", "b94fc3de93405201", "ea86ad79b7c157c1"]
HASHES = [[2053641102, 3445673157, 1272942171, 3146530082], [34355562, 762007004, 1356775449, 836602722]]
BANDS = ["b7d673470072752c", "7c83d7b073317968", "369342cfbad22a6f", "6cd5b75c0a887381"]
ID = ["a848ef435172a16c", "49eea5eb4591444f"]


def test_bytes_are_the_same_on_every_machine():
    result = signed("Aspirin 阻断 COX-1.", "one two three four five six", permutations=4, seed=7)
    assert [f"{x:016x}" for x in result.exact.ravel()] == EXACT
    assert result.hashes.tolist() == HASHES
    assert [f"{x:016x}" for x in bands(result.hashes, 2).ravel()] == BANDS
    assert [f"{x:016x}" for x in hashed(column(["a/1"])).ravel()] == ID


def test_broken_utf8_reads_no_byte_of_the_next_text():
    def texts(data, ends):
        buffers = [None, pa.py_buffer(np.array([0, *ends], np.int64)), pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.large_string(), len(ends), buffers)

    a = signatures(texts(b"heart \xe5\xbf" + b"\x83 abc", (8, 13)), seed=1)
    b = signatures(texts(b"heart \xe5\xbf" + b"zzz", (8, 11)), seed=1)
    assert (a.hashes[0] == b.hashes[0]).all() and (a.exact[0] == b.exact[0]).all()
    assert not (a.exact[0] == signed("heart").exact[0]).any()  # the broken word is one


def test_hashes_of_ids_see_every_byte():
    ids = ["a/1", "A/1", "a/1 ", "a/11", "", "\0", "\0\0"]
    assert len(np.unique(hashed(column(ids)), axis=0)) == len(ids)
    assert (hashed(column(ids[2:])) == hashed(column(ids))[2:]).all()


def test_bands_agree_where_their_minima_do():
    hashes = np.random.default_rng(0).integers(0, 2**32, (2, 128), dtype=np.uint32)
    hashes[1, 8:24] = hashes[0, 8:24]
    equal = np.equal(*bands(hashes, 16).T)
    assert equal.tolist() == [False, True, True] + [False] * 13


def test_settings_that_follow_from_the_threshold():
    assert [bands_for(threshold) for threshold in (0.95, 0.85, 0.7, 0.5)] == [8, 16, 32, 64]
    assert [least_agreement(threshold) for threshold in (0.5, 0.85, 1.0)] == [65, 109, 128]
    for threshold in np.linspace(0.3, 1, 30):
        count = bands_for(threshold)
        assert 1 - (1 - threshold ** (128 // count)) ** count >= 0.9
