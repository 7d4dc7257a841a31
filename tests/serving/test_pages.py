"""The memory of previous tokens against shifting a whole text, however the text is cut, placed and shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.model.modeling_baichuan_m1 import convolve
from galenic.serving.pages import exchange


def step(pages, parts):
    """Runs one step for [(text, first position, how many tokens, its blocks)]; returns what each request got."""
    places = pages.shape[1]
    raw = torch.cat([text[begin : begin + count] for text, begin, count, _ in parts])
    counts = torch.tensor([count for _, _, count, _ in parts])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
    lengths = torch.tensor([begin + count for _, begin, count, _ in parts], dtype=torch.int32)
    table = torch.stack([blocks for *_, blocks in parts]).int()
    slots = torch.cat(
        [
            blocks[torch.arange(begin, begin + count) // places] * places
            + torch.arange(begin, begin + count) % places
            for _, begin, count, blocks in parts
        ]
    )
    return exchange(raw, pages, starts, lengths, table, slots).split(counts.tolist())


def shifted(text):
    return torch.cat((torch.zeros_like(text[:1]), text[:-1]))


def empty_pages(blocks, places, layout="places first"):
    """Pages full of numbers that would show; any order of the dimensions in memory."""
    if layout == "places first":
        return torch.full((blocks, places, 2, 3), torch.nan)
    return torch.full((blocks, 2, places, 3), torch.nan).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_shifted_text(data):
    places = data.draw(st.integers(1, 5), "places")
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4), "lengths")
    columns = -(-max(lengths) // places)
    order = torch.randperm(len(lengths) * columns, generator=torch.Generator().manual_seed(7)) + 1
    tables = order.view(len(lengths), columns)
    texts = [torch.randn(length, 2, 3) for length in lengths]
    pages = empty_pages(len(order) + 1, places, data.draw(st.sampled_from(["places first", "heads first"])))
    done, got = [0] * len(texts), [[] for _ in texts]
    while any(d < length for d, length in zip(done, lengths, strict=True)):
        waiting = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True), "chosen")
        counts = [data.draw(st.integers(1, lengths[i] - done[i]), "count") for i in chosen]
        found = step(pages, [(texts[i], done[i], n, tables[i]) for i, n in zip(chosen, counts, strict=True)])
        for i, n, part in zip(chosen, counts, found, strict=True):
            done[i] += n
            got[i].append(part)
    for text, parts in zip(texts, got, strict=True):
        assert torch.equal(torch.cat(parts), shifted(text))


def test_another_request_goes_on_from_a_shared_block():
    text, other = torch.randn(8, 2, 3), torch.randn(8, 2, 3)
    other[:4] = text[:4]
    pages = empty_pages(5, 4)
    step(pages, [(text, 0, 8, torch.tensor([1, 2]))])
    [found] = step(pages, [(other, 4, 4, torch.tensor([1, 3]))])  # block 1 is shared, position 3 lies there
    assert torch.equal(found, shifted(other)[4:])


def test_requests_without_a_row_and_the_block_behind_the_window():
    text = torch.randn(9, 2, 3)
    pages = empty_pages(4, 4)
    step(pages, [(text, 0, 8, torch.tensor([1, 2, 0]))])
    pages[1] = torch.nan  # given back: the window is two tokens
    starts, lengths = torch.tensor([0, 1, 1, 1]), torch.tensor([9, 0, 0])
    table = torch.tensor([[0, 2, 3], [0, 0, 0], [0, 0, 0]])
    found = exchange(text[8:], pages, starts, lengths, table, torch.tensor([12]))
    assert torch.equal(found, text[7:8])


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_with_taps_it_is_the_models_convolution(cut):
    text, taps = torch.randn(10, 2, 3), torch.randn(1, 1, 2, 1, 2)
    pages, blocks = empty_pages(4, 4), torch.tensor([2, 1, 3])
    before = torch.cat(step(pages, [(text, 0, cut, blocks)]) + step(pages, [(text, cut, 10 - cut, blocks)]))
    tap0, tap1 = taps[0, 0].unbind(-1)
    mixed = torch.addcmul(text * tap1, before, tap0)
    expected = convolve(torch.cat((torch.zeros(1, 2, 3), text))[None], taps)[0]
    assert torch.equal(mixed, expected)
