"""Fingerprints of the weights that an adapter updates, which identify its base model.

The weights, each of shape ``(rows, cols)`` and as it was before any update, form one long vector w. Its fingerprint has
two parts.

**SHA-256**, for a base of the same dtype: of each weight's shape as the ASCII text ``rows,cols;`` followed by its
elements, little-endian, in C order (bfloat16: its 16 bits).

**A sketch**, for the same base in another dtype (trained in float32, used in bfloat16): eight numbers ::

    sketch[j] = sum of signs[i] * w[i] over i = j mod 8   /   sqrt(sum of all w[i]**2 / 8)

with ``signs`` the Rademacher stream of :func:`tnadapt.algebra.rng.signs` for seed 0 and group 2**32 - 1 (which no
adapter uses), rounded to four decimals; all zero if every weight is zero. Sketches of unrelated models are standard
normal numbers. Sketches match if the root mean square of their eight differences is at most
``TOLERANCE``.

*Effect of rounding.* Rounding to p significant bits changes an element by a relative error of at most ``2**-p``, evenly
distributed. For the 8 bits of bfloat16, the root mean square is 0.0015 for the usual distribution of mantissas, and
0.0023 at worst. The signs are independent of the errors, so each sketch changes by a normal number of that standard
deviation, and the sum of the eight squares follows a chi-square distribution with 8 degrees of freedom. Their root mean
square exceeds 0.005 with probability 4e-15, at worst 5e-6. float16 changes the sketches an eighth as much.

*Effect of a change of the weights.* A change of relative norm ε changes each sketch by a normal number of standard
deviation ε. In another dtype it goes undetected with probability 0.50 for ε = 0.5 %, 0.018 for 1 %, 1.3e-4 for 2 % and
1e-7 for 5 %; in the same dtype, never. A common factor of all weights changes no sketch, and goes undetected in another
dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra import rng
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import FLOAT_DTYPES
from tnadapt.backends.stored_floats import widened
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

TOLERANCE = 0.005

_SKETCHES = 8
_SEED, _GROUP = 0, (1 << 32) - 1
_DECIMALS = 4
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A fingerprint of a base model's weights.

    Parameters
    ----------
    sha256 : str
        64 lower-case hexadecimal digits.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        The dtype of the weights.
    sketch : tuple of float
        The eight numbers of the sketch.

    Raises
    ------
    ConfigError
        If a field is invalid.

    Examples
    --------
    >>> weights = [np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(3, 4)]
    >>> trained_on, used_on = fingerprint(weights, "float32"), fingerprint([w.astype("f2") for w in weights], "float16")
    >>> trained_on.matches(used_on), trained_on.matches(fingerprint([w * w for w in weights], "float32"))
    (True, False)
    """

    sha256: str
    dtype: str
    sketch: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"a fingerprint's sha256 must be 64 lower-case hex digits; got {safe_repr(self.sha256)}")
        if not isinstance(self.dtype, str) or self.dtype not in FLOAT_DTYPES:
            known = ", ".join(FLOAT_DTYPES)
            raise ConfigError(f"a fingerprint's dtype must be one of {known}; got {safe_repr(self.dtype)}")
        sketch = self.sketch
        if not isinstance(sketch, (tuple, list)) or len(sketch) != _SKETCHES or not all(map(_finite, sketch)):
            raise ConfigError(f"a fingerprint's sketch must be {_SKETCHES} finite numbers; got {safe_repr(sketch)}")
        object.__setattr__(self, "sketch", tuple(float(number) for number in sketch))

    @checks_arguments
    def matches(self, other: Fingerprint) -> bool:
        """Return whether both can belong to one model: the same bits, or equal up to rounding between two dtypes."""
        return self.difference(other) is None

    @checks_arguments
    def difference(self, other: Fingerprint) -> str | None:
        """Describe the difference between two fingerprints; return None if they match.

        Examples
        --------
        >>> ones, twos = (fingerprint([np.full((1, 8), x)], "float64") for x in (1.0, 2.0))
        >>> ones.difference(twos)
        'both are float64, and their SHA-256 differ: 986923ae7d90… and d7d078610d18…'
        """
        if self.dtype == other.dtype:
            if self.sha256 == other.sha256:
                return None
            return f"both are {self.dtype}, and their SHA-256 differ: {self.sha256[:12]}… and {other.sha256[:12]}…"
        apart = self.apart(other)
        if apart <= TOLERANCE:
            return None
        return (
            f"their sketches differ by {apart:.4f} in root mean square, and rounding between {self.dtype} and "
            f"{other.dtype} explains no more than {TOLERANCE}"
        )

    @checks_arguments
    def apart(self, other: Fingerprint) -> float:
        """Estimate the distance of two bases' weights, relative to their norm; it is 1.4 for unrelated ones.

        A common factor of all weights does not count: sketches are relative to the norm of their own weights.

        Examples
        --------
        >>> weights = np.random.default_rng(0).normal(size=(64, 64))
        >>> exact, rounded = (fingerprint([w], "float64") for w in (weights, weights.round()))
        >>> 0.1 < exact.apart(rounded) < 0.6
        True
        """
        return math.dist(self.sketch, other.sketch) / math.sqrt(_SKETCHES)


def _finite(number: Any) -> bool:
    # The bound also excludes integers that are too large for a float.
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e9


def fingerprint(weights: Iterable[np.ndarray], dtype: str) -> Fingerprint:
    """Compute the fingerprint of a base model's weights.

    Parameters
    ----------
    weights : iterable of ndarray, shape (rows, cols)
        The weights that an adapter updates, in its order, as they are before the update; views with any strides.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        The dtype of the weights. NumPy lacks bfloat16: give its bit patterns as uint16 (or arrays of ml_dtypes'
        bfloat16).

    Returns
    -------
    Fingerprint

    Raises
    ------
    BackendError
        If an array is not of that dtype.
    ShapeError
        If an array is not a matrix or contains NaN or infinity, or there are no weights.

    Notes
    -----
    Weights are processed one at a time, in pieces of 2**20 elements (or one row, if that is longer and not contiguous).

    Examples
    --------
    >>> fingerprint([np.zeros((2, 3), np.float32)], "float32").sketch
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    """
    if dtype not in FLOAT_DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {safe_repr(dtype)}")
    digest, sums, squares, position = hashlib.sha256(), np.zeros(_SKETCHES), np.zeros(_SKETCHES), 0
    for number, piece in _hashed_pieces(digest, weights, dtype):
        piece_sums, piece_squares = _sums(widened(piece, dtype).astype(np.float64), position)
        sums, squares, position = sums + piece_sums, squares + piece_squares, position + piece.size
        if not np.isfinite(squares).all():
            raise ShapeError(f"weight {number} holds NaN, infinity, or numbers whose squares are infinite")
    if not position:
        raise ShapeError("there is no weight to take a fingerprint of")
    norm = math.sqrt(float(squares.sum()) / _SKETCHES)
    # Adding 0.0 turns -0.0 into 0.0, so that equal numbers have the same text.
    sketch = tuple(round(float(total) / norm, _DECIMALS) + 0.0 if norm else 0.0 for total in sums)
    return Fingerprint(digest.hexdigest(), dtype, sketch)


def compare(known: Fingerprint, weights: Iterable[np.ndarray], dtype: str) -> str | None:
    """Describe the difference between a base model's weights and a fingerprint; return None if they match.

    Same as ``known.difference(fingerprint(weights, dtype))``, but without the sketch where it is not needed, which
    takes a tenth of the time.

    Parameters
    ----------
    known : Fingerprint
    weights, dtype
        As for :func:`fingerprint`.

    Returns
    -------
    str or None

    Raises
    ------
    BackendError, ShapeError
        As :func:`fingerprint`.

    Examples
    --------
    >>> weights = [np.full((1, 8), 0.5)]
    >>> compare(fingerprint(weights, "float64"), weights, "float64") is None
    True
    """
    if known.dtype != dtype:
        return known.difference(fingerprint(weights, dtype))
    digest = hashlib.sha256()
    for _ in _hashed_pieces(digest, weights, dtype):
        pass
    return known.difference(dataclasses.replace(known, sha256=digest.hexdigest()))


def _hashed_pieces(digest: Any, weights: Iterable[np.ndarray], dtype: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the weights piece by piece, each with the number of its weight, and add them to the digest."""
    for number, weight in enumerate(weights):
        raw = _raw(weight, dtype, f"weight {number}")
        digest.update(f"{raw.shape[0]},{raw.shape[1]};".encode())
        for piece in _pieces(raw):
            digest.update(piece.view(np.uint8).data)
            yield number, piece
        del raw, weight  # before the next one is read


def _raw(weight: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Return the matrix in a little-endian NumPy dtype: bfloat16 as its bit patterns."""
    if not isinstance(weight, np.ndarray) or weight.ndim != 2:
        got = f"shape {weight.shape}" if isinstance(weight, np.ndarray) else f"a {type(weight).__name__}"
        raise ShapeError(f"{what} must be a NumPy array of shape (rows, cols); got {got}")
    accepted = ("uint16", "bfloat16") if dtype == "bfloat16" else (dtype,)
    if weight.dtype.name not in accepted:
        raise BackendError(f"{what} has dtype {weight.dtype.name}; expected {' or '.join(accepted)}")
    bits = weight.view(np.uint16) if weight.dtype.name == "bfloat16" else weight
    return bits.astype(bits.dtype.newbyteorder("<"), copy=False)


def _pieces(raw: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the elements of a matrix, in order, as contiguous vectors of at most one piece each."""
    rows = max(1, _PIECE // max(1, raw.shape[1]))
    for row in range(0, raw.shape[0], rows):
        block = np.ascontiguousarray(raw[row : row + rows]).reshape(-1)
        for lo, hi in rng.chunks(0, block.size, _PIECE):
            yield block[lo:hi]


def _sums(values: NDArray[np.float64], position: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the signed sum and the sum of squares of each of the eight index classes, for values at a position."""
    # The values are laid out in a table of eight columns, one per class.
    skipped = position % _SKETCHES
    table = np.zeros((-(-(skipped + values.size) // _SKETCHES), _SKETCHES))
    table.reshape(-1)[skipped : skipped + values.size] = values
    with np.errstate(over="ignore", invalid="ignore"):  # the caller names the weight in its error
        squares = (table * table).sum(axis=0)
        table.reshape(-1)[skipped : skipped + values.size] *= rng.signs(_SEED, _GROUP, position, position + values.size)
        return table.sum(axis=0), squares
