"""A mapping of the tensors that headers list, which takes less memory than their text."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, NamedTuple

import numpy as np

__all__ = ["DTYPES", "FOREIGN", "Entries", "Entry"]

# Names of dtypes in a file, and everywhere else.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# dtypes of safetensors that NumPy lacks, and their bits: allowed in a checkpoint, but not in an adapter.
FOREIGN = {
    "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip

_TAGS = (*DTYPES, *FOREIGN)
_CODES = {tag: code for code, tag in enumerate(_TAGS)}


class Entry(NamedTuple):
    """The dtype, shape and position of a tensor in a file.

    Attributes
    ----------
    dtype : str
        One of ``DTYPES``, or of ``FOREIGN`` if those were allowed.
    shape : tuple of int
    start, stop : int
        The positions of its first byte and after its last byte, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Entries(Mapping[str, Entry]):
    """The tensors of one or several files by name, in the order of their bytes.

    Entries are stored as columns of numbers and two byte strings, and are found by binary search in the sorted hashes
    of their names. A dictionary of a million entries would take five times the memory of their text.

    Examples
    --------
    >>> entries = Entries()
    >>> entries.add(b"b", "F32", b"2", 4, 12), entries.add(b"a", "U8", b"2,2", 0, 4)
    (None, None)
    >>> entries.index() is None, list(entries), entries["b"]
    (True, ['a', 'b'], Entry(dtype='F32', shape=(2,), start=4, stop=12))
    """

    def __init__(self) -> None:
        self._names, self._shapes = bytearray(), bytearray()
        self._name_ends, self._shape_ends = array("Q", [0]), array("Q", [0])
        self._codes, self._starts, self._stops = array("B"), array("Q"), array("Q")
        # Rows of the columns in the order of their bytes; the sorted hashes of all names, and the row of each hash.
        self._order, self._hashes, self._rows = array("I"), array("q"), array("I")
        self._firsts = [0]  # first place of each file in the order, and of the next file to be added

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._hashes:
            self.index()  # another process salts hashes differently

    def add(self, name: bytes, dtype: str, shape: bytes, start: int, stop: int) -> None:
        """Add an entry, its shape as comma-separated decimals. Lookups need a call to :meth:`index` first."""
        self._names += name
        self._shapes += shape
        self._name_ends.append(len(self._names))
        self._shape_ends.append(len(self._shapes))
        self._codes.append(_CODES[dtype])
        self._starts.append(start)
        self._stops.append(stop)

    def extend(self, other: Entries) -> None:
        """Append the entries of another file."""
        for ends, theirs, base in (
            (self._name_ends, other._name_ends, len(self._names)),
            (self._shape_ends, other._shape_ends, len(self._shapes)),
        ):
            ends.frombytes((np.asarray(theirs)[1:] + np.uint64(base)).tobytes())
        self._order.frombytes((np.asarray(other._order) + np.uint32(len(self._codes))).tobytes())
        self._names += other._names
        self._shapes += other._shapes
        for mine, its in ((self._codes, other._codes), (self._starts, other._starts), (self._stops, other._stops)):
            mine.extend(its)
        self._firsts.append(len(self._codes))

    def index(self) -> str | None:
        """Prepare for lookups by name, and return a name that occurs twice, or None."""
        count = len(self._codes)
        if len(self._firsts) == 1:
            order = np.lexsort((_column(self._stops), _column(self._starts))).astype(np.uint32)
            self._order = array("I", order.tobytes())
        hashes = np.fromiter((hash(self._name(row)) for row in range(count)), np.int64, count)
        rows = np.argsort(hashes, kind="stable").astype(np.uint32)
        hashes = hashes[rows]
        self._hashes, self._rows = array("q", hashes.tobytes()), array("I", rows.tobytes())
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            row, later = (self._name(self._rows[int(at)]) for at in (place, place + 1))
            if row == later:
                return row.decode()
        return None

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and stop positions of all tensors, in the order of their bytes."""
        order = np.asarray(self._order)
        return _column(self._starts)[order], _column(self._stops)[order]

    def name_at(self, place: int) -> str:
        """Return the name of the entry at a place in the order of the bytes."""
        return self._name(self._order[place]).decode()

    def of_file(self, number: int) -> Iterator[tuple[str, Entry]]:
        """Yield the names and entries of one of the added files, in the order of their bytes."""
        for place in range(self._firsts[number], self._firsts[number + 1]):
            row = self._order[place]
            yield self._name(row).decode(), self._entry(row)

    def file_of(self, name: str) -> int:
        """Return the number of the file that holds a tensor; raise KeyError if none does."""
        return bisect.bisect_right(self._firsts, self._row(name)) - 1

    def files(self) -> Iterator[tuple[str, int]]:
        """Yield every name with the number of its file, in order."""
        for number, (first, end) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            for place in range(first, end):
                yield self.name_at(place), number

    def _name(self, row: int) -> bytes:
        return bytes(self._names[self._name_ends[row] : self._name_ends[row + 1]])

    def _entry(self, row: int) -> Entry:
        text = self._shapes[self._shape_ends[row] : self._shape_ends[row + 1]]
        shape = tuple(map(int, text.split(b","))) if text else ()
        return Entry(_TAGS[self._codes[row]], shape, self._starts[row], self._stops[row])

    def _row(self, name: str) -> int:
        if isinstance(name, str):
            raw = name.encode("utf-8", "surrogatepass")
            known = hash(raw)
            place = bisect.bisect_left(self._hashes, known)
            while place < len(self._hashes) and self._hashes[place] == known:
                if self._name(self._rows[place]) == raw:
                    return self._rows[place]
                place += 1
        raise KeyError(name)

    def __getitem__(self, name: str) -> Entry:
        return self._entry(self._row(name))

    def __contains__(self, name: object) -> bool:
        try:
            self._row(name)  # type: ignore[arg-type]  # another type is a KeyError
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (self._name(row).decode() for row in self._order)

    def __len__(self) -> int:
        return len(self._codes)

    def items(self) -> ItemsView[str, Entry]:
        return _Items(self)

    def values(self) -> ValuesView[Entry]:
        return _Values(self)


class _Items(ItemsView[str, Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        entries = self._mapping
        return ((entries._name(row).decode(), entries._entry(row)) for row in entries._order)


class _Values(ValuesView[Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[Entry]:
        entries = self._mapping
        return (entries._entry(row) for row in entries._order)


def _column(numbers: array[Any]) -> np.ndarray:
    return np.asarray(numbers)
