"""Statistics of tokens in chunks: values and gradients of dense float64, and never the logits of a whole batch."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galenic.align.token_statistics import token_statistics

TOKENS, VOCABULARY = 13, 17


def drawn(dtype=torch.float64, width=5, reference_width=7, tokens=TOKENS, vocabulary=VOCABULARY, seed=0):
    """A policy with gradient, a reference of another width, and targets."""
    torch.manual_seed(seed)

    def states(width):
        return (
            torch.randn(tokens, width, dtype=dtype, requires_grad=True),
            torch.randn(vocabulary, width, dtype=dtype, requires_grad=True),
        )

    return states(width), states(reference_width), torch.randint(vocabulary, (tokens,))


def dense(policy, reference, targets, temperature=1.0):
    """The definitions, written out: (log p(y), entropy, log q(y), KL), each (tokens,)."""
    p = ((policy[0] @ policy[1].T) / temperature).softmax(-1)
    q = ((reference[0] @ reference[1].T) / temperature).softmax(-1).detach()
    rows = torch.arange(len(targets))
    return (
        p[rows, targets].log(),
        -(p * p.log()).sum(-1),
        q[rows, targets].log(),
        (q * (q / p).log()).sum(-1),
    )


def weighted(columns, seed=1):
    """A scalar in which each value counts by a weight of its own; what carries no gradient is left out."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (column * torch.randn(len(column), dtype=column.dtype, generator=generator)).sum()
        for column in columns
    )


@pytest.mark.parametrize("chunk", [1, VOCABULARY * 4, 10**6], ids=["one", "four", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_definitions(chunk, temperature):
    policy, reference, targets = drawn()
    found = token_statistics(
        policy, targets, reference=reference, temperature=temperature, chunk_elements=chunk
    )
    columns = found.log_probs, found.entropy, found.reference_log_probs, found.kl
    expected = dense(policy, reference, targets, temperature)
    for one, other in zip(columns, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-12)
    assert not found.reference_log_probs.requires_grad
    gradients = torch.autograd.grad(weighted(columns), policy)
    for one, other in zip(gradients, torch.autograd.grad(weighted(expected), policy), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-11)


def test_the_gradients_are_those_of_finite_differences():
    (hidden, head), reference, targets = drawn(tokens=3, vocabulary=4)

    def of(hidden, head):
        found = token_statistics((hidden, head), targets, reference=reference, chunk_elements=8)
        return found.log_probs, found.entropy, found.kl

    assert torch.autograd.gradcheck(of, (hidden, head))


def test_logits_themselves_will_do():
    policy, reference, targets = drawn()
    whole = token_statistics(policy, targets, reference=reference)
    logits = [(hidden @ head.T, None) for hidden, head in (policy, reference)]
    for mixed in (logits, (policy, logits[1]), (logits[0], reference)):
        found = token_statistics(mixed[0], targets, reference=mixed[1], chunk_elements=VOCABULARY * 2)
        for name in ("log_probs", "entropy", "reference_log_probs", "kl"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-13, rtol=1e-12)
        one, other = (torch.autograd.grad(f.kl.sum(), policy, retain_graph=True) for f in (found, whole))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_a_model_does_not_differ_from_itself():
    policy, _, targets = drawn(torch.float32)
    found = token_statistics(policy, targets, reference=policy)
    assert torch.equal(found.kl, torch.zeros(TOKENS))
    assert torch.equal(found.log_probs, found.reference_log_probs)
    (gradient,) = torch.autograd.grad(found.kl.sum(), policy[0])
    assert gradient.abs().max() < 1e-6


def test_the_divergence_is_never_negative_and_says_which_way():
    policy, reference, targets = drawn(torch.float32, tokens=200)
    one = token_statistics(policy, targets, reference=reference).kl
    other = token_statistics(reference, targets, reference=policy).kl
    assert one.min() > 0 and other.min() > 0
    assert (one - other).abs().max() > 0.1  # KL(q || p) is not KL(p || q)


def test_without_a_reference_there_is_nothing_of_one():
    policy, _, targets = drawn()
    found = token_statistics(policy, targets)
    assert found.reference_log_probs is None and found.kl is None


def test_a_batch_without_tokens_has_a_gradient_of_zero():
    policy, reference, _ = drawn()
    empty = [(hidden[:0], head) for hidden, head in (policy, reference)]
    found = token_statistics(empty[0], torch.zeros(0, dtype=torch.long), reference=empty[1])
    assert all(getattr(found, name).shape == (0,) for name in ("log_probs", "entropy", "kl"))
    for gradient in torch.autograd.grad(found.log_probs.sum() + found.kl.sum(), policy):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_other_vocabularies_are_refused():
    policy, _, targets = drawn()
    _, reference, _ = drawn(vocabulary=VOCABULARY + 1)
    with pytest.raises(ValueError, match="the policy has 17 tokens, the reference 18"):
        token_statistics(policy, targets, reference=reference)


def test_bfloat16_states_are_summed_in_float32():
    policy, reference, targets = drawn(torch.bfloat16, width=32, reference_width=32, vocabulary=500)
    found = token_statistics(policy, targets, reference=reference)
    assert found.log_probs.dtype == found.kl.dtype == torch.float32
    logits = [(hidden @ head.T).double().log_softmax(-1) for hidden, head in (policy, reference)]
    expected = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)
    torch.testing.assert_close(found.kl.double(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_is_larger_than_a_chunk_or_what_was_given():
    tokens, vocabulary, width, chunk = 200, 512, 8, 4096
    policy, reference, targets = drawn(torch.float32, width, width, tokens, vocabulary)
    with Largest() as largest:
        found = token_statistics(policy, targets, reference=reference, chunk_elements=chunk)
        (found.log_probs + found.kl + found.entropy).sum().backward()
    assert policy[0].grad is not None and policy[1].grad is not None
    assert largest.elements <= max(chunk, vocabulary * width) < tokens * vocabulary // 20


PEAK = """
import sys, torch
from galenic.align.token_statistics import token_statistics
from galenic.runtime import peak_memory_bytes
torch.set_num_threads(1)
tokens, vocabulary, width = 4096, 16384, 32
policy = [torch.randn(n, width, requires_grad=True) for n in (tokens, vocabulary)]
reference = [torch.randn(n, width) for n in (tokens, vocabulary)]
def step(count, chunk):
    own, other = ((states[0][:count], states[1]) for states in (policy, reference))
    found = token_statistics(own, torch.arange(count), reference=other, chunk_elements=chunk)
    (found.log_probs + found.kl).sum().backward()
step(64, 2**20)  # what is loaded at first use
before = peak_memory_bytes()
step(tokens, int(sys.argv[1]))
print(peak_memory_bytes() - before)
"""


@pytest.mark.slow
def test_memory_is_a_few_chunks():
    """The logits of one model are 268 MB here; whole, of both, with what the way back needs, over a gigabyte."""
    found = {
        chunk: int(
            subprocess.run([sys.executable, "-c", PEAK, str(chunk)], capture_output=True, check=True).stdout
        )
        for chunk in (2**20, 2**26)
    }
    print({chunk: f"{size / 1e6:.0f} MB" for chunk, size in found.items()})
    assert found[2**20] < 100e6 < 1e9 < found[2**26]
