"""Attention by stretches of packed documents: exactly what the dense mask lets through, and no stretch across rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import all_close, build, close, gradients, tokens

from galenic.model.modeling_baichuan_m1 import stretches


def dense(age: torch.Tensor, window: int | None) -> torch.Tensor:
    """[B, T, T]: key s is seen by query t if it is of t's document, not after it, and within the window."""
    lag = torch.arange(age.shape[1])[:, None] - torch.arange(age.shape[1])
    seen = age if window is None else age.clamp_max(window - 1)
    return (lag >= 0) & (lag <= seen[:, :, None])


@st.composite
def ages(draw) -> torch.Tensor:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    start = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    age = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        for column in range(1, length):
            age[row, column] = 0 if start[row * length + column] else age[row, column - 1] + 1
    return age


@given(ages(), st.none() | st.integers(2, 20), st.integers(1, 12))
def test_stretches_are_the_dense_mask(age, window, least):
    documents = stretches(age, window, least)
    assert sum(documents.lengths) == age.numel()
    length = age.shape[1]
    whole, begin = torch.zeros(age.numel(), age.numel(), dtype=torch.bool), 0
    for size, mask in zip(documents.lengths, documents.masks, strict=True):
        assert begin // length == (begin + size - 1) // length, "a stretch crosses rows"
        piece = torch.ones(size, size, dtype=torch.bool).tril() if mask is None else mask
        whole[begin : begin + size, begin : begin + size] = piece
        begin += size
    wanted = torch.block_diag(*dense(age, window).long()).bool()
    assert torch.equal(whole, wanted)


def test_neighbours_share_a_stretch_until_it_is_long_enough():
    age = torch.cat([torch.arange(n) for n in (3, 3, 3, 20, 1)])[None]
    assert stretches(age, None, least=8).lengths == [9, 20, 1]
    assert [mask is None for mask in stretches(age, None, least=8).masks] == [False, True, True]


@pytest.mark.parametrize("lengths", [[[150, 100], [250]], [[3, 97, 150], [120, 10, 120]]])
def test_it_equals_eager_attention(lengths):
    """Documents longer and shorter than a stretch, longer than the window of 5, rows of different documents."""
    ids = tokens(2, 250)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    found = {}
    for attention in ("sdpa", "eager"):
        model = build(attention).train()
        output = model(ids, position_ids=positions, labels=ids)
        found[attention] = output.logits, gradients(output.loss, model)
    close(found["sdpa"][0], found["eager"][0])
    all_close(found["sdpa"][1], found["eager"][1])
