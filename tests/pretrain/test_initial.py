import torch

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.parallelism.initial import draw_weights
from galenic.pretrain.parallelism.parallel import Parallel

CONFIG = BaichuanM1Config(
    vocab_size=997,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_swa_attention_heads=4,
    num_swa_key_value_heads=2,
    sliding_window=8,
    max_position_embeddings=32,
    initializer_range=0.05,
)


def drawn(seed):
    with torch.device("meta"):
        model = BaichuanM1ForCausalLM(CONFIG)
    Parallel().apply(model, seed)
    return dict(model.named_parameters())


def test_weights_follow_from_the_seed_and_their_name():
    torch.manual_seed(5)
    one = drawn(3)
    torch.manual_seed(6)
    same, other = drawn(3), drawn(4)
    for name, weight in one.items():
        assert not weight.is_meta and weight.dtype == torch.float32
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) == ("norm" in name), name
    layers = [one[f"model.layers.{i}.mlp.gate_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)
    assert not torch.equal(layers[0], one["model.layers.0.mlp.up_proj.weight"])


def test_they_are_distributed_as_the_network_says():
    for name, weight in ((name, weight.detach()) for name, weight in drawn(0).items()):
        if "norm" in name:
            assert bool((weight == 1).all())
        elif "conv" in name:
            assert bool((weight > 0).all())
            torch.testing.assert_close(weight.sum(-1), torch.ones(weight.shape[:-1]))
        else:
            assert abs(float(weight.mean())) < 0.003
            assert abs(float(weight.std()) - 0.05) < 0.002


def test_weights_that_are_there_stay():
    model = BaichuanM1ForCausalLM(CONFIG)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    draw_weights(model, model, "", seed=9)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
