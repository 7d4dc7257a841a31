import argparse
import doctest
import inspect
import itertools
import mailbox
import pdb
import random
import tarfile
import typing
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens import tokenizer as verb
from galenic.corpus.tokens.chat_format import SPECIAL_TOKENS
from galenic.corpus.tokens.tokenizer_merge import Bpe, encode, merge_bpe
from galenic.runtime import UserError

GENERAL = [
    "the history of the city and the people of the region",
    "def merge(left, right):\n    return left + right\n",
    "a theory of everything that the heart can hear",
] * 10
MEDICAL = [
    "hepatitis and hepatomegaly; the hepatic artery",
    "糖尿病患者应控制血糖",
    "hypertension, heart failure",
] * 10
SETTINGS = {"character_coverage": 0.9999, "max_characters": 200}


def trained(texts, vocab_size=700):
    return verb.train_bpe(texts, vocab_size=vocab_size, **SETTINGS)


@pytest.fixture(scope="module")
def pair():
    return trained(GENERAL), trained(MEDICAL)


@pytest.fixture(scope="module", params=[0.3, 0.5, 0.8])
def both(request, pair):
    return verb.merged(*pair, share=request.param, vocab_size=400)


def lengths(tokenizer, texts):
    return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def test_every_piece_encodes_to_itself(both):
    vocabulary = both.get_vocab()
    assert len(vocabulary) == 400
    assert sorted(vocabulary.values()) == list(range(400))
    pieces = [piece for piece in vocabulary if vocabulary[piece] >= len(SPECIAL_TOKENS) + 256]
    for piece in pieces:
        assert both.encode(piece, add_special_tokens=False).tokens == [piece]
    assert [both.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(10))


def test_both_vocabularies_are_in_it(both, pair):
    pieces = set(both.get_vocab())
    assert "患者" in pieces and " the" in pieces
    assert pieces <= set(pair[0].get_vocab()) | set(pair[1].get_vocab())


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_comes_back_whole(both, text):
    both.encode_special_tokens = True
    ids = both.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert both.decode(ids, skip_special_tokens=False) == text


def test_no_kind_of_text_grows_by_much():
    # Against the better of the two, which spends the whole vocabulary on its kind of text: prose, and program text.
    modules = (argparse, doctest, inspect, mailbox, pdb, random, tarfile, typing)
    kinds = [
        [text for _, text in sorted(topics.topics.items())],
        [part for module in modules for part in inspect.getsource(module).split("\n\n\n")],
    ]
    alone = [trained([t for i, t in enumerate(texts) if i % 5], 1500) for texts in kinds]
    both = verb.merged(*alone, share=0.5, vocab_size=1500)
    for own, texts in enumerate(kinds):
        mine, other, merged = (
            lengths(tokenizer, texts[::5]) for tokenizer in (alone[own], alone[1 - own], both)
        )
        assert mine < merged < other and merged < 1.12 * mine


def test_too_small_a_vocabulary_is_refused(pair):
    with pytest.raises(UserError, match=r"vocab_size: 280 is too small for \d+ characters"):
        verb.merged(*pair, share=0.5, vocab_size=280)


# ---------------------------------------------------------------------------- the rule itself


def learn(seed, merges=40):
    """A byte-pair encoding of random text over few letters, learned in the plainest way."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcde", weights=[5, 4, 3, 2, 1], k=12)) for _ in range(30)]
    parts, learned = [list(word) for word in words], []
    for _ in range(merges):
        counts = {}
        for word in parts:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        learned.append(max(sorted(counts), key=counts.__getitem__))
        ranks = {pair: rank for rank, pair in enumerate(learned)}
        parts = [list(encode(word, ranks)) for word in words]
    return Bpe(sorted(set("".join(words))), learned)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.integers(10, 80))
def test_pieces_of_any_two_stay_reachable(seed, share, pieces):
    first, second = learn(seed), learn(seed + 1)
    both = merge_bpe(first, second, share=share, pieces=pieces)
    ranks = {pair: rank for rank, pair in enumerate(both.merges)}
    made = [left + right for left, right in both.merges]
    assert len(set(made)) == len(made) and len(both.characters) + len(made) <= pieces
    known = {*first.characters, *second.characters, *(a + b for a, b in first.merges + second.merges)}
    assert set(made) <= known
    for piece in [*made, *both.characters]:
        assert list(encode(piece, ranks)) == [piece]
    # What is left out is what two of the pieces do not make.
    if len(both.characters) + len(made) < pieces:
        for piece in known - set(made) - set(both.characters):
            assert len(piece) > 2


def test_a_bpe_merged_with_itself_is_itself():
    bpe = learn(3)
    once = list({left + right: (left, right) for left, right in reversed(bpe.merges)}.values())[::-1]
    assert merge_bpe(bpe, bpe, share=0.5, pieces=1000) == Bpe(bpe.characters, once)


def test_a_piece_that_no_two_make_is_left_out():
    first = Bpe(list("abcd"), [("b", "c")])
    second = Bpe(list("abcd"), [("a", "b"), ("c", "d"), ("ab", "cd")])
    # The general one makes `bc` of `abcd`, so that `a`, `bc` and `d` are left.
    both = merge_bpe(first, second, share=0.2, pieces=100)
    assert both.merges == [("b", "c"), ("a", "b"), ("c", "d")]


@settings(deadline=None)
@given(st.text(alphabet="ehpatiso ", max_size=30))
def test_our_encoder_is_the_library_s(pair, text):
    # Words are encoded one by one; a run of letters without a space is one word.
    word = text.replace(" ", "")
    ranks = {merge: rank for rank, merge in enumerate(verb._bpe(pair[1]).merges)}
    assert pair[1].encode(word, add_special_tokens=False).tokens == list(encode(word, ranks))
