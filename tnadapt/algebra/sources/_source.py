"""The contract of a source: where the numbers of one array of a network come from."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from tnadapt.errors import ConfigError

__all__ = ["Source", "Stream"]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Random words that belong to one array: pass the fields to the draws of :mod:`tnadapt.algebra.rng`.

    Parameters
    ----------
    seed : int
        The config's.
    group : int
        Index of the group. A source whose arrays are the same in all groups uses 0 instead.
    purpose : int
        Different for each array of a group: ``2**16`` plus its position among the group's arrays.
    largest : tuple of int, optional
        The largest size of the array along each axis, over all groups of the plan. A source whose array is the same in
        all groups computes it at these sizes, and returns the leading elements along each axis.
    """

    seed: int
    group: int
    purpose: int
    largest: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the numbers of one array of a network come from.

    A subclass is a frozen dataclass whose fields are its settings. They are written into adapter files, so that their
    values must be ``None``, booleans, numbers, strings, or tuples of these.

    Attributes
    ----------
    trained : bool
        Whether the array is a parameter. If False, the array is frozen: it is not counted, trained or stored, and
        :meth:`array` computes it.

    Examples
    --------
    A frozen array of normal numbers:

    >>> import dataclasses
    >>> import numpy as np
    >>> from tnadapt.algebra import rng
    >>> from tnadapt.algebra.sources import Source
    >>> @dataclasses.dataclass(frozen=True)
    ... class Normal(Source):
    ...     def array(self, shape, stream):
    ...         size = int(np.prod(shape))
    ...         return rng.normals(stream.seed, stream.group, stream.purpose, 0, size).reshape(shape)
    >>> Normal().trained
    False
    """

    trained: ClassVar[bool] = False

    @property
    def independent_of_group(self) -> bool:
        """Whether :meth:`array` does not depend on the group: groups of equal shapes then share one copy."""
        return False

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """Compute the numbers of a frozen array.

        Parameters
        ----------
        shape : tuple of int
        stream : Stream
            The array's random words.

        Returns
        -------
        ndarray of float32
            Finite, of the given shape. A function of the arguments and the source's fields alone, with the same bits on
            every machine: the array is recomputed wherever it is needed.
        """
        raise ConfigError(
            f"source {type(self).__name__} does not define array(shape, stream), which computes a frozen array; define "
            "it, or set trained = True"
        )
