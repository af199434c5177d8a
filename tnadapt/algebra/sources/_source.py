"""The contract of a source: where the numbers of one array of a network come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError

__all__ = ["Place", "Source", "Stream"]


class Place(NamedTuple):
    """One array of a network, as integers: a source checks with it whether it can compute the array.

    Attributes
    ----------
    name : str
        The network's name of the array: ``"split0.factor1"``.
    shape : tuple of int
    mode : int or None
        The mode of the folded group whose factor it is, counted from 0, if the array is a matrix of shape
        ``(sizes[mode], rank)``; None for a core, weights, a dense tensor, and a factor of a Kronecker split.
    sizes : tuple of int
        Sizes of the folded group.
    projection : bool
        Whether a map F other than the identity follows the network.
    """

    name: str
    shape: tuple[int, ...]
    mode: int | None
    sizes: tuple[int, ...]
    projection: bool


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a source may use to compute an array: random words that belong to it, and the base weights.

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
    base : ndarray of float64, optional
        The group's base weights, folded to the sizes of its network; only for a source that ``needs_base``.
    mode : int, optional
        The array's mode; see :class:`Place`.
    factors : mapping of int to ndarray
        The group's frozen factors without their multipliers, by their modes; only for a source that ``needs_factors``.
    """

    seed: int
    group: int
    purpose: int
    largest: tuple[int, ...] | None = None
    base: np.ndarray | None = dataclasses.field(default=None, compare=False)
    mode: int | None = None
    factors: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the numbers of one array of a network come from.

    A subclass is a frozen dataclass whose fields are its settings. They are written into adapter files, so that their
    values must be ``None``, booleans, numbers, strings, sources, or tuples of these.

    Attributes
    ----------
    trained : bool
        Whether the array is a parameter. If False, the array is frozen: it is not counted or trained, and
        :meth:`array` computes it.
    needs_base : bool
        Whether :meth:`array` needs the base weights. Plans count without them; arrays need
        :meth:`tnadapt.SuperLoRA.with_base`.
    needs_factors : bool
        Whether :meth:`array` also needs the factors of the same split, all of which must be computed from the base.
    brought : bool
        Whether the caller brings the array: ``SuperLoRA(…, given={name: array})``. It is stored in files.

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
    needs_base: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    brought: ClassVar[bool] = False

    @property
    def independent_of_group(self) -> bool:
        """Whether :meth:`array` does not depend on the group: groups of equal shapes then share one copy."""
        return False

    def check(self, place: Place) -> None:
        """Raise a ConfigError if the source cannot be that of an array. Default: any array will do.

        Parameters
        ----------
        place : Place
        """

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """Compute the numbers of a frozen array.

        Parameters
        ----------
        shape : tuple of int
        stream : Stream
            The array's random words, and the base weights if the source needs them.

        Returns
        -------
        ndarray of float32
            Finite, of the given shape. A function of the arguments and the source's fields alone, with the same bits on
            every machine: the array is recomputed wherever it is needed. (A source that needs the base weights may
            differ between machines by rounding.)
        """
        raise ConfigError(
            f"source {type(self).__name__} does not define array(shape, stream), which computes a frozen array; define "
            "it, or set trained = True"
        )

    def mean_square(self, shape: tuple[int, ...]) -> float | None:
        """Return the mean square of the array if it is known without computing it; None otherwise."""
        return None

    def expected_square(self, shape: tuple[int, ...]) -> float | None:
        """Return the same for the units of training, which are those of any base; None to compute the array.

        A source that needs the base weights, and whose mean square depends on them, returns that for usual weights.
        """
        return self.mean_square(shape)
