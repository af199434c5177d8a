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
    """

    seed: int
    group: int
    purpose: int


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
    A frozen array of random signs, scaled so that its rows have length 1:

    >>> import dataclasses
    >>> import numpy as np
    >>> from tnadapt.algebra import rng
    >>> from tnadapt.algebra.sources import Source
    >>> @dataclasses.dataclass(frozen=True)
    ... class Signs(Source):
    ...     def array(self, shape, stream):
    ...         signs = rng.signs(stream.seed, stream.group, 0, int(np.prod(shape)))
    ...         return signs.reshape(shape) / np.sqrt(np.float32(shape[-1]))
    >>> Signs().trained
    False
    """

    trained: ClassVar[bool] = False

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
