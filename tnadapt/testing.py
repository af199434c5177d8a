"""For tests, this project's and other people's: Hypothesis strategies, and suites to inherit.

>>> from hypothesis import given
>>> from tnadapt.testing import plans
>>> @given(plans())
... def test_counts(plan):
...     assert plan.num_parameters == sum(array.size for array in plan.init().values())
>>> test_counts()

A new backend inherits :class:`BackendContract`, a new format :class:`FormatContract`; see the documentation's
page on backends. Needs ``pip install "tnadapt[testing]"``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from .backends import Backend, get_backend
from .backends.base import FLOAT_DTYPES, OPTIONAL, Array, FixedArrays
from .config import COMBINES, FOLDS, LEADINGS, Config
from .errors import BackendError, ShapeError
from .formats import FORMATS, Format
from .hadamard import fwht_plain
from .projection import KINDS, SQUARE, Projection
from .superlora import SuperLoRA
from .unfolding import Cut

__all__ = ["BackendContract", "FormatContract", "configs", "parameters", "plans", "shapes"]


@st.composite
def shapes(draw: st.DrawFn, max_weights: int = 4, max_side: int = 9) -> list[tuple[int, int]]:
    """Shapes of one to ``max_weights`` weights, equal or not, of sides 1 to ``max_side``.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(shapes(), lambda found: len(found) == 2)
    [(1, 1), (1, 1)]
    """
    side = st.integers(1, max_side)
    if draw(st.booleans()):
        return [(draw(side), draw(side))] * draw(st.integers(1, max_weights))
    return draw(st.lists(st.tuples(side, side), min_size=1, max_size=max_weights))


@st.composite
def configs(draw: st.DrawFn, weights: list[tuple[int, int]], projections: tuple[str, ...] = KINDS) -> Config:
    """Configs of every kind that suit weights of these shapes.

    Parameters
    ----------
    weights : list of (rows, cols)
    projections : tuple of str
        The F to choose from.

    Returns
    -------
    strategy of Config
        Valid by itself. Whether a stack comes out even also depends on the groups: :func:`plans` sees
        to that.
    """
    size = sum(rows * cols for rows, cols in weights)
    order = draw(st.integers(1, 4))
    projection = draw(st.sampled_from(projections))
    ratio = 1.0 if projection in SQUARE else draw(st.sampled_from([1.0, 0.5, 0.3, 0.07]))
    splits = draw(st.integers(1, 3))
    combine = draw(st.sampled_from(COMBINES))
    name = draw(st.sampled_from(list(FORMATS)))
    small = st.integers(1, 3)
    rank: Any = draw(small)
    if name == "tucker" and draw(st.booleans()):
        rank = draw(st.tuples(*[st.none() | small] * order))
    elif name == "tt" and draw(st.booleans()):
        rank = draw(st.tuples(*[small] * (order - 1)))
    fold: Any = draw(st.sampled_from([f for f in FOLDS if order <= 2 or f != "stack"]))
    if fold != "stack" and draw(st.integers(0, 4)) == 0:
        # Sizes of one's own, large enough for any group.
        side = next(d for d in itertools.count(1) if d**order >= size)
        fold = tuple(draw(st.integers(side, side + 2)) for _ in range(order))
    groups: Any = draw(st.sampled_from(["weight", "layer", "some", "listed"]))
    if groups == "some":
        groups = draw(st.integers(1, min(size, 5)))
    elif groups == "listed":
        indices = draw(st.permutations(range(len(weights))))
        cut = draw(st.integers(0, len(weights) - 1))
        groups = [group for group in (indices[:cut], indices[cut:]) if group]
    return Config(
        rank=rank,
        order=order,
        splits=splits,
        groups=groups,
        fold=fold,
        format=name,
        combine=combine,
        split_size=(
            draw(st.just("balanced") | st.integers(1, 3) | st.tuples(*[st.integers(1, 3)] * order))
            if combine == "kronecker"
            else "balanced"
        ),
        leading=draw(st.sampled_from(LEADINGS)),
        terms=draw(st.sampled_from([1, 1, 2])),
        projection=projection,
        ratio=ratio,
        shared=draw(st.booleans()),
        alpha=draw(st.none() | st.sampled_from([0.5, 8.0])),
        seed=draw(st.sampled_from([0, 1, 2**40 + 7, 2**64 - 1])),
    )


@st.composite
def plans(draw: st.DrawFn, projections: tuple[str, ...] = KINDS) -> SuperLoRA:
    """Plans of every kind on small weights: ``SuperLoRA(config, shapes, layers)``.

    Parameters
    ----------
    projections : tuple of str
        The F to choose from.
    """
    weights = draw(shapes())
    config = draw(configs(weights, projections))
    layers = [draw(st.integers(0, 1)) for _ in weights]
    try:
        return SuperLoRA(config, weights, layers)
    except ShapeError:
        # A stack that does not come out even: the message's own way out.
        assert config.fold == "stack"
        return SuperLoRA(config.replace(fold="hypercube"), weights, layers)


@st.composite
def parameters(draw: st.DrawFn, plan: SuperLoRA) -> dict[str, np.ndarray]:
    """Random float64 parameters of a plan, as NumPy arrays.

    Parameters
    ----------
    plan : SuperLoRA
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}


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
        for kind in ("linear", "linear_v2"):
            # Of a length for which it is worth importing a compiler.
            b, f = self.backend, Projection(kind, 300, 9000, seed=5)
            there, back = twins = f._twins(b)
            x, y = self._arange(2, f.n_in), self._arange(2, f.n_out)
            self._equal(self._found("fastfood", b.fastfood(x, f._draws, f.n_in, adjoint=False, plain=twins)), there(x))
            self._equal(self._found("fastfood", b.fastfood(y, f._draws, f.n_in, adjoint=True, plain=twins)), back(y))

    def test_the_kernel_of_shuffle(self) -> None:
        b, f = self.backend, Projection("shuffle", 1000, 1000, seed=5)
        x = self._arange(2, 1000)
        for inverse, name in ((False, "perm"), (True, "inverse")):
            order = f._draws.host(name)

            def plain(x: Array, order: np.ndarray = order) -> Array:
                return b.take(x, b.constant(order, b.device(x)))

            found = b.shuffle(x, 5, 0, inverse, plain=(plain, plain))
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
        """An element depends on ``paths(name)`` elements of an array: where its gradient is not zero."""
        for split, arrays in self._each():
            one = np.zeros(split.sizes)
            one[tuple(size // 2 for size in split.sizes)] = 1.0
            found = split.adjoint(get_backend(*arrays.values()), arrays, one)
            for name, gradient in found.items():
                assert np.count_nonzero(gradient) == split.paths(name), f"{type(split).__name__}.paths({name!r})"

    def test_paths_are_the_variance(self) -> None:
        """Of independent unit numbers, elements have variance ``total_paths``: what the start counts on."""
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
            assert 0.5 < np.mean(np.square(total)) / split.total_paths < 2.0
