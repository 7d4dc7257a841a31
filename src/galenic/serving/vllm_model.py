"""Baichuan-M1 in vLLM's parts; tensor names are those of our folders and of the published checkpoint.

    q | k | v = W_pack(x);  k[t] = tap0 * k[t-1] + tap1 * k[t], v likewise;  rotate q, k;  paged attention;  o_proj

The network itself, equation by equation, is `galenic.model.modeling_baichuan_m1`; what is here is how vLLM wants it:
tokens of all requests in one row, weights split over ranks by heads, gate and up as one product.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile  # pyrefly: ignore[missing-import]
from vllm.config import VllmConfig  # pyrefly: ignore[missing-import]
from vllm.distributed import (  # pyrefly: ignore[missing-import]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import SiluAndMul  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.attention import Attention  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.layernorm import RMSNorm  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.linear import (  # pyrefly: ignore[missing-import]
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.rotary_embedding import get_rope  # pyrefly: ignore[missing-import]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyrefly: ignore[missing-import]
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper  # pyrefly: ignore[missing-import]

from galenic.model.modeling_baichuan_m1 import BaichuanM1Config, inverse_lengths
from galenic.serving.previous_token import PreviousToken


def load_taps(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """Copies this rank's KV heads of taps [1, 1, H, 1, 2]; ranks beyond the heads share one, as in vLLM's QKV."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * loaded.shape[2] // ranks
    parameter.data.copy_(loaded.narrow(2, first, parameter.shape[2]))


class BaichuanM1Attention(nn.Module):
    """Paged attention over convolved keys and values, global or within a window."""

    def __init__(self, config: BaichuanM1Config, window: int | None, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        kind = "num" if window is None else "num_swa"
        heads, kv_heads = (getattr(config, f"{kind}_{part}_heads") for part in ("attention", "key_value"))
        quantization, ranks = vllm_config.quant_config, get_tensor_model_parallel_world_size()
        width, self.head_dim = config.hidden_size, config.hidden_size // heads
        self.heads, self.kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.W_pack = QKVParallelLinear(
            width,
            self.head_dim,
            heads,
            kv_heads,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.W_pack",
        )
        self.o_proj = RowParallelLinear(
            width, width, bias=False, quant_config=quantization, prefix=f"{prefix}.o_proj"
        )
        self.rotary = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.previous = None
        if config.conv_window == 2:
            self.previous = PreviousToken(self.kv_heads, self.head_dim, prefix=f"{prefix}.previous")
            self.conv_k, self.conv_v = (
                nn.Parameter(torch.empty(1, 1, self.kv_heads, 1, 2), requires_grad=False) for _ in range(2)
            )
            for taps in (self.conv_k, self.conv_v):
                taps.weight_loader = load_taps  # pyrefly: ignore[missing-attribute]
        self.attn = Attention(
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def convolve(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes keys and values [T, H_kv D] with those of the token before."""
        if self.previous is None:
            return key, value
        now = [x.unflatten(-1, (self.kv_heads, self.head_dim)) for x in (key, value)]
        mixed = []
        for x, before, taps in zip(now, self.previous(*now), (self.conv_k, self.conv_v), strict=True):
            tap0, tap1 = taps[0, 0].unbind(-1)  # [H_kv, 1] each
            mixed.append(torch.addcmul(x * tap1, before, tap0).flatten(1))
        return mixed[0], mixed[1]

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Maps [T, C] to [T, C]."""
        packed, _ = self.W_pack(hidden)
        kv_width = self.kv_heads * self.head_dim
        query, key, value = packed.split((self.heads * self.head_dim, kv_width, kv_width), dim=-1)
        key, value = self.convolve(key, value)
        query, key = self.rotary(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class BaichuanM1MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BaichuanM1Config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        width, inner, quantization = config.hidden_size, config.intermediate_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, width, bias=False, quant_config=quantization, prefix=f"{prefix}.down_proj"
        )
        self.act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [T, C] to [T, C]."""
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


class BaichuanM1DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward; the sum so far travels beside the last addend, as vLLM's norms want it."""

    def __init__(self, config: BaichuanM1Config, window: int | None, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.self_attn = BaichuanM1Attention(config, window, vllm_config, f"{prefix}.self_attn")
        self.mlp = BaichuanM1MLP(config, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps the addend [T, C] and the sum before it to the next ones."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(positions, hidden), residual)
        return self.mlp(hidden), residual


@support_torch_compile
class BaichuanM1Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        windows = [
            config.sliding_window if i in config.sliding_window_layers else None
            for i in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(
            BaichuanM1DecoderLayer(config, window, vllm_config, f"{prefix}.layers.{i}")
            for i, window in enumerate(windows)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Maps ids [T] to [T, C]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps ids [T] (or embeddings [T, C]) at positions [T] to hidden states [T, C]."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class BaichuanM1ForCausalLM(nn.Module):
    """The language model as vLLM calls it."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012 (vLLM's convention)
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        if config.conv_window not in (1, 2):
            raise ValueError(f"conv_window={config.conv_window}: this plugin serves 1 (no convolution) and 2")
        if config.conv_window == 2 and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ValueError("the convolution needs vLLM's hybrid KV cache manager: do not disable it")
        prefix = f"{prefix}." if prefix else ""
        self.model = BaichuanM1Model(vllm_config=vllm_config, prefix=f"{prefix}model")
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}lm_head",
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Maps ids [T] to [T, C]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps ids [T] at positions [T] to hidden states [T, C]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Maps [N, C] to logits [N, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a folder's tensors; returns the names of the parameters they went to."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(self._scaled(weights), mapper=self.hf_to_vllm_mapper)

    def _scaled(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Gives the head's rows unit length (NormHead), once, before they are split or quantized."""
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.norm_head:
                weight = (weight * inverse_lengths(weight)[:, None]).to(weight.dtype)
            yield name, weight
