"""Small model folders on disk: a base and experts with known task vectors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.self_attn.W_pack.weight": (72, 24),
    "model.layers.0.self_attn.o_proj.weight": (24, 24),
    "model.norm.weight": (24,),
    "scale": (),
    "lm_head.weight": (40, 24),
}


def make_states(experts=3, seed=0, dtype=torch.float32, shapes=SHAPES, norms=None):
    """Returns a base and experts; expert t's task vector is about `norms[t]` times as long as a unit one."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: torch.randn(shape, generator=generator).mul(0.02).to(dtype) for name, shape in shapes.items()
    }
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = []
    for t in range(experts):
        size = 0.002 * (norms[t] if norms else t + 1)
        own = {name: torch.randn(shape, generator=generator) + common[name] for name, shape in shapes.items()}
        states.append({name: (base[name].float() + size * own[name]).to(dtype) for name in shapes})
    return base, states


def write_folder(folder: Path, state, config=None, vocabulary=None, shards=1):
    folder.mkdir(parents=True)
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {
            f"model-{i:05d}-of-{shards:05d}.safetensors": names[i - 1 :: shards] for i in range(1, shards + 1)
        }
        for file, part in files.items():
            save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "dtype": "float32", "rope_theta": 1e4} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_x.py").write_text("# code\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# parent\n")
    vocabulary = vocabulary or {"a": 0, "b": 1, "c": 2}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


@pytest.fixture
def states():
    return make_states


@pytest.fixture
def write():
    return write_folder


@pytest.fixture
def family(tmp_path):
    """A base and three experts on disk, the second expert sharded."""
    base, experts = make_states()
    folders = [write_folder(tmp_path / "base", base)]
    folders += [write_folder(tmp_path / f"expert{t}", s, shards=1 + t % 2) for t, s in enumerate(experts)]
    return folders
