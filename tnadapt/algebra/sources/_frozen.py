"""The frozen arrays of one group: computed by their sources when they are first used, or brought by the caller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.errors import ConfigError, TnadaptError, safe_repr

from .._dtype_rounding import rounded_to
from ._source import Source, Stream

__all__ = ["FrozenArray", "FrozenArrays"]


class FrozenArray(NamedTuple):
    """One frozen array: what computes it.

    Attributes
    ----------
    full : str
        Name of the array in the plan's ``frozen_shapes``; that of the array it is tied to, if it is.
    source : Source
    shape : tuple of int
    stream : Stream
    """

    full: str
    source: Source
    shape: tuple[int, ...]
    stream: Stream

    def compute(self, stream: Stream | None = None) -> np.ndarray:
        """Compute the array in float32, or raise a ConfigError that names it; with another stream if one is given."""
        source, shape = self.source, self.shape
        try:
            found = np.asarray(source.array(shape, self.stream if stream is None else stream))
        except TnadaptError:
            raise
        except Exception as error:  # whatever another package raises
            raise ConfigError(
                f"{safe_repr(source)} failed to compute {self.full!r}: {type(error).__name__}: {error}"
            ) from error
        if found.shape != shape or found.dtype.kind != "f":
            raise ConfigError(
                f"{safe_repr(source)} must compute floating-point numbers of shape {shape} for {self.full!r}; it "
                f"returned {found.dtype} of shape {found.shape}"
            )
        with np.errstate(over="ignore"):
            single = found.astype(np.float32)
        if not np.isfinite(single).all():
            raise ConfigError(
                f"{safe_repr(source)} computes NaN, infinity, or numbers beyond float32 for {self.full!r}"
            )
        if not single.any():
            raise ConfigError(
                f"{safe_repr(source)} computes only zeros for {self.full!r}, so that nothing could be trained"
            )
        return single


class FrozenArrays(FixedArrays):
    """The frozen arrays of one group, by the network's names.

    Parameters
    ----------
    entries : mapping of str to FrozenArray
    given : mapping of str to ndarray, optional
        Arrays that are not computed, by their full names, in float32.

    Examples
    --------
    >>> FrozenArrays({}).entries
    {}
    """

    def __init__(self, entries: Mapping[str, FrozenArray], given: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.entries = dict(entries)
        self._given = {} if given is None else given  # filled in later if it is empty
        self._squares: dict[str, float] = {}  # of arrays that depend on the seed alone, which never change

    def make(self, key: Any) -> np.ndarray:
        """Return an array in float32, by its name, or by (name, dtype) with its values rounded to that dtype."""
        if isinstance(key, tuple):
            name, dtype = key
            rounded = rounded_to(self.make(name), dtype)
            if not np.isfinite(rounded).all():
                raise ConfigError(
                    f"{safe_repr(self.entries[name].source)} computes numbers for {name!r} that {dtype} cannot "
                    "represent; use float32"
                )
            return rounded
        entry = self.entries[key]
        given = self._given.get(entry.full)
        if given is not None:
            return given[tuple(map(slice, entry.shape))]
        if entry.source.brought:
            raise ConfigError(
                f"{entry.full!r} is an array that the caller brings: tnadapt.SuperLoRA(…, given={{{entry.full!r}: "
                "array}), or tnadapt.torch.attach(…, given=…)"
            )
        if entry.source.needs_base:
            raise ConfigError(
                f"{entry.full!r} is computed from the base weights: bind the plan to them with "
                "plan.with_base(weights); on a model that was on the meta device, call adapter.reset() once it has "
                "its weights"
            )
        return entry.compute()

    def mean_square(self, name: str) -> float:
        """Return the mean square of an array, rounded to eight bits so that all machines agree."""
        return self._square(name, self.entries[name].source.mean_square(self.entries[name].shape))

    def expected_square(self, name: str) -> float:
        """Return the same of an array, but for any base; see :meth:`Source.expected_square`."""
        return self._square(name, self.entries[name].source.expected_square(self.entries[name].shape))

    def _square(self, name: str, known: float | None) -> float:
        if known is None:
            entry = self.entries[name]
            changes = entry.full in self._given or entry.source.brought or entry.source.needs_base
            known = None if changes else self._squares.get(name)
            if known is None:
                known = _mean_square(self.host(name))
                if not changes:
                    self._squares[name] = known
        mantissa, exponent = math.frexp(known)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)


def _mean_square(array: np.ndarray) -> float:
    wide = array.astype(np.float64).reshape(-1)
    return float(wide @ wide) / wide.size
