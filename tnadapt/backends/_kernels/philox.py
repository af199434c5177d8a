"""Compiled random streams of :mod:`tnadapt.algebra.rng`, with the same bits: words, normals, permutations.

The code consists of branch-free loops over short arrays that stay in the cache, so that the compiler vectorizes them: a
round of the Feistel network and a branch of AS 241 are one loop each. The reference implementation is
:mod:`tnadapt.algebra.rng`. The operations and their order are the same here, and the compiler may not change them (no
``fastmath``: no fused multiply-add, no reordered sums).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float64, int64, types, uint32, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

from .compiling import compiled
from .simd import VECTOR_BYTES
from .work_space import share, thread_count

# -- The random words, normals and permutation -------------------------------------------------------------------------


# mypy: disable-error-code="no-untyped-def,no-untyped-call"

# Elements processed at a time: all arrays of this length fit in the level 1 cache together.
_SHORT = 1024
_ROOT_HALF, _LOG_TWO = math.sqrt(0.5), math.log(2.0)
# Elements per piece of work of a thread.
_PIECE = 1 << 16

# -- Words: Philox4x32-10 -----------------------------------------------------------------------


@compiled
def _philox_round(c0, c1, c2, c3, k0, k1):
    low, half = uint64(0xFFFFFFFF), uint64(32)
    p0, p1 = c0 * uint64(0xD2511F53), c2 * uint64(0xCD9E8D57)
    c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
    return c0, c1, c2, c3, (k0 + uint64(0x9E3779B9)) & low, (k1 + uint64(0xBB67AE85)) & low


@compiled
def _philox(block, purpose, group, seed):
    """Compute the four words of one block, as 64-bit numbers below 2**32."""
    low, half = uint64(0xFFFFFFFF), uint64(32)
    state = (block & low, block >> half, purpose, group, seed & low, seed >> half)
    # Unrolled by hand: a loop over the rounds would keep the compiler from vectorizing over blocks.
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    state = _philox_round(*state)
    return _philox_round(*state)


@compiled
def _blocks(first, purpose, group, seed, out):
    """Fill a buffer with the words of blocks ``first`` onward."""
    for i in range(out.size // 4):
        lanes = _philox(first + uint64(i), purpose, group, seed)
        out[4 * i] = lanes[0]
        out[4 * i + 1] = lanes[1]
        out[4 * i + 2] = lanes[2]
        out[4 * i + 3] = lanes[3]


@compiled
def _words(start, purpose, group, seed, out):
    buffer = np.empty(_SHORT, np.uint32)
    stop = start + out.size
    for first in range(start - start % 4, stop, _SHORT):
        _blocks(uint64(first // 4), purpose, group, seed, buffer)
        lo, hi = max(first, start), min(first + _SHORT, stop)
        out[lo - start : hi - start] = buffer[lo - first : hi - first]


@compiled
def _words_at(index, purpose, group, seed, out):
    for i in range(out.size):
        lanes = _philox(uint64(index[i] >> 2), purpose, group, seed)
        lane = index[i] & 3
        even = lanes[2] if lane & 2 else lanes[0]
        odd = lanes[3] if lane & 2 else lanes[1]
        out[i] = odd if lane & 1 else even


# -- Normals: AS 241, the two of its approximations that 32-bit words can reach -------------------


@compiled
def _horner(x, c0, c1, c2, c3, c4, c5, c6, c7):
    return ((((((c0 * x + c1) * x + c2) * x + c3) * x + c4) * x + c5) * x + c6) * x + c7


@compiled
def _centre(word, u, out):
    """Compute the normals of words by the approximation near 0."""
    for i in range(word.size):
        u[i] = (float64(word[i]) + 0.5) * 2.0**-32
        q = u[i] - 0.5
        r = 0.180625 - q * q
        above = _horner(
            r, 2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
            1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0,
        )  # fmt: skip
        below = _horner(
            r, 5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
            5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0,
        )  # fmt: skip
        out[i] = q * above / below


@compiled
def _tail(nearer, bits, power):
    """Replace tail probabilities by the magnitudes of their normals, in place, where ``bits`` views the same memory."""
    for i in range(nearer.size):
        # frexp from the bits; the numbers are at least 2**-33, so neither 0 nor subnormal.
        power[i] = float64((bits[i] >> 52) - 1022)
        bits[i] = (bits[i] & 0xFFFFFFFFFFFFF) | (1022 << 52)
    for i in range(nearer.size):
        low = nearer[i] < _ROOT_HALF
        m = nearer[i] * 2.0 if low else nearer[i]
        exponent = power[i] - 1.0 if low else power[i]
        s = (m - 1.0) / (m + 1.0)
        x = s * s
        series = _horner(x, 1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11)
        series = ((((series * x + 1.0 / 9) * x + 1.0 / 7) * x + 1.0 / 5) * x + 1.0 / 3) * x + 1.0
        r = math.sqrt(-(exponent * _LOG_TWO + 2.0 * s * series)) - 1.6
        above = _horner(
            r, 7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
            1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0,
            1.42343711074968357734e0,
        )  # fmt: skip
        below = _horner(
            r, 1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
            1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0,
            1.0,
        )  # fmt: skip
        nearer[i] = above / below


@compiled
def _of_words(word, u, where, power, out):
    """Compute the normals of a short array of words, with the other arrays as scratch buffers."""
    # Every word gets the approximation near 0 first; those in the tails (about 15 %) are then collected and replaced.
    _centre(word, u, out)
    count = 0
    for i in range(word.size):
        where[count] = i
        count += abs(u[i] - 0.5) > 0.425
    nearer = np.empty(count)
    for k in range(count):
        nearer[k] = min(u[where[k]], 1.0 - u[where[k]])
    _tail(nearer, nearer.view(np.int64), power)
    for k in range(count):
        out[where[k]] = -nearer[k] if u[where[k]] < 0.5 else nearer[k]


@compiled
def _normals(start, purpose, group, seed, out):
    word, normals = np.empty(_SHORT, np.uint32), np.empty(_SHORT, np.float32)
    u, power, where = np.empty(_SHORT), np.empty(_SHORT), np.empty(_SHORT, np.int64)
    stop = start + out.size
    for first in range(start - start % 4, stop, _SHORT):
        lo, hi = max(first, start), min(first + _SHORT, stop)
        size = (hi - first + 3) // 4 * 4
        _blocks(uint64(first // 4), purpose, group, seed, word[:size])
        _of_words(word[:size], u, where, power, normals)
        out[lo - start : hi - start] = normals[lo - first : hi - first]


@compiled
def _normals_of_seeds(purpose, group, seeds, out):
    for k in range(seeds.size):
        _normals(0, purpose, group, seeds[k], out[k])


@compiled
def _normals_at(index, purpose, group, seed, out):
    word = np.empty(_SHORT, np.uint32)
    u, power, where = np.empty(_SHORT), np.empty(_SHORT), np.empty(_SHORT, np.int64)
    for lo in range(0, out.size, _SHORT):
        size = min(_SHORT, out.size - lo)
        _words_at(index[lo : lo + size], purpose, group, seed, word[:size])
        _of_words(word[:size], u, where, power, out[lo : lo + size])


# -- The permutation: a Feistel network, with cycle walking if the length is not a power of two --------


@compiled
def _mix(x, key):
    x = uint32((x ^ key) * uint32(0x85EBCA6B))
    x = uint32((x ^ (x >> uint32(13))) * uint32(0xC2B2AE35))
    return uint32(x ^ (x >> uint32(16)))


@compiled
def _round(changed, by, key, mask):
    for i in range(changed.size):
        changed[i] = uint32(changed[i] ^ (_mix(by[i], key) & mask))


@compiled
def _network(low, high, bits, keys, inverse):
    """Apply all rounds in place to numbers given as two halves."""
    low_mask, high_mask = uint32((1 << (bits // 2)) - 1), uint32((1 << (bits - bits // 2)) - 1)
    for k in range(8):
        number = 7 - k if inverse else k
        if number % 2 == 0:
            _round(high, low, keys[number], high_mask)
        else:
            _round(low, high, keys[number], low_mask)


@compiled
def _permutation(start, size, bits, keys, inverse, out):
    low, high, mask = np.empty(_SHORT, np.uint32), np.empty(_SHORT, np.uint32), (1 << (bits // 2)) - 1
    where = np.empty(_SHORT, np.int64)
    for lo in range(0, out.size, _SHORT):
        some = out[lo : lo + _SHORT]
        for i in range(some.size):
            low[i] = (start + lo + i) & mask
            high[i] = (start + lo + i) >> (bits // 2)
            where[i] = i
        count = some.size
        while count:
            _network(low[:count], high[:count], bits, keys, inverse)
            # Write every image; those outside the range are compacted to the front and permuted again.
            left = 0
            for k in range(count):
                image, place = (int64(high[k]) << (bits // 2)) | int64(low[k]), where[k]
                some[place] = image
                low[left], high[left], where[left] = low[k], high[k], place
                left += image >= size
            count = left


# -- For NumPy ------------------------------------------------------------------------------------


def _in_pieces(kernel: Callable[..., None], start: int, out: NDArray[Any], *rest: Any) -> NDArray[Any]:
    """Run ``kernel(start, …, out)`` in parallel pieces."""

    def piece(number: int) -> None:
        lo = number * _PIECE
        kernel(start + lo, *rest, out[lo : lo + _PIECE])

    share(piece, -(-out.size // _PIECE), thread_count())
    return out


def _at(kernel: Callable[..., None], index: NDArray[np.integer[Any]], out: NDArray[Any], *rest: Any) -> NDArray[Any]:
    index = np.ascontiguousarray(index, np.int64)
    return _in_pieces(lambda start, *rest: kernel(index[start:], *rest), 0, out, *rest)


def words(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.uint32]:
    """:func:`tnadapt.algebra.rng.words`; the caller has checked the arguments, here and below."""
    return _in_pieces(_words, start, np.empty(stop - start, np.uint32), *_stream(seed, group, purpose))


def words_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
    """:func:`tnadapt.algebra.rng.words_at`."""
    return _at(_words_at, index, np.empty(index.size, np.uint32), *_stream(seed, group, purpose))


def normals(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.float32]:
    """:func:`tnadapt.algebra.rng.normals`."""
    return _in_pieces(_normals, start, np.empty(stop - start, np.float32), *_stream(seed, group, purpose))


def normals_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """:func:`tnadapt.algebra.rng.normals_at`."""
    return _at(_normals_at, index, np.empty(index.size, np.float32), *_stream(seed, group, purpose))


def normals_of_seeds(seeds: NDArray[np.uint64], group: int, purpose: int, stop: int) -> NDArray[np.float32]:
    """:func:`tnadapt.algebra.rng.normals_of_seeds`, on this thread."""
    out = np.empty((seeds.size, stop), np.float32)
    _normals_of_seeds(np.uint64(purpose), np.uint64(group), seeds, out)
    return out


def permutation(size: int, keys: NDArray[np.uint32], start: int, stop: int, inverse: bool) -> NDArray[np.int64]:
    """:func:`tnadapt.algebra.rng.permutation`, given the round keys."""
    bits = (size - 1).bit_length()
    return _in_pieces(_permutation, start, np.empty(stop - start, np.int64), size, bits, keys, inverse)


def _stream(seed: int, group: int, purpose: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    return np.uint64(purpose), np.uint64(group), np.uint64(seed)


# -- The permutation, regenerated where it is used: 32-bit images in SIMD registers ------------------------------------

# A round of the Feistel network has two dependent multiplications with a latency of ten cycles each. Interleaving eight
# independent vectors hides this latency; numba's own loops would process one vector at a time.


# mypy: disable-error-code="no-untyped-def,no-untyped-call"

_LANES = VECTOR_BYTES // 4
_VECTORS = 8
#: Number of images computed at once.
IMAGES = _VECTORS * _LANES
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_INT32, _LANES)


def all_lanes(numbers):
    """Return a constant vector: of these numbers, or of one number in all lanes."""
    return ir.Constant(_VECTOR, [numbers] * _LANES if isinstance(numbers, int) else numbers)


class FeistelNetwork:
    """Emit the Feistel network on vectors of 32-bit numbers, each as two halves."""

    def __init__(self, builder: Any, bits: Any, keys: Any) -> None:
        self.builder, self.keys = builder, keys
        bits = builder.trunc(bits, _INT32)
        low_bits = builder.lshr(bits, ir.Constant(_INT32, 1))
        self.low_mask, self.high_mask = self._mask(low_bits), self._mask(builder.sub(bits, low_bits))
        self.shift = self.spread(low_bits)

    def spread(self, number: Any) -> Any:
        lane = self.builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(lane, ir.Constant(_VECTOR, ir.Undefined), all_lanes(0))

    def _mask(self, size: Any) -> Any:
        lowest_bit = ir.Constant(_INT32, 1)
        return self.spread(self.builder.sub(self.builder.shl(lowest_bit, size), lowest_bit))

    def key(self, number: Any) -> Any:
        return self.spread(self.builder.load(self.builder.gep(self.keys, [number])))

    def halves(self, start: Any, vectors: int) -> tuple[list[Any], list[Any]]:
        """Return the low and the high halves of consecutive numbers."""
        b, first = self.builder, self.spread(self.builder.trunc(start, _INT32))
        lanes = [[vector * _LANES + lane for lane in range(_LANES)] for vector in range(vectors)]
        numbers = [b.add(first, all_lanes(each)) for each in lanes]
        return [b.and_(number, self.low_mask) for number in numbers], [b.lshr(n, self.shift) for n in numbers]

    def mixed(self, x: Any, mask: Any) -> Any:
        b = self.builder
        x = b.mul(x, all_lanes(0x85EBCA6B))
        x = b.mul(b.xor(x, b.lshr(x, all_lanes(13))), all_lanes(0xC2B2AE35))
        return b.and_(b.xor(x, b.lshr(x, all_lanes(16))), mask)


def _network_of_many(inverse):
    def images(typing, start, bits, keys, dst, to):
        """Set ``dst[to:]`` to the images of IMAGES consecutive numbers from ``start`` on, all below ``2**bits``."""
        signature = types.void(types.intp, types.intp, keys, dst, types.intp)

        def emit(context, builder, signature, args):
            start, bits, _, _, to = args
            keys, dst = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (2, 3))
            network = FeistelNetwork(builder, bits, keys)
            key = [network.key(ir.Constant(_INT64, i)) for i in range(8)]
            low, high = network.halves(start, _VECTORS)
            for i in range(7, -1, -1) if inverse else range(8):
                changed, by, mask = (low, high, network.low_mask) if i % 2 else (high, low, network.high_mask)
                for vector in range(_VECTORS):
                    change = network.mixed(builder.xor(by[vector], key[i]), mask)
                    changed[vector] = builder.xor(changed[vector], change)
            for vector in range(_VECTORS):
                image = builder.or_(builder.shl(high[vector], network.shift), low[vector])
                at = builder.gep(dst, [builder.add(to, ir.Constant(_INT64, vector * _LANES))])
                builder.store(image, builder.bitcast(at, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, emit

    return intrinsic(images)


_forward, _backward = _network_of_many(inverse=False), _network_of_many(inverse=True)


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
