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

from galenic.pretrain.budget import Kind, Recompute, group, kinds, shapes
from galenic.pretrain.parallel import Degrees
from galenic.pretrain.tensor_parallel import splits_attention, splits_mlp

LOSS_CHUNK = 2**25
"""Logits that the loss holds at a time (`linear_cross_entropies`)."""

Optimizer = Literal["adamw", "muon"]

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


def layer_bytes(config: Any, kind: Kind, degrees: Degrees, *, size: int, grouped: bool) -> dict[str, float]:
    """Returns the bytes per local token that a layer keeps for its backward pass: recompute -> bytes.

    Args:
        config: a `BaichuanM1Config`.
        kind: the layer's attention.
        degrees: of the processes; tensor parallelism splits heads and the inner width, context parallelism gathers keys
            and values.
        size: bytes of a number in the products' precision.
        grouped: the attention kernel takes grouped KV heads (flex, flash); else they are copied for every head.
    """
    width, inner = config.hidden_size, config.intermediate_size
    if splits_mlp(config, degrees.tensor):
        inner /= degrees.tensor
    split = 1 if kind.kv_heads % degrees.tensor else degrees.tensor
    query, kv = width / split, kind.kv / split
    mixed = query * size + 4 * kind.heads / split  # the output and each query's log-sum
    convolved = kv * (config.conv_window > 1)
    # Rotated keys, and the values with what lies beside them: the keys before rotation or, unconvolved, all of W_pack.
    copied = not grouped and 1 < kind.kv_heads < kind.heads
    keys = (2 * query if copied else kv / 2 + (convolved or query + kv)) * degrees.context
    return {
        "none": 2 * norm_bytes(config, size) + (convolved + query + keys + 4 * inner) * size + mixed,
        "selective": (width + query + kv + 2 * inner + 2 * width) * size + mixed,
        "full": width * size,
    }


def norm_bytes(config: Any, size: int) -> int:
    """Returns the bytes per token that an RMSNorm keeps: input (float32), quotient, output."""
    return config.hidden_size * (4 + 2 * size)


def loss_bytes(tokens: int, vocabulary: int, head: int, size: int) -> int:
    """Returns the bytes of the loss without logits (`linear_cross_entropies`) at its fullest.

    The head's gradient is in float32 throughout. A chunk of logits has its softmax beside it, and the slopes of the
    chunk before it; at the end the gradient is made orthogonal to the head's rows, with one product as large as the
    head (in bfloat16 a float32 copy of the head, too).
    """
    rows = max(1, LOSS_CHUNK // vocabulary)
    first, other = min(tokens, rows), min(max(tokens - rows, 0), rows)
    before = 4 if size == 4 else 6
    chunks = vocabulary * max(8 * first, before * first + 8 * other if other else 0)
    if size == 4:
        return 4 * head + max(chunks, 4 * head)
    return 4 * head + max(chunks + size * head, 8 * head)


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
    grouped: bool = True,
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
        grouped: see `layer_bytes`; without it masks are held, too: one byte a pair for both kinds of layers, and a
            number a pair in each layer.
    """
    size = 2 if bfloat16 else 4
    tokens = micro * context // degrees.context
    layers = kinds(config)
    kept = [layer_bytes(config, kind, degrees, size=size, grouped=grouped) for kind in layers]
    pairs = micro * context**2 // degrees.context
    masks = 0 if grouped else pairs * len({kind.window for kind in layers})
    scores = 0 if grouped else pairs * size  # the mask as numbers to add, which each layer's attention keeps
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
        + (masks + rotary + (0 if again else scores * len(layers))),
        recomputed=int(tokens * max(one["none"] - one[recompute] for one in kept)) + scores if again else 0,
        loss=tokens * (norm_bytes(config, size) + 2 * config.hidden_size * size)
        + loss_bytes(tokens, config.vocab_size, head, size),
        accumulates=rows // degrees.data > micro,
    )
