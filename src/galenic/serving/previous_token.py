"""The key and value of the token before each token, in a paged cache: what the convolution needs to remember in vLLM.

The convolution at position t mixes the raw key and value (not convolved, not rotated) of t with those of t - 1. In a
server t - 1 may have been computed in an earlier step (decoding, chunked prefill), by another request (prefix caching),
or before a request was thrown out and came back (preemption). Where should it be kept?

* As a state of fixed size a sequence, as vLLM keeps Mamba's: right while decoding, but a state is of one position only.
  A prefix cached at another position has none, so vLLM has to snapshot states at block ends, with block sizes blown up
  to match and modes to choose; and its kernels for it are not ours (groups of taps a channel, no CPU without Triton).
* As one more vector of the layer's input, to project again: `hidden_size` numbers instead of 2 H_kv D (5120 against
  1024 and 2048 in the 14B), a second product each step, and the same question of where it lies.
* As a **sliding-window cache with a window of two tokens** (here). vLLM then treats it as it treats keys and values of
  any sliding layer: blocks addressed by position, allocated, freed behind the window, hashed, shared, evicted and
  recomputed by the same code. A prefix is taken from the cache only if the block holding its last token is there, so
  prefix caching, chunked prefill and preemption are exact for free, and nothing is copied or snapshotted.

What it costs: each kind of layer has a twin group of pages, of which a sequence holds one or two while it runs. While a
chunk is prefilled its raw keys and values are held as long as the chunk runs, and the pages left behind compete for
the prefix cache until they are evicted. The hybrid cache manager has to be on (vLLM's default).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # pyrefly: ignore[missing-import]
from vllm.utils.torch_utils import _encode_layer_name  # pyrefly: ignore[missing-import]
from vllm.v1.attention.backend import (  # pyrefly: ignore[missing-import]
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec  # pyrefly: ignore[missing-import]

from galenic.serving.pages import exchange


@dataclass
class Step:
    """Where the tokens of one step belong.

    Attributes:
        tokens: how many there are; rows after them are padding.
        starts: [R + 1] int32, the first row of each request, and the end.
        lengths: [R] int32, tokens of each request after this step.
        table: [R, blocks] int32, the blocks of each request.
        slots: [tokens] int64, where each token's entry goes: block * block size + place.
    """

    tokens: int
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Reads a `Step` off what vLLM tells every kind of layer. Full CUDA graphs are left to vLLM's default: none."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """Returns the step; see the base class for the arguments."""
        given = common_attn_metadata
        tokens = given.num_actual_tokens
        return Step(
            tokens,
            given.query_start_loc,
            given.seq_lens,
            given.block_table_tensor,
            given.slot_mapping[:tokens],
        )


class PreviousTokenBackend(AttentionBackend):
    """What vLLM asks of a kind of cache; any layout of pages will do, they are only indexed."""

    @staticmethod
    def get_name() -> str:
        """Returns the name in vLLM's log."""
        return "GALENIC_PREVIOUS_TOKEN"

    @staticmethod
    def get_impl_cls() -> type["Exchange"]:
        """Returns the class that does the work."""
        return Exchange

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """Returns the class that says where the tokens are."""
        return StepBuilder


class Exchange:
    """The work, in the form in which vLLM calls attention."""

    def forward(
        self,
        layer: "PreviousToken",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        **_: Any,
    ) -> None:
        """Writes keys and values [T, H, D] into the pages and the previous tokens' into output [T, H, 2 D]."""
        step = attn_metadata
        if step is None:  # vLLM tries how much memory a step takes, before there are pages
            output.zero_()
            return
        raw = torch.cat((key, value), dim=-1)[: step.tokens]
        # [blocks, H, places, 2 D], whatever lies where; a place's entry is [H, 2 D].
        pages = kv_cache.transpose(1, 2)
        output[: step.tokens] = exchange(raw, pages, step.starts, step.lengths, step.table, step.slots)
        output[step.tokens :].zero_()


class PreviousToken(nn.Module, AttentionLayerBase):
    """Returns the raw key and value of the token before each token, zeros before the first."""

    def __init__(self, kv_heads: int, head_dim: int, prefix: str):
        super().__init__()
        self.kv_heads, self.head_dim, self.name = kv_heads, head_dim, prefix
        self.impl = Exchange()
        self.kv_cache = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Returns the kind of cache."""
        return PreviousTokenBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Returns what to allocate: keys and values of two tokens, in the model's own precision."""
        return SlidingWindowSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.kv_heads,
            head_size=self.head_dim,
            dtype=vllm_config.model_config.dtype,
            sliding_window=2,
        )

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps keys and values [T, H, D] to those of the token before, and remembers the given ones."""
        before = torch.empty((*key.shape[:2], 2 * self.head_dim), dtype=key.dtype, device=key.device)
        # Through vLLM's own door for attention, so that compiled code and CUDA graphs are cut here as they are there.
        name = _encode_layer_name(self.name)
        torch.ops.vllm.unified_attention_with_output(key, key, value, before, name)
        return before[..., : self.head_dim], before[..., self.head_dim :]
