"""Flattening a model of another architecture on conversations."""

import json
from itertools import pairwise

import pytest
import torch

from galenic.flatten import prepare
from galenic.flatten.config import FlattenConfig
from galenic.flatten.data import read_rows
from galenic.flatten.flatten import plan, run
from galenic.flatten.proof import score
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.pretrain.data.collate import IGNORE
from galenic.runtime import UserError, read_json


def make_config(out, model, conversations, **changes):
    out.mkdir(exist_ok=True)
    values = {
        "out": str(out),
        "model": str(model),
        "conversations": [str(conversations)],
        "heldout": [str(conversations.with_name("medical.heldout.jsonl"))],
        "train_tokens": 640,
        "heldout_tokens": 256,
        "row_length": 64,
        "batch_rows": 4,
        "probes": 2,
        "trace_rows": 1,
    }
    return FlattenConfig(**(values | changes))


@pytest.fixture(scope="module")
def flattened(llama_folder, conversations, tmp_path_factory):
    out = tmp_path_factory.mktemp("flat") / "out"
    run(make_config(out, llama_folder, conversations))
    return out


def test_every_linear_layer_moves_by_its_budget_and_the_measured_model_is_saved(
    flattened, llama_folder, conversations
):
    result = read_json(flattened / "flatten.json")
    # The head is tied to the embedding, so it stays; 7 matrices in each of 2 layers.
    assert len(result["layers"]) == 14 and not any("lm_head" in row["name"] for row in result["layers"])
    for row in result["layers"]:
        assert row["relative_output_change_measured"] == pytest.approx(0.01, rel=1e-3)
        assert row["norm_after"] < row["norm_before"] or row["rolled_back"]
    assert not all(row["rolled_back"] for row in result["layers"])
    config = make_config(flattened, llama_folder, conversations)
    for split, tokens in (("train", 640), ("heldout", 256)):
        batches = read_rows(config, split, tokens)
        before, after = (score(load_any(f), batches).loss for f in (llama_folder, flattened / "model"))
        assert result["loss"][split] == pytest.approx([before, after], abs=1e-5)
    assert result["trace"]["difference"]["probes"] == 2
    assert load_tokenizer(flattened / "model").chat_template == load_tokenizer(llama_folder).chat_template


def test_rows_hold_whole_conversations_and_the_loss_is_of_answers(llama_folder, conversations, tmp_path):
    batches = read_rows(make_config(tmp_path, llama_folder, conversations), "train", 640)
    tokenizer = load_tokenizer(llama_folder)
    texts = {json.loads(line)["messages"][1]["content"] for line in conversations.read_text().splitlines()}
    for batch in batches:
        ids, labels = batch.inputs["input_ids"], batch.labels
        assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
        assert not (labels != IGNORE)[~batch.mask].any()
        for row, own in zip(ids, labels != IGNORE, strict=True):
            answers = tokenizer.decode(row[own]).split("<|im_end|>")
            assert answers.pop() == "" and set(answers) <= texts
    assert sum(len(batch.labels) for batch in batches) == 10
    alone = read_rows(make_config(tmp_path, llama_folder, conversations), "train", 640, alone=True)
    assert all(
        int((b.inputs["position_ids"][i] == 0).sum()) == 2 for b in alone for i in range(len(b.labels))
    )


def test_losses_are_those_of_conversations_alone(llama_folder, conversations, tmp_path):
    config = make_config(tmp_path, llama_folder, conversations)
    batches = read_rows(config, "heldout", 256)
    model = load_any(llama_folder)
    total = count = 0
    for batch in batches:
        for row in range(len(batch.labels)):
            starts = [*torch.where(batch.inputs["position_ids"][row] == 0)[0].tolist(), 64]
            for start, end in pairwise(starts):
                ids, labels = batch.inputs["input_ids"][row, start:end], batch.labels[row, start:end]
                with torch.no_grad():
                    scores = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                for i in torch.where(labels != IGNORE)[0].tolist():
                    total -= float(scores[i - 1, ids[i]])
                    count += 1
    assert score(model, batches).loss == pytest.approx(total / count, rel=1e-5)


def test_what_cannot_be_flattened_is_refused(
    llama_folder, conversations, tmp_path, tokenizer_step, monkeypatch
):
    with pytest.raises(UserError, match="tokens: give a tokenizer step's folder, or conversations"):
        make_config(tmp_path, llama_folder, conversations, tokens="x")
    with pytest.raises(UserError, match="heldout: "):
        make_config(tmp_path, llama_folder, conversations, heldout=[])
    with pytest.raises(UserError, match="no such file"):
        plan(make_config(tmp_path, llama_folder, tmp_path / "none.jsonl"))
    ours = {"out": str(tmp_path), "model": str(llama_folder), "tokens": str(tokenizer_step)}
    with pytest.raises(UserError, match=r"has another tokenizer than .*; give conversations"):
        run(FlattenConfig(**ours))
    monkeypatch.setattr(prepare, "keeps_apart", lambda model, sample: False)
    run(make_config(tmp_path, llama_folder, conversations, probes=0))
    assert read_json(tmp_path / "flatten.json")["rows"] < 10 * 64
