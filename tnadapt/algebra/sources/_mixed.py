"""Arrays that are another source's array times a trained square matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._multiplied import Multiplied

__all__ = ["Mixed"]


@dataclasses.dataclass(frozen=True)
class Mixed(Multiplied):
    """A factor times a trained square matrix: ``A J``, whose columns are mixtures of those of A.

    J is the array ``split0.factor0.mix``, of shape (r, r). It starts at the identity, or at zero if it falls to this
    array to make ΔW zero at the start (:mod:`tnadapt.algebra.init`).

    Parameters
    ----------
    of : Source
        Source of A, a factor of shape (d, r): usually frozen, as in CRAFT.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.sources import Mixed, Seeded
    >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources={"factor0": Mixed(Seeded("orthonormal"))}), [(6, 4)])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2), 'group0.split0.factor1': (4, 2)}
    """

    @property
    def multipliers(self) -> tuple[str, ...]:
        """The matrix alone: ``mix``."""
        return ("mix",)

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the matrix."""
        return {"mix": (shape[1], shape[1])}

    @property
    def starts(self) -> dict[str, float]:
        """The matrix starts at 1 times the identity."""
        return {"mix": 1.0}

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return ``value`` times the identity."""
        return np.eye(shape[1], dtype=np.float32) * np.float32(value)

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """See :meth:`Multiplied.touched`: a column of the product has all columns of A."""
        return columns * shape[1], shape[1]

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute ``A J``."""
        return backend.matmul(array, multipliers["mix"])

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return ``G Jᵀ`` and ``Aᵀ G``."""
        return gradient @ multipliers["mix"].T, {"mix": array.T @ gradient}
