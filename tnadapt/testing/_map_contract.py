"""The contract of a map: the tests that every fixed map F passes, as a class to inherit.

``class TestMine(MapContract): kind = Mine`` runs them all; the page on extending tnadapt has an example.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.maps import Map, MapSettings, Space
from tnadapt.backends import load_backend

from . import _reference_maps as reference_maps
from ._required import Required

__all__ = ["MapContract"]


class MapContract:
    """The tests of every map F. Inherit from it and set ``kind``.

    Attributes
    ----------
    kind : type of Map
        The map under test; called as ``kind(n_in, n_out, seed, group)``, and with ``settings`` and ``shape`` if it has
        them.
    lengths : sequence of (int, int)
        ``n_in`` and ``n_out``; a map that keeps the length, or determines it by its settings, uses only the second.
    shapes : sequence of (int, int)
        Rows and columns of the output, instead of ``lengths``, of a two-sided map.
    settings : sequence of MapSettings
        Settings to test, if the map has settings. They must fit all lengths or shapes.

    Examples
    --------
    >>> from tnadapt.algebra.maps import MAPS
    >>> class TestLinear(MapContract):
    ...     kind = MAPS["linear"]
    >>> TestLinear().test_the_adjoint_is_that_of_the_derivative()
    """

    kind: Any = Required("MyMap")
    lengths: Sequence[tuple[int, int]] = ((1, 1), (3, 7), (7, 3), (16, 16), (5, 64), (37, 509))
    shapes: Sequence[tuple[int, int]] = ((1, 1), (1, 6), (4, 6), (9, 5), (16, 16), (12, 35))
    settings: Sequence[MapSettings] = ()

    def _each(self, seed: int = 3) -> Iterator[Map]:
        for settings in self.settings or (None,):
            if self.kind.two_sided:
                spaces = [(rows * cols, Space(rows * cols, (rows, cols))) for rows, cols in self.shapes]
            else:
                spaces = [(n_in, Space(n_out)) for n_in, n_out in self.lengths]
            for n_in, space in spaces:
                if self.kind.fixes_length(settings):
                    n_in = self.kind.domain(space, settings).length
                extra: dict[str, Any] = {} if settings is None else {"settings": settings}
                if self.kind.two_sided:
                    extra["shape"] = space.shape
                found = self.kind(n_in, space.length, seed, 0, **extra)
                yield found

    def test_lengths_and_batches(self) -> None:
        b = load_backend("numpy")
        for f in self._each():
            x = np.random.default_rng(0).normal(size=(2, 3, f.n_in))
            found = np.asarray(f.forward(b, x))
            assert found.shape == (2, 3, f.n_out)
            np.testing.assert_allclose(found[1, 2], f.forward(b, x[1, 2]), rtol=1e-12, atol=1e-12)
            y = np.random.default_rng(1).normal(size=(2, 3, f.n_out))
            back = np.asarray(f.linear_part.adjoint(b, y))
            assert back.shape == (2, 3, f.n_in)
            np.testing.assert_allclose(back[1, 2], f.linear_part.adjoint(b, y[1, 2]), rtol=1e-12, atol=1e-12)
            if f.exact_in_batches:
                assert np.array_equal(found[1, 2], f.forward(b, x[1, 2]))
                y = np.random.default_rng(1).normal(size=(4, f.n_out))
                alone = f.linear_part.adjoint(b, y[3])
                assert np.array_equal(np.asarray(f.linear_part.adjoint(b, y))[3], alone)

    def test_it_is_linear_where_it_says_so(self) -> None:
        b, rng = load_backend("numpy"), np.random.default_rng(0)
        for f in self._each():
            part = f.linear_part
            x, y = rng.normal(size=(2, f.n_in))
            expected = part.forward(b, x) + 2.0 * part.forward(b, y)
            np.testing.assert_allclose(part.forward(b, x + 2.0 * y), expected, rtol=1e-10, atol=1e-10)
            assert f.linear == (part is f)

    def test_the_reference_matrix_is_the_map(self) -> None:
        b = load_backend("numpy")
        for f in self._each():
            part = f.linear_part
            found = np.asarray(part.forward(b, np.eye(f.n_in))).T
            np.testing.assert_allclose(found, _matrix(part), rtol=1e-10, atol=1e-10)

    def test_the_adjoint_is_that_of_the_derivative(self) -> None:
        b, rng = load_backend("numpy"), np.random.default_rng(1)
        for f in self._each():
            x, way = rng.normal(size=(2, f.n_in))
            y = rng.normal(size=f.n_out)
            h = 1e-6
            if f.linear:
                moved = np.asarray(f.forward(b, way))
            else:
                moved = (np.asarray(f.forward(b, x + h * way)) - np.asarray(f.forward(b, x - h * way))) / (2.0 * h)
            reached = np.asarray(f.adjoint_at(b, y, x))
            assert reached.shape == (f.n_in,)
            tight = 1e-10 if f.linear else 1e-6
            np.testing.assert_allclose(moved @ y, way @ reached, rtol=tight, atol=tight)

    def test_its_sides_make_the_whole(self) -> None:
        b, rng = load_backend("numpy"), np.random.default_rng(4)
        for f in self._each():
            x, total = rng.normal(size=f.n_in), np.zeros(f.n_out)
            for rows, cols in f.sides():
                assert (rows.n_in * cols.n_in, rows.n_out * cols.n_out) == (f.n_in, f.n_out)
                half = np.asarray(cols.forward(b, x.reshape(rows.n_in, cols.n_in)))
                total += np.asarray(rows.forward(b, half.T)).T.ravel()
                for side in (rows, cols):
                    y = rng.normal(size=side.n_out)
                    forward = np.asarray(side.forward(b, np.eye(side.n_in)))
                    np.testing.assert_allclose(side.adjoint(b, y), forward @ y, rtol=1e-10, atol=1e-10)
            if f.sides():
                np.testing.assert_allclose(total, f.forward(b, x), rtol=1e-10, atol=1e-10)

    def test_a_slice_is_the_whole_cut(self) -> None:
        b, rng = load_backend("numpy"), np.random.default_rng(2)
        for f in self._each():
            x = rng.normal(size=f.n_in)
            whole = np.asarray(f.forward(b, x))
            for start, stop in {(0, f.n_out), (0, 1), (f.n_out - 1, f.n_out), (f.n_out // 3, f.n_out // 3 + 1)}:
                fresh = copy.deepcopy(f)
                assert not fresh.kept
                for each in (f, fresh):  # with draws in memory, and without
                    part = np.asarray(each.slice(b, x, start, stop))
                    np.testing.assert_allclose(part, whole[start:stop], rtol=1e-10, atol=1e-10)

    def test_what_is_known_of_it_is_so(self) -> None:
        for f in self._each():
            part = f.linear_part
            matrix = _matrix(part)
            frobenius = float(np.sum(matrix * matrix))
            # Some maps state the mean over their draws.
            assert 0.3 * frobenius <= f.squared_norm() <= 3.0 * frobenius or f.n_out < 16
            assert math.isclose(f.gain(), f.squared_norm() / math.sqrt(f.n_in * f.n_out), rel_tol=1e-12)
            assert math.isclose(f.variance(), f.squared_norm() / f.n_out, rel_tol=1e-12)
            if f.isometry:
                assert f.square
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(f.n_out), atol=1e-12)
            assert np.linalg.matrix_rank(matrix) <= f.freedom() <= min(f.n_in, f.n_out)
            cost = f.cost()
            assert cost is None or cost >= 0

    def test_equal_seeds_give_equal_maps(self) -> None:
        state = repr(np.random.get_state(legacy=False))
        for f, again, other in zip(self._each(), self._each(), self._each(seed=4), strict=True):
            assert f.digest() == again.digest() == copy.deepcopy(f).digest()
            assert [*map(np.ndarray.tobytes, f.streams())] == [*map(np.ndarray.tobytes, again.streams())]
            if f.n_out > 16 and any(
                a.tobytes() != b.tobytes() for a, b in zip(f.streams(), other.streams(), strict=True)
            ):
                assert f.digest() != other.digest()
        assert repr(np.random.get_state(legacy=False)) == state


def _matrix(part: Map) -> np.ndarray:
    return reference_maps.matrix_of(part)
