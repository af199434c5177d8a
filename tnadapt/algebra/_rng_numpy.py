"""The streams of :mod:`tnadapt.algebra.rng` in NumPy: the reference that the compiled kernels match bit for bit.

The callers there have checked the arguments. Philox, AS 241 and the Feistel network operate on whole arrays of words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["chunks", "normals", "normals_at", "permutation", "signs", "words", "words_at"]

# Draws are computed in chunks that stay in cache; chunking does not change the result.
CHUNK = 1 << 16

U32 = np.uint32
U64 = np.uint64
_LOW = U64(0xFFFFFFFF)


def chunks(start: int, stop: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield consecutive ``(start, stop)`` pairs that cover a range in chunks of at most ``size``."""
    for lo in range(start, stop, size):
        yield lo, min(lo + size, stop)


def _philox(blocks: NDArray[np.uint64], purpose: int, group: int, seed: int) -> NDArray[np.uint32]:
    """Compute Philox4x32-10 of the counters ``(lo32(block), hi32(block), purpose, group)``: shape (blocks, 4)."""
    c0, c1 = blocks & _LOW, blocks >> U64(32)
    c2, c3 = np.full_like(blocks, purpose), np.full_like(blocks, group)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * U64(0xD2511F53), c2 * U64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> U64(32)) ^ c1 ^ U64(k0),
            p1 & _LOW,
            (p0 >> U64(32)) ^ c3 ^ U64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(U32)


def words(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.uint32]:
    """:func:`tnadapt.algebra.rng.words`."""
    out = np.empty(stop - start, U32)
    for lo, hi in chunks(start, stop):
        first = lo // 4
        block = np.arange(first, (hi + 3) // 4, dtype=U64)
        out[lo - start : hi - start] = _philox(block, purpose, group, seed).reshape(-1)[lo - 4 * first : hi - 4 * first]
    return out


def words_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
    """:func:`tnadapt.algebra.rng.words_at`."""
    block = _philox((index >> 2).astype(U64), purpose, group, seed)
    return np.take_along_axis(block, (index & 3)[:, None], axis=1)[:, 0]


def signs(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.int8]:
    """:func:`tnadapt.algebra.rng.signs`, from the stream with that purpose."""
    first = start // 32
    word = words(seed, group, purpose, first, (stop + 31) // 32)
    # The byte order is explicit, so that the bits do not depend on the machine's.
    bits = np.unpackbits(word.astype("<u4").view(np.uint8), bitorder="little")[start - 32 * first : stop - 32 * first]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def normals(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.float32]:
    """:func:`tnadapt.algebra.rng.normals`."""
    out = np.empty(stop - start, np.float32)
    for lo, hi in chunks(start, stop):
        out[lo - start : hi - start] = _normal_of(words(seed, group, purpose, lo, hi))
    return out


def normals_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """:func:`tnadapt.algebra.rng.normals_at`."""
    out = np.empty(index.shape, np.float32)
    for lo, hi in chunks(0, index.size):
        out[lo:hi] = _normal_of(words_at(seed, group, purpose, index[lo:hi]))
    return out


def _normal_of(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    return _inverse_normal((word.astype(np.float64) + 0.5) * 2.0**-32).astype(np.float32)


# AS 241, routine PPND16: numerator and denominator of the two rational approximations that 32-bit words can reach.
# (The third one starts below exp(-25), and the smallest u here is 2**-33.)
_CENTRE = (
    (
        2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
        1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
        5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0,
    ),
)  # fmt: skip
_TAIL = (
    (
        7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
        3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
        6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0,
    ),
)  # fmt: skip


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the natural logarithm without ``libm``, whose last bits differ between machines.

    ``frexp`` reduces the argument to a mantissa m in [sqrt(1/2), sqrt(2)); log(m) is the series of
    2 artanh((m-1)/(m+1)) up to the 25th power.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    power = exponent.astype(np.float64) - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(tuple(1.0 / k for k in range(25, 0, -2)), s * s)
    return power * math.log(2.0) + 2.0 * s * series


def _inverse_normal(u: NDArray[np.float64]) -> NDArray[np.float64]:
    q = u - 0.5
    r = 0.180625 - q * q
    out = q * _horner(_CENTRE[0], r) / _horner(_CENTRE[1], r)
    tail = np.abs(q) > 0.425
    nearer = np.minimum(u[tail], 1.0 - u[tail])
    r = np.sqrt(-_log(nearer)) - 1.6
    out[tail] = np.where(q[tail] < 0.0, -1.0, 1.0) * (_horner(_TAIL[0], r) / _horner(_TAIL[1], r))
    return out


def permutation(size: int, keys: NDArray[np.uint32], start: int, stop: int, inverse: bool) -> NDArray[np.int64]:
    """:func:`tnadapt.algebra.rng.permutation`, given the round keys."""
    bits = (size - 1).bit_length()
    step = _feistel(bits, keys, inverse)
    out = np.empty(stop - start, np.int64)
    for lo, hi in chunks(start, stop):
        image = step(np.arange(lo, hi, dtype=U64))
        # Cycle walking: images outside of the range are permuted again until they fall inside.
        outside = np.flatnonzero(image >= size)
        while outside.size:
            image[outside] = step(image[outside])
            outside = outside[image[outside] >= size]
        out[lo - start : hi - start] = image
    return out


def _mix(x: NDArray[np.uint32], key: np.uint32) -> NDArray[np.uint32]:
    x = (x ^ key) * U32(0x85EBCA6B)
    x = (x ^ (x >> U32(13))) * U32(0xC2B2AE35)
    return x ^ (x >> U32(16))


def _feistel(bits: int, keys: NDArray[np.uint32], inverse: bool) -> Callable[[NDArray[np.uint64]], NDArray[np.uint64]]:
    low = bits // 2
    low_mask, high_mask = U32((1 << low) - 1), U32((1 << (bits - low)) - 1)
    order = range(7, -1, -1) if inverse else range(8)

    def step(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        lo, hi = x.astype(U32) & low_mask, (x >> U64(low)).astype(U32)
        # A round XORs one half with a function of the other, so it is its own inverse.
        for round_ in order:
            if round_ % 2 == 0:
                hi = hi ^ (_mix(lo, keys[round_]) & high_mask)
            else:
                lo = lo ^ (_mix(hi, keys[round_]) & low_mask)
        return (hi.astype(U64) << U64(low)) | lo.astype(U64)

    return step
