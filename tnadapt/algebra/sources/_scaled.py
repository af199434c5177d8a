"""Arrays that are another source's array times trained diagonals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._multiplied import Multiplied

__all__ = ["Scaled"]

# The diagonals, and the axis of the array that each one scales.
_AXES = {"size": 0, "rank": 1}


@dataclasses.dataclass(frozen=True)
class Scaled(Multiplied):
    """A factor times trained diagonals: ``diag(size) A diag(rank)``, or one of the two.

    Parameters
    ----------
    of : Source
        Source of A, a factor of shape (d, r): usually frozen, as in VeRA; a trained or tied one is trained as well.
    size : bool
        Whether the d rows have trained factors: the array ``split0.factor0.size``, of shape (d,).
    rank : bool
        Whether the r columns have trained factors: ``split0.factor0.rank``, of shape (r,).
    start : float or tuple of float, optional
        Initial value of the diagonals, or of each one (size, rank). By default 1; but if it falls to this array to make
        ΔW zero at the start (:mod:`tnadapt.algebra.init`), its first diagonal is 0. A start of 0 makes it the array
        that is zero; with two diagonals, ``start=0`` is ``(0, 1)``.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself scaled; if there is no diagonal; or the start is not a finite number, or
        has another number of values than there are diagonals, or more than one zero.

    Examples
    --------
    VeRA, where both factors are frozen and shared by all layers:

    >>> import tnadapt as tna
    >>> from tnadapt.sources import Scaled, Seeded
    >>> frozen = Seeded("uniform")
    >>> vera = {"factor0": Scaled(frozen), "factor1": Scaled(frozen, size=False, rank=True, start=0.1)}
    >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources=vera), [(6, 4)])
    >>> plan.param_shapes
    {'group0.split0.factor0.size': (6,), 'group0.split0.factor1.rank': (2,)}
    """

    size: bool = True
    rank: bool = False
    start: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _AXES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False; got {safe_repr(getattr(self, name))}")
        if not self.size and not self.rank:
            raise ConfigError("Scaled needs a diagonal: size=True, rank=True, or both")
        if self.start is None:
            return
        given = self.start if isinstance(self.start, tuple) else (self.start,)
        for number in given:
            known = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not known or not abs(number) <= 1e30:  # NaN is not either
                raise ConfigError(
                    "start must be a finite number of at most 1e30, a tuple of one per diagonal, or None; got "
                    f"{safe_repr(self.start)}"
                )
        if isinstance(self.start, tuple) and (len(given) != len(self.multipliers) or given.count(0.0) > 1):
            raise ConfigError(
                f"start={safe_repr(self.start)} must have one number for each of {', '.join(self.multipliers)}, at "
                "most one of them 0"
            )
        floats = tuple(map(float, given))
        object.__setattr__(self, "start", floats if isinstance(self.start, tuple) else floats[0])  # the class is frozen

    @property
    def starts(self) -> dict[str, float]:
        """Initial value of each diagonal, where it is not the one that has to be zero."""
        if isinstance(self.start, tuple):
            return dict(zip(self.multipliers, self.start, strict=True))
        first, *others = self.multipliers
        if self.start == 0.0:
            return {first: 0.0, **dict.fromkeys(others, 1.0)}
        return dict.fromkeys(self.multipliers, 1.0 if self.start is None else self.start)

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Names of the diagonals, in order: ``size``, ``rank``."""
        return tuple(name for name in _AXES if getattr(self, name))

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each diagonal of an array."""
        return {name: (shape[_AXES[name]],) for name in self.multipliers}

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """See :meth:`Multiplied.touched`: one entry for each column, or one for all of them."""
        return (columns if name == "rank" else 1), 1

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute the array times its diagonals, which are given by name."""
        for name in self.multipliers:
            own: Any = multipliers[name]
            array = array * backend.reshape(own, (-1, 1) if _AXES[name] == 0 else (1, -1))
        return array

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the gradients of A and of each diagonal."""
        wide = {name: multipliers[name].reshape((-1, 1) if _AXES[name] == 0 else (1, -1)) for name in self.multipliers}
        found = {}
        for name in self.multipliers:
            others = math.prod((own for other, own in wide.items() if other != name), start=np.float64(1.0))
            found[name] = (gradient * array * others).sum(axis=1 - _AXES[name])
        return gradient * math.prod(wide.values(), start=np.float64(1.0)), found
