"""How a long Hadamard transform is cut into passes over memory on a GPU.

``H`` of ``2**bits`` points is a Kronecker product of smaller ones, a pass for each: the first transforms runs of
neighbouring points, every later one points that lie a stride apart, with as many columns beside each other as fill a
tile. Nothing here was tuned on a device; the reasons for the numbers stand beside them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Pass", "passes"]

#: A tile of 64 KiB goes once through a multiprocessor's shared memory on every GPU since 2017 (two of them on those
#: for servers), and is 32 float32 registers for each of 512 threads.
_TILE_BYTES = 1 << 16
#: Shorter tiles where all points lie side by side: more of them run at once, and small inputs fill more of the device.
_SHORT_TILE = 1 << 12
#: A strided pass does at least 2**7 points (fewer would be a pass over memory for little) and at most 2**10, so that
#: 64 bytes lie side by side: two sectors of memory.
_LEAST_STRIDED_BITS, _MOST_STRIDED_BITS = 7, 10
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

    @property
    def warps(self) -> int:
        """Warps for a tile: 16 points a thread where it has more than one warp's, at most 512 threads."""
        return max(1, min(16, self.rows * self.columns // 512))


def passes(bits: int, itemsize: int) -> list[Pass]:
    """The passes of a transform of ``2**bits`` points of so many bytes each, in their order.

    One pass to 2**14 points of float32, two to 2**24, three to 2**34.

    Examples
    --------
    >>> for step in passes(24, 4):
    ...     print(step)
    Pass(stride=1, bits=14, rows=128, columns=128)
    Pass(stride=16384, bits=10, rows=1024, columns=16)
    """
    tile = (_TILE_BYTES // itemsize).bit_length() - 1
    count = -(-max(0, bits - tile) // _MOST_STRIDED_BITS)
    strided = max(_LEAST_STRIDED_BITS, -(-(bits - tile) // count)) if count else 0
    side_by_side = bits - count * strided
    columns = min(_WIDEST, 1 << bits)
    result = [Pass(1, side_by_side, max(1 << side_by_side, _SHORT_TILE) // columns, columns)]
    for step in range(count):
        stride = 1 << side_by_side + step * strided
        result.append(Pass(stride, strided, 1 << strided, min(_WIDEST, stride, 1 << tile - strided)))
    return result
