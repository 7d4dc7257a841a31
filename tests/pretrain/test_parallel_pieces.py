"""The pure parts of tensor and context parallelism against definitions written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_worker import SHAPE, network, packed

from galenic.model.modeling_baichuan_m1 import convolve
from galenic.pretrain.parallelism import context_parallel
from galenic.pretrain.parallelism.context_parallel import (
    Pieces,
    columns,
    convolve_pieces,
    own_piece,
    piece_mask,
    visible,
)
from galenic.pretrain.parallelism.tensor_parallel import official_rows, regrouped_rows, row_order


@given(st.integers(1, 5), st.integers(1, 4))
def test_columns_share_a_row(ranks, size):
    found = [columns(2 * ranks * size, ranks, rank) for rank in range(ranks)]
    assert sorted(torch.cat(found).tolist()) == list(range(2 * ranks * size))
    sums = [int((part + 1).sum()) for part in found]  # keys to look at
    assert len(set(sums)) == 1


def test_pieces_keep_targets_and_documents():
    batch = packed(3, 24, 0)
    parts = [own_piece(batch | {"domains": batch["input_ids"] % 3}, 3, rank) for rank in range(3)]
    order = torch.cat([columns(24, 3, rank) for rank in range(3)]).argsort()
    whole = {name: torch.cat([part[name] for part in parts], dim=1)[:, order] for name in parts[0]}
    assert torch.equal(whole["input_ids"], batch["input_ids"])
    assert torch.equal(whole["domains"], batch["input_ids"] % 3)
    assert torch.equal(whole["shift_labels"][:, :-1], batch["labels"][:, 1:])
    assert (whole["shift_labels"][:, -1] == -100).all() and "labels" not in whole


def test_no_document_predicts_anothers_first_token():
    batch = packed(3, 24, 0)
    batch["labels"] = batch["input_ids"].clone()
    starts = batch["position_ids"] == 0
    targets = torch.cat([own_piece(batch, 1, 0)["shift_labels"]], dim=1)
    assert (targets[:, :-1][starts[:, 1:]] == -100).all() and (targets[:, :-1][~starts[:, 1:]] != -100).all()


def test_positions_must_count_from_their_documents():
    batch = packed(1, 8, 0)
    batch["position_ids"] = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with pytest.raises(ValueError, match="restart at 0"):
        own_piece(batch, 2, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("taps", [2, 3])
def test_convolution_of_pieces(ranks, taps, monkeypatch):
    """All processes' pieces, one after the other in this one, against the whole row."""
    context = 12 * ranks
    torch.manual_seed(0)
    x = torch.randn(2, context, 3, 4, dtype=torch.float64)
    weight = torch.randn(1, 1, 3, 1, taps, dtype=torch.float64)
    positions = packed(2, context, 5)["position_ids"]
    wanted = convolve(torch.nn.functional.pad(x, (0, 0, 0, 0, taps - 1, 0)), weight, positions)
    own = [columns(context, ranks, rank) for rank in range(ranks)]
    tails = torch.stack([x[:, part].unflatten(1, (2, -1))[:, :, -(taps - 1) :] for part in own])
    monkeypatch.setattr(context_parallel, "gather", lambda tail, pieces: tails)
    for rank, part in enumerate(own):
        found = convolve_pieces(x[:, part], weight, positions[:, part], Pieces(None, ranks, rank))
        torch.testing.assert_close(found, wanted[:, part], rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_masks_of_pieces(window, implementation):
    ranks, context = 2, 16
    positions = packed(2, context, 1)["position_ids"]
    documents = (positions == 0).cumsum(1)
    place = torch.arange(context)
    wanted = (place[:, None] >= place) & (documents[:, :, None] == documents[:, None])
    if window:
        wanted = wanted & (place[:, None] - place < window)
    keys = torch.cat([columns(context, ranks, rank) for rank in range(ranks)])
    for rank in range(ranks):
        own = columns(context, ranks, rank)
        hidden = torch.zeros(2, len(own), 4)
        mask = piece_mask(implementation, hidden, positions[:, own], window, Pieces(None, ranks, rank))
        if implementation == "flex_attention":
            rows, queries, every = (
                torch.arange(2)[:, None, None],
                torch.arange(len(own))[:, None],
                torch.arange(context),
            )
            mask = mask.mask_mod(rows, 0, queries, every)
        elif implementation == "eager":
            mask = mask[:, 0] == 0
        else:
            mask = mask[:, 0]
        assert torch.equal(mask, wanted[:, own][:, :, keys])


def test_visible_is_the_models_own_rule():
    """The library's mask of a packed row, at the window's and the document's edges."""
    model = network(SHAPE, 16)
    positions = packed(1, 16, 2)["position_ids"]
    model.set_attn_implementation("eager")
    seen = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda module, _, kwargs: seen.update({module.sliding_window: kwargs["attention_mask"]}),
            with_kwargs=True,
        )
    model(input_ids=torch.zeros(1, 16, dtype=torch.int64), position_ids=positions)
    place = torch.arange(16)
    for window, mask in seen.items():
        assert torch.equal(visible(place[:, None], place, positions[0][:, None], window), mask[0, 0] == 0)


# ---------------------------------------------------------------------------- rows of W_pack


def test_row_order_written_out():
    # 4 query heads, 2 key/value heads of one row each: q0 q1 q2 q3 | k0 k1 | v0 v1
    assert row_order(4, 2, 1, 2).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert row_order(4, 2, 2, 1).tolist() == list(range(16))


def test_rows_come_back():
    config = network(SHAPE | {"num_key_value_heads": 1}, 16).config
    heads, kv_heads = SHAPE["num_swa_attention_heads"], SHAPE["num_swa_key_value_heads"]
    weight = torch.randn((heads + 2 * kv_heads) * 48 // heads, 48)
    for name in (
        "model.layers.1.self_attn.W_pack.weight",
        "optimizer.layers.1.self_attn.W_pack.weight.exp_avg",
    ):
        moved = regrouped_rows(name, weight, config, 2)
        assert not torch.equal(moved, weight) and torch.equal(official_rows(name, moved, config, 2), weight)
    for name in ("model.layers.0.self_attn.W_pack.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert regrouped_rows(name, weight, config, 2) is weight  # whole attention; another matrix
    step = torch.zeros(())
    assert regrouped_rows("layers.1.self_attn.W_pack.weight.step", step, config, 2) is step
