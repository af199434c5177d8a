"""A random start: no array is zero."""

from __future__ import annotations

from typing import ClassVar

from ._start import Start

__all__ = ["RandomStart"]


class RandomStart(Start):
    """Random arrays drawn from the seed, none of which is zero; multipliers start where their sources say, or at one.

    The arrays are those of :mod:`tnadapt.algebra.init` without its zero. All of them have a gradient from the first
    step, as ΔW is ``net(x) - net(x_0)``.
    """

    leaves_zero: ClassVar[bool] = False
