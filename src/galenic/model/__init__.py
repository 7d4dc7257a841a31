"""The Baichuan-M1 network and the model folders every other room exchanges.

    config.json + model.safetensors --load--> BaichuanM1ForCausalLM --save--> the same, plus everything that
    tokenizer.json, chat template            (train, align, merge,           lets any Hugging Face tool load it
                                              flatten, evaluate)              without Galenic

In: a model folder, or a `BaichuanM1Config` for fresh weights. Out: a model folder.

* `modeling_baichuan_m1.py`: configuration and network in one file, which travels inside every model folder. Grouped
  query attention with two head geometries (global layers and sliding-window layers), a two-tap convolution on keys
  and values before rotation, and an output head whose rows have unit length. Right with padding, packed documents,
  caches split anywhere, beams and sampling, under every attention implementation.
* `folder.py`: `load`, `save`, `load_tokenizer`. Written atomically, the same bytes for the same inputs, read
  offline, and refused with one line when something is missing or damaged.
* `export/`: the verb that takes a model out: another dtype, a plain head, fewer bits, to the Hub.

Packing: `model(input_ids, position_ids=..., labels=...)`; positions that restart at 0 begin a new document.

Paper: Baichuan-M1, arXiv 2502.12671 (architecture: sections 3 and 4); short convolution: arXiv 2411.19574.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galenic.model.folder import load, load_tokenizer, save
    from galenic.model.modeling_baichuan_m1 import BaichuanM1Config, BaichuanM1ForCausalLM

__all__ = ["BaichuanM1Config", "BaichuanM1ForCausalLM", "load", "load_tokenizer", "save"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when a name of this room is used."""
    if name not in __all__:
        raise AttributeError(f"module 'galenic.model' has no attribute {name!r}")
    from galenic.model import folder

    return getattr(folder, name)
