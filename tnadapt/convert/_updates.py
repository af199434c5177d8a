"""One module's update in other libraries' forms, with dtypes and errors; and adapter files unpacked into such updates.

A :class:`ModuleUpdate` is low rank, Kronecker, Hadamard or dense. Each form is a small adapter of this library for one
weight, and its plan computes ΔW. All computations are in float64, and results are stored in the source's dtype or in
float32. :func:`modules_of` unpacks an adapter file into one update per module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.factoring import Matrix, factoring
from tnadapt.algebra.network import Network
from tnadapt.algebra.norms import exponent_of, norm, norm_of_difference, relative, scaled_by, together
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import load_backend
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.container import native
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

# -- One module's update: low rank, Kronecker, Hadamard, dense ---------------------------------------------------------


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
    product: Float = part.b @ part.a.T
    return product


def _rows_of(part: Pair | Float, at: slice | NDArray[np.int64]) -> Float:
    rows: Float = part.b[at] @ part.a.T if isinstance(part, Pair) else part[at]
    return rows


class ModuleUpdate(NamedTuple):
    """ΔW of one module, as factors.

    Attributes
    ----------
    kind : {"lora", "lokr", "loha", "dense"}
    shape : tuple of int
        ``(rows, cols)`` of the update.
    parts : tuple of Pair or ndarray
        LoRA: one Pair. LoKr: the factors W1 and W2 of a Kronecker product, each a Pair or a matrix, and W1 a Pair only
        if W2 is one. LoHa: the two Pairs of a Hadamard product. Dense: the matrix itself. All in float64.
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
        leading, form = "same" if isinstance(first, Pair) else "dense", "cp" if isinstance(last, Pair) else "dense"
        return Config(rank=self.rank, splits=2, split_size=first.shape, leading=leading, format=form)

    def arrays(self) -> dict[str, Float]:
        """Return the arrays of :meth:`config`, without the group's prefix, and with all Pairs padded to one rank."""
        arrays = dict[str, Float]()
        for number, part in enumerate(self.parts):
            if isinstance(part, Pair):
                part = part.padded(self.rank)
                arrays |= {f"split{number}.factor0": part.b, f"split{number}.factor1": part.a}
            else:
                arrays[f"split{number}.dense"] = part.reshape(-1) if self.kind == "dense" else part
        return arrays

    def delta(self) -> Float:
        """Compute ΔW, shape (rows, cols)."""
        return self.absorb_scale().rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Float:
        """Compute rows ``start`` to ``stop - 1`` of ΔW."""
        at = np.arange(start, stop)
        if self.kind == "lokr":
            first, last = self.parts
            outer, inner = np.divmod(at, last.shape[0])
            left, right = _rows_of(first, outer), _rows_of(last, inner)
            rows = (left[:, :, None] * right[:, None, :]).reshape(len(at), -1)
        else:
            rows = functools.reduce(np.multiply, (_rows_of(part, slice(start, stop)) for part in self.parts))
        return rows if self.scale == 1.0 else rows * self.scale

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
    array = native(tag, array)
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
        single = np.array(array, dtype=np.float32, order="C")
    return np.where(np.isfinite(array), rounded_to(single, "bfloat16"), single)


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


# Elements of an update that are computed at a time, and that are computed at all (32 GiB in float64).
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
        old_parts, new_parts = (_kronecker_of(update) for update in (old, new))
        equal = old.scale == new.scale and all(map(_equal, old_parts or old.parts, new_parts or new.parts))
        norms = _norms_of_factors(old.absorb_scale(), new.absorb_scale())
        off, whole = norms or _norms_of_blocks(old.absorb_scale(), new.absorb_scale())
    return 0.0 if equal else off, whole


def check_size(name: str, update: ModuleUpdate, dtype: str) -> None:
    """Raise FileError if an update has numbers that are not finite in float32, or in float64 if it is of that dtype."""
    precision = "float64" if dtype == "float64" else "float32"
    most = float(np.finfo(precision).max)
    bound = abs(update.scale) * math.prod(map(_largest, update.parts))
    if bound <= most:
        return
    # The largest element of a Kronecker product is the product of the largest ones.
    reached = update.kind != "loha" and update.rank == 1
    rows, cols = update.shape
    if not reached and rows * cols > _MOST:
        raise FileError(
            f"the update of {safe_repr(name)} may have numbers that are not finite in {precision}, and was not "
            f"checked, as {rows} × {cols} numbers are too many: its factors allow up to {bound:.3g}. The adapter is "
            "damaged, or its scale (alpha) is wrong"
        )
    if reached or not all(float(np.max(np.abs(block))) <= most for block in _blocks(update)):
        raise FileError(
            f"the update of {safe_repr(name)} has numbers that are not finite in {precision}: the adapter is damaged, "
            "or its scale (alpha) is wrong"
        )


def _largest(part: Pair | Float) -> float:
    """Return a bound on the absolute values of a part, which is exact if the rank is 1."""
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
    """Yield an update in blocks of rows, or raise MemoryError if it is too large to be computed at all."""
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
    """Compute :func:`norms_of` of updates of scale 1 from factors, or return None if it cannot be done cheaply."""
    old_parts, new_parts = _kronecker_of(old), _kronecker_of(new)
    if old_parts is None or new_parts is None:
        return None
    sides, exponent = list[tuple[Float, Float]](), 0
    for parts in zip(old_parts, new_parts, strict=True):
        if parts[0].shape != parts[1].shape or (compressed := _compressed(*parts, math.prod(old.shape))) is None:
            return None
        small, scaled = compressed
        sides.append(small)
        exponent += scaled
    upper, lower = (_triangle(*side) for side in sides)
    products = upper * [1.0, -1.0] @ lower.T, upper[:, :1] @ lower[:, :1].T
    off, whole = (norm(scaled_by(product, exponent)) for product in products)
    return off, whole


def _triangle(one: Float, other: Float) -> Float:
    """Return the triangular QR factor of a matrix with two columns: the flattened elements of two matrices."""
    length = float(np.linalg.norm(one))
    if not length:
        return np.asarray([[0.0, 0.0], [0.0, np.linalg.norm(other)]])
    unit = one / length
    along = float(np.vdot(unit, other))
    return np.asarray([[length, along], [0.0, np.linalg.norm(other - along * unit)]])


def _kronecker_of(update: ModuleUpdate) -> tuple[Pair | Float, Pair | Float] | None:
    """Return two parts whose Kronecker product is an unscaled update, or None if they would be large."""
    if update.kind == "lokr":
        first, last = update.parts
        return first, last
    if update.kind != "loha":
        return np.ones((1, 1)), update.parts[0]
    w1, w2 = update.parts
    assert isinstance(w1, Pair)
    assert isinstance(w2, Pair)
    if 4 * w1.rank * w2.rank > min(update.shape):
        return None
    # A row of the product's factors is the Kronecker product of the same rows of the two matrices' factors.
    b, a = ((left[:, :, None] * right[:, None, :]).reshape(len(left), -1) for left, right in zip(w1, w2, strict=True))
    return np.ones((1, 1)), Pair(b, a)


def _compressed(one: Pair | Float, other: Pair | Float, elements: int) -> tuple[tuple[Float, Float], int] | None:
    """Return two small matrices with the norms and inner product of two parts, and the power of two they lack."""
    # None if neither the ranks are small, nor the parts in comparison with an update of that many elements.
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


def errors_of(updates: Iterable[tuple[str, ModuleUpdate, ModuleUpdate]]) -> tuple[float, dict[str, float]]:
    """Return the overall relative error and that of each weight; infinite if only the new update is nonzero.

    Parameters
    ----------
    updates : iterable of (str, ModuleUpdate, ModuleUpdate)
        The name of each weight, with the old and the new update.

    Examples
    --------
    >>> old, new = (ModuleUpdate("dense", (1, 2), (np.array([[3.0, last]]),)) for last in (4.0, 9.0))
    >>> errors_of([("q", old, old), ("v", old, new)])[1]
    {'q': 0.0, 'v': 1.0}
    """
    norms = {name: norms_of(old, new) for name, old, new in updates}
    errors = {name: relative(*pair) for name, pair in norms.items()}
    off, whole = (together(pair[place] for pair in norms.values()) for place in (0, 1))
    return relative(off, whole), errors


# -- LoRA with one rank and a scale of 1, which every loader reads in the same way -------------------------------------


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


# -- A slice of low rank of a tensor that several weights share, in two factors ----------------------------------------


def low_rank_slice(plan: UpdatePlan, weight: int, arrays: Mapping[str, Float], dtype: str) -> ModuleUpdate | None:
    """Return the two factors of a slice if they are smaller than the slice; they are products of the network's arrays.

    Parameters
    ----------
    plan : UpdatePlan
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
    factors = how(backend, arrays, dtype)
    matrix = factors.pair(backend)
    return ModuleUpdate("lora", (rows, cols), (_narrowed(matrix, plan.largest_rank(weight)),), factors.scale)


def _narrowed(matrix: Matrix, rank: int) -> Pair:
    """Return two factors of at most this rank, which must be at least the rank of the product."""
    pair = Pair(np.asarray(matrix.left), np.asarray(matrix.right))
    if pair.rank <= rank:
        return pair
    # A Tucker core is narrower on one side: the product lies in the span of that many vectors.
    basis, upper = np.linalg.qr(pair.a)
    left, s, vt = np.linalg.svd(pair.b @ upper.T, full_matrices=False)
    return Pair(left[:, :rank] * s[:rank], basis @ vt[:rank].T)


# -- An adapter file unpacked into one update per module ---------------------------------------------------------------

# PEFT and LyCORIS adapt whole modules, each with LoRA, LoKr or LoHa. In a file of this library, a target may consist of
# some rows of a fused weight.


# Maximum elements of an update for comparing all of them with the plan's, and the largest difference that summation in
# another order explains, relative to the sum of magnitudes.
_COMPARED, _AGREEMENT = 1 << 12, 1e-6


# -- Unpacking: the update of one target ---------------------------------------------------------


class Unpacked:
    """An adapter file with its arrays in float64, which represents all of their values.

    Parameters
    ----------
    file : AdapterFile
    updates : sequence of ModuleUpdate
        The update of each target as stored in another library's file. If given, they are used instead of the file's
        arrays, which may have another form and be rounded.
    """

    def __init__(self, file: AdapterFile, updates: Sequence[ModuleUpdate] = ()) -> None:
        self.file, self.updates = file, updates
        self._forms: dict[int, ModuleUpdate | None] = {}
        self.arrays: dict[str, Float] = {name: array.astype(np.float64) for name, array in file.arrays.items()}

    def delta(self, weight: int) -> Float:
        """Return ΔW of one target in float64; raise FileError if it is not finite.

        It is computed in float64 if F is linear. With a nonlinear F, the value of F at the start of training is
        subtracted in the dtype of that start.
        """
        if self.updates:
            return self.updates[weight].delta()
        plan = self.file.plan
        linear = all(plan.groups[piece.group].projection.linear for piece in plan.layout.of_weight(weight))
        with np.errstate(over="ignore", invalid="ignore"):  # check_size reports infinite results
            delta: Float = (
                plan.arrays_plan.delta(self._made, weight, self.file.dtype)
                if linear
                else self._nonlinear[weight].astype(np.float64)
            )
        target = self.file.targets[weight]
        check_size(target.label, ModuleUpdate("dense", target.shape, (delta,)), self.file.dtype)
        return delta

    @functools.cached_property
    def _made(self) -> dict[str, Float]:
        """The arrays of the network that are not frozen: those of the file, or those that θ makes."""
        return self.file.plan.arrays(self.arrays, self.file.dtype)

    @functools.cached_property
    def _nonlinear(self) -> list[np.ndarray]:
        return self.file.deltas()

    def form(self, weight: int) -> ModuleUpdate | None:
        """Return the exact factors of one target's update; None if its arrays do not have such a form.

        The form requires a group of one weight with two modes and the identity for F, or a tensor of which the weight
        is a slice of low rank (LoTR, FacT, CP across layers), and an F that keeps rows and columns separate (MiSS).
        """
        if self.updates:
            return self.updates[weight]
        if weight not in self._forms:
            plan = self.file.plan.arrays_plan
            form = self._of_one_group(weight) or low_rank_slice(plan, weight, self._made, self.file.dtype)
            self._forms[weight] = form = form if form is not None and self._is_update(form, weight) else None
            if form is not None:
                check_size(self.file.targets[weight].label, form, self.file.dtype)
        return self._forms[weight]

    def update(self, weight: int) -> ModuleUpdate:
        """Return one target's update as its factors, or else dense."""
        return self.form(weight) or ModuleUpdate("dense", self.file.targets[weight].shape, (self.delta(weight),))

    def _is_update(self, form: ModuleUpdate, weight: int) -> bool:
        """Return whether a form has the rows that the plan computes: all of a small update, and some of a large one."""
        # The error that a conversion reports is measured against the form.
        plan, (rows, cols) = self.file.plan.arrays_plan, form.shape
        (piece,) = plan.layout.of_weight(weight)
        bounds = form._replace(
            parts=tuple(Pair(*map(np.abs, part)) if isinstance(part, Pair) else np.abs(part) for part in form.parts)
        )
        runs = [(0, rows)]
        if rows * cols > _COMPARED:
            chosen = np.random.default_rng(0).integers(rows, size=2)
            runs = [(row, row + 1) for row in sorted({0, *map(int, chosen), rows - 1})]
        for start, stop in runs:
            first = piece.group_start + start * cols
            last = first + (stop - start) * cols
            with np.errstate(over="ignore", invalid="ignore"):
                expected = plan.groups[piece.group].update(
                    load_backend("numpy"), self._made, first, last, self.file.dtype
                )
                off = np.abs(form.rows(start, stop) - expected.reshape(-1, cols))
                if not (off <= _AGREEMENT * np.abs(bounds.rows(start, stop))).all():
                    return False
        return True

    def _of_one_group(self, weight: int) -> ModuleUpdate | None:
        plan, shape = self.file.plan, self.file.targets[weight].shape
        pieces = plan.layout.of_weight(weight)
        group = plan.groups[pieces[0].group]
        if len(group.pieces) > 1 or len(pieces) > 1 or not group.projection.map.identity or group.subtracts:
            return None
        network = group.network
        if len(network.sizes) != 2 or network.sizes[1] != shape[1]:
            return None
        trained = {name: self._made[full] for name, full in group.names.items()}
        arrays = group.with_frozen(load_backend("numpy"), trained, self.file.dtype)
        terms = [_parts(network, network.of_term(prefixes, arrays)) for prefixes in network.prefixes]
        if len(network.splits) == 1:
            return _low_rank(terms, shape, network.scale)
        if network.terms > 1:
            return None
        return (_kronecker if network.kronecker else _hadamard)(terms[0], shape, network.scale)


Part = Pair | Float


def _parts(network: Network, arrays: Sequence[Mapping[str, Float]]) -> list[Part]:
    """Return the matrix of each split of a term, as two factors if its format has them."""
    backend, parts = load_backend("numpy"), list[Part]()
    for split, split_arrays in zip(network.splits, arrays, strict=True):
        halves = split.factors(backend, split_arrays)
        whole = [(0, size) for size in split.sizes]
        parts.append(split.tensor(backend, split_arrays, whole) if halves is None else Pair(halves[0], halves[1].T))
    return parts


def _low_rank(terms: Sequence[Sequence[Part]], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    pairs = [Pair(part.b[: shape[0]], part.a) for (part,) in terms if isinstance(part, Pair)]
    if len(pairs) < len(terms):
        return None
    # A sum of low-rank matrices is low-rank: concatenate the factors.
    pair = Pair(np.concatenate([p.b for p in pairs], axis=1), np.concatenate([p.a for p in pairs], axis=1))
    return ModuleUpdate("lora", shape, (pair,), scale)


def _kronecker(parts: Sequence[Part], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    first, *between, last = parts
    # Multiply all splits but the last: other libraries have only two factors.
    for part in between:
        first = np.asarray(np.kron(as_matrix(first), as_matrix(part)), np.float64)
    if tuple(size * other for size, other in zip(first.shape, last.shape, strict=True)) != shape:
        return None  # the product is larger than the weight and truncated, which no other library supports
    return ModuleUpdate("lokr", shape, (first, last), scale)


def _hadamard(parts: Sequence[Part], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    pairs = [Pair(part.b[: shape[0]], part.a) for part in parts if isinstance(part, Pair)]
    return ModuleUpdate("loha", shape, tuple(pairs), scale) if len(pairs) == len(parts) == 2 else None


# -- Modules: all targets in one weight ----------------------------------------------------------


class Module(NamedTuple):
    """A module of the base, with the targets in its weight.

    Attributes
    ----------
    path : str
        Path of the module whose ``weight`` is updated.
    stored : tuple of int
        Shape of the weight as the model stores it; of an expert that of its matrix.
    transposed : bool
        Whether that shape is ``(in, out)``.
    targets : tuple of (int, Target)
        The targets with their positions in the file.
    """

    path: str
    stored: tuple[int, ...]
    transposed: bool
    targets: tuple[tuple[int, Target], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the whole update."""
        return Target(self.path, self.stored, transposed=self.transposed).shape

    @property
    def name(self) -> str:
        """Name of the weight in a state dict, with the index of an expert."""
        first = self.targets[0][1]
        return first.name if first.index is None else place_of(first)

    @property
    def place(self) -> str:
        """The path; of an expert also which one it is."""
        return place_of(self.targets[0][1])

    def delta(self, unpacked: Unpacked) -> Float:
        """Return ΔW of the whole weight, which is zero in rows without a target."""
        total = np.zeros(self.shape)
        for number, target in self.targets:
            # Rows of the (out, in) matrix, regardless of how the weight is stored.
            total[_rows(target)] += unpacked.delta(number)
        return total

    def form(self, unpacked: Unpacked) -> ModuleUpdate | None:
        """Return the exact factors of ΔW, or None if there are none."""
        if any(target.index is not None for _, target in self.targets):
            return None  # several matrices instead of one, such as experts
        forms = [unpacked.form(number) for number, _ in self.targets]
        exact = [form for form in forms if form is not None]
        if len(self.targets) == 1 and self.targets[0][1].rows is None:
            return forms[0]
        if len(exact) < len(forms) or any(form.kind != "lora" for form in exact):
            return None
        return self._stacked(exact)

    def update(self, unpacked: Unpacked) -> ModuleUpdate:
        """Return ΔW as its exact factors, or else dense."""
        return self.form(unpacked) or ModuleUpdate("dense", self.shape, (self.delta(unpacked),))

    def _stacked(self, forms: Sequence[ModuleUpdate]) -> ModuleUpdate:
        """Combine low-rank updates of disjoint rows into one of the whole weight, whose rank is their sum."""
        scales = {form.scale for form in forms}
        scale = scales.pop() if len(scales) == 1 else 1.0
        whole = [form if scale == form.scale else form.absorb_scale() for form in forms]
        tall, wide = [], []
        for form, (_, target) in zip(whole, self.targets, strict=True):
            b = np.zeros((self.shape[0], form.pair.rank))
            b[_rows(target)] = form.pair.b
            tall.append(b)
            wide.append(form.pair.a)
        return ModuleUpdate("lora", self.shape, (Pair(np.concatenate(tall, 1), np.concatenate(wide, 1)),), scale)


def _rows(target: Target) -> slice | list[int]:
    return slice(None) if target.rows is None else target.rows.indices()


def modules_of(file: AdapterFile) -> list[Module]:
    """Return the modules of an adapter file, layer by layer; each expert is one of its own."""
    places: dict[str, list[tuple[int, Target]]] = {}
    for number, target in enumerate(file.targets):
        places.setdefault(place_of(target), []).append((number, target))
    modules = []
    for place in sorted(places, key=natural):
        first = places[place][0][1]  # all targets of a weight agree on how it is stored
        modules.append(Module(first.module, first.matrix_sizes, first.transposed, tuple(places[place])))
    return modules


def is_embedding(module: Module) -> bool:
    """Return whether a module is an embedding."""
    return module.targets[0][1].role == "embedding"


def is_expert(module: Module) -> bool:
    """Return whether a module stands for one of the matrices of a parameter."""
    return module.targets[0][1].index is not None


def place_of(target: Target) -> str:
    """Return what all targets of one matrix have in common: the module's path; of an expert also which it is."""
    return target.module if target.index is None else f"{target.name}[{target.index}]"


# -- Updates of another library ------------------------------------------------------------------


class TargetUpdate(NamedTuple):
    """The update of one weight as stored in another library's file.

    Attributes
    ----------
    target : Target
    update : ModuleUpdate
    """

    target: Target
    update: ModuleUpdate
