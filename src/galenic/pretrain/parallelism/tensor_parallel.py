"""Tensor parallelism: every layer's matrices split over the processes of one group, from outside.

    normed hidden [B, T, C], the same on all
        |-- W_pack   rows    each process: [its q heads | its k heads | its v heads], with their taps
        |-- o_proj   columns of its q heads; the products are summed over the group
        |-- gate, up rows; down columns; summed over the group
    hidden [B, T, C], the same on all

Norms, embedding and output head are whole on every process, and so are their gradients, without another word between
them. A layer whose key/value heads do not divide keeps its attention whole.

The split matrices are DTensors, so that FSDP2, distributed checkpoints and optimizers know them as one. W_pack's rows
are regrouped first, so that one process' heads lie together; `official_rows` brings them back.

Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

import re
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import Parameter


def splits_attention(sizes: Any, sliding: bool, parts: int) -> bool:
    """Whether the attention of such layers divides: each process needs whole key/value heads with their queries.

    Args:
        sizes: the model's config or the recipe's architecture.
        sliding: sliding-window layers or global ones.
        parts: the tensor degree.
    """
    return (sizes.num_swa_key_value_heads if sliding else sizes.num_key_value_heads) % parts == 0


def splits_mlp(sizes: Any, parts: int) -> bool:
    """Whether the feed-forward layers divide."""
    return sizes.intermediate_size % parts == 0


# ---------------------------------------------------------------------------- the order of W_pack's rows


def row_order(heads: int, kv_heads: int, head_dim: int, parts: int) -> torch.Tensor:
    """Where the rows of a regrouped W_pack stand in the official one: regrouped = official[row_order].

    Official: [q of all heads | k of all | v of all]; regrouped: for each process in turn, [q of its heads | k | v].

    Returns:
        [(heads + 2 kv_heads) * head_dim] int64.
    """
    rows = torch.arange((heads + 2 * kv_heads) * head_dim)
    blocks = rows.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    return torch.cat(
        [part for own in zip(*(block.chunk(parts) for block in blocks), strict=True) for part in own]
    )


def _order_of(name: str, config: Any, parts: int) -> torch.Tensor | None:
    """The row order of a tensor by its name (a weight or an optimizer's moment of it); None if rows stay."""
    found = re.search(r"layers\.(\d+)\.self_attn\.W_pack\.weight", name)
    if found is None or parts == 1:
        return None
    sliding = int(found[1]) in config.sliding_window_layers
    if not splits_attention(config, sliding, parts):
        return None
    heads = config.num_swa_attention_heads if sliding else config.num_attention_heads
    kv_heads = config.num_swa_key_value_heads if sliding else config.num_key_value_heads
    return row_order(heads, kv_heads, config.hidden_size // heads, parts)


def regrouped_rows(name: str, tensor: torch.Tensor, config: Any, parts: int) -> torch.Tensor:
    """Turns a whole tensor in the official order of rows into the one that `parts` processes split.

    Args:
        name: of the weight, or of a moment of it: what ends in `layers.3.self_attn.W_pack.weight...` is regrouped.
        tensor: whole; anything but a matrix of the weight's rows stays as it is.
        config: the model's.
        parts: the tensor degree.
    """
    order = _order_of(name, config, parts)
    return tensor if order is None or tensor.ndim != 2 else tensor[order.to(tensor.device)]


def official_rows(name: str, tensor: torch.Tensor, config: Any, parts: int) -> torch.Tensor:
    """Undoes `regrouped_rows`."""
    order = _order_of(name, config, parts)
    return tensor if order is None or tensor.ndim != 2 else tensor[order.argsort().to(tensor.device)]


# ---------------------------------------------------------------------------- in place


def split_layer(layer: Any, mesh: DeviceMesh) -> None:
    """Splits one decoder layer over a mesh of one dimension; all processes hold the same weights before."""
    parts, attention = mesh.size(), layer.self_attn
    plan: dict[str, ParallelStyle]
    if splits_attention(attention.config, attention.sliding_window is not None, parts):
        order = row_order(attention.num_heads, attention.num_key_value_heads, attention.head_dim, parts)
        with torch.no_grad():
            attention.W_pack.weight.copy_(attention.W_pack.weight[order.to(attention.W_pack.weight.device)])
        plan = {"W_pack": ColwiseParallel(), "o_proj": RowwiseParallel()}
        parallelize_module(attention, mesh, plan, src_data_rank=None)
        if attention.history:
            for name in ("conv_k", "conv_v"):
                taps = distribute_tensor(getattr(attention, name).data, mesh, [Shard(2)], src_data_rank=None)
                setattr(attention, name, Parameter(taps))
            attention._taps = lambda: torch.cat([_local(attention.conv_k), _local(attention.conv_v)], dim=2)
        attention.num_heads //= parts
        attention.num_key_value_heads //= parts
    if splits_mlp(attention.config, parts):
        entry = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        plan["down_proj"] = RowwiseParallel()
        parallelize_module(layer.mlp, mesh, entry)  # gate and up share one sum of their input's gradients
        parallelize_module(layer.mlp, mesh, plan, src_data_rank=None)


def _local(taps: torch.Tensor) -> torch.Tensor:
    return taps.to_local() if isinstance(taps, DTensor) else taps
