"""Decompositions of tensors with missing or weighted elements.

A few sweeps of alternating least squares on the observed elements, then damped Gauss-Newton on all arrays at once if
the problem is small enough for its equations; otherwise sweeps to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Format

from ._observed_fit import (
    ObservedElements,
    ObservedFit,
    Seen,
    affordable,
    fit_observed,
    random_start,
    sweeps_on_observed,
    unobserved,
)
from ._single_tensor import refinable
from .fits import Limits

__all__ = ["complete", "refinable", "unobserved"]

# Sweeps from each start before Gauss-Newton.
_SWEEPS = 5


def complete(
    splits: Sequence[Format],
    tensor: np.ndarray,
    weights: np.ndarray,
    *,
    terms: int = 1,
    hadamard: bool = False,
    start: Mapping[str, np.ndarray] | None = None,
    starts: int = 8,
    seed: int = 0,
    limits: Limits | None = None,
    watch: Seen = lambda *_: None,
) -> ObservedFit:
    """Fit a format, or a sum of products of several, to the elements of a tensor whose weight is not zero.

    Parameters
    ----------
    splits : sequence of Format
        One format of the tensor's sizes; or several, whose Kronecker product is the tensor: their sizes multiply to at
        least the tensor's in each mode.
    tensor : ndarray, shape (d_1, …, d_M)
        Real or complex. Elements of weight zero are not read.
    weights : ndarray, shape (d_1, …, d_M)
        Nonnegative weights of the squared errors, or a mask: True where an element is observed. In each mode, every
        index should have an observed element; see :func:`unobserved`.
    terms : int
        Number of products in the sum.
    hadamard : bool
        Whether several splits are multiplied element by element.
    start : mapping of str to ndarray, optional
        Initial arrays, by the names of the result: ``"factor0"`` for a single split of a single term, otherwise
        ``"term0.split0.factor0"``.
    starts : int
        The most random starts, in addition to ``start``; more than one only for small problems.
    seed : int
        Of the random starts.
    limits : Limits, optional
        Of each descent.
    watch : callable
        Called with the number and the relative error of each step; stops if it returns True.

    Returns
    -------
    ObservedFit
        With the error of the observed elements.

    Examples
    --------
    >>> from tnadapt.algebra.formats import CP
    >>> rng = np.random.default_rng(0)
    >>> full = np.einsum("ar,br,cr->abc", *(rng.normal(size=(size, 2)) for size in (6, 7, 8)))
    >>> mask = rng.random(full.shape) < 0.5
    >>> found = complete([CP(full.shape, 2)], np.where(mask, full, np.nan), mask, limits=Limits(1e-12, 100))
    >>> made = np.einsum("ar,br,cr->abc", *found.arrays.values())
    >>> bool(np.allclose(made, full)), found.converged
    (True, True)
    """
    limits = limits or Limits()
    known = np.flatnonzero(weights)
    prefixes = (
        [[""]]
        if terms == len(splits) == 1
        else [[f"term{term}.split{k}." for k in range(len(splits))] for term in range(terms)]
    )
    places = _places(splits, tensor.shape, known, hadamard)
    elements = ObservedElements(splits, prefixes, places)
    wanted = np.asarray(tensor).reshape(-1)[known]
    own = np.asarray(weights, np.float64).reshape(-1)[known]
    norm = float(np.linalg.norm(wanted * np.sqrt(own)))
    if norm == 0.0:
        zeros = {name: np.zeros(shape, wanted.dtype) for name, shape in elements.shapes.items()}
        return ObservedFit(zeros, 0.0, True, (), 0)
    rng, small = np.random.RandomState(seed % (1 << 32)), affordable(elements) > 0
    few = limits._replace(iterations=min(limits.iterations, _SWEEPS))

    def begun() -> Iterator[Mapping[str, np.ndarray]]:
        if start is not None:
            yield start
        for _ in range(starts if small else start is None):
            yield random_start(elements, rng, float(np.linalg.norm(wanted)), np.result_type(wanted.dtype, np.float64))

    if not small:
        return _by_sweeps(elements, wanted, next(begun()), limits, np.sqrt(own), watch)
    swept = (sweeps_on_observed(elements, wanted, each, few, np.sqrt(own))[0] for each in begun())
    return fit_observed(elements, wanted, swept, limits, weights=own, watch=watch)


def _places(
    splits: Sequence[Format], shape: Sequence[int], known: np.ndarray, hadamard: bool
) -> list[Sequence[np.ndarray]]:
    modes = np.unravel_index(known, tuple(shape))
    if hadamard or len(splits) == 1:
        return [modes] * len(splits)
    digits = [np.unravel_index(place, [split.sizes[mode] for split in splits]) for mode, place in enumerate(modes)]
    return [[each[k] for each in digits] for k in range(len(splits))]


def _by_sweeps(
    elements: ObservedElements,
    wanted: np.ndarray,
    start: Mapping[str, np.ndarray],
    limits: Limits,
    roots: np.ndarray,
    watch: Seen,
) -> ObservedFit:
    history = list[float]()

    def seen(count: int, error: float) -> Any:
        history.append(error)
        return watch(count, error)

    arrays, error, converged = sweeps_on_observed(elements, wanted, start, limits, roots, seen)
    return ObservedFit(arrays, error if math.isfinite(error) else math.inf, converged, tuple(history), len(history))
