"""The real part of the inverse Fourier transform of real matrices, by the FFT of an array library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .backend import Array

__all__ = ["FFT_DTYPES", "dft2_by_fft", "dft2_in_chunks"]

#: The dtypes that the FFT of every library accepts and keeps.
FFT_DTYPES = ("float64", "float32")

# Elements that a processor transforms at a time, but at least one matrix. All at once take up to twice as long: the
# temporary arrays are too large for the caches, and their memory is new from the system at each call.
_CHUNK = 1 << 20


def dft2_by_fft(xp: Any, x: Array) -> Array:
    """Return ``Re(ifft2(x))`` over the last two axes.

    Parameters
    ----------
    xp : module
        The array-API namespace of x, with its extension for FFTs.
    x : array, shape (…, rows, cols)
        Real, not complex, and not empty.
    """
    # The forward transform has the same real part, and its values at (j, k) and (-j, -k) are conjugate: the columns up
    # to the middle one determine the others.
    cols = x.shape[-1]
    half = xp.real(xp.fft.rfftn(x, axes=(-2, -1), norm="forward"))
    rest = xp.flip(half[..., 1 : cols - cols // 2], axis=-1)
    rest = xp.concat([rest[..., :1, :], xp.flip(rest[..., 1:, :], axis=-2)], axis=-2)
    return xp.concat([half, rest], axis=-1)


def dft2_in_chunks(xp: Any, x: Array, empty: Callable[[Array], Array]) -> Array:
    """Return :func:`dft2_by_fft` of x, for libraries that compute on a processor and can write to arrays.

    Parameters
    ----------
    xp : module
    x : array, shape (…, rows, cols)
    empty : callable
        Returns an uninitialized array of the shape of its argument.
    """
    size = math.prod(x.shape[-2:])
    some = max(1, _CHUNK // size)
    if math.prod(x.shape[:-2]) <= some:
        return dft2_by_fft(xp, x)
    matrices = xp.reshape(x, (-1, *x.shape[-2:]))
    found = empty(matrices)
    for first in range(0, found.shape[0], some):
        found[first : first + some] = dft2_by_fft(xp, matrices[first : first + some])
    return xp.reshape(found, x.shape)
