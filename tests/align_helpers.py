"""What the tests of alignment share: tiny models of several architectures, files of pairs, tasks and conversations."""

import json
from pathlib import Path

import torch

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute chronic child adult".split()
OURS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 2,
    "num_swa_key_value_heads": 1,
    "sliding_window": 8,
    "sliding_window_layers": [1],
    "max_position_embeddings": 256,
}


def ours(vocab_size=512, seed=0, **changes):
    """A tiny network of ours; weights large enough for its distributions to differ from uniform ones."""
    from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.2}
    config = BaichuanM1Config(vocab_size=vocab_size, **{**OURS, **special, **changes})
    return BaichuanM1ForCausalLM(config)


def our_folder(folder, tokenizer, seed=0, **changes):
    """A model folder of ours with the tokenizer of a step."""
    from galenic.model import save

    save(ours(seed=seed, **changes), folder, tokenizer=tokenizer, provenance={"verb": "test"})
    return folder


def foreign(kind, vocab_size=64, seed=0, **changes):
    """A tiny model of another architecture, as transformers makes it."""
    import transformers

    names = {
        "llama": {"tie_word_embeddings": True},
        "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "sliding_window": 8},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
        "phi": {},  # its head has a bias
        "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        for name, other in (
            ("hidden_size", "n_embd"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("max_position_embeddings", "n_positions"),
        ):
            config[other] = config.pop(name)
        del config["intermediate_size"], config["num_key_value_heads"]
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**{**config, **names[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # a bias of zero would show nothing
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sft_base(folder, tokenizer):
    """A model folder of ours to fine-tune, with the library's own small weights."""
    return our_folder(folder, tokenizer, initializer_range=0.02, max_position_embeddings=128)


MODULES = (
    *("galenic.cli", "galenic.align.sft", "galenic.align.tdpo", "galenic.align.rollouts.sampling"),
    *("galenic.pretrain.loop", "peft"),
)
"""What processes that run every verb import."""


def verbs_inputs(folder, tokenizer, llama_folder, conversations):
    """Models and files that small runs of all verbs read."""
    return {
        "ours": str(our_folder(folder / "ours", tokenizer)),
        "llama": str(llama_folder),
        "pairs": write_lines(folder / "pairs.jsonl", pairs()),
        "tasks": write_lines(folder / "tasks.jsonl", tasks()),
        "conversations": str(conversations),
    }


def write_lines(path, rows):
    """Writes JSON lines; returns the path as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count=40):
    """Preference pairs: the word that follows is better than the one before."""
    return [
        {
            "prompt": f"What follows {WORDS[i % len(WORDS)]} in list {i}?",
            "chosen": f"{WORDS[(i + 1) % len(WORDS)]}.",
            "rejected": f"{WORDS[(i - 1) % len(WORDS)]} {WORDS[(i - 2) % len(WORDS)]}."
            if i % 3
            else f"{WORDS[(i - 1) % len(WORDS)]}.",
        }
        for i in range(count)
    ]


def tasks(count=24):
    """Tasks whose answer is the word that follows; a thought may come first."""
    return [
        {
            "prompt": f"What follows {WORDS[i % len(WORDS)]} in {i}?",
            "answer": f"{WORDS[(i + 1) % len(WORDS)]}.",
        }
        for i in range(count)
    ]


def rows(out, kind="train"):
    """Rows of a run's metrics."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def told(out, kind="train"):
    """The same without what a clock or the machine decides."""
    incidental = ("tokens_per_second", "seconds", "memory_gb", "mfu")
    return [{n: v for n, v in row.items() if n not in incidental} for row in rows(out, kind)]


def files(folder):
    """Name -> bytes of the files of a model folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
