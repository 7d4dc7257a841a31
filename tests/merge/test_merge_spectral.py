import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import merge, merge_state_dicts
from galenic.merge.config import MethodParameters
from galenic.merge.spectral import iso_c, iso_cts, tsv
from galenic.runtime import UserError

METHODS = {"tsv": tsv, "iso_c": iso_c, "iso_cts": lambda deltas: iso_cts(deltas, 0.8)}


def matrices(count, shape, seed=0):
    return list(
        torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


def rotation(size, seed):
    return torch.linalg.qr(matrices(1, (size, size), seed)[0]).Q


def procrustes(columns):
    """The polar factor by another road: A (A^T A)^(-1/2)."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    return columns @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (7, 15)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tsv_from_its_definition(count, shape):
    deltas = matrices(count, shape, seed=count)
    kept = min(shape) // count
    lefts, values, rights = [], [], []
    for delta in deltas:
        squares, left = torch.linalg.eigh(delta @ delta.T)
        left, value = left.flip(1)[:, :kept], squares.flip(0)[:kept].sqrt()
        lefts.append(left)
        values.append(value)
        rights.append(delta.T @ left / value)
    expected = procrustes(torch.cat(lefts, 1)) @ torch.diag(torch.cat(values))
    expected = expected @ procrustes(torch.cat(rights, 1)).T
    torch.testing.assert_close(tsv(deltas), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (7, 15)])
def test_iso_c_has_one_singular_value_and_the_sums_directions(shape):
    deltas = matrices(3, shape)
    total, merged = sum(deltas), iso_c(deltas)
    values = torch.linalg.svdvals(total)
    torch.testing.assert_close(torch.linalg.svdvals(merged), values.mean().expand_as(values))
    # The polar factor of the sum: what is left of it after the merged matrix is taken off is symmetric and positive.
    stretched = merged.T @ total if shape[0] >= shape[1] else merged @ total.T
    torch.testing.assert_close(stretched, stretched.T)
    assert torch.linalg.eigvalsh(stretched).min() > 0


@pytest.mark.parametrize(("count", "share"), [(2, 0.8), (3, 0.5), (2, 0.0)])
def test_iso_cts_from_its_definition(count, share):
    shape = (14, 10)
    deltas = matrices(count, shape, seed=5)
    own = int((1 - share) * 10 / count + 1e-9)
    common = torch.linalg.svd(sum(deltas), full_matrices=False)
    k = 10 - own * count
    basis = common.U[:, :k]
    lefts, values, rights = [], [], []
    for delta in deltas:
        rest = torch.linalg.svd(delta - basis @ basis.T @ delta, full_matrices=False)
        lefts.append(rest.U[:, :own])
        values.append(rest.S[:own])
        rights.append(rest.Vh[:own].T)
    lefts, values, rights = [*lefts, basis], [*values, common.S[:k]], [*rights, common.Vh[:k].T]
    merged = iso_cts(deltas, share)
    expected = (
        torch.cat(values).sum() / 10 * procrustes(torch.cat(lefts, 1)) @ procrustes(torch.cat(rights, 1)).T
    )
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-7)
    assert torch.linalg.svdvals(merged).std() < 1e-6  # isotropic


def test_iso_cts_with_everything_common_is_iso_c():
    deltas = matrices(3, (9, 6))
    torch.testing.assert_close(iso_cts(deltas, 1.0), iso_c(deltas))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(METHODS)),
    st.integers(1, 3),
    st.integers(4, 12),
    st.integers(4, 12),
    st.integers(0, 1000),
)
def test_rotations_transposition_order_and_scale(method, count, rows, columns, seed):
    merge, deltas = METHODS[method], matrices(count, (rows, columns), seed)
    merged = merge(deltas)
    left, right = rotation(rows, seed + 1), rotation(columns, seed + 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(merge([left @ d @ right for d in deltas]), left @ merged @ right, **tolerance)
    torch.testing.assert_close(merge(deltas[::-1]), merged, **tolerance)
    torch.testing.assert_close(merge([3 * d for d in deltas]), 3 * merged, **tolerance)
    if method != "iso_cts":  # which projects on the left alone, as its paper does
        torch.testing.assert_close(merge([d.T for d in deltas]), merged.T, **tolerance)


def test_tsv_of_tasks_in_orthogonal_subspaces_is_their_sum():
    left, right = rotation(12, 1), rotation(12, 2)
    core = torch.diag(torch.arange(6.0, 0, -1, dtype=torch.float64))
    deltas = [left[:, :6] @ core @ right[:, :6].T, left[:, 6:] @ core @ right[:, 6:].T]
    torch.testing.assert_close(tsv(deltas), sum(deltas))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_null_directions_contribute_nothing(method):
    """Rank one task matrices: the merged one lives in the space they span, whatever a solver says of the rest."""
    first, second = torch.zeros(2, 8, 10, dtype=torch.float64)
    first[0, 0], second[3, 4] = 5.0, 2.0
    merged = METHODS[method]([first, second])
    assert int((merged.abs() > 1e-12).sum()) == 2 and merged[0, 0] > 0 and merged[3, 4] > 0
    assert not METHODS[method]([first * 0, first * 0]).any()


def test_equal_experts_under_tsv_give_their_first_components():
    delta = matrices(1, (8, 6))[0]
    parts = torch.linalg.svd(delta, full_matrices=False)
    expected = parts.U[:, :3] * parts.S[:3] @ parts.Vh[:3]
    torch.testing.assert_close(tsv([delta, delta]), expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_matrices_are_merged_and_the_rest_averaged(states, method):
    base, experts = states(3)
    numbers = MethodParameters(scale=0.7)
    merged = merge_state_dicts(base, experts, method, parameters=numbers, weights=[1, 2, 1])
    for name, tensor in base.items():
        origin = tensor.double()
        deltas = [w * (e[name].double() - origin) for w, e in zip([1, 2, 1], experts, strict=True)]
        linear = tensor.ndim == 2 and "embed" not in name and "lm_head" not in name
        task = METHODS[method](deltas) if linear else sum(deltas) / 3
        torch.testing.assert_close(merged[name].double(), origin + 0.7 * task, rtol=1e-6, atol=1e-8)


def test_folders_give_the_same_bits_and_the_plan_says_what_a_matrix_needs(family, tmp_path, capsys):
    from safetensors.torch import load_file

    from galenic.cli import main
    from galenic.merge import merge

    models = [{"model": str(folder)} for folder in family[1:]]
    recipe = {"merge_method": "tsv", "base_model": str(family[0]), "models": models}
    out = merge(recipe, tmp_path / "out")
    base, *experts = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in family
    )
    expected, merged = merge_state_dicts(base, experts, "tsv"), load_file(out / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps(recipe | {"out": str(tmp_path / "plan")}))
    assert main(["merge", "--config", str(file), "--plan"]) == 0
    assert "memory" in capsys.readouterr().out


def test_a_device_is_for_singular_values_and_must_be_there(family, tmp_path, monkeypatch):
    recipe = {"base_model": str(family[0]), "models": [{"model": str(folder)} for folder in family[1:]]}
    with pytest.raises(UserError, match="device: cuda is for tsv"):
        merge(recipe | {"device": "cuda"}, tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        merge(recipe | {"device": "cuda", "merge_method": "tsv"}, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
