"""TRL's SFTTrainer on an exported folder."""

import numpy as np
import pytest
import torch
from parity_helpers import ANSWERS, drive, random_folder

from galenic.model import BaichuanM1ForCausalLM, load_tokenizer

pytestmark = pytest.mark.parity

CONVERSATIONS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in ANSWERS.items()
]


def train(workspace, tokenizer, **job) -> tuple[BaichuanM1ForCausalLM, dict]:
    vocabulary = len(load_tokenizer(tokenizer))
    model = random_folder(workspace / "model", tokenizer=tokenizer, vocab_size=vocabulary)
    places = {"folder": workspace / "model", "checkpoints": workspace / "checkpoints"}
    # Three conversations in one batch either way: packed, they are one row.
    settings = {"conversations": CONVERSATIONS, "batch": 1 if job["packing"] else 3}
    return model, drive("newest", "with_trl", workspace / "trl", **places, **settings, **job)


def our_loss(model: BaichuanM1ForCausalLM, theirs: dict) -> float:
    names = {"input_ids", "attention_mask", "position_ids", "labels"} & set(theirs)
    with torch.no_grad():
        return model(**{name: torch.from_numpy(theirs[name]) for name in names}).loss.item()


@pytest.mark.parametrize("way", ["the model's loss", "a plain head"])
def test_trains_one_step_with_our_loss(way, tokenizer_step, tmp_path):
    losses = []
    for packing in (False, True):
        model, theirs = train(tmp_path, tokenizer_step, packing=packing, way=way)
        assert theirs["input_ids"].shape[0] == (1 if packing else 3)
        assert ("position_ids" in theirs) == packing  # positions that restart tell packed documents apart
        assert np.isfinite(theirs["norm"]) and theirs["changed"] > 0
        loss = our_loss(model, theirs)
        assert abs(float(theirs["loss"]) - loss) < 1e-4
        print(f"SFTTrainer, {way}, packing={packing}: loss {float(theirs['loss']):.6f}, ours {loss:.6f}")
        losses.append(loss)
    assert abs(losses[0] - losses[1]) < 1e-4  # the same conversations, side by side or one after the other


def test_the_trainers_own_loss_never_trains_another_head(tokenizer_step, tmp_path):
    _, theirs = train(tmp_path, tokenizer_step, packing=False, way="neither")
    assert "materialize_norm_head" in str(theirs["refusal"])
