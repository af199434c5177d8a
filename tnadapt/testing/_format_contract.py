"""The contract of a format: the tests that every tensor format passes, as a class to inherit.

``class TestMine(FormatContract): kind = Mine`` runs them all; the page on extending tnadapt has an example.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tnadapt.algebra.formats import jacobian_rank
from tnadapt.algebra.unfolding import Cut
from tnadapt.backends import get_backend

from ._required import Required

__all__ = ["FormatContract"]


class FormatContract:
    """The tests of every format. Inherit from it and set ``kind``.

    Attributes
    ----------
    kind : type of Format
        The format under test; called as ``kind(sizes, rank)``.

    Examples
    --------
    >>> from tnadapt.algebra.formats import FORMATS
    >>> class TestCP(FormatContract):
    ...     kind = FORMATS["cp"]
    >>> TestCP().test_counts()
    """

    kind: Any = Required("MyFormat")
    sizes = ((5,), (4, 3), (2, 3, 4), (3, 1, 2, 3))
    ranks = (1, 2, 5)

    def _each(self) -> Any:
        for sizes, rank in itertools.product(self.sizes, self.ranks):
            split = self.kind(sizes, rank)
            rng = np.random.default_rng(0)
            yield split, {name: rng.normal(size=shape) for name, shape in split.shapes.items()}

    def test_counts(self) -> None:
        for split, arrays in self._each():
            assert split.num_parameters == sum(array.size for array in arrays.values())
            assert split.zero in split.shapes
            assert split.ones <= split.shapes.keys()

    def test_a_box_is_the_whole_cut(self) -> None:
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = split.tensor(backend, arrays, [(0, d) for d in split.sizes])
            assert whole.shape == split.sizes
            for box in itertools.product(*([(0, d), (0, 1), (d - 1, d), (d // 2, d)] for d in split.sizes)):
                part = split.tensor(backend, arrays, box)
                cut = whole[tuple(slice(lo, hi) for lo, hi in box)]
                np.testing.assert_allclose(part, cut, rtol=1e-12, atol=1e-12)

    def test_an_unfolding_is_the_product_of_its_halves(self) -> None:
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = split.tensor(backend, arrays, [(0, d) for d in split.sizes])
            for modes in range(1, len(split.sizes)):
                inner = split.inner(modes)
                name = type(split).__name__
                if not self.kind.unfolds:
                    assert inner is None, f"{name}.inner returned {inner}, but unfolds is False: remove that line"
                    continue
                assert inner is not None, f"{name}.inner returned None: implement it, or set unfolds = False"
                height, width = math.prod(split.sizes[:modes]), math.prod(split.sizes[modes:])
                expected = whole.reshape(height, width)
                for rows, cols in itertools.product(*(([0, n], [n - 1, n], [n // 3, n]) for n in (height, width))):
                    start = rows[0] * width + cols[0]
                    left, right = split.unfolded(backend, arrays, Cut(modes, tuple(rows), tuple(cols), start))
                    assert left.shape == (rows[1] - rows[0], inner)
                    assert right.shape == (inner, cols[1] - cols[0])
                    part = expected[slice(*rows), slice(*cols)]
                    np.testing.assert_allclose(left @ right, part, rtol=1e-12, atol=1e-12)

    def test_the_tensor_is_the_einsum_of_the_formula(self) -> None:
        for split, arrays in self._each():
            found = split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in split.sizes])
            expected = np.einsum(split.formula, *arrays.values(), optimize=True)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    def test_ranks_of_unfoldings_are_limited_as_it_says(self) -> None:
        for split, arrays in self._each():
            order = len(split.sizes)
            whole = split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in split.sizes])
            for size in range(1, order):
                for modes in itertools.combinations(range(order), size):
                    turned = np.transpose(whole, [*modes, *(m for m in range(order) if m not in modes)])
                    matrix = turned.reshape(math.prod(split.sizes[m] for m in modes), -1)
                    assert np.linalg.matrix_rank(matrix, rtol=1e-10) <= split.unfolding_rank(modes)
            for modes, rank in split.bounded_unfoldings():
                assert rank >= split.unfolding_rank(modes)
            known = split.matrix_rank() if order == 2 else None
            if known is not None:
                assert np.linalg.matrix_rank(whole, rtol=1e-10) == known

    def test_degrees_of_freedom_are_never_too_few(self) -> None:
        for split, _ in self._each():
            for times in (1, 2):
                counted = jacobian_rank(split, times)
                assert counted is not None
                assert counted <= split.freedom(split.sizes, times) <= math.prod(split.sizes)

    def test_no_rank_beyond_the_useful_one_makes_more(self) -> None:
        for split, _ in self._each():
            useful = split.useful_rank()
            if useful is not None and split.rank_given == self.ranks[-1]:
                assert useful >= 1
                most = self.kind(split.sizes, min(useful, 12))
                more = self.kind(split.sizes, min(useful, 12) + 1)
                if useful <= 12:
                    assert jacobian_rank(most, 1) == jacobian_rank(more, 1)

    def test_it_is_linear_in_each_array(self) -> None:
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = [(0, d) for d in split.sizes]
            expected = split.tensor(backend, arrays, whole)
            for name, array in arrays.items():
                doubled = split.tensor(backend, {**arrays, name: 2.0 * array}, whole)
                np.testing.assert_allclose(doubled, 2.0 * expected, rtol=1e-12, atol=1e-12)

    def test_the_adjoint_is_that_of_each_linear_map(self) -> None:
        rng = np.random.default_rng(1)
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = [(0, d) for d in split.sizes]
            tensor = rng.normal(size=split.sizes)
            found = split.adjoint(backend, arrays, tensor)
            assert {name: tuple(gradient.shape) for name, gradient in found.items()} == split.shapes
            for name, array in arrays.items():
                # At another array than the gradient's, which tests that the map is linear in it.
                other = rng.normal(size=array.shape)
                made = split.tensor(backend, {**arrays, name: other}, whole)
                np.testing.assert_allclose((other * found[name]).sum(), (made * tensor).sum(), rtol=1e-9, atol=1e-9)

    def test_paths_count_the_elements_that_an_element_is_made_of(self) -> None:
        """Check that an element depends on ``num_terms_per_array(name)`` elements of an array, by its gradient."""
        for split, arrays in self._each():
            one = np.zeros(split.sizes)
            one[tuple(size // 2 for size in split.sizes)] = 1.0
            found = split.adjoint(get_backend(*arrays.values()), arrays, one)
            for name, gradient in found.items():
                assert np.count_nonzero(gradient) == split.num_terms_per_array(name), (
                    f"{type(split).__name__}.num_terms_per_array({name!r})"
                )

    def test_paths_are_the_variance(self) -> None:
        """Check that independent unit numbers give elements of variance ``num_terms``, as initialization assumes."""
        rng = np.random.default_rng(0)
        for sizes, rank in (((6, 5), 2), ((3, 4, 3), 2)):
            split = self.kind(sizes, rank)
            total = []
            for _ in range(60):
                arrays = {
                    name: np.ones(shape) if name in split.ones else rng.choice([-1.0, 1.0], size=shape)
                    for name, shape in split.shapes.items()
                }
                total.append(split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in sizes]))
            assert 0.5 < np.mean(np.square(total)) / split.num_terms < 2.0
