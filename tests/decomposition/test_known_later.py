"""Bounds and proofs are computed when they are read, once, and what they need is then released."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.decomposition import GroupReport, _group_fits
from tnadapt.decomposition._linear_algebra import Algebra
from tnadapt.decomposition.known_later import LazyNumber, LazyProof, all_of

KNOWN = {"size": 4, "norm": 2.0, "error": 0.5, "iterations": 0, "method": "SVD"}


def test_a_proof_is_asked_for_once() -> None:
    asked: list[int] = []

    def prove() -> bool:
        asked.append(1)
        return True

    proof = LazyProof(prove)
    assert repr(proof) == "LazyProof(not asked yet)"
    assert not asked
    assert proof
    assert proof
    assert (len(asked), repr(proof)) == (1, "LazyProof(True)")
    assert not LazyProof(lambda: False)


def test_all_claims() -> None:
    unasked = LazyProof(lambda: pytest.fail("asked"))
    assert all_of([True, True]) is True
    assert all_of([unasked, False]) is False
    several = all_of([True, LazyProof(lambda: True), LazyProof(lambda: False)])
    assert isinstance(several, LazyProof)
    assert not several


def test_a_report_that_is_computed_later_is_like_any_other() -> None:
    asked: list[int] = []

    def find() -> tuple[float, bool]:
        asked.append(1)
        return 0.25, False

    plain = GroupReport(**KNOWN, bound=0.25, certified=False)
    for use in (lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        asked.clear()
        report = GroupReport.later(find, **KNOWN)
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

    def find() -> tuple[float, bool]:
        asked.append("bound")
        return 0.25, False

    known = {name: value for name, value in KNOWN.items() if name != "error"}
    plain = GroupReport(**KNOWN, bound=0.25, certified=False)
    for use in (lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        asked.clear()
        number = LazyNumber(find_error)
        report = GroupReport.later(find, number, **known)
        assert asked == []
        assert (report.error, float(number), report.error, asked) == (0.5, 0.5, 0.5, ["error"])
        assert use(report) == plain
        assert use(GroupReport.later(find, LazyNumber(find_error), **known)) == plain


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
