"""The whole pipeline on small sources at random, next to a plain recount of what they hold."""

import json
import random
import shutil
from collections import Counter
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galenic.corpus import corpus
from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.contamination.decontaminate import Decontamination
from galenic.corpus.mixtures.sampling import Sampling
from galenic.corpus.privacy.deidentify import Deidentification
from galenic.corpus.scores import scorer
from galenic.corpus.scores.scorer_config import ScorerConfig
from galenic.corpus.units import plan_units
from galenic.runtime import read_json, write_jsonl

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("daft")

WORDS = [
    f"{a}{b}" for a in ("ca", "be", "do", "fi", "gu", "ha") for b in ("rd", "rn", "st", "lt", "mp", "nk", "x")
]
QUESTION = "Which of the following drugs is the first choice for the control of persistent asthma in an adult smoker?"
KINDS = (
    "prose",
    "same",
    "near",
    "asked",
    "short",
    "advert",
    "empty",
    "null",
    "no field",
    "broken",
    "blank",
    "named",
)


def prose(rng, sentences=6):
    def sentence():
        return "The {} and the {} have {} with {} of the {}.".format(*rng.choices(WORDS, k=5))

    return " ".join(sentence() for _ in range(sentences))


def line(kind, rng, earlier):
    """One line of a file."""
    text = prose(rng)
    if kind == "same" and earlier:
        text = rng.choice(earlier)
    elif kind == "near" and earlier:
        text = rng.choice(earlier) + " And so on."
    elif kind == "asked":
        text = f"{prose(rng, 14)} {QUESTION} {prose(rng, 14)}" if rng.random() < 0.5 else QUESTION
    elif kind == "short":
        text = "fever"
    elif kind == "advert":
        text = "Buy now! Limited time offer, free shipping, money back guarantee, order now and call now."
    elif kind == "named":
        text = f"Karen Wilson came. {text}"
    elif kind in ("empty", "null"):
        text = "" if kind == "empty" else None
    elif kind == "broken":
        return f'{{"text": "{text}'
    elif kind == "blank":
        return "  "
    if text:
        earlier.append(text)
    row = {"words" if kind == "no field" else "text": text}
    if rng.random() < 0.5:
        row["key"] = f"k{rng.randrange(12)}"
    return json.dumps(row)


def recount(source, file, lines):
    """The ids that a source's records must have."""
    ids, offset = [], 0
    for one in lines:
        if one.strip():
            try:
                row = json.loads(one)
            except ValueError:
                row = {}
            known = row.get("key") if "text" in row else None
            ids.append(f"{source}/{known or f'{file}:{offset}'}")
        offset += len(one.encode()) + 1
    return ids


def shingles(text):
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A scorer that knows two scores and a class."""
    folder = tmp_path_factory.mktemp("scorer")
    rng = random.Random(0)
    rows = [
        {"text": prose(rng, 2) + " fever" * (n % 4), "educational": n % 4 / 3, "knowledge": n % 2,
         "general": ("medicine", "history")[n % 2], "medical": n % 2 == 0, "group": f"g{n}"}
        for n in range(300)
    ]  # fmt: skip
    write_jsonl(folder / "labels.jsonl", rows)
    scorer.run(
        ScorerConfig(out=str(folder / "out"), labels=[str(folder / "labels.jsonl")], bits=10, epochs=2)
    )
    return str(folder / "out")


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.lists(st.lists(st.sampled_from(KINDS), max_size=30), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    limit=st.none() | st.integers(0, 9),
    floor=st.sampled_from([0.0, 0.9]),
)
def test_every_record_is_somewhere_once_and_cuts_change_nothing(
    model, tmp_path_factory, data, seed, limit, floor
):
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(seed)
    earlier, expected, given_sources = [], [], []
    for number, kinds in enumerate(data):
        name = f"s{number}"
        lines = [json.dumps({"text": prose(rng), "key": "first"})]  # a field that no record has is refused
        lines += [line(kind, rng, earlier) for kind in ["prose"] * 3 + kinds]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        expected += recount(name, f"{name}.jsonl", lines)
        more = {"limit": limit} if number == 1 else {"deidentify": number == 0, "weight": 2.0}
        place = {"path": str(folder / f"{name}.jsonl"), "format": "jsonl", "licence": "ours"}
        given_sources.append(
            SourceConfig(name=name, id_column="key", group=f"g{number % 2}", **place, **more)
        )
    (folder / "names.txt").write_text("Karen Wilson\n")
    write_jsonl(folder / "asked.jsonl", [{"question": QUESTION, "answer": "a steroid"}])
    config = CorpusConfig(
        out="",
        sources=given_sources,
        deidentification=Deidentification(names=(str(folder / "names.txt"),)),
        decontamination=Decontamination(evaluations=(str(folder / "asked.jsonl"),)),
        scorer=model,
        sampling=Sampling(
            quality_floor=floor,
            score={"educational": 1, "knowledge": 2},
            rank_within="group",
            score_tiers={0.2: 4, 0.9: 1},
            class_factors={"general": {"history": 0.5}, "source": {"s2": 0.0}},
            most_repeats=5,
        ),
        max_failures=1,
        heldout_share=0.2,
        workers=1,
    )
    tables = []
    for size in (1_000_000, 700):
        out = folder / str(size)
        out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "plan_units", lambda sources, _, size=size: plan_units(sources, size))
            corpus.run(CorpusConfig(**{**vars(config), "out": str(out)}))
        tables.append(
            [parquet.read_table(out / f"{name}.parquet").to_pylist() for name in ("documents", "ledger")]
        )
    documents, ledger = tables[0]
    assert tables[1][0] == documents
    key = lambda row: (row["id"], row["reason"], row["detail"], row["text"])  # noqa: E731
    assert sorted(tables[1][1], key=key) == sorted(ledger, key=key)

    # ---- everything is somewhere, once
    ids = [row["id"] for row in documents]
    assert len(set(ids)) == len(ids)
    assert Counter(ids + [row["id"] for row in ledger]) == Counter(expected)
    stats, sources = read_json(out / "stats.json"), read_json(out / "sources.json")
    assert stats["documents_in"] == len(expected) and stats["kept"] == len(documents)
    assert stats["dropped"] == dict(sorted(Counter(row["reason"] for row in ledger).items()))
    for name, row in sources.items():
        read = [one for one in expected if one.startswith(f"{name}/")]
        assert row["documents"] + sum(row["dropped"].values()) == len(read)

    # ---- and is what the rules say
    texts = {row["id"]: row["text"] for row in documents}
    assert not any(QUESTION in text for text in texts.values())
    assert not any("Wilson" in row["text"] for row in documents + ledger if row["source"] == "s0")
    assert all(
        0 < row["weight"] <= 5 and row["quality"] >= floor and row["source"] != "s2" for row in documents
    )
    assert limit is None or sources["s1"]["documents"] <= limit
    stands = Counter(
        row["detail"] for row in ledger if row["reason"] in ("exact duplicate", "near duplicate")
    )
    assert all(row["duplicates"] == 1 + stands[row["id"]] for row in documents)
    train, heldout = ([r for r in documents if r["split"] == s] for s in ("train", "heldout"))
    for one, other in product(train, heldout):
        a, b = shingles(one["text"]), shingles(other["text"])
        assert len(a & b) < 0.97 * len(a | b)
    shutil.rmtree(folder)
