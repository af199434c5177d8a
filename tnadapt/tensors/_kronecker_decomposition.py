"""Nearest Kronecker products, and sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.rearrangement import rearranged
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ShapeError, safe_repr

from ._checks import integer_of
from ._cp_decomposition import cp
from ._known_elements import METHOD, STARTS, completed
from ._kronecker_tensor import KroneckerTensor
from ._requests import Callback, Watch, requested

__all__ = ["kronecker_decomposition"]


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
