"""The Triton kernels, which can be imported where Triton is installed alone."""

from __future__ import annotations

from tnadapt.backends._kernels.gpu import triton_kernels, triton_launcher

__all__ = ["triton_kernels", "triton_launcher"]
