"""Starts of LoRA's two factors that are computed from the base weight."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from tnadapt.errors import ConfigError

from ..sources import Stream
from ._start import Start, StartPlace

__all__ = ["FactorStart"]

_LEFT, _RIGHT = "split0.factor0", "split0.factor1"


class FactorStart(Start):
    """The base of starts that choose B and A so that their product is a part of the base weight.

    A subclass defines :meth:`factors`. Both factors are divided by the square root of the scale s = alpha / rank, so
    that ``s B A`` is that part whatever s is.
    """

    needs_base: ClassVar[bool] = True

    @property
    def _name(self) -> str:
        return type(self).__name__

    def check(self, place: StartPlace) -> None:
        """See :meth:`Start.check`."""
        if not place.is_lora:
            raise ConfigError(
                f"start={self._name.lower()!r} makes LoRA's two factors of one base weight: it needs format='cp', "
                "order=2, fold='stack', groups='weight', and no splits, terms, projection or sources, as "
                f"tnadapt.presets.lora(rank) has them; got a group with the arrays {', '.join(place.shapes)} folded to "
                f"{place.sizes} for weights of {', '.join(map(str, place.weights[:4]))}. Use start='zero', or compute "
                "arrays yourself and use start='given'"
            )
        rank, most = place.shapes[_LEFT][1], min(place.sizes)
        if rank > most:
            raise ConfigError(
                f"start={self._name.lower()!r} needs rank singular vectors of a weight of {place.sizes}, which has "
                f"{most}; got rank={rank}: use rank={most} or less"
            )

    def arrays(self, place: StartPlace, base: np.ndarray, stream: Stream) -> dict[str, np.ndarray]:
        """See :meth:`Start.arrays`."""
        what = f"start={self._name.lower()!r} of group {stream.group}"
        if not np.isfinite(base).all():
            raise ConfigError(f"{what} is computed from the base weight, which holds NaN or infinity")
        left, right = self.factors(base, place.shapes[_LEFT][1], stream, what)
        root = math.sqrt(place.scale)
        return {_LEFT: left / root, _RIGHT: right / root}

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the two factors, (rows, rank) and (cols, rank), for a scale of 1.

        Parameters
        ----------
        matrix : ndarray of float64
            The base weight, finite.
        rank : int
        stream : Stream
        what : str
            Name of what is computed, for messages.
        """
        raise NotImplementedError
