"""An exported folder on the oldest and the newest transformers, in environments without galenic."""

import numpy as np
import pytest
import torch
from parity_helpers import drive, random_folder, random_tokens

from galenic.model import load, load_tokenizer

pytestmark = pytest.mark.parity
VERSIONS = {"oldest": "5.19.0", "newest": "5.23.0"}
NEW_TOKENS = 24
WAYS = {"greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """Two prompts longer than the window, the shorter one padded on the left."""
    return [random_tokens(28), [3] * 6 + random_tokens(22, seed=2)]


@pytest.mark.parametrize("environment", VERSIONS)
def test_same_numbers_without_galenic(environment, rows, tokenizer_step, tmp_path):
    model = random_folder(tmp_path / "model", tokenizer=tokenizer_step)
    theirs = drive(
        environment,
        "with_transformers",
        tmp_path / environment,
        folder=tmp_path / "model",
        again=tmp_path / "again",
        rows=rows,
        ways=WAYS,
        new_tokens=NEW_TOKENS,
        version=VERSIONS[environment],
    )
    batch = {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) != 3).long()}
    real = batch["attention_mask"].bool().numpy()
    with torch.no_grad():
        ours = model(**batch).logits.numpy()
    for name in ("first", "second"):  # the folder, and what they saved from it
        assert np.abs(ours - theirs[f"{name}_logits"])[real].max() < 1e-5
        for way, settings in WAYS.items():
            out = model.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **settings
            )
            assert out.tolist() == theirs[f"{name}_{way}"].tolist(), (name, way)
    assert "trust_remote_code=True" in str(theirs["refusal"]), theirs["refusal"]
    print(f"without trust_remote_code: {theirs['refusal']}")

    ours_again = load(tmp_path / "again")
    assert all(torch.equal(t, ours_again.state_dict()[n]) for n, t in model.state_dict().items())
    text = "general fever cough asthma."
    assert load_tokenizer(tmp_path / "again").encode(text) == load_tokenizer(tmp_path / "model").encode(text)
