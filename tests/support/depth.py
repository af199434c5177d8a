"""Fewer cases of tests that take long; all of them with ``HYPOTHESIS_PROFILE=long``, which ``.ci/long`` sets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

__all__ = ["LONG", "in_depth", "long_only"]

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"

#: Marks a test that takes more than half a minute.
long_only = pytest.mark.skipif(not LONG, reason="takes long: HYPOTHESIS_PROFILE=long runs it")


T = TypeVar("T")


def in_depth(cases: Iterable[T], few: Iterable[T]) -> list[T]:
    """Return all cases in the long profile, otherwise a few of them, one of each kind."""
    every, some = list(cases), list(few)
    unknown = [case for case in some if case not in every]
    assert not unknown, f"{unknown} are no cases; there are {every}"
    return every if LONG else some
