"""Sequences of kernel launches for the Hadamard transform and for F, and its passes over memory on a GPU.

A launcher runs one pass. Otherwise only ``reshape`` and ``sum`` of arrays are used, so they may be of any library. The
reference implementations are :func:`tnadapt.algebra.maps.fastfood.fwht` and the linear part of
:class:`tnadapt.algebra.maps.projection.Projection`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

# -- Division of a long Hadamard transform into passes -----------------------------------------------------------------

# ``H`` of ``2**bits`` points is a Kronecker product of smaller matrices, one pass for each. The first pass transforms
# runs of neighboring points; every later pass transforms points that are a stride apart, with enough adjacent columns
# to fill a tile. The constants were not tuned on a device; their comments give the reasons for them.


#: Tiles of the first pass, whose points are contiguous, are shorter: more of them run at once, and small inputs occupy
#: more of the device.
_SHORT_TILE = 1 << 12
#: A strided pass combines at least 2**7 points (fewer would waste a pass over memory), and at most as many as leave 64
#: contiguous bytes per row of a tile, two memory sectors.
_LEAST_STRIDED_BITS, _LEAST_WIDTH = 7, 64
#: Maximum number of columns of a tile: one block of Philox has this many signs.
_WIDEST = 128


class Pass(NamedTuple):
    """One pass: the binary digits of the position that it transforms, and the shape of a tile."""

    stride: int
    """Distance of the points that are combined; 1 in the first pass."""
    bits: int
    """Number of digits: ``2**bits`` points are combined."""
    rows: int
    """Rows of a tile: the points that are combined if the stride is not 1."""
    columns: int
    """Columns of a tile: neighbors in memory."""

    def tiles(self, points: int) -> int:
        """Return the number of tiles for that many points; the last tile may be incomplete."""
        return -(-points // (self.rows * self.columns))


def passes(bits: int, itemsize: int, tile_bytes: int) -> list[Pass]:
    """Plan the passes of a transform of ``2**bits`` points with ``itemsize`` bytes each, in tiles of ``tile_bytes``.

    With tiles of 32 KiB and float32: one pass up to 2**13 points, two up to 2**22, three up to 2**31.

    Examples
    --------
    >>> for step in passes(24, 4, 1 << 15):
    ...     print(step)
    Pass(stride=1, bits=10, rows=32, columns=128)
    Pass(stride=1024, bits=7, rows=128, columns=64)
    Pass(stride=131072, bits=7, rows=128, columns=64)
    """
    tile = (tile_bytes // itemsize).bit_length() - 1
    most = (tile_bytes // _LEAST_WIDTH).bit_length() - 1
    count = -(-max(0, bits - tile) // most)
    strided = max(_LEAST_STRIDED_BITS, -(-(bits - tile) // count)) if count else 0
    side_by_side = bits - count * strided
    columns = min(_WIDEST, 1 << bits)
    result = [Pass(1, side_by_side, max(1 << side_by_side, _SHORT_TILE) // columns, columns)]
    for step in range(count):
        stride = 1 << side_by_side + step * strided
        result.append(Pass(stride, strided, 1 << strided, min(_WIDEST, stride, 1 << tile - strided)))
    return result


# -- Sequences of launches for the transform and for F -----------------------------------------------------------------


class Drawn(NamedTuple):
    """The integers that define one F."""

    n_in: int
    n_out: int
    length: int
    """Length L of the long transform, a power of two."""
    period: int
    """Length of the small transform: the least power of two that is at least n_in."""
    seed: int
    group: int
    signs: bool
    """Whether the final diagonal is signs; otherwise it is normal numbers."""
    gain: Any = None
    """The normal numbers ``g[perm]``, float32, if they are not drawn in the kernels."""

    @classmethod
    def of(cls, draws: Any, n_in: int, gain: Any = None) -> Drawn:
        """Read the integers from a :class:`tnadapt.algebra.maps.fastfood.FastfoodDraws`."""
        n_out = draws.lengths["diagonal"]
        return cls(n_in, n_out, draws.padded, draws.pruned, draws.seed, draws.group, bool(draws.signs), gain)


#: Placeholder for a transform without draws.
_NOTHING = Drawn(1, 1, 1, 1, 0, 0, True)


class Launcher(Protocol):
    """Runs kernels on contiguous arrays (vectors, n), float32 or float64."""

    tile_bytes: int
    """Bytes of an array that one program (thread block) processes."""

    def empty(self, x: Any, *shape: int) -> Any:
        """Return a new array with the dtype and device of x."""
        ...

    def transform(
        self, x: Any, out: Any, length: int, step: Pass, scale: float, f: Drawn, load: str, store: str
    ) -> None:
        """Run one pass of a transform of that length, from the rows of x to the rows of out, which may be shorter.

        ``load`` selects what the pass reads: "plain" numbers, zero beyond the end of x's row; "diagonal", these times
        the diagonal of f; "permuted", ``x[perm[j] % period] * g[perm[j]]``; or "unpermuted", ``x[inverse[j]] * g[j]``.
        ``store`` selects what it writes: "plain" numbers, or "diagonal", these times the diagonal. Both are multiplied
        by scale.
        """
        ...

    def gathered_sum(self, x: Any, f: Drawn) -> Any:
        """Sum ``x[inverse[j]] * g[j]`` over the repeats of the period; partial sums, (vectors, pieces, period)."""
        ...


def _transform(
    launcher: Launcher, x: Any, length: int, scale: float, n_out: int, f: Drawn = _NOTHING, load: str = "plain",
    store: str = "plain",
) -> Any:  # fmt: skip
    vectors = x.shape[0]
    steps = passes(length.bit_length() - 1, x.itemsize, launcher.tile_bytes)
    between = launcher.empty(x, vectors, length) if len(steps) > 1 else x
    out = between if n_out == length and len(steps) > 1 else launcher.empty(x, vectors, n_out)
    if not vectors:
        return out
    for step in steps:
        begins, ends = step is steps[0], step is steps[-1]
        launcher.transform(
            x if begins else between, out if ends else between, length, step, scale if ends else 1.0, f,
            load if begins else "plain", store if ends else "plain",
        )  # fmt: skip
    return out


def fwht(launcher: Launcher, x: Any, length: int, scale: float, n_out: int) -> Any:
    """Compute ``scale * (H pad(x))[..., :n_out]``; the entries of H are 1 and -1.

    Parameters
    ----------
    launcher : Launcher
        Runs a pass.
    x : array, shape (vectors, n_in)
        float32 or float64, contiguous, ``n_in <= length``.
    length : int
        A power of two.
    scale : float
        Factor of the result.
    n_out : int
        Number of elements to return of each vector.

    Returns
    -------
    array, shape (vectors, n_out)
        New; the dtype and device of x.
    """
    return _transform(launcher, x, length, scale, n_out)


def fastfood(launcher: Launcher, x: Any, f: Drawn) -> Any:
    """Compute the linear part of F, (vectors, n_in) to (vectors, n_out); otherwise as :func:`fwht`.

    After the small transform of x, the first pass of the long transform gathers its input through the Feistel network
    and multiplies it by normal numbers, and the last pass applies the diagonal of signs or normal numbers. In addition
    to the result it needs memory for one long vector per vector of x.
    """
    small = fwht(launcher, x, f.period, 1.0 / math.sqrt(f.length), f.period)
    return _transform(launcher, small, f.length, 1.0 / math.sqrt(f.length), f.n_out, f, "permuted", "diagonal")


def fastfood_adjoint(launcher: Launcher, y: Any, f: Drawn) -> Any:
    """Compute the adjoint of :func:`fastfood`, (vectors, n_out) to (vectors, n_in); with the same bits in every run.

    Each element of the small vector gathers its contributions from all repeats of the period through the inverse
    network, and sums them in a fixed order (a scatter would need atomics, whose order varies).
    """
    scale = 1.0 / math.sqrt(f.length)
    if not y.shape[0]:
        return launcher.empty(y, 0, f.n_in)
    long = _transform(launcher, y, f.length, scale, f.length, f, "diagonal")
    if f.period == f.length:
        return _transform(launcher, long, f.length, scale, f.n_in, f, "unpermuted")
    sums = launcher.gathered_sum(long, f)
    small = sums.reshape(sums.shape[0], f.period) if sums.shape[1] == 1 else sums.sum(1)
    return fwht(launcher, small, f.period, scale, f.n_in)
