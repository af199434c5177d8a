"""Tables of samples: their columns, found by name, and the readers of ``.csv``, ``.tsv``, ``.jsonl`` and ``.json``."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.errors import FileError, safe_repr

__all__ = ["TABLES", "Table", "find_column", "needed_column", "read_table"]

# Columns that a message names.
_SHOWN = 30
#: Suffixes of the files that are read as tables.
TABLES = (".csv", ".tsv", ".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Table:
    """Samples in columns.

    Attributes
    ----------
    name : str
        Name in reports.
    path : str
        The source as the user gave it, for messages.
    columns : mapping of str to sequence
        The values of each column: strings in a ``.csv``, else any JSON values.
    tests : mapping of str to mapping
        Columns of the parts that could be the test part, by their names, best first.
    lines : tuple of int
        The line of the file that each row ends in; empty if there are no lines.
    words : mapping of str to tuple of str
        Class names of columns that hold the numbers of classes.
    opaque : tuple of str
        Columns of images, sounds or videos, which are decoded when they are read.
    """

    name: str
    path: str
    columns: Mapping[str, Sequence[Any]]
    tests: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    lines: tuple[int, ...] = ()
    words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    opaque: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """Return where a row is, for messages."""
        return f"{self.path}, line {self.lines[row]}" if self.lines else f"row {row} of {self.path}"

    def part(self, name: str) -> Table:
        """Return one of :attr:`tests` as a table."""
        path = f"the {name} part of {self.path}"
        return dataclasses.replace(self, path=path, columns=self.tests[name], tests={})

    def test(self, columns: Sequence[str], label: str | None = None) -> Table | None:
        """Return the first test part that has these columns, and in the column ``label`` labels that are not hidden."""
        parts = [self.part(name) for name, part in self.tests.items() if all(column in part for column in columns)]
        return next((part for part in parts if label is None or not part.hides(label)), None)

    def hides(self, column: str) -> bool:
        """Return whether all labels in a column are -1, which is how benchmarks hide those of a test part."""
        cells = self.columns[column]
        pieces = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
        return bool(pieces) and all(isinstance(one, (int, float)) and one == -1 for one in pieces)

    def word(self, column: str, row: int, label: Any) -> Any:
        """Return the name of a class by its number; a label as it is if it is text, or the classes have no names.

        Raises
        ------
        FileError
            If there is no class of this number.
        """
        words = self.words.get(column, ())
        if not words or isinstance(label, str):
            return label
        if type(label) is not int or not 0 <= label < len(words):
            raise FileError(
                f"{self.place(row)}: {safe_repr(label)} in {safe_repr(column)} is not the number of a class; expected "
                f"0 to {len(words) - 1}: leave the row out"
            )
        return words[label]

    def filled(self, columns: Sequence[str]) -> None:
        """Raise a FileError that names the line if a row of a ``.csv`` has nothing in one of these columns."""
        if not self.lines:
            return
        for row in range(len(self)):
            for name in columns:
                if not (self.columns[name][row] or "").strip():
                    raise FileError(f"{self.place(row)}: nothing in column {safe_repr(name)}")

    def listed(self) -> str:
        """Return the names of the columns, for messages."""
        return _listed(self.columns)


def _listed(names: Collection[str]) -> str:
    """Return the first names, for messages."""
    first = ", ".join(map(safe_repr, itertools.islice(names, _SHOWN)))
    return first + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def find_column(source: str, given: str | None, usual: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column that was asked for, or one with a usual name; None if there is none.

    Raises
    ------
    FileError
        If the column that was asked for is not there.

    Examples
    --------
    >>> find_column("a.csv", None, ["text", "review"], ["Review", "stars"])
    'Review'
    """
    if given is not None:
        if given not in names:
            raise FileError(f"{source} has no column {safe_repr(given)}; its columns are {_listed(names)}")
        return given
    lower = {name.strip().lower(): name for name in reversed(list(names)) if name}
    return next((lower[name] for name in usual if name in lower), None)


def needed_column(source: str, what: str, given: str | None, usual: Sequence[str], names: Sequence[str]) -> str:
    """Return the column of :func:`find_column`.

    Raises
    ------
    FileError
        If there is none.
    """
    found = find_column(source, given, usual, names)
    if found is not None:
        return found
    raise FileError(
        f"which column of {source} is the {what}? It has {_listed(names)}: give --{what}-column NAME, or call it {what}"
    )


def read_table(path: Path) -> Table:
    """Read a file with one of the suffixes in :data:`TABLES`.

    Raises
    ------
    FileError
        If it cannot be read, is damaged, or has no rows.
    """
    suffix = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as file:
            names, rows, lines = _READERS[suffix](path, file)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (OSError, csv.Error) as error:
        raise FileError(f"cannot read {path} as a table: {error}") from None
    if not rows:
        raise FileError(f"{path} has no rows{' under its line of column names' if suffix in ('.csv', '.tsv') else ''}")
    return Table(path.name, str(path), {name: [row.get(name) for row in rows] for name in names}, {}, tuple(lines))


def _not_utf8(path: Path) -> FileError:
    """Return the error for a file in another encoding, with the line of the first byte that shows it."""
    content = path.read_bytes()
    where = str(path)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:  # the error of reading has a position within a block of the file
        where += f", line {content.count(10, 0, error.start) + 1}"
    return FileError(f"{where} is not UTF-8; save the file in that encoding (in Excel, the type 'CSV UTF-8')")


_Rows = tuple[Sequence[str], list[dict[str, Any]], list[int]]


def _separated(delimiter: str, path: Path, file: Any) -> _Rows:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    names = reader.fieldnames or []
    if not names:
        raise FileError(f"{path} is empty; expected a line of column names and rows of texts and labels")
    other = next((mark for mark in ";\t|" if mark in names[0]), None)
    if len(names) == 1 and delimiter == "," and other is not None:
        raise FileError(
            f"{path}: its columns seem to be separated by {other!r}: {safe_repr(names[0])}; expected commas; save it "
            "again with commas, or with tabs as a .tsv"
        )
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        raise FileError(f"{path} has more than one column {safe_repr(doubled[0])}")
    rows, lines = [], []
    for row in reader:
        if None in row:
            raise FileError(
                f"{path}, line {reader.line_num}: more fields than column names; a text that has "
                f"{'a tab' if delimiter == chr(9) else 'commas'} in it needs quotes"
            )
        rows.append(row)
        lines.append(reader.line_num)
    return names, rows, lines


def _json_lines(path: Path, file: Any) -> _Rows:
    found = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    return _objects(path, ((f"line {number}", _parsed(path, f"line {number}", line)) for number, line in found))


def _json_list(path: Path, file: Any) -> _Rows:
    found = _parsed(path, "the file", file.read())
    if not isinstance(found, list):
        raise FileError(f"{path} is not a list of objects; expected [{{…}}, …], or one object per line in a .jsonl")
    return _objects(path, ((f"entry {number}", one) for number, one in enumerate(found, 1)))


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}, {where} is not JSON: {error}") from None


def _objects(path: Path, found: Iterator[tuple[str, Any]]) -> _Rows:
    rows: list[dict[str, Any]] = []
    for where, one in found:
        if not isinstance(one, dict) or not one:
            raise FileError(f"{path}, {where} is {safe_repr(one)}; expected an object with one value for each column")
        if rows and one.keys() != rows[0].keys():
            other = sorted(one.keys() ^ rows[0].keys())[0]
            raise FileError(
                f"{path}, {where}: column {safe_repr(other)} is not in every row; give each row the same columns"
            )
        rows.append(one)
    return list(rows[0]) if rows else [], rows, []


_READERS = {
    ".csv": lambda path, file: _separated(",", path, file),
    ".tsv": lambda path, file: _separated("\t", path, file),
    ".jsonl": _json_lines,
    ".json": _json_list,
}
