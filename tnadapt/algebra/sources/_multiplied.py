"""Base class of arrays that are another source's array times trained multipliers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._source import Place, Source

__all__ = ["Multiplied"]


@dataclasses.dataclass(frozen=True)
class Multiplied(Source):
    """A factor A of shape (d, r) times trained arrays, its multipliers; linear in A and in each multiplier.

    A subclass names the multipliers, and defines their shapes, their initial values and the product.

    Parameters
    ----------
    of : Source
        Source of A: usually frozen; a trained or tied one is trained as well.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.
    """

    of: Source

    def __post_init__(self) -> None:
        if not isinstance(self.of, Source) or isinstance(self.of, Multiplied):
            raise ConfigError(
                f"of must be a source, for {type(self).__name__} one without trained diagonals or matrices; got "
                f"{safe_repr(self.of)}"
            )

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Names of the multipliers, in order; ``split0.factor0.size`` is the multiplier ``size`` of an array."""
        raise NotImplementedError

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each multiplier of an array."""
        raise NotImplementedError

    @property
    def starts(self) -> dict[str, float]:
        """Initial value of each multiplier, where it is not the one that has to be zero; 1 changes nothing."""
        raise NotImplementedError

    @property
    def zero(self) -> str | None:
        """The multiplier that starts at zero by the settings; None if there is none."""
        return next((name for name, value in self.starts.items() if value == 0.0), None)

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return the multiplier of an array of this shape that multiplies by ``value``, in float32."""
        return np.full(self.multiplier_shapes(shape)[name], value, np.float32)

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if len(place.shape) != 2:
            raise ConfigError(
                f"{type(self).__name__} is for factors, of shape (size, rank); {place.name!r} has the shape "
                f"{place.shape}: give another source"
            )

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return what the initialization needs to know of a multiplier.

        Parameters
        ----------
        name : str
        columns : int
            The number of columns of A that an element of the update sums over.
        shape : tuple of int
            Of A.

        Returns
        -------
        entries, products : int
            How many entries of the multiplier an element of the update sums over, and of how many products of an entry
            of A and entries of the multipliers an entry of the product is a sum.
        """
        raise NotImplementedError

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute the array times its multipliers, which are given by name."""
        raise NotImplementedError

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the gradients of A and of each multiplier, from that of the product."""
        raise NotImplementedError
