import itertools
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from galenic.corpus.duplicates import dedup
from galenic.corpus.duplicates import files as dedup_files
from galenic.corpus.duplicates.dedup import EXACT, KEPT, NEAR, SAME_ID, deduplicate, matches, near_pairs
from galenic.corpus.duplicates.files import (
    connect,
    find_duplicates,
    first_rows,
    read_signatures,
    sign,
    write_signatures,
)
from galenic.corpus.duplicates.minhash import signatures
from galenic.corpus.records import Document
from galenic.corpus.texts import column

THRESHOLD = 0.8


def made(seed=3, count=60):
    """Ids and texts: originals, exact copies in other case, near copies, all shuffled and numbered by place."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = [f"word{rng.randrange(500)}" for _ in range(80)]
        texts.append(" ".join(words))
        for _ in range(rng.choice((0, 0, 1, 2))):
            texts.append("  ".join(words).upper() + " " * rng.randrange(3))
        for _ in range(rng.choice((0, 0, 1, 4))):
            place = rng.randrange(80)
            texts.append(" ".join([*words[:place], "changed", *words[place + rng.randrange(2) :]]))
    rng.shuffle(texts)
    return [f"s/{i:04d}" for i in range(len(texts))], texts


def files_of(folder, ids, texts, size, parts=1):
    """Signature files of `size` rows, written in so many parts."""
    files = []
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        cuts = np.linspace(first, last, parts + 1).astype(int)
        columns = [
            sign(column(ids[a:b]), column(texts[a:b]), threshold=THRESHOLD, seed=1)
            for a, b in itertools.pairwise(cuts)
        ]
        files.append(folder / f"unit-{first:05d}.npy")
        write_signatures(files[-1], columns)
    return files


def verdicts(files, out, workers=1):
    find_duplicates(files, out, threshold=THRESHOLD, workers=workers)
    assert sorted(path.name for path in out.iterdir()) == [file.name for file in files]
    return np.concatenate([np.load(out / file.name) for file in files])


def expected(ids, texts):
    """What `deduplicate` says, as (keeper, count, reason) of each row."""
    documents = [
        Document(id=i, text=t, source="s", licence="", language="en", category="", department="")
        for i, t in zip(ids, texts, strict=True)
    ]
    kept, removed = deduplicate(documents, threshold=THRESHOLD, seed=1)
    rows = {d.id: (ids.index(d.id), d.duplicates, KEPT) for d in kept}
    rows |= {r.document.id: (ids.index(r.kept), 0, EXACT if r.exact else NEAR) for r in removed}
    return [rows[i] for i in ids]


@pytest.mark.parametrize(
    ("size", "parts", "span", "chunk"), [(1000, 1, 1 << 23, 1 << 18), (37, 3, 60, 40), (1, 1, 60, 64)]
)
def test_units_ranges_and_chunks_change_nothing(tmp_path, monkeypatch, size, parts, span, chunk):
    monkeypatch.setattr(dedup_files, "RANGE", span)
    monkeypatch.setattr(dedup, "CHUNK", chunk)
    ids, texts = made(count=60 if size > 1 else 12)
    rows = expected(ids, texts)
    assert {reason for _, _, reason in rows} == {KEPT, EXACT, NEAR}
    files = files_of(tmp_path, ids, texts, size, parts)
    assert verdicts(files, tmp_path / "out").tolist() == rows


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Daft leaves its workers' pipes open
def test_workers_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup_files, "FEW", 0)
    files = files_of(tmp_path, *made(), 50)
    for workers in (1, 2):
        verdicts(files, tmp_path / str(workers), workers)
    for file in files:
        assert (tmp_path / "1" / file.name).read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_tasks_in_any_order(tmp_path, monkeypatch):
    files = files_of(tmp_path, *made(), 50)
    straight = verdicts(files, tmp_path / "straight")

    def shuffled(function, units, **_):
        for unit in random.Random(1).sample(units, len(units)):
            yield function(unit)

    monkeypatch.setattr(dedup_files, "map_units", shuffled)
    assert (verdicts(files, tmp_path / "shuffled") == straight).all()


def test_counts_cover_every_row_and_the_longest_stays(tmp_path):
    ids, texts = made()
    verdict = verdicts(files_of(tmp_path, ids, texts, 40), tmp_path / "out")
    kept = verdict["reason"] == KEPT
    assert verdict["count"].sum() == len(ids) and (verdict["count"][kept] > 0).all()
    for row, (keeper, _, reason) in enumerate(verdict.tolist()):
        assert verdict["reason"][keeper] == KEPT
        assert (-len(texts[keeper]), keeper) <= (-len(texts[row]), row)
        if reason == KEPT:
            assert keeper == row


def test_the_first_row_of_an_id_stays_and_later_ones_do_not_count(tmp_path):
    base = [f"w{i}" for i in range(60)]
    texts = [
        " ".join(base),  # stays: later rows of longer text have an id that was there
        "something else altogether, of which there is no other",
        " ".join([*base, "more"]),  # near to the first, its id is the second's
        " ".join([*base, "more", "words"]),  # near to the first, its id is the first's
        " ".join(base).upper(),  # exact copy of the first
        " ".join(
            [*base, "more"]
        ),  # exact copy of a row that goes because of its id: near to the first, and longer
    ]
    ids = ["a", "b", "b", "a", "c", "d"]
    verdict = verdicts(files_of(tmp_path, ids, texts, 2), tmp_path / "out")
    assert verdict.tolist() == [
        (5, 0, NEAR),
        (1, 1, KEPT),
        (1, 0, SAME_ID),
        (0, 0, SAME_ID),
        (5, 0, EXACT),
        (5, 3, KEPT),
    ]


def test_a_row_that_goes_because_of_its_id_connects_nobody(tmp_path):
    words = [f"w{i}" for i in range(100)]
    more, others = [f"x{i}" for i in range(18)], [f"y{i}" for i in range(18)]
    texts = [" ".join(each) for each in ([*more, *words], words, [*words, *others])]  # J 0.84, 0.84; 0.73
    for ids, reasons in (
        ("abc", [KEPT, NEAR, NEAR]),
        ("xbc", [KEPT, NEAR, NEAR]),
        ("aac", [KEPT, SAME_ID, KEPT]),
    ):
        folder = tmp_path / ids
        folder.mkdir()
        verdict = verdicts(files_of(folder, list(ids), texts, 9), folder / "out")
        assert verdict["reason"].tolist() == reasons


def test_empty_units(tmp_path):
    ids, texts = made()
    files = files_of(tmp_path, ids, texts, 40)
    empty = sign(column([]), column([]), threshold=THRESHOLD, seed=1)
    others = [tmp_path / f"unit-{number}.npy" for number in ("-1", "00001", "99999")]
    for other, parts in zip(others, ([], [empty], [empty, empty]), strict=True):
        write_signatures(other, parts)
    everything = sorted([*files, *others])
    assert everything[0] == others[0]
    assert (verdicts(everything, tmp_path / "out") == verdicts(files, tmp_path / "alone")).all()
    assert len(np.load(tmp_path / "out" / "unit-99999.npy")) == 0
    find_duplicates(others, tmp_path / "none", threshold=THRESHOLD, workers=1)
    assert len(np.load(tmp_path / "none" / "unit-99999.npy")) == 0
    assert first_rows(everything).tolist() == [0, 0, 40, 40, *first_rows(files)[2:], len(ids)]


def test_two_units_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one name"):
        find_duplicates(
            [tmp_path / "a" / "u.npy", tmp_path / "b" / "u.npy"], tmp_path, threshold=0.8, workers=1
        )


def test_columns_come_back(tmp_path):
    ids, texts = made(count=5)
    columns = sign(column(ids), column(texts), threshold=THRESHOLD, seed=1)
    write_signatures(tmp_path / "unit.npy", [columns])
    for there, back in zip(columns, read_signatures(tmp_path / "unit.npy"), strict=True):
        assert there.dtype == back.dtype and (there == back).all()
    size = (tmp_path / "unit.npy").stat().st_size
    assert size <= 292 * len(ids) + 512


KILLED = """
import os, signal, sys
from pathlib import Path
from galenic.corpus.duplicates import files as dedup_files

folder, left = Path(sys.argv[1]), int(sys.argv[2])
save = dedup_files.np.save

def dying(file, array, **options):
    global left
    left -= 1
    if left < 0:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, array, **options)

dedup_files.np.save = dying
files = sorted(folder.glob("unit-*.npy"))
dedup_files.find_duplicates(files, folder / "out", threshold=0.8, workers=1)
"""


def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    files = files_of(tmp_path, *made(), 40)
    verdicts(files, tmp_path / "straight")
    # at once; before `distinct`, which is written anew each time; after 4 and after 12 bands; after 2 verdicts
    for survived in (0, 2, 5, 9, 7):
        died = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(survived)], env=dict(os.environ)
        )
        assert died.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("unit-*.npy"))) == 2 < len(files)
    finished = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "1000"], env=dict(os.environ))
    assert finished.returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f.name for f in files]
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "straight" / file.name).read_bytes()


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    files = files_of(tmp_path, *made(count=10), 40)
    task = {
        "files": [str(file) for file in files],
        "edges": str(tmp_path / "out" / "edges"),
        "column": "ids",
        "range": 0,
        "ranges": 1,
        "least": 16,
    }
    connect(task)
    done = []
    monkeypatch.setattr(dedup_files, "connect", lambda task: done.append(task["column"]) or connect(task))
    verdicts(files, tmp_path / "out")
    assert done == ["exact", *[f"bands {band}" for band in range(16)]]
    done.clear()
    verdicts(files, tmp_path / "out")
    assert done == []


def test_large_buckets_take_linear_time():
    rng = np.random.default_rng(0)
    count = 20_000
    items = rng.integers(0, 256, (count, 128), dtype=np.uint8)
    family = rng.integers(0, 3, count) == 0
    items[family] = items[family.argmax()]
    items[family, 0] = 7
    found = np.concatenate(list(matches(np.full(count, 5 << 60, np.uint64), lambda rows: items[rows], 120)))
    assert len(found) == family.sum() - 1  # each to the first, not each to each
    assert (found[:, 0] == family.argmax()).all() and set(found[:, 1]) == set(np.flatnonzero(family)[1:])


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_chunks_hold_whole_buckets_or_begin_with_their_first_row(monkeypatch, chunk):
    monkeypatch.setattr(dedup, "CHUNK", chunk)
    sizes = [2, 5, 7, 8, 50, 2, 3, 101, 4]
    rows, starts = np.arange(sum(sizes)) * 10, np.cumsum([0, *sizes])
    seen = set()
    for part, cuts in dedup._chunks(rows, starts):
        assert len(part) == cuts[-1] and (len(part) <= chunk or len(cuts) == 2) and len(part) <= max(chunk, 2)
        for a, b in itertools.pairwise(cuts):
            bucket = np.searchsorted(starts, part[a] // 10, side="right") - 1
            assert part[a] == rows[starts[bucket]] and b - a > 1
            assert set(part[a:b]) <= set(rows[starts[bucket] : starts[bucket + 1]])
            seen |= set(part[a:b])
    assert seen == set(rows)


def test_every_row_is_in_one_range(tmp_path):
    files = files_of(tmp_path, *made(), 40)
    starts = first_rows(files)
    rows = []
    for part in range(4):
        task = {"edges": "", "column": "exact", "range": part, "ranges": 4}
        keys, here = dedup_files._keys(task, files, starts)
        assert (keys >> np.uint64(62) == part).all()
        rows += here.tolist()
    assert sorted(rows) == list(range(starts[-1]))


def test_buckets_against_a_dictionary():
    keys = np.random.default_rng(0).integers(0, 300, 500).astype(np.uint64) << np.uint64(40)
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        groups.setdefault(key, []).append(row)
    rows, starts = dedup.buckets(keys)
    found = [rows[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert found == [rows for key, rows in sorted(groups.items()) if len(rows) > 1]
    assert [len(part) for part in dedup.buckets(keys[:0])] == [0, 1]


def test_pairs_are_found_as_often_as_the_curve_says():
    """400 pairs at each similarity, against 1 - (1 - J^8)^16 times the chance that the estimate passes."""
    rng = np.random.default_rng(0)
    for similarity in (0.7, 0.8, 0.85, 0.9, 0.95):
        hits, pairs, agreements = 0, 400, []
        for seed in range(pairs):
            shared, single = round(200 * similarity), 200 - round(200 * similarity)
            names = [f"{x:x}" for x in rng.integers(0, 2**62, 200)]
            # each word is a shingle of its own
            texts = [
                " ".join(names[: shared + single // 2]),
                " ".join(names[:shared] + names[shared + single // 2 :]),
            ]
            hashes = signatures(column(texts), ngram=1, seed=seed).hashes
            agreements.append((hashes[0] == hashes[1]).mean())
            hits += bool(near_pairs(hashes, threshold=0.85))
        passed = np.mean(np.array(agreements) >= 0.85)
        meet = 1 - (1 - similarity**8) ** 16
        # a pair whose estimate passes agrees more, so it meets more often than pairs do
        assert passed * meet - 0.05 < hits / pairs < passed + 0.03
        if similarity >= 0.95:
            assert hits == pairs
        if similarity <= 0.7:
            assert hits == 0


def test_recall_and_precision_against_all_pairs():
    rng = random.Random(4)
    vocabulary = [f"word{i}" for i in range(300)]
    texts = []
    for _ in range(60):
        words = rng.choices(vocabulary, k=150)
        texts.append(" ".join(words))
        for changes in range(5):
            other = [rng.choice(vocabulary) if rng.random() < changes / 100 else word for word in words]
            texts.append(" ".join(other))
    sets = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (t.split() for t in texts)]
    exact = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i, j in itertools.combinations(range(len(texts)), 2)
    }
    found = set(near_pairs(signatures(column(texts), seed=2).hashes, threshold=0.85))
    surely = {pair for pair, similarity in exact.items() if similarity >= 0.92}
    assert len(surely) > 50
    assert len(surely & found) >= 0.98 * len(surely)
    assert all(exact[pair] >= 0.75 for pair in found)
    within = [pair for pair in found if exact[pair] >= 0.85]
    assert len(within) >= 0.85 * len(found)
