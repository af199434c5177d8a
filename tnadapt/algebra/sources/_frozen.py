"""The frozen arrays of one group: computed by their sources when they are first used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.backends.backend import FixedArrays
from tnadapt.errors import ConfigError, TnadaptError, safe_repr

from .._dtype_rounding import rounded_to
from ..rng import PURPOSE
from ._source import Source, Stream

__all__ = ["FrozenArrays"]


class FrozenArrays(FixedArrays):
    """The frozen arrays of one group, by name.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        All arrays of the group's network, in order: the position of an array selects its random words.
    sources : mapping of str to Source
        Sources of the frozen arrays.
    seed, group : int
    largest : mapping of str to tuple of int, optional
        The largest size of each frozen array along each axis, over all groups; by default its own sizes.

    Examples
    --------
    >>> FrozenArrays({"split0.dense": (2, 3)}, {}, seed=0, group=0).sources
    {}
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, Source],
        seed: int,
        group: int,
        largest: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.sources = dict(sources)
        self._shapes, self._seed, self._group = shapes, seed, group
        self._largest = largest or shapes
        self._numbers = {name: number for number, name in enumerate(shapes)} if sources else {}

    def make(self, key: Any) -> np.ndarray:
        """Compute an array in float32, by its name, or by (name, dtype) to round its values to that dtype."""
        if isinstance(key, tuple):
            name, dtype = key
            rounded = rounded_to(self.make(name), dtype)
            if not np.isfinite(rounded).all():
                raise ConfigError(
                    f"{safe_repr(self.sources[name])} computes numbers for {name!r} that {dtype} cannot represent; use "
                    "float32"
                )
            return rounded
        source, shape = self.sources[key], self._shapes[key]
        stream = Stream(self._seed, self._group, PURPOSE["source"] + self._numbers[key], self._largest[key])
        try:
            found = np.asarray(source.array(shape, stream))
        except TnadaptError:
            raise
        except Exception as error:  # whatever another package raises
            raise ConfigError(
                f"{safe_repr(source)} failed to compute {key!r}: {type(error).__name__}: {error}"
            ) from error
        if found.shape != shape or found.dtype.kind != "f":
            raise ConfigError(
                f"{safe_repr(source)} must compute floating-point numbers of shape {shape} for {key!r}; it returned "
                f"{found.dtype} of shape {found.shape}"
            )
        with np.errstate(over="ignore"):
            single = found.astype(np.float32)
        if not np.isfinite(single).all():
            raise ConfigError(f"{safe_repr(source)} computes NaN, infinity, or numbers beyond float32 for {key!r}")
        if not single.any():
            raise ConfigError(f"{safe_repr(source)} computes only zeros for {key!r}, so that nothing could be trained")
        return single

    def mean_square(self, name: str) -> float:
        """Return the mean square of an array, rounded to eight bits so that all machines agree."""
        wide = self.host(name).astype(np.float64).reshape(-1)
        mantissa, exponent = math.frexp(float(wide @ wide) / wide.size)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)
