"""The internals of ``tnadapt.backends`` that tests reach: kernels by themselves, their limits, and pretended devices.

Tests import them from this module alone, so that one place follows when the library is restructured.
"""

from __future__ import annotations

import importlib
from typing import Any

from tnadapt.backends import _numpy as numpy_backend
from tnadapt.backends._kernels import kernels, work_space
from tnadapt.backends._kernels.gpu import launch_plans

__all__ = ["kernels", "launch_plans", "numpy_backend", "work_space"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: processes that test the kernels do without."""
    if name == "torch_kernels":
        return importlib.import_module("tnadapt.backends._torch_kernels")
    if name == "vector":
        return importlib.import_module("tnadapt.torch._delta").vector
    raise AttributeError(name)
