"""Arguments shared by all decompositions: tensors, ranks, errors, masks, weights and seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import CP, Format
from tnadapt.backends import Array, Backend, get_backend, load_backend
from tnadapt.decomposition import completion
from tnadapt.decomposition.block_passes import BlockPasses, result_dtype
from tnadapt.decomposition.fits import Callback, Fit, Iteration, Limits
from tnadapt.decomposition.linear_algebra import SVD_METHODS, Algebra, norm_of, refuse_trace
from tnadapt.decomposition.sparse_tensor import SparseTensor, sparse_tensor
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

# -- Tensors, modes and numbers ----------------------------------------------------------------------------------------


#: Dtypes that computations run in; others are converted to the first.
NUMERIC = ("float64", "float32", "complex128", "complex64")
_HALF = ("float16", "bfloat16")


def as_tensor(given: Any, what: str = "the tensor") -> tuple[Backend, Array]:
    """Return the library of a tensor, and the tensor in a dtype that computations run in.

    Parameters
    ----------
    given : array, or nested lists of numbers
        Lists become NumPy arrays. Integers and booleans become float64 in NumPy, and float32 in other libraries; half
        precision becomes float32.
    what : str
        What the tensor is, for errors.

    Returns
    -------
    Backend
    array

    Raises
    ------
    BackendError
        If it is not an array of a known library, or holds something else than numbers.
    ShapeError
        If nested lists differ in length.

    Examples
    --------
    >>> as_tensor([[1, 2], [3, 4]])[1]
    array([[1., 2.],
           [3., 4.]])
    """
    if hasattr(type(given), "to_tensor"):
        raise BackendError(f"{what} is a {type(given).__name__}: give its to_tensor()")
    if isinstance(given, (list, tuple, int, float, complex)):
        listed, given = given, from_lists(given, f"{what} is")
        if given.dtype.kind not in "biufc":
            raise BackendError(f"{what} must hold numbers; got {safe_repr(listed)}")
    if isinstance(given, np.ma.MaskedArray):
        raise BackendError(f"{what} is a masked array: give its data, and mask=~array.mask to a decomposition")
    if type(given).__module__.partition(".")[0] == "dask":
        raise BackendError(
            f"{what} is a dask array: cp(), tucker() and tensor_train() read it in blocks, elsewhere pass x.compute()"
        )
    if sparse_tensor(given) is not None:
        raise BackendError(f"{what} is sparse, which only cp() and tucker() take: pass x.toarray() or x.todense()")
    backend = get_backend(given, what=what)
    return backend, numeric(backend, given, what)


def is_network(value: Any) -> bool:
    """Return whether a value is a Decomposed, whose class no module below it can import."""
    return hasattr(type(value), "entries") and hasattr(type(value), "with_arrays")


def numeric(backend: Backend, array: Array, what: str) -> Array:
    """Return an array in a dtype that computations run in; see :func:`as_tensor`."""
    name = backend.dtype_name(array)
    if name in NUMERIC:
        return array
    if name in _HALF:
        return backend.astype(array, "float32")
    if name.startswith(("int", "uint", "bool")):
        return backend.astype(array, "float64" if backend.name == "numpy" else "float32")
    raise BackendError(f"{what} must hold numbers; got the dtype {name}")


def from_lists(given: Any, what: str) -> np.ndarray:
    """Return nested lists as an array."""
    try:
        return np.asarray(given)
    except ValueError:
        raise ShapeError(f"{what} a list whose parts differ in length; expected equal lengths") from None


def as_tensors(given: Any, what: str) -> tuple[Backend, list[Array]]:
    """Return the library of several arrays, and the arrays; all of one library, dtype and device."""
    try:
        arrays = list(given)
    except TypeError:
        raise ShapeError(f"{what} must be a list of arrays; got {safe_repr(given)}") from None
    if not arrays:
        raise ShapeError(f"{what} must be a list of at least one array; got an empty one")
    tensors = [as_tensor(array, f"array {number} of {what}")[1] for number, array in enumerate(arrays)]
    return get_backend(*tensors), tensors


def alike(matrices: Sequence[Array], axis: int, what: str) -> None:
    """Raise a ShapeError unless all are matrices with the same number of rows (axis 0) or columns (axis 1)."""
    for number, matrix in enumerate(matrices):
        if len(matrix.shape) != 2:
            raise ShapeError(f"{what} {number} has shape {tuple(matrix.shape)}; expected a matrix")
        if matrix.shape[axis] != matrices[0].shape[axis]:
            raise ShapeError(
                f"{what} {number} has shape {tuple(matrix.shape)}; expected as many {('rows', 'columns')[axis]} as "
                f"{what} 0, of shape {tuple(matrices[0].shape)}"
            )


def finite(backend: Backend, tensor: Array, what: str = "the tensor", way: str = "") -> None:
    """Raise a ShapeError if a tensor has no elements, NaN or infinity; tracers are not looked at."""
    if not math.prod(tensor.shape):
        raise ShapeError(f"{what} has shape {tuple(tensor.shape)}, so there is nothing to decompose")
    if str(backend.device(tensor)) == "meta":
        raise BackendError(f"{what} is on the meta device and has no values: move it to a real device")
    if not backend.is_concrete(tensor):
        return
    if not backend.all_finite(tensor):
        value = "NaN" if math.isnan(backend.largest(tensor)) else "infinity"
        raise ShapeError(f"{what} holds {value}, so it cannot be decomposed{way}")


def integer_of(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an integer argument; raise a ShapeError unless it is one within the limits."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ShapeError(f"{name} must be an integer {limits}; got {safe_repr(value)}")
    return int(value)


def setting_of(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an integer setting; raise a ConfigError unless it is one within the limits."""
    try:
        return integer_of(name, value, least, most)
    except ShapeError as error:
        raise ConfigError(str(error)) from None


def shape_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a checked shape; raise a ShapeError unless it has at least one mode and positive sizes."""
    sizes = tuple(integer_of("a size in shape", size, 1) for size in shape)
    if not sizes:
        raise ShapeError("the shape is empty; expected at least one mode")
    return sizes


def mode_of(mode: Any, shape: Sequence[int], what: str = "mode") -> int:
    """Return a mode as a number from 0; negative ones count from the last."""
    order = len(shape)
    if isinstance(mode, bool) or not isinstance(mode, (int, np.integer)) or not -order <= mode < order:
        raise ShapeError(
            f"{what} must be from 0 to {order - 1} for a tensor of shape {tuple(shape)}, or negative, counted from the "
            f"last; got {safe_repr(mode)}"
        )
    return int(mode) % order


def scalar_of(value: Any) -> Any:
    """Return a number, or an array without axes, that may multiply a tensor; None for anything else.

    Numbers of NumPy become Python's, which change no dtype.

    Examples
    --------
    >>> scalar_of(np.float64(2.0)), scalar_of(np.ones(2))
    (2.0, None)
    """
    if isinstance(value, (np.number, np.ndarray)) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, (int, float, complex)) or getattr(value, "shape", None) == () else None


def exponent_of(tensor: np.ndarray) -> int:
    """Return the power of two to divide a tensor by, so that nothing overflows and absolute thresholds suit it."""
    return math.frexp(float(np.max(np.abs(tensor))))[1]


def scaled_by(host: np.ndarray, exponent: int) -> np.ndarray:
    """Multiply an array in double precision, real or complex, by a power of two."""
    return np.ldexp(np.ascontiguousarray(host).view(np.float64), exponent).view(host.dtype)


# -- Ranks and errors --------------------------------------------------------------------------------------------------


def error_limit(max_error: Any) -> float:
    """Return an allowed relative error; raise a ConfigError unless it is from 0 to below 1."""
    real = isinstance(max_error, (int, float, np.floating)) and not isinstance(max_error, bool)
    if not real or not 0.0 <= max_error < 1.0:
        raise ConfigError(f"max_error must be from 0 to below 1, a relative error; got {safe_repr(max_error)}")
    return float(max_error)


def _are_several(rank: Any) -> bool:
    """Return whether a rank is a sequence of ranks."""
    return isinstance(rank, (list, tuple)) or (isinstance(rank, np.ndarray) and rank.ndim == 1)


def ranks_of(rank: Any, count: int, what: str) -> list[int]:
    """Return one rank for each of ``count`` bonds or modes, from one number or a sequence of them."""
    if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool):
        return [integer_of("rank", rank, 1)] * count
    listed = list(rank) if _are_several(rank) else None
    if listed is None or len(listed) != count:
        raise ShapeError(f"rank must be a number or one for each of the {count} {what}; got {safe_repr(rank)}")
    return [integer_of(f"rank[{place}]", rank_, 1) for place, rank_ in enumerate(listed)]


def train_bonds(rank: Any, bonds: int) -> list[int]:
    """Return the rank of each bond of a train; a sequence may have the 1 at both ends, as TensorLy writes it."""
    if _are_several(rank) and len(rank) == bonds + 2 and (rank[0], rank[-1]) == (1, 1):
        rank = rank[1:-1]
    return ranks_of(rank, bonds, "bonds")


def ring_bonds(rank: Any, bonds: int) -> list[int]:
    """Return the rank of each bond of a ring; a sequence may have the first again at the end, as TensorLy writes it."""
    if _are_several(rank) and len(rank) == bonds + 1 and rank[0] == rank[-1]:
        rank = rank[:-1]
    return ranks_of(rank, bonds, "bonds")


def inner_ranks(rank: Any, possible: Sequence[int]) -> list[int]:
    """Return the ranks of the bonds of a train.

    Parameters
    ----------
    rank : int or sequence of int
        One number is cut to what is possible. A sequence has one for each bond, with or without a 1 at both ends.
    possible : sequence of int
        The largest rank of each bond.

    Raises
    ------
    ShapeError
        If a rank of a sequence is above the possible.
    """
    ranks = train_bonds(rank, len(possible))
    if not _are_several(rank):
        return [min(bond_rank, most) for bond_rank, most in zip(ranks, possible, strict=True)]
    for bond, (bond_rank, most) in enumerate(zip(ranks, possible, strict=True)):
        if bond_rank > most:
            raise ShapeError(f"rank {bond_rank} of bond {bond} is above {most}, the largest that is possible there")
    return ranks


def useful_rank(shape: Sequence[int]) -> int:
    """Return the rank with which every tensor of a shape is a CP tensor."""
    return math.prod(shape) // max(shape)


def ring_ranks(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Cut the ranks of a ring to what is useful.

    A ring that is opened at one bond is a train, and represents any tensor with the full ranks of a train; and no bond
    has more independent rows than the core on either side of it has columns.

    Parameters
    ----------
    ranks : sequence of int
        Of each bond, the first one left of the first core.
    shape : sequence of int

    Returns
    -------
    list of int

    Examples
    --------
    >>> ring_ranks([99, 99, 99], (5, 6, 7)), ring_ranks([99, 2, 2], (5, 6, 7)), ring_ranks([3, 4, 5], (5, 6, 7))
    ([6, 6, 6], [10, 2, 2], [3, 4, 5])
    """
    order, useful = len(shape), list(ranks)
    turned = [[*shape[first:], *shape[:first]] for first in range(order)]
    most = min(max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, order)) for sizes in turned)
    if min(useful) >= most:
        useful = [most] * order
    while True:
        # Bond m lies between the cores m - 1 and m.
        cut = [min(useful[m], useful[m - 1] * shape[m - 1], useful[(m + 1) % order] * shape[m]) for m in range(order)]
        if cut == useful:
            return useful
        useful = cut


# -- A checked request -------------------------------------------------------------------------------------------------


# For larger tensors the error is computed at once: no copy is held until it is read.
_COPIED = 1 << 24
# Sparse tensors of up to this many elements, and vectors, are formed: they cost nothing.
_FORMED = 1 << 14
#: What an error says of an index without an observed element.
UNOBSERVED = (
    "index {index} of mode {mode} has no observed element, so that its row of a factor cannot be found: remove it from "
    "the tensor"
)
# The way out for a tensor with NaN or infinity, without and with a mask.
_MASKED = "; if these elements are missing, pass mask=, True where known"
_INVERTED = "; mask is True where an element is known: for the inverse pass ~mask"
#: Bytes of a block of a tensor that is not in memory, in double precision, unless told otherwise.
BLOCK = 1 << 27


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes
    ----------
    backend : Backend
    tensor : array, SparseTensor or BlockPasses
        Zero where it is not observed.
    observed : array or None
        Square roots of the weights of the elements, zero for those that are not observed; None if all count equally.
    max_error : float or None
        The relative error that is allowed; None if a rank is given.
    seed : int
    settled : bool
        Whether nobody else can change the tensor, so that the error may be computed when it is read.
    source : array or None
        The tensor with its derivatives, if they are recorded; ``tensor`` is then detached, so that the result is the
        same. :func:`._decomposed.finished` connects the two.
    exponent : int
        The power of two by which the tensor, its source and the start were divided, and a result is multiplied.
    """

    backend: Backend
    tensor: Array
    observed: Array | None
    max_error: float | None
    seed: int
    settled: bool = False
    source: Array | None = None
    exponent: int = 0

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(map(int, self.tensor.shape))

    @property
    def sparse(self) -> bool:
        """Whether only the elements that are not zero are held."""
        return isinstance(self.tensor, SparseTensor)

    @property
    def blocks(self) -> bool:
        """Whether the tensor is read block by block."""
        return isinstance(self.tensor, BlockPasses)

    @property
    def like(self) -> Array:
        """An array of the library, dtype and device of results."""
        if self.blocks:
            return np.zeros(1, result_dtype(self.tensor))
        return np.zeros(1, self.tensor.dtype) if self.sparse else self.tensor

    @property
    def concrete(self) -> bool:
        """Whether the values are known: not inside a trace."""
        return self.backend.is_concrete(self.tensor)

    @functools.cached_property
    def norm(self) -> float:
        """Frobenius norm of the tensor in float64; of the observed elements."""
        known = self.sparse or self.blocks
        return float(self.tensor.norm) if known else norm_of(self.backend, self.weighted(self.tensor))

    @property
    def loss(self) -> float:
        """The Frobenius norm that may be lost; 0 if a rank is given."""
        return 0.0 if self.max_error is None else self.max_error * self.norm

    def kept(self) -> Request:
        """Return the same request with a tensor of its own, if it is not too large for a copy."""
        if self.settled or not self.concrete or math.prod(self.shape) > _COPIED:
            return self
        return dataclasses.replace(self, tensor=self.tensor * 1, settled=True)

    def scaled(self) -> Request:
        """Return the same request for numbers near one if squares of its numbers would leave the dtype's range."""
        if self.sparse or self.blocks or not self.concrete:
            return self
        algebra = self.algebra()
        largest = algebra.largest(self.tensor)
        exponent = math.frexp(largest)[1]
        if not largest or abs(exponent) <= np.finfo(self.backend.dtype_name(self.tensor)).maxexp // 4:
            return self
        tensor, source = (None if x is None else algebra.scaled(x, -exponent) for x in (self.tensor, self.source))
        return dataclasses.replace(self, tensor=tensor, source=source, settled=True, exponent=exponent)

    def refuse_recorded(self, what: str, *arrays: Array | None) -> None:
        """Raise a BackendError if derivatives of given arrays are recorded: the result has none."""
        if any(array is not None and self.backend.differentiates(array) for array in arrays):
            raise BackendError(f"{what} is not differentiated: detach the tensor first, as in x.detach()")

    def refuse_trace(self, what: str, way: str) -> None:
        """Raise a BackendError inside a trace, where the values that a solver needs are unknown."""
        refuse_trace(self.backend, self.tensor, what, way)

    def algebra(self, svd: str = "auto") -> Algebra:
        """Return the linear algebra of matrices like the tensor."""
        if svd not in SVD_METHODS:
            raise ConfigError(f"svd must be one of {', '.join(SVD_METHODS)}; got {safe_repr(svd)}")
        return Algebra(self.backend, self.like, svd, self.seed, settled=self.settled)

    def normal(self, rng: np.random.Generator, shape: Sequence[int]) -> Array:
        """Return normal numbers in the tensor's library, dtype and device."""
        dtype, device = self.backend.dtype_name(self.tensor), self.backend.device(self.tensor)
        return self.backend.asarray(normal(rng, shape, dtype), dtype, device)

    def weighted(self, tensor: Array) -> Array:
        """Multiply a tensor by the roots of the weights."""
        return tensor if self.observed is None else tensor * self.observed


def requested(
    tensor: Any,
    rank: Any,
    max_error: float | None,
    *,
    mask: Any = None,
    weights: Any = None,
    random_state: Any = None,
    least_order: int = 1,
    what: str = "rank",
    sparse: bool = False,
    memory: int | None = None,
) -> Request:
    """Check the arguments of a decomposition; ``sparse`` says whether it takes sparse tensors, and ``memory`` how many
    bytes a block may have, if it takes tensors that are not in memory. Their mask and weights are not looked at.

    Raises
    ------
    ShapeError
        If the tensor has too few modes, no elements, NaN or infinity; if not exactly one of rank and max_error is
        given; or if a mask or weights do not fit, or leave a slice without an observed element.
    BackendError
        If the tensor is not an array of numbers.
    ConfigError
        If ``max_error`` is out of range, or the random state is something else than an integer.
    """
    if sparse and (nonzero := sparse_tensor(tensor)) is not None:
        if mask is not None or weights is not None:
            raise ConfigError("the zeros of a sparse tensor are values, not missing: leave mask and weights out")
        if len(nonzero.shape) > 1 and math.prod(nonzero.shape) > _FORMED:
            one_of(what, rank, max_error)
            limit = None if max_error is None else error_limit(max_error)
            return Request(load_backend("numpy"), nonzero, None, limit, seed_of(random_state))
        tensor = nonzero.dense()
    if memory is not None and not in_memory(tensor):
        passes = BlockPasses(tensor, memory)
        if math.prod(passes.shape) > passes.elements:
            one_of(what, rank, max_error)
            limit = None if max_error is None else error_limit(max_error)
            return Request(load_backend("numpy"), passes, None, limit, seed_of(random_state))
        tensor = np.asarray(tensor)
        mask, weights = (None if array is None else np.asarray(array) for array in (mask, weights))
    backend, tensor = as_tensor(tensor)
    if len(tensor.shape) < least_order:
        raise ShapeError(f"the tensor has shape {tuple(tensor.shape)}; expected {least_order} or more modes")
    one_of(what, rank, max_error)
    observed = None
    if mask is not None or weights is not None:
        observed, tensor = _observed(backend, tensor, mask, weights)
    else:
        finite(backend, tensor, way=_MASKED)
    limit = None if max_error is None else error_limit(max_error)
    differentiated = backend.differentiates(tensor)
    if limit is not None and differentiated:
        raise ShapeError(
            "max_error= chooses ranks by the values, which are not known inside a trace and cannot be differentiated: "
            f"give {what}= instead, or detach the tensor"
        )
    source = tensor if differentiated and backend.is_concrete(tensor) else None
    tensor = tensor if source is None else backend.detached(tensor)
    return Request(backend, tensor, observed, limit, seed_of(random_state), source=source)


def in_memory(tensor: Any) -> bool:
    """Return whether a tensor is in memory, and not read in blocks."""
    dask = type(tensor).__module__.partition(".")[0] == "dask" and hasattr(tensor, "chunks")
    return not dask and (not isinstance(tensor, np.memmap) or tensor.ndim < 2)


def kept_modes(request: Request, init: Any, fixed: Collection[int], form: type[Any], call: str) -> set[int]:
    """Check what an iteration starts from: a name, or a result of a form. Return the modes whose arrays are kept."""
    held = {mode_of(mode, request.shape, "a mode in fixed") for mode in fixed}
    if isinstance(init, form):
        get_backend(init.arrays[-1], request.like)
        if init.shape != request.shape:
            raise ShapeError(f"init has shape {init.shape}; expected the tensor's, {request.shape}")
        request.refuse_recorded("init", *init.arrays)
    elif not isinstance(init, str) or init not in ("svd", "random"):
        raise ConfigError(f"init must be 'svd', 'random' or a {form.__name__}; got {safe_repr(init)}")
    elif held:
        what = "cores" if "cores" in call else "factors"
        raise ConfigError(f"fixed={sorted(held)} keeps {what} of a start: give them as init={call}")
    return held


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return normal numbers of variance 1, complex for a complex dtype, in double precision."""
    numbers = rng.standard_normal(shape)
    return (numbers + 1j * rng.standard_normal(shape)) * math.sqrt(0.5) if dtype.startswith("complex") else numbers


def one_of(what: str, rank: Any, max_error: Any) -> None:
    """Raise a ShapeError unless exactly one of a rank and an error is given."""
    if (rank is None) == (max_error is None):
        got = "neither" if rank is None else "both"
        raise ShapeError(f"give either {what}= or max_error=, to say how closely to decompose; got {got}")


def seed_of(random_state: Any) -> int:
    """Return a seed; None is 0. A generator gives its next number."""
    if random_state is None:
        return 0
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(1 << 31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(1 << 31))
    try:
        return integer_of("random_state", random_state, 0, (1 << 64) - 1)
    except ShapeError:
        raise ConfigError(
            f"random_state must be an integer of at least 0 or a NumPy generator; got {safe_repr(random_state)}"
        ) from None


def _observed(backend: Backend, tensor: Array, mask: Any, weights: Any) -> tuple[Array | None, Array]:
    """Return the square roots of the weights, and the tensor with zeros where it is not observed."""
    shape, roots = tuple(tensor.shape), np.ones(tuple(tensor.shape))
    if weights is not None:
        host = _host(weights, "weights", shape).astype(np.float64)
        if (place := _first(~(np.isfinite(host) & (host >= 0.0)))) is not None:
            raise ShapeError(
                f"weights must be finite and not negative; got {host[place]:g} at {place}. 0 leaves an element out"
            )
        roots = np.sqrt(host)
    if mask is not None:
        host = _host(mask, "mask", shape)
        if host.dtype.kind != "b" and (place := _first(~np.isin(host, (0, 1)))) is not None:
            raise ShapeError(
                f"mask must be True (or 1) where an element is known and False (or 0) elsewhere; got "
                f"{host[place]:g} at {place}. Give weights= to count elements in part"
            )
        roots = roots * host.astype(np.float64)
    if not roots.any():
        raise ShapeError("mask and weights leave no element: nothing is known of the tensor")
    # A missing element may be NaN, which no product with zero removes.
    known = backend.constant(roots > 0.0, backend.device(tensor))
    filled = backend.where(known, tensor, backend.zeros(shape, like=tensor))
    finite(backend, filled, way=_MASKED if mask is None else _INVERTED)
    if missing := completion.unobserved(roots > 0.0):
        raise ShapeError(UNOBSERVED.format(mode=missing[0], index=missing[1]))
    if (roots == 1.0).all():
        return None, filled
    return backend.asarray(roots, backend.dtype_name(tensor), backend.device(tensor)), filled


def _first(wrong: np.ndarray) -> tuple[int, ...] | None:
    """Return the index of the first element that is True."""
    return tuple(map(int, np.argwhere(wrong)[0])) if wrong.any() else None


def _host(given: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(given, (list, tuple, np.ndarray)):
        array = from_lists(given, f"{what} is")
    else:
        backend = get_backend(given, what=what)
        if backend.is_concrete(given) and backend.differentiates(given):
            raise BackendError(f"{what} is not differentiated: detach it first, as in {what}.detach()")
        array = backend.to_numpy(given)
    if array.shape != shape:
        raise ShapeError(f"{what} must have the tensor's shape {shape}; got {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"{what} must be real numbers or booleans; got {array.dtype}")
    return array


# -- Fits with missing or weighted elements ----------------------------------------------------------------------------


#: Random starts of a small problem.
STARTS = 8
# Sweeps from each start before Gauss-Newton.
_SWEEPS = 5
# Products of all elements take a tenth of the time of gathered rows, unless no more than this part is observed.
_DENSE = 0.1


def completed(
    request: Request,
    split: Format,
    limits: Limits,
    callback: Callback | None,
    *,
    starts: int = STARTS,
    start: Mapping[str, Array] | None = None,
    fixed: Any = (),
    nonnegative: Collection[str] = (),
) -> Fit:
    """Fit a format to the observed elements of a tensor; the arrays are in the tensor's library.

    Parameters
    ----------
    request : Request
        With ``observed``.
    split : Format
    limits : Limits
        Of each descent.
    callback : callable, optional
        Called with the number and the relative error of each step; stops if it returns True.
    starts : int
        The most random starts, in addition to ``start``; more than one only for small problems.
    start : mapping of str to array, optional
        Initial arrays, by the names of the result.
    fixed : collection
        What the caller was asked to keep.
    nonnegative : collection of str
        Arrays without negative elements.

    Raises
    ------
    ConfigError
        If an error is given in place of ranks, or something is to be kept.
    BackendError
        If the tensor is traced or differentiated.
    """
    assert request.observed is not None
    backend = request.backend
    request.refuse_trace("a decomposition with mask= or weights=", "detach the tensor")
    request.refuse_recorded("with mask= or weights=, the tensor", request.source)
    if request.max_error is not None:
        raise ConfigError("mask= and weights= need ranks, as the error of known elements says little about the others")
    if fixed:
        raise ConfigError(f"fixed={sorted(fixed)} cannot be kept with mask= or weights=: leave one of them out")
    roots = np.real(backend.to_numpy(request.observed)).astype(np.float64).reshape(-1)
    known = np.flatnonzero(roots)
    wanted, roots = backend.to_numpy(request.tensor).reshape(-1)[known], roots[known]
    elements = completion.ObservedElements([split], [[""]], [np.unravel_index(known, request.shape)])
    rng, small = np.random.RandomState(request.seed % (1 << 32)), completion.affordable(elements) > 0

    def begun() -> Iterator[Mapping[str, np.ndarray]]:
        if start is not None:
            yield {name: backend.to_numpy(array) for name, array in start.items()}
        for _ in range(starts if small else start is None):
            dtype = np.result_type(wanted.dtype, np.float64)
            yield completion.random_start(elements, rng, float(np.linalg.norm(wanted)), dtype, nonnegative)

    def swept(start: Mapping[str, np.ndarray], steps: Iteration) -> Fit:
        return completion.sweeps_on_observed(elements, wanted, start, steps, roots, nonnegative)

    few = limits._replace(iterations=min(limits.iterations, _SWEEPS))
    if not np.linalg.norm(wanted * roots):
        zeros = {name: np.zeros(shape, wanted.dtype) for name, shape in elements.shapes.items()}
        fit = Fit(zeros, True, 0, "zero", error=0.0)
    elif nonnegative:
        # Gauss-Newton would leave the bounds.
        best = min((swept(each, Iteration(few)) for each in begun()), key=lambda fit: fit.error)
        fit = swept(best.arrays, Iteration(limits, callback))
    elif small:
        all_swept = (swept(each, Iteration(few)).arrays for each in begun())
        watch = callback or (lambda *_: None)
        fit = completion.fit_observed(elements, wanted, all_swept, limits, roots=roots, watch=watch)
    elif isinstance(split, CP) and len(known) > _DENSE * math.prod(request.shape):
        whole = tuple(slice(0, size) for size in request.shape)
        tensor, weights = (np.zeros(request.shape, part.dtype) for part in (wanted, roots))
        tensor.reshape(-1)[known], weights.reshape(-1)[known] = wanted, roots**2
        steps, norm = Iteration(limits, callback), float(np.linalg.norm(wanted * roots))
        blocks = [(whole, tensor, weights)]
        fit = completion.sweeps_in_blocks(lambda: blocks, next(begun()), steps, norm, tensor.size)
    else:
        fit = swept(next(begun()), Iteration(limits, callback))
    arrays = request.algebra().arrays(fit.arrays)
    kind = "nonnegative least squares" if nonnegative else "least squares"
    return fit._replace(arrays=arrays, method=f"{kind} on the observed elements")
