"""Torch's threads. Torch is imported on use: the engines, which need them, also check options before that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["number_of_threads", "threads"]


def number_of_threads() -> int:
    """Return torch's number of threads."""
    import torch

    return torch.get_num_threads()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Set torch's number of threads inside ``with``."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
