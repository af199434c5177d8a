"""Seeded random streams (Philox): words, signs, normals and permutations, the same bits on every machine.

Each element is a pure function of ``(seed, group, purpose, index)``, so any slice can be drawn without
the rest, and in any order. Words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011); normals from the words by AS 241 (Wichura, Applied Statistics 37, 1988); the
permutation is a Feistel network with cycle walking. Only integer and IEEE-exact operations are used:
no ``libm``, whose last bits differ between machines, and no library's generator, whose streams change
between releases. :class:`NumpyStreams` computes them, or, for long draws, compiled kernels with the same bits.

The streams differ by ``purpose``: 1 permutation, 2 the Gaussian diagonal ``g``, 3 signs, 4 the Gaussian
``g'`` of the v2 projections, 5 the dense map ``normal``, 10 the permutation of a gather, 11 its signs, 16 and
above the random initialization of factors, 2**16 and above frozen arrays. Maps before the network use the groups from
2**31 up.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.argument_checks import integer
from tnadapt.backends import kernels
from tnadapt.errors import ConfigError, ShapeError

__all__ = [
    "PURPOSE",
    "chunks",
    "digest",
    "normals",
    "normals_at",
    "normals_of_seeds",
    "permutation",
    "signs",
    "words",
    "words_at",
]

PURPOSE = {
    "permutation": 1,
    "gaussian": 2,
    "signs": 3,
    "gaussian_v2": 4,
    "normal_map": 5,
    "gather": 10,
    "gather_signs": 11,
    "start": 16,
    "source": 1 << 16,
}

# Shorter draws gain nothing from compiled kernels; and where these would have to be imported first, nor do longer ones.
WORTH, WORTH_IMPORT = 1 << 14, 1 << 17


def _way(size: int) -> Any:
    """Return the implementation for that many elements: compiled kernels or NumPy, which give the same bits."""
    least = WORTH if "numba" in sys.modules else WORTH_IMPORT
    return (kernels("philox") if size >= least else None) or NumpyStreams


def _check_stream(seed: int, group: int, start: int, stop: int) -> None:
    integer("seed", seed, 0, (1 << 64) - 1, ConfigError)
    integer("group", group, 0, (1 << 32) - 1, ConfigError)
    for name, value in (("start", start), ("stop", stop)):
        integer(name, value, 0, 1 << 63, ShapeError)
    if not 0 <= start <= stop:
        raise ShapeError(f"a draw needs 0 <= start <= stop; got start={start}, stop={stop}")


def words(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.uint32]:
    """Draw words ``start`` to ``stop - 1`` of one stream.

    Parameters
    ----------
    seed : int
        0 to 2**64 - 1; the Philox key.
    group, purpose : int
        The stream: the last two words of the counter.
    start, stop : int
        Range of words in the stream.

    Returns
    -------
    ndarray of uint32, shape (stop - start,)

    Raises
    ------
    ConfigError
        If seed or group is out of range.
    ShapeError
        Unless ``0 <= start <= stop``.

    Examples
    --------
    >>> [hex(word) for word in words(seed=0, group=0, purpose=1, start=0, stop=2)]
    ['0x844515e1', '0xf08d6eaa']
    """
    _check_stream(seed, group, start, stop)
    return _way(stop - start).words(seed, group, purpose, start, stop)  # type: ignore[no-any-return]


def words_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
    """Draw words of one stream at any positions; each costs four times as much as in :func:`words`.

    Examples
    --------
    >>> [hex(word) for word in words_at(0, 0, 1, np.array([4, 1]))]
    ['0xca7cf69e', '0xf08d6eaa']
    """
    return _way(index.size).words_at(seed, group, purpose, index)  # type: ignore[no-any-return]


def signs(seed: int, group: int, start: int, stop: int, purpose: int = PURPOSE["signs"]) -> NDArray[np.int8]:
    """Draw elements of the Rademacher vector: bit ``i % 32`` of word ``i // 32``; a set bit is -1.

    Parameters
    ----------
    seed, group : int
        The vector.
    start, stop : int
        Range of elements.
    purpose : int
        Stream of the words; by default that of the signs of fastfood.

    Returns
    -------
    ndarray of int8, shape (stop - start,)
        1 and -1.

    Examples
    --------
    >>> signs(0, 0, 0, 8).tolist()
    [1, 1, -1, -1, -1, -1, 1, -1]
    """
    _check_stream(seed, group, start, stop)
    first = start // 32
    word = _way(stop - start).words(seed, group, purpose, first, (stop + 31) // 32)
    # The byte order is explicit, so that the bits do not depend on the machine's.
    bits = np.unpackbits(word.astype("<u4").view(np.uint8), bitorder="little").view(np.int8)
    elements = bits[start - 32 * first : stop - 32 * first]
    np.multiply(elements, -2, out=elements)
    return np.add(elements, 1, out=elements)


def normals(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.float32]:
    """Draw standard normal numbers, each from one word by the inverse normal distribution function.

    Parameters
    ----------
    seed, group, purpose : int
        The stream.
    start, stop : int
        Range of elements.

    Returns
    -------
    ndarray of float32, shape (stop - start,)
        ``Phi^-1((word + 1/2) / 2**32)``, computed in float64 and rounded once.

    Examples
    --------
    >>> normals(0, 0, PURPOSE["gaussian"], 0, 3).tolist()
    [-1.9611564874649048, 0.5619568824768066, -1.0409672260284424]
    """
    _check_stream(seed, group, start, stop)
    return _way(stop - start).normals(seed, group, purpose, start, stop)  # type: ignore[no-any-return]


def normals_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Draw elements of :func:`normals` at any positions.

    Examples
    --------
    >>> normals_at(0, 0, PURPOSE["gaussian"], np.array([2])).tolist()
    [-1.0409672260284424]
    """
    return _way(index.size).normals_at(seed, group, purpose, index)  # type: ignore[no-any-return]


def normals_of_seeds(seeds: NDArray[np.uint64], group: int, purpose: int, stop: int) -> NDArray[np.float32]:
    """Draw the first elements of :func:`normals` for each of several seeds.

    Parameters
    ----------
    seeds : ndarray of uint64, shape (K,)
        The Philox keys.
    group, purpose : int
        The stream of each seed.
    stop : int
        The number of elements.

    Returns
    -------
    ndarray of float32, shape (K, stop)
        Row k is ``normals(seeds[k], group, purpose, 0, stop)``, bit for bit.

    Raises
    ------
    ConfigError
        If the group is out of range.
    ShapeError
        If ``stop`` is negative.

    Notes
    -----
    One call for many seeds is fast where each has few elements. NumPy needs several times the memory of the result, so
    pass only as many seeds as fit in the processor's cache.

    Examples
    --------
    >>> normals_of_seeds(np.array([0, 1], np.uint64), 0, PURPOSE["gaussian"], 2).tolist()
    [[-1.9611564874649048, 0.5619568824768066], [1.2996381521224976, 0.12693259119987488]]
    """
    _check_stream(0, group, 0, stop)
    return _way(seeds.size * stop).normals_of_seeds(seeds, group, purpose, stop)  # type: ignore[no-any-return]


def permutation(
    size: int,
    seed: int,
    group: int,
    start: int = 0,
    stop: int | None = None,
    inverse: bool = False,
    purpose: int = PURPOSE["permutation"],
) -> NDArray[np.int64]:
    """Draw part of a fixed random permutation of the integers below ``size``.

    Parameters
    ----------
    size : int
        Length of the whole permutation, 1 to 2**63 - 1.
    seed, group : int
        The permutation.
    start, stop : int
        Range of elements; all by default.
    inverse : bool
        Whether to draw elements of the inverse permutation.
    purpose : int
        Stream of the keys; by default that of fastfood, the shuffle and scatter.

    Returns
    -------
    ndarray of int64, shape (stop - start,)

    Raises
    ------
    ConfigError
        If seed or group is out of range.
    ShapeError
        Unless ``0 <= start <= stop <= size``.

    Notes
    -----
    An 8-round Feistel network on ``ceil(log2(size))`` bits; images of ``size`` or more are permuted again
    until they are below it (cycle walking; fewer than two passes on average). The inverse runs the rounds
    backwards, so that its slices can be drawn on their own, too.

    Examples
    --------
    >>> permutation(16, seed=0, group=0).tolist()
    [14, 13, 7, 10, 6, 8, 3, 15, 1, 2, 9, 4, 0, 11, 12, 5]
    >>> permutation(16, seed=0, group=0, start=14, stop=16, inverse=True).tolist()
    [0, 7]
    """
    size = integer("size", size, 1, (1 << 63) - 1, ShapeError)
    stop = size if stop is None else stop
    _check_stream(seed, group, start, stop)
    if stop > size:
        raise ShapeError(f"a permutation of {size} has no element {stop - 1}; got stop={stop}")
    keys = words(seed, group, purpose, 0, 8)
    return _way(stop - start).permutation(size, keys, start, stop, inverse)  # type: ignore[no-any-return]


def digest(*streams: Iterator[bytes]) -> str:
    """Return the hex SHA-256 of the concatenation of byte strings.

    Examples
    --------
    >>> digest(iter([signs(0, 0, 0, 1000).astype("<f4").tobytes()]))[:16]
    '3557a0b7985e0a08'
    """
    total = hashlib.sha256()
    for stream in streams:
        for piece in stream:
            total.update(piece)
    return total.hexdigest()


# -- The streams in NumPy: the reference implementation ----------------------------------------------------------------


# Draws are computed in chunks that stay in cache; chunking does not change the result.
CHUNK = 1 << 16

_U32 = np.uint32
_U64 = np.uint64
_LOW = _U64(0xFFFFFFFF)


def chunks(start: int, stop: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield consecutive ``(start, stop)`` pairs that cover a range in chunks of at most ``size``."""
    for lo in range(start, stop, size):
        yield lo, min(lo + size, stop)


class NumpyStreams:
    """The streams in NumPy, on whole arrays of words: the reference that the compiled kernels match bit for bit.

    The functions above have checked the arguments.
    """

    @staticmethod
    def words(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.uint32]:
        """:func:`words`."""
        out = np.empty(stop - start, _U32)
        for lo, hi in chunks(start, stop):
            first = lo // 4
            block = np.arange(first, (hi + 3) // 4, dtype=_U64)
            out[lo - start : hi - start] = _philox(block, purpose, group, seed).reshape(-1)[
                lo - 4 * first : hi - 4 * first
            ]
        return out

    @staticmethod
    def words_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
        """:func:`words_at`."""
        block = _philox((index >> 2).astype(_U64), purpose, group, seed)
        return np.take_along_axis(block, (index & 3)[:, None], axis=1)[:, 0]

    @staticmethod
    def normals(seed: int, group: int, purpose: int, start: int, stop: int) -> NDArray[np.float32]:
        """:func:`normals`."""
        out = np.empty(stop - start, np.float32)
        for lo, hi in chunks(start, stop):
            out[lo - start : hi - start] = _normal_of(NumpyStreams.words(seed, group, purpose, lo, hi))
        return out

    @staticmethod
    def normals_at(seed: int, group: int, purpose: int, index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """:func:`normals_at`."""
        out = np.empty(index.shape, np.float32)
        for lo, hi in chunks(0, index.size):
            out[lo:hi] = _normal_of(NumpyStreams.words_at(seed, group, purpose, index[lo:hi]))
        return out

    @staticmethod
    def normals_of_seeds(seeds: NDArray[np.uint64], group: int, purpose: int, stop: int) -> NDArray[np.float32]:
        """:func:`normals_of_seeds`."""
        blocks = np.arange((stop + 3) // 4, dtype=_U64)
        word = _philox(blocks, purpose, group, seeds[:, None]).reshape(seeds.size, 4 * blocks.size)
        return _normal_of(word[:, :stop].ravel()).reshape(seeds.size, stop)

    @staticmethod
    def permutation(size: int, keys: NDArray[np.uint32], start: int, stop: int, inverse: bool) -> NDArray[np.int64]:
        """:func:`permutation`, given the round keys."""
        bits = (size - 1).bit_length()
        step = _feistel(bits, keys, inverse)
        out = np.empty(stop - start, np.int64)
        for lo, hi in chunks(start, stop):
            image = step(np.arange(lo, hi, dtype=_U64))
            # Cycle walking: images outside of the range are permuted again until they fall inside.
            outside = np.flatnonzero(image >= size)
            while outside.size:
                image[outside] = step(image[outside])
                outside = outside[image[outside] >= size]
            out[lo - start : hi - start] = image
        return out


def _philox(blocks: NDArray[np.uint64], purpose: int, group: int, seed: int | NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Compute Philox4x32-10 of counters ``(lo32(block), hi32(block), purpose, group)``: shape ([seeds,] blocks, 4)."""
    c0, c1 = blocks & _LOW, blocks >> _U64(32)
    c2, c3 = np.full_like(blocks, purpose), np.full_like(blocks, group)
    k0, k1 = np.asarray(seed, _U64) & _LOW, np.asarray(seed, _U64) >> _U64(32)
    for _ in range(10):
        p0, p1 = c0 * _U64(0xD2511F53), c2 * _U64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _U64(32)) ^ c1 ^ k0, p1 & _LOW, (p0 >> _U64(32)) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _U64(0x9E3779B9)) & _LOW, (k1 + _U64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1, dtype=_U32, casting="unsafe")


def _normal_of(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    u = word.astype(np.float64)
    u += 0.5
    u *= 2.0**-32
    return _inverse_normal(u).astype(np.float32)


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
    total = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        total += coefficient
        total *= x
    total += coefficients[-1]
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the natural logarithm without ``libm``, whose last bits differ between machines."""
    # frexp reduces x to a mantissa m in [sqrt(1/2), sqrt(2)); log(m) is the series of 2 artanh((m-1)/(m+1)) up to the
    # 25th power.
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    power = exponent.astype(np.float64) - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(tuple(1.0 / k for k in range(25, 0, -2)), s * s)
    return power * math.log(2.0) + 2.0 * s * series


def _inverse_normal(u: NDArray[np.float64]) -> NDArray[np.float64]:
    q = u - 0.5
    r = q * q
    np.subtract(0.180625, r, out=r)
    out = _horner(_CENTRE[0], r)
    out *= q
    out /= _horner(_CENTRE[1], r)
    tail = np.flatnonzero(np.abs(q) > 0.425)  # faster than a mask that is used twice
    u = u[tail]
    r = np.sqrt(-_log(np.minimum(u, 1.0 - u))) - 1.6
    out[tail] = np.where(u < 0.5, -1.0, 1.0) * (_horner(_TAIL[0], r) / _horner(_TAIL[1], r))
    return out


def _mix(x: NDArray[np.uint32], key: np.uint32) -> NDArray[np.uint32]:
    x = (x ^ key) * _U32(0x85EBCA6B)
    x = (x ^ (x >> _U32(13))) * _U32(0xC2B2AE35)
    return x ^ (x >> _U32(16))


def _feistel(bits: int, keys: NDArray[np.uint32], inverse: bool) -> Callable[[NDArray[np.uint64]], NDArray[np.uint64]]:
    low = bits // 2
    low_mask, high_mask = _U32((1 << low) - 1), _U32((1 << (bits - low)) - 1)
    order = range(7, -1, -1) if inverse else range(8)

    def step(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        lo, hi = x.astype(_U32) & low_mask, (x >> _U64(low)).astype(_U32)
        # A round XORs one half with a function of the other, so it is its own inverse.
        for round_ in order:
            if round_ % 2 == 0:
                hi = hi ^ (_mix(lo, keys[round_]) & high_mask)
            else:
                lo = lo ^ (_mix(hi, keys[round_]) & low_mask)
        return (hi.astype(_U64) << _U64(low)) | lo.astype(_U64)

    return step
