"""Frozen factors made of the base weights: bases of their dominant singular subspaces."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from tnadapt.errors import ConfigError, safe_repr

from .. import rng
from ._source import Place, Source, Stream
from ._subspace import EXTRA, dominant_basis

__all__ = ["FromBase"]

_SIDES = ("rows", "cols", "mode")


@dataclasses.dataclass(frozen=True)
class FromBase(Source):
    """A frozen factor: an orthonormal basis of a dominant singular subspace of the group's base weights.

    Parameters
    ----------
    side : {"rows", "cols", "mode"}
        ``"rows"`` for left, ``"cols"`` for right singular vectors of the weight, or of a stack of weights (weights,
        rows, cols) unfolded along that mode. ``"mode"`` is the array's own mode, of a tensor of any order (HOSVD).
    vectors : bool
        Whether the columns are the singular vectors themselves, from the largest singular value down, each with its
        largest entry positive. By default the columns are another basis of the same subspace, which does not depend on
        the machine's LAPACK.

    Raises
    ------
    ConfigError
        If the side is unknown or ``vectors`` is not a boolean.

    Notes
    -----
    The subspace has as many dimensions as the array has columns. It is computed in float64 by
    four passes of subspace iteration from seeded normal numbers (:mod:`tnadapt.algebra.sources._subspace`) and rounded
    to float32: the same bits on one machine, and equal to about 1e-6 between machines. It costs ``8 d n (r + 8)``
    multiply-adds for a weight of d × n.

    A plan counts without the base weights; arrays need them: :meth:`tnadapt.SuperLoRA.with_base`.
    :func:`tnadapt.torch.attach` takes them from the model. A file stores the fingerprint of the base, or, with
    ``save(…, store_bases=True)``, the arrays.

    Examples
    --------
    LoRA-XS, which trains an r × r matrix between them:

    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import FromBase
    >>> bases = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    >>> config = tna.Config(format="tucker", rank=2, sources=bases)
    >>> plan = tna.SuperLoRA(config, [(6, 4)]).with_base([np.arange(24.0).reshape(6, 4) ** 2])
    >>> plan.param_shapes, plan.deltas({"group0.split0.core": np.eye(2)})[0].shape
    ({'group0.split0.core': (2, 2)}, (6, 4))
    """

    side: str
    vectors: bool = False

    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.side, str) or self.side not in _SIDES:
            raise ConfigError(f"side must be one of {', '.join(map(repr, _SIDES))}; got {safe_repr(self.side)}")
        if not isinstance(self.vectors, bool):
            raise ConfigError(f"vectors must be True or False; got {safe_repr(self.vectors)}")

    def _mode(self, place: Place) -> int:
        """Return the mode along which the base is unfolded."""
        order = len(place.sizes)
        if self.side == "mode":
            assert place.mode is not None  # checked before
            return place.mode
        if order not in (2, 3):
            raise ConfigError(
                f"FromBase({self.side!r}) needs matrices, or a stack (weights, rows, cols), and the group is folded to "
                f"{place.sizes}: use FromBase('mode')"
            )
        return order - (2 if self.side == "rows" else 1)

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if place.projection:
            raise ConfigError(
                f"FromBase makes {place.name!r} of the base weights, and a projection follows the network, so that the "
                "two have no rows and columns in common: use projection='identity'"
            )
        if place.mode is None:
            raise ConfigError(
                f"FromBase makes factors of shape (size of a mode, rank), and {place.name!r} of shape {place.shape} is "
                "none: use format='cp', 'cp-weighted' or 'tucker' with splits=1 or combine='hadamard'"
            )
        mode = self._mode(place)
        size, rank = place.shape
        if size != place.sizes[mode]:
            raise ConfigError(
                f"FromBase({self.side!r}) gives vectors of {place.sizes[mode]} elements, and {place.name!r} has "
                f"{size} rows: use the other side, or 'mode'"
            )
        most = min(size, math.prod(place.sizes) // size)
        if rank > most:
            raise ConfigError(
                f"FromBase({self.side!r}) needs {rank} singular vectors for {place.name!r}, and a base weight folded "
                f"to {place.sizes} has {most} at most along that mode: use rank={most} or less"
            )

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        assert stream.base is not None  # the plan gives it to a source that needs it
        base = stream.base
        order = base.ndim
        mode = stream.mode if self.side == "mode" else order - (2 if self.side == "rows" else 1)
        assert mode is not None  # checked by the plan
        matrix = np.moveaxis(base, mode, 0).reshape(base.shape[mode], -1)
        rows, rank = shape
        width = min(rank + EXTRA, rows)
        drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, rows * width)
        normals = drawn.astype(np.float64).reshape(rows, width)
        what = f"FromBase({self.side!r}) of group {stream.group}"
        return dominant_basis(matrix, normals, rank, self.vectors, what).astype(np.float32)

    def mean_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.mean_square`: the columns have norm 1."""
        return 1.0 / shape[0]
