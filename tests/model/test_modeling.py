"""The network against a second implementation, against itself split up, and against its own definition."""

import subprocess
import sys

import baichuan_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import VOCABULARY, WINDOW, build, close, small, tokens
from transformers import DynamicCache

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.model.modeling_baichuan_m1 import causal_loss, packed_positions, restarting_positions


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def eager():
    return build("eager")


# ---------------------------------------------------------------------------- definition


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_head": False},
        {"conv_window": 1},
        {"conv_window": 3},
        {"conv_window": 4, "sliding_window": 2},
        {"num_key_value_heads": 3, "sliding_window": 2},
        {"sliding_window_layers": [0, 2], "sliding_window": 50},
        {"sliding_window_layers": []},
        {"sliding_window_layers": [0, 1, 2]},
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_formulas(changes, attention):
    model = build(attention, **changes)
    row = tokens(1, 13)
    expected = baichuan_oracle.logits(model.state_dict(), model.config, row[0].tolist())
    assert expected.std() > 0.1
    close(model(row).logits[0], expected)


def test_float32_and_bfloat16_follow_float64(model):
    row = tokens(2, 20)
    exact = model(row).logits
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        lower = build()
        lower.to(dtype)
        assert lower(row).logits.dtype == dtype
        error = (lower(row).logits.double() - exact).abs().max()
        assert error < tolerance * exact.abs().max()


def test_published_tensors_of_the_14b():
    with torch.device("meta"):
        model = BaichuanM1ForCausalLM(BaichuanM1Config())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {name: (133120, 5120) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    expected["model.norm.weight"] = (5120,)
    for i in range(40):
        layer, (rows, heads) = f"model.layers.{i}.", ((6144, 2), (7168, 8))[i % 2]
        expected |= {
            layer + "input_layernorm.weight": (5120,),
            layer + "self_attn.W_pack.weight": (rows, 5120),
            layer + "self_attn.o_proj.weight": (5120, 5120),
            layer + "self_attn.conv_k": (1, 1, heads, 1, 2),
            layer + "self_attn.conv_v": (1, 1, heads, 1, 2),
            layer + "post_attention_layernorm.weight": (5120,),
            layer + "mlp.gate_proj.weight": (17408, 5120),
            layer + "mlp.up_proj.weight": (17408, 5120),
            layer + "mlp.down_proj.weight": (5120, 17408),
        }
    assert shapes == expected and len(shapes) == 363
    assert sum(p.numel() for p in model.parameters()) == 14_470_764_320
    assert sum(p.numel() for name, p in model.named_parameters() if "conv_" in name) == 800
    assert not list(model.buffers())


def test_fresh_taps_are_a_softmax_and_differ():
    model = BaichuanM1ForCausalLM(small(num_swa_key_value_heads=6))
    taps = model.model.layers[1].self_attn.conv_k
    assert bool((taps > 0).all()) and taps.unique().numel() > 6
    close(taps.sum(-1), torch.ones_like(taps.sum(-1)), 1e-6)


def test_identity_taps_equal_no_convolution(model):
    plain = build(conv_window=1)
    identity = build()
    state = plain.state_dict()
    for name in identity.state_dict():
        if "conv_" in name:
            state[name] = torch.tensor([0.0, 1.0]).expand_as(identity.state_dict()[name]).double()
    identity.load_state_dict(state)
    row = tokens(2, 15)
    close(identity(row).logits, plain(row).logits)
    assert (identity(row).logits - model(row).logits).abs().max() > 1e-3


def test_window_edge_reaches_one_token_further_through_the_convolution():
    window = 4
    model = build(num_hidden_layers=1, sliding_window_layers=[0], sliding_window=window)
    row = tokens(1, 12)
    for query in (6, 11):
        for distance in range(query + 1):
            changed = row.clone()
            changed[0, query - distance] = 4 + (changed[0, query - distance] - 3) % (VOCABULARY - 4)
            same = torch.equal(model(changed).logits[0, query], model(row).logits[0, query])
            assert same == (distance > window)
    with torch.no_grad():  # without the previous token's tap the window is exact
        for taps in (model.model.layers[0].self_attn.conv_k, model.model.layers[0].self_attn.conv_v):
            taps[..., 0] = 0
    changed = row.clone()
    changed[0, 11 - window] = 4
    assert torch.equal(model(changed).logits[0, 11], model(row).logits[0, 11])


def test_norm_head_rows_count_by_direction_only(model):
    scaled = build()
    with torch.no_grad():
        scaled.lm_head.weight *= torch.rand(VOCABULARY, 1).double() * 9 + 0.5
    row = tokens(1, 9)
    close(scaled(row).logits, model(row).logits)
    close(model.lm_head.normalized_weight().norm(dim=1), torch.ones(VOCABULARY).double())
    hidden = model.model(row).last_hidden_state
    assert bool((model(row).logits.abs() <= hidden.norm(dim=-1, keepdim=True) * (1 + 1e-9)).all())


def test_materialized_norm_head_is_the_same_model(model):
    plain = build()
    plain.materialize_norm_head()
    assert isinstance(plain.lm_head, torch.nn.Linear) and not plain.config.norm_head
    assert list(plain.state_dict()) == list(model.state_dict())
    row = tokens(2, 9)
    close(plain(row).logits, model(row).logits)


# ---------------------------------------------------------------------------- cache


def test_token_by_token_far_beyond_the_window(model):
    row = tokens(1, 31)
    cache, pieces = DynamicCache(config=model.config), []
    for t in range(row.shape[1]):
        pieces.append(model(row[:, t : t + 1], past_key_values=cache).logits)
    close(torch.cat(pieces, 1), model(row).logits)
    assert cache.layers[1].keys.shape[2] == WINDOW - 1  # the window's memory is bounded
    assert cache.layers[1].conv_states[0].shape[-1] == 1


def test_a_hole_longer_than_the_window_can_serve_is_refused(model):
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="pad on the left"):
        model(tokens(1, 7), attention_mask=mask)


def test_a_cache_without_room_for_the_convolution_is_refused(model):
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens(1, 3), past_key_values=DynamicCache())


# ---------------------------------------------------------------------------- padding and packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_packed_documents_equal_the_documents_alone(attention, lengths):
    model = build(attention)
    texts = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    row = torch.cat(texts, 1).repeat(2, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(row, position_ids=positions, labels=row, use_cache=True)
    assert (out.past_key_values is None) == (len(lengths) > 1)
    close(out.logits[1], torch.cat([model(text).logits[0] for text in texts]))
    targets = max(1, sum(lengths) - len(lengths))
    close(out.loss, sum(model(t, labels=t).loss * (t.shape[1] - 1) for t in texts) / targets)

    together = torch.autograd.grad(out.loss, list(model.parameters()))
    alone = sum(model(t, labels=t, num_items_in_batch=targets).loss for t in texts)
    for a, b in zip(together, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        close(a, b)


def test_three_ways_to_name_documents_agree(model):
    row = tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    expected = model(row, position_ids=positions, labels=row)
    for names in (
        {"cu_seq_lens_q": torch.tensor([0, 3, 4, 9])},
        {"seqlens": torch.tensor([[3, 4, 9, 0, 0, 0, 0, 0, 0]])},
    ):
        out = model(row, labels=row, **names)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
        assert torch.equal(model.model(row, **names)[0], model.model(row, position_ids=positions)[0])
    ones = model(row, position_ids=positions, attention_mask=torch.ones_like(row))
    assert torch.equal(ones.logits, expected.logits)
    starts = torch.tensor([[True, False, True, True]])
    assert restarting_positions(starts).tolist() == [[0, 1, 0, 0]]
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packed_positions(tokens(2, 9), torch.tensor([0, 9]), None)
    with pytest.raises(ValueError, match="not both"):
        packed_positions(tokens(1, 9), torch.tensor([0, 9]), torch.tensor([[9]]))


def test_packing_that_cannot_be_honoured_is_refused(model):
    row, positions = tokens(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    cache = model(row, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        model(row, position_ids=positions, past_key_values=cache)
    with pytest.raises(ValueError, match="no padding"):
        model(row, position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="past_key_values"):
        model(row, position_ids=positions, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="2-D"):
        model(row, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="rows of"):
        model(row, attention_mask=torch.ones(1, 5))


# ---------------------------------------------------------------------------- training


def test_loss_ignores_and_divides_as_told():
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2] = -100
    picked = [
        -logits[b, t].float().log_softmax(-1)[labels[b, t + 1]]
        for b in range(2)
        for t in range(4)
        if labels[b, t + 1] >= 0
    ]
    assert causal_loss(logits, labels).dtype == torch.float32
    close(causal_loss(logits, labels), torch.stack(picked).mean(), 1e-6)
    close(causal_loss(logits, labels, 3), torch.stack(picked).sum() / 3, 1e-6)
    close(causal_loss(logits, labels, torch.tensor(3)), torch.stack(picked).sum() / 3, 1e-6)
    assert float(causal_loss(logits, torch.full((2, 5), -100))) == 0.0


def test_logits_to_keep(model):
    row = tokens(2, 9)
    whole = model(row).logits
    close(model(row, logits_to_keep=2).logits, whole[:, -2:])
    close(model(row, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(row, labels=row, logits_to_keep=1)


def test_hidden_states_and_weights_can_be_had(eager):
    out = eager(tokens(1, 6), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and [tuple(a.shape) for a in out.attentions] == [
        (1, 3, 6, 6),
        (1, 6, 6, 6),
        (1, 3, 6, 6),
    ]
    close(out.attentions[1].sum(-1), torch.ones(1, 6, 6).double())
    assert out.attentions[1][0, 0, 5, 0].item() == 0.0  # outside the window of 5


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": 25}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_swa_attention_heads": 24}, "num_swa_attention_heads"),  # head of odd size 1
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"num_swa_key_value_heads": 4}, "num_swa_key_value_heads"),
        ({"sliding_window_layers": [1, 3]}, "sliding_window_layers"),
        ({"sliding_window_layers": [1, 1]}, "sliding_window_layers"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 1}, "sliding_window"),
        ({"vocab_size": 10.5}, "vocab_size"),
        ({"conv_window": 0}, "conv_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_contradicting_sizes_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=rf"^{field}\b") as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_input_mistakes(model):
    for row, words in (
        (torch.tensor([[5, VOCABULARY]]), f"token id {VOCABULARY} is outside"),
        (torch.tensor([[5, -1]]), "token id -1 is outside"),
        (torch.zeros(1, 0, dtype=torch.long), "nothing to read"),
        (torch.zeros(0, 4, dtype=torch.long), "nothing to read"),
    ):
        with pytest.raises(ValueError, match=words):
            model(row)
    with pytest.raises(ValueError, match="exactly one"):
        model.model()


def test_importing_the_room_does_not_import_torch():
    code = (
        "import galenic.model, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import galenic.model

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = galenic.model.nothing_here
