"""What the scripts of this folder share: threads, optional peers, and contestants that take turns."""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tnadapt.backends import one_blas_thread

if TYPE_CHECKING:
    from torch import nn


def optional(name: str) -> Any:
    """Return a peer's module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Limit BLAS and torch to one thread, or let both have all that the process was started with."""
    torch = optional("torch")
    with ExitStack() as stack:
        if number == 1:
            stack.enter_context(one_blas_thread())
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(number)
        yield


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; the order moves on by one every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for place in range(len(order)):
            name = order[(turn + place) % len(order)]
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(seconds: Sequence[float], reference: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median, lowest and highest ratio within a round."""
    each = [mine / other for mine, other in zip(seconds, reference, strict=True)]
    found = {"ratio": statistics.median(each), "low": min(each), "high": max(each)}
    return {name: round(value, digits) for name, value in found.items()}


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules with the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
