"""PopulationFile, the content of a file of many adapters that differ in their arrays alone, and its rows.

:mod:`tnadapt.checkpoints.adapter_format` specifies the rows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer, is_sequence
from tnadapt.errors import BackendError, ConfigError, FileError, ShapeError, escaped, safe_repr, summarize
from tnadapt.targets.target import Target

from .adapter_file import AdapterFile
from .container import DTYPES, TAG_OF, file_error_context, native, raw_dtype, to_stored

T = TypeVar("T")

# -- The rows of a file, one for each member ---------------------------------------------------------------------------


#: Maximum number of members of a population.
MAX_MEMBERS = 1 << 31
#: Maximum length of a member's name, in bytes of UTF-8.
MAX_NAME = 256
#: The dtypes of members, as in a header.
MEMBER_DTYPES = ("F64", "F32", "F16", "BF16")

_CHECKSUM = 8
# NaN in every dtype: as the numbers of a row are finite, an incomplete append is never mistaken for a replacement.
_PENDING = b"\xff" * 8
# How often a row is read again that somebody may be writing, after pauses that double from a millisecond.
_READS = 8
# Bytes of rows that are checked at a time.
_PIECE = 1 << 24
# Looking up more names than this is faster with an index of all.
_FEW_NAMES = 8


def _checksum(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECKSUM]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """What is where in a row: the arrays, padding, the name, the checksum.

    Attributes
    ----------
    tag : str
        The dtype of the numbers, one of ``MEMBER_DTYPES``.
    shapes : mapping of str to tuple of int
        The arrays, in their order.
    name_bytes : int
        Width of the name, a multiple of 8.
    """

    tag: str
    shapes: Mapping[str, tuple[int, ...]]
    name_bytes: int

    @functools.cached_property
    def numbers(self) -> int:
        """Number of elements of a member."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @functools.cached_property
    def number_bytes(self) -> int:
        return self.numbers * raw_dtype(self.tag).itemsize

    @functools.cached_property
    def name_at(self) -> int:
        return -(-self.number_bytes // 8) * 8

    @functools.cached_property
    def row_bytes(self) -> int:
        return self.name_at + self.name_bytes + _CHECKSUM

    def pack(self, arrays: Mapping[str, np.ndarray], names: Sequence[str | None]) -> np.ndarray:
        """Return the rows of members whose arrays are stacked along a leading axis."""
        rows, at = np.zeros((len(names), self.row_bytes), np.uint8), 0
        for name, shape in self.shapes.items():
            _, stored = to_stored(arrays[name], DTYPES[self.tag])
            part = stored.reshape(len(names), math.prod(shape)).view(np.uint8)
            rows[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        if self.name_bytes:
            column = np.array([(name or "").encode() for name in names], f"S{self.name_bytes}")
            rows[:, self.name_at : -_CHECKSUM] = column.view(np.uint8).reshape(len(names), self.name_bytes)
        content, size = rows.reshape(-1).data, self.row_bytes
        checksums = b"".join(_checksum(content[at : at + size - _CHECKSUM]) for at in range(0, rows.size, size))
        rows[:, -_CHECKSUM:] = np.frombuffer(checksums, np.uint8).reshape(len(names), _CHECKSUM)
        return rows

    def unpack(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays of rows, along their leading axes: views of the rows if the dtype and alignment allow."""
        stored = rows[..., : self.number_bytes].view(raw_dtype(self.tag))
        if not stored.flags.aligned:
            stored = stored.copy()
        numbers, arrays, at = native(self.tag, stored), {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            arrays[name] = numbers[..., at : at + size].reshape(rows.shape[:-1] + shape)
            at += size
        return arrays

    def is_finite(self, rows: np.ndarray) -> bool:
        """Return whether all numbers of rows are finite."""
        return all(bool(np.isfinite(array).all()) for array in self.unpack(rows).values())

    def is_whole(self, row: bytes | memoryview) -> bool:
        """Return whether a row has the checksum of its content."""
        return row[-_CHECKSUM:] == _checksum(row[:-_CHECKSUM])

    def name(self, row: bytes, number: int) -> str | None:
        """Return the name in the row of a member; raise FileError if it is not a valid one."""
        return self.name_of(row[self.name_at : self.name_at + self.name_bytes].rstrip(b"\0"), number)

    @staticmethod
    def name_of(content: bytes, number: int) -> str | None:
        """Return the name of a member from its bytes; raise FileError if it is not a valid one."""
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = ""
        if content and not _is_name(text):
            raise FileError(f"the name of member {number} is not printable text: {safe_repr(content)}")
        return text or None

    def trailer(self, number: int, row: bytes) -> bytes:
        """Return what follows the rows while one of them is replaced."""
        content = _PENDING + number.to_bytes(8, "little") + row
        return content + _checksum(content)

    @property
    def trailer_bytes(self) -> int:
        """Size of a trailer."""
        return len(_PENDING) + 8 + self.row_bytes + _CHECKSUM

    def replacement(self, trailer: bytes, count: int) -> tuple[int, bytes] | None:
        """Return the number and the row of a trailer; None unless it is a complete one, for one of ``count`` rows."""
        if len(trailer) != self.trailer_bytes or not trailer.startswith(_PENDING) or not self.is_whole(trailer):
            return None
        number, row = int.from_bytes(trailer[8:16], "little"), trailer[16:-_CHECKSUM]
        return (number, row) if number < count and self.is_whole(row) else None


def width_of_names(names: Sequence[str | None]) -> int:
    """Return the width of the column that holds these names."""
    return max(-(-len((name or "").encode()) // 8) * 8 for name in names)


def _is_name(text: str) -> bool:
    # Printable text has no half of a surrogate pair, and so it has a UTF-8 form.
    return bool(text) and escaped(text) == text and len(text.encode()) <= MAX_NAME


def name_content(name: str) -> bytes:
    """Return a name as a row has it, without the zeros that follow it; nothing for text that is no name."""
    return name.encode() if _is_name(name) else b""


def checked_names(names: Sequence[str | None] | None, count: int, single: bool = False) -> list[str | None]:
    """Return the names of ``count`` new members, all None if there are none; raise ConfigError for invalid ones."""
    if names is None:
        return [None] * count
    if not is_sequence(names) or len(names) != count:
        size = len(names) if is_sequence(names) else safe_repr(names)
        raise ConfigError(f"names must have a name, or None, for each of the {count} members; got {size}")
    for number, name in enumerate(names):
        if name is not None and not (isinstance(name, str) and _is_name(name)):
            argument = "name" if single else f"names[{number}]"
            raise ConfigError(
                f"{argument} must be printable text of 1 to {MAX_NAME} bytes in UTF-8; got {safe_repr(name)}"
            )
    if (twice := _first_twice(name for name in names if name is not None)) is not None:
        raise ConfigError(f"names has {safe_repr(twice)} twice; members must have different names")
    return list(names)


def _first_twice(names: Iterable[T]) -> T | None:
    seen = set[T]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class MemberRows:
    """The rows of members, in memory or mapped from a file that others may be changing.

    Parameters
    ----------
    layout : RowLayout
    matrix : ndarray of uint8, shape (members, row_bytes)
    source : tuple of (str, int, int), optional
        The path, device and inode of the file; None for rows in memory, which are known to be whole.
    """

    def __init__(self, layout: RowLayout, matrix: np.ndarray, source: tuple[str, int, int] | None = None) -> None:
        self.layout, self._matrix, self._source = layout, matrix, source
        self._num_searched = 0
        # Rows by their number whose replacement in the file has begun, and may never be completed.
        pending = self._pending()
        self._replaced = {} if pending is None else dict([pending])

    def __len__(self) -> int:
        return len(self._matrix)

    def error_context(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that begins the message of an error in it with the path of the file, if there is one."""
        return contextlib.nullcontext() if self._source is None else file_error_context(self._source[0])

    def row(self, number: int) -> bytes:
        """Return a row, after checking that it is whole and its numbers are finite."""
        row = self._replaced.get(number) or self._matrix[number].tobytes()
        if self._source is not None:
            row = row if self.layout.is_whole(row) else self._settled(number)
            if not self.layout.is_finite(np.frombuffer(row, np.uint8)):
                raise self._error(number, row, "holds NaN or infinity; an adapter file may only have finite numbers")
            self.layout.name(row, number)
        return row

    def _settled(self, number: int) -> bytes:
        """Return a row that was not whole when it was read: somebody may be writing it, or have been killed then."""
        for attempt in range(_READS):
            time.sleep(0.001 * 2**attempt)
            pending = self._pending()
            if pending is not None and pending[0] == number:
                self._replaced[number] = pending[1]
                return pending[1]
            row = bytes(self._matrix[number])
            if self.layout.is_whole(row):
                return row
        raise self._error(number, row, "is damaged: its bytes do not match its checksum")

    def _pending(self) -> tuple[int, bytes] | None:
        """Return the replacement that the file has behind its rows now, if there is one."""
        if self._source is None:
            return None
        path, *identity = self._source
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                if [state.st_dev, state.st_ino] != identity:
                    return None
                file.seek(max(state.st_size - self.layout.trailer_bytes, 0))
                return self.layout.replacement(file.read(self.layout.trailer_bytes), len(self))
        except OSError:
            return None

    def _error(self, number: int, row: bytes, problem: str) -> FileError:
        try:
            name = self.layout.name(row, number)
        except FileError:
            name = None
        return FileError(f"member {number}{f' ({name!r})' if name else ''} {problem}")

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield all rows, some at a time, after checking each as :meth:`row` does.

        Of a file, they are copies, which others cannot change after the check.
        """
        size = self.layout.row_bytes
        many = max(_PIECE // size, 1)
        for start in range(0, len(self), many):
            piece = self._matrix[start : start + many]
            if self._source is not None:
                content = piece.tobytes()
                piece = np.frombuffer(content, np.uint8).reshape(-1, size)
                view = memoryview(content)
                whole = all(self.layout.is_whole(view[at : at + size]) for at in range(0, len(view), size))
                if not whole or self._replaced or not self.layout.is_finite(piece):
                    # Raises for the first row that is damaged.
                    with self.error_context():
                        piece = self.selected(range(start, start + len(piece)))._matrix
            yield piece

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all members' arrays, stacked: copies, which others cannot change."""
        return self.layout.unpack(np.concatenate([*self.pieces()]))

    def mapped(self) -> np.ndarray:
        """Return all rows after the check of :meth:`pieces`, which see later replacements in the file."""
        for _ in self.pieces():
            pass
        matrix = self._matrix.copy() if self._replaced else self._matrix
        for number, row in self._replaced.items():
            matrix[number] = np.frombuffer(row, np.uint8)
        return matrix

    def selected(self, numbers: Sequence[int]) -> MemberRows:
        """Return some of the rows, read into memory."""
        content = b"".join(map(self.row, numbers))
        return MemberRows(self.layout, np.frombuffer(content, np.uint8).reshape(len(numbers), -1))

    @functools.cached_property
    def _column(self) -> np.ndarray:
        """The names' bytes, which NumPy compares and returns without the zeros that follow them."""
        start, width = self.layout.name_at, self.layout.name_bytes
        return self._matrix[:, start : start + width].copy().view(f"S{width}")[:, 0]

    @functools.cached_property
    def _numbers(self) -> dict[bytes, int]:
        """The number of the member with each name."""
        contents = self._column.tolist()
        if (twice := _first_twice(filter(None, contents))) is not None:
            raise self._twice(twice)
        return {content: number for number, content in enumerate(contents) if content}

    def _twice(self, content: bytes) -> FileError:
        first, second = np.flatnonzero(self._column == content)[:2]
        name = content.decode(errors="replace")
        return FileError(f"members {first} and {second} have the same name, {name!r}")

    def find(self, names: Sequence[str]) -> list[int | None]:
        """Return the numbers of the members with these names; None for a name that no member has."""
        if self.layout.name_bytes:
            self._num_searched += max(len(names) - _FEW_NAMES, 0)
        return [self.number_of(name_content(name)) for name in names]

    def number_of(self, content: bytes) -> int | None:
        """Return the number of the member with a name of this content, or None if no member has it."""
        if self._num_searched > _FEW_NAMES:
            return self._numbers.get(content)
        if not content or not self.layout.name_bytes:
            return None
        self._num_searched += 1
        matches: list[int] = np.flatnonzero(self._column == content).tolist()
        if len(matches) > 1:
            raise self._twice(content)
        return matches[0] if matches else None

    def names(self) -> list[str | None]:
        """Return the names of all members."""
        if not self.layout.name_bytes:
            return [None] * len(self)
        _ = self._numbers  # raises for names that are not distinct
        return [self.layout.name_of(content, number) for number, content in enumerate(self._column.tolist())]


# -- PopulationFile ----------------------------------------------------------------------------------------------------


class PopulationFile:
    """The content of a file of many adapters, its members, which differ in their arrays alone.

    :func:`tnadapt.load` returns one for such a file, and :func:`tnadapt.save` writes it.

    Parameters
    ----------
    member : AdapterFile
        An adapter with what all members share: everything but the arrays in ``plan.param_shapes``. Its own arrays count
        for their dtype alone.
    arrays : mapping of str to ndarray, shape (members, ...)
        The members' arrays, stacked along a leading axis, in the dtype of ``member``. They are copied.
    names : sequence of str or None, optional
        A name for each member, or None for one without: printable, at most 256 bytes in UTF-8, all different.

    Attributes
    ----------
    shared : AdapterFile
        What the members share; its arrays are zeros.

    Raises
    ------
    ConfigError, ShapeError, BackendError
        If arrays are missing, or have another shape or dtype; if there is no member, or more than 2**31; if a number is
        NaN or infinite; if a name is invalid or occurs twice.

    Notes
    -----
    ``len(population)`` is the number of members, and ``population[3]`` or ``population["user-17"]`` one of them as an
    :class:`~tnadapt.AdapterFile`, with its own copy of its arrays. Saved, it gives the file that the member alone
    would. Of members that are loaded from a file, the rows are mapped and each is read and checked when it is used;
    when another process replaces a member, ``population[k]`` is the old one or the new one. What another process
    appends is not seen: load the file again.

    Examples
    --------
    >>> import tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
    >>> plan = tna.UpdatePlan(config, [(4, 6)])
    >>> member = tna.AdapterFile(config, targets, plan.init())
    >>> stacked = {name: np.zeros((3, *shape), np.float32) for name, shape in plan.param_shapes.items()}
    >>> population = PopulationFile(member, stacked, names=["ann", "bob", None])
    >>> population, population["bob"]
    (PopulationFile(3 members of 10 parameters), AdapterFile(10 parameters in 2 arrays, 1 target, 0 kept))
    """

    @checks_arguments
    def __init__(
        self,
        member: AdapterFile,
        arrays: Mapping[str, np.ndarray],
        names: Sequence[str | None] | None = None,
    ) -> None:
        self.shared = with_arrays(member, {name: np.zeros_like(array) for name, array in member.arrays.items()})
        self._rows = _packed(self.shared, arrays, names)

    @classmethod
    @checks_arguments
    def from_members(cls, members: Sequence[AdapterFile], names: Sequence[str | None] | None = None) -> PopulationFile:
        """Return the population of these adapters.

        Parameters
        ----------
        members : sequence of AdapterFile
            They must be equal in everything but their arrays.
        names : sequence of str or None, optional
            As for the class.

        Raises
        ------
        ConfigError, ShapeError
            If there is no member, or one differs from the first in something else, which the message names.

        Examples
        --------
        >>> import tnadapt as tna
        >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
        >>> member = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
        >>> PopulationFile.from_members([member, member], names=["ann", "bob"]).names
        ['ann', 'bob']
        """
        members = list(members)
        if not members:
            raise ConfigError("members is empty: a population has at least one member")
        for number, member in enumerate(members[1:], start=1):
            check_shared(member, members[0], f"members[{number}]", "members[0]")
        stacked = {name: np.stack([member.arrays[name] for member in members]) for name in members[0].arrays}
        return cls(members[0], stacked, names)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        count = f"{len(self):,} member{'s' * (len(self) != 1)}"
        return f"PopulationFile({count} of {self.num_parameters} parameters)"

    def __iter__(self) -> Iterator[AdapterFile]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, which: int | str) -> AdapterFile:
        number = numbers_of(self, [which], "which")[0]
        with self._rows.error_context():
            row = np.frombuffer(bytearray(self._rows.row(number)), np.uint8)
        return with_arrays(self.shared, self._rows.layout.unpack(row))

    if not TYPE_CHECKING:  # a type checker would accept any attribute

        def __getattr__(self, name: str) -> Any:
            hint = f": it is of one member, as in population[0].{name}" if hasattr(AdapterFile, name) else ""
            raise AttributeError(f"'PopulationFile' object has no attribute {name!r}{hint}")

    @property
    def names(self) -> list[str | None]:
        """The name of each member, or None; of a file, they are read each time."""
        with self._rows.error_context():
            return self._rows.names()

    @property
    def config(self) -> Config:
        """The structure of the updates."""
        return self.shared.config

    @property
    def targets(self) -> Sequence[Target]:
        """The weights that are updated."""
        return self.shared.targets

    @property
    def plan(self) -> UpdatePlan:
        """The plan of each member."""
        return self.shared.plan

    @property
    def num_parameters(self) -> int:
        """Number of trained elements of one member."""
        return self.shared.num_parameters

    @property
    def dtype(self) -> str:
        """The dtype in which the members' arrays are stored."""
        return self.shared.dtype

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """All members' arrays, stacked along a leading axis; read-only.

        They are views of the file, which show later replacements of members, or copies if they are bfloat16, which
        becomes float32, or not aligned in the file. Reading this checks every member once.
        """
        arrays = self._rows.layout.unpack(self._rows.mapped())
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    @checks_arguments
    def select(self, members: Sequence[int | str]) -> PopulationFile:
        """Return the population of some of the members, read into memory.

        Parameters
        ----------
        members : sequence of int or str
            Their numbers or names, in the order of the result.

        Raises
        ------
        ConfigError
            If there are none, one is not in the population, or one occurs twice.

        Examples
        --------
        >>> import tnadapt as tna
        >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
        >>> member = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
        >>> population = PopulationFile.from_members([member] * 3, names=["ann", "bob", "cid"])
        >>> population.select(["cid", 0]).names
        ['cid', 'ann']
        """
        numbers = numbers_of(self, members)
        with self._rows.error_context():
            return population_of_rows(self.shared, self._rows.selected(numbers))


def population_of_rows(shared: AdapterFile, rows: MemberRows) -> PopulationFile:
    """Return the population of what its members share, and of rows of that layout."""
    population = PopulationFile.__new__(PopulationFile)
    population.shared, population._rows = shared, rows
    return population


def rows_of(population: PopulationFile) -> MemberRows:
    """Return the rows of the members, as a file has them."""
    return population._rows


def numbers_of(population: PopulationFile, members: Iterable[int | str], argument: str = "members") -> list[int]:
    """Return the numbers of members that an argument gives by number or name; raise ConfigError for others, or none."""
    members = list(members)
    if not members:
        raise ConfigError("members is empty: give the number or name of at least one")
    matches = iter(rows_of(population).find([which for which in members if isinstance(which, str)]))
    last, numbers = len(population) - 1, dict[int, Any]()
    for which in members:
        number = (
            next(matches) if isinstance(which, str) else integer(argument, which, 0, last, ConfigError, "or a name")
        )
        if number is None:
            names = [name for name in population.names if name is not None]
            known = f"the names are {summarize(names)}" if names else "the members have no names"
            problem = f"{argument}: there is no member {safe_repr(which)}"
            raise ConfigError(f"{problem}; {known}; numbers are from 0 to {last}")
        if number in numbers:
            again = "" if which == numbers[number] else f", as {safe_repr(numbers[number])} and {safe_repr(which)}"
            raise ConfigError(f"{argument} has member {number} twice{again}; name each once")
        numbers[number] = which
    return list(numbers)


def with_arrays(file: AdapterFile, arrays: Mapping[str, np.ndarray]) -> AdapterFile:
    """Return an adapter with other arrays of the same names, shapes and dtype."""
    _ = file.plan, file._digests  # computed once, and then shared by the copies
    member = copy.copy(file)
    object.__setattr__(member, "arrays", {name: arrays[name] for name in file.arrays})
    return member


def _packed(shared: AdapterFile, arrays: Mapping[str, np.ndarray], names: Sequence[str | None] | None) -> MemberRows:
    shapes = shared.plan.param_shapes
    if missing := shapes.keys() ^ arrays.keys():
        raise ShapeError(f"arrays must be {summarize(shapes)}; missing or unknown: {summarize(missing)}")
    count = len(arrays[next(iter(shapes))]) if arrays[next(iter(shapes))].shape else 0
    integer("the number of members", count, 1, MAX_MEMBERS, ConfigError)
    stacked = {}
    for name, shape in shapes.items():
        array = np.asarray(arrays[name])
        stacked[name] = array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        if array.shape != (count, *shape):
            raise ShapeError(
                f"arrays[{name!r}] has shape {array.shape}; for {count} members, expected {(count, *shape)}"
            )
        if array.dtype != shared.arrays[name].dtype:
            raise BackendError(f"arrays[{name!r}] has dtype {array.dtype}; that of the members is {shared.dtype}")
        if name in shared.dtypes and (array.view(np.uint32) & np.uint32(0xFFFF)).any():
            raise BackendError(f"arrays[{name!r}] has values that bfloat16 cannot represent; round them")
        if not np.isfinite(array).all():
            number = int(np.argmin(np.isfinite(array.reshape(count, -1)).all(axis=1)))
            raise ShapeError(f"arrays[{name!r}] of member {number} holds NaN or infinity; expected finite numbers")
    texts = checked_names(names, count)
    layout = RowLayout(TAG_OF[shared.dtype], shapes, width_of_names(texts))
    return MemberRows(layout, layout.pack(stacked, texts))


# -- The check that an adapter belongs to a population -----------------------------------------------------------------


def check_shared(member: AdapterFile, shared: AdapterFile, what: str, whole: str = "the population") -> None:
    """Raise ConfigError, naming the first difference, unless an adapter differs from others in its arrays alone."""
    for field in ("config", "targets", "dtype", "activation", "trained", "base", "model", "pretrained", "ties"):
        theirs, ours = getattr(member, field), getattr(shared, field)
        if theirs != ours:
            raise _differing(field, _difference(theirs, ours, what, whole), what, whole)
    for field in ("kept", "given"):
        theirs, ours = getattr(member, field), getattr(shared, field)
        if names := theirs.keys() ^ ours.keys():
            lacking = whole if names & theirs.keys() else what
            raise _differing(field, f"{summarize(names)} not in {lacking}", what, whole)
        prefix = "kept." if field == "kept" else ""
        for name, array in theirs.items():
            key = prefix + name
            mine = array.dtype, array.shape, member.dtypes.get(key), array.tobytes()
            if mine != (ours[name].dtype, ours[name].shape, shared.dtypes.get(key), ours[name].tobytes()):
                raise _differing(field, safe_repr(name), what, whole)


def _differing(field: str, difference: str, what: str, whole: str) -> ConfigError:
    return ConfigError(
        f"{what} differs from {whole} in {field} ({difference}), and members differ in their arrays alone: give the "
        "arrays as a mapping if they are what is meant, or save the adapter as a file of its own"
    )


def _difference(theirs: Any, ours: Any, what: str, whole: str) -> str:
    """Return the settings, targets or values that differ."""
    if isinstance(theirs, Config) and isinstance(ours, Config):
        mine, other = theirs.to_dict(), ours.to_dict()
        keys = [key for key in mine if key in other and mine[key] != other[key]] or list(mine.keys() ^ other.keys())
        return "; ".join(f"{key}: {safe_repr(mine.get(key))} and {safe_repr(other.get(key))}" for key in keys)
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours):
        theirs, ours = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
    elif isinstance(theirs, tuple) and isinstance(ours, tuple):
        return f"{len(theirs)} in {what}, {len(ours)} in {whole}"
    return f"{safe_repr(theirs)} and {safe_repr(ours)}"
