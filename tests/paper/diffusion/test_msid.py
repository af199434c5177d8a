"""MSID against closed forms for graphs, against its estimate, and against piq's implementation."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from paper.diffusion.msid import heat_trace, msid

TIMES = np.logspace(-1, 1, 9)


def cloud(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


@given(st.integers(6, 40))
def test_a_ring_has_the_eigenvalues_of_its_circulant(count: int) -> None:
    angles = 2 * np.pi * np.arange(count) / count
    # A little unequal radii would not do: of equal distances, either may be taken. Two neighbors are unique.
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    expected = np.exp(-np.outer(TIMES, 1 - np.cos(angles))).mean(1)
    np.testing.assert_allclose(heat_trace(points, TIMES, neighbors=2), expected, rtol=1e-10)


@given(st.integers(2, 20))
def test_of_all_neighbors_the_graph_is_complete(count: int) -> None:
    expected = (1 + (count - 1) * np.exp(-TIMES * count / (count - 1))) / count
    np.testing.assert_allclose(heat_trace(cloud(count, 3), TIMES, neighbors=count - 1), expected, rtol=1e-10)


@given(st.integers(0, 2**32 - 1))
def test_it_is_symmetric_and_knows_no_place_scale_or_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.normal(size=(60, 3)), random.uniform(size=(50, 2))
    moved = random.permutation(first) @ np.linalg.qr(random.normal(size=(3, 3)))[0] * 7 + random.normal(size=3)
    assert msid(first, moved) < 1e-4
    assert msid(first, second) == msid(second, first) > 0


def test_the_estimate_is_near_the_trace() -> None:
    points = cloud(600, 8)
    exact, estimated = (heat_trace(points, TIMES, exact=exact) for exact in (True, False))
    # In the units of MSID, in which unlike clouds are some hundreds apart.
    assert 0 < 1e6 * np.max(np.exp(-2 * (TIMES + 1 / TIMES)) * np.abs(estimated - exact)) < 5
    assert np.array_equal(estimated, heat_trace(points, TIMES, exact=False)), "the same seed, the same estimate"


def test_beyond_2048_points_it_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda *_: pytest.fail("all eigenvalues of a large graph"))
    assert 0 < msid(cloud(2049, 2), cloud(2049, 2, 1)) < 100


def test_points_that_lie_on_one_another_are_not_their_own_neighbors() -> None:
    points = np.repeat(cloud(12, 2), 8, axis=0)
    found = heat_trace(points, [0.0, 1.0])
    assert found[0] == pytest.approx(1.0)
    assert np.isfinite(found).all()


def test_it_is_piqs() -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        piq = pytest.importorskip("piq")
    angles = np.random.default_rng(1).uniform(0, 2 * np.pi, 300)
    flat = np.zeros((300, 4))
    first, second = cloud(300, 6), np.concatenate([np.cos(angles)[:, None], np.sin(angles)[:, None], flat], 1)
    theirs = piq.MSID(k=5, m=10, niters=2000, normalize="empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = float(theirs(torch.tensor(first), torch.tensor(second)))
    # Theirs is an estimate from random vectors.
    assert msid(first, second) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.zeros(9), np.zeros((0, 3))])
def test_too_few_points(points: np.ndarray) -> None:
    with pytest.raises(tna.errors.ShapeError, match="more than 5 points; got shape"):
        heat_trace(points, TIMES)
