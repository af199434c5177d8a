"""Alternating least squares on observed elements: one array of a network after another, row by row.

An element depends on one row of each array, and linearly. With the other arrays fixed, the rows of an array are small
least-squares problems that do not depend on each other. A sweep costs as much as a few gathered rows of all arrays for
each observed element, so that it suits large problems.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._fit import Limits
from ._observed_elements import ObservedElements

__all__ = ["sweeps_on_observed"]

Arrays = dict[str, np.ndarray]

# Ridge relative to the mean diagonal of a row's equations, which may be singular.
_RIDGE = 1e-12


def sweeps_on_observed(
    elements: ObservedElements,
    wanted: np.ndarray,
    start: Mapping[str, np.ndarray],
    limits: Limits,
    roots: np.ndarray | None = None,
    watch: Callable[[int, float], Any] = lambda *_: None,
) -> tuple[Arrays, float, bool]:
    """Run sweeps until one reduces the relative error by no more than the tolerance.

    Parameters
    ----------
    elements : ObservedElements
    wanted : ndarray, shape (n,)
        Not all zero.
    start : mapping of str to ndarray
    limits : Limits
    roots : ndarray, shape (n,), optional
        Square roots of the weights.
    watch : callable
        Called with each sweep's number and relative error; stops the iteration if it returns True.

    Returns
    -------
    arrays : dict of str to ndarray
    error : float
        Relative to the norm of the weighted elements.
    converged : bool
    """
    roots = np.ones(elements.count) if roots is None else roots
    kind = np.result_type(wanted.dtype, np.float64)
    arrays = {name: np.array(start[name], kind) for name in elements.shapes}
    groups = {name: _by_row(rows) for name, rows in elements.rows_of_arrays().items()}
    norm = float(np.linalg.norm(wanted * roots))

    def residual() -> np.ndarray:
        return np.asarray((wanted - elements.values(elements.flat(arrays))) * roots)

    left = residual()
    error = float(np.linalg.norm(left)) / norm
    for sweep in range(1, limits.iterations + 1):
        for name, (order, edges, chosen) in groups.items():
            rows = (elements.derivative(arrays, name) * roots[:, None])[order]
            steps = _steps(rows, left[order], edges)
            flat = arrays[name].reshape(-1)
            flat[elements.positions(name)[chosen]] += steps
            left[order] -= np.einsum("nw,nw->n", rows, np.repeat(steps, np.diff(edges), axis=0))
        left = residual()
        before, error = error, float(np.linalg.norm(left)) / norm
        if watch(sweep, error) is True:
            return arrays, error, False
        if before - error <= limits.tol:
            return arrays, error, True
    return arrays, error, False


def _by_row(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an order of the elements by their row of an array, where each row begins, and which rows there are."""
    order = np.argsort(rows, kind="stable")
    chosen, first = np.unique(rows[order], return_index=True)
    return order, np.append(first, len(rows)), chosen


def _steps(rows: np.ndarray, left: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Solve the least-squares problem of each row of an array for its change."""
    width, parts = rows.shape[1], list(itertools.pairwise(edges))
    grams = np.stack([rows[a:b].conj().T @ rows[a:b] for a, b in parts])
    rights = np.stack([rows[a:b].conj().T @ left[a:b] for a, b in parts])
    size = np.trace(grams, axis1=1, axis2=2).real / width
    shift = np.where(size > 0.0, _RIDGE * size, 1.0)
    found: np.ndarray = np.linalg.solve(grams + shift[:, None, None] * np.eye(width), rights[:, :, None])[:, :, 0]
    return found
