# Copyright 2026 The Galenic Authors. Licensed under the Apache License, Version 2.0.
"""The Baichuan-M1 network: a decoder whose keys and values pass a short convolution before attention.

This one file is copied into every model folder, so it imports nothing but torch and transformers.

    token ids [B, T]
        |  embed_tokens
        v
    hidden [B, T, C] --> input_layernorm --> W_pack --> q | k | v       (rows: all q heads, k heads, v heads)
        |                                              |   |   |
        |                                              |  x[t] = tap0 * x[t-1] + tap1 * x[t]   per KV head
        |                                            RoPE RoPE |
        |                                              attention: even layers global, odd layers a window
        +<------------------- o_proj ------------------+
        +<-- down(silu(gate) * up) <-- post_attention_layernorm             (x num_hidden_layers)
        v
      norm --> logits = hidden @ (rows of lm_head, scaled to unit length)^T

Documents never mix: padding (2-D `attention_mask`) and packed documents (`position_ids` that restart) are kept out
of convolution, attention, window and positions alike.

Source: Baichuan-M1 technical report (arXiv 2502.12671) sections 3 and 4; short convolution: KV Shifting Attention
(arXiv 2411.19574). Tensor names and shapes are those of the published checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

IGNORED = -100  # label of a position that has no target


# ---------------------------------------------------------------------------- configuration


class BaichuanM1Config(PreTrainedConfig):
    """Sizes of a Baichuan-M1 network. The defaults are those of Baichuan-M1-14B.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width C of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_hidden_layers: number of layers L.
        num_attention_heads: query heads of a global layer; its head dimension is hidden_size / this.
        num_key_value_heads: key/value heads of a global layer.
        num_swa_attention_heads: query heads of a sliding-window layer.
        num_swa_key_value_heads: key/value heads of a sliding-window layer.
        sliding_window: keys a query of a sliding-window layer sees, itself included.
        sliding_window_layers: indices of the sliding-window layers; None means 1, 3, 5, ...
        conv_window: taps K of the convolution on keys and values, the current token's included: 2 in the
            published models, 1 for none (no tap parameters then).
        hidden_act: activation of the gate; only "silu" exists.
        max_position_embeddings: longest text the model was made for, in tokens. Longer ones are refused.
        rope_theta: base of the rotary frequencies, for both kinds of layers.
        rms_norm_eps: added to the mean square in every RMSNorm.
        initializer_range: standard deviation of freshly drawn weights.
        norm_head: True scales every row of the output head to unit length (NormHead); False is a plain linear head.
        use_cache: whether generation keeps keys, values and the convolution's last tokens.

    Raises:
        ValueError: sizes that contradict each other; the message names the field.
    """

    model_type = "baichuan_m1"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the library's convention)

    vocab_size: int = 133120
    hidden_size: int = 5120
    intermediate_size: int = 17408
    num_hidden_layers: int = 40
    num_attention_heads: int = 20
    num_key_value_heads: int = 2
    num_swa_attention_heads: int = 40
    num_swa_key_value_heads: int = 8
    sliding_window: int = 8192
    sliding_window_layers: list[int] | None = None
    conv_window: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    norm_head: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 3

    def __post_init__(self, **kwargs):
        """Fills in the alternating layers and refuses contradictions."""
        self._refuse_wrong_values()
        if self.sliding_window_layers is None:
            self.sliding_window_layers = list(range(1, self.num_hidden_layers, 2))
        self._refuse_contradictions()
        self.sliding_window_layers = sorted(self.sliding_window_layers)
        super().__post_init__(**kwargs)

    def _refuse_wrong_values(self) -> None:
        sizes = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "num_swa_attention_heads", "num_swa_key_value_heads", "sliding_window"),
            *("conv_window", "max_position_embeddings"),
        )
        for name in sizes:
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if (
            self.sliding_window < 2
        ):  # the library's caches keep everything where a window of 1 would keep nothing
            raise ValueError(f"sliding_window must be at least 2, got {self.sliding_window}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("norm_head", "use_cache", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {self.hidden_act!r}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be false: the output head has its own weights")

    def _refuse_contradictions(self) -> None:
        for prefix in ("num", "num_swa"):
            heads = getattr(self, f"{prefix}_attention_heads")
            kv_heads = getattr(self, f"{prefix}_key_value_heads")
            if self.hidden_size % (2 * heads):
                raise ValueError(
                    f"{prefix}_attention_heads={heads} must divide hidden_size={self.hidden_size} "
                    "into heads of even size"
                )
            if heads % kv_heads:
                raise ValueError(
                    f"{prefix}_key_value_heads={kv_heads} must divide {prefix}_attention_heads={heads}"
                )
        layers, last = self.sliding_window_layers, self.num_hidden_layers - 1
        listed = isinstance(layers, list | tuple) and all(_is_whole(i) and 0 <= i <= last for i in layers)
        if not listed or len(set(layers)) < len(layers):
            raise ValueError(
                f"sliding_window_layers must be a list of different indices from 0 to {last} "
                f"(num_hidden_layers - 1), got {layers!r}"
            )

    @property
    def layer_types(self) -> list[str]:
        """One word per layer, from which the library's caches choose what each layer keeps."""
        kinds = (
            ("full_attention", "sliding_attention") if self.conv_window == 1 else ("hybrid", "hybrid_sliding")
        )
        sliding = self.sliding_window_layers or []
        return [kinds[i in sliding] for i in range(self.num_hidden_layers)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------------------- where tokens belong


class Layout(NamedTuple):
    """What each token of a forward pass may see. None stands for the usual case, which then costs nothing.

    Attributes:
        position_ids: [1 or B, T] int64, position of each token in its own document.
        attention_mask: [B, past + T] bool, False on padding; None without padding.
        age: [B, T] int64, tokens of its own document before each token; None if a row is one document.
        padding: how to move padding out of the convolution's way; None if this chunk holds no padding.
    """

    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    age: torch.Tensor | None
    padding: "PaddingOrder | None"


class Documents:
    """Packed documents as stretches of tokens that attend among themselves: what no token sees is never computed.

    Attributes:
        lengths: tokens of each stretch, over all rows one after another.
        masks: for each stretch [n, n] bool, True where a query (first) sees a key, or None if all see what is before.
    """

    def __init__(self, lengths: list[int], masks: list[torch.Tensor | None]):
        self.lengths, self.masks = lengths, masks


class PaddingOrder(NamedTuple):
    """Columns of [history of K - 1 tokens | chunk of T tokens] with padding moved to the front.

    Attributes:
        gather: [B, K - 1 + T] int64, the column that comes to each place: padding first, then the rest in order.
        place: [B, T] int64, where each real token of the chunk went, counted from column K - 1.
    """

    gather: torch.Tensor
    place: torch.Tensor


def order_padding(real: torch.Tensor, history: int) -> PaddingOrder:
    """Works out `PaddingOrder` for real tokens [B, T] (bool) after `history` earlier ones."""
    filled = F.pad(real, (history, 0), value=True)
    from_end = real.flip(1).cumsum(1).flip(1)  # real tokens from each one to the end
    return PaddingOrder(
        gather=torch.argsort(filled.to(torch.uint8), dim=1, stable=True),
        place=real.shape[1] - from_end.clamp_min(1),
    )


def restarting_positions(starts: torch.Tensor) -> torch.Tensor:
    """Turns document starts [B, T] (bool, column 0 True) into positions [B, T] that count from each start."""
    index = torch.arange(starts.shape[1], device=starts.device)
    return index - torch.cummax(index * starts, dim=1).values


def packed_positions(
    tokens: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, seqlens: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns the positions [B, T] of packed documents from their cumulative lengths, or None without any.

    Args:
        tokens: [B, T, ...], whatever the documents are made of.
        cu_seq_lens: [documents + 1], from 0 to T, of a batch of one row (flash attention's form).
        seqlens: [B, S], cumulative document ends of each row, padded with zeros (the published code's form).

    Raises:
        ValueError: both, or lengths for another batch.
    """
    if cu_seq_lens is not None and seqlens is not None:
        raise ValueError("give cu_seq_lens_q or seqlens, not both")
    ends = seqlens if cu_seq_lens is None else cu_seq_lens[None]
    if ends is None or tokens is None:
        return None
    batch, length = tokens.shape[:2]
    name = "seqlens" if cu_seq_lens is None else "cu_seq_lens_q"
    if ends.ndim != 2 or ends.shape[0] != batch:
        form = (
            "seqlens must be [batch, S]" if seqlens is not None else "cu_seq_lens_q needs a batch of one row"
        )
        raise ValueError(f"{form}; got shape {tuple(ends.shape)} for a batch of {batch} rows")
    if not torch.compiler.is_compiling() and ends.numel():
        low, high = (int(edge) for edge in ends.aminmax())
        if low < 0 or high > length:
            bad = low if low < 0 else high
            raise ValueError(f"{name} has a document end at {bad} in rows of {length} tokens")
    starts = torch.zeros(batch, length + 1, dtype=torch.bool, device=ends.device)
    starts.scatter_(1, ends.long().clamp(0, length), True)
    starts[:, 0] = True
    return restarting_positions(starts[:, :length])


def lay_out(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    config: BaichuanM1Config,
) -> Layout:
    """Works out positions, padding and packed documents of one forward pass.

    Args:
        batch: rows B.
        length: new tokens per row T.
        device: where the tokens are.
        attention_mask: [B, past + T], nonzero on real tokens, or None.
        position_ids: [1 or B, T] or None. Without a cache and without padding, any step other than +1 starts a
            new document.
        cache: what earlier tokens left, or None.
        config: the model's.

    Raises:
        ValueError: masks or positions that cannot be honoured.
    """
    # A plain number for caches that grow, a tensor for preallocated ones.
    past: Any = 0 if cache is None else cache.get_seq_length()
    mask = None
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must be 2-D [batch, past + new tokens]; the convolution needs it so"
            )
        fits = attention_mask.shape[1] >= length
        if isinstance(past, int):  # a preallocated cache may come with a mask for its whole length
            fits = attention_mask.shape[1] == past + length
        if attention_mask.shape[0] != batch or not fits:
            after = f" after {past} in past_key_values" if isinstance(past, int) and past else ""
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)} for {batch} rows of {length} tokens{after}"
            )
        mask = attention_mask.to(device=device, dtype=torch.bool)
        if not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # nothing is padding: the fast paths apply

    restarts = None
    if position_ids is None:
        if mask is not None:
            position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, -length:]
        else:
            position_ids = torch.arange(length, device=device)[None] + past
    else:
        if position_ids.shape not in ((1, length), (batch, length)):
            raise ValueError(
                f"position_ids is {tuple(position_ids.shape)} for {batch} rows of {length} tokens"
            )
        restarts = _restarts(position_ids.expand(batch, -1), mask)
    _refuse_far_positions(position_ids, config.max_position_embeddings)

    age = None
    if restarts is not None and mask is None and cache is None:
        age = restarting_positions(restarts)
    elif restarts is not None:
        rule = "packed rows take no padding in attention_mask and no past_key_values"
        _refuse(restarts[:, 1:].any(), f"position_ids restart between real tokens: {rule}")

    if mask is None:
        return Layout(position_ids, None, age, None)
    real = mask[:, -length:]
    window = config.sliding_window
    if config.sliding_window_layers and mask.shape[1] > window:
        number = mask.int()
        inner = (number.cummax(1).values & number.flip(1).cummax(1).values.flip(1)) > number
        _refuse(
            inner.any(),
            f"attention_mask has padding between real tokens of a row longer than sliding_window={window}; "
            "pad on the left, or give a mask if the text itself holds the pad token",
        )
    padding = None
    if config.conv_window > 1 and (torch.compiler.is_compiling() or not bool(real.all())):
        padding = order_padding(real, config.conv_window - 1)
    return Layout(position_ids, mask, None, padding)


def _refuse(condition: torch.Tensor, message: str) -> None:
    """Raises if the condition (bool scalar) holds. A compiled graph cannot look, so it asserts when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(~condition, message)
    elif bool(condition):
        raise ValueError(message)


def _refuse_far_positions(position_ids: torch.Tensor, limit: int) -> None:
    # On an accelerator this look would wait for the device.
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(edge) for edge in position_ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"position {low if low < 0 else high} is outside 0 to {limit - 1} (max_position_embeddings={limit}): "
            "shorten the text, or raise config.max_position_embeddings to go beyond what the model was made for"
        )


def _restarts(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Marks tokens [B, T] whose position does not follow the previous real token's; None if there are none."""
    length = position_ids.shape[1]
    if length == 1:
        return None
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if mask is not None:
        real = mask[:, -length:]
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if not torch.compiler.is_compiling() and not bool(jumps.any()):
        return None
    return F.pad(jumps, (1, 0), value=True)


def _without_first_tokens(
    labels: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Takes the target from padding and from first tokens of documents: nothing before them belongs to them."""
    if attention_mask is not None and attention_mask.shape == labels.shape:
        if torch.compiler.is_compiling() or not bool(attention_mask.all()):
            real = attention_mask != 0
            return labels.masked_fill(~(real & F.pad(real[:, :-1], (1, 0))), IGNORED)
    starts = None if position_ids is None else _restarts(position_ids.expand(labels.shape[0], -1), None)
    return labels if starts is None else labels.masked_fill(starts, IGNORED)


# ---------------------------------------------------------------------------- pure functions


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Returns x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine and signed sine tables [1 or B, T, 1, head_dim] of the rotary embedding (half-split).

    The angle of pair (i, i + head_dim/2) at position t is t * theta^(-2i/head_dim). The first half of the sine
    table is negative, so that rotation is `x * cos + swap(x) * sin` with the halves of x swapped.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angle = position_ids[..., None, None].to(dtype) * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Applies the rotary embedding to x [B, T, H, D] in the table's precision; returns x's dtype."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def convolve(x: torch.Tensor, taps: torch.Tensor, age: torch.Tensor | None = None) -> torch.Tensor:
    """Mixes each token with the K - 1 before it: y[t] = sum over j < K of taps[K - 1 - j] * x[t - j].

    Args:
        x: [B, K - 1 + T, H, D], the first K - 1 columns being what comes before (zeros if nothing does).
        taps: [1, 1, H, 1, K], one row per head; the last tap is the current token's.
        age: [B, T] int64, how many tokens before each one count; None means all.

    Returns:
        [B, T, H, D].

    Source: arXiv 2411.19574 section 3; the published code's `conv_k`, `conv_v`.
    """
    *before, now = taps.to(x.dtype).unbind(-1)  # [1, 1, H, 1] each
    length = x.shape[1] - len(before)
    mixed = x[:, -length:] * now
    for lag, tap in enumerate(reversed(before), start=1):
        if age is not None:
            tap = tap * (age >= lag)[..., None, None]
        start = len(before) - lag
        mixed = torch.addcmul(mixed, x[:, start : start + length], tap)
    return mixed


def last_columns(x: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the last `length` columns of x [B, S, H, D], with zeros before them where x is too short."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, missing, 0)) if missing > 0 else x[:, -length:]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; differentiable to any order, forwards and backwards.

    Args:
        module: the calling layer (the interface asks for it).
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; query head h reads KV head h // (H / H_kv).
        value: [B, H_kv, S, D].
        attention_mask: [B or 1, 1, T, S], added to the scores.
        scaling: factor on the scores.
        kwargs: what other implementations want.

    Returns:
        Output [B, T, H, D] and weights [B, H, T, S].
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = at_least_float32(scores).softmax(-1).to(value.dtype)
    mixed = weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)
    return mixed.flatten(1, 2).transpose(1, 2), weights


def stretches(age: torch.Tensor, window: int | None, least: int = 96) -> Documents:
    """Works out `Documents` from the ages [B, T] of packed tokens.

    Neighbouring documents of a row share a stretch until it has `least` tokens, since many small products are slow.

    Args:
        age: tokens of its own document before each token.
        window: keys a query sees, itself included; None means all of its document.
        least: see above.
    """
    length = age.shape[1]
    starts = (age.flatten() == 0).nonzero().flatten().tolist()
    cuts = [0]
    for start in starts[1:]:
        if start % length == 0 or start - cuts[-1] >= least:
            cuts.append(start)
    lengths = [end - start for start, end in zip(cuts, [*cuts[1:], age.numel()], strict=True)]
    masks = []
    for piece in age.flatten().split(lengths):
        n = piece.shape[0]
        if bool(piece[-1] == n - 1) and (window is None or n <= window):
            masks.append(None)
            continue
        index = torch.arange(n, device=age.device)
        seen = piece if window is None else piece.clamp_max(window - 1)
        lag = index[:, None] - index
        masks.append((lag >= 0) & (lag <= seen[:, None]))
    return Documents(lengths, masks)


def documents_attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float
) -> torch.Tensor:
    """Attention of packed documents, one stretch after another.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D]; query head h reads KV head h // (H / H_kv).
        value: [B, H_kv, T, D].
        documents: the stretches.
        scaling: factor on the scores.

    Returns:
        [B, T, H, D].
    """
    parts = [x.transpose(1, 2).flatten(0, 1).split(documents.lengths) for x in (query, key, value)]
    mixed = []
    for q, k, v, mask in zip(*parts, documents.masks, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        mixed.append(attended[0].transpose(0, 1))
    return torch.cat(mixed).unflatten(0, (query.shape[0], query.shape[2]))


def inverse_lengths(weight: torch.Tensor) -> torch.Tensor:
    """Returns 1 / length of every row of weight [V, C] as [V], in float32 or more."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).clamp_min(1e-12).reciprocal()


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Turns labels [B, T] into the targets [B * T] of each position: the label of the next one, -100 at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def causal_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each next token, in float32 (nats per target token).

    Args:
        logits: [B, T, V]; column t predicts labels[:, t + 1].
        labels: [B, T] int64; -100 has no target.
        num_items_in_batch: what to divide the sum by; None means the number of targets.

    Returns:
        A scalar; 0 when there is no target.
    """
    return target_loss(logits, shifted_targets(labels).to(logits.device), num_items_in_batch)


def target_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """As `causal_loss`, with the target of each position [B * T] itself."""
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    return total / _divisor(targets, num_items_in_batch)


def _divisor(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    if num_items_in_batch is None:
        return (targets != IGNORED).sum().clamp_min(1)
    return num_items_in_batch


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward and gradients of `linear_cross_entropy` in one sweep over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        unit_rows: bool,
        chunk_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        each = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
        scale = inverse_lengths(weight) if unit_rows else None
        weight_in = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        size = max(1, chunk_elements // weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight_in).to(exact)
            if scale is not None:
                logits.mul_(scale)
            counts = (targets[rows] != IGNORED).to(exact)[:, None]
            target = targets[rows].clamp_min(0)[:, None]
            probability = logits.softmax(-1)
            # log(sum(exp(logits))), read off the largest probability, which cannot underflow.
            top, at = probability.max(-1, keepdim=True)
            log_sum = logits.gather(1, at) - top.log()
            losses = (log_sum - logits.gather(1, target)) * counts
            total += losses.sum()
            each[rows] = losses[:, 0]
            if not (needs_hidden or needs_weight):
                continue
            slope = probability.scatter_add_(1, target, -torch.ones_like(counts))  # d loss / d logits
            del logits
            if scale is not None:
                slope.mul_(scale)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight_in
            if grad_weight is not None and grad_weight.dtype == slope.dtype:
                grad_weight.addmm_(slope.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += slope.T @ hidden[rows]
            elif needs_weight:
                grad_weight = (slope.T @ hidden[rows]).to(exact)
            del probability, slope  # before the next chunk is as large again
        if needs_weight and grad_weight is None:  # no target here, but other processes wait for a gradient
            grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
        if grad_weight is not None and scale is not None:  # what would only lengthen a row does nothing
            along = torch.linalg.vecdot(grad_weight, weight.to(exact)) * scale**2
            grad_weight.addcmul_(weight.to(exact), along[:, None], value=-1)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, _: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_total.to(grad_weight.dtype),
            *(None, None, None),
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    unit_rows: bool,
    chunk_elements: int = 2**25,
) -> torch.Tensor:
    """Summed cross-entropy of a linear head, without holding the logits of more than a chunk of tokens.

    See `linear_cross_entropies`; this is the first of what it returns.
    """
    total, _ = linear_cross_entropies(
        hidden, weight, targets, unit_rows=unit_rows, chunk_elements=chunk_elements
    )
    return total


def linear_cross_entropies(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    unit_rows: bool,
    chunk_elements: int = 2**25,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of a linear head, summed and of each token, without the logits of more than a chunk of tokens.

    sum over n of log(sum over v of exp(z[n, v])) - z[n, targets[n]], z = hidden @ weight^T or, with `unit_rows`,
    hidden @ normalize(weight)^T. Once differentiable; the gradients are computed on the way, with the slopes
    d loss / d z = softmax(z) - onehot(targets) of a chunk dropped as soon as they are used.

    Args:
        hidden: [N, C].
        weight: [V, C].
        targets: [N] int64; -100 has no target.
        unit_rows: whether the rows of weight count only by direction (NormHead).
        chunk_elements: logits held at a time; 2^25 are 128 MB in float32, twice over.

    Returns:
        The sum, a scalar, and [N] the terms, 0 without target and without gradient; nats in float32 (float64 for
        float64 input).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    kept = None
    ignored = targets == IGNORED
    if torch.compiler.is_compiling() or 0 < int(ignored.sum()) < ignored.numel() // 8:
        # Zeros give no gradient to the weight. Few stay where they are: kernels are made for a shape, here always one.
        hidden = hidden.masked_fill(ignored[:, None], 0)
    elif bool(ignored.any()):
        kept = ~ignored
        hidden, targets = hidden[kept], targets[kept]
    with torch.autocast(hidden.device.type, enabled=False):
        total, each = _LinearCrossEntropy.apply(hidden, weight, targets, unit_rows, chunk_elements)
    return total, each if kept is None else each.new_zeros(kept.shape).masked_scatter_(kept, each)


# ---------------------------------------------------------------------------- modules


class BaichuanM1RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., C] to [..., C] in the weight's dtype."""
        if x.dtype == self.weight.dtype and x.dtype.itemsize >= 4:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(at_least_float32(x), self.weight.shape, eps=self.eps)
        return normed.to(self.weight.dtype) * self.weight


class BaichuanM1NormHead(nn.Module):
    """Output head whose rows count only by direction: logits = hidden @ normalize(weight)^T.

    Training differentiates through the lengths. Inference measures them once and keeps them, V numbers, until the
    weight changes (in place, by loading, by moving) or the model changes between training and evaluation.
    An edit through `weight.data`, which leaves no trace, has to be followed by `train()` or `eval()`.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        # (weight, its version, its address, 1 / lengths); holding the weight keeps its address from being reused.
        self._kept: tuple[torch.Tensor, int, int, torch.Tensor] | None = None

    def normalized_weight(self) -> torch.Tensor:
        """Returns the rows [V, C] at unit length (norms in float32)."""
        return (self.weight * inverse_lengths(self.weight)[:, None]).to(self.weight.dtype)

    def inverse_lengths(self) -> torch.Tensor:
        """Returns 1 / length of every row [V] (float32 or more), kept from the last call if nothing changed."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.is_inference():
            return inverse_lengths(weight)  # no record of changes to rely on
        kept = self._kept
        if kept is None or kept[0] is not weight or kept[1:3] != (weight._version, weight.data_ptr()):
            with torch.no_grad():
                kept = self._kept = (weight, weight._version, weight.data_ptr(), inverse_lengths(weight))
        return kept[3]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps [..., C] to logits [..., V]."""
        if self.training or torch.is_grad_enabled():
            self._kept = None
            return F.linear(hidden, self.normalized_weight())
        return F.linear(hidden, self.weight).mul_(self.inverse_lengths())

    def __getattr__(self, name: str) -> Any:
        if name == "bias":
            raise AttributeError(
                "NormHead has no bias. Software that multiplies by lm_head.weight itself would leave out the scaling "
                "of its rows: call model.materialize_norm_head() first, or take the model's own loss"
            )
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> "BaichuanM1NormHead":
        """Switches the mode and forgets the kept lengths."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)


class BaichuanM1MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BaichuanM1Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, C] to [B, T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BaichuanM1Attention(nn.Module):
    """Causal attention over convolved keys and values, global or within a window."""

    def __init__(self, config: BaichuanM1Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        sliding = "sliding" in config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if sliding else None
        self.num_heads = config.num_swa_attention_heads if sliding else config.num_attention_heads
        self.num_key_value_heads = config.num_swa_key_value_heads if sliding else config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.history = config.conv_window - 1  # tokens before the current one that the convolution reads
        self.is_causal = True
        width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.W_pack = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if self.history:
            taps = (1, 1, self.num_key_value_heads, 1, config.conv_window)
            self.conv_k, self.conv_v = nn.Parameter(torch.empty(taps)), nn.Parameter(torch.empty(taps))

    def _taps(self) -> torch.Tensor:
        """Returns the taps of the keys' heads, then of the values': [1, 1, 2 H_kv, 1, K]."""
        return torch.cat((self.conv_k, self.conv_v), dim=2)

    def _convolve(self, kv: torch.Tensor, layout: Layout, cache: Cache | None) -> torch.Tensor:
        """Convolves raw keys and values [B, T, 2 H_kv, D] along T, after the raw ones the cache kept."""
        length, heads = self.history + kv.shape[1], kv.shape[2:]
        taps = self._taps()
        _, _, age, padding = layout  # by place: hooks of other software hand named tuples on as plain ones
        if padding is None:
            if cache is None:
                return convolve(last_columns(kv, length), taps, age)
            full = self._remember(cache, kv)
            return convolve(last_columns(full.transpose(1, 2).unflatten(2, heads), length), taps, age)

        state: Any = None if cache is None else cache.layers[self.layer_idx]
        if state is not None and state.has_previous_state[0]:
            kept = state.conv_states[0].transpose(1, 2).unflatten(2, heads)
            kv = torch.cat((kept, kv), dim=1)
        rows = torch.arange(kv.shape[0], device=kv.device)[:, None]
        gather, place = padding
        full = last_columns(kv, length)[rows, gather]
        if cache is not None:
            self._remember(cache, full)
        return convolve(full, taps)[rows, place]

    def _remember(self, cache: Cache, kv: torch.Tensor) -> torch.Tensor:
        """Gives the cache raw keys and values [B, T, 2 H_kv, D]; returns them after what it held, [B, 2 H_kv D, S]."""
        columns = kv.flatten(2).transpose(1, 2)
        return cache.update_conv_state(columns, self.layer_idx, conv_kernel_size=self.history)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: Layout,
        attention_mask: torch.Tensor | Documents | None,
        table: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends.

        Args:
            hidden: [B, T, C], normalised.
            layout: where documents and padding are.
            attention_mask: what the chosen implementation takes, made for this kind of layer.
            table: `rotary_table` of this kind of layer.
            past_key_values: cache to read and extend.
            kwargs: passed on to the implementation.

        Returns:
            Output [B, T, C] and attention weights or None.
        """
        kv_heads = self.num_key_value_heads
        heads = self.W_pack(hidden).unflatten(-1, (-1, self.head_dim))
        query, kv = heads.split((self.num_heads, 2 * kv_heads), dim=2)
        if self.history:
            kv = self._convolve(kv, layout, past_key_values)
        key, value = kv.split((kv_heads, kv_heads), dim=2)
        query, key = rotate(query, table).transpose(1, 2), rotate(key, table).transpose(1, 2)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if isinstance(attention_mask, Documents):
            mixed = documents_attention_forward(query, key, value, attention_mask, self.scaling)
            return self.o_proj(mixed.flatten(2)), None
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=0.0,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), weights


class BaichuanM1DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: BaichuanM1Config, layer_idx: int):
        super().__init__()
        self.self_attn = BaichuanM1Attention(config, layer_idx)
        self.mlp = BaichuanM1MLP(config)
        self.input_layernorm = BaichuanM1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanM1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        """Maps [B, T, C] to [B, T, C]; `kwargs` are the attention's."""
        attended, _ = self.self_attn(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class BaichuanM1PreTrainedModel(PreTrainedModel):
    """What transformers has to know about the network."""

    config: BaichuanM1Config  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = BaichuanM1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanM1DecoderLayer"]  # noqa: RUF012 (the library's convention)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BaichuanM1DecoderLayer, "attentions": BaichuanM1Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws fresh weights: normal matrices, ones in norms, convolution taps softmax(normal)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | BaichuanM1NormHead):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BaichuanM1RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, BaichuanM1Attention) and self.config.conv_window > 1:
            for taps in (module.conv_k, module.conv_v):
                init.copy_(taps, torch.randn_like(taps, dtype=torch.float32).softmax(-1))


class BaichuanM1Model(BaichuanM1PreTrainedModel):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: BaichuanM1Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BaichuanM1DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = BaichuanM1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sliding = ["sliding" in kind for kind in config.layer_types]
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if inputs_embeds is not None and input_ids is None:
            given, width = inputs_embeds, self.config.hidden_size
            if given.ndim != 3 or given.shape[2] != width:
                form = f"[batch, tokens, hidden_size={width}]"
                raise ValueError(f"inputs_embeds must be {form}, got {tuple(given.shape)}")
        elif input_ids is not None and inputs_embeds is None:
            given = input_ids
            if given.ndim != 2 or given.dtype not in (torch.int64, torch.int32):
                got = f"{tuple(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
                raise ValueError(f"input_ids must be whole numbers [batch, tokens], got {got}")
        else:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(f"nothing to read: the input has shape {tuple(given.shape)}")
        if inputs_embeds is not None:
            return inputs_embeds
        # On an accelerator this look would wait for the device; there the embedding kernel's own check speaks.
        if given.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(edge) for edge in given.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                bad, last = low if low < 0 else high, self.config.vocab_size - 1
                raise ValueError(f"token id {bad} is outside the vocabulary (0 to {last})")
        return self.embed_tokens(given)

    def _masks(self, hidden: torch.Tensor, layout: Layout, cache: Cache | None) -> dict[bool, Any]:
        """Builds one mask per kind of layer (key: is it sliding), once for all layers."""
        kinds = set(self.sliding[: self.config.num_hidden_layers])
        implementation = self.config._attn_implementation or "eager"
        alone = hidden.shape[1] == 1 and layout.attention_mask is None and implementation in ("eager", "sdpa")
        if alone and isinstance(cache, DynamicCache):
            return dict.fromkeys(kinds)  # one token sees all that a growing cache hands it
        if layout.age is not None and "flash" in implementation and hidden.shape[0] > 1:
            raise ValueError(
                "packed documents under flash attention need a batch of one row; flatten the batch"
            )
        # A CPU computes what a dense mask hides; stretches leave it out. Compiled code would be made again for each.
        compiled = torch.compiler.is_compiling() or self.layers[0]._compiled_call_impl is not None
        if (
            layout.age is not None
            and implementation == "sdpa"
            and hidden.device.type == "cpu"
            and not compiled
        ):
            window = self.config.sliding_window
            return {kind: stretches(layout.age, window if kind else None) for kind in kinds}
        arguments = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": layout.attention_mask,
            "past_key_values": cache,
            # The library looks for documents here; it must not where padding explains the jumps.
            "position_ids": layout.position_ids if layout.age is not None else None,
        }
        make = {False: create_causal_mask, True: create_sliding_window_causal_mask}
        # Left alone, the library takes static caches' layers of both kinds for one.
        return {kind: make[kind](**arguments, layer_idx=self.sliding.index(kind)) for kind in kinds}

    def _check_cache(self, cache: Any) -> None:
        """Refuses a cache whose layers are not this network's."""
        sliding = self.sliding[: self.config.num_hidden_layers]
        convolves, window = self.config.conv_window > 1, self.config.sliding_window
        if isinstance(cache, Cache) and not convolves and cache.layer_class_to_replicate is not None:
            return  # grows layers that keep everything, as they are used
        layers = cache.layers if isinstance(cache, Cache) else []
        fits = len(layers) == len(sliding) and all(
            hasattr(layer, "conv_states") == convolves
            and getattr(layer, "is_sliding", False) == slides
            and getattr(layer, "sliding_window", window) == window
            for layer, slides in zip(layers, sliding, strict=True)
        )
        if not fits:
            raise ValueError(
                f"past_key_values ({type(cache).__name__}) was not made for this network; "
                "use DynamicCache(config=model.config)"
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, past + T], nonzero on real tokens. Padding may be left or right.
            position_ids: [1 or B, T]; positions that restart mark packed documents (no cache, no padding).
            past_key_values: cache of earlier tokens, extended in place.
            inputs_embeds: [B, T, C] instead of input_ids.
            use_cache: whether to return a cache; a new one is not made for packed documents.
            seqlens: [B, S] cumulative document ends, zero-padded; another way to say position_ids.
            cu_seq_lens_q: [documents + 1] cumulative lengths of a batch of one row; likewise.
            kwargs: passed to the attention implementation.

        Returns:
            `last_hidden_state` [B, T, C], `past_key_values`, and what `output_*` asks for.

        Raises:
            ValueError: empty input, ids outside the vocabulary, masks or positions that cannot be honoured.
        """
        hidden = self._embed(input_ids, inputs_embeds)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        batch, length = hidden.shape[:2]
        if position_ids is None:
            position_ids = packed_positions(hidden, cu_seq_lens_q, seqlens)
        layout = lay_out(
            batch,
            length,
            hidden.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values,
            config=self.config,
        )
        if use_cache and past_key_values is None and layout.age is None:
            past_key_values = DynamicCache(config=self.config)

        masks = self._masks(hidden, layout, past_key_values)
        precision = torch.promote_types(hidden.dtype, torch.float32)
        tables = {}
        for layer in self.layers[: self.config.num_hidden_layers]:  # a draft that exits early lowers it
            attention: Any = layer.self_attn
            if attention.head_dim not in tables:
                tables[attention.head_dim] = rotary_table(
                    layout.position_ids, attention.head_dim, self.config.rope_theta, precision
                )
            hidden = layer(
                hidden,
                layout=layout,
                attention_mask=masks[attention.sliding_window is not None],
                table=tables[attention.head_dim],
                past_key_values=past_key_values,
                position_ids=layout.position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


@dataclass
class BaichuanM1CausalLMOutput(CausalLMOutputWithPast):
    """What the language model returns.

    Attributes:
        token_losses: [B, T] float32 nats of the target of each position, 0 without one, without gradient; with
            `skip_logits` only.
    """

    token_losses: torch.Tensor | None = None


class BaichuanM1ForCausalLM(BaichuanM1PreTrainedModel, GenerationMixin):
    """The language model: hidden states to next-token logits, with loss and generation."""

    def __init__(self, config: BaichuanM1Config):
        super().__init__(config)
        self.model = BaichuanM1Model(config)
        if config.norm_head:
            self.lm_head = BaichuanM1NormHead(config.hidden_size, config.vocab_size)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> BaichuanM1CausalLMOutput:
        """Predicts the next token at every position.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, past + T], nonzero on real tokens.
            position_ids: [1 or B, T]; positions that restart mark packed documents.
            past_key_values: cache of earlier tokens.
            inputs_embeds: [B, T, C] instead of input_ids.
            labels: [B, T], usually input_ids; -100 has no target. Padding and the first token of a packed or
                padded document never are targets: nothing before them belongs to them.
            use_cache: whether to return a cache; by default not while training or computing a loss.
            logits_to_keep: logits for the last so many positions only (0: all), or for these indices.
            num_items_in_batch: divisor of the summed loss; None means the number of targets in this batch.
            skip_logits: with labels, compute the loss without ever holding all logits; the output's are None.
            shift_labels: [B, T] instead of labels: the target of each position itself, -100 for none. For pieces of a
                text, whose last position's target stands in the next piece; documents are the caller's business.
            kwargs: `seqlens`, `cu_seq_lens_q`, `output_hidden_states`, ... of `BaichuanM1Model.forward`.

        Returns:
            `loss` (float32 scalar, nats) if labels are given, `logits` [B, kept, V], `past_key_values`,
            `token_losses` [B, T] with skip_logits.

        Raises:
            ValueError: see `BaichuanM1Model.forward`; labels outside the vocabulary or of another shape, labels
                together with `logits_to_keep`, or `skip_logits` without labels.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels or shift_labels, not both")
        given_labels = labels if shift_labels is None else shift_labels
        if skip_logits and given_labels is None:
            raise ValueError("skip_logits leaves nothing to return without labels")
        if given_labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position: leave out logits_to_keep")
        if use_cache is None and past_key_values is None and (self.training or given_labels is not None):
            use_cache = False
        given = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None:  # the loss has to know the documents too
            names = ("cu_seq_lens_q", "seqlens")
            position_ids = packed_positions(given, *(kwargs.pop(name, None) for name in names))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        targets = None
        if given_labels is not None:
            self._check_labels(given_labels, hidden)
            if shift_labels is None:
                given_labels = _without_first_tokens(given_labels, attention_mask, position_ids)
                targets = shifted_targets(given_labels).to(hidden.device)
            else:
                targets = shift_labels.flatten().to(hidden.device)
        loss = logits = token_losses = None
        if targets is not None and skip_logits and self._head_is_bare():
            total, token_losses = linear_cross_entropies(
                hidden.flatten(0, 1), self.lm_head.weight, targets, unit_rows=self.config.norm_head
            )
            loss = total / _divisor(targets, num_items_in_batch)
            token_losses = token_losses.view(hidden.shape[:2])
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
            if targets is not None:
                loss = target_loss(logits, targets, num_items_in_batch)
            if skip_logits:
                logits = None
        return BaichuanM1CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_losses=token_losses,
        )

    def _head_is_bare(self) -> bool:
        """Whether the head's weight is all there is to it: no adapter, shards, offloading or hooks around it."""
        head = self.lm_head
        hooked = hasattr(head, "_hf_hook") or head._forward_hooks or head._forward_pre_hooks
        return type(head) in (BaichuanM1NormHead, nn.Linear) and not hooked

    def _check_labels(self, labels: torch.Tensor, hidden: torch.Tensor) -> None:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels is {tuple(labels.shape)} for tokens of shape {tuple(hidden.shape[:2])}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (labels >= self.config.vocab_size) | ((labels < 0) & (labels != IGNORED))
            if bool(outside.any()):
                bad, last = int(labels[outside][0]), self.config.vocab_size - 1
                raise ValueError(
                    f"label {bad} is outside the vocabulary (0 to {last}, or {IGNORED} for none)"
                )

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor | None:
        """Keeps the 2-D mask for preallocated caches too: the convolution has to see where padding is."""
        return attention_mask

    @torch.no_grad()
    def materialize_norm_head(self) -> None:
        """Bakes the unit-length rows into a plain linear head (`config.norm_head = False`), in place.

        Logits stay the same up to rounding. Does nothing if the head is plain already.
        """
        if not self.config.norm_head:
            return
        weight = self.lm_head.normalized_weight()
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=self.lm_head.weight.requires_grad)
        self.lm_head = head
        self.config.norm_head = False


class BaichuanM1ForSequenceClassification(BaichuanM1PreTrainedModel):
    """A classifier or, with one label, a reward model: a linear map of the last token's hidden state.

    transformers' generic one makes its network through `AutoModel`, which does not know code that lies in a folder.
    """

    def __init__(self, config: BaichuanM1Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BaichuanM1Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)  # pyrefly: ignore[bad-argument-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Scores each row at its last real token.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, past + T], nonzero on real tokens. Not given: `config.pad_token_id` is padding.
            position_ids: [1 or B, T].
            past_key_values: cache of earlier tokens.
            inputs_embeds: [B, T, C] instead of input_ids; without a mask their last token is real.
            labels: [B] classes (int64), or numbers where there is one label.
            use_cache: whether to return a cache; by default not.
            kwargs: see `BaichuanM1Model.forward`.

        Returns:
            `logits` [B, num_labels], `loss` if labels are given (cross-entropy, or squared error with one label),
            `past_key_values`.

        Raises:
            ValueError: see `BaichuanM1Model.forward`; a row that is nothing but padding; several
                rows, and neither a mask nor a padding token to tell where they end.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        rows, length = hidden.shape[:2]
        last: Any = -1
        real = None
        if attention_mask is not None:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif input_ids is not None and rows > 1:
            raise ValueError("config.pad_token_id is None, so rows may end anywhere: give attention_mask")
        if real is not None:
            _refuse(~real.any(1).all(), "a row holds nothing but padding, so there is nothing to score")
            last = (real * torch.arange(length, device=real.device)).argmax(1).to(hidden.device)
        logits = self.score(hidden[torch.arange(rows, device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "BaichuanM1Config",
    "BaichuanM1ForCausalLM",
    "BaichuanM1ForSequenceClassification",
    "BaichuanM1Model",
    "BaichuanM1PreTrainedModel",
]
