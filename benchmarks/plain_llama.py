"""A Llama in plain PyTorch, as lean training repositories write it: what the network costs without a framework.

RMSNorm, rotary positions, grouped queries through `scaled_dot_product_attention`, SwiGLU, an untied head, cross-entropy
of all logits, fused AdamW and a plain loop. Rows are text after text: a token sees everything before it in its row, so
no mask is made.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, C] to [B, T, C]; cos and sin are [T, 1, D / 2]."""
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.size))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        query, key = turned(query, cos, sin), turned(key, cos, sin)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.norm_2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [B, T, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainLlama(nn.Module):
    """Token ids [B, T] and targets [B, T] (-100: none) to their mean cross-entropy."""

    def __init__(
        self, *, vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, context: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        size = width // heads
        angle = torch.arange(context)[:, None] * 1e5 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())
