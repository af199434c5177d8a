"""The FFT of torch tensors as a linear map of real numbers that is its own adjoint, and its own gradient."""

from __future__ import annotations

import array_api_compat.torch as namespace
import torch
from torch import Tensor

from ._dft2 import FFT_DTYPES, dft2_by_fft, dft2_in_chunks
from ._torch_maps import KernelPair, KernelWithFallback, Map, in_memory, linear_map

__all__ = ["dft2"]


def dft2(x: Tensor, fallback: Map) -> Tensor | None:
    """Compute ``Re(ifft2(x))`` over the last two axes; None if torch has no FFT of x, or exports a program.

    torch's own gradient of an FFT is one of complex numbers, which takes longer than the map itself.
    """
    if str(x.dtype).removeprefix("torch.") not in FFT_DTYPES or not x.numel():
        return None
    if in_memory(x):
        symmetric = KernelWithFallback(_transformed, fallback)
        return linear_map(x, KernelPair(symmetric, symmetric))
    # An exported program consists of matrix products, which run anywhere.
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return dft2_by_fft(namespace, x) if traced else None


def _transformed(x: Tensor) -> Tensor:
    x = x.detach()
    chunked = x.device.type == "cpu"
    found: Tensor = dft2_in_chunks(namespace, x, torch.empty_like) if chunked else dft2_by_fft(namespace, x)
    return found
