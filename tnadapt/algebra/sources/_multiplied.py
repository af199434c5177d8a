"""Base class of arrays that are another source's array times trained multipliers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._source import Place, Source

__all__ = [
    "Mixed",
    "Multiplied",
    "Scaled",
]


# -- Base class of arrays that are another source's array times trained multipliers ------------------------------------


@dataclasses.dataclass(frozen=True)
class Multiplied(Source):
    """A factor A of shape (d, r) times trained arrays, its multipliers; linear in A and in each multiplier.

    A subclass names the multipliers, and defines their shapes, their initial values and the product.

    Parameters
    ----------
    of : Source
        Source of A: usually frozen; a trained or tied one is trained as well.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.
    """

    of: Source

    def __post_init__(self) -> None:
        if not isinstance(self.of, Source) or isinstance(self.of, Multiplied):
            raise ConfigError(
                f"of must be a source, for {type(self).__name__} one without trained diagonals or matrices; got "
                f"{safe_repr(self.of)}"
            )

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Names of the multipliers, in order; ``split0.factor0.size`` is the multiplier ``size`` of an array."""
        raise NotImplementedError

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each multiplier of an array."""
        raise NotImplementedError

    @property
    def starts(self) -> dict[str, float]:
        """Initial value of each multiplier, where it is not the one that has to be zero; 1 changes nothing."""
        raise NotImplementedError

    @property
    def zero(self) -> str | None:
        """The multiplier that starts at zero by the settings; None if there is none."""
        return next((name for name, value in self.starts.items() if value == 0.0), None)

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return the multiplier of an array of this shape that multiplies by ``value``, in float32."""
        return np.full(self.multiplier_shapes(shape)[name], value, np.float32)

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if len(place.shape) != 2:
            raise ConfigError(
                f"{type(self).__name__} is for factors, of shape (size, rank); {place.name!r} has the shape "
                f"{place.shape}: give another source"
            )

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return what the initialization needs to know of a multiplier.

        Parameters
        ----------
        name : str
        columns : int
            The number of columns of A that an element of the update sums over.
        shape : tuple of int
            Of A.

        Returns
        -------
        entries, products : int
            How many entries of the multiplier an element of the update sums over, and of how many products of an entry
            of A and entries of the multipliers an entry of the product is a sum.
        """
        raise NotImplementedError

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute the array times its multipliers, which are given by name."""
        raise NotImplementedError

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the gradients of A and of each multiplier, from that of the product."""
        raise NotImplementedError


# -- Arrays that are another source's array times a trained square matrix ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixed(Multiplied):
    """A factor times a trained square matrix: ``A J``, whose columns are mixtures of those of A.

    J is the array ``split0.factor0.mix``, of shape (r, r). It starts at the identity, or at zero if it falls to this
    array to make ΔW zero at the start (:mod:`tnadapt.algebra.init`).

    Parameters
    ----------
    of : Source
        Source of A, a factor of shape (d, r): usually frozen, as in CRAFT.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.sources import Mixed, Seeded
    >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources={"factor0": Mixed(Seeded("orthonormal"))}), [(6, 4)])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2), 'group0.split0.factor1': (4, 2)}
    """

    @property
    def multipliers(self) -> tuple[str, ...]:
        """The matrix alone: ``mix``."""
        return ("mix",)

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the matrix."""
        return {"mix": (shape[1], shape[1])}

    @property
    def starts(self) -> dict[str, float]:
        """The matrix starts at 1 times the identity."""
        return {"mix": 1.0}

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return ``value`` times the identity."""
        return np.eye(shape[1], dtype=np.float32) * np.float32(value)

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """See :meth:`Multiplied.touched`: a column of the product has all columns of A."""
        return columns * shape[1], shape[1]

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute ``A J``."""
        return backend.matmul(array, multipliers["mix"])

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return ``G Jᵀ`` and ``Aᵀ G``."""
        return gradient @ multipliers["mix"].T, {"mix": array.T @ gradient}


# -- Arrays that are another source's array times trained diagonals ----------------------------------------------------


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
