"""Activation checkpointing: what the backward pass computes again instead of keeping.

`full` keeps a layer's input only. `selective` keeps the results of matrix products, attention and communication too,
which cost the most to compute, and repeats what lies between: norms, rotation, convolution, gates.

Source: arXiv 2205.05198, section 5 (selective activation recomputation).
"""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def _kept(compiled: bool) -> list[Any]:
    """Operations whose results are worth keeping; what this build of PyTorch does not have is left out.

    Flex attention is one to a compiled layer; elsewhere it is compiled by itself and looks like any such code.
    """
    aten = torch.ops.aten
    operations = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default]
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ):
        if hasattr(aten, name):
            operations.append(getattr(aten, name).default)
    flex = "flex_attention" if compiled else "inductor_compiled_code"
    if hasattr(torch.ops.higher_order, flex):
        operations.append(getattr(torch.ops.higher_order, flex))
    for name in ("all_reduce", "all_gather_into_tensor"):
        if hasattr(torch.ops._c10d_functional, name):
            operations.append(getattr(torch.ops._c10d_functional, name).default)
    return operations


def recompute(layer: Any, how: Literal["none", "selective", "full"], *, compiled: bool = False) -> None:
    """Makes a layer forget on its way forward what it can compute again, in place.

    Args:
        layer: a decoder layer.
        how: see above.
        compiled: whether the layer is going to be compiled.
    """
    if how == "none":
        return
    # Nothing in a layer draws random numbers.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept(compiled))
    layer.forward = partial(checkpoint, layer.forward, **options)
