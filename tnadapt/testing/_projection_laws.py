"""The laws of one projection F: its dense matrix, its adjoint and its slices."""

from __future__ import annotations

import copy

import numpy as np

from tnadapt.algebra.maps.projection import Projection
from tnadapt.backends import Backend

from . import _reference_maps as reference_maps
from ._law import Law, LawCollector, relative_error

__all__ = ["of_projection"]


def of_projection(label: str, f: Projection, backend: Backend, rng: np.random.Generator) -> list[Law]:
    """Check the laws of one projection on one library."""
    collector = LawCollector(label, backend)
    matrix = reference_maps.matrix_of(f.map)
    host = rng.normal(size=f.n_in)
    x = backend.asarray(host, "float64")
    expected: np.ndarray = matrix @ host
    slope = np.ones_like(expected)
    if not f.linear:
        expected, slope = reference_maps.tanhshrink(expected), np.tanh(expected) ** 2
    collector.add("F = its dense matrix", [relative_error(backend.to_numpy(f(x)), expected)])
    y = rng.normal(size=f.n_out)
    adjoint = backend.to_numpy(f.adjoint(backend.asarray(y, "float64"), at=x))
    collector.add("F's adjoint = its matrix transposed", [relative_error(adjoint, matrix.T @ (slope * y))])
    other = rng.normal(size=f.n_in)
    forward, back = float((slope * (matrix @ other)) @ y), float(other @ adjoint)
    size = float(np.linalg.norm(slope * (matrix @ other)) * np.linalg.norm(y)) or 1.0
    collector.add("<F x, y> = <x, Fᵀ y>", [abs(forward - back) / size])
    errors = []
    for _ in range(2):
        start, stop = sorted(rng.choice(f.n_out + 1, 2, replace=False).tolist())
        fresh = copy.deepcopy(f)  # without the draws
        for projection in (f, fresh):  # with draws in memory, and with draws for the slice only
            part = backend.to_numpy(projection.slice(x, start, stop))
            errors.append(float(np.max(np.abs(part - expected[start:stop]))) / (float(np.max(np.abs(expected))) or 1.0))
    collector.add("a slice of F = F's", errors)
    return collector.found
