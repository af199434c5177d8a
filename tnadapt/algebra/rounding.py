"""Arithmetic of merging: the new weight W', from ``W + ΔW`` in float64, rounded; the same bits in memory and on disk.

**ΔW** is computed in float64 from the adapter's arrays, cast to float64. **The sum** ``W + ΔW`` is computed in
float64, rounded to float32, and then to the weight's dtype: two roundings to nearest, ties to even, which are the same
in every library. For a float64 weight the sum is not rounded. A bfloat16 weight is given as its bits, in uint16.

On the CPU, merging in memory and on disk run this same code on the same numbers. On another device ΔW may differ in its
last bit. This changes a float32 sum only if it lies within 1e-16 of the boundary between two float32 numbers: at most
once in about 1e9 elements, and 65,000 times less often in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, get_backend, load_backend
from tnadapt.backends.stored_floats import rounded, to_bfloat16, widened

from .applying import Applying
from .update_plan import UpdatePlan

# -- The sum W + ΔW ----------------------------------------------------------------------------------------------------


# Elements computed at once: a few such pieces in float64 fit in the cache.
PIECE = 1 << 18
# Elements computed at once with an F, which needs all of its draws for each span; a span is cached for the weights that
# share it.
SPAN = 1 << 24


class Float64Deltas:
    """The updates of an adapter in float64, in pieces of a weight.

    Parameters
    ----------
    plan : UpdatePlan
    arrays : mapping of str to array
        Arrays with the names and shapes of ``plan.param_shapes``, of any one library.
    trained : str
        The dtype in which they were trained. If F is nonlinear, ΔW is relative to the initial arrays as rounded to
        that dtype.
    piece : int
        Approximate number of elements computed at once if F is the identity.

    Notes
    -----
    If F is the identity, memory is a few pieces. Otherwise groups are computed in spans of 2**24 elements, one of which
    is kept: this takes up to five times 128 MB, plus what F keeps (see :class:`~tnadapt.Projection`), and each span
    takes the time of drawing the whole group. The boundaries of the pieces do not depend on the order of the weights.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = UpdatePlan(tna.presets.dense(), [(2, 3)])
    >>> updates = Float64Deltas(plan, {"group0.split0.dense": np.arange(6, dtype=np.float32)}, "float32", piece=4)
    >>> [(start, part.tolist()) for start, part in updates.of(0)]
    [(0, [0.0, 1.0, 2.0, 3.0]), (4, [4.0, 5.0])]
    """

    def __init__(self, plan: UpdatePlan, arrays: Mapping[str, Array], trained: str, piece: int = PIECE) -> None:
        self.plan, self.trained, self.piece = plan.arrays_plan, trained, piece
        self._arrays, self._backend = plan.arrays(arrays, trained), get_backend(*arrays.values())
        self._wide: tuple[int, dict[str, Array]] = -1, {}
        self._span: tuple[int, int, Any] = -1, 0, None

    def of(self, weight: int) -> Iterator[tuple[int, Array]]:
        """Yield the pieces of a weight in order: the start in its ``vec``, and the piece as a float64 vector."""
        for run in self.plan.layout.of_weight(weight):
            group = self.plan.groups[run.group]
            plain = group.projection.map.identity
            step = _step(group.network.sizes, self.piece) if plain else SPAN
            stop = run.group_start + run.length
            for begin in range(run.group_start // step * step, stop, step):
                lo, hi = max(begin, run.group_start), min(begin + step, stop)
                if plain:
                    part = self._made(run.group, lo, hi)
                else:
                    part = self._in_span(run.group, begin)[lo - begin : hi - begin]
                yield lo - run.group_start + run.weight_start, part

    def _in_span(self, index: int, begin: int) -> Array:
        if self._span[:2] != (index, begin):
            self._span = -1, 0, None  # free the old span before computing the new one
            self._span = index, begin, self._made(index, begin, min(begin + SPAN, self.plan.groups[index].size))
        return self._span[2]

    def _made(self, index: int, start: int, stop: int) -> Array:
        group = self.plan.groups[index]
        if self._wide[0] != index:
            # One group at a time: the arrays of a dense adapter are as large as the weights.
            cast = {full: self._backend.astype(self._arrays[full], "float64") for full in group.names.values()}
            self._wide = index, cast
        return group.update(self._backend, self._wide[1], start, stop, self.trained)


def _step(sizes: tuple[int, ...], piece: int) -> int:
    """Round a piece down to whole rows of the folded tensor, so that the network computes it as a single box."""
    row = 1
    for size in reversed(sizes[1:]):
        if row * size > piece:
            break
        row *= size
    return piece // row * row


def add_in_place(weight: np.ndarray, dtype: str, pieces: Iterable[tuple[int, np.ndarray]]) -> str | None:
    """Add an update to a weight.

    Parameters
    ----------
    weight : ndarray, shape (n,)
        Contiguous; changed in place. bfloat16 is given as its bits.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        Dtype of the weight.
    pieces : iterable of (int, ndarray)
        Start of each piece, and its float64 numbers.

    Returns
    -------
    str or None
        ``"update"`` if the update is not finite, ``"range"`` if a finite weight plus a finite update overflows in this
        dtype; the weight may then be partially changed. None on success.

    Examples
    --------
    >>> weight = np.ones(3, np.float16)
    >>> add_in_place(weight, "float16", [(1, np.array([0.5, 2.0]))]), weight.tolist()
    (None, [1.0, 1.5, 3.0])
    """
    # Reused, because allocating them would cost more than the sums.
    scratch = [np.empty(min(PIECE, weight.size), kind) for kind in (np.float64, np.float32, np.uint32)]
    with np.errstate(over="ignore", invalid="ignore"):  # _add checks for numbers that are not finite
        for start, piece in pieces:
            for lo in range(0, piece.size, PIECE):
                some = piece[lo : lo + PIECE]
                problem = _add(weight[start + lo : start + lo + some.size], dtype, some, scratch)
                if problem is not None:
                    return problem
    return None


def _add(part: np.ndarray, dtype: str, piece: np.ndarray, scratch: Sequence[np.ndarray]) -> str | None:
    """Set ``part`` to :func:`rounded` of :func:`widened` plus a piece, using scratch buffers."""
    total, single, bits = (buffer[: piece.size] for buffer in scratch)
    before = part
    if dtype == "bfloat16":
        np.copyto(bits, part)
        np.left_shift(bits, 16, out=bits)
        before = bits.view(np.float32)
    elif dtype == "float16":
        before = single
        np.copyto(single, part)
    np.add(before, piece, out=total)
    if not _in_range(total, dtype) and (~_finite(total, dtype) & np.isfinite(widened(part, dtype))).any():
        return "range" if np.isfinite(piece).all() else "update"
    if dtype == "float64":
        np.copyto(part, total)
        return None
    np.copyto(single, total, casting="same_kind")
    if dtype == "bfloat16":
        to_bfloat16(single, bits)
        np.copyto(part, bits, casting="same_kind")
    else:
        np.copyto(part, single, casting="same_kind")
    return None


# Magnitudes below these never round to infinity; larger ones are checked element by element.
_ROOM = {"float64": 1e308, "float32": 3e38, "float16": 65000.0, "bfloat16": 3e38}


def _in_range(numbers: np.ndarray, dtype: str) -> bool:
    """Return whether all numbers are well within the dtype's range, which is false if any is NaN."""
    return bool(-_ROOM[dtype] < numbers.min() and numbers.max() < _ROOM[dtype])


def _finite(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Return which numbers are still finite after rounding."""
    stored = rounded(numbers, dtype)
    return np.asarray(np.isfinite(widened(stored, dtype)))


# -- Any way of applying an update, in whole rows if necessary ---------------------------------------------------------

# W' of :mod:`tnadapt.algebra.applying`, rounded like the sum.


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
        As :func:`add_in_place`; the weight may then be partially changed.

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
        for start, merged, piece in changed_spans(applying, backend, shape, read, pieces, wide, trained):
            part = weight[start : start + merged.size]
            stored = rounded(merged, dtype)
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
        merged = applying.merged(backend, weight, delta, some, trained)
        yield start, backend.reshape(merged, (-1,)), piece


def _joined(backend: Backend, pieces: Iterable[tuple[int, Array]], span: int) -> Iterator[tuple[int, Array]]:
    """Yield consecutive pieces joined so that their lengths are multiples of a length."""
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
