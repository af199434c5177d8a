"""Random tensors in each form, for tests, benchmarks and starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, load_backend
from tnadapt.errors import ShapeError

from ._decomposed import CPTensor, TuckerTensor
from ._requests import integer_of, normal, ranks_of, ring_bonds, seed_of, shape_of, train_bonds
from ._tensor_chains import TRTensor, TTMatrix, TTTensor


def _normal(random_state: Any, backend: str, dtype: str, device: Any) -> Callable[..., Array]:
    """Return a function that draws normal arrays of a library and dtype."""
    is_generator = isinstance(random_state, np.random.Generator)
    rng = random_state if is_generator else np.random.default_rng(seed_of(random_state))
    library = load_backend(backend)

    def draw(*shape: int) -> Array:
        try:
            numbers = normal(rng, shape, dtype)
        except (MemoryError, ValueError):
            raise ShapeError(f"shape and rank make an array of shape {shape}, too large for memory") from None
        return library.asarray(numbers, dtype, device)

    return draw


@checks_arguments
def random_cp(
    shape: Sequence[int],
    rank: int,
    *,
    orthogonal: bool = False,
    normalized: bool = False,
    random_state: Any = None,
    backend: str = "numpy",
    dtype: str = "float64",
    device: Any = None,
) -> CPTensor:
    """Draw a random CP tensor with normal factors.

    Parameters
    ----------
    shape : sequence of int
    rank : int
    orthogonal : bool
        Whether the columns of each factor are orthonormal; the rank must be at most the smallest size.
    normalized : bool
        Whether the columns have norm 1.
    random_state : int or Generator, optional
        Seed; 0 if None, so that results repeat.
    backend : str
        Name of the library.
    dtype : str
        A real or complex dtype.
    device : optional
        Device of the library.

    Returns
    -------
    CPTensor
        With weights of ones.

    Raises
    ------
    ShapeError
        If a size or the rank is out of range.

    Examples
    --------
    >>> random_cp((3, 4, 5), 2).factors[1].shape
    (4, 2)
    """
    sizes, rank = shape_of(shape), integer_of("rank", rank, 1)
    draw = _normal(random_state, backend, dtype, device)
    factors = [draw(size, rank) for size in sizes]
    if orthogonal:
        if rank > min(sizes):
            raise ShapeError(f"{rank} orthonormal columns do not fit sizes {sizes}: use a rank of at most {min(sizes)}")
        factors = [load_backend(backend).qr(factor)[0] for factor in factors]
    tensor = CPTensor(load_backend(backend).asarray(np.ones(rank), dtype, device), factors)
    return CPTensor(tensor.weights, tensor.normalized().factors) if normalized else tensor


@checks_arguments
def random_tucker(
    shape: Sequence[int],
    rank: int | Sequence[int],
    *,
    orthogonal: bool = False,
    random_state: Any = None,
    backend: str = "numpy",
    dtype: str = "float64",
    device: Any = None,
) -> TuckerTensor:
    """Draw a random Tucker tensor with a normal core and factors.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all modes, or one each.
    orthogonal : bool
        Whether the columns of each factor are orthonormal.
    random_state, backend, dtype, device
        As for :func:`random_cp`.

    Returns
    -------
    TuckerTensor

    Raises
    ------
    ShapeError
        If a size or a rank is out of range.

    Examples
    --------
    >>> random_tucker((3, 4), (2, 2)).core.shape
    (2, 2)
    """
    sizes = shape_of(shape)
    ranks = ranks_of(rank, len(sizes), "modes")
    draw = _normal(random_state, backend, dtype, device)
    core = draw(*ranks)
    factors = [draw(size, r) for size, r in zip(sizes, ranks, strict=True)]
    if orthogonal:
        if any(r > size for size, r in zip(sizes, ranks, strict=True)):
            raise ShapeError(f"orthonormal columns of ranks {tuple(ranks)} do not fit sizes {sizes}")
        factors = [load_backend(backend).qr(factor)[0] for factor in factors]
    return TuckerTensor(core, factors)


@checks_arguments
def random_tt(
    shape: Sequence[int],
    rank: int | Sequence[int],
    *,
    random_state: Any = None,
    backend: str = "numpy",
    dtype: str = "float64",
    device: Any = None,
) -> TTTensor:
    """Draw a random tensor train with normal cores.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all bonds, one each, or one each with the 1 at both ends, as TensorLy writes it.
    random_state, backend, dtype, device
        As for :func:`random_cp`.

    Returns
    -------
    TTTensor

    Raises
    ------
    ShapeError
        If a size or a rank is out of range.

    Examples
    --------
    >>> random_tt((3, 4, 5), 2).rank
    (1, 2, 2, 1)
    """
    sizes = shape_of(shape)
    ranks = [1, *train_bonds(rank, len(sizes) - 1), 1]
    draw = _normal(random_state, backend, dtype, device)
    return TTTensor([draw(ranks[m], size, ranks[m + 1]) for m, size in enumerate(sizes)])


@checks_arguments
def random_tr(
    shape: Sequence[int],
    rank: int | Sequence[int],
    *,
    random_state: Any = None,
    backend: str = "numpy",
    dtype: str = "float64",
    device: Any = None,
) -> TRTensor:
    """Draw a random tensor ring with normal cores.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all bonds, one each, or one each with the first again at the end, as TensorLy writes it.
    random_state, backend, dtype, device
        As for :func:`random_cp`.

    Returns
    -------
    TRTensor

    Raises
    ------
    ShapeError
        If a size or a rank is out of range.

    Examples
    --------
    >>> random_tr((3, 4), (2, 3)).rank
    (2, 3, 2)
    """
    sizes = shape_of(shape)
    ranks = ring_bonds(rank, len(sizes))
    draw = _normal(random_state, backend, dtype, device)
    return TRTensor([draw(ranks[m], size, ranks[(m + 1) % len(sizes)]) for m, size in enumerate(sizes)])


@checks_arguments
def random_tt_matrix(
    rows: Sequence[int],
    cols: Sequence[int],
    rank: int | Sequence[int],
    *,
    random_state: Any = None,
    backend: str = "numpy",
    dtype: str = "float64",
    device: Any = None,
) -> TTMatrix:
    """Draw a random TT matrix with normal cores.

    Parameters
    ----------
    rows, cols : sequence of int
        How the rows and the columns are divided into modes.
    rank : int or sequence of int
        As for :func:`random_tt`.
    random_state, backend, dtype, device
        As for :func:`random_cp`.

    Returns
    -------
    TTMatrix

    Raises
    ------
    ShapeError
        If a size or a rank is out of range, or rows and columns have different numbers of modes.

    Examples
    --------
    >>> random_tt_matrix((2, 3), (4, 5), 2).shape
    (6, 20)
    """
    tall, wide = shape_of(rows), shape_of(cols)
    if len(tall) != len(wide):
        raise ShapeError(f"rows {tall} and columns {wide} must have the same number of modes")
    ranks = [1, *train_bonds(rank, len(tall) - 1), 1]
    draw = _normal(random_state, backend, dtype, device)
    return TTMatrix([draw(ranks[m], r, c, ranks[m + 1]) for m, (r, c) in enumerate(zip(tall, wide, strict=True))])
