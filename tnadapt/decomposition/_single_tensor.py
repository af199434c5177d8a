"""Fit the arrays of one format to one tensor, by the driver of the format or by the general solver.

CP, Tucker and trains have the drivers of :mod:`tnadapt.tensors`, each in a file of its own. Any other format is fitted
by its own ``fit``, or by :func:`fit_any`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tnadapt.algebra.folding import folded
from tnadapt.algebra.formats import CP, BatchedCP, Dense, Format, Permuted, TensorTrain, Tucker, WeightedCP
from tnadapt.algebra.products import padded_to
from tnadapt.backends import Array

from ._least_squares import Alternation
from .cp_als import fit_cp
from .fits import Fit, Iteration, Limits, all_of
from .hooi import fit_tucker
from .linear_algebra import Algebra
from .tt_svd import fit_train

Arrays = dict[str, Array]


def fit_format(
    algebra: Algebra,
    split: Format,
    tensor: Array,
    start: Mapping[str, Array] | None = None,
    limits: Limits | None = None,
) -> Fit:
    """Fit the arrays of a format to a tensor.

    Parameters
    ----------
    algebra : Algebra
    split : Format
        Any format.
    tensor : array, shape (d_1, …, d_M)
        It may have fewer rows in the first mode than the format; the arrays are then padded with zeros.
    start : mapping of str to array, optional
        Initial arrays of an alternating method.
    limits : Limits, optional

    Returns
    -------
    Fit
        Arrays with the format's shapes.
    """
    limits = limits or Limits()
    if algebra.squares(tensor) == 0.0:
        return Fit({name: algebra.zeros(shape) for name, shape in split.shapes.items()}, True, 0, "zero")
    if isinstance(split, Permuted):
        fit = fit_format(algebra, split.own, split.turned(algebra.backend, tensor), start, limits)
    elif type(split) in _SOLVERS:
        fit = _SOLVERS[type(split)](algebra, split, tensor, start, limits)
    else:
        format_fit = split.fit(algebra, tensor, start, limits)
        fit = fit_any(algebra, split, tensor, start, limits) if format_fit is None else format_fit
    arrays = {name: padded_to(algebra.backend, fit.arrays[name], shape) for name, shape in split.shapes.items()}
    return fit._replace(arrays=arrays)


# -- Dense -------------------------------------------------------------------------------------------------------------


def _dense(algebra: Algebra, split: Format, tensor: Array, start: Any, limits: Limits) -> Fit:
    return Fit({"dense": tensor}, True, 0, "exact")


# -- CP, Tucker and trains: fitted like by the public functions --------------------------------------------------------


# Sweeps over factors and cores gain little each. Unless only a few are made for a start, their tolerance is divided by
# the first number, and their iterations multiplied by the second: by default to those of ``cp`` and ``tensor_train``.
_PART, _TIMES, _FEW = 100.0, 2, 10


def _sweeps(limits: Limits) -> Iteration:
    if limits.iterations > _FEW:
        limits = Limits(limits.tol / _PART, _TIMES * limits.iterations)
    return Iteration(limits)


def _cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    factors, sizes, fit = _components(algebra, split.rank, tensor, start, limits)
    # Distribute the magnitude of a component equally over its factors.
    shared = algebra.array(sizes ** (1.0 / len(factors)))
    return fit._replace(arrays={f"factor{mode}": factor * shared for mode, factor in enumerate(factors)})


def _weighted_cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    if start is not None:
        start = {**start, "factor0": start["factor0"] * start["weights"]}
    factors, sizes, fit = _components(algebra, split.rank, tensor, start, limits)
    arrays = {f"factor{mode}": factor for mode, factor in enumerate(factors)}
    return fit._replace(arrays={"weights": algebra.array(sizes), **arrays})


def _batched_cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    """Fit each index of the leading mode on its own."""
    backend, sizes = algebra.backend, tensor.shape[1:]
    if len(sizes) < 2:
        return Fit({f"factor{len(sizes)}": tensor}, True, 0, "exact")
    cp = CP(sizes, split.rank)
    fits = [
        fit_format(
            algebra, cp, tensor[index],
            start and {f"factor{mode}": start[f"factor{mode + 1}"][index] for mode in range(len(sizes))}, limits,
        )
        for index in range(tensor.shape[0])
    ]  # fmt: skip
    arrays = {
        f"factor{mode + 1}": backend.concat(
            [backend.reshape(fit.arrays[f"factor{mode}"], (1, size, split.rank)) for fit in fits], axis=0
        )
        for mode, size in enumerate(sizes)
    }
    longest = max(fits, key=lambda fit: fit.iterations)
    stopped = next((fit.stopped for fit in fits if not fit.converged), longest.stopped)
    method = next((fit.method for fit in fits if fit.method != "zero"), "zero")
    return Fit(arrays, all_of(fit.optimal for fit in fits), longest.iterations, method, stopped)


def _components(
    algebra: Algebra, rank: int, tensor: Array, start: Any, limits: Limits
) -> tuple[list[Array], np.ndarray, Fit]:
    """Compute factors with unit columns and the magnitudes of ``rank`` components, or fewer if more are useless."""
    backend, shape = algebra.backend, tensor.shape
    rank = min(rank, math.prod(shape) // max(shape))
    init = "svd" if start is None else [start[f"factor{m}"][:size, :rank] for m, size in enumerate(shape)]
    fit = fit_cp(algebra, tensor, rank, _sweeps(limits), init=init)
    factors = [fit.arrays[f"factor{mode}"] for mode in range(len(shape))]
    norms = [algebra.columns(factor) for factor in factors]
    units = [
        factor * algebra.array(1.0 / np.where(norm > 1e-30, norm, 1.0))
        for factor, norm in zip(factors, norms, strict=True)
    ]
    sizes: np.ndarray = np.prod(norms, axis=0)
    if "weights" in fit.arrays:
        sizes = sizes * backend.to_numpy(fit.arrays["weights"])
    if not math.isfinite(fit.error) and fit.stopped == "singular":
        sizes = sizes * 0.0  # the fit has failed: the report shows the error
    return units, sizes, fit


def _tucker(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    sizes = tuple(int(size) for size in tensor.shape)
    if not split.modes:
        return Fit({"core": tensor}, True, 0, "exact")
    possible = _possible_ranks([min(r, d) for r, d in zip(split.core, sizes, strict=True)], split.modes)
    ranks = {mode: possible[mode] for mode in split.modes}
    init = None if start is None else {m: start[f"factor{m}"][: sizes[m], : ranks[m]] for m in ranks}
    return fit_tucker(algebra, tensor, ranks, Iteration(limits), init=init)


def _possible_ranks(ranks: list[int], modes: list[int]) -> tuple[int, ...]:
    """Reduce the ranks of a core to the product of the other ranks, except for modes without a factor."""
    before: list[int] = []
    while ranks != before:
        before = list(ranks)
        for mode in modes:
            ranks[mode] = min(ranks[mode], math.prod(ranks[:mode]) * math.prod(ranks[mode + 1 :]))
    return tuple(ranks)


def _tensor_train(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    ranks = [int(rank) for rank in split.ranks[1:-1]]
    return fit_train(algebra, tensor, ranks, _sweeps(limits))


_SOLVERS: dict[type[Format], Callable[[Algebra, Any, Array, Any, Limits], Fit]] = {
    Dense: _dense,
    CP: _cp,
    WeightedCP: _weighted_cp,
    BatchedCP: _batched_cp,
    Tucker: _tucker,
    TensorTrain: _tensor_train,
}


# -- Any other format: one array after another, from several starts ----------------------------------------------------

# Number of random starts for a small tensor, and its maximum size; larger ones have a single start.
_GENERAL_STARTS, _SMALL_GENERAL = 4, 1 << 14


def fit_any(algebra: Algebra, split: Format, tensor: Array, start: Mapping[str, Array] | None, limits: Limits) -> Fit:
    """Fit the arrays of a format to a tensor; return the best result of several starts.

    Parameters
    ----------
    algebra : Algebra
    split : Format
    tensor : array, shape (d_1, …, d_M)
        Not zero. It may have fewer rows in the first mode than the format; the other rows are then unconstrained.
    start : mapping of str to array, optional
        Initial arrays; random if None.
    limits : Limits

    Returns
    -------
    Fit
        Never marked optimal, as alternating least squares may end in a local minimum.
    """
    backend = algebra.backend
    box = [(0, int(size)) for size in tensor.shape]

    def forward(arrays: Mapping[str, Array]) -> Array:
        return backend.flatten(split.tensor(backend, arrays, box))

    def adjoint(arrays: Mapping[str, Array], vec: Array, name: str) -> Array:
        # Rows that the tensor does not have are not part of the problem, so they are zero in the adjoint.
        return split.adjoint(backend, arrays, folded(backend, vec, split.sizes))[name]

    sweeps, steps = Alternation(algebra, split.shapes, forward, adjoint, backend.flatten(tensor)), Iteration(limits)
    if start is not None:
        return sweeps.fit({name: start[name] for name in split.shapes}, steps)
    rng = algebra.rng
    best: Fit | None = None
    for _ in range(_GENERAL_STARTS if math.prod(tensor.shape) <= _SMALL_GENERAL else 1):
        begun = {name: algebra.array(rng.normal(size=shape)) for name, shape in split.shapes.items()}
        fit = sweeps.fit(begun, steps)
        if best is None or fit.error < best.error:
            best = fit
        if best.error <= 64.0 * algebra.eps:
            break
    assert best is not None
    return best._replace(iterations=len(steps.history), history=tuple(steps.history))
