"""The permutation of :mod:`tnadapt.algebra.rng`, regenerated where it is used: 32-bit images in SIMD registers.

A round of the Feistel network has two dependent multiplications with a latency of ten cycles each. Interleaving eight
independent vectors hides this latency; numba's own loops would process one vector at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiling import compiled
from .simd import VECTOR_BYTES

__all__ = ["IMAGES", "fill_images"]

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

_LANES = VECTOR_BYTES // 4
_VECTORS = 8
#: Number of images computed at once.
IMAGES = _VECTORS * _LANES
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_INT32, _LANES)


def _all(numbers: Sequence[int] | int) -> Any:
    return ir.Constant(_VECTOR, [numbers] * _LANES if isinstance(numbers, int) else list(numbers))


def _network(inverse: bool) -> Any:
    def images(typing: Any, start: Any, bits: Any, keys: Any, dst: Any, to: Any) -> Any:
        """Set ``dst[to:]`` to the images of IMAGES consecutive numbers from ``start`` on, all below ``2**bits``."""
        signature = types.void(types.intp, types.intp, keys, dst, types.intp)

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start, bits, keys, dst, to = args
            keys, dst = (
                context.make_array(kind)(context, builder, array).data
                for kind, array in ((signature.args[2], keys), (signature.args[3], dst))
            )

            def spread(number: Any) -> Any:
                one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_INT32, 0))
                return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _all(0))

            def mask(size: Any) -> Any:
                one = ir.Constant(_INT32, 1)
                return spread(builder.sub(builder.shl(one, size), one))

            def mixed(x: Any, key: Any) -> Any:
                x = builder.mul(builder.xor(x, key), _all(0x85EBCA6B))
                x = builder.mul(builder.xor(x, builder.lshr(x, _all(13))), _all(0xC2B2AE35))
                return builder.xor(x, builder.lshr(x, _all(16)))

            bits = builder.trunc(bits, _INT32)
            low_bits = builder.lshr(bits, ir.Constant(_INT32, 1))
            low_mask, high_mask, shift = mask(low_bits), mask(builder.sub(bits, low_bits)), spread(low_bits)
            key = [spread(builder.load(builder.gep(keys, [ir.Constant(_INT64, i)]))) for i in range(8)]
            first = spread(builder.trunc(start, _INT32))
            numbers = [
                builder.add(first, _all([vector * _LANES + lane for lane in range(_LANES)]))
                for vector in range(_VECTORS)
            ]
            low = [builder.and_(number, low_mask) for number in numbers]
            high = [builder.lshr(number, shift) for number in numbers]
            for i in range(7, -1, -1) if inverse else range(8):
                for vector in range(_VECTORS):
                    if i % 2 == 0:
                        change = builder.and_(mixed(low[vector], key[i]), high_mask)
                        high[vector] = builder.xor(high[vector], change)
                    else:
                        change = builder.and_(mixed(high[vector], key[i]), low_mask)
                        low[vector] = builder.xor(low[vector], change)
            for vector in range(_VECTORS):
                image = builder.or_(builder.shl(high[vector], shift), low[vector])
                at = builder.gep(dst, [builder.add(to, ir.Constant(_INT64, vector * _LANES))])
                builder.store(image, builder.bitcast(at, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, emit

    return intrinsic(images)


_forward, _backward = _network(inverse=False), _network(inverse=True)


@compiled
def fill_images(start, bits, keys, inverse, out):
    """Fill ``out`` with the images of consecutive numbers under a permutation of length ``2**bits``, bits from 2 to 31.

    ``out`` is uint32; its length is a multiple of IMAGES.
    """
    for i in range(0, out.size, IMAGES):
        if inverse:
            _backward(start + i, bits, keys, out, i)
        else:
            _forward(start + i, bits, keys, out, i)
