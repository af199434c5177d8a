"""How a long Hadamard transform is cut into passes over memory on a GPU.

``H`` of ``2**bits`` points is a Kronecker product of smaller ones, a pass for each: the first transforms runs of
neighbouring points, every later one points that lie a stride apart, with as many columns beside each other as fill a
tile. Nothing here was tuned on a device; the reasons for the numbers stand beside them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Pass", "passes"]

#: Shorter tiles where all points lie side by side: more of them run at once, and small inputs fill more of the device.
_SHORT_TILE = 1 << 12
#: A strided pass does at least 2**7 points (fewer would be a pass over memory for little), and no more than leave 64
#: bytes side by side in a tile: two sectors of memory.
_LEAST_STRIDED_BITS, _LEAST_WIDTH = 7, 64
#: As wide as a tile gets where points are strided: so many signs come from one block of Philox.
_WIDEST = 128


class Pass(NamedTuple):
    """One pass: which digits of the position it transforms, and the shape of a tile."""

    stride: int
    """Distance of the points that are combined; 1 in the first pass."""
    bits: int
    """How many points are combined: ``2**bits``."""
    rows: int
    """Rows of a tile: what is combined where the stride is not 1."""
    columns: int
    """Columns of a tile: neighbours in memory."""

    def tiles(self, points: int) -> int:
        """How many tiles so many points are, the last one perhaps not full."""
        return -(-points // (self.rows * self.columns))


def passes(bits: int, itemsize: int, tile_bytes: int) -> list[Pass]:
    """The passes of a transform of ``2**bits`` points of so many bytes each, by tiles of so many bytes.

    By tiles of 32 KiB: one pass to 2**13 points of float32, two to 2**22, three to 2**31.

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
