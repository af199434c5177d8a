"""A plugin of pytest: these tests and no others, in this order, and which one failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["Order"]


class Order:
    """Keeps the tests that are asked for.

    Parameters
    ----------
    tests : sequence of str
    said : Path
        Each test that begins, a line; the last one is that which failed, or never ended.
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
