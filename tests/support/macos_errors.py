"""Modules as on macOS, where ENOTSUP and EOPNOTSUPP are different numbers."""

from __future__ import annotations

import errno
import importlib.util
from typing import Any

import pytest

__all__ = ["ENOTSUP", "as_on_macos"]

ENOTSUP, EOPNOTSUPP = 45, 102


def as_on_macos(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A second copy of a module, executed with the numbers of macOS."""
    monkeypatch.setattr(errno, "ENOTSUP", ENOTSUP)
    monkeypatch.setattr(errno, "EOPNOTSUPP", EOPNOTSUPP)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
