"""Baichuan-M1 written a second time: one token, one head at a time, float64, no code shared with the package.

Written from the formulas (reference: sections 2.2 to 2.5), for one document without cache or padding.
"""

import math

import torch
from torch import Tensor


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).sum()) / len(x) + eps) * weight


def _rotated(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    out = torch.zeros_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def _attention(rows: list[Tensor], weights: dict[str, Tensor], prefix: str, cfg, layer: int) -> list[Tensor]:
    sliding = layer in cfg.sliding_window_layers
    heads = cfg.num_swa_attention_heads if sliding else cfg.num_attention_heads
    kv_heads = cfg.num_swa_key_value_heads if sliding else cfg.num_key_value_heads
    size = cfg.hidden_size // heads
    pack, out = weights[prefix + "W_pack.weight"], weights[prefix + "o_proj.weight"]
    packed = [pack @ row for row in rows]

    def head(t: int, index: int) -> Tensor:
        return packed[t][index * size : (index + 1) * size]

    def mixed(t: int, index: int, taps: Tensor) -> Tensor:
        seen = range(min(t, len(taps) - 1) + 1)
        return sum((head(t - lag, index) * taps[-1 - lag] for lag in seen), torch.zeros(size).double())

    results = []
    for t in range(len(rows)):
        pieces = []
        first = max(0, t - cfg.sliding_window + 1) if sliding else 0
        for h in range(heads):
            g = h // (heads // kv_heads)
            k_taps = v_taps = torch.ones(1).double()
            if cfg.conv_window > 1:
                k_taps, v_taps = (weights[prefix + name][0, 0, g, 0] for name in ("conv_k", "conv_v"))
            query = _rotated(head(t, h), t, cfg.rope_theta)
            scores, values = [], []
            for s in range(first, t + 1):
                key = _rotated(mixed(s, heads + g, k_taps), s, cfg.rope_theta)
                scores.append(float(query @ key) / math.sqrt(size))
                values.append(mixed(s, heads + kv_heads + g, v_taps))
            top = max(scores)
            powers = [math.exp(score - top) for score in scores]
            piece = torch.zeros(size, dtype=torch.float64)
            for power, value in zip(powers, values, strict=True):
                piece += power / sum(powers) * value
            pieces.append(piece)
        results.append(out @ torch.cat(pieces))
    return results


def logits(state: dict[str, Tensor], cfg, tokens: list[int]) -> Tensor:
    """Returns the logits [T, V] in float64 for one document."""
    w = {name: tensor.detach().double() for name, tensor in state.items()}
    rows = [w["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = [_rms(row, w[prefix + "input_layernorm.weight"], cfg.rms_norm_eps) for row in rows]
        attended = _attention(normed, w, prefix + "self_attn.", cfg, layer)
        rows = [row + extra for row, extra in zip(rows, attended, strict=True)]
        for t, row in enumerate(rows):
            x = _rms(row, w[prefix + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
            gate = w[prefix + "mlp.gate_proj.weight"] @ x
            gated = gate / (1 + torch.exp(-gate)) * (w[prefix + "mlp.up_proj.weight"] @ x)
            rows[t] = row + w[prefix + "mlp.down_proj.weight"] @ gated
    head = w["lm_head.weight"]
    if cfg.norm_head:
        head = torch.stack([row / math.sqrt(float(row @ row)) for row in head])
    return torch.stack([head @ _rms(row, w["model.norm.weight"], cfg.rms_norm_eps) for row in rows])
