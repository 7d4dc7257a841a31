"""Matrix products in float32 on AMD processors: through oneDNN, which uses AVX-512 there, instead of MKL.

PyTorch's x86 wheels carry both libraries. They multiply float32 matrices with MKL, which keeps its AVX-512 kernels to
Intel's processors; with oneDNN a training step was 1.28 to 1.56 times as fast on an AMD EPYC (benchmarks/pretrain.py).
Precision is the same, the order of additions and so the last bits are not.
"""

import functools
import platform
import warnings
from pathlib import Path

SMALLEST = 2**21
"""Multiply-adds from which on oneDNN is worth its call."""


@functools.cache
def prefer_onednn() -> bool:
    """Sends float32 products of CPU matrices of this process through oneDNN, if the processor gains from it.

    It replaces the kernel of `aten::mm` below autograd, so derivatives of any order, hooks, sharding and
    checkpointing do not notice. Compiled graphs call another kernel and stay with MKL.

    Returns:
        Whether it does.
    """
    import torch

    if not _gains():
        return False
    linear = torch.ops.mkldnn._linear_pointwise.default

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype is b.dtype is torch.float32 and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST:
            return linear(_dense(a), _dense(b).t(), None, "none", [], "")
        return torch.mm(
            a, b, out=a.new_empty(a.shape[0], b.shape[1])
        )  # a kernel of its own, which is still PyTorch's

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        _library().impl("mm", product, "CPU", allow_override=True)
    return True


@functools.cache
def _library():
    """The replacement lasts as long as this object."""
    import torch

    return torch.library.Library("aten", "IMPL")


def _gains() -> bool:
    import torch

    info = Path("/proc/cpuinfo")
    amd = "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())
    return amd and torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()


def _dense(x):
    """The matrix itself or, where neither its rows nor its columns lie side by side, a copy: oneDNN has slow paths."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
