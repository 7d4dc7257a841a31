"""PEFT's LoRA on an exported folder: trains, merges back, and comes home."""

import numpy as np
import pytest
from parity_helpers import drive, our_logits, random_folder, random_tokens

from galenic.model import load

pytestmark = pytest.mark.parity
TARGETS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_lora_trains_and_merges_back(tmp_path):
    model = random_folder(tmp_path / "model")
    rows = [random_tokens(24), random_tokens(24, seed=2)]
    places = {name: tmp_path / name for name in ("adapter", "merged")}
    theirs = drive(
        "newest",
        "with_peft",
        tmp_path / "peft",
        folder=tmp_path / "model",
        rows=rows,
        targets=TARGETS,
        **places,
    )
    losses = theirs["losses"]
    assert np.isfinite(losses).all() and (np.diff(losses) < 0).all() and losses[-1] < losses[0] - 0.1
    assert sorted(theirs["trained"]) == sorted(TARGETS)
    before = np.stack([our_logits(model, row) for row in rows])
    assert np.abs(theirs["adapter"] - before).max() > 0.1  # the adapter does something
    for way in ("reloaded", "merged"):
        assert np.abs(theirs["adapter"] - theirs[way]).max() < 1e-4, way
    assert theirs["adapter_greedy"].tolist() == theirs["merged_greedy"].tolist()
    home = load(places["merged"])
    assert np.abs(np.stack([our_logits(home, row) for row in rows]) - theirs["merged"]).max() < 1e-5
    print(f"LoRA losses: {losses.round(3).tolist()}")
