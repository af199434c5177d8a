"""A shared cache of the pretrained model, and adapters' files of every task, for all tests here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Return a function from the name of a task to an adapter's file, of an untrained adapter, and its data.

    The base is in the folder ``model`` beside the file.
    """
    from .tiny_models import JOBS, untrained

    @functools.cache
    def adapter(name: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(name)
        model, write, suffix = JOBS[name]
        data = write(folder / f"a{suffix}")
        return untrained(folder / "a.safetensors", model(folder / "model"), data), data

    return adapter
