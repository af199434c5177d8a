"""Forward passes in several threads, with concurrent changes of the adapter."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from .test_interrupted import CALLS, Case, gradients, whole

configs = pytest.mark.parametrize("config", ["alone", "at once", "factored"])


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def beside(main: Callable[[], object], others: list[Callable[[], object]]) -> None:
    """Run a function, and others repeatedly in separate threads until it returns; raise the first error."""
    done = threading.Event()

    def work(other: Callable[[], object]) -> None:
        while not done.is_set():
            other()

    with ThreadPoolExecutor(len(others)) as pool:
        runs = [pool.submit(work, other) for other in others]
        try:
            main()
        finally:
            done.set()
    for run in runs:
        run.result()


@pytest.mark.law("threads")
@configs
def test_training_beside_inference(config: str) -> None:
    """Threads do not use each other's updates: all gradients exist, and outputs are those of the arrays."""
    case = Case(config)

    def train() -> None:
        for _ in range(40):
            case.check(gradients, 0)

    beside(train, [lambda: case.check(whole, 0)] * 2)


@pytest.mark.law("threads")
@configs
def test_arrays_loaded_beside_passes_are_what_counts_from_then_on(config: str) -> None:
    """A running pass may see a mixture of old and new arrays; a later one sees only the new ones."""
    case = Case(config)

    def load() -> None:
        for turn in range(30):
            case.adapter.load_arrays(case.arrays[turn % 2])
            case.check(whole, turn % 2)

    beside(load, [lambda: whole(case.model)] * 2)
    for which in (1, 0):
        case.adapter.load_arrays(case.arrays[which])
        for call in CALLS:
            case.check(call, which)
