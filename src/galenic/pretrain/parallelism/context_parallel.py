"""Context parallelism: a row's tokens spread over the processes of one group, from outside.

A row of T tokens is cut into 2n chunks; process i of n holds chunks i and 2n - 1 - i, so that all have the same
number of keys to look at. Everything but convolution and attention works on single tokens.

    convolution   gets the last K - 1 raw keys and values of the chunk to its left, whoever holds it
    attention     own queries look at the keys and values of all processes, gathered; which of them are visible follows
                  from a query's place in the row and in its document:  start of its document <= key <= query,
                  and query - window < key in a sliding-window layer
    loss          the target of a chunk's last token stands in the next chunk, so targets travel with the tokens

From then on the model takes pieces only, in training as in evaluation, and no cache.

Source: Llama 3, arXiv 2407.21783, section 3.3.2 (all-gather based context parallelism).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from galenic.model.modeling_baichuan_m1 import (
    IGNORED,
    convolve,
    eager_attention_forward,
    restarting_positions,
)


@dataclass(frozen=True)
class Pieces:
    """Which part of every row this process holds.

    Attributes:
        group: the processes that share rows.
        ranks: how many they are.
        rank: which one this is.
    """

    group: Any
    ranks: int
    rank: int

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of this process, of 2 * ranks."""
        return self.rank, 2 * self.ranks - 1 - self.rank


def columns(context: int, ranks: int, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """The columns of a row [context] that one process holds: [context / ranks] int64, in ascending order."""
    size = context // (2 * ranks)
    own = torch.arange(size, device=device)
    return torch.cat([own + rank * size, own + (2 * ranks - 1 - rank) * size])


def own_piece(batch: dict[str, torch.Tensor], ranks: int, rank: int) -> dict[str, torch.Tensor]:
    """Cuts this process' columns out of a batch of tensors [B, T].

    Args:
        batch: `input_ids`, `labels`, `position_ids` that restart at 0 with each document, and whatever else there is a
            number for each token of.
        ranks: processes that share the rows.
        rank: which one this is.

    Returns:
        The same with [B, T / ranks] and, instead of `labels`, `shift_labels`: each position's own target.

    Raises:
        ValueError: positions that do not count from their document's start.
    """
    batch = dict(batch)
    positions, labels = batch["position_ids"], batch.pop("labels")
    starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    if bool((positions != restarting_positions(starts)).any()):
        raise ValueError("position_ids must restart at 0 with each document")
    # The first token of a document is nobody's target: nothing before it belongs to it.
    batch["shift_labels"] = F.pad(labels.masked_fill(starts, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    own = columns(positions.shape[1], ranks, rank, positions.device)
    return {name: tensor[:, own] for name, tensor in batch.items()}


# ---------------------------------------------------------------------------- across processes


class _Gather(torch.autograd.Function):
    """All processes' tensors [n, ...] of one shape; its gradient is summed over them, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, ranks: int) -> torch.Tensor:
        ctx.group, ctx.ranks = group, ranks
        gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
        distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered.unflatten(0, (ranks, -1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        exact = torch.promote_types(grad.dtype, torch.float32)
        own = grad.new_empty(grad.shape[1:], dtype=exact)
        distributed.reduce_scatter_tensor(own, grad.to(exact).flatten(0, 1).contiguous(), group=ctx.group)
        return own.to(grad.dtype), None, None


def gather(x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """Returns the tensors [n, ...] of all n processes, differentiably."""
    return _Gather.apply(x, pieces.group, pieces.ranks)


# ---------------------------------------------------------------------------- convolution


def convolve_pieces(
    kv: torch.Tensor, taps: torch.Tensor, positions: torch.Tensor, pieces: Pieces
) -> torch.Tensor:
    """Convolves this process' two chunks of raw keys and values.

    Args:
        kv: [B, T, H, D], T tokens in two chunks.
        taps: [1, 1, H, 1, K].
        positions: [1 or B, T], tokens of its own document before each one.
        pieces: which chunks these are.

    Returns:
        [B, T, H, D].
    """
    history = taps.shape[-1] - 1
    both = kv.unflatten(1, (2, -1))  # [B, 2, T / 2, H, D]
    tails = gather(both[:, :, both.shape[2] - history :], pieces)  # [n, B, 2, K - 1, H, D]
    lefts = []
    for chunk in pieces.chunks:
        left = max(chunk - 1, 0)
        holder = min(left, 2 * pieces.ranks - 1 - left)
        tail = tails[holder, :, int(left != holder)]
        lefts.append(tail if chunk else torch.zeros_like(tail))
    filled = torch.cat([torch.stack(lefts, dim=1), both], dim=2).flatten(0, 1)
    age = positions.expand(kv.shape[0], -1).unflatten(1, (2, -1)).flatten(0, 1)
    return convolve(filled, taps, age).view(kv.shape)


# ---------------------------------------------------------------------------- attention


def visible(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Which keys each query sees: those of its own document up to itself, within the window.

    Args:
        queries: [...] int64, places of the queries in the row.
        keys: [...] int64, places of the keys.
        positions: [...] int64, tokens of its own document before each query.
        window: keys a query sees at most, itself included; None: all.

    Returns:
        Bool, of the shape that the three broadcast to.
    """
    back = queries - keys
    seen = (back >= 0) & (back <= positions)
    return seen if window is None else seen & (back < window)


def piece_mask(
    implementation: str, hidden: torch.Tensor, positions: torch.Tensor, window: int | None, pieces: Pieces
):
    """The mask of own queries and all keys, in the order in which they are gathered, for one attention kernel.

    Args:
        implementation: `flex_attention` (block mask), `sdpa` (bool), `eager` (added to the scores).
        hidden: [B, T, C].
        positions: [1 or B, T].
        window: of the layers it is for.
        pieces: which part of the row this process holds.
    """
    length, device = hidden.shape[1], hidden.device
    every = [columns(length * pieces.ranks, pieces.ranks, rank, device) for rank in range(pieces.ranks)]
    queries, keys = every[pieces.rank], torch.cat(every)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
            return visible(queries[query], keys[key], places[row, query], window)

        places = positions.expand(hidden.shape[0], -1)
        rows, compiled = hidden.shape[0], device.type == "cuda"  # compiled, it never holds the whole mask
        return create_block_mask(seen, rows, None, length, len(keys), device=device, _compile=compiled)
    mask = visible(queries[:, None], keys, positions[:, None, :, None], window)
    if implementation == "eager":
        low = torch.finfo(hidden.dtype).min
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=device).masked_fill_(~mask, low)
    return mask


def gathered_attention(
    kernel: Any,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs an attention kernel on own queries [B, H, T, D] and all processes' keys and values [B, H_kv, n T, D]."""
    both = gather(torch.stack([key, value]), module.pieces)  # [n, 2, B, H_kv, T, D]
    key, value = both.movedim(0, 3).flatten(3, 4).unbind()
    return kernel(module, query, key, value, *args, **kwargs)


def split_rows(model: Any, pieces: Pieces, implementation: str) -> None:
    """Makes a model work on its piece of every row, in place.

    Args:
        model: a `BaichuanM1ForCausalLM`.
        pieces: which part of the row this process holds.
        implementation: the attention kernel underneath.
    """
    body, name = model.model, f"pieces_{implementation}"
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    AttentionInterface.register(name, partial(gathered_attention, kernel))
    model.set_attn_implementation(name)
    windows = {layer.self_attn.sliding_window for layer in body.layers}

    def masks(hidden: torch.Tensor, layout: Any, cache: Any) -> dict[bool, Any]:
        places = layout.position_ids
        return {w is not None: piece_mask(implementation, hidden, places, w, pieces) for w in windows}

    body._masks = masks
    for layer in body.layers:
        layer.self_attn.pieces = pieces
        if layer.self_attn.history:
            layer.self_attn._convolve = partial(_convolve, layer.self_attn)


def _convolve(attention: Any, kv: torch.Tensor, layout: Any, cache: Any) -> torch.Tensor:
    return convolve_pieces(kv, attention._taps(), layout.position_ids, attention.pieces)
