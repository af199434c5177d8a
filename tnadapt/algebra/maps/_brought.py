"""Base class of maps before the network with an array that the caller brings."""

from __future__ import annotations

import numpy as np

from tnadapt.errors import ConfigError, ShapeError

from ._map import Map

__all__ = ["BroughtMap"]


class BroughtMap(Map):
    """A map with one array that the caller brings and files store; ``Config.before`` takes it, alone.

    Attributes
    ----------
    brings : str
        Name of the array: a plan calls it ``theta.`` and this name.
    """

    brings: str = ""
    _brought: np.ndarray | None = None

    @property
    def brought_shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        raise self._lacks("brought_shape")

    def bring(self, array: np.ndarray, label: str = "the array") -> None:
        """Set the array; raise a ConfigError or ShapeError that names it by ``label`` if it does not fit.

        Parameters
        ----------
        array : ndarray, shape ``brought_shape``
            Finite float32 numbers.
        label : str
        """
        if array.shape != self.brought_shape:
            raise ShapeError(f"{label} has shape {array.shape}; expected {self.brought_shape}")
        self.check(array, label)
        self._brought = array
        self.kept.clear()

    def check(self, array: np.ndarray, label: str) -> None:
        """Raise a ConfigError if the values do not fit. Default: all do."""

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random array that fits, for what depends on shapes alone."""
        raise self._lacks("stand_in(rng)")

    @property
    def brought(self) -> np.ndarray:
        """The array."""
        if self._brought is None:
            raise ConfigError(
                f"map {self.kind!r} has no {self.brings} yet, an array of shape {self.brought_shape}: use "
                f"Config(before={self.kind!r}), whose plan takes it as given={{'theta.{self.brings}': array}}"
            )
        return self._brought
