"""Nearest Kronecker products, and sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import MAX_ORDER
from tnadapt.algebra.formats import CP, Dense
from tnadapt.algebra.products import rearranged
from tnadapt.argument_checks import checks_arguments
from tnadapt.decomposition import Step, decompose
from tnadapt.errors import BackendError, ShapeError, safe_repr

from ._checks import integer_of, useful_rank
from ._cp_decomposition import cp
from ._decomposed import CPTensor, FitOutcome
from ._known_elements import METHOD, STARTS, completed
from ._kronecker_tensor import HadamardTensor, KroneckerTensor
from ._requests import Callback, Request, Watch, requested, smallest_rank

__all__ = [
    "hadamard_decomposition",
    "kronecker_decomposition",
]


# -- Nearest Kronecker products, and sums of them ----------------------------------------------------------------------


@checks_arguments
def kronecker_decomposition(
    tensor: Any,
    shapes: Sequence[Sequence[int]],
    terms: int | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    starts: int = 1,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
) -> KroneckerTensor:
    """Approximate a matrix or tensor by a Kronecker product of K factors, or by a sum of such products.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    shapes : sequence of K shapes
        The shapes of the factors, whose products mode by mode are the tensor's shape: for a matrix of shape (12, 20)
        for example ``[(3, 4), (4, 5)]``.
    terms : int, optional
        Number of products that are added; 1 if neither it nor ``max_error`` is given.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a number of terms.
    mask, weights : array, shape (d_1, …, d_M), optional
        As for :func:`cp`: what is known, and how much each element counts.
    starts, random_state, tol, max_iterations, callback
        Of the iteration for K ≥ 3, as for :func:`cp`.

    Returns
    -------
    KroneckerTensor
        Its ``factors`` are the K arrays of a single term; it unpacks as ``weights, terms``. For K = 2 the error is the
        least possible one.

    Raises
    ------
    ShapeError
        If the shapes do not multiply to the tensor's, or the tensor has NaN, infinity or no elements.
    BackendError
        If the tensor is not an array of numbers of a known library, or is traced.

    Notes
    -----
    Van Loan & Pitsianis, "Approximation with Kronecker products" (1993): rearranged, a Kronecker product is an outer
    product, and a sum of T products a CP tensor of rank T with the factors as vectors. For K = 2 that is a truncated
    SVD of a matrix with as many rows as the first factor has elements. With ``terms``, it is differentiable
    once it has converged.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.arange(6.0).reshape(2, 3), np.ones((4, 2))
    >>> found = kronecker_decomposition(np.kron(a, b), [(2, 3), (4, 2)])
    >>> left, right = found.factors
    >>> left.shape, right.shape, bool(np.allclose(np.kron(left, right), np.kron(a, b))), found.certified
    ((2, 3), (4, 2), True, True)
    """
    terms = 1 if terms is None and max_error is None else terms
    request = requested(tensor, terms, max_error, mask=mask, weights=weights, random_state=random_state, what="terms")
    request.refuse_trace("kronecker_decomposition()", "detach the tensor")
    sizes = _shapes(shapes, request.shape)
    backend = request.backend
    if request.observed is not None:
        watch, many = Watch(tol, callback), integer_of("terms", terms or 1, 1)
        known = completed(
            request, [Dense(shape, 1) for shape in sizes], watch, terms=many, starts=max(starts, STARTS),
            iterations=integer_of("max_iterations", max_iterations, 1),
        )  # fmt: skip
        alone = many == len(sizes) == 1
        found_terms = [
            [known.arrays["dense" if alone else f"term{term}.split{k}.dense"] for k in range(len(sizes))]
            for term in range(many)
        ]
        return request.finished(
            KroneckerTensor(None, found_terms), METHOD, converged=known.converged, history=known.history
        )
    vectors = [math.prod(shape) for shape in sizes]
    most = math.prod(vectors) // max(vectors)
    count = None if terms is None else min(integer_of("terms", terms, 1), most)
    given = request.tensor if request.source is None else request.source
    found = cp(
        rearranged(backend, given, sizes), count, max_error=max_error, starts=starts,
        random_state=request.seed, tol=tol, max_iterations=max_iterations, callback=callback,
    )  # fmt: skip
    terms_ = [
        [backend.reshape(factor[:, term], shape) for factor, shape in zip(found.factors, sizes, strict=True)]
        for term in range(found.rank)
    ]
    return KroneckerTensor(found.weights, terms_).with_outcome(found.outcome)


def _shapes(shapes: Any, whole: tuple[int, ...]) -> list[tuple[int, ...]]:
    try:
        found = [tuple(integer_of("a size in shapes", size, 1) for size in shape) for shape in shapes]
    except TypeError:
        raise ShapeError(f"shapes must be a list of shapes, one for each factor; got {safe_repr(shapes)}") from None
    if not found:
        raise ShapeError("shapes is empty; expected the shape of each factor")
    if any(len(shape) != len(whole) for shape in found):
        raise ShapeError(f"the factors of a tensor of shape {whole} need {len(whole)} axes each; got shapes {found}")
    product = tuple(math.prod(sizes) for sizes in zip(*found, strict=True))
    if product != whole:
        raise ShapeError(f"factors of shapes {found} multiply to {product}; expected the tensor's shape {whole}")
    return found


# -- Element-by-element products of CP tensors that approximate given tensors ------------------------------------------


@checks_arguments
def hadamard_decomposition(
    tensor: Any,
    rank: int | None = None,
    parts: int = 2,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    random_state: Any = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    callback: Callback | None = None,
) -> HadamardTensor:
    """Approximate a matrix or tensor by an element-by-element product of CP tensors, as LoHa does.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real. Lists and integers are converted.
    rank : int, optional
        The rank of each part.
    parts : int
        Number of parts that are multiplied.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a rank: the smallest rank is searched whose fit has no
        larger error.
    mask, weights : array, shape (d_1, …, d_M), optional
        As for :func:`cp`: what is known, and how much each element counts.
    random_state : int or Generator, optional
        Seed of the starts.
    tol : float
        The iteration stops when a step reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of steps.
    callback : callable, optional
        Called with the number and the relative error of each step; with ``mask`` or ``weights``, it stops the
        iteration if it returns True.

    Returns
    -------
    HadamardTensor
        Its ``parts`` are CP tensors.

    Raises
    ------
    ShapeError
        If the tensor has NaN, infinity or no elements, or the rank is out of range.
    BackendError
        If the tensor is not an array of real numbers of a known library, or is traced.

    Notes
    -----
    Hyeon-Woo, Ye-Bin & Oh, "FedPara" (arXiv 2108.06098). The problem is not convex: the result is the best of several
    starts, without a guarantee. With ``rank``, it is differentiable once it has converged. For matrices a lower bound
    is reported, as the rank is at most ``rank ** parts``.

    Examples
    --------
    >>> import numpy as np
    >>> tensor = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0)) ** 2
    >>> found = hadamard_decomposition(tensor, 1)
    >>> len(found.parts), found.shape, found.error < 1e-6
    (2, (4, 3), True)
    >>> hadamard_decomposition(tensor, max_error=1e-6).rank
    (1, 1)
    """
    request = requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    request.refuse_trace("hadamard_decomposition()", "detach the tensor")
    if request.backend.is_complex(request.tensor):
        raise BackendError(
            f"hadamard_decomposition() needs a real tensor; got {request.backend.dtype_name(request.tensor)}: "
            "decompose its real and imaginary parts, or use cp()"
        )
    parts, shape = integer_of("parts", parts, 1), request.shape
    if len(shape) > MAX_ORDER:
        raise ShapeError(f"the tensor has {len(shape)} modes; hadamard_decomposition() takes at most {MAX_ORDER}")

    def fitted(one: int) -> HadamardTensor:
        return _fitted(request, one, parts, tol, max_iterations, callback)

    if rank is not None:
        return fitted(integer_of("rank", rank, 1))
    assert request.max_error is not None
    return smallest_rank(fitted, request.max_error, useful_rank(shape), shape)


def _fitted(
    request: Request, rank: int, parts: int, tol: float, max_iterations: int, callback: Callback | None
) -> HadamardTensor:
    """Return the fit of one rank."""
    shape, watch = request.shape, Watch(tol, callback)
    if parts > 64 or rank > math.prod(shape):
        raise ShapeError(f"{parts} parts of rank {rank} are more than a tensor of shape {shape} can use")

    if request.observed is not None:
        known = completed(
            request, [CP(shape, rank) for _ in range(parts)], watch, hadamard=True, starts=STARTS,
            iterations=integer_of("max_iterations", max_iterations, 1),
        )  # fmt: skip
        prefixes = [f"term0.split{part}." if parts > 1 else "" for part in range(parts)]
        own = [[known.arrays[f"{prefix}factor{mode}"] for mode in range(len(shape))] for prefix in prefixes]
        made = HadamardTensor([CPTensor(None, factors) for factors in own])
        return request.finished(made, METHOD, converged=known.converged, history=known.history)

    def on_step(step: Step) -> None:
        if step.error is not None:
            watch(step.iteration, step.error)

    matrix = request.backend.reshape(request.tensor, (shape[0], math.prod(shape[1:])))
    config = Config(rank=rank, order=len(shape), fold=shape, groups=1, format="cp")
    if parts > 1:
        config = config.replace(splits=parts, combine="hadamard", leading="same")
    params, report = decompose(
        [matrix], config, tol=tol, max_iterations=max_iterations, seed=request.seed, progress=on_step
    )
    names = list(params)
    each = len(names) // parts
    found = HadamardTensor(
        [CPTensor(None, [params[name] for name in names[part * each : (part + 1) * each]]) for part in range(parts)]
    )
    (group,) = report.groups
    # Another start may have used up the steps; an exact answer needs no more of them.
    exact = float(group.error) <= 64.0 * float(np.finfo(request.backend.dtype_name(request.tensor)).eps)
    converged = exact or group.iterations < max_iterations
    return request.differentiable(found, converged).with_outcome(
        FitOutcome.computed_later(
            lambda _: (group.bound, group.certified), error=group.error, converged=converged,
            history=tuple(watch.history), method=group.method,
        )
    )  # fmt: skip
