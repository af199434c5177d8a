"""Bounds and proofs are computed when they are read, once, and what they need is then released."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.decomposition import GroupReport, _group_fits
from tnadapt.decomposition import linear_algebra as _linear_algebra
from tnadapt.decomposition.fits import all_of, holds
from tnadapt.decomposition.linear_algebra import Algebra

KNOWN = {"size": 4, "norm": 2.0, "error": 0.5, "iterations": 0, "method": "SVD"}


@pytest.mark.parametrize("decompose", [tna.cp, tna.tucker])
def test_a_proof_is_computed_once_when_it_is_read(decompose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = _linear_algebra.no_matrix_is_closer

    def counted(*args: Any) -> bool:
        asked.append(1)
        return plain(*args)

    monkeypatch.setattr(_linear_algebra, "no_matrix_is_closer", counted)
    matrix = np.random.default_rng(0).normal(size=(120, 100)) @ np.diag(0.5 ** np.arange(100.0))
    result = decompose(matrix, 3)
    assert 0.0 < result.error < 1.0
    asked_by_error = len(asked)
    assert result.certified
    assert result.bound == pytest.approx(result.error)
    assert (asked_by_error, len(asked)) == (0, 1)


def test_all_claims() -> None:
    def unasked() -> bool:
        pytest.fail("asked")

    assert all_of([True, True]) is True
    assert all_of([unasked, False]) is False
    several = all_of([True, lambda: True, lambda: False])
    assert callable(several)
    assert not holds(several)
    assert holds(all_of([True, lambda: True]))


def test_a_report_that_is_computed_later_is_like_any_other() -> None:
    asked: list[int] = []

    def find(error: float) -> tuple[float, bool]:
        asked.append(1)
        return error / 2.0, False

    plain = GroupReport(**KNOWN, bound=0.25, certified=False)
    for use in (lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        asked.clear()
        report = GroupReport.computed_later(find, **KNOWN)
        assert (report.error, asked) == (0.5, [])
        assert use(report) == plain
        assert (report.certified, report.bound, asked) == (False, 0.25, [1])
        assert repr(report) == repr(plain)
    with pytest.raises(AttributeError, match="'GroupReport' object has no attribute 'other'"):
        plain.other  # noqa: B018


def test_an_error_that_is_computed_later() -> None:
    asked: list[str] = []

    def find_error() -> float:
        asked.append("error")
        return 0.5

    def find(error: float) -> tuple[float, bool]:
        asked.append("bound")
        return error / 2.0, False

    known = {name: value for name, value in KNOWN.items() if name != "error"}
    plain = GroupReport(**KNOWN, bound=0.25, certified=False)
    for use in (lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        asked.clear()
        report = GroupReport.computed_later(find, error=find_error, **known)
        assert asked == []
        assert (report.error, report.error, asked) == (0.5, 0.5, ["error"])
        assert use(report) == plain
        assert use(GroupReport.computed_later(find, error=find_error, **known)) == plain


def test_no_bound_is_computed_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = _group_fits.lower_bound

    def counted(*args: Any) -> float:
        asked.append(1)
        return plain(*args)

    monkeypatch.setattr(_group_fits, "lower_bound", counted)
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(8, 6)) / 9.0 for _ in range(3)]
    given = [delta.copy() for delta in deltas]
    config = tna.Config(order=3, rank=2, fold=(4, 2, 6), groups="weight")
    _, report = tna.decompose(deltas, config)
    assert 0.0 < report.error < 1.0
    assert not asked
    for delta in deltas:
        delta[:] = 0.0  # what the caller does to the updates afterwards changes no bound
    bound = report.bound
    assert len(asked) == 3
    assert bound == tna.decompose(given, config)[1].bound > 0.0
    # Beyond a number of elements updates are not kept: bounds are computed at once.
    asked.clear()
    monkeypatch.setattr(_group_fits, "_HELD", 100)
    again = tna.decompose(given, config)[1]
    assert len(asked) == 1
    assert again.bound == bound


def test_no_error_is_computed_only_for_progress_that_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = Algebra.norm

    def counted(self: Algebra, x: Any) -> float:
        asked.append(1)
        return plain(self, x)

    monkeypatch.setattr(Algebra, "norm", counted)
    delta = np.random.default_rng(0).normal(size=(8, 6))
    params, _ = tna.decompose([delta], tna.presets.lora(2))
    silent = len(asked)
    asked.clear()
    seen: list[Any] = []
    watched, _ = tna.decompose([delta], tna.presets.lora(2), progress=seen.append)
    assert len(asked) == silent + 2
    assert seen[-1].error is not None
    for name, array in params.items():
        np.testing.assert_array_equal(array, watched[name])
