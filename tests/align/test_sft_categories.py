"""Categories with a loss each, rounds, and lines that are no conversations."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align_helpers import sft_base
from galenic.align import sft
from galenic.align.config import SftConfig, ShiftConfig
from galenic.align.data.conversations import CATEGORIES, check_messages, read_conversations
from galenic.model import load, load_tokenizer
from galenic.pretrain.config import CheckpointConfig, OptimConfig
from galenic.pretrain.data.collate import IGNORE
from galenic.pretrain.loop import Trainer
from galenic.runtime import UserError, numbered_jsonl, read_json, read_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    return sft_base(tmp_path_factory.mktemp("base") / "model", tokenizer_step)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, conversations):
    """The conversations, every second of them of safety, every fifth without a category, the others of knowledge."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    with open(path, "w") as file:
        for number, row in enumerate(read_jsonl(conversations)):
            category = None if number % 5 == 0 else "safety" if number % 8 < 4 else "knowledge"
            file.write(json.dumps({**row, "category": category}) + "\n")
    return path


def make_config(out, base, conversations, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "conversations": str(conversations),
        "tokens": 256,
        "context": 128,
        "rows": 2,
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
    }
    return SftConfig(**{**values, **changes})


def metrics(folder, kind):
    return [row for row in read_jsonl(folder / "metrics.jsonl") if row["kind"] == kind]


def losses(model, sample):
    """Negative log-likelihoods of the labels of one conversation alone, in float64."""
    ids, labels = sample
    with torch.no_grad():
        scores = model(input_ids=torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
    return [-float(scores[i - 1, ids[i]]) for i in range(1, len(ids)) if labels[i] != IGNORE]


# ---------------------------------------------------------------------------- categories


def test_each_category_has_its_loss(base, mixed, tmp_path):
    sft.run(make_config(tmp_path / "a", base, mixed, heldout=str(mixed)))
    model, encoded = load(base), read_conversations(str(mixed), load_tokenizer(base), 128)
    found = {}
    for index in (
        i for row in sft.pack_samples(encoded.samples, tokens=256, context=128, seed=0) for i in row
    ):
        found.setdefault(encoded.categories[index], []).extend(losses(model, encoded.samples[index]))
    [told] = metrics(tmp_path / "a", "train")
    assert set(found) == {"", "knowledge", "safety"}
    assert told["domains"] == pytest.approx(
        {name: np.mean(found[name]) for name in ("knowledge", "safety")}, rel=1e-5
    )
    assert told["loss"] == pytest.approx(np.mean([x for values in found.values() for x in values]), rel=1e-5)
    assert read_json(tmp_path / "a" / "data.json")["categories"] == {"knowledge": 16, "safety": 16}


def test_each_category_has_its_held_out_loss(base, mixed, tmp_path):
    sft.run(make_config(tmp_path / "a", base, mixed, heldout=str(mixed)))
    model, encoded = load(base), read_conversations(str(mixed), load_tokenizer(base), 128)
    found = {"": [], "knowledge": [], "safety": []}
    for sample, category in zip(encoded.samples, encoded.categories, strict=True):
        found[category] += losses(model, sample)
    everything = [x for values in found.values() for x in values]
    expected = {"mixed": everything, "mixed: knowledge": found["knowledge"], "mixed: safety": found["safety"]}
    told = metrics(tmp_path / "a", "heldout")[0]["answers"]
    assert told == pytest.approx({name: np.mean(values) for name, values in expected.items()}, rel=1e-5)


def test_documents_are_named_by_file_and_line(base, mixed):
    encoded = read_conversations(str(mixed), load_tokenizer(base), 128)
    packed = sft.pack_samples(encoded.samples, tokens=1280, context=128, seed=0)
    batches = sft.Conversations(encoded, packed, 2, 128, "mixed.jsonl")
    assert batches.documents(1) == [f"mixed.jsonl:{i + 1}" for row in packed[2:4] for i in row]
    batch = batches.batch(1, [1])
    domains = batch["domains"][0].tolist()
    lengths = [len(encoded.samples[i][0]) for i in packed[3]]
    of = [encoded.names.index(c) if (c := encoded.categories[i]) else -1 for i in packed[3]]
    laid = [domain for domain, length in zip(of, lengths, strict=True) for _ in range(length)]
    assert domains == laid + [-1] * (128 - len(laid))


def test_categories_stand_in_the_reports_order(base, tmp_path):
    path = tmp_path / "x.jsonl"
    names = ["zebra", *reversed(CATEGORIES), "ape"]
    turns = [{"role": "user", "content": "fever?"}, {"role": "assistant", "content": "cough."}]
    path.write_text("".join(json.dumps({"messages": turns, "category": n}) + "\n" for n in names))
    encoded = read_conversations(str(path), load_tokenizer(base), 128)
    assert encoded.names == [*CATEGORIES, "ape", "zebra"]
    assert sft.plan(make_config(tmp_path / "o", base, path)).facts["categories"].startswith("knowledge 1, un")
    path.write_text("".join(json.dumps({"messages": turns, "category": f"c{i}"}) + "\n" for i in range(65)))
    with pytest.raises(UserError, match="65 different categories; at most 64"):
        read_conversations(str(path), load_tokenizer(base), 128)


# ---------------------------------------------------------------------------- rounds


def test_a_round_reads_each_conversation_once():
    samples = [(np.arange(n), np.arange(n)) for n in range(5, 45)]
    packed = sft.pack_samples(samples, rounds=3, rows=7, context=64, seed=0)
    times = Counter(i for row in packed for i in row)
    assert len(packed) % 7 == 0 and set(times) == set(range(40))
    assert set(times.values()) <= {3, 4} and min(times.values()) == 3
    once = sft.pack_samples(samples, rounds=3, rows=1, context=64, seed=0)
    assert set(Counter(i for row in once for i in row).values()) == {3}
    assert packed[: len(once)] == once
    order = [i for row in once for i in row]
    assert order[:40] != order[40:80] and set(order[:40]) == set(order[40:80])


def test_rounds_train_as_long_as_they_say(base, conversations, tmp_path):
    config = make_config(tmp_path / "a", base, conversations, tokens=None, rounds=2)
    assert sft.plan(config).facts["training"].startswith("2 rounds, 2 x 128 tokens a step")
    sft.run(config)
    encoded = read_conversations(str(conversations), load_tokenizer(base), 128)
    rows = sft.pack_samples(encoded.samples, rounds=2, rows=2, context=128, seed=0)
    train = metrics(tmp_path / "a", "train")
    assert len(train) == len(rows) / 2 and train[-1]["lr"] == pytest.approx(0, abs=1e-9)
    shifted = make_config(tmp_path / "b", base, conversations, tokens=None, rounds=2, shift=ShiftConfig())
    assert sft.plan(shifted).facts["shifts"] == "after 50% of the steps and each 100 later"


def test_cut_in_a_round_it_ends_with_the_same_bytes_and_rows(base, mixed, tmp_path, monkeypatch):
    def run(name):
        changes = {"tokens": None, "rounds": 3, "heldout": str(mixed)}
        sft.run(make_config(tmp_path / name, base, mixed, checkpoints=CheckpointConfig(seconds=0), **changes))

    save, calls = Trainer.save, []

    def cut(trainer):
        save(trainer)
        calls.append(trainer.step)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    run("cut")
    run("whole")
    for file in sorted((tmp_path / "whole" / "model").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut" / "model" / file.name).read_bytes(), file.name
    told = [
        [(row["step"], row["loss"], row["domains"]) for row in metrics(tmp_path / name, "train")]
        for name in ("cut", "whole")
    ]
    assert told[0] == told[1] and len(told[0]) > 4
    assert metrics(tmp_path / "cut", "heldout") == metrics(tmp_path / "whole", "heldout")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 512, "rounds": 1}, "tokens, rounds: give one of them"),
        ({"tokens": None, "rounds": 0}, "rounds: 0 is below 1"),
        ({"tokens": 100}, "tokens: 100 is fewer than one batch of 2 x 128"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        make_config(tmp_path, "m", "c", **changes)


# ---------------------------------------------------------------------------- bad lines

USER, ANSWER = {"role": "user", "content": "fever?"}, {"role": "assistant", "content": "cough."}
SYSTEM = {"role": "system", "content": "Be kind."}
BAD = [
    ([ANSWER, USER], "message 1 is of role 'assistant', expected 'user'"),
    ([USER, USER, ANSWER], "message 2 is of role 'user', expected 'assistant'"),
    ([USER, ANSWER, ANSWER], "message 3 is of role 'assistant', expected 'user'"),
    ([USER, SYSTEM, ANSWER], "message 2 is of role 'system', expected 'assistant'"),
    ([SYSTEM, ANSWER], "message 2 is of role 'assistant', expected 'user'"),
    ([USER, {"role": "assistant", "content": " \n"}], "message 2, the assistant's, is empty"),
    ([USER, {"role": "assistant", "content": None}], "message 2 is not a role and a content"),
    ([USER, {"content": "x"}], "message 2 is not a role and a content"),
    (["fever?"], "message 1 is not a role and a content"),
    ({"role": "user"}, "at least one message, in a list"),
    (None, "at least one message, in a list"),
    ([USER], "without an answer"),
]


@pytest.mark.parametrize(("messages", "says"), BAD)
def test_a_bad_line_is_refused_by_its_number_whatever_the_model(
    base, llama_folder, conversations, tmp_path, messages, says
):
    path = tmp_path / "bad.jsonl"
    first = conversations.read_text().splitlines()[0]
    path.write_text(f"{first}\n\n{first}\n{json.dumps({'messages': messages})}\n")
    for folder in (base, llama_folder):
        with pytest.raises(UserError, match=f"bad.jsonl:4: .*{says}"):
            read_conversations(str(path), load_tokenizer(folder), 128)


def test_what_is_right_is_not_refused():
    for messages in ([USER, ANSWER], [SYSTEM, USER, ANSWER], [USER, ANSWER, USER, ANSWER, USER]):
        check_messages(messages)
    check_messages([USER, ANSWER, {"role": "tool", "content": "38.5"}, ANSWER])  # a template may know it


def test_lines_that_are_skipped_are_named_and_change_nothing_else(base, conversations, tmp_path):
    good = conversations.read_text().splitlines()
    long = json.dumps({"messages": [{**USER, "content": "fever " * 200}, ANSWER]})
    bad = [json.dumps({"messages": messages}) for messages, _ in BAD]
    lines = [*good[:3], "", "{", *bad, "[1]", long, *good[3:]]
    path = tmp_path / "medical.train.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"messages": 1, "category": 3}\n')
    sft.run(make_config(tmp_path / "a", base, path, bad_lines="skip", heldout=str(conversations)))
    sft.run(make_config(tmp_path / "b", base, conversations, heldout=str(conversations)))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    ledger = list(read_jsonl(tmp_path / "a" / "ledger.jsonl"))
    reasons = {row["line"]: row["reason"] for row in ledger}
    assert list(reasons) == [5, *range(6, 6 + len(bad)), 18, 19, 57, 58]
    assert reasons[5].startswith("not valid JSON") and reasons[57].startswith("not UTF-8 text")
    assert reasons[18] == "expected a JSON object, got list" and reasons[19].startswith(
        "longer than context: "
    )
    for (_, says), line in zip(BAD, range(6, 18), strict=True):
        assert says in reasons[line]
    told = read_json(tmp_path / "a" / "data.json")
    assert (told["conversations"], told["bad_lines"], told["longer_than_context"]) == (40, 16, 1)
    assert not (tmp_path / "b" / "ledger.jsonl").exists()


def test_a_file_of_bad_lines_only_says_so(base, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{\n[]\n")
    with pytest.raises(UserError, match="no conversation fits 128 tokens; 2 lines are no conversations"):
        read_conversations(str(path), load_tokenizer(base), 128, bad_lines="skip")
    path.write_text('{"messages": [], "category": 3}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: .*at least one message"):
        read_conversations(str(path), load_tokenizer(base), 128)
    path.write_text(json.dumps({"messages": [USER, ANSWER], "category": 3}) + "\n")
    with pytest.raises(UserError, match=r"x.jsonl:1: .*category 3 is not a text"):
        read_conversations(str(path), load_tokenizer(base), 128)


def test_lines_are_numbered_as_in_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": 1}\n\n{"a": \xff}\n{"a": 2}\n{"a"')
    found = [(number, row if isinstance(row, dict) else "error") for number, row in numbered_jsonl(path)]
    assert found == [(2, {"a": 1}), (4, "error"), (5, {"a": 2}), (6, "error")]
    assert [number for number, _ in numbered_jsonl(path, growing=True)] == [2, 4, 5]
    with pytest.raises(UserError, match=r"x.jsonl: not UTF-8 text \(line 4: "):
        list(read_jsonl(path))
