"""The contract of a backend: the tests that every backend passes, as a class to inherit.

``class TestMine(BackendContract): backend = load_backend("mine")`` runs them all; the page on backends has an example.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from tnadapt.algebra.maps import Dft2, Linear, LinearV2, Shuffle
from tnadapt.algebra.maps.walsh_hadamard import fwht_plain
from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import FLOAT_DTYPES, OPTIONAL, Array
from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.errors import BackendError

__all__ = ["BackendContract"]


class BackendContract:
    """The tests of every backend. Inherit from it and set ``backend``.

    Attributes
    ----------
    backend : Backend
        The backend under test.

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
                # Refusing a dtype is allowed: JAX has a float64 that must be enabled first. But a backend must not deny
                # a dtype that the library has, nor refuse float32, which every library has.
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
        self._same(b.precise_matmul(x, b.matrix_transpose(x)), host @ host.T)
        self._same(b.matmul(b.reshape(x, (2, 1, 3)), b.reshape(x, (2, 3, 1))), (host**2).sum(1).reshape(2, 1, 1))
        self._same(b.kron(x, b.matrix_transpose(x)), np.kron(host, host.T))
        self._same(b.sum(x, axis=0), host.sum(0))
        self._same((x + x) * 2.0 - x / 2.0, 3.5 * host)
        np.testing.assert_allclose(b.to_numpy(b.tanh(x)), np.tanh(host), rtol=1e-6)
        self._same(b.sqrt(x), np.sqrt(host.astype(np.float32)))
        self._same(b.astype(x, "float32"), host)
        assert b.astype(x, "float32") is x

    def test_linear_algebra(self) -> None:
        b = self.backend
        host = np.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]])
        for matrix in (host, host.T):
            x = b.asarray(matrix, "float32")
            u, s, vh = b.svd(x)
            assert (tuple(u.shape), tuple(s.shape), tuple(vh.shape)) == ((len(matrix), 2), (2,), (2, len(matrix[0])))
            self._equal(b.matmul(u * s, vh), x)
            self._equal(s, b.asarray(np.linalg.svd(matrix)[1], "float32"))
            q, r = b.qr(x)
            assert (tuple(q.shape), tuple(r.shape)) == ((len(matrix), 2), (2, len(matrix[0])))
            self._equal(b.matmul(q, r), x)
        square = b.asarray(host[:2], "float32")
        values, vectors = b.eigh(square)
        self._equal(b.matmul(vectors * values, b.matrix_transpose(vectors)), square)
        assert values[0] < values[1]
        right = b.asarray(host[:, :1][:2], "float32")
        self._equal(b.matmul(square, b.solve(square, right)), right)
        assert b.conj(square) is square

    def _found(self, method: str, found: Any) -> Any:
        """Return the result of an optional method, which must be None exactly if lacks() lists the method."""
        listed = self.backend.lacks(self._arange(1))
        assert listed <= set(OPTIONAL), f"lacks() lists {set(listed) - set(OPTIONAL)}; expected names of {OPTIONAL}"
        name = type(self.backend).__name__
        if method in listed:
            assert found is None, f"{name}.{method} returned a result, but lacks() lists it: remove it from lacks()"
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
            # Long enough for backends to compile a kernel.
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

            found = b.shuffle(x, "5 0", inverse, fallback=(plain, plain))
            if self._found("shuffle", found) is not None:
                self._same(found, b.to_numpy(plain(x)))

    def test_the_fft_of_dft2(self) -> None:
        b = self.backend
        for rows, cols in ((1, 1), (1, 2), (3, 1), (4, 6), (5, 7)):
            f = Dft2(rows * cols, rows * cols, shape=(rows, cols))
            x = self._arange(2, rows, cols)

            def plain(x: Array, f: Dft2 = f) -> Array:
                return b.reshape(f.forward_plain(b, b.reshape(x, (2, f.n_in))), x.shape)

            found = self._found("dft2", b.dft2(x, plain))
            self._equal(found, plain(x))
            assert found is None or tuple(found.shape) == (2, rows, cols)
