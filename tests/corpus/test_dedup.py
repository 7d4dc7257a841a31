import itertools
import random

import numpy as np
import pytest

from galenic.corpus.duplicates.dedup import NUM_HASHES, cluster, deduplicate, near_pairs
from galenic.corpus.records import Document


def document(key, text):
    return Document(id=key, text=text, source="hpo", licence="", language="en", category="", department="")


def shingles(text, n=5):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def corpus():
    """Texts of 120 random words; some are copies with 1, 3 or 30 words changed."""
    rng = random.Random(5)
    vocabulary = [f"word{i}" for i in range(400)]
    texts = {}
    for number in range(20):
        words = rng.choices(vocabulary, k=120)
        texts[f"d{number:02d}"] = " ".join(words)
        for changed in (1, 3, 30) if number < 8 else ():
            other = list(words)
            for place in rng.sample(range(120), changed):
                other[place] = "changed"
            texts[f"d{number:02d}-{changed:02d}"] = " ".join(other)
    return texts


def test_agrees_with_brute_force_jaccard():
    texts = corpus()
    expected = {
        frozenset(pair)
        for pair in itertools.combinations(texts, 2)
        if jaccard(texts[pair[0]], texts[pair[1]]) >= 0.8
    }
    borderline = {
        frozenset(p)
        for p in itertools.combinations(texts, 2)
        if 0.68 < jaccard(texts[p[0]], texts[p[1]]) < 0.9
    }
    assert expected and not borderline <= expected  # there is something to find and something to leave
    kept, removed = deduplicate([document(k, t) for k, t in texts.items()], threshold=0.8, seed=1)
    assert {d.id for d in kept} | {r.document.id for r in removed} == set(texts)
    found = {frozenset((r.document.id, r.kept)) for r in removed}
    assert found - expected <= borderline
    for pair in expected - borderline:
        assert not pair <= {d.id for d in kept}
    assert not any(r.exact for r in removed)


def test_exact_duplicates_keep_the_longest_then_the_smallest_and_count():
    rows = [
        document("b", "The  Heart pumps \n blood"),
        document("a", "the heart pumps  blood"),
        document("c", "the heart pumps  blood"),
        document("d", "7 + 5 = 12 is right"),
        document("f", "7 - 5 = 12 is right"),
        document("e", "something else entirely"),
    ]
    kept, removed = deduplicate(rows, threshold=0.9, seed=1)
    assert [(d.id, d.duplicates) for d in kept] == [("b", 3), ("d", 1), ("e", 1), ("f", 1)]
    assert [(r.document.id, r.kept, r.exact) for r in removed] == [("a", "b", True), ("c", "b", True)]
    again = deduplicate(list(reversed(rows)), threshold=0.9, seed=1)
    assert again == (kept, removed)


def test_near_pairs_and_clusters():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, size=(6, NUM_HASHES), dtype=np.uint32)
    signatures[3] = signatures[1]
    signatures[3, ::16] += 1  # 8 of 128 places differ
    signatures[5] = signatures[3]
    assert near_pairs(signatures, threshold=0.9) == [(1, 3), (1, 5), (3, 5)]
    assert near_pairs(signatures, threshold=0.99) == [(3, 5)]
    assert cluster([(1, 3), (3, 5)], 6).tolist() == [0, 1, 2, 1, 4, 1]


@pytest.mark.parametrize(
    "pairs", [[(2, 3), (0, 1), (1, 2)], [(0, 3), (2, 3), (1, 2)], [(1, 2), (0, 1), (2, 3)]]
)
def test_clusters_do_not_depend_on_the_order_of_pairs(pairs):
    assert cluster(pairs, 4).tolist() == [0, 0, 0, 0]
