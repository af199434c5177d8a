"""Targets of an adapter: rows of a matrix, in whatever shape the model stores that matrix.

A target consists of integers and names only and works with any array library: torch modules and checkpoints on disk are
updated through the same views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends.backend import Array
from tnadapt.errors import TargetError, escaped, integer, safe_repr

from .row_sets import MAX_SIZE, RowIndices, Rows

__all__ = ["ROLES", "RowIndices", "Rows", "Target"]

ROLES = ("q", "k", "v", "o", "linear", "conv", "embedding")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One weight to update, as a view of a stored parameter.

    Parameters
    ----------
    module : str
        Dotted path of the module that holds the parameter; empty for the model itself.
    stored : tuple of int
        Shape of the parameter as the model stores it: ``(out, in)``, ``(in, out)`` if transposed, or ``(out, in, …)``
        for a convolution; with the number of matrices before it where ``index`` is given.
    role : {"q", "k", "v", "o", "linear", "conv", "embedding"}
        The role of the weight in its module.
    parameter : str
        The parameter's name in its module.
    rows : Rows or RowIndices, optional
        Output rows to update; all of them if None.
    transposed : bool
        Whether the parameter is stored as ``(in, out)``, as transformers' Conv1D does.
    layer : str
        Key of the layer, for ``groups="layer"``.
    index : int, optional
        For a parameter that stacks matrices along its first axis, as experts are kept: which one of them it is.
    tied : tuple of str
        Other dotted paths of the same parameter (tied weights), whose modules apply the update, too.
    groups : int
        For a convolution whose channels are in groups: their number. The shape does not tell it, so that it is 1 where
        only the shapes are known, as to :func:`tnadapt.extract`.

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
    rows: Rows | RowIndices | None = None
    transposed: bool = False
    layer: str = ""
    index: int | None = None
    tied: tuple[str, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("module", "parameter", "layer"):
            if not isinstance(getattr(self, name), str):
                raise TargetError(f"a target's {name} must be a string; got {safe_repr(getattr(self, name))}")
        if not self.parameter:
            raise TargetError("a target's parameter must be a name, such as 'weight'; got ''")
        if not isinstance(self.role, str) or self.role not in ROLES:
            raise TargetError(f"a target's role must be one of {', '.join(ROLES)}; got {safe_repr(self.role)}")
        if not isinstance(self.transposed, bool):
            raise TargetError(f"a target's transposed must be True or False; got {safe_repr(self.transposed)}")
        if not isinstance(self.stored, (tuple, list)) or not 2 <= len(self.stored) <= 8:
            raise TargetError(f"a target's stored shape must be two to eight sizes; got {safe_repr(self.stored)}")
        stored = tuple(integer("a size of a stored shape", size, 1, MAX_SIZE, TargetError) for size in self.stored)
        object.__setattr__(self, "stored", stored)
        self._check_index()
        self._check_tied()
        groups = integer(f"the groups of {self.name}", self.groups, 1, MAX_SIZE, TargetError)
        object.__setattr__(self, "groups", groups)
        if groups > 1 and (len(stored) < 3 or self.index is not None or stored[0] % groups):
            raise TargetError(
                f"groups are those of a convolution's channels and divide them; {self.name} has shape {stored}, and "
                f"groups={groups}"
            )
        if self.transposed and len(self.matrix_sizes) != 2:
            raise TargetError(f"a transposed weight must be a matrix; {self.name} has shape {stored}")
        if self.rows is not None:
            self._check_rows(self.out)

    def _check_index(self) -> None:
        if self.index is None:
            return
        if len(self.stored) != 3:
            raise TargetError(f"an index selects one of the matrices of a 3-D weight; {self.name} has {self.stored}")
        index = integer(f"the index of {self.name}", self.index, 0, self.stored[0] - 1, TargetError)
        object.__setattr__(self, "index", index)

    def _check_tied(self) -> None:
        if not isinstance(self.tied, (tuple, list)) or not all(isinstance(name, str) and name for name in self.tied):
            raise TargetError(f"a target's tied names must be a list of dotted paths; got {safe_repr(self.tied)}")
        if len({self.name, *self.tied}) <= len(self.tied):
            raise TargetError(f"a target's tied names must be different ones; got {safe_repr(self.tied)}")
        object.__setattr__(self, "tied", tuple(self.tied))

    def _check_rows(self, out: int) -> None:
        if isinstance(self.rows, RowIndices):
            if self.rows.numbers[-1] >= out:
                raise TargetError(f"row {self.rows.numbers[-1]} is not among the {out} rows of {self.name}")
            if len(self.rows.numbers) == out:
                object.__setattr__(self, "rows", None)
            return
        if not isinstance(self.rows, (tuple, list)) or len(self.rows) != 4:
            raise TargetError(f"a target's rows must be (start, length, stride, count); got {safe_repr(self.rows)}")
        start, length, stride, count = (
            integer(f"rows of {self.name}", number, low, MAX_SIZE, TargetError)
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
        rare = {"index": None, "tied": (), "groups": 1}
        own = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        settings = (f"{name}={value!r}" for name, value in own if name not in rare or value != rare[name])
        return escaped(f"Target({', '.join(settings)})")

    @property
    def name(self) -> str:
        """The parameter's dotted path, as in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def label(self) -> str:
        """The name with the index and the rows, where there are any: no two targets of an adapter have the same.

        Examples
        --------
        >>> Target("experts", (8, 6, 4), parameter="down_proj", index=3).label
        'experts.down_proj[3]'
        """
        found = self.name if self.index is None else f"{self.name}[{self.index}]"
        if isinstance(self.rows, RowIndices):
            more = ", …" if self.rows.number > 1 else ""
            return f"{found}[{self.rows.numbers[0]}{more}]"
        return found if self.rows is None else f"{found}[{self.rows.start}:{self.rows.start + self.rows.length}]"

    @property
    def is_whole(self) -> bool:
        """Whether the target is the whole stored parameter."""
        return self.rows is None and self.index is None

    @property
    def matrix_sizes(self) -> tuple[int, ...]:
        """The stored shape of the weight itself, without the number of matrices that are stacked with it."""
        return self.stored if self.index is None else self.stored[1:]

    def tied_targets(self) -> list[Target]:
        """Return the same rows of the same parameter under its other names."""
        places = [name.rpartition(".") for name in self.tied]
        return [dataclasses.replace(self, module=path, parameter=name, tied=()) for path, _, name in places]

    def of_matrix(self) -> Target:
        """Return the target as one of the single matrix that its index selects."""
        return dataclasses.replace(self, stored=self.matrix_sizes, index=None)

    @property
    def out(self) -> int:
        """Number of rows of the whole weight, which are output features."""
        return self.matrix_sizes[-1 if self.transposed else 0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the update, in torch's order (out_features, in_features)."""
        cols = self.matrix_sizes[0] if self.transposed else math.prod(self.matrix_sizes[1:])
        if self.rows is None:
            return self.out, cols
        return self.rows.number, cols

    @checks_arguments
    def renamed(self, module: str) -> Target:
        """Return the same view of a parameter of another module."""
        return dataclasses.replace(self, module=module)

    @checks_arguments
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

        Raises
        ------
        TargetError
            If the rows are a list of indices, of which there is no view: use :meth:`select` and :meth:`write`.
        """
        if isinstance(self.rows, RowIndices):
            raise TargetError(f"there is no view of a list of rows, as of {self.name}: use select() and write()")
        matrix = self._matrix(stored)
        out, cols = matrix.shape
        rows = self.rows or Rows(0, out, out)
        return matrix.reshape((rows.count, rows.stride, cols))[:, rows.start : rows.start + rows.length]

    @checks_arguments
    def select(self, stored: Array) -> Array:
        """Return the weight as a ``(rows, cols)`` matrix, a view of the stored array if possible."""
        if isinstance(self.rows, RowIndices):
            return self._matrix(stored)[self.rows.indices()]
        return self.block(stored).reshape(self.shape)

    @checks_arguments
    def write(self, stored: Array, matrix: Array) -> None:
        """Write a ``(rows, cols)`` matrix of the same dtype to the weight's place in a stored array.

        Examples
        --------
        >>> import numpy as np
        >>> stored = np.zeros((4, 2))
        >>> Target("embed", (4, 2), rows=RowIndices([0, 3])).write(stored, np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> stored.tolist()
        [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]
        """
        if isinstance(self.rows, RowIndices):
            self._matrix(stored)[self.rows.indices()] = matrix
        else:
            self.block(stored)[...] = self.like_block(matrix)

    def _matrix(self, stored: Array) -> Array:
        """Return the whole weight as an ``(out, cols)`` view of the stored array."""
        if tuple(stored.shape) != self.stored:
            raise TargetError(f"stored must have the shape {self.stored} of {self.name}; got {tuple(stored.shape)}")
        own = stored if self.index is None else stored[self.index]
        matrix = own.T if self.transposed else own
        return matrix if matrix.ndim == 2 else matrix.reshape((matrix.shape[0], -1))

    @checks_arguments
    def like_block(self, matrix: Array) -> Array:
        """Reshape a ``(rows, cols)`` array to the shape of :meth:`block`."""
        rows, cols = self.shape
        if math.prod(matrix.shape) != rows * cols:
            raise TargetError(f"matrix must have the shape {(rows, cols)} of an update; got {tuple(matrix.shape)}")
        count = self.rows.count if isinstance(self.rows, Rows) else 1
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
            rest["rows"] = self.rows.to_json()
        if self.transposed:
            rest["transposed"] = True
        if self.layer:
            rest["layer"] = self.layer
        if self.index is not None:
            rest["index"] = self.index
        if self.tied:
            rest["tied"] = list(self.tied)
        if self.groups > 1:
            rest["groups"] = self.groups
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
        known = {"parameter", "rows", "transposed", "layer", "index", "tied", "groups"}
        if not isinstance(rest, Mapping) or not known.issuperset(rest):
            raise TargetError(f"a target's settings must be among {', '.join(sorted(known))}; got {safe_repr(rest)}")
        rows = rest.get("rows")
        if isinstance(rows, Mapping):
            if rows.keys() != {"indices"} or not isinstance(rows["indices"], (list, tuple)):
                raise TargetError(f"a target's rows must be four integers, or indices; got {safe_repr(rows)}")
            rest = {**rest, "rows": RowIndices(tuple(rows["indices"]))}
        return cls(value[0], value[1], value[2], **rest)
