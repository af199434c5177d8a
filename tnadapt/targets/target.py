"""Target: a weight to adapt, as rows of a matrix in whatever shape the model stores it; and the check for overlaps.

A target consists of integers and names only and works with any array library: torch modules and checkpoints on disk are
updated through the same views.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.backends import Array
from tnadapt.errors import TargetError, escaped, safe_repr

# -- Rows of a weight: a repeated pattern of them, or a list -----------------------------------------------------------


#: The largest size and index that a target may have.
MAX_SIZE = 1 << 62


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

    @property
    def number(self) -> int:
        """Number of rows."""
        return self.length * self.count

    def to_json(self) -> list[int]:
        """Return what a file has for them."""
        return list(self)

    def indices(self) -> list[int]:
        """Return the indices of all rows, in order."""
        firsts = range(self.start, self.stride * self.count, self.stride)
        return [row for first in firsts for row in range(first, first + self.length)]


@dataclasses.dataclass(frozen=True, slots=True)
class RowIndices:
    """Rows by their indices, such as those of some tokens in an embedding.

    Parameters
    ----------
    numbers : sequence of int
        The indices, in increasing order.

    Raises
    ------
    TargetError
        If there is none, or they are not increasing integers.

    Examples
    --------
    >>> RowIndices([5, 9]).indices()
    [5, 9]
    """

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, (tuple, list, range)) or not self.numbers:
            raise TargetError(f"indices of rows must be a list of at least one integer; got {safe_repr(self.numbers)}")
        numbers = tuple(integer("an index of a row", number, 0, MAX_SIZE, TargetError) for number in self.numbers)
        for before, after in itertools.pairwise(numbers):
            if after <= before:
                raise TargetError(f"indices of rows must increase; {after} follows {before}")
        object.__setattr__(self, "numbers", numbers)

    @property
    def number(self) -> int:
        """Number of rows."""
        return len(self.numbers)

    def to_json(self) -> dict[str, list[int]]:
        """Return what a file has for them."""
        return {"indices": list(self.numbers)}

    def indices(self) -> list[int]:
        """Return the indices of all rows, in order."""
        return list(self.numbers)


# -- Targets -----------------------------------------------------------------------------------------------------------


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
        if self.index is not None:
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
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        settings = (f"{name}={value!r}" for name, value in fields if name not in rare or value != rare[name])
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
        label = self.name if self.index is None else f"{self.name}[{self.index}]"
        if isinstance(self.rows, RowIndices):
            more = ", …" if self.rows.number > 1 else ""
            return f"{label}[{self.rows.numbers[0]}{more}]"
        return label if self.rows is None else f"{label}[{self.rows.start}:{self.rows.start + self.rows.length}]"

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
        return self.out if self.rows is None else self.rows.number, cols

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
        weight = stored if self.index is None else stored[self.index]
        matrix = weight.T if self.transposed else weight
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
        fields: list[Any] = [self.module, list(self.stored), self.role]
        settings = {name: getattr(self, name) for name in _SETTINGS}
        rest = {name: value for name, value in settings.items() if value != _SETTINGS[name]}
        if self.rows is not None:
            rest["rows"] = self.rows.to_json()
        if self.tied:
            rest["tied"] = list(self.tied)
        return [*fields, rest] if rest else fields

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
        if not isinstance(rest, Mapping) or not set(rest) <= _SETTINGS.keys():
            names = ", ".join(sorted(_SETTINGS))
            raise TargetError(f"a target's settings must be among {names}; got {safe_repr(rest)}")
        rows = rest.get("rows")
        if isinstance(rows, Mapping):
            if rows.keys() != {"indices"} or not isinstance(rows["indices"], (list, tuple)):
                raise TargetError(f"a target's rows must be four integers, or indices; got {safe_repr(rows)}")
            rest = {**rest, "rows": RowIndices(tuple(rows["indices"]))}
        return cls(value[0], value[1], value[2], **rest)


# The fields that a list contains only if they differ from their defaults.
_SETTINGS = {field.name: field.default for field in dataclasses.fields(Target)[3:]}


# -- No two targets may update the same element of a stored parameter --------------------------------------------------

# Patterns of rows have sizes that a file may choose freely, so they are compared as spans of one block, never
# enumerated. Lists of rows are as long in the file as they are here.


def check_distinct(targets: Sequence[Target]) -> None:
    """Raise an error if two targets update the same row of one stored parameter.

    Parameters
    ----------
    targets : sequence of Target
        Targets on different rows of one parameter, such as q and v of a fused weight, are allowed.

    Raises
    ------
    TargetError
        If a target is repeated, two share a row, or two describe one parameter with different shapes or orders, or
        have rows of one weight in blocks of different lengths. The message names both targets and a shared row.

    Notes
    -----
    The time is O(n log n) in the number of targets and listed rows, whatever sizes and patterns they claim.

    Examples
    --------
    >>> q, v = (Target("attn.qkv", (6, 4), role, rows=Rows(start, 2, 6)) for role, start in (("q", 0), ("v", 4)))
    >>> check_distinct([q, v])
    >>> check_distinct([q, v, Target("attn.qkv", (6, 4), "k", rows=Rows(2, 3, 6))])
    Traceback (most recent call last):
        ...
    tnadapt.errors.TargetError: targets 1 and 2 overlap: both update row 4 of 'attn.qkv.weight' (1: role v, rows 4 to \
5 of 6; 2: role k, rows 2 to 4 of 6). Give each row of a weight to one target
    """
    by_name: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        by_name.setdefault(target.name, []).append(number)
    for numbers in by_name.values():
        if len(numbers) > 1:
            _check_one(targets, numbers)


def _check_one(targets: Sequence[Target], numbers: Sequence[int]) -> None:
    """Check the targets of one parameter for overlaps."""
    first = targets[numbers[0]]
    by_index: dict[int | None, list[int]] = {}
    for number in numbers:
        other = targets[number]
        if (other.stored, other.transposed, other.index is None) != (
            first.stored, first.transposed, first.index is None
        ):  # fmt: skip
            raise TargetError(
                f"targets {numbers[0]} and {number} describe {safe_repr(first.name)} differently: as {first.stored}"
                f"{_order(first)} and as {other.stored}{_order(other)}. One of them is wrong"
            )
        by_index.setdefault(other.index, []).append(number)
    for matrix in by_index.values():
        if len(matrix) > 1:
            _check_matrix(targets, matrix)


def _check_matrix(targets: Sequence[Target], numbers: Sequence[int]) -> None:
    """Check the targets of one matrix for overlaps: the rows of one block, and the listed rows."""
    spans: list[tuple[int, int, int]] = []
    listed: list[tuple[int, RowIndices]] = []
    strides: dict[int, int] = {}
    for number in numbers:
        rows = targets[number].rows
        if rows is None:
            other = next(other for other in numbers if other != number)
            raise _overlap(targets, number, other, _first_row(targets[other]))
        if isinstance(rows, RowIndices):
            listed.append((number, rows))
            continue
        strides.setdefault(rows.stride, number)
        spans.append((rows.start, rows.start + rows.length, number))
    if len(strides) > 1:
        first, other = sorted(strides.values())[:2]
        raise TargetError(
            f"targets {first} and {other} have rows of {safe_repr(targets[first].name)} in blocks of different lengths "
            f"({_words(targets[first])}; {_words(targets[other])}): give all rows of a weight in blocks of one length"
        )
    spans.sort()
    for (_, stop, number), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise _overlap(targets, number, other, start)
    owner: dict[int, int] = {}
    stride = next(iter(strides), 1)
    starts = [start for start, _, _ in spans]
    for number, indices in listed:
        for row in indices.numbers:
            other = owner.setdefault(row, number)
            if other != number:
                raise _overlap(targets, other, number, row)
            place = bisect.bisect_right(starts, row % stride) - 1
            if place >= 0 and row % stride < spans[place][1]:
                raise _overlap(targets, spans[place][2], number, row)


def _first_row(target: Target) -> int:
    if isinstance(target.rows, RowIndices):
        return target.rows.numbers[0]
    return 0 if target.rows is None else target.rows.start


def _overlap(targets: Sequence[Target], number: int, other: int, row: int) -> TargetError:
    number, other = sorted((number, other))
    first, second = targets[number], targets[other]
    name = safe_repr(first.name) if first.index is None else f"matrix {first.index} of {safe_repr(first.name)}"
    return TargetError(
        f"targets {number} and {other} overlap: both update row {row} of {name} ({number}: {_words(first)}; "
        f"{other}: {_words(second)}). Give each row of a weight to one target"
    )


def _words(target: Target) -> str:
    rows = target.rows
    if rows is None:
        return f"role {target.role}, all {target.out} rows"
    if isinstance(rows, RowIndices):
        more = f" and {rows.number - 4} more" if rows.number > 4 else ""
        return f"role {target.role}, rows {', '.join(map(str, rows.numbers[:4]))}{more}"
    blocks = f"each of {rows.count} blocks of " if rows.count > 1 else ""
    return f"role {target.role}, rows {rows.start} to {rows.start + rows.length - 1} of {blocks}{rows.stride}"


def _order(target: Target) -> str:
    return " (in, out)" if target.transposed else ""
