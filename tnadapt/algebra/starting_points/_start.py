"""The contract of a start: the values x_0 of the trained arrays at which training begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError

from ..sources import Stream

__all__ = ["PREFIX", "Start", "StartPlace"]

#: Plans and files have x_0 of an array under the array's name after this.
PREFIX = "start."


class StartPlace(NamedTuple):
    """One group, as integers: a start checks with it whether it can compute x_0.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        The network's arrays, by its names: ``"split0.factor0"``.
    sizes : tuple of int
        Sizes of the folded group.
    weights : tuple of (int, int)
        Shapes of the weights of which the group has elements.
    size : int
        Number of elements of the group.
    scale : float
        What the network's sum of products is multiplied by.
    plain : bool
        Whether the network is one matrix product ``factor0 @ factor1.T``, of which both factors are trained, and no map
        F follows.
    """

    shapes: Mapping[str, tuple[int, ...]]
    sizes: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]
    size: int
    scale: float
    plain: bool

    @property
    def is_lora(self) -> bool:
        """Whether the group is LoRA of one whole weight."""
        (rows, cols), *others = self.weights
        return self.plain and not others and self.sizes == (rows, cols) and self.size == math.prod(self.sizes)


class Start:
    """Where training begins. A subclass is registered under the name by which ``Config.start`` refers to it.

    Attributes
    ----------
    subtracts : bool
        Whether ``ΔW = net(x) - net(x_0)``. If False, x_0 itself must give ΔW = 0.
    needs_base : bool
        Whether :meth:`arrays` computes x_0 from the base weights; :meth:`tnadapt.SuperLoRA.with_base`.
    brought : bool
        Whether the caller may bring x_0, of all arrays or of some: ``SuperLoRA(…, start_from=…)``. It is stored in
        files.
    leaves_zero : bool
        Whether one array of each term is zero in x_0, unless it is brought or F is nonlinear.
    """

    subtracts: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    brought: ClassVar[bool] = False
    leaves_zero: ClassVar[bool] = True

    def check(self, place: StartPlace) -> None:
        """Raise a ConfigError if a group cannot begin like this. Default: any group can."""

    def arrays(self, place: StartPlace, base: np.ndarray, stream: Stream) -> dict[str, np.ndarray]:
        """Compute x_0 of a group from its base weights.

        Parameters
        ----------
        place : StartPlace
        base : ndarray of float64
            The group's base weights, folded to ``place.sizes``.
        stream : Stream
            Random words that belong to this group.

        Returns
        -------
        dict of str to ndarray
            One for each of ``place.shapes``.
        """
        raise ConfigError(
            f"start {type(self).__name__} does not define arrays(place, base, stream), which computes the initial "
            "values; define it, or set needs_base = False"
        )
