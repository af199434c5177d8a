"""A pytest plugin that runs given tests in a given order, and records which one failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["Order"]


class Order:
    """Keeps only the requested tests, in order.

    Parameters
    ----------
    tests : sequence of str
    said : Path
        A file with one line per started test; the last one failed, or never finished.
    """

    def __init__(self, tests: Sequence[str], said: Path) -> None:
        self.place = {test: place for place, test in enumerate(tests)}
        self.said = said

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid]
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self.said.open("a", encoding="utf-8") as file:
            file.write(nodeid + "\n")
