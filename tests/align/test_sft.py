import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align_helpers import sft_base
from galenic.align import sft
from galenic.align.config import LoraConfig, SftConfig
from galenic.model import load, load_tokenizer
from galenic.pretrain.config import OptimConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.runtime import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    return sft_base(tmp_path_factory.mktemp("base") / "model", tokenizer_step)


def make_config(out, base, conversations, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "conversations": str(conversations),
        "heldout": str(conversations),
        "tokens": 2560,
        "context": 128,
        "rows": 2,
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
    }
    return SftConfig(**{**values, **changes})


def test_an_expert_learns_its_answers_and_reruns_to_the_same_bytes(base, conversations, tmp_path):
    for name in ("a", "b"):
        sft.run(make_config(tmp_path / name, base, conversations))
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["answers"]["medical.train"] for row in rows if row["kind"] == "heldout")
    assert after < 0.8 * before
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_only_answers_carry_loss(base, conversations):
    tokenizer = load_tokenizer(base)
    samples, too_long = sft.encode_samples(str(conversations), tokenizer, 128)
    assert (len(samples), too_long) == (40, 0)
    ids, labels = samples[0]
    assert tokenizer.decode(labels[labels != IGNORE]) == "cough.</s>"
    assert np.array_equal(ids[labels != IGNORE], labels[labels != IGNORE])


def test_packed_samples_cannot_see_each_other(base, conversations):
    model, tokenizer = load(base), load_tokenizer(base)
    samples, _ = sft.encode_samples(str(conversations), tokenizer, 128)
    packed = collate([[samples[0], samples[1]]], 128, 3)
    alone = collate([[samples[1]]], 128, 3)
    start, length = len(samples[0][0]), len(samples[1][0])
    with torch.no_grad():
        both = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
        one = model(input_ids=alone["input_ids"], position_ids=alone["position_ids"]).logits
    torch.testing.assert_close(both[0, start : start + length], one[0, :length], atol=1e-5, rtol=1e-5)


def test_answer_loss_equals_one_by_one(base, conversations):
    model, tokenizer = load(base), load_tokenizer(base)
    samples = sft.encode_samples(str(conversations), tokenizer, 128)[0][:5]
    total = count = 0
    for ids, labels in samples:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if labels[position] != IGNORE:
                total -= float(scores[position - 1, ids[position]])
                count += 1
    assert sft.answer_loss(model, samples, 128) == pytest.approx(total / count, rel=1e-5)


def test_packing_repeats_epochs_and_fills_rows():
    samples = [(np.arange(n), np.arange(n)) for n in range(5, 45)]
    rows = sft.pack_samples(samples, tokens=64 * 40, context=64, seed=0)
    assert len(rows) == 40
    first = [i for row in rows for i in row][:40]
    assert len(set(first)) > 30
    assert all(sum(len(samples[i][0]) for i in row) <= 64 for row in rows)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', "without an answer"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "expected 'user'"),
        ('{"messages": []}', "at least one message"),
        ('{"text": "x"}', "not a conversation"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(base, tmp_path, conversations, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(conversations.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{says}"):
        sft.run(make_config(tmp_path / "x", base, path))


def test_nothing_that_fits_is_refused(base, tmp_path, conversations):
    with pytest.raises(UserError, match="no conversation fits 16 tokens"):
        sft.run(make_config(tmp_path / "x", base, conversations, context=16))


def test_a_context_beyond_the_model_is_refused(base, conversations, tmp_path):
    with pytest.raises(UserError, match=r"context: 256 tokens, but .* was made for 128"):
        sft.run(make_config(tmp_path / "out", base, conversations, context=256))


def test_an_adapter_of_our_own_network_gives_the_scores_that_were_measured(base, conversations, tmp_path):
    from galenic.evaluate.models import open_model

    sft.run(make_config(tmp_path / "a", base, conversations, lora=LoraConfig(rank=4)))
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["answers"]["medical.train"] for row in rows if row["kind"] == "heldout")
    assert after < 0.9 * before
    assert not any("lm_head" in n for n in load_file(tmp_path / "a" / "model" / "adapter_model.safetensors"))
    samples, _ = sft.encode_samples(str(conversations), load_tokenizer(base), 128)
    model = open_model(f"{base}+{tmp_path / 'a' / 'model'}")
    assert sft.answer_loss(model, samples, 128) == pytest.approx(after, rel=1e-4)
