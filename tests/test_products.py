"""Products of matrices through oneDNN: the same numbers, wherever the matrices come from."""

import subprocess
import sys

import pytest
import torch

from galenic import products

SCRIPT = """
import torch
from galenic.products import prefer_onednn
print(prefer_onednn(), (torch.ones(256, 256) @ torch.eye(256)).sum().item())
"""


@pytest.fixture
def replaced(monkeypatch):
    """The replacement, on any x86 processor, for the length of a test."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_gains", lambda: True)
    products.prefer_onednn.cache_clear()
    library = torch.library.Library("aten", "IMPL")
    monkeypatch.setattr(products, "_library", lambda: library)
    assert products.prefer_onednn()
    yield
    library._destroy()
    products.prefer_onednn.cache_clear()


def _matrices(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(160, 256), torch.randn(256, 192)
    if kind == "transposed":
        return a.T.contiguous().T, b.T.contiguous().T
    if kind == "slices":
        return torch.randn(160, 300)[:, 20:276], torch.randn(256, 400)[:, ::2][:, :192]
    if kind == "expanded":
        return torch.randn(1, 256).expand(160, 256), torch.randn(256, 1).expand(256, 192)
    if kind == "small":
        return a[:4], b[:, :3]
    return a, b


@pytest.mark.parametrize("kind", ["plain", "transposed", "slices", "expanded", "small"])
def test_products_are_those_of_float64(replaced, kind):
    torch.manual_seed(0)
    a, b = _matrices(kind)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), atol=1e-4, rtol=1e-5)


def test_it_takes_float32_only(replaced):
    a, b = torch.randn(160, 256), torch.randn(256, 192)
    for dtype in (torch.float64, torch.bfloat16):
        assert (a.to(dtype) @ b.to(dtype)).dtype is dtype
    assert torch.equal(
        a.double() @ b.double(), torch.mm(a.double(), b.double(), out=torch.empty(160, 192).double())
    )


def test_derivatives_of_any_order(replaced):
    torch.manual_seed(0)
    x, w = torch.randn(160, 256, requires_grad=True), torch.randn(192, 256, requires_grad=True)

    def second(x, w):
        (slope,) = torch.autograd.grad(torch.nn.functional.linear(x, w).pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    want = second(x.double(), w.double())
    assert ((second(x, w) - want).norm() / want.norm()) < 1e-5


def test_a_step_repeats_bit_for_bit(replaced):
    torch.manual_seed(0)
    a, b = torch.randn(384, 256), torch.randn(256, 704)
    first = a @ b
    assert all(torch.equal(a.clone() @ b.clone(), first) for _ in range(20))


def test_it_is_asked_for_and_says_so():
    found = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(products._gains()), "65536.0"]
