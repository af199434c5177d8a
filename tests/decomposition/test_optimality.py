"""Errors, bounds and certificates that are computed when they are read are those of the fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.decomposition.internals import group_fits
from tnadapt.decomposition import GroupReport
from tnadapt.decomposition.fits import all_of, holds

KNOWN = {"size": 4, "norm": 2.0, "iterations": 0, "method": "SVD"}


@pytest.mark.parametrize("decompose", [tna.cp, tna.tucker])
def test_a_matrix_of_decaying_values_is_certified(decompose: Any) -> None:
    matrix = np.random.default_rng(0).normal(size=(120, 100)) @ np.diag(0.5 ** np.arange(100.0))
    result = decompose(matrix, 3)
    assert 0.0 < result.error < 1.0
    assert result.certified
    assert result.bound == pytest.approx(result.error)


def test_all_claims() -> None:
    def unasked() -> bool:
        pytest.fail("asked")

    assert all_of([True, True]) is True
    assert all_of([unasked, False]) is False
    several = all_of([True, lambda: True, lambda: False])
    assert callable(several)
    assert not holds(several)
    assert holds(all_of([True, lambda: True]))


@pytest.mark.parametrize("error_later", [False, True])
@pytest.mark.parametrize("use", [lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_report_that_is_computed_later_is_like_any_other(use: Any, error_later: bool) -> None:
    asked: list[str] = []

    def find_error() -> float:
        asked.append("error")
        return 0.5

    def find(error: float) -> tuple[float, bool]:
        asked.append("bound")
        return error / 2.0, False

    plain = GroupReport(**KNOWN, error=0.5, bound=0.25, certified=False)
    error: Any = find_error if error_later else 0.5
    report = GroupReport.computed_later(find, error=error, **KNOWN)
    assert asked == []
    assert (report.error, report.error, asked) == (0.5, 0.5, ["error"] * error_later)
    assert use(report) == plain
    assert (report.certified, report.bound, asked[error_later:]) == (False, 0.25, ["bound"])
    assert repr(report) == repr(plain)
    assert use(GroupReport.computed_later(find, error=error, **KNOWN)) == plain
    with pytest.raises(AttributeError, match="'GroupReport' object has no attribute 'other'"):
        plain.other  # noqa: B018


def test_what_the_caller_does_to_the_updates_changes_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(8, 6)) / 9.0 for _ in range(3)]
    given = [delta.copy() for delta in deltas]
    config = tna.Config(order=3, rank=2, fold=(4, 2, 6), groups="weight")
    _, report = tna.decompose(deltas, config)
    for delta in deltas:
        delta[:] = 0.0
    expected = tna.decompose(given, config)[1]
    assert 0.0 < report.bound == expected.bound < report.error < 1.0
    # Beyond a number of elements updates are not kept: bounds are computed at once.
    monkeypatch.setattr(group_fits, "_HELD", 100)
    assert tna.decompose(given, config)[1].bound == expected.bound
