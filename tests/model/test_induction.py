"""One layer with shifted keys solves induction, its weights set by hand (arXiv 2411.19574, section 3)."""

import pytest
import torch

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

VOCAB, WIDTH, LENGTH = 16, 64, 40
CURRENT, PREVIOUS = (0.0, 1.0), (1.0, 0.0)  # taps that keep a token's key or value, or take the one before


@torch.no_grad()
def one_layer(conv_k: tuple[float, float], conv_v: tuple[float, float]) -> BaichuanM1ForCausalLM:
    """Asks "where was the present token?" with one head, and answers with the value found there."""
    config = BaichuanM1Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_swa_attention_heads=1,
        num_swa_key_value_heads=1,
        rope_theta=1e12,  # the second quarter of a head then turns by less than 1e-6 a token: content, no position
        max_position_embeddings=LENGTH,
    )
    model = BaichuanM1ForCausalLM(config)
    layer = model.model.layers[0]
    for weight in (*layer.mlp.parameters(), layer.self_attn.W_pack.weight, layer.self_attn.o_proj.weight):
        weight.zero_()
    read, write, slow = torch.arange(VOCAB), VOCAB + torch.arange(VOCAB), WIDTH // 4 + torch.arange(VOCAB)
    query, key, value = layer.self_attn.W_pack.weight.split(WIDTH)  # views
    query[slow, read] = 10.0  # sharp: the score of a match is 80, of anything else 0
    key[slow, read] = value[read, read] = layer.self_attn.o_proj.weight[write, read] = 1.0
    layer.self_attn.conv_k.copy_(torch.tensor(conv_k))
    layer.self_attn.conv_v.copy_(torch.tensor(conv_v))
    one_hot = torch.eye(WIDTH)
    model.model.embed_tokens.weight.copy_(one_hot[read])
    model.lm_head.weight.copy_(one_hot[write])
    return model.eval()


@torch.no_grad()
def predictions(model: BaichuanM1ForCausalLM, period: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens [B, T] that repeat after `period`, and what the model takes for each one's successor [B, T]."""
    generator = torch.Generator().manual_seed(period)
    block = torch.stack([torch.randperm(VOCAB, generator=generator)[:period] for _ in range(8)])
    tokens = block.repeat(1, LENGTH)[:, :LENGTH]
    return tokens, model(tokens).logits.argmax(-1)


@pytest.mark.parametrize("period", [1, 2, 7, VOCAB])
def test_shifted_keys_solve_induction_in_one_layer(period):
    tokens, predicted = predictions(one_layer(PREVIOUS, CURRENT), period)
    assert torch.equal(predicted[:, period:-1], tokens[:, period + 1 :])


@pytest.mark.parametrize("taps", [(CURRENT, CURRENT), (PREVIOUS, PREVIOUS)])
def test_keys_and_values_of_one_token_only_find_what_was_asked_for(taps):
    tokens, predicted = predictions(one_layer(*taps), VOCAB)
    assert torch.equal(predicted[:, VOCAB:], tokens[:, VOCAB:])
