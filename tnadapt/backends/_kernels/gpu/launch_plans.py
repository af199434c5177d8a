"""Launch plans of the GPU kernels, without Triton: passes of a Hadamard transform, and the integers that define F."""

from __future__ import annotations

from typing import Any, NamedTuple

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


# -- The integers that define one F ------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """One F."""

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
