"""Doctests that import a library which is not installed are skipped: the core passes without any."""

from __future__ import annotations

import importlib.util
import re

import pytest

# Two packages that cannot be imported without torch, though some of their modules could be alone.
collect_ignore = [] if importlib.util.find_spec("torch") else ["tnadapt/torch", "tnadapt/finetune"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.DoctestItem):
            continue
        source = "".join(example.source for example in item.dtest.examples)
        for name in re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE):
            if importlib.util.find_spec(name) is None:
                item.add_marker(pytest.mark.skip(reason=f"its example imports {name}, which is not installed"))


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that writes a file writes it somewhere else than here."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
