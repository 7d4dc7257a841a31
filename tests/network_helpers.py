"""A network of our own that is small, random, and yet sure of some things."""

import torch

import galenic.model as model_room


def fresh_model(vocabulary, seed):
    torch.manual_seed(seed)
    config = model_room.BaichuanM1Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=16,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    model = model_room.BaichuanM1ForCausalLM(config).eval()
    with torch.no_grad():
        # Otherwise unit rows on a normalised state give nearly uniform predictions.
        model.model.norm.weight.mul_(8)
    return model
