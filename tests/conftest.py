"""Profiles of Hypothesis, and every array library that is installed as a parameter.

Three profiles: ``ci`` (the default) is derandomized, so that a run tells of the change and not of luck;
``HYPOTHESIS_PROFILE=long`` searches anew, 24 times as far; ``brief`` is for a second run of the same tests, which asks
what is different about an environment and not whether the laws hold.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tnadapt.backends import OPTIONAL, Backend, load_backend, register_backend

from .laws import markers
from .support.depth import in_depth

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=SLOW)
settings.register_profile("brief", derandomize=True, deadline=None, max_examples=10, suppress_health_check=SLOW)
settings.register_profile("long", deadline=None, max_examples=600, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


#: For laws that are the same in any library: the core is tested without torch.
NUMPY_AND_TORCH = [name for name in ("numpy", "torch") if installed(name)]


if installed("jax"):
    import jax

    # Laws are checked in float64. What happens without it has a test of its own.
    jax.config.update("jax_enable_x64", True)
    # Every operation is compiled for every shape, and runs once or twice: compiling takes nearly all of the time.
    jax.config.update("jax_disable_most_optimizations", True)

if installed("array_api_strict"):
    import array_api_strict

    class StrictBackend(Backend):
        """The reference of the array API standard: it has nothing that the standard does not promise."""

        name = "array_api_strict"

        def __init__(self) -> None:
            super().__init__(array_api_strict)

        def lacks(self, x: object) -> frozenset[str]:
            return frozenset(OPTIONAL)

        def matmul(self, a: Any, b: Any) -> Any:
            # It computes with NumPy, where a correct product may set the flag of an invalid operation: see NumPy's
            # own backend.
            with np.errstate(invalid="ignore"):
                return super().matmul(a, b)

    register_backend("array_api_strict", StrictBackend)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(markers)


LIBRARIES = ("numpy", "array_api_strict", "torch", "jax", "cupy")
# JAX compiles every operation for every shape: a grid over it takes minutes.
SLOW_LIBRARIES = ("jax",)


def of_library(library: str, *values: Any) -> Any:
    """Return the parameters of a case with a library, marked as slow where it is."""
    marks = [pytest.mark.slow] if library in SLOW_LIBRARIES else []
    return pytest.param(library, *values, id="-".join([library, *map(str, values)]), marks=marks)


def on_every_library(name: str, cases: Iterable[Any], few: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over the libraries and cases; slow libraries have all of them in the long profile only."""
    every = list(cases)
    some = in_depth(every, few)
    pairs = [(one, case) for one in LIBRARIES for case in (some if one in SLOW_LIBRARIES else every)]
    return pytest.mark.parametrize(("backend", name), [of_library(*pair) for pair in pairs], indirect=["backend"])


#: For properties of drawn shapes.
of_any_shape = pytest.mark.parametrize(
    "backend",
    [of_library(name) for name in in_depth(LIBRARIES, [one for one in LIBRARIES if one not in SLOW_LIBRARIES])],
    indirect=True,
)


@pytest.fixture(params=[of_library(name) for name in LIBRARIES], scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each library in turn; skipped, with the reason, where it cannot compute here."""
    name = request.param
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    found = load_backend(name)
    if not found.usable():
        pytest.skip(f"{name} finds no device to compute on")
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240318)


@pytest.fixture
def keyboard() -> Iterator[None]:
    """What a test starts hears the keyboard's interrupt, also where a shell runs the tests in its background.

    There SIGINT is ignored, and to ignore is inherited; a handler is not. (``preexec_fn`` would fork a process
    in which JAX has threads.)
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of the benchmarks by its name; afterwards they are as if they had never been imported."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not in this copy of the project")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that Python and NumPy had allocated at the most, beyond what was there."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def relative_error(found: object, expected: object) -> float:
    """Largest difference, relative to the largest element expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = np.max(np.abs(expected), initial=0.0)
    return float(np.max(np.abs(found - expected), initial=0.0) / (scale or 1.0))
