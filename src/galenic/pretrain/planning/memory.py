"""What a device holds while it trains, in bytes, by formula.

    state: weights, gradients, moments in float32, in shards (FSDP2)            always
    gathered: the root unit (embedding, head) and two layers, whole             FSDP2
    activations of one micro-batch                                              forward to backward
    the loss, or a unit's gradients on their way, or a layer computed again     one after the other

Sources: FSDP2's documentation (what is gathered and reduced when); Korthikanti et al. (arXiv 2205.05198) for the way to
count activations, here of this network's own operations.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from galenic.pretrain.parallelism.parallel import Degrees
from galenic.pretrain.parallelism.tensor_parallel import splits_attention, splits_mlp
from galenic.pretrain.planning.budget import Kind, Recompute, group, kinds, shapes

LOSS_CHUNK = 2**25
"""Logits that the loss holds at a time (`linear_cross_entropies`)."""

Optimizer = Literal["adamw", "muon"]

Kernel = Literal["flex", "documents", "masked", "eager"]
"""Of attention: flex or flash; sdpa on CPUs, which takes packed documents one after another; sdpa with whole masks;
attention written out."""

SHARED_STRETCH = 96
"""Tokens up to which the `documents` kernel puts documents together, under a mask."""

ALONE = Degrees(1, 1, 1, 1)
"""One process."""


# ---------------------------------------------------------------------------- state


def shard_numel(shape: tuple[int, ...], ranks: int, rank: int = 0) -> int:
    """Returns the numbers of a parameter that a rank holds: FSDP2 cuts along the first dimension, as `torch.chunk`.

    Parts are of ceil(rows / ranks) rows, so that rank 0 always has the most.
    """
    rows = -(-shape[0] // ranks)
    return max(0, min(rows, shape[0] - rank * rows)) * prod(shape[1:])


def split_shape(config: Any, name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Returns what tensor parallelism leaves of a parameter on one device.

    Matrices of the feed-forward layer are split, those and the taps of attention too if its KV heads divide;
    embedding, head and norms stay whole.
    """
    if tensor == 1 or ".layers." not in name or "norm" in name:
        return shape
    sliding = "sliding" in config.layer_types[int(name.split(".")[2])]
    if not (splits_attention(config, sliding, tensor) if "self_attn" in name else splits_mlp(config, tensor)):
        return shape
    axis = 2 if "conv_" in name else int("o_proj" in name or "down_proj" in name)
    return (*shape[:axis], shape[axis] // tensor, *shape[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of a device's share of what training keeps, all in float32."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.moments

    @property
    def saved(self) -> int:
        """What a checkpoint holds of it, and what an asynchronous one copies to the host: weights and moments."""
        return self.weights + self.moments


def state(config: Any, degrees: Degrees, optimizer: Optimizer = "adamw", rank: int = 0) -> State:
    """Returns the state of a device: 4 bytes for each weight and gradient, 8 for AdamW's moments, 4 for Muon's.

    Muon keeps one moment for the layers' matrices; the rest has AdamW.
    """
    weights = moments = 0
    for name, shape in shapes(config).items():
        own = shard_numel(split_shape(config, name, shape, degrees.tensor), degrees.shards, rank)
        weights += 4 * own
        moments += (4 if optimizer == "muon" and group(name) == "matrices" else 8) * own
    return State(weights=weights, gradients=weights, moments=moments)


def checkpoint_bytes(config: Any, optimizer: Optimizer = "adamw") -> int:
    """Returns the bytes of one checkpoint on disk: weights and moments of one copy of the model."""
    return state(config, ALONE, optimizer).saved


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, and when they are there."""

    state: State
    gathered: int
    """FSDP: the root unit (embedding, head) and two layers, whole, in the products' precision."""
    reduced: int
    """FSDP: gradients of a unit before they are shared out, in the products' precision and in float32."""
    activations: int
    """Kept from the forward to the backward pass of one micro-batch."""
    recomputed: int
    """Of the one layer that is computed again at a time."""
    loss: int
    """The last norm and the loss: a chunk of logits, gradients of the head and of the hidden states."""
    accumulates: bool
    """Gradients are there while a further micro-batch is computed."""

    @property
    def at_loss(self) -> int:
        """At the end of the forward pass."""
        early = self.state.gradients if self.accumulates else 0
        return self.state.saved + early + self.gathered + self.activations + self.loss

    @property
    def at_backward(self) -> int:
        """At the backward pass's ends: with all activations and no gradient yet, or the other way round."""
        early = self.activations + (self.state.gradients if self.accumulates else 0)
        most = max(early, self.state.gradients)
        return self.state.saved + most + self.gathered + self.reduced + self.recomputed

    @property
    def peak(self) -> int:
        """Most at any time."""
        return max(self.at_loss, self.at_backward, self.state.total)


def layer_bytes(config: Any, kind: Kind, degrees: Degrees, *, size: int, kernel: Kernel) -> dict[str, float]:
    """Returns the bytes per local token that a layer keeps for its backward pass: recompute -> bytes.

    Args:
        config: a `BaichuanM1Config`.
        kind: the layer's attention.
        degrees: of the processes; tensor parallelism splits heads and the inner width, context parallelism gathers keys
            and values.
        size: bytes of a number in the products' precision.
        kernel: of attention; with whole masks, sdpa copies KV heads for every query head.
    """
    width, inner = config.hidden_size, config.intermediate_size
    if splits_mlp(config, degrees.tensor):
        inner /= degrees.tensor
    split = 1 if kind.kv_heads % degrees.tensor else degrees.tensor
    query, kv = width / split, kind.kv / split
    mixed = query * size + 4 * kind.heads / split  # the output and each query's log-sum
    convolved = kv * (config.conv_window > 1)
    # Rotated keys, and the values with what lies beside them: the keys before rotation or, unconvolved, all of W_pack.
    copied = kernel == "masked" and 1 < kind.kv_heads < kind.heads
    keys = (2 * query if copied else kv / 2 + (convolved or query + kv)) * degrees.context
    return {
        "none": 2 * norm_bytes(config, size)
        + (convolved + query + keys + 4 * inner) * size
        + mixed
        + query * size * (kernel == "documents"),  # their outputs, put together again
        "selective": (width + query + kv + 2 * inner + 2 * width) * size + mixed,
        "full": width * size,
    }


def norm_bytes(config: Any, size: int) -> int:
    """Returns the bytes per token that an RMSNorm keeps: input (float32), quotient, output."""
    return config.hidden_size * (4 + 2 * size)


def mask_bytes(
    layers: list[Kind], tokens: int, context: int, *, size: int, kernel: Kernel, document: float
) -> tuple[int, list[int]]:
    """Returns the bytes of masks that all layers share, and of what each layer's attention keeps for each pair."""
    if kernel == "flex":
        return 0, [0] * len(layers)
    if kernel == "documents":
        stretch = min(context, max(SHARED_STRETCH, document))
        masked = [
            document < SHARED_STRETCH or (kind.window is not None and document > kind.window)
            for kind in layers
        ]
        shared = len({kind.window for kind, hides in zip(layers, masked, strict=True) if hides})
        return int(tokens * stretch * shared), [int(tokens * stretch * size) * hides for hides in masked]
    pairs, shared = tokens * context, len({kind.window for kind in layers})
    if kernel == "masked":
        return pairs * shared, [pairs * size] * len(layers)
    each = 4 if size == 4 else 6
    return pairs * shared * size, [pairs * kind.heads * each for kind in layers]


def loss_bytes(tokens: int, vocabulary: int, head: int, size: int) -> int:
    """Returns the bytes of the loss without logits (`linear_cross_entropies`) at its fullest.

    The head's gradient is in float32, from the first chunk's end on. A chunk of logits has its softmax beside it; at
    the end the gradient is made orthogonal to the head's rows, with one product as large as the head (in bfloat16 a
    float32 copy of the head, too).
    """
    rows = max(1, LOSS_CHUNK // vocabulary)
    first, other = vocabulary * min(tokens, rows), vocabulary * min(max(tokens - rows, 0), rows)
    before, cast = (4, 0) if size == 4 else (6, size)  # of the slopes; of a product that is added in float32
    moments = [8 * first, before * first + (4 + cast) * head, (8 if size == 4 else 12) * head]
    if other:
        moments += [4 * head + 8 * other, (4 + cast) * head + before * other]
    return max(moments)


def memory(
    config: Any,
    degrees: Degrees,
    *,
    rows: int,
    micro: int,
    context: int,
    recompute: Recompute = "none",
    optimizer: Optimizer = "adamw",
    bfloat16: bool = True,
    kernel: Kernel = "flex",
    document: float | None = None,
) -> Memory:
    """Adds up the memory of the fullest device (rank 0); the compiler's and the allocator's losses are not in it.

    Args:
        config: a `BaichuanM1Config`.
        degrees: of the processes. One in float32 trains a plain model: nothing is gathered.
        rows: of the global batch.
        micro: rows that a device computes at a time.
        context: tokens in a row.
        recompute: activation checkpointing.
        optimizer: whose moments are kept.
        bfloat16: precision of the products, else float32.
        kernel: of attention; all but flex keep masks or scores.
        document: tokens of a document, for the masks of the `documents` kernel; None: each row is one.
    """
    size = 2 if bfloat16 else 4
    tokens = micro * context // degrees.context
    layers = kinds(config)
    kept = [layer_bytes(config, kind, degrees, size=size, kernel=kernel) for kind in layers]
    masks, scores = mask_bytes(
        layers, tokens, context, size=size, kernel=kernel, document=context if document is None else document
    )
    rotary = tokens * 8 * sum({kind.head_dim for kind in layers})

    # ---- units of FSDP: each layer, and the rest
    sizes = {
        name: prod(split_shape(config, name, shape, degrees.tensor)) for name, shape in shapes(config).items()
    }
    root = sum(number for name, number in sizes.items() if ".layers." not in name)
    layer = max(
        sum(number for name, number in sizes.items() if name.startswith(f"model.layers.{i}."))
        for i in range(len(layers))
    )
    plain = degrees == ALONE and not bfloat16

    again = recompute != "none"
    head = config.vocab_size * config.hidden_size
    return Memory(
        state=state(config, degrees, optimizer),
        gathered=0 if plain else (root + 2 * layer) * size,
        reduced=0 if plain else max(root, layer) * (size + 4),
        activations=int(tokens * sum(one[recompute] for one in kept))
        + (masks + rotary + (0 if again else sum(scores))),
        recomputed=int(tokens * max(one["none"] - one[recompute] for one in kept)) + max(scores)
        if again
        else 0,
        loss=tokens * (norm_bytes(config, size) + 2 * config.hidden_size * size)
        + loss_bytes(tokens, config.vocab_size, head, size),
        accumulates=rows // degrees.data > micro,
    )
