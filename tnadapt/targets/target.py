"""Targets of an adapter: rows of a matrix, in whatever shape the model stores that matrix.

A target consists of integers and names only and works with any array library: torch modules and checkpoints on disk are
updated through the same views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.backends.backend import Array
from tnadapt.errors import TargetError, escaped, integer, safe_repr

__all__ = ["ROLES", "Rows", "Target"]

ROLES = ("q", "k", "v", "o", "linear", "conv")

_MAX = 1 << 62


class Rows(NamedTuple):
    """Rows ``start`` to ``start + length - 1`` of each of ``count`` blocks of ``stride`` rows.

    Attributes
    ----------
    start, length, stride, count : int
        One block is a plain slice, for q, k and v stored one after another. Several blocks are for q, k and v
        interleaved head by head, as in GPT-NeoX and BLOOM.

    Examples
    --------
    >>> Rows(0, 2, 6, 3).indices()  # q of three heads of size 2
    [0, 1, 6, 7, 12, 13]
    """

    start: int
    length: int
    stride: int
    count: int = 1  # type: ignore[assignment]  # hides tuple.count

    def indices(self) -> list[int]:
        """Return the indices of all rows, in order."""
        return [
            block * self.stride + row
            for block in range(self.count)
            for row in range(self.start, self.start + self.length)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One weight to update, as a view of a stored parameter.

    Parameters
    ----------
    module : str
        Dotted path of the module that holds the parameter; empty for the model itself.
    stored : tuple of int
        Shape of the parameter as the model stores it: ``(out, in)``, ``(in, out)`` if transposed, or ``(out, in, …)``
        for a convolution.
    role : {"q", "k", "v", "o", "linear", "conv"}
        The role of the weight in its module.
    parameter : str
        The parameter's name in its module.
    rows : Rows, optional
        Output rows to update; all of them if None.
    transposed : bool
        Whether the parameter is stored as ``(in, out)``, as transformers' Conv1D does.
    layer : str
        Key of the layer, for ``groups="layer"``.

    Raises
    ------
    TargetError
        If a field has the wrong type or the rows do not fit the weight.

    Examples
    --------
    >>> import numpy as np
    >>> v = Target("blocks.0.attn.qkv", (6, 4), "v", rows=Rows(4, 2, 6))
    >>> v.shape
    (2, 4)
    >>> stored = np.zeros((6, 4))
    >>> v.block(stored)[...] = 1.0
    >>> stored[:, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """

    module: str
    stored: tuple[int, ...]
    role: str = "linear"
    parameter: str = "weight"
    rows: Rows | None = None
    transposed: bool = False
    layer: str = ""

    def __post_init__(self) -> None:
        for name in ("module", "parameter", "layer"):
            if not isinstance(getattr(self, name), str):
                raise TargetError(f"a target's {name} must be a string; got {safe_repr(getattr(self, name))}")
        if not self.parameter:
            raise TargetError("a target's parameter must be a name, such as 'weight'; got ''")
        if self.role not in ROLES:
            raise TargetError(f"a target's role must be one of {', '.join(ROLES)}; got {safe_repr(self.role)}")
        if not isinstance(self.transposed, bool):
            raise TargetError(f"a target's transposed must be True or False; got {safe_repr(self.transposed)}")
        if not isinstance(self.stored, (tuple, list)) or not 2 <= len(self.stored) <= 8:
            raise TargetError(f"a target's stored shape must be two to eight sizes; got {safe_repr(self.stored)}")
        stored = tuple(integer("a size of a stored shape", size, 1, _MAX, TargetError) for size in self.stored)
        object.__setattr__(self, "stored", stored)
        if self.transposed and len(stored) != 2:
            raise TargetError(f"a transposed weight must be a matrix; {self.name} has shape {stored}")
        if self.rows is not None:
            self._check_rows(stored[-1] if self.transposed else stored[0])

    def _check_rows(self, out: int) -> None:
        if not isinstance(self.rows, (tuple, list)) or len(self.rows) != 4:
            raise TargetError(f"a target's rows must be (start, length, stride, count); got {safe_repr(self.rows)}")
        start, length, stride, count = (
            integer(f"rows of {self.name}", number, low, _MAX, TargetError)
            for number, low in zip(self.rows, (0, 1, 1, 1), strict=True)
        )
        if start + length > stride or stride * count != out:
            raise TargetError(
                f"rows {start} to {start + length - 1} of {count} blocks of {stride} do not fit the {out} rows "
                f"of {self.name}"
            )
        whole = (start, length, stride) == (0, stride, stride)
        object.__setattr__(self, "rows", None if whole else Rows(start, length, stride, count))

    def __repr__(self) -> str:
        settings = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return escaped(f"Target({', '.join(settings)})")

    @property
    def name(self) -> str:
        """The parameter's dotted path, as in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the update, in torch's order (out_features, in_features)."""
        if self.transposed:
            cols, out = self.stored
        else:
            out, cols = self.stored[0], math.prod(self.stored[1:])
        return (out if self.rows is None else self.rows.length * self.rows.count), cols

    def renamed(self, module: str) -> Target:
        """Return the same view of a parameter of another module."""
        return dataclasses.replace(self, module=module)

    def block(self, stored: Array) -> Array:
        """Return the weight as a view of the stored array, of shape ``(blocks, rows per block, cols)``.

        Writing into the view writes into the stored array (which must be contiguous for a convolution).

        Parameters
        ----------
        stored : array
            Of shape ``self.stored``.

        Returns
        -------
        array, shape (count, length, cols)
            ``(1, rows, cols)`` if the rows are not interleaved.
        """
        matrix = stored.T if self.transposed else stored
        if matrix.ndim > 2:
            matrix = matrix.reshape((matrix.shape[0], -1))
        out, cols = matrix.shape
        rows = self.rows or Rows(0, out, out)
        return matrix.reshape((rows.count, rows.stride, cols))[:, rows.start : rows.start + rows.length]

    def select(self, stored: Array) -> Array:
        """Return the weight as a ``(rows, cols)`` matrix, a view of the stored array if possible."""
        return self.block(stored).reshape(self.shape)

    def like_block(self, matrix: Array) -> Array:
        """Reshape a ``(rows, cols)`` array to the shape of :meth:`block`."""
        rows, cols = self.shape
        count = 1 if self.rows is None else self.rows.count
        return matrix.reshape((count, rows // count, cols))

    def to_list(self) -> list[Any]:
        """Return the target as a short list for JSON, which :meth:`from_list` reads.

        Examples
        --------
        >>> q = Target("attn.qkv", (6, 4), "q", rows=Rows(0, 2, 6))
        >>> Target.from_list(q.to_list()) == q
        True
        """
        found: list[Any] = [self.module, list(self.stored), self.role]
        rest: dict[str, Any] = {}
        if self.parameter != "weight":
            rest["parameter"] = self.parameter
        if self.rows is not None:
            rest["rows"] = list(self.rows)
        if self.transposed:
            rest["transposed"] = True
        if self.layer:
            rest["layer"] = self.layer
        return [*found, rest] if rest else found

    @classmethod
    def from_list(cls, value: Sequence[Any]) -> Target:
        """Return the target of a list that :meth:`to_list` wrote.

        Raises
        ------
        TargetError
            If the list does not describe a target.
        """
        if not isinstance(value, (list, tuple)) or not 3 <= len(value) <= 4:
            raise TargetError(
                f"a target must be [module, shape, role] and at most its settings; got {safe_repr(value)}"
            )
        rest = value[3] if len(value) == 4 else {}
        known = {"parameter", "rows", "transposed", "layer"}
        if not isinstance(rest, Mapping) or not known.issuperset(rest):
            raise TargetError(f"a target's settings must be among {', '.join(sorted(known))}; got {safe_repr(rest)}")
        return cls(value[0], value[1], value[2], **rest)
