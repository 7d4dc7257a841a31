"""mlx-lm's baichuan_m1, written by others from the published code: same folder, same logits, same tokens."""

import numpy as np
import pytest
import torch
from parity_helpers import (
    ANSWERS,
    TOLERANCE,
    clear_prompt,
    drive,
    our_logits,
    random_folder,
    random_tokens,
)

from galenic.model import load, load_tokenizer

pytestmark = pytest.mark.parity

CONFIGURATIONS = {
    "one global layer": {"num_hidden_layers": 1},
    "one sliding layer": {"num_hidden_layers": 1, "sliding_window_layers": [0]},
    "layers in turn": {},
    "global layers only": {"sliding_window_layers": []},
    "sliding layers only": {"sliding_window_layers": [0, 1, 2, 3]},
    "sliding layers first": {"sliding_window_layers": [0, 1]},
    "a group of one": {"num_key_value_heads": 2, "num_swa_key_value_heads": 4},
    "groups of two and four": {"num_key_value_heads": 1, "num_swa_key_value_heads": 1},
    "groups of eight and three": {
        "hidden_size": 96,
        "num_attention_heads": 8,
        "num_swa_attention_heads": 6,
        "num_swa_key_value_heads": 2,
    },
    "official proportions": {
        "hidden_size": 320,
        "num_attention_heads": 10,
        "num_swa_attention_heads": 20,
        "num_swa_key_value_heads": 4,
        "rope_theta": 1e6,
    },
    "window longer than the text": {"sliding_window": 4096},
    "window of two": {"sliding_window": 2},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_same_logits_and_same_tokens(name, tmp_path):
    model = random_folder(tmp_path / "model", **CONFIGURATIONS[name])
    prompt, greedy = clear_prompt(model, length=40, new_tokens=128)
    tokens = random_tokens(96)
    job = {"tokens": tokens, "prompt": prompt, "new_tokens": 128, "prefill_step_size": 24}
    theirs = drive("mlx", "with_mlx", tmp_path / "mlx", folder=tmp_path / "model", **job)
    ours = our_logits(model, tokens)
    assert np.abs(ours).max() > 1
    for way in ("whole", "prefill", "chunks", "steps"):
        difference = np.abs(ours - theirs[way]).max()
        print(f"{name}, {way}: largest logit difference {difference:.1e}")
        assert difference < TOLERANCE, way
    assert greedy == theirs["greedy"].tolist() and len(greedy) == 128
    assert len(set(greedy)) > 16  # a text, not one word again and again


def test_text_through_the_public_interface(chat_folder, tmp_path):
    model, tokenizer = load(chat_folder), load_tokenizer(chat_folder)
    job = {"folder": chat_folder, "questions": list(ANSWERS), "new_tokens": 24}
    theirs = drive("mlx", "with_mlx_text", tmp_path / "mlx", **job)
    for index, (question, answer) in enumerate(ANSWERS.items()):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == theirs[f"prompt_{index}"].tolist()
        ours = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert ours.tolist() == theirs[f"tokens_{index}"].tolist() and ours[-1] == tokenizer.eos_token_id
        assert theirs["answers"][index] == answer and theirs[f"end_{index}"] == "stop"
        print(f"user: {question}\nmlx-lm: {answer}")
