"""What training costs, by formula: parameters, FLOPs, bytes of a device, seconds. No weights, no torch.

    shapes(config) --> parameters --> FLOPs a token --> seconds
          |
          +--> state of a device (weights, gradients, moments) + activations + what is in flight --> peak memory

Conventions, as in the papers that report MFU (PaLM, arXiv 2204.02311, appendix B; Megatron-LM, arXiv 2104.04473): a
multiplication with its addition counts as 2 FLOPs; backward costs twice the forward pass; what activation
checkpointing computes again does not count as useful (MFU) but keeps the hardware busy (HFU). Of attention, only
pairs that may see each other count: kernels that compute hidden pairs too work more than is counted here.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from galenic.pretrain.config import ParallelConfig
from galenic.runtime import UserError

LOSS_CHUNK = 2**25
"""Logits that the loss holds at a time (`linear_cross_entropies`)."""

Recompute = Literal["none", "selective", "full"]


# ---------------------------------------------------------------------------- parameters


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The attention of one layer; widths in numbers per token."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    @property
    def kv(self) -> int:
        """Keys and values together."""
        return 2 * self.kv_heads * self.head_dim


def kinds(config: Any) -> list[Kind]:
    """Returns the attention of each layer of a `BaichuanM1Config`."""
    found = []
    for kind in config.layer_types:
        sliding = "sliding" in kind
        heads = config.num_swa_attention_heads if sliding else config.num_attention_heads
        found.append(
            Kind(
                heads=heads,
                kv_heads=config.num_swa_key_value_heads if sliding else config.num_key_value_heads,
                head_dim=config.hidden_size // heads,
                window=config.sliding_window if sliding else None,
            )
        )
    return found


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every parameter, as the built model has them."""
    width, inner = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for number, kind in enumerate(kinds(config)):
        layer: dict[str, tuple[int, ...]] = {}
        if config.conv_window > 1:
            taps = (1, 1, kind.kv_heads, 1, config.conv_window)
            layer |= {"self_attn.conv_k": taps, "self_attn.conv_v": taps}
        layer |= {
            "self_attn.W_pack.weight": (width + kind.kv, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by what they are."""

    embedding: int
    matrices: int
    """Of the layers."""
    head: int
    norms: int
    taps: int
    """Of the short convolution."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.matrices + self.head + self.norms + self.taps


def parameters(config: Any) -> Parameters:
    """Counts the parameters of a `BaichuanM1Config`; 14,470,764,320 with its defaults, the 14B."""
    counts = dict.fromkeys(("embedding", "matrices", "head", "norms", "taps"), 0)
    for name, shape in shapes(config).items():
        counts[_group(name)] += prod(shape)
    return Parameters(**counts)


def _group(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if "norm" in name:
        return "norms"
    return "taps" if "conv_" in name else "matrices"


# ---------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one token's forward pass."""

    matrices: float
    """Matrix products of the layers: 2 x their parameters."""
    head: float
    """2 x hidden size x vocabulary."""
    attention: float
    """Per layer 4 x hidden size (scores, mixture) x keys that a query sees on average."""
    convolution: float
    """Per layer 2 x taps x width of keys and values."""
    last: float
    """Of `matrices`, each layer's last product, which no backward pass needs computed again."""

    @property
    def forward(self) -> float:
        """The whole forward pass."""
        return self.matrices + self.head + self.attention + self.convolution

    @property
    def trained(self) -> float:
        """Forward and backward: 3 x forward. Activation checkpointing's work is not in it (MFU)."""
        return 3 * self.forward

    def computed(self, recompute: Recompute) -> float:
        """As `trained`, with what is computed again (HFU).

        `full`: the layers' forward pass but its last product, the head not; `selective`: the convolution, as matrix
        products and attention are kept (norms, rotations and activations count nowhere).
        """
        again = {
            "none": 0.0,
            "selective": self.convolution,
            "full": self.matrices - self.last + self.attention + self.convolution,
        }
        return self.trained + again[recompute]


def mean_keys(length: float, window: int | None = None) -> float:
    """Returns the keys that a query sees on average in a document of `length` tokens.

    Query t (from 0) sees min(t + 1, window) keys: (length + 1) / 2 on average without a window.
    """
    if window is None or length <= window:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def flops(config: Any, context: int, mean_document: float | None = None) -> Flops:
    """Counts one token's forward pass.

    Args:
        config: a `BaichuanM1Config`.
        context: tokens in a row.
        mean_document: tokens of a document; attention is counted as if all were of this length, which is least: longer
            and shorter ones mixed see more. None: each row is one document.
    """
    length = context if mean_document is None else min(mean_document, context)
    width, layers = config.hidden_size, kinds(config)
    return Flops(
        matrices=2.0 * parameters(config).matrices,
        head=2.0 * width * config.vocab_size,
        attention=sum(4.0 * width * mean_keys(length, kind.window) for kind in layers),
        convolution=sum(2.0 * config.conv_window * kind.kv for kind in layers) * (config.conv_window > 1),
        last=2.0 * width * config.intermediate_size * len(layers),
    )


def flops_per_token(config: Any, context: int, mean_document: float | None = None) -> float:
    """Returns the FLOPs of training on one token, forward and backward; see `flops`."""
    return flops(config, context, mean_document).trained


def seconds(work: float, *, devices: int, peak_tflops: float, mfu: float) -> float:
    """Returns the time of `work` FLOPs: work / (devices x peak x share of the peak that is reached)."""
    return work / (devices * peak_tflops * 1e12 * mfu)


# ---------------------------------------------------------------------------- devices


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices as a block of replicate x shard x context x tensor."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Devices that read different rows."""
        return self.replicate * self.shard

    @property
    def sharers(self) -> int:
        """Devices that share one copy's state: those of a row hold other parts, too."""
        return self.shard * self.context


def lay_out(parallel: ParallelConfig, devices: int) -> Layout:
    """Spreads devices as asked; `shard: 0` takes what is left.

    Raises:
        UserError: they do not come out.
    """
    fixed = parallel.replicate * parallel.context * parallel.tensor
    asked = f"replicate {parallel.replicate} x context {parallel.context} x tensor {parallel.tensor}"
    shard = parallel.shard or devices // fixed
    if shard:
        asked = f"replicate {parallel.replicate} x shard {shard} x {asked.split(' x ', 1)[1]}"
    if not shard or fixed * shard != devices:
        few = "fewer devices than asked" if devices < fixed * max(shard, 1) else "devices are left over"
        raise UserError(
            f"parallel: {few}: {asked} = {fixed * max(shard, 1)}, there are {devices}; "
            "the product must be their number (shard: 0 takes all that are left)"
        )
    return Layout(replicate=parallel.replicate, shard=shard, context=parallel.context, tensor=parallel.tensor)


def micro_rows(parallel: ParallelConfig, layout: Layout, rows: int, context: int, phase: str) -> int:
    """Returns the rows that a device computes at a time.

    Raises:
        UserError: rows or tokens that cannot be dealt out evenly.
    """
    own, over = divmod(rows, layout.data_ranks)
    if over:
        raise UserError(
            f"phases: rows of '{phase}' is {rows}, which {layout.data_ranks} data ranks (replicate x shard) cannot "
            "share evenly; take a multiple, or more context or tensor ranks"
        )
    micro = parallel.micro_rows or own
    if micro > own or own % micro:
        raise UserError(
            f"parallel.micro_rows: {micro} does not divide the {own} rows of each data rank in '{phase}'"
        )
    if context % (2 * layout.context) and layout.context > 1:
        raise UserError(
            f"phases: context of '{phase}' is {context}, no multiple of {2 * layout.context} (2 x parallel.context)"
        )
    return micro


# ---------------------------------------------------------------------------- memory


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
    if "self_attn" in name and kinds(config)[int(name.split(".")[2])].kv_heads % tensor:
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


def state(config: Any, layout: Layout, optimizer: Literal["adamw", "muon"] = "adamw", rank: int = 0) -> State:
    """Returns the state of a device: 4 bytes for each weight and gradient, 8 for AdamW's moments, 4 for Muon's.

    Muon keeps one moment for the layers' matrices; the rest has AdamW.
    """
    weights = moments = 0
    for name, shape in shapes(config).items():
        own = shard_numel(split_shape(config, name, shape, layout.tensor), layout.sharers, rank)
        weights += 4 * own
        moments += (4 if optimizer == "muon" and _group(name) == "matrices" else 8) * own
    return State(weights=weights, gradients=weights, moments=moments)


def checkpoint_bytes(config: Any, optimizer: Literal["adamw", "muon"] = "adamw") -> int:
    """Returns the bytes of one checkpoint on disk: weights and moments of one copy of the model."""
    return state(config, Layout(), optimizer).saved


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


def layer_bytes(config: Any, kind: Kind, layout: Layout, *, size: int, grouped: bool) -> dict[str, float]:
    """Returns the bytes per local token that a layer keeps for its backward pass: recompute -> bytes.

    Args:
        config: a `BaichuanM1Config`.
        kind: the layer's attention.
        layout: of the devices; tensor parallelism splits heads and the inner width, context parallelism gathers keys
            and values.
        size: bytes of a number in the products' precision.
        grouped: the attention kernel takes grouped KV heads (flex, flash); else they are copied for every head.
    """
    width, inner = config.hidden_size, config.intermediate_size / layout.tensor
    split = 1 if kind.kv_heads % layout.tensor else layout.tensor
    query, kv = width / split, kind.kv / split
    mixed = query * size + 4 * kind.heads / split  # the output and each query's log-sum
    convolved = kv * (config.conv_window > 1)
    # Rotated keys, and the values with what lies beside them: the keys before rotation or, unconvolved, all of W_pack.
    copied = not grouped and 1 < kind.kv_heads < kind.heads
    keys = (2 * query if copied else kv / 2 + (convolved or query + kv)) * layout.context
    return {
        "none": 2 * norm_bytes(config, size) + (convolved + query + keys + 4 * inner) * size + mixed,
        "selective": (width + query + kv + 2 * inner + 2 * width) * size + mixed,
        "full": width * size,
    }


def norm_bytes(config: Any, size: int) -> int:
    """Returns the bytes per token that an RMSNorm keeps: input (float32), quotient, output."""
    return config.hidden_size * (4 + 2 * size)


def memory(
    config: Any,
    layout: Layout,
    *,
    rows: int,
    micro: int,
    context: int,
    recompute: Recompute = "none",
    optimizer: Literal["adamw", "muon"] = "adamw",
    bfloat16: bool = True,
    grouped: bool = True,
) -> Memory:
    """Adds up the memory of the fullest device (rank 0); the compiler's and the allocator's losses are not in it.

    Args:
        config: a `BaichuanM1Config`.
        layout: of the devices. One device in float32 trains a plain model: nothing is gathered.
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
    tokens = micro * context // layout.context
    layers = kinds(config)
    kept = [layer_bytes(config, kind, layout, size=size, grouped=grouped) for kind in layers]
    pairs = micro * context**2 // layout.context
    masks = 0 if grouped else pairs * (len({kind.window for kind in layers}) + size * len(layers))
    rotary = tokens * 8 * sum({kind.head_dim for kind in layers})

    # ---- units of FSDP: each layer, and the rest
    sizes = {
        name: prod(split_shape(config, name, shape, layout.tensor)) for name, shape in shapes(config).items()
    }
    root = sum(number for name, number in sizes.items() if ".layers." not in name)
    layer = max(
        sum(number for name, number in sizes.items() if name.startswith(f"model.layers.{i}."))
        for i in range(len(layers))
    )
    plain = layout.devices == 1 and not bfloat16

    # ---- the loss: a chunk of logits with its softmax, later two or three arrays as large as the head
    head, width = config.vocab_size * config.hidden_size, config.hidden_size
    chunk = min(LOSS_CHUNK, tokens * config.vocab_size) * (8 if size == 4 else 12)
    after = head * 4 * (1 if size == 4 else 2)
    return Memory(
        state=state(config, layout, optimizer),
        gathered=0 if plain else (root + 2 * layer) * size,
        reduced=0 if plain else max(root, layer) * (size + 4),
        activations=int(tokens * sum(one[recompute] for one in kept)) + masks + rotary,
        recomputed=0 if recompute == "none" else int(tokens * max(o["none"] - o[recompute] for o in kept)),
        loss=tokens * (norm_bytes(config, size) + 2 * width * size) + head * 4 + max(chunk, after),
        accumulates=rows // layout.data_ranks > micro,
    )
