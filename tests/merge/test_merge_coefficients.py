import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import gram, metagpt_coefficients
from galenic.merge.io import StateDict
from galenic.merge.kernels import BLOCK
from galenic.merge.metagpt import cosines, effective_models, norm_warnings
from galenic.merge.statistics import gram_matrices, total
from galenic.runtime import UserError


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 3))
def test_closed_form_minimises_weighted_distance_for_correlated_task_vectors(count, seed, correlation):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(50, generator=generator, dtype=torch.float64)
    tau = torch.randn(count, 50, generator=generator, dtype=torch.float64) + correlation * shared
    tau *= torch.rand(count, 1, generator=generator, dtype=torch.float64) + 0.1
    matrix = tau @ tau.T
    c = matrix.diagonal()
    # Minimise sum_t c_t || sum_k lambda_k tau_k - tau_t ||^2 numerically: stacked least squares.
    rows = torch.cat([math.sqrt(c[t]) * tau.T for t in range(count)])
    target = torch.cat([math.sqrt(c[t]) * tau[t] for t in range(count)])
    solution = torch.linalg.lstsq(rows, target[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(metagpt_coefficients(matrix), solution, rtol=1e-8, atol=1e-8)


def test_coefficients_of_known_norms():
    assert metagpt_coefficients(torch.diag(torch.tensor([9.0, 1.0]))).tolist() == [0.9, 0.1]
    assert metagpt_coefficients(torch.zeros(4, 4)).tolist() == [0.25] * 4
    huge = metagpt_coefficients(torch.diag(torch.tensor([1e308, 1e308], dtype=torch.float64)))
    assert huge.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "bad", [torch.ones(2, 3), torch.full((2, 2), math.nan), -torch.eye(2), torch.ones(0, 0)]
)
def test_coefficients_refuse_what_is_no_gram_matrix(bad):
    with pytest.raises(UserError):
        metagpt_coefficients(bad)


def test_effective_models():
    assert effective_models([0.25] * 4) == pytest.approx(4)
    assert effective_models([1.0, 0.0]) == 1
    assert effective_models([0.3, 0.3, 0.3]) == pytest.approx(3)
    assert effective_models([0.0, 0.0]) == 0


def test_warnings_name_the_dominant_and_the_zero_expert():
    matrix = torch.diag(torch.tensor([100.0, 1.0, 0.0]))
    texts = norm_warnings(["a", "b", "c"], matrix, metagpt_coefficients(matrix).tolist())
    assert len(texts) == 2 and "'c' equals the base" in texts[0] and "'a' gets 0.990" in texts[1]
    assert norm_warnings(["a", "b"], torch.eye(2), [0.5, 0.5]) == []
    assert "every expert" in norm_warnings(["a", "b"], torch.zeros(2, 2), [0.5, 0.5])[0]


def test_cosines_of_zero_and_parallel_vectors():
    tau = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    values = cosines(tau @ tau.T)
    assert values[0] == pytest.approx([1, 1, 0, 2**-0.5]) and values[2] == [0, 0, 1, 0]


# ---------------------------------------------------------------------------- Gram matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gram_equals_dense_float64(states, dtype):
    base, experts = states(dtype=dtype, shapes={"a": (3 * BLOCK + 17,), "b": (5, 7), "c": ()})
    matrices = gram(base, experts)
    for name in base:
        deltas = torch.stack([(e[name].double() - base[name].double()).flatten() for e in experts])
        torch.testing.assert_close(matrices[name], deltas @ deltas.T, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(total(matrices), sum(matrices.values()), rtol=1e-14, atol=0)


def test_gram_has_the_same_bits_for_any_chunk_thread_count_and_source(states, family):
    base, experts = states(shapes={"a": (20 * BLOCK + 5,), "b": (70, 3)})
    models = [StateDict(s, "x") for s in [base, *experts]]
    expected = gram(base, experts)
    threads = torch.get_num_threads()
    for chunk, used in ((BLOCK, 1), (3 * BLOCK, 2), (64 * BLOCK, 1)):
        torch.set_num_threads(used)
        found = gram_matrices(models[0], models[1:], chunk=chunk)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.set_num_threads(threads)
    state_base, state_experts = states()
    on_disk, in_memory = gram(family[0], family[1:]), gram(state_base, state_experts)
    assert all(torch.equal(on_disk[name], in_memory[name]) for name in in_memory)


def test_gram_is_symmetric_and_total_ignores_order(states):
    matrices = gram(*states(experts=4))
    assert all(torch.equal(m, m.T) for m in matrices.values())
    backwards = dict(reversed(matrices.items()))
    assert torch.equal(total(matrices), total(backwards))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", [0, 2])
def test_nan_and_infinity_are_named(states, value, broken):
    base, experts = states()
    models = [base, *experts]
    models[broken]["lm_head.weight"][1, 2] = value
    with pytest.raises(UserError, match=r"'lm_head.weight' holds NaN or infinity \(element 26\)") as error:
        gram(base, experts)
    assert str(error.value).startswith("base:" if broken == 0 else "expert 1:")


def test_integer_buffers_must_be_equal_and_are_not_counted(states):
    base, experts = states()
    for state in [base, *experts]:
        state["steps"] = torch.tensor([1, 2])
    assert "steps" not in gram(base, experts)
    experts[1]["steps"] = torch.tensor([1, 3])
    with pytest.raises(UserError, match="buffer 'steps' differs"):
        gram(base, experts)


def test_no_floating_point_tensors():
    with pytest.raises(UserError, match="nothing to merge"):
        metagpt_coefficients(gram({"a": torch.tensor([1])}, [{"a": torch.tensor([1])}]))
