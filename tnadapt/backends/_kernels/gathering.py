"""Gather from, and scatter to, the images of the seeded permutation while the next images are drawn.

Drawing takes vector instructions only, and gathering scalar ones: vector gather instructions are no faster. A processor
runs both at once if they are close together in the program. Within a block of instructions, LLVM would schedule one
after the other; the rounds of the network are therefore a loop, each pass of which draws two rounds and gathers a
quarter of the images that were drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint32
from numba.extending import intrinsic

from .compiling import compiled
from .philox import FeistelNetwork
from .simd import LOW_VECTORS, VECTOR_BYTES, fetch
from .work_space import CACHE_LINE

# -- Loops -------------------------------------------------------------------------------------------------------------


# mypy: disable-error-code="no-untyped-def,no-untyped-call"

_LANES = VECTOR_BYTES // 4
# Several vectors at once, as the multiplications of one depend on each other. Their halves take half of the registers.
_VECTORS = LOW_VECTORS // 2
# Images drawn at once.
_AHEAD = _VECTORS * _LANES
_PASSES = 4
# Elements between a prefetch and its use.
_SOON = 1024
_INT64 = ir.IntType(64)
_VECTOR = ir.VectorType(ir.IntType(32), _LANES)


@compiled
def round_keys(keys):
    """Return the keys in the form that the loop over rounds uses.

    A half of a number is stored with the key of its next use added (XOR), so that a round adds a key together with
    its change: the first keys of both halves, their changes in each pass, and the last key of the high half.
    """
    packed = np.zeros(2 * _PASSES + 3, np.uint32)
    packed[0], packed[1] = keys[0], keys[1]
    for i in range(_PASSES):
        packed[2 + i] = keys[2 * i - 1] ^ keys[2 * i + 1] if i > 0 else 0
        packed[2 + _PASSES + i] = keys[2 * i] ^ keys[2 * i + 2] if i < _PASSES - 1 else keys[2 * i]
    packed[2 + 2 * _PASSES] = keys[2 * _PASSES - 1]
    return packed


class _FeistelRounds(FeistelNetwork):
    """Emit the rounds of a loop, two in each pass."""

    def keyed_halves(self, start: Any) -> list[Any]:
        """Return the low halves of consecutive numbers, then the high halves, each with its first key."""
        low, high = self.halves(start, _VECTORS)
        keys = [self.key(ir.Constant(_INT64, i)) for i in range(2)]
        return [self.builder.xor(half, key) for halves, key in zip((low, high), keys, strict=True) for half in halves]

    def round(self, of: Any, other: Any, mask: Any, key: Any) -> Any:
        """Return the other half after one round."""
        return self.builder.xor(self.builder.xor(other, self.mixed(of, mask)), key)

    def passed(self, values: Sequence[Any], number: Any) -> list[Any]:
        """Return the halves after an even and an odd round."""
        key = [self.key(self.builder.add(number, ir.Constant(_INT64, 2 + i))) for i in (0, _PASSES)]
        low, high = values[:_VECTORS], values[_VECTORS:]
        high = [self.round(x, other, self.high_mask, key[0]) for x, other in zip(low, high, strict=True)]
        low = [self.round(x, other, self.low_mask, key[1]) for x, other in zip(high, low, strict=True)]
        return [*low, *high]

    def images(self, values: Sequence[Any]) -> list[Any]:
        b, key = self.builder, self.key(ir.Constant(_INT64, 2 + 2 * _PASSES))
        pairs = zip(values[:_VECTORS], values[_VECTORS:], strict=True)
        return [b.or_(b.shl(b.xor(high, key), self.shift), low) for low, high in pairs]


def _meanwhile(use: Callable[..., None], doc: str) -> Any:
    def drawn(typing, start, bits, keys, mask, images, to, at, table, vector, where):
        intp = types.intp
        signature = types.void(intp, intp, keys, types.uint32, images, intp, intp, table, vector, intp)

        def emit(context, b, signature, args):
            start, bits, _, mask, _, to, at, _, _, where = args
            keys, images, table, vector = (
                context.make_array(signature.args[i])(context, b, args[i]).data for i in (2, 4, 7, 8)
            )
            network = _FeistelRounds(b, bits, keys)
            values = network.keyed_halves(start)
            before = b.block
            loop, after = b.append_basic_block("rounds"), b.append_basic_block("drawn")
            b.branch(loop)
            b.position_at_end(loop)
            number, halves = b.phi(_INT64), [b.phi(_VECTOR) for _ in values]
            passed = network.passed(halves, number)
            quarter = ir.Constant(_INT64, _AHEAD // _PASSES)
            first = b.mul(number, quarter)
            for i in range(0, _AHEAD // _PASSES, 2):
                n = b.add(first, ir.Constant(_INT64, i))
                pair = b.load(b.bitcast(b.gep(images, [b.add(at, n)]), _INT64.as_pointer()), align=4)
                low = b.and_(pair, ir.Constant(_INT64, 0xFFFFFFFF))
                for j, image in enumerate((low, b.lshr(pair, ir.Constant(_INT64, 32)))):
                    use(b, b.gep(table, [image]), b.gep(vector, [b.add(where, b.add(n, ir.Constant(_INT64, j)))]))
            following = b.add(number, ir.Constant(_INT64, 1))
            for phi, value, later in zip(
                (number, *halves), (ir.Constant(_INT64, 0), *values), (following, *passed), strict=True
            ):
                phi.add_incoming(value, before)
                phi.add_incoming(later, loop)
            b.cbranch(b.icmp_signed("<", following, ir.Constant(_INT64, _PASSES)), loop, after)
            b.position_at_end(after)
            only = network.spread(mask)
            for i, image in enumerate(network.images(passed)):
                place = b.gep(images, [b.add(to, ir.Constant(_INT64, i * _LANES))])
                b.store(b.and_(image, only), b.bitcast(place, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, emit

    drawn.__doc__ = doc
    return intrinsic(drawn)


def _gathered(b: Any, entry: Any, element: Any) -> None:
    b.store(b.load(entry), element)


def _scattered(b: Any, entry: Any, element: Any) -> None:
    b.store(b.fadd(b.load(entry), b.load(element)), entry)


_draw_and_gather = _meanwhile(
    _gathered,
    "Set ``vector[where:]`` to the table at ``images[at:]``; meanwhile draw ``images[to:]``, those from start on.",
)
_draw_and_scatter = _meanwhile(
    _scattered,
    "Add ``vector[where:]`` to the table at ``images[at:]``; meanwhile draw ``images[to:]``, those from start on.",
)


@compiled
def first_images(start, bits, changes, table):
    """Return a buffer for the images of two steps, with those of the first step, modulo the size of the table."""
    images, nothing = np.zeros(2 * _AHEAD, np.uint32), np.empty(_AHEAD, table.dtype)
    _draw_and_gather(start, bits, changes, uint32(table.size - 1), images, 0, _AHEAD, table, nothing, 0)
    return images


@compiled
def gather_part(start, bits, changes, images, table, gain, out):
    """Set ``out[j]`` to ``gain[j] * table[image of start + j]``, whose first images are in the buffer.

    The length is a multiple of two steps. Afterwards the buffer has the first images that follow.
    """
    now = 0
    for j in range(0, out.size, _AHEAD):
        following = start + j + _AHEAD
        _draw_and_gather(following, bits, changes, uint32(table.size - 1), images, _AHEAD - now, now, table, out, j)
        now = _AHEAD - now
        _fetch(gain, j)
        _fetch(out, j)
    for j in range(out.size):
        out[j] *= gain[j]


@compiled
def scatter_part(start, bits, changes, images, u, gain, table):
    """Add ``gain[j] * u[j]`` to ``table[image of start + j]``, with a buffer of images as for :func:`gather_part`."""
    now, product = 0, np.empty(u.size, u.dtype)
    for j in range(u.size):
        product[j] = u[j] * gain[j]
    for j in range(0, u.size, _AHEAD):
        following = start + j + _AHEAD
        _draw_and_scatter(
            following, bits, changes, uint32(table.size - 1), images, _AHEAD - now, now, table, product, j
        )
        now = _AHEAD - now
        _fetch(gain, j)
        _fetch(u, j)


@compiled
def _fetch(array, at):
    """Prefetch the elements of a later step: memory would be idle during the arithmetic."""
    for j in range(at + _SOON, at + _SOON + _AHEAD, CACHE_LINE // array.itemsize):
        fetch(array, j)
