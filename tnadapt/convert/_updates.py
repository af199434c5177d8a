"""One module's update in the forms of other libraries: low rank, Kronecker, Hadamard, dense.

Also the dtypes in which it is stored, and the error of one update relative to another. Each form is a small adapter of
this library for one weight, and its plan computes ΔW. All computations are in float64, and results are stored in the
source's dtype or in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.norms import exponent_of, norm, norm_of_difference, relative, scaled_by, together
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, FileError, safe_repr

__all__ = [
    "Float", "ModuleUpdate", "Pair", "alpha_of", "as_matrix", "check_range", "common_dtype", "errors_of", "is_rounding",
    "low_rank_norms", "narrow", "norms_of", "round_to", "widen",
]  # fmt: skip

Float = NDArray[np.float64]


class Pair(NamedTuple):
    """A low-rank matrix, ``b @ a.T``.

    Attributes
    ----------
    b : ndarray, shape (rows, rank)
    a : ndarray, shape (cols, rank)
    """

    b: Float
    a: Float

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return int(self.b.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product."""
        return self.b.shape[0], self.a.shape[0]

    def padded(self, rank: int) -> Pair:
        """Return the same matrix, with factors padded with zero columns to the rank."""
        wide = ((0, 0), (0, rank - self.rank))
        return self if self.rank == rank else Pair(np.pad(self.b, wide), np.pad(self.a, wide))


def as_matrix(part: Pair | Float) -> Float:
    """Return a part as a matrix."""
    if not isinstance(part, Pair):
        return part
    found: Float = part.b @ part.a.T
    return found


class ModuleUpdate(NamedTuple):
    """ΔW of one module, as factors.

    Attributes
    ----------
    kind : {"lora", "lokr", "loha", "dense"}
    shape : tuple of int
        ``(rows, cols)`` of the update.
    parts : tuple of Pair or ndarray
        LoRA: one Pair. LoKr: the factors W1 and W2 of a Kronecker product, each a Pair or a matrix. LoHa: the two Pairs
        of a Hadamard product. Dense: the matrix itself. All in float64.
    scale : float
        Scale of the whole update.

    Examples
    --------
    >>> b, a = np.array([[1.0], [2.0]]), np.array([[1.0], [10.0], [100.0]])
    >>> ModuleUpdate("lora", (2, 3), (Pair(b, a),), 0.5).delta()
    array([[  0.5,   5. ,  50. ],
           [  1. ,  10. , 100. ]])
    """

    kind: str
    shape: tuple[int, int]
    parts: tuple[Pair | Float, ...]
    scale: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parts."""
        return sum(sum(half.size for half in part) if isinstance(part, Pair) else part.size for part in self.parts)

    @property
    def rank(self) -> int:
        """The largest rank of a Pair among the parts; 1 if there is none."""
        return max((part.rank for part in self.parts if isinstance(part, Pair)), default=1)

    @property
    def pair(self) -> Pair:
        """The two factors of an update of kind "lora"."""
        (pair,) = self.parts
        assert isinstance(pair, Pair)
        return pair

    def config(self) -> Config:
        """Return the settings of a weight in this form, without the scale."""
        if self.kind == "dense":
            return Config(order=1, format="dense", rank=1)
        if self.kind == "lora":
            return Config(rank=self.rank)
        if self.kind == "loha":
            return Config(rank=self.rank, splits=2, combine="hadamard", leading="same")
        if self.kind != "lokr":
            raise ConfigError(f"the kind of an update is lora, lokr, loha or dense; got {safe_repr(self.kind)}")
        first, last = self.parts
        same = isinstance(first, Pair) and isinstance(last, Pair)
        return Config(
            rank=self.rank,
            splits=2,
            split_size=first.shape,
            leading="same" if same else "dense",
            format="cp" if isinstance(last, Pair) else "dense",
        )

    def arrays(self) -> dict[str, Float]:
        """Return the arrays of :meth:`config`, without the group's prefix, and with all Pairs padded to one rank."""
        config, found = self.config(), dict[str, Float]()
        for number, part in enumerate(self.parts):
            leading = self.kind == "lokr" and number == 0 and config.leading == "dense"
            if isinstance(part, Pair) and not leading:
                part = part.padded(self.rank)
                found |= {f"split{number}.factor0": part.b, f"split{number}.factor1": part.a}
            elif self.kind == "dense":
                found[f"split{number}.dense"] = as_matrix(part).reshape(-1)
            else:
                found[f"split{number}.dense"] = as_matrix(part)
        return found

    def delta(self) -> Float:
        """Compute ΔW, shape (rows, cols)."""
        arrays = {f"group0.{name}": array for name, array in self.absorb_scale().arrays().items()}
        found: Float = SuperLoRA(self.config(), [self.shape]).deltas(arrays)[0]
        return found

    def absorb_scale(self) -> ModuleUpdate:
        """Return the same update with its scale multiplied into the first part, and a scale of 1."""
        if self.scale == 1.0:
            return self
        first, *rest = self.parts
        moved = first._replace(b=first.b * self.scale) if isinstance(first, Pair) else first * self.scale
        return self._replace(parts=(moved, *rest), scale=1.0)


def alpha_of(scales: Sequence[float], rank: int) -> float | None:
    """Return the alpha for which ``alpha / rank`` equals all of the scales exactly; None if there is none.

    Examples
    --------
    >>> alpha_of([16 / 3] * 2, 3), alpha_of([1.0, 2.0], 3)
    (16.0, None)
    """
    first = scales[0]
    if len(set(scales)) > 1 or not math.isfinite(first):
        return None
    exact = first * rank
    for alpha in (float(round(exact)), round(exact, 6), exact):
        if MIN_ALPHA <= alpha <= MAX_ALPHA and alpha / rank == first:
            return alpha
    return None


# -- Dtypes --------------------------------------------------------------------------------------


def widen(name: str, tag: str, array: np.ndarray) -> Float:
    """Return a stored tensor as float64; raise FileError unless it consists of finite floating-point numbers."""
    if tag == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name.endswith(".alpha") and array.dtype.kind in "iu":
        return array.astype(np.float64)  # some scripts store alpha as an integer
    if array.dtype.kind != "f":
        raise FileError(f"{safe_repr(name)} is {tag}; the tensors of an adapter are floating-point numbers")
    if not np.isfinite(array).all():
        raise FileError(f"{safe_repr(name)} holds NaN or infinity")
    return array.astype(np.float64)


def common_dtype(dtypes: set[str]) -> str:
    """Return a dtype that represents the values of all given dtypes."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "float64" if "float64" in dtypes else "float32"


def narrow(arrays: Mapping[str, Float], dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Cast arrays to a dtype if it represents each of their values exactly, as float64 always does; else to float32.

    Returns
    -------
    dict, dict
        The arrays, and "bfloat16" for those that are float32 arrays of bfloat16 values, as NumPy lacks bfloat16.
    """
    cast, says = round_to(arrays, dtype)
    if all(np.array_equal(cast[name], arrays[name]) for name in arrays):
        return cast, says
    return round_to(arrays, "float32")


def round_to(arrays: Mapping[str, Any], dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Round arrays to the nearest values of a dtype; the result is like that of :func:`narrow`."""
    if dtype == "bfloat16":
        return {name: _round_to_bfloat16(array) for name, array in arrays.items()}, dict.fromkeys(arrays, "bfloat16")
    with np.errstate(over="ignore"):  # check_range reports infinite results
        return {name: np.asarray(array).astype(dtype, order="C") for name, array in arrays.items()}, {}


def _round_to_bfloat16(array: Any) -> np.ndarray:
    """Round to the nearest bfloat16 values, ties to even, as float32."""
    with np.errstate(over="ignore"):
        bits = np.array(array, dtype=np.float32, order="C").view(np.uint32)
    finite = np.isfinite(array)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(finite, nearest, bits).astype(np.uint32).view(np.float32)


def check_range(arrays: Mapping[str, np.ndarray], dtype: str) -> None:
    """Raise ConfigError if rounding to the dtype produced an infinite value."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ConfigError(f"{safe_repr(name)} has numbers that are too large for {dtype}; use float32")


# -- Errors --------------------------------------------------------------------------------------

# Largest errors attributed to rounding: for arrays known to be exact before rounding, and for all others.
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
_SAME = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}


def is_rounding(error: float, dtype: str, algebra: bool) -> bool:
    """Return whether a measured error can be explained by rounding to a dtype.

    ``algebra`` says whether the unrounded arrays are known to give the same update. Rounding factors that nearly cancel
    may cost far more than their last digit.
    """
    return error <= (_ROUNDING if algebra else _SAME)[dtype]


def norms_of(old: Float, new: Float) -> tuple[float, float]:
    """Return the Frobenius norms of the difference and of the old update."""
    return norm_of_difference(old, new), norm(old)


def low_rank_norms(old: ModuleUpdate | None, new: ModuleUpdate | None) -> tuple[float, float] | None:
    """Compute :func:`norms_of` from the factors of two updates; return None if the ranks are too large to save work.

    Notes
    -----
    ``|b a^T - b' a'^T|`` is the norm of ``[b, -b'] [a, a']^T``, and so that of the product of the triangular QR factors
    of these two matrices, whose size is the sum of the ranks. This is as accurate as the dense computation: no squares
    are subtracted.
    """
    if old is None or new is None or {old.kind, new.kind} != {"lora"} or 2 * (old.rank + new.rank) > min(old.shape):
        return None
    one, two = old.absorb_scale().pair, new.absorb_scale().pair
    if np.array_equal(one.b, two.b) and np.array_equal(one.a, two.a):
        return 0.0, _norm_of(one)
    both = Pair(np.concatenate([one.b, -two.b], axis=1), np.concatenate([one.a, two.a], axis=1))
    return _norm_of(both), _norm_of(one)


def _norm_of(pair: Pair) -> float:
    # Scale each factor to about 1: their product may be in range even if neither factor's norm is.
    exponents = [exponent_of(half) for half in pair]
    upper, lower = (
        np.asarray(np.linalg.qr(scaled_by(half, -exponent), mode="r"))
        for half, exponent in zip(pair, exponents, strict=True)
    )
    return norm(scaled_by(upper @ lower.T, sum(exponents)))


def errors_of(norms: Mapping[str, tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """Return the overall relative error and that of each weight; infinite if only the new update is nonzero.

    Examples
    --------
    >>> errors_of({"q": (0.0, 4.0), "v": (1.0, 3.0)})
    (0.2, {'q': 0.0, 'v': 0.3333333333333333})
    """
    errors = {name: relative(*pair) for name, pair in norms.items()}
    off, whole = (together(pair[place] for pair in norms.values()) for place in (0, 1))
    return relative(off, whole), errors
