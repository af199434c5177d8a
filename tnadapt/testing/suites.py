"""Contract suites to inherit: every backend, every format and every map passes the same tests.

``class TestMine(BackendContract): library = "mine"`` runs them all; the page on backends has an example.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from tnadapt.algebra.formats import Format, jacobian_rank
from tnadapt.algebra.maps import MAPS, Linear, LinearV2, Map, Shuffle
from tnadapt.algebra.maps.hadamard import fwht_plain
from tnadapt.algebra.unfolding import Cut
from tnadapt.backends import Backend, get_backend, load_backend
from tnadapt.backends.backend import FLOAT_DTYPES, OPTIONAL, Array, FixedArrays
from tnadapt.errors import BackendError

from . import _reference as reference

__all__ = ["BackendContract", "FormatContract", "MapContract"]


class BackendContract:
    """What every backend must do. Inherit, and give ``backend``.

    Attributes
    ----------
    backend : Backend
        The one under test.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> class TestNumpy(BackendContract):
    ...     backend = load_backend("numpy")
    >>> TestNumpy().test_round_trip()
    """

    backend: Backend

    def _arange(self, *shape: int) -> Array:
        return self.backend.asarray(np.arange(math.prod(shape), dtype=np.float64).reshape(shape), "float32")

    def _same(self, found: Array, expected: Any) -> None:
        assert self.backend.owns(found)
        np.testing.assert_array_equal(self.backend.to_numpy(found), expected)

    def test_owns_its_arrays_and_no_others(self) -> None:
        x = self._arange(2)
        assert self.backend.owns(x)
        assert get_backend(x) is self.backend
        assert not self.backend.owns([1.0])
        assert self.backend.is_concrete(x)
        assert self.backend.device(x) is not None, "device() returned None, which is for arrays inside a trace"

    def test_round_trip(self) -> None:
        host = np.array([[1.5, -2.0], [0.25, 3.0]])
        for dtype in FLOAT_DTYPES:
            try:
                self.backend.dtype(dtype)
            except BackendError as error:
                # JAX has a float64 that must be switched on. But nobody may say of what the library has that there is
                # none, or refuse the one dtype that every library has.
                denied = hasattr(self.backend.xp, dtype) and "no floating dtype" in str(error)
                if dtype == "float32" or denied:
                    raise
                if dtype not in str(error):
                    raise AssertionError(f"{dtype} is refused by an error that does not name it: {error}") from error
                continue
            x = self.backend.asarray(host, dtype)
            assert self.backend.dtype_name(x) == dtype
            assert self.backend.is_float(x)
            assert tuple(x.shape) == (2, 2)
            self._same(x, host)

    def test_asarray_copies(self) -> None:
        host = np.ones(3)
        x = self.backend.asarray(host)
        host[:] = 0.0
        self._same(x, [1.0, 1.0, 1.0])

    def test_unknown_dtypes_and_devices_are_refused(self) -> None:
        for dtype in ("int32", "float128", "", "nonsense"):
            with pytest.raises(BackendError):
                self.backend.dtype(dtype)

    def test_integers_are_no_floats(self) -> None:
        x = self.backend.constant(np.arange(3, dtype=np.int32), self.backend.device(self._arange(1)))
        assert not self.backend.is_float(x)
        with pytest.raises(BackendError, match="cast it"):
            self.backend.require_float(x, "x")

    def test_constants_keep_their_dtype(self) -> None:
        for dtype in (np.int8, np.int32, np.float32):
            x = self.backend.constant(np.array([1, -1], dtype), None)
            assert self.backend.dtype_name(x) == np.dtype(dtype).name

    def test_fixed_arrays_are_made_once(self) -> None:
        made = []

        class Counted(FixedArrays):
            def make(self, key: Any) -> np.ndarray:
                made.append(key)
                return np.full(2, float(key), np.float32)

        source, like = Counted(), self._arange(1)
        for _ in range(2):
            self._same(source.on(self.backend, 3, like), [3.0, 3.0])
            self._same(source.on(self.backend, 4, like, "float32", keep=False), [4.0, 4.0])
        assert made == [3, 4, 4]

    def test_shapes(self) -> None:
        b, x = self.backend, self._arange(2, 3)
        host = np.arange(6.0).reshape(2, 3)
        self._same(b.reshape(x, (3, 2)), host.reshape(3, 2))
        self._same(b.permute_dims(x, (1, 0)), host.T)
        self._same(b.matrix_transpose(x), host.T)
        self._same(b.moveaxis(self._arange(2, 3, 4), 0, -1), np.moveaxis(np.arange(24.0).reshape(2, 3, 4), 0, -1))
        self._same(b.flatten(x), host.reshape(-1))
        self._same(b.where(x < 2.0, x, -x), np.where(host < 2.0, host, -host))
        for found, expected in zip(b.apart([x, x]), [host, host], strict=True):
            self._same(found, expected)
        self._same(b.pad_last(x, 4), np.pad(host, ((0, 0), (0, 1))))
        self._same(b.zeros((2, 2), x), np.zeros((2, 2)))
        self._same(x[:, 1:], host[:, 1:])
        self._same(x[..., :2], host[..., :2])

    def test_concat_and_split(self) -> None:
        b, x = self.backend, self._arange(5)
        parts = b.split(x, [2, 0, 3])
        assert [tuple(part.shape) for part in parts] == [(2,), (0,), (3,)]
        self._same(b.concat(parts), np.arange(5.0))
        self._same(b.concat([x]), np.arange(5.0))
        matrix = self._arange(2, 2)
        self._same(b.concat([matrix, matrix], axis=-1), np.tile(np.arange(4.0).reshape(2, 2), (1, 2)))

    def test_take(self) -> None:
        x = self._arange(2, 4)
        for dtype in (np.int32, np.int64):
            indices = self.backend.constant(np.array([3, 0, 0], dtype), self.backend.device(x))
            self._same(self.backend.take(x, indices), np.arange(8.0).reshape(2, 4)[:, [3, 0, 0]])
            self._same(self.backend.take(x, indices[1:], axis=0), np.arange(8.0).reshape(2, 4)[[0, 0]])

    def test_arithmetic(self) -> None:
        b, x = self.backend, self._arange(2, 3)
        host = np.arange(6.0).reshape(2, 3)
        self._same(b.matmul(x, b.matrix_transpose(x)), host @ host.T)
        self._same(b.matmul(b.reshape(x, (2, 1, 3)), b.reshape(x, (2, 3, 1))), (host**2).sum(1).reshape(2, 1, 1))
        self._same(b.sum(x, axis=0), host.sum(0))
        self._same((x + x) * 2.0 - x / 2.0, 3.5 * host)
        np.testing.assert_allclose(b.to_numpy(b.tanh(x)), np.tanh(host), rtol=1e-6)
        self._same(b.astype(x, "float32"), host)
        assert b.astype(x, "float32") is x

    def _found(self, method: str, found: Any) -> Any:
        """What an optional method returned; None where the backend lists it among what it lacks."""
        listed = self.backend.lacks(self._arange(1))
        assert listed <= set(OPTIONAL), f"lacks() lists {set(listed) - set(OPTIONAL)}; expected names of {OPTIONAL}"
        name = type(self.backend).__name__
        if method in listed:
            assert found is None, f"{name}.{method} returned a result, though lacks() lists it: take it out there"
        else:
            assert found is not None, f"{name}.{method} returned None: implement it, or list {method!r} in lacks()"
        return found

    def test_largest(self) -> None:
        b, device = self.backend, self.backend.device(self._arange(1))
        for host, expected in (([1.0, -3.0, 2.0], 3.0), ([0.0], 0.0), ([np.inf, 1.0], np.inf)):
            assert b.largest(b.constant(np.array(host, np.float32), device)) == expected
        assert np.isnan(b.largest(b.constant(np.array([1.0, np.nan], np.float32), device)))
        assert b.largest(self._arange(2, 3)[:, :0]) == 0.0

    def test_gradient(self) -> None:
        b = self.backend
        found = b.gradient(lambda arrays: b.sum(b.flatten(arrays["x"] * arrays["x"]), axis=0), {"x": self._arange(3)})
        found = self._found("gradient", found)
        if found is not None:
            self._same(found["x"], [0.0, 2.0, 4.0])

    def _equal(self, found: Array | None, expected: Array) -> None:
        if found is not None:
            assert self.backend.owns(found)
            one, other = self.backend.to_numpy(found), self.backend.to_numpy(expected)
            np.testing.assert_allclose(one, other, rtol=0.0, atol=1e-5 * float(np.max(np.abs(other))))

    def test_the_kernel_of_fwht(self) -> None:
        b, x = self.backend, self._arange(3, 8)

        def plain(x: Array) -> Array:
            return fwht_plain(b, x, normalize=False)

        found = b.fwht(x, 1.0, -1, plain)
        self._equal(self._found("fwht", found), plain(x))

    def test_the_kernels_of_fastfood(self) -> None:
        for kind in (Linear, LinearV2):
            # Of a length for which it is worth importing a compiler.
            b, f = self.backend, kind(300, 9000, seed=5)
            forward, adjoint = both = functools.partial(f.forward_plain, b), functools.partial(f.adjoint_plain, b)
            x, y = self._arange(2, f.n_in), self._arange(2, f.n_out)
            self._equal(
                self._found("fastfood", b.fastfood(x, f.draws, f.n_in, adjoint=False, fallback=both)), forward(x)
            )
            self._equal(
                self._found("fastfood", b.fastfood(y, f.draws, f.n_in, adjoint=True, fallback=both)), adjoint(y)
            )

    def test_the_kernel_of_shuffle(self) -> None:
        b, f = self.backend, Shuffle(1000, 1000, seed=5)
        x = self._arange(2, 1000)
        for inverse, name in ((False, "perm"), (True, "inverse")):
            order = f.host(name)

            def plain(x: Array, order: np.ndarray = order) -> Array:
                return b.take(x, b.constant(order, b.device(x)))

            found = b.shuffle(x, 5, 0, inverse, fallback=(plain, plain))
            if self._found("shuffle", found) is not None:
                self._same(found, b.to_numpy(plain(x)))


class FormatContract:
    """What every format must do. Inherit, and give ``kind``.

    Attributes
    ----------
    kind : type of Format
        The one under test; called as ``kind(sizes, rank)``.

    Examples
    --------
    >>> from tnadapt.algebra.formats import FORMATS
    >>> class TestCP(FormatContract):
    ...     kind = FORMATS["cp"]
    >>> TestCP().test_counts()
    """

    kind: type[Format]
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
                    assert inner is None, f"{name}.inner returned {inner}, though unfolds is False: take that out"
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
                # At an array of its own, so that nothing but the map itself is tested.
                other = rng.normal(size=array.shape)
                made = split.tensor(backend, {**arrays, name: other}, whole)
                np.testing.assert_allclose((other * found[name]).sum(), (made * tensor).sum(), rtol=1e-9, atol=1e-9)

    def test_paths_count_the_elements_that_an_element_is_made_of(self) -> None:
        """An element depends on ``num_terms_per_array(name)`` elements of an array: where its gradient is not zero."""
        for split, arrays in self._each():
            one = np.zeros(split.sizes)
            one[tuple(size // 2 for size in split.sizes)] = 1.0
            found = split.adjoint(get_backend(*arrays.values()), arrays, one)
            for name, gradient in found.items():
                assert np.count_nonzero(gradient) == split.num_terms_per_array(name), (
                    f"{type(split).__name__}.num_terms_per_array({name!r})"
                )

    def test_paths_are_the_variance(self) -> None:
        """Of independent unit numbers, elements have variance ``num_terms``: what the start counts on."""
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


class MapContract:
    """What every map F must do. Inherit, and give ``kind``.

    Attributes
    ----------
    kind : type of Map
        The one under test; called as ``kind(n_in, n_out, seed, group)``.
    lengths : sequence of (int, int)
        ``n_in`` and ``n_out``; of a map that keeps the length the second alone is used.

    Examples
    --------
    >>> from tnadapt.algebra.maps import MAPS
    >>> class TestLinear(MapContract):
    ...     kind = MAPS["linear"]
    >>> TestLinear().test_the_adjoint_is_that_of_the_derivative()
    """

    kind: type[Map]
    lengths = ((1, 1), (3, 7), (7, 3), (16, 16), (5, 64), (37, 509))

    def _each(self, seed: int = 3) -> Any:
        for n_in, n_out in self.lengths:
            yield self.kind(n_out if self.kind.square else n_in, n_out, seed, 0)

    def test_lengths_and_batches(self) -> None:
        b = load_backend("numpy")
        for f in self._each():
            x = np.random.default_rng(0).normal(size=(2, 3, f.n_in))
            found = np.asarray(f.forward(b, x))
            assert found.shape == (2, 3, f.n_out)
            np.testing.assert_allclose(found[1, 2], f.forward(b, x[1, 2]), rtol=1e-12, atol=1e-12)

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

    def test_a_slice_is_the_whole_cut(self) -> None:
        b, rng = load_backend("numpy"), np.random.default_rng(2)
        for f in self._each():
            x = rng.normal(size=f.n_in)
            whole = np.asarray(f.forward(b, x))
            for start, stop in {(0, f.n_out), (0, 1), (f.n_out - 1, f.n_out), (f.n_out // 3, f.n_out // 3 + 1)}:
                fresh = self.kind(f.n_in, f.n_out, f.seed, f.group)
                for each in (f, fresh):  # with draws that are kept, and with none
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
            cost = f.cost()
            assert cost is None or cost >= 0

    def test_equal_seeds_give_equal_maps(self) -> None:
        state = repr(np.random.get_state(legacy=False))
        for f, again, other in zip(self._each(), self._each(), self._each(seed=4), strict=True):
            assert f.digest() == again.digest() == copy.deepcopy(f).digest()
            assert [*map(np.ndarray.tobytes, f.streams())] == [*map(np.ndarray.tobytes, again.streams())]
            if f.n_out > 16 and self.kind.kind != "identity":
                assert f.digest() != other.digest()
        assert repr(np.random.get_state(legacy=False)) == state


def _matrix(part: Map) -> np.ndarray:
    """The reference of a linear map: of a built-in one by this package's own formulas, of another by its own."""
    if part.kind in MAPS.built_in:
        return reference.matrix(part.kind, part.n_in, part.n_out, part.seed, part.group)
    return part.matrix()
