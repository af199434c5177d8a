"""One module's update in the forms of other libraries: low rank, Kronecker, Hadamard, dense.

Also the dtypes in which it is stored, and the error of one update relative to another. Each form is a small adapter of
this library for one weight, and its plan computes ΔW. All computations are in float64, and results are stored in the
source's dtype or in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.factoring import Matrix, factoring
from tnadapt.algebra.norms import exponent_of, norm, norm_of_difference, relative, scaled_by, together
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend
from tnadapt.errors import ConfigError, FileError, safe_repr

__all__ = [
    "Float",
    "ModuleUpdate",
    "Pair",
    "alpha_of",
    "as_matrix",
    "check_range",
    "check_size",
    "common_dtype",
    "errors_of",
    "is_rounding",
    "low_rank_slice",
    "narrow",
    "norms_of",
    "round_to",
    "uniform",
    "widen",
]


# -- One module's update in the forms of other libraries: low rank, Kronecker, Hadamard, dense -------------------------


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


def _rows_of(part: Pair | Float, at: slice | NDArray[np.int64]) -> Float:
    found: Float = part.b[at] @ part.a.T if isinstance(part, Pair) else part[at]
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

    def rows(self, start: int, stop: int) -> Float:
        """Compute rows ``start`` to ``stop - 1`` of ΔW."""
        at = np.arange(start, stop)
        if self.kind == "lokr":
            first, last = self.parts
            outer, inner = np.divmod(at, last.shape[0])
            left, right = _rows_of(first, outer), _rows_of(last, inner)
            found = (left[:, :, None] * right[:, None, :]).reshape(len(at), -1)
        else:
            found = functools.reduce(np.multiply, (_rows_of(part, slice(start, stop)) for part in self.parts))
        return found if self.scale == 1.0 else found * self.scale

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
            wider = "float64" if dtype == "float32" else "float32"
            raise ConfigError(f"{safe_repr(name)} has numbers that are too large for {dtype}; use {wider}")


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


# Elements of an update that are computed at a time, and that are computed at all: in float64 they are 32 GiB.
_BLOCK, _MOST = 1 << 20, 1 << 32


def norms_of(old: ModuleUpdate, new: ModuleUpdate) -> tuple[float, float]:
    """Return the Frobenius norms of the difference of two updates and of the old one, without forming large updates.

    Notes
    -----
    ``|b a^T - b' a'^T|`` is the norm of ``[b, -b'] [a, a']^T``, and so that of the product of the triangular QR factors
    of these two matrices, whose size is the sum of the ranks. A Kronecker product ``A ⊗ B`` has the elements of
    ``vec(A) vec(B)^T``, a matrix of rank 1, in another order. This is as accurate as the dense computation: no squares
    are subtracted. Updates without small factors of the same shapes are compared in blocks of rows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        one, other = (_kronecker_of(update) for update in (old, new))
        equal = old.scale == new.scale and all(map(_equal, one or old.parts, other or new.parts))
        found = _norms_of_factors(old.absorb_scale(), new.absorb_scale())
        off, whole = found or _norms_of_blocks(old.absorb_scale(), new.absorb_scale())
    return 0.0 if equal else off, whole


def check_size(name: str, update: ModuleUpdate, dtype: str) -> None:
    """Raise FileError if an update has numbers that are not finite in float32, or in float64 if it is of that dtype."""
    kind = "float64" if dtype == "float64" else "float32"
    most = float(np.finfo(kind).max)
    bound = abs(update.scale) * math.prod(map(_largest, update.parts))
    if bound <= most:
        return
    # The largest element of a Kronecker product is the product of the largest ones.
    reached = update.kind != "loha" and update.rank == 1
    rows, cols = update.shape
    if not reached and rows * cols > _MOST:
        raise FileError(
            f"the update of {safe_repr(name)} may have numbers that are not finite in {kind}, and was not checked, as "
            f"{rows} × {cols} numbers are too many: its factors allow up to {bound:.3g}. The adapter is damaged, or "
            "its scale (alpha) is wrong"
        )
    if reached or not all(float(np.max(np.abs(block))) <= most for block in _blocks(update)):
        raise FileError(
            f"the update of {safe_repr(name)} has numbers that are not finite in {kind}: the adapter is damaged, or "
            "its scale (alpha) is wrong"
        )


def _largest(part: Pair | Float) -> float:
    """Return a bound on the absolute values of a part, which they reach if its rank is 1."""
    if not isinstance(part, Pair):
        return float(np.max(np.abs(part)))
    columns = [np.max(np.abs(half), axis=0) for half in part]
    with np.errstate(over="ignore", invalid="ignore"):
        rows = [float(np.max(np.linalg.norm(half, axis=1))) for half in part]
        return float(np.fmin(np.sum(columns[0] * columns[1]), rows[0] * rows[1]))


def _equal(one: Pair | Float, other: Pair | Float) -> bool:
    if isinstance(one, Pair) and isinstance(other, Pair):
        return np.array_equal(one.b, other.b) and np.array_equal(one.a, other.a)
    return not isinstance(one, Pair) and not isinstance(other, Pair) and np.array_equal(one, other)


def _blocks(update: ModuleUpdate) -> Iterator[Float]:
    """Yield an update in blocks of rows; raise MemoryError if it is too large to be computed at all."""
    rows, cols = update.shape
    if rows * cols > _MOST:
        raise MemoryError
    step = max(1, _BLOCK // cols)
    for start in range(0, rows, step):
        with np.errstate(over="ignore", invalid="ignore"):
            yield update.rows(start, min(start + step, rows))


def _norms_of_blocks(old: ModuleUpdate, new: ModuleUpdate) -> tuple[float, float]:
    norms = [(norm_of_difference(*pair), norm(pair[0])) for pair in zip(_blocks(old), _blocks(new), strict=True)]
    return together(off for off, _ in norms), together(whole for _, whole in norms)


def _norms_of_factors(old: ModuleUpdate, new: ModuleUpdate) -> tuple[float, float] | None:
    """Compute :func:`norms_of` of updates of scale 1 from factors; None if these are not small, or of other shapes."""
    one, other = _kronecker_of(old), _kronecker_of(new)
    if one is None or other is None:
        return None
    sides, exponent = list[tuple[Float, Float]](), 0
    for parts in zip(one, other, strict=True):
        if parts[0].shape != parts[1].shape or (found := _compressed(*parts, math.prod(old.shape))) is None:
            return None
        small, scaled = found
        sides.append(small)
        exponent += scaled
    upper, lower = (_triangle(*side) for side in sides)
    products = upper * [1.0, -1.0] @ lower.T, upper[:, :1] @ lower[:, :1].T
    off, whole = (norm(scaled_by(product, exponent)) for product in products)
    return off, whole


def _triangle(one: Float, other: Float) -> Float:
    """Return the triangular QR factor of the matrix with two columns, the elements of two matrices."""
    length = float(np.linalg.norm(one))
    if not length:
        return np.asarray([[0.0, 0.0], [0.0, np.linalg.norm(other)]])
    unit = one / length
    along = float(np.vdot(unit, other))
    return np.asarray([[length, along], [0.0, np.linalg.norm(other - along * unit)]])


def _kronecker_of(update: ModuleUpdate) -> tuple[Pair | Float, Pair | Float] | None:
    """Return two parts whose Kronecker product is an update, apart from its scale; None if they would be large."""
    if update.kind == "lokr":
        first, last = update.parts
        return first, last
    if update.kind != "loha":
        return np.ones((1, 1)), update.parts[0]
    one, two = update.parts
    assert isinstance(one, Pair)
    assert isinstance(two, Pair)
    if 4 * one.rank * two.rank > min(update.shape):
        return None
    # A row of the Hadamard product's factors is the Kronecker product of the rows of those of the two matrices.
    b, a = ((left[:, :, None] * right[:, None, :]).reshape(len(left), -1) for left, right in zip(one, two, strict=True))
    return np.ones((1, 1)), Pair(b, a)


def _compressed(one: Pair | Float, other: Pair | Float, elements: int) -> tuple[tuple[Float, Float], int] | None:
    """Return two small matrices with the norms and the inner product of two parts, apart from a power of two.

    None if neither the ranks are small, nor the parts against an update of that many elements.
    """
    if isinstance(one, Pair) and isinstance(other, Pair) and 2 * (one.rank + other.rank) <= min(one.shape):
        # Scale each factor to about 1: their product may be in range even if neither factor's norm is.
        both = [np.concatenate(halves, axis=1) for halves in zip(one, other, strict=True)]
        exponents = [exponent_of(halves) for halves in both]
        b, a = (
            np.asarray(np.linalg.qr(scaled_by(halves, -exponent), mode="r"))
            for halves, exponent in zip(both, exponents, strict=True)
        )
        cut = one.rank
        return (b[:, :cut] @ a[:, :cut].T, b[:, cut:] @ a[:, cut:].T), sum(exponents)
    if 2 * math.prod(one.shape) > max(elements, 2):
        return None
    whole = as_matrix(one), as_matrix(other)
    exponent = exponent_of(*whole)
    return (scaled_by(whole[0], -exponent), scaled_by(whole[1], -exponent)), exponent


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


# -- Updates of LoRA with one rank and a scale of 1, which every loader reads in the same way --------------------------


def uniform(updates: Sequence[ModuleUpdate], rank: int | None = None) -> list[ModuleUpdate]:
    """Return the same updates with their scales in a factor, and all factors padded with zeros to one rank.

    Parameters
    ----------
    updates : sequence of ModuleUpdate
        All of kind "lora".
    rank : int, optional
        By default, the largest of the updates.
    """
    most = max(update.rank for update in updates) if rank is None else rank
    whole = [update.absorb_scale() for update in updates]
    return [update._replace(parts=(update.pair.padded(most),)) for update in whole]


# -- The update of one weight as a slice of low rank of a tensor that several weights share, in two factors ------------


def low_rank_slice(plan: SuperLoRA, weight: int, arrays: Mapping[str, Float], dtype: str) -> ModuleUpdate | None:
    """Return the two factors of a slice if they are smaller than the slice; they are products of the network's arrays.

    Parameters
    ----------
    plan : SuperLoRA
    weight : int
        Index of the weight.
    arrays : mapping of str to ndarray
        The plan's arrays in float64.
    dtype : str
        The dtype in which they were trained.
    """
    how, (rows, cols) = factoring(plan, weight), plan.shapes[weight]
    if how is not None and how.group.subtracts:
        how = factoring(plan, weight, single=True)
    if how is None or how.width is None or how.width * (rows + cols) >= rows * cols:
        return None
    backend = load_backend("numpy")
    found = how(backend, arrays, dtype)
    matrix = found.pair(backend)
    return ModuleUpdate("lora", (rows, cols), (_narrowed(matrix, plan.largest_rank(weight)),), found.scale)


def _narrowed(matrix: Matrix, rank: int) -> Pair:
    """Return two factors of at most the given rank, which is known to be at least that of the product."""
    pair = Pair(np.asarray(matrix.left), np.asarray(matrix.right))
    if pair.rank <= rank:
        return pair
    # A Tucker core that is narrower on one side: the product lies in the span of as many vectors.
    basis, upper = np.linalg.qr(pair.a)
    left, s, vt = np.linalg.svd(pair.b @ upper.T, full_matrices=False)
    return Pair(left[:, :rank] * s[:rank], basis @ vt[:rank].T)
