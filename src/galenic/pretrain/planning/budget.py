"""What training costs, by formula: parameters, FLOPs, seconds; bytes are in `memory`. No weights, no torch.

    shapes(config) --> parameters --> FLOPs a token --> seconds

Conventions, as in the papers that report MFU (PaLM, arXiv 2204.02311, appendix B; Megatron-LM, arXiv 2104.04473): a
multiplication with its addition counts as 2 FLOPs; backward costs twice the forward pass; what activation
checkpointing computes again does not count as useful (MFU) but keeps the hardware busy (HFU). Of attention, only
pairs that may see each other count: kernels that compute hidden pairs too work more than is counted here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from galenic.pretrain.config import PhaseConfig

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
        counts[group(name)] += prod(shape)
    return Parameters(**counts)


def group(name: str) -> str:
    """Returns which field of `Parameters` counts a parameter."""
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


def phase_flops(config: Any, phase: PhaseConfig, sources: Mapping[str, Any]) -> Flops:
    """Returns the FLOPs of a token of a phase, for plan and MFU alike; attention is within each source's mean document.

    Args:
        config: of the network.
        phase: its context and mixture.
        sources: as in the shards' meta.json; a source whose documents are not counted yet fills its rows.
    """
    total, attention = sum(phase.mixture.values()), 0.0
    for source, share in phase.mixture.items():
        counts = sources[source]["train"]
        mean = counts["tokens"] / counts["documents"] if share and counts.get("documents") else None
        attention += share / total * flops(config, phase.context, mean).attention
    return replace(flops(config, phase.context), attention=attention)


def seconds(work: float, *, devices: int, peak_tflops: float, mfu: float) -> float:
    """Returns the time of `work` FLOPs: work / (devices x peak x share of the peak that is reached)."""
    return work / (devices * peak_tflops * 1e12 * mfu)
