"""The internals of ``tnadapt.backends`` that tests reach: kernels by themselves, their limits, and pretended devices.

Tests import them from this module alone, so that one place follows when the library is restructured.
"""

from __future__ import annotations

from importlib.util import find_spec

from tnadapt.backends import _numpy as numpy_backend
from tnadapt.backends._kernels import kernels, work_space
from tnadapt.backends._kernels.gpu import launch_plans

__all__ = ["kernels", "launch_plans", "numpy_backend", "work_space"]

if find_spec("torch") is not None:
    from tnadapt.backends import _torch_kernels as torch_kernels
    from tnadapt.torch._delta import vector

    __all__ += ["torch_kernels", "vector"]
