"""Writes the smallest GGUF files of a Llama."""

import pytest
import torch


def write_gguf(file, tensors, hidden=32):
    """Writes a Llama of one layer with llama.cpp's names, matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "0", *(f"t{i}" for i in range(61)), "<|endoftext|>"])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in tensors.items():
        array = value.numpy()
        if value.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_tensors(seed, hidden=32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "token_embd": (64, hidden),
        "output": (64, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (2 * hidden, hidden),
        "blk.0.ffn_up": (2 * hidden, hidden),
        "blk.0.ffn_down": (hidden, 2 * hidden),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()
    }
