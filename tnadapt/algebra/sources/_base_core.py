"""The frozen core of the higher-order singular value decomposition of the base weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from tnadapt.errors import ConfigError

from ._source import Place, Source, Stream

__all__ = ["BaseCore"]


@dataclasses.dataclass(frozen=True)
class BaseCore(Source):
    """The core of a Tucker decomposition of the group's base weights: ``W ×_0 U_0ᵀ ×_1 U_1ᵀ …``.

    The factors U of all modes are computed from the base, too: ``FromBase("mode")``, or :class:`Mixed` of it. With
    orthonormal factors, ``core ×_0 U_0 ×_1 U_1 …`` is the projection of the base weights to their subspaces: the
    truncated higher-order SVD, or CRAFT's frozen tensor. Computed in float64 from the factors in float32, and rounded.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import BaseCore, FromBase, Mixed
    >>> sources = {"core": BaseCore(), "factor0": Mixed(FromBase("rows")), "factor1": FromBase("cols")}
    >>> plan = tna.SuperLoRA(tna.Config(format="tucker", rank=2, sources=sources), [(6, 4)])
    >>> plan = plan.with_base([np.diag([3.0, 2.0, 1.0, 0.5, 0.0, 0.0])[:, :4]])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2)}
    >>> plan.deltas({"group0.split0.factor0.mix": np.eye(2)})[0].diagonal().round(4)[:2].tolist()
    [3.0, 2.0]
    """

    needs_base: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if place.projection:
            raise ConfigError(
                f"BaseCore makes {place.name!r} of the base weights, and a projection follows the network, so that the "
                "two have no rows and columns in common: use projection='identity'"
            )
        if place.name.rpartition(".")[2] != "core" or len(place.shape) != len(place.sizes):
            raise ConfigError(
                f"BaseCore is for the core of format='tucker'; {place.name!r} has the shape {place.shape}"
            )

    def expected_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.expected_square`: every slice of the first mode has singular values of 1."""
        return 1.0 / max(shape[1:] or shape)

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        assert stream.base is not None  # the plan gives both to a source that needs them
        found = stream.base
        for mode, factor in stream.factors.items():
            wide = factor.astype(np.float64)
            found = np.moveaxis(np.tensordot(wide.T, found, axes=(1, mode)), 0, mode)
        return np.ascontiguousarray(found, np.float32)
