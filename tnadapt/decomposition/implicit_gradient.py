"""Derivative of an iterative decomposition, by the implicit function theorem at the optimum that it has reached.

The arrays X of a network N are a stationary point of ``‖N(X) - T‖² / 2``: ``Jᵀ (N(X) - T) = 0``, with the Jacobian J.
The derivative of that equation is ``H dX = Jᵀ dT``, with the Hessian ``H = JᵀJ + R·N''`` for the residual R = N(X) - T.
Different arrays represent the same tensor, so H is singular along their changes. Only functions that do not depend on
this choice, such as the tensor itself, have a derivative.

The rule knows nothing of the method that found the arrays: it applies to any solver and any network.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence

import numpy as np

from tnadapt.errors import BackendError

from .fits import Contraction

# The Hessian is formed: with more parameters it would take minutes.
_PARAMETERS = 2048
# Elements of the tensors of a batch of directions.
_BATCH = 1 << 22
# Eigenvalues of this size, relative to the largest one, are zero: squares of singular values of J, and values of H.
_NULL = 1e-11
# Steps of Newton's method, and how far they may lead, relative to the tensor: from arrays that a solver reports as
# converged, and from others. The error is flat at its minimum, so in float32 a solver gets no closer than this; the
# gradient is then accurate to a few percent, because the cotangents belong to the arrays that the solver found.
_STEPS, _NEAR, _NEARER = 20, 4e-3, 1e-5

_WAY = "detach the tensor: tensor.detach(), or jax.lax.stop_gradient(tensor)"


def implicit_gradient(
    contraction: Contraction,
    arrays: Sequence[np.ndarray],
    tensor: np.ndarray,
    cotangents: Sequence[np.ndarray],
    fixed: Collection[int],
    epsilon: float,
    converged: bool,
    ridge: float = 0.0,
) -> np.ndarray:
    """Return the gradient with respect to a tensor, given that with respect to the arrays fitted to it.

    Parameters
    ----------
    contraction : Contraction
    arrays : sequence of ndarray
        Near a local minimum of the error.
    tensor : ndarray
    cotangents : sequence of ndarray
        The gradient with respect to each array.
    fixed : collection of int
        Positions of arrays that do not depend on the tensor.
    epsilon : float
        Machine epsilon of the dtype in which the arrays were computed.
    converged : bool
        Whether a solver stopped because it improved no more.
    ridge : float
        Of a CP tensor, the penalty of its fit: see :func:`tnadapt.cp`.

    Returns
    -------
    ndarray of float64

    Raises
    ------
    BackendError
        If the arrays are not near a minimum, the minimum is not isolated, or the cotangents depend on which of the
        arrays that represent the same tensor were found; for complex arrays, or more than 2,048 parameters.

    Notes
    -----
    Newton's method moves the arrays to the minimum first, in float64, as a solver stops before it. Costs a
    decomposition of a symmetric matrix of all parameters for each of its steps.
    """
    if any(np.iscomplexobj(array) for array in (tensor, *arrays)):
        raise BackendError(f"a decomposition of complex numbers that iterates is not differentiated: {_WAY}")
    problem = _NetworkDerivatives(contraction, arrays, tensor, fixed, ridge)
    if problem.size > _PARAMETERS:
        raise BackendError(
            f"the gradient of a decomposition that iterates needs a square matrix of its {problem.size} parameters; "
            f"at most {_PARAMETERS} are supported: use a closed form (max_iterations=0), or {_WAY}"
        )
    vec, cotangent = problem.flat(arrays), problem.flat(cotangents)
    basis = problem.effective(vec)
    # If more changes than usual have no effect, as in a zero component, the minimum is not isolated.
    elsewhere = problem.effective(np.random.RandomState(0).normal(size=problem.size))
    if not problem.tensor.any() or basis.shape[1] < elsewhere.shape[1]:
        raise _not_isolated()
    redundant = np.linalg.norm(cotangent - basis @ (basis.T @ cotangent))
    if redundant > max(1e-6, 100.0 * epsilon) * np.linalg.norm(cotangent):
        raise BackendError(
            "this function of a decomposition depends on which of the arrays that represent the same tensor are found, "
            "so that it has no derivative: differentiate what the arrays represent, such as to_tensor(), entries() or "
            f"norm(), or {_WAY}"
        )
    vec, basis, hessian = _minimum(problem, vec, _NEAR if converged else max(_NEARER, 1e3 * epsilon))
    values, vectors = np.linalg.eigh(hessian)
    if values[0] <= _NULL * values[-1]:
        raise _not_isolated()
    change = basis @ (vectors @ ((vectors.T @ (basis.T @ cotangent)) / values))
    gradient = np.asarray(problem.moved(vec, change[None])[0])
    if ridge:
        # The scale of the penalty depends on the tensor, too.
        growth = problem.exponent * float(change @ problem.penalty(vec)[0])
        gradient = gradient - growth * problem.tensor / float(np.sum(problem.tensor**2))
    return gradient


def _not_isolated() -> BackendError:
    return BackendError(
        "the decomposition is not an isolated minimum of the error, as of a tensor of zeros or of lower rank, so that "
        f"it has no derivative there: use another rank, init or random_state, or {_WAY}"
    )


def _minimum(problem: _NetworkDerivatives, vec: np.ndarray, near: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the minimum near given parameters, a basis of the changes that have an effect, and H in that basis."""
    begun, scale = problem.network(vec), np.linalg.norm(problem.tensor)
    for _ in range(_STEPS):
        basis = problem.effective(vec)
        hessian = basis.T @ problem.hessian(vec, second=True) @ basis
        step = basis @ np.linalg.lstsq(hessian, basis.T @ problem.slope(vec), rcond=None)[0]
        if np.linalg.norm(problem.moved(vec, step[None])) <= 1e-11 * scale:
            return vec, basis, hessian
        vec = vec - step
        if not np.linalg.norm(problem.network(vec) - begun) <= near * scale:
            break
    raise BackendError(
        "the decomposition has not converged to a minimum of the error, so that it has no derivative: use a smaller "
        f"tol, such as 1e-10, and a larger max_iterations (or sweeps), in float64, or {_WAY}"
    )


class _NetworkDerivatives:
    """Derivatives of ``‖N(X) - T‖² / 2`` and a penalty with respect to the free arrays of a network, as one vector."""

    def __init__(
        self,
        contraction: Contraction,
        arrays: Sequence[np.ndarray],
        tensor: np.ndarray,
        fixed: Collection[int],
        ridge: float,
    ) -> None:
        self.indices, self.out = contraction
        self.arrays = [np.asarray(array, np.float64) for array in arrays]
        self.tensor = np.asarray(tensor, np.float64)
        self.free = [place for place in range(len(arrays)) if place not in fixed]
        self.edges = np.cumsum([0, *(self.arrays[place].size for place in self.free)]).tolist()
        self.size = self.edges[-1]
        # Weights of components have no mode.
        self.factors = sum(len(self.indices[place]) > 1 for place in self.free)
        self.exponent = 2.0 - 2.0 / max(self.factors, 1)
        self.ridge = ridge * float(np.linalg.norm(self.tensor)) ** self.exponent
        # The index of a batch of directions.
        self.batch = 1 + max(itertools.chain(self.out, *self.indices))

    def flat(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(arrays[place], np.float64).reshape(-1) for place in self.free])

    def _parts(self, vec: np.ndarray) -> dict[int, np.ndarray]:
        """Split the last axis of a vector, or of a batch of vectors, into the free arrays."""
        return {
            place: vec[..., start:stop].reshape(*vec.shape[:-1], *self.arrays[place].shape)
            for place, (start, stop) in zip(self.free, itertools.pairwise(self.edges), strict=True)
        }

    def _all(self, vec: np.ndarray) -> list[np.ndarray]:
        parts = self._parts(vec)
        return [parts.get(place, array) for place, array in enumerate(self.arrays)]

    def _contract(self, operands: Sequence[tuple[np.ndarray, list[int]]], out: list[int]) -> np.ndarray:
        flat = itertools.chain.from_iterable(operands)
        return np.asarray(np.einsum(*flat, out, optimize=True))  # type: ignore[call-overload]

    def network(self, vec: np.ndarray) -> np.ndarray:
        return self._contract(list(zip(self._all(vec), self.indices, strict=True)), self.out)

    def moved(self, vec: np.ndarray, ways: np.ndarray) -> np.ndarray:
        """Compute J times each row of ``ways``: one tensor each."""
        operands = list(zip(self._all(vec), self.indices, strict=True))
        terms = []
        for place, way in self._parts(ways).items():
            changed = (way, [self.batch, *self.indices[place]])
            terms.append(self._contract([*operands[:place], changed, *operands[place + 1 :]], [self.batch, *self.out]))
        return np.asarray(functools.reduce(np.add, terms))

    def _pulled(self, vec: np.ndarray, tensors: np.ndarray) -> np.ndarray:
        """Compute Jᵀ times each of a batch of tensors."""
        operands = list(zip(self._all(vec), self.indices, strict=True))
        gradients = []
        for place in self.free:
            others = [*operands[:place], *operands[place + 1 :], (tensors, [self.batch, *self.out])]
            gradients.append(self._contract(others, [self.batch, *self.indices[place]]).reshape(len(tensors), -1))
        return np.concatenate(gradients, axis=1)

    def slope(self, vec: np.ndarray) -> np.ndarray:
        slope = self._pulled(vec, (self.network(vec) - self.tensor)[None])[0]
        return np.asarray(slope + self.penalty(vec)[0] if self.ridge else slope)

    def penalty(self, vec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and second derivatives of half the penalty of a CP tensor.

        With the norm c of a component and M free factors of equal norms, it is ``M ridge c^(2/M)``, however the norm is
        distributed.
        """
        blocks, squares = [], []
        for place, (start, stop) in zip(self.free, itertools.pairwise(self.edges), strict=True):
            columns = vec[start:stop].reshape(-1, self.arrays[place].shape[-1])
            squares.append(np.sum(columns**2, axis=0))
            block, count = np.zeros((columns.shape[1], self.size)), columns.shape[1]
            for r in range(count):
                block[r, start + r : stop : count] = columns[:, r] / squares[-1][r]
            blocks.append(block)
        norms = np.prod(squares, axis=0) ** 0.5
        weights, logs = self.ridge * norms ** (2.0 / self.factors), np.sum(blocks, axis=0)
        second = (2.0 / self.factors) * (logs.T * weights) @ logs
        for (start, stop), block, square in zip(itertools.pairwise(self.edges), blocks, squares, strict=True):
            second -= 2.0 * (block.T * weights) @ block
            second[range(start, stop), range(start, stop)] += np.tile(weights / square, (stop - start) // len(square))
        return weights @ logs, second

    def effective(self, vec: np.ndarray) -> np.ndarray:
        """Return an orthonormal basis of the changes of the parameters that change the tensor."""
        values, vectors = np.linalg.eigh(self.hessian(vec, second=False))
        return np.asarray(vectors[:, values > _NULL * values[-1]])

    def hessian(self, vec: np.ndarray, second: bool) -> np.ndarray:
        """Compute JᵀJ, with the second derivatives of the network if ``second``."""
        count = max(1, _BATCH // max(self.tensor.size, self.size))
        rows = [
            self._row(vec, np.eye(self.size)[start : start + count], second) for start in range(0, self.size, count)
        ]
        hessian = np.concatenate(rows)
        if second and self.ridge:
            hessian = hessian + self.penalty(vec)[1]
        return np.asarray(hessian + hessian.T) / 2.0

    def _row(self, vec: np.ndarray, ways: np.ndarray, second: bool) -> np.ndarray:
        row = self._pulled(vec, self.moved(vec, ways))
        if not second:
            return row
        arrays, parts = self._all(vec), self._parts(ways)
        residual = (self.network(vec) - self.tensor, self.out)
        blocks = []
        for place in self.free:
            block = np.zeros((len(ways), self.arrays[place].size))
            for other in self.free:
                if other != place:
                    operands = [
                        (parts[other], [self.batch, *indices]) if number == other else (array, indices)
                        for number, (array, indices) in enumerate(zip(arrays, self.indices, strict=True))
                        if number != place
                    ]
                    kept = [self.batch, *self.indices[place]]
                    block += self._contract([*operands, residual], kept).reshape(len(ways), -1)
            blocks.append(block)
        return row + np.concatenate(blocks, axis=1)
