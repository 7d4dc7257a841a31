"""The compiled loops give, bit for bit, what a few operations on whole tensors in float64 give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import kernels, methods
from galenic.merge.blocks import as_numpy
from galenic.merge.statistics import no_thinning

SIZES = [1, 2, kernels.TILE - 1, kernels.TILE, 5 * kernels.TILE + 3, kernels.BLOCK + 17]


def models(seed, size, dtype, experts=3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).mul(0.02)
    rows = [base + 0.001 * (t + 1) * torch.randn(size, generator=generator) for t in range(experts)]
    return torch.stack([base, *rows]).to(dtype)


def merged(rows, start, thinning, fusing, dtype, with_origin=True):
    rows = rows.float() if rows.dtype == torch.float16 else rows
    kind = torch.float32 if dtype == torch.float16 else dtype
    out = torch.empty(rows.shape[1], dtype=kind)
    array = as_numpy(rows)
    origin, array = (array[0], array[1:]) if with_origin else (None, array)
    rounding = kernels.ROUNDINGS[str(dtype).removeprefix("torch.")]
    largest = kernels.merged(origin, array, start, thinning, fusing, rounding, as_numpy(out))
    assert np.float32(largest) == out.float().abs().max()
    return out.to(dtype)


def fusing(weights, elects=False, votes=None, normalizes=False, scale=1.0):
    weights = np.array(weights, dtype=np.float64)
    votes = weights if votes is None else np.array(votes, dtype=np.float64)
    return kernels.Fusing(weights, elects, votes, normalizes, weights[weights > 0].min(initial=1.0), scale)


def bits(tensor):
    """What a tensor is, the sign of zero included."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]).tolist()


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sums(source, dtype, size):
    rows = models(size, size, source)
    weights = [0.2, 0.7, -0.3]
    plain = no_thinning(3)
    origin, *deltas = rows.double()
    deltas = [row - origin for row in deltas]
    soup = methods.weighted_sum(list(rows[1:]), weights)
    found = merged(rows[1:], 0, plain, fusing(weights), dtype, with_origin=False)
    assert bits(found) == bits(methods.round_once(soup, dtype))
    added = methods.weighted_sum(deltas, weights) + origin
    found = merged(rows, 0, plain, fusing(weights), dtype)
    assert bits(found) == bits(methods.round_once(added, dtype))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_trimming_and_election(source, normalizes, size):
    rows = models(size, size, source)
    origin, *deltas = rows.double()
    deltas = [row - origin for row in deltas]
    least = [float((d.float().abs()).median()) for d in deltas]
    largest = np.array(
        [d.float().abs().quantile(0.9).item() if size < 1e6 else np.inf for d in deltas], np.float32
    )
    limits = np.array([methods.largest_below(value) for value in least])
    thinning = no_thinning(3)._replace(trims=True, limits=limits, largest=largest)
    kept = [
        d * ((d.float().abs() >= a) & (d.float().abs() <= float(b)))
        for d, a, b in zip(deltas, least, largest, strict=True)
    ]
    weights, votes = [1.0, 0.0, 2.5], [1.0, 1.0, 1.0]
    expected = methods.ties(origin, kept, weights, 0.7, votes, normalizes)
    way = fusing(weights, elects=True, votes=votes, normalizes=normalizes, scale=0.7)
    found = merged(rows, 0, thinning, way, torch.float64)
    assert torch.equal(found, expected)
    found = merged(rows, 0, thinning, way, torch.bfloat16)
    assert torch.equal(found, methods.round_once(expected, torch.bfloat16))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**63), st.sampled_from(SIZES), st.integers(0, 10**12), st.floats(0.01, 1), st.booleans()
)
def test_chance(seed, size, half, density, elects):
    start = 2 * half
    rows = models(3, size, torch.bfloat16, experts=2)
    thinning = no_thinning(2)._replace(
        draws=True,
        keys=np.array([methods.stream(seed, name, "w") for name in "ab"], np.uint64),
        bounds=np.full(2, methods.bound(density)),
        densities=np.full(2, density),
    )
    origin, *deltas = rows.double()
    thinned = []
    for name, row in zip("ab", deltas, strict=True):
        kept = methods.keep_mask(seed, name, "w", start, start + size, density)
        thinned.append(methods.drop_and_rescale(row - origin, kept, density))
    expected = methods.weighted_sum(thinned, [0.5, 1.5]) + origin
    if elects:
        expected = methods.ties(origin, thinned, [0.5, 1.5])
    found = merged(rows, start, thinning, fusing([0.5, 1.5], elects, normalizes=True), torch.float64)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_kind_of_number(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-160, 140).repeat(200)
    values = torch.randn(len(exponents), generator=generator, dtype=torch.float64)
    values = torch.ldexp(values, exponents)
    midpoints = values[:20_000].to(dtype).double()
    step = torch.nextafter(midpoints.to(dtype), torch.tensor(torch.inf).to(dtype)).double() - midpoints
    middle = midpoints + step / 2
    nudge = torch.ldexp(torch.ones_like(middle), torch.frexp(middle)[1] - 50)
    values = torch.cat([values, middle, middle + nudge, middle - nudge, torch.tensor([0.0, -0.0]).double()])
    values = values[values.isfinite() & methods.round_once(values, dtype).isfinite()]
    found = merged(values[None], 0, no_thinning(1), fusing([1.0]), dtype, with_origin=False)
    assert bits(found) == bits(methods.round_once(values, dtype))


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        (torch.bfloat16, 3.3961775e38, 3.3961776e38),
        (torch.float16, 65519.99, 65520.0),
        (torch.float32, 3.4028235677973362e38, 3.4028235677973366e38),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_does_not_fit_is_seen(dtype, fits, too_large, sign):
    rounding = kernels.ROUNDINGS[str(dtype).removeprefix("torch.")]
    kind = torch.float32 if dtype == torch.float16 else dtype
    for value, expected in ((fits, True), (too_large, False), (np.inf, False), (np.nan, False)):
        rows = torch.tensor([[0.5, sign * value, 1.0]], dtype=torch.float64)
        out = torch.empty(3, dtype=kind)
        largest = kernels.merged(
            None, rows.numpy(), 0, no_thinning(1), fusing([1.0]), rounding, as_numpy(out)
        )
        assert (largest < rounding.too_large) == expected
        assert bool(methods.round_once(rows[0], dtype).isfinite().all()) == expected


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_products_add_up_to_dense_ones(source, size):
    rows = models(1, size, source)
    rows = rows.float() if source == torch.float16 else rows
    array = as_numpy(rows)
    sums = np.empty((-(-size // kernels.BLOCK), 3, 3))
    kernels.products(array[0], array[1:], 0, no_thinning(3), sums)
    deltas = rows[1:].double() - rows[0].double()
    for block, found in enumerate(sums):
        part = deltas[:, block * kernels.BLOCK : (block + 1) * kernels.BLOCK]
        torch.testing.assert_close(torch.from_numpy(found), part @ part.T, rtol=1e-12, atol=1e-300)


def test_products_do_not_depend_on_what_follows():
    # Lanes are the same whether the last tile is full or not: zeros are added.
    rows = models(1, 3 * kernels.TILE, torch.float32).numpy()
    one, other = np.empty((1, 3, 3)), np.empty((1, 3, 3))
    kernels.products(rows[0], rows[1:], 0, no_thinning(3), one)
    longer = np.concatenate([rows, np.repeat(rows[:1, :5], 4, 0)], axis=1)
    kernels.products(longer[0], longer[1:], 0, no_thinning(3), other)
    assert (one == other).all()
