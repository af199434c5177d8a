"""The frozen arrays of one group: computed by their sources when they are first used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.backends.backend import FixedArrays
from tnadapt.errors import ConfigError

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
        Of the frozen arrays.
    seed, group : int

    Examples
    --------
    >>> FrozenArrays({"split0.dense": (2, 3)}, {}, seed=0, group=0).sources
    {}
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source], seed: int, group: int
    ) -> None:
        super().__init__()
        self.sources = dict(sources)
        self._shapes, self._seed, self._group = shapes, seed, group

    def make(self, key: Any) -> np.ndarray:
        """Compute one array, float32, by name."""
        source, shape = self.sources[key], self._shapes[key]
        stream = Stream(self._seed, self._group, PURPOSE["source"] + list(self._shapes).index(key))
        made = np.asarray(source.array(shape, stream))
        if made.shape != shape or made.dtype.kind != "f" or not np.isfinite(made).all():
            raise ConfigError(
                f"{source!r} must return finite floating-point numbers of shape {shape} for {key!r}; it returned "
                f"{made.dtype} of shape {made.shape}"
            )
        return made.astype(np.float32)
