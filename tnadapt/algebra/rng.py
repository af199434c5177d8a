"""Seeded random streams (Philox): words, signs, normals and permutations, the same bits on every machine.

Each element is a pure function of ``(seed, group, purpose, index)``, so any slice can be drawn without
the rest, and in any order. Words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011); normals from the words by AS 241 (Wichura, Applied Statistics 37, 1988); the
permutation is a Feistel network with cycle walking. Only integer and IEEE-exact operations are used:
no ``libm``, whose last bits differ between machines, and no library's generator, whose streams change
between releases.

The streams differ by ``purpose``: 1 permutation, 2 the Gaussian diagonal ``g``, 3 signs, 4 the Gaussian
``g'`` of the v2 projections, 5 the dense map ``normal``, 10 the permutation of a gather, 11 its signs, 16 and
above the random initialization of factors, 2**16 and above frozen arrays. Maps before the network use the groups from
2**31 up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.backends import kernels
from tnadapt.errors import ConfigError, ShapeError, integer

from . import _rng_numpy as rng_numpy
from ._rng_numpy import chunks

__all__ = [
    "PURPOSE",
    "chunks",
    "digest",
    "normals",
    "normals_at",
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

# Shorter draws take less time than importing the compiler.
WORTH = 1 << 14


def _way(size: int) -> Any:
    """Return the implementation for that many elements: compiled kernels if available, else NumPy; the same bits."""
    return (kernels("philox") if size >= WORTH else None) or rng_numpy


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
    return _way(stop - start).signs(seed, group, purpose, start, stop)  # type: ignore[no-any-return]


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
