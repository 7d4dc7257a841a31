import dataclasses
import json
import shutil

import numpy as np
import pytest

from galenic.corpus.mixtures.mixture_tree import (
    Size,
    as_json,
    check_repeats,
    lines,
    mixture_preview,
    repeats_by_source,
    shard_sizes,
    tree,
    warnings,
)
from galenic.corpus.tokens.shards import read_shard, write_meta, write_shard
from galenic.pretrain.config import PhaseConfig
from galenic.pretrain.data.packing import draw_documents
from galenic.runtime import UserError


def size(tokens, group="general", **changes):
    values = {
        "documents": 10,
        "bytes": 3 * tokens,
        "epoch": float(tokens),
        "heaviest": 1.0,
        "fingerprint": "0" * 12,
    }
    return Size(group=group, tokens=tokens, **{**values, **changes})


def phase(name, tokens, **mixture):
    return PhaseConfig(name=name, tokens=tokens, mixture=mixture, context=8, rows=1)


SIZES = {"web": size(1000), "code": size(500), "cases": size(100, "medical"), "empty": size(0)}
PHASES = [phase("one", 600, web=3, code=1), phase("two", 400, web=1, cases=1)]


def test_tokens_shares_and_repeats_by_hand():
    root = tree(SIZES, PHASES)
    assert (root.tokens, root.share, root.held, root.documents) == (1000, 1.0, 1600, 30)
    one, two = root.children
    assert (one.share, two.share) == (0.6, 0.4)
    general, medical = two.children
    assert (general.name, medical.name, medical.share) == ("general", "medical", 0.5)
    web, code = one.children[0].children
    assert (web.tokens, web.repeats, code.tokens, code.repeats) == (450, 0.45, 150, 0.3)
    found = {source: mean for source, (mean, most) in repeats_by_source(root).items() if mean == most}
    assert found == pytest.approx({"web": 0.65, "code": 0.3, "cases": 2.0})
    for node in (root, one, two, general):
        assert sum(child.tokens for child in node.children) == pytest.approx(node.tokens)


def test_a_source_in_two_phases_is_held_once_and_drawn_twice():
    root = tree({"web": size(1000)}, [phase("one", 600, web=1), phase("two", 400, web=1)])
    assert (root.held, root.documents, root.repeats, root.most) == (1000, 10, 1.0, 1.0)


def test_most_is_what_drawing_does_to_the_heaviest_document(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    documents = [([1] * length, 3 * length, weight) for length, weight in ((10, 1.0), (30, 4.0), (20, 2.0))]
    counts = write_shard(folder, "web", "train", documents, "uint16")
    write_meta(folder, {"sources": {"web": {"group": "general", "train": counts}}})
    root = tree(
        shard_sizes(str(tmp_path)), [phase("one", 170 * 30, web=1)]
    )  # an epoch is 10 + 120 + 40 tokens
    times = np.bincount(draw_documents(read_shard(tmp_path, "web", "train"), 170 * 30, seed=0, key="x"))
    assert times.tolist() == [30, 120, 60]
    assert root.most == 120 and root.repeats == pytest.approx(170 * 30 / 60)


def test_lines_are_aligned_and_the_tree_is_drawn():
    drawn = lines(tree(SIZES, PHASES))
    assert [line.split()[-7] for line in drawn[1:]] == (
        "curriculum one general web code two general web medical cases".split()
    )
    assert drawn[3].startswith("│  └─ general") and drawn[6].startswith("└─ two")
    assert len({line.index("0" * 12) for line in drawn if "0" * 12 in line}) == 1
    ends = {line.rindex("%") for line in drawn[1:]}
    assert len(ends) == 1


def test_json_holds_the_tree():
    values = json.loads(json.dumps(as_json(tree(SIZES, PHASES))))
    assert values["children"][1]["children"][1]["children"][0]["name"] == "cases"


def test_a_fingerprint_follows_every_part_of_a_shard(tmp_path, tokenizer_step):
    before = shard_sizes(str(tokenizer_step))
    assert before["general"].fingerprint != before["medical"].fingerprint
    seen = {before["general"].fingerprint}
    for part in ("tokens", "offsets", "bytes", "weights"):
        copy = tmp_path / part
        shutil.copytree(tokenizer_step, copy)
        path = copy / "tokens" / f"general.train.{part}.npy"
        array = np.load(path)
        array[2] += 1
        np.save(path, array)
        changed = shard_sizes(str(copy))
        assert changed["medical"].fingerprint == before["medical"].fingerprint
        seen.add(changed["general"].fingerprint)
    assert len(seen) == 5
    roots = [tree(sizes, [phase("one", 64, general=1, medical=1)]) for sizes in (before, changed)]
    assert roots[0].fingerprint != roots[1].fingerprint  # and up to the root


def test_repetition_is_warned_of_above_four_and_refused_above_the_cap():
    def over(tokens):
        return tree(SIZES, [phase("one", tokens, cases=1), phase("two", tokens, cases=1)])

    assert warnings(over(190)) == []
    assert warnings(over(250))[0].startswith("cases: read 5.00 times; beyond 4")
    assert warnings(over(600))[0].startswith("cases: read 12.0 times, above the cap of 10")
    check_repeats(over(500))
    with pytest.raises(UserError, match=r"'cases' would be read 12.0 times, .* the curriculum to 1k tokens"):
        check_repeats(over(600))
    heavy = {"cases": dataclasses.replace(SIZES["cases"], heaviest=8.0)}
    assert (
        "its most repeated document is read 16.0 times"
        in warnings(tree(heavy, [phase("one", 200, cases=1)]))[0]
    )


def test_unknown_and_empty_sources_are_refused():
    with pytest.raises(UserError, match=r"'wep', which the shards do not have .did you mean 'web'"):
        tree(SIZES, [phase("one", 64, wep=1)])
    with pytest.raises(UserError, match="'empty', which has no training documents"):
        tree(SIZES, [phase("one", 64, empty=1, web=1)])
    assert tree(SIZES, [phase("one", 64, empty=0, web=1)]).tokens == 64  # not drawn from: no harm


def test_the_preview_reads_a_tokenizer_folder(tokenizer_step):
    drawn = mixture_preview(str(tokenizer_step), [phase("one", 64_000, general=1, medical=1)])
    assert drawn[1].startswith("curriculum") and drawn[-1].startswith("! medical: read")
