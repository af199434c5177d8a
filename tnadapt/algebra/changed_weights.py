"""Merging of any update into a weight in float64: ``W'`` of :mod:`tnadapt.algebra.applying`, in whole rows if need be.

The arithmetic is that of :mod:`tnadapt.algebra.rounding`: W' is computed in float64 from an update in float64, rounded
to float32 and then to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array

from .applying import Applying
from .rounding import add_in_place, rounded, widened

__all__ = ["change_in_place", "changed_spans"]


def change_in_place(
    applying: Applying,
    weight: np.ndarray,
    shape: tuple[int, int],
    dtype: str,
    pieces: Iterable[tuple[int, np.ndarray]],
    own: Sequence[np.ndarray],
    trained: str,
) -> str | None:
    """Replace a weight by W'.

    Parameters
    ----------
    applying : Applying
    weight : ndarray, shape (n,)
        Contiguous; changed in place. bfloat16 is given as its bits.
    shape : (int, int)
        Its rows and columns.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        Dtype of the weight.
    pieces : iterable of (int, ndarray)
        The update: start of each piece, and its float64 numbers; all of it, in order.
    own : sequence of ndarray
        The weight's own parameters.
    trained : str
        The dtype in which they were trained.

    Returns
    -------
    str or None
        As :func:`~tnadapt.algebra.rounding.add_in_place`; the weight may then be partially changed.

    Examples
    --------
    >>> from tnadapt.algebra.applying import Magnitude
    >>> weight = np.array([3.0, 0.0])
    >>> pieces = [(0, np.array([0.0, 4.0]))]
    >>> change_in_place(Magnitude(), weight, (1, 2), "float64", pieces, [np.array([10.0])], "float64"), weight.tolist()
    (None, [6.0, 8.0])
    """
    if applying.additive:
        return add_in_place(weight, dtype, pieces)
    backend = load_backend("numpy")
    wide = [array.astype(np.float64) for array in own]
    finite = all(np.isfinite(array).all() for array in wide)

    def read(start: int, stop: int) -> np.ndarray:
        return widened(weight[start:stop], dtype).astype(np.float64)

    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        for start, found, piece in changed_spans(applying, backend, shape, read, pieces, wide, trained):
            part = weight[start : start + found.size]
            stored = rounded(found, dtype)
            if (~np.isfinite(widened(stored, dtype)) & np.isfinite(widened(part, dtype))).any():
                return "range" if finite and np.isfinite(piece).all() else "update"
            part[...] = stored
    return None


def changed_spans(
    applying: Applying,
    backend: Backend,
    shape: tuple[int, int],
    read: Callable[[int, int], Array],
    pieces: Iterable[tuple[int, Array]],
    own: Sequence[Array],
    trained: str,
) -> Iterator[tuple[int, Array, Array]]:
    """Yield W' in runs of elements that are known together: the start, the numbers in float64, and those of the update.

    Parameters
    ----------
    applying, shape, own, trained
        As for :func:`change_in_place`; ``own`` in float64.
    backend : Backend
    read : callable
        Returns the elements of the weight between two positions, in float64.
    pieces : iterable of (int, array)
    """
    _rows, cols = shape
    span = applying.span(shape)
    for start, piece in _joined(backend, pieces, span):
        # A run of whole rows, the whole weight, or elements that do not depend on each other.
        matrix = (-1, cols) if span % cols == 0 else (1, -1)
        stop = start + piece.shape[0]
        some = applying.of_rows(own, start // cols, stop // cols) if span % cols == 0 else own
        weight, delta = (backend.reshape(vec, matrix) for vec in (read(start, stop), piece))
        found = applying.merged(backend, weight, delta, some, trained)
        yield start, backend.reshape(found, (-1,)), piece


def _joined(backend: Backend, pieces: Iterable[tuple[int, Array]], span: int) -> Iterator[tuple[int, Array]]:
    """Join consecutive pieces to multiples of a length."""
    held, count, begin = list[Array](), 0, 0
    for _, piece in pieces:
        held.append(piece)
        count += piece.shape[0]
        whole = count // span * span
        if whole:
            vec = backend.concat(held)
            yield begin, vec[:whole]
            begin, count = begin + whole, count - whole
            held = [vec[whole:]] if count else []
