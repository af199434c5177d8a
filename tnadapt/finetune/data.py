"""Data sets: readers of the sources that a user can name, and labeled samples, split into parts."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError, TnadaptError, pluralize, safe_repr, summarize
from tnadapt.report import quiet

# -- Samples and their split into parts --------------------------------------------------------------------------------


PARTS = ("training", "validation", "test")
#: The fraction of each class held out to choose learning rates.
HOLDOUT = 0.2

Labels = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs and their classes.

    Attributes
    ----------
    inputs : sequence
        Texts; or images, each an array ``(height, width[, channels])`` of uint8 or of floats from 0 to 1, a path, or
        a PIL image. A ``take`` method is used if there is one.
    labels : array, one row per sample
        Indices into :attr:`Data.classes`, int64 of shape (n,); other tasks have others.
    """

    inputs: Any
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Labels) -> Samples:
        """Return these samples, in this order."""
        if isinstance(self.inputs, np.ndarray):
            return Samples(self.inputs[indices], self.labels[indices])
        if hasattr(self.inputs, "take"):
            return Samples(self.inputs.take(indices), self.labels[indices])
        return Samples([self.inputs[int(i)] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of one source.

    Attributes
    ----------
    name : str
        Name in reports.
    kind : {"image", "text"}
    classes : tuple of str
    samples : Samples
        For training and validation, and for the test if ``test`` is None.
    test : Samples, optional
        The test part, if the source has one.
    test_name : str
        The source's name of it.
    hidden : tuple of str and sequence, optional
        The source's name and the inputs of a part that comes before ``test`` but has no labels.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    samples: Samples
    test: Samples | None = None
    _: dataclasses.KW_ONLY
    test_name: str = "test"
    hidden: tuple[str, Any] | None = None

    def with_words(self, words: Sequence[str]) -> Data:
        """Return the data with these names of the classes, which are numbers.

        Raises
        ------
        FileError
            If there is no class of one of the numbers.
        """
        known = {str(number): word for number, word in enumerate(words)}
        if unknown := [name for name in self.classes if name not in known]:
            raise FileError(
                f"{self.name} has the label {unknown[0]}, which is not the number of a class; expected 0 to "
                f"{len(words) - 1}: leave such samples out"
            )
        return dataclasses.replace(self, classes=tuple(known[name] for name in self.classes))


def divide(
    data: Data, seed: int = 0, validation: float = HOLDOUT, test: float = 0.3, stratified: bool = True
) -> dict[str, Samples]:
    """Split the data into three parts, reproducible by seed.

    Parameters
    ----------
    data : Data
    seed : int
    validation, test : float
        Fractions of each class, rounded, but at least one sample. If the source has a test part, all of it is used.
    stratified : bool
        Whether to split each class by itself; labels must then be numbers of classes.

    Returns
    -------
    dict
        ``training``, ``validation`` and ``test``.

    Raises
    ------
    TnadaptError
        If there are fewer than two classes, or a class has too few samples for every part.

    Examples
    --------
    >>> labels = np.array([0] * 10 + [1] * 20)
    >>> data = Data("toy", "image", ("a", "b"), Samples(np.zeros((30, 2, 2)), labels))
    >>> {name: np.bincount(part.labels).tolist() for name, part in divide(data).items()}
    {'training': [5, 10], 'validation': [2, 4], 'test': [3, 6]}
    """
    fractions = [validation] if data.test is not None else [validation, test]
    strata = data.samples.labels if stratified else np.zeros(len(data.samples), np.int64)
    counts = np.bincount(strata, minlength=len(data.classes) if stratified else 1).tolist()
    _check_counts(data, counts if stratified else None, len(fractions) + 1)
    pieces: list[list[Labels]] = [[] for _ in range(len(fractions) + 1)]
    random = np.random.Generator(np.random.PCG64(seed))
    for label, count in enumerate(counts):
        order = random.permutation(np.flatnonzero(strata == label))
        sizes = [max(1, round(fraction * count)) for fraction in fractions]
        while count - sum(sizes) < 1:
            sizes[int(np.argmax(sizes))] -= 1
        edges = np.cumsum([count - sum(sizes), *sizes])
        for piece, part in zip(pieces, np.split(order, edges[:-1]), strict=True):
            piece.append(part)
    parts = [data.samples.take(np.sort(np.concatenate(piece))) for piece in pieces]
    if data.test is not None:
        parts.append(data.test)
    return dict(zip(PARTS, parts, strict=True))


def _check_counts(data: Data, counts: Sequence[int] | None, parts: int) -> None:
    """Raise an error unless there is a sample of each class, or any sample, for each part."""
    wanted = f"it needs at least {parts}, one for each of {', '.join(PARTS[:parts])}"
    if counts is None:
        if len(data.samples) < parts:
            raise TnadaptError(f"{data.name} has {pluralize(len(data.samples), 'sample')}; {wanted}: add samples")
        return
    if len(data.classes) < 2:
        raise TnadaptError(f"{data.name} has {len(data.classes)} class; classification needs at least 2")
    for name, count in zip(data.classes, counts, strict=True):
        if count < parts:
            raise TnadaptError(
                f"class {name!r} of {data.name} has {pluralize(count, 'sample')}; {wanted}: add samples, leave the "
                "class out, or raise --limit"
            )


def choose(samples: Samples, limit: int | None, seed: int = 0, stratified: bool = True) -> Samples:
    """Return at most ``limit`` samples, with equal shares of all classes if stratified; all if limit is None.

    Raises
    ------
    TnadaptError
        If limit is less than the number of classes present.
    """
    if limit is None or limit >= len(samples):
        return samples
    strata = samples.labels if stratified else np.zeros(len(samples), np.int64)
    present = np.unique(strata)
    if limit < len(present):
        raise TnadaptError(f"--limit {limit} leaves no sample for some of the {len(present)} classes")
    random = np.random.Generator(np.random.PCG64(seed))
    # The rank of each sample in its class, as a fraction: the smallest ones are evenly distributed over all classes.
    place = np.empty(len(samples))
    for label in present:
        members = np.flatnonzero(strata == label)
        place[random.permutation(members)] = np.arange(len(members)) / len(members)
    return samples.take(np.sort(np.argsort(place, kind="stable")[:limit]))


# -- The contents of a column of labels, as evidence of the task -------------------------------------------------------


#: Separators to try for several labels in one cell.
SEPARATORS = ("|", ";")


@dataclasses.dataclass(frozen=True)
class LabelFacts:
    """What the labels are.

    Attributes
    ----------
    kind : {"words", "integers", "fractions", "lists", "other"}
        ``integers`` may be written as ``3.0``.
    count, rows : int
        Number of distinct labels, and of all.
    range : str
        For numbers, such as ``1 to 5``.
    separator : str, optional
        One that is in some of the words.
    joint, alone : str
        A label with the separator, and a piece of it that is in no other label; both empty if there is none.
    odd : str
        Of words that are mostly numbers, the first that is not; empty otherwise.
    """

    kind: str
    count: int
    rows: int
    range: str = ""
    separator: str | None = None
    joint: str = ""
    alone: str = ""
    odd: str = ""


def number(value: Any) -> float:
    """Return a cell as a finite number.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> number(" 3.5 "), number(2)
    (3.5, 2.0)
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{safe_repr(value)} is not a number")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{safe_repr(value)} is not a number") from None
    if not math.isfinite(result):
        raise ValueError(f"{safe_repr(value)} is not a finite number")
    return result


def facts_of(labels: Sequence[Any], separator: str | None = None) -> LabelFacts:
    """Return what the labels are.

    Parameters
    ----------
    labels : sequence
        Cells of a column.
    separator : str, optional
        Instead of :data:`SEPARATORS`.

    Examples
    --------
    >>> facts_of(["1.0", "3.5", "2.0"]).kind, facts_of(["1", "2", "5"]).range
    ('fractions', '1 to 5')
    >>> facts_of(["a|b", "a", "b"]).separator, facts_of(["R|B", "soul"]).alone
    ('|', 'R')
    >>> facts_of(["3.5", "2", "n/a", "1.5"]).odd
    'n/a'
    """
    if all(isinstance(label, list) for label in labels):
        return LabelFacts("lists", len({str(label) for label in labels}), len(labels))
    try:
        numbers = sorted({number(label) for label in labels})
    except ValueError:
        pass
    else:
        form = "integers" if all(value.is_integer() for value in numbers) else "fractions"
        return LabelFacts(form, len(numbers), len(labels), f"{numbers[0]:g} to {numbers[-1]:g}")
    if not all(isinstance(label, str) for label in labels):
        return LabelFacts("other", len({str(label) for label in labels}), len(labels))
    words = {label.strip() for label in labels}
    for mark in (separator,) if separator else SEPARATORS:
        if joint := sorted(word for word in words if mark in word):
            return LabelFacts("words", len(words), len(labels), "", mark, *_lonely(joint, words, mark))
    return LabelFacts("words", len(words), len(labels), odd=_odd(labels))


def _odd(labels: Sequence[str]) -> str:
    """Return the first label that is not a number if most labels are numbers."""
    odd = []
    for label in labels:
        try:
            number(label)
        except ValueError:
            odd.append(label.strip())
    return odd[0] if 0 < 2 * len(odd) < len(labels) else ""


def _lonely(joint: Sequence[str], words: set[str], mark: str) -> tuple[str, str]:
    """Return a joint label and a piece of it that occurs in no other label, if there is one."""
    pieces = {word: dict.fromkeys(piece.strip() for piece in word.split(mark)) for word in words}
    counts = Counter(itertools.chain.from_iterable(pieces.values()))
    lonely = ((word, piece) for word in joint for piece in pieces[word] if counts[piece] == 1)
    return next(lonely, (joint[0], ""))


# -- Tables: .csv, .tsv, .jsonl and .json ------------------------------------------------------------------------------


# Columns that a message names.
_SHOWN = 30
#: Suffixes of the files that are read as tables.
TABLES = (".csv", ".tsv", ".jsonl", ".json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


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

    def parts(self, columns: Sequence[str], label: str | None = None) -> list[Table]:
        """Return this table, and the first test part with these columns whose labels in ``label`` are not hidden."""
        tests = [self.part(name) for name, part in self.tests.items() if all(column in part for column in columns)]
        return [self, *(part for part in tests if label is None or not part.hides(label))][:2]

    def hides(self, column: str) -> bool:
        """Return whether all labels in a column are -1, which is how benchmarks hide those of a test part."""
        cells = self.columns[column]
        pieces = [piece for cell in cells for piece in (cell if isinstance(cell, list) else [cell])]
        return bool(pieces) and all(isinstance(piece, (int, float)) and piece == -1 for piece in pieces)

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

    def cells(self, column: str) -> list[Any]:
        """Return the cells of a column, after :meth:`filled`."""
        self.filled([column])
        return list(self.columns[column])

    def texts(self, column: str) -> list[str]:
        """Return the cells of a column, which must be texts."""
        texts = self.cells(column)
        require_texts(texts, self.name)
        return texts

    def listed(self) -> str:
        """Return the first names of the columns, for messages."""
        first = ", ".join(map(safe_repr, itertools.islice(self.columns, _SHOWN)))
        return first + (f" and {len(self.columns) - _SHOWN:,} more" if len(self.columns) > _SHOWN else "")

    def column(self, given: str | None, usual: Sequence[str]) -> str | None:
        """Return the column that was asked for, or one with a usual name; None if there is none.

        Raises
        ------
        FileError
            If the column that was asked for is not there.

        Examples
        --------
        >>> Table("a.csv", "a.csv", {"Review": [], "stars": []}).column(None, ["text", "review"])
        'Review'
        """
        names = list(self.columns)
        if given is None:
            lower = {name.strip().lower(): name for name in reversed(names) if name}
            return next((lower[name] for name in usual if name in lower), None)
        if given not in names:
            raise FileError(f"{self.path} has no column {safe_repr(given)}; its columns are {self.listed()}")
        return given

    def needed_column(self, what: str, given: str | None, usual: Sequence[str]) -> str:
        """Return the column of :meth:`column`.

        Raises
        ------
        FileError
            If there is none.
        """
        column = self.column(given, usual)
        if column is None:
            raise FileError(
                f"which column of {self.path} is the {what}? It has {self.listed()}: give --{what}-column NAME, or "
                f"call it {what}"
            )
        return column


def read_table(path: Path) -> Table:
    """Read a file with one of the suffixes in :data:`TABLES`.

    Raises
    ------
    FileError
        If it cannot be read, is damaged, or has no rows.
    """
    suffix = path.suffix.lower()
    delimiter = _DELIMITERS.get(suffix)
    try:
        with path.open(encoding="utf-8-sig", newline="" if delimiter else None) as file:
            if delimiter:
                names, rows, lines = _separated(delimiter, path, file)
            else:
                names, rows, lines = _objects(path, (_json_lines if suffix == ".jsonl" else _json_list)(path, file))
    except UnicodeDecodeError:
        raise FileError(
            f"{path} is not UTF-8; save the file in that encoding (in Excel, the type 'CSV UTF-8')"
        ) from None
    except (OSError, csv.Error) as error:
        raise FileError(f"cannot read {path} as a table: {error}") from None
    if not rows:
        raise FileError(f"{path} has no rows{' under its line of column names' if delimiter else ''}")
    return Table(path.name, str(path), {name: [row.get(name) for row in rows] for name in names}, {}, tuple(lines))


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


def _json_lines(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", _parsed(path, f"line {number}", line)


def _json_list(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    entries = _parsed(path, "the file", file.read())
    if not isinstance(entries, list):
        raise FileError(f"{path} is not a list of objects; expected [{{…}}, …], or one object per line in a .jsonl")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}, {where} is not JSON: {error}") from None


def _objects(path: Path, entries: Iterator[tuple[str, Any]]) -> _Rows:
    rows: list[dict[str, Any]] = []
    for where, row in entries:
        if not isinstance(row, dict) or not row:
            raise FileError(f"{path}, {where} is {safe_repr(row)}; expected an object with one value for each column")
        if rows and row.keys() != rows[0].keys():
            other = sorted(row.keys() ^ rows[0].keys())[0]
            raise FileError(
                f"{path}, {where}: column {safe_repr(other)} is not in every row; give each row the same columns"
            )
        rows.append(row)
    return list(rows[0]) if rows else [], rows, []


# -- Samples of a table or a folder that each have one class -----------------------------------------------------------


TEXT_COLUMNS = ("text", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "labels", "class", "target")


def labelled_texts(
    table: Table, text_column: str | None = None, label_column: str | None = None, label_names: Sequence[str] = ()
) -> Data:
    """Return the texts of a table, each with one class.

    Raises
    ------
    FileError
        If there is no column of texts or of labels, or a cell holds something else.
    """
    text = table.needed_column("text", text_column, TEXT_COLUMNS)
    label = table.needed_column("label", label_column, (*label_names, *LABEL_COLUMNS))
    table.filled([text, label])

    def of(part: Table) -> tuple[Any, list[Any]]:
        labels = list(part.columns[label])
        for row, cell in enumerate(labels):
            part.word(label, row, cell)  # raises an error if it is not the number of a class
        return list(part.columns[text]), labels

    data = _labelled(table.name, "text", *map(of, table.parts([text, label], label)))
    words = table.words.get(label)
    return data if not words else data.with_words(words)


def _labelled(name: str, kind: str, *parts_given: tuple[Any, Sequence[Any]], test_name: str = "test") -> Data:
    """Return data whose classes are the distinct labels, stripped and sorted (numbers numerically)."""
    parts = []
    for some, words in parts_given:
        types = {type(word) for word in words}
        if not types or not (types == {str} or types <= {int, bool}):
            known = ", ".join(sorted(type_.__name__ for type_ in types)) or "none"
            raise FileError(f"the labels of {name} are of type {known}; expected words, or integers")
        if kind == "text":
            require_texts(some, name)
        parts.append((some, [word.strip() if isinstance(word, str) else word for word in words]))
    classes = sorted({word for _, words in parts for word in words})
    place = {word: index for index, word in enumerate(classes)}
    samples = [Samples(some, np.array([place[word] for word in words], np.int64)) for some, words in parts]
    return Data(name, kind, tuple(map(str, classes)), *samples, test_name=test_name)


def require_texts(texts: Sequence[Any], name: str) -> None:
    """Raise a FileError that names the first that is no text."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise FileError(f"the text of sample {index} of {name} is {safe_repr(text)}")


# -- Folders of images -------------------------------------------------------------------------------------------------


#: The suffixes of images.
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
TEST_FOLDERS = ("test", "validation", "valid", "val")


def _folder(path: Path) -> Data:
    names = {folder.name: folder for folder in _folders(path)}
    part = next((name for name in TEST_FOLDERS if name in names), None)
    others = ", ".join(sorted(names.keys() - {"train", *TEST_FOLDERS}))
    if "train" not in names or (others and part is None):
        return _labelled(path.name, "image", _class_folders(path))
    if others:
        raise FileError(
            f"{path} has folders named train and test and others ({others}): it is unclear whether they are parts or "
            "classes; move the others away, or rename train and test"
        )
    parts = ["train"] if part is None else ["train", part]
    return _labelled(path.name, "image", *(_class_folders(names[name]) for name in parts), test_name=part or "")


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _class_folders(path: Path) -> tuple[list[Path], list[str]]:
    files, labels = [], []
    for folder in _folders(path):
        inside = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        if not inside:
            raise FileError(f"no image in {folder}: expected a folder of images for each class")
        files += inside
        labels += [folder.name] * len(inside)
    if not files:
        raise FileError(f"no sub-folders with images in {path}: expected one for each class")
    return files, labels


# -- Images in .npz archives -------------------------------------------------------------------------------------------


#: The suffix of arrays.
NPZ = ".npz"
ARRAYS = frozenset({"x_train", "y_train", "x_test", "y_test", "x", "y", "images", "labels"})

#: Limit on the total bytes of an archive's arrays: 16 GiB.
LARGEST = 1 << 34
# The largest expansion of Deflate: two bits become at most 258 bytes.
_DEFLATED = 1032


def _npz(path: Path) -> Data:
    try:
        arrays, known = _read_npz(path)
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds of errors for a damaged file
        raise FileError(f"cannot read {path} as an .npz of plain arrays: {first_line(error)}") from None
    for x, y in (("x_train", "y_train"), ("x", "y"), ("images", "labels")):
        if x in arrays and y in arrays:
            pairs = [(x, y)]
            if x == "x_train" and {"x_test", "y_test"} <= set(arrays):
                pairs.append(("x_test", "y_test"))
            parts = [_arrays(path, arrays, *pair) for pair in pairs]
            if len({images.dtype for images, _ in parts}) > 1:
                raise FileError(f"x_train and x_test of {path} are of different types")
            return _labelled(path.name, "image", *parts)
    raise FileError(
        f"{path} holds {summarize(known) if known else 'nothing'}; "
        "expected x_train, y_train, x_test and y_test, or x and y, or images and labels"
    )


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Read the arrays with the usual names, and return them with the names of all arrays."""
    # No array takes more memory than its part of the file can expand to. Deflate shrinks images of one color up to a
    # thousandfold; other compression methods, and headers of later versions, have no such limit.
    arrays, left = dict[str, NDArray[Any]](), LARGEST
    with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name.lower() not in ARRAYS:
                continue
            if name.lower() in arrays:
                raise ValueError(f"it has more than one array {name.lower()}")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in a way that NumPy does not write")
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is not a plain NumPy array (.npy version 1.0)")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                stored = entry.file_size - file.tell()
            size = math.prod(shape) * dtype.itemsize
            most = entry.compress_size * (_DEFLATED if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
            if min(shape, default=0) < 0 or size > min(left, most):
                raise ValueError(f"{name} claims {size:,} bytes; all arrays together may have at most 16 GiB")
            if size != stored:
                raise ValueError(f"{name} claims {size:,} bytes, and has {stored:,}")
            left -= size
            with archive.open(entry) as file:  # the checked member, as a name may occur twice
                arrays[name.lower()] = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # compares the checksum
        return arrays, [entry.filename.removesuffix(".npy") for entry in archive.infolist()]


def _arrays(path: Path, arrays: Mapping[str, NDArray[Any]], x: str, y: str) -> tuple[NDArray[Any], list[Any]]:
    """Return images and their labels."""
    images, labels, count = _images(path, x, arrays[x]), arrays[y], len(arrays[x])
    if labels.size != count or labels.ndim not in (1, 2) or labels.dtype.kind not in "iubUS":
        raise FileError(
            f"{y} of {path} is {labels.dtype} of shape {labels.shape}; expected {count} integers or words, "
            "one per image"
        )
    words = labels.reshape(-1).tolist()
    return images, [word.decode("utf-8", "replace") if isinstance(word, bytes) else word for word in words]


def _images(path: Path, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return images as ``(n, height, width[, channels])``, uint8 or float32 from 0 to 1."""
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3, 4):
        array = np.moveaxis(array, 1, 3)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)) or 0 in array.shape:
        raise FileError(
            f"{name} of {path} has shape {array.shape}; expected images: (n, height, width), "
            "(n, height, width, channels) or (n, channels, height, width), of 1, 3 or 4 channels"
        )
    if array.dtype == np.uint8:
        return np.asarray(array, np.uint8)
    if array.dtype.kind not in "fiub":
        raise FileError(f"{name} of {path} is of type {array.dtype}; expected numbers")
    low, high = float(array.min()), float(array.max())
    if low >= 0 and high <= 1:
        return np.asarray(array, np.float32)
    if low >= 0 and high <= 255:
        return np.asarray(np.rint(array), np.uint8)
    raise FileError(
        f"the pixels of {name} of {path} go from {low:g} to {high:g}; expected 0 to 255, or fractions from 0 to 1"
    )


# -- The datasets library ----------------------------------------------------------------------------------------------


IMAGE_COLUMNS = ("image", "img")


def _from_datasets(
    source: str, text_column: str | None, label_column: str | None, label_names: Sequence[str]
) -> Table | Data:
    try:
        import datasets
    except ImportError:
        raise TnadaptError(
            f"no file or folder {safe_repr(source)}; give one with --data, or pip install 'tnadapt[hub]' to load data "
            "by their name on the hub"
        ) from None
    name, _, config = source.partition(":")
    try:
        with quiet("datasets", "huggingface_hub"):
            if Path(source).is_dir():
                splits = datasets.load_from_disk(source)
            else:
                splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # hubs, proxies and parsers raise many kinds of errors
        raise TnadaptError(
            f"no file or folder {safe_repr(source)}, and datasets cannot load that name: {first_line(error)}; "
            "give --data a file or folder"
        ) from None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    train = splits.get("train")
    if train is None:
        raise TnadaptError(f"{source} has the splits {', '.join(splits)}; expected one named train")
    parts = {part: splits[part] for part in TEST_FOLDERS if part in splits}
    features = train.features.items()
    pictured = [name for name, feature in features if isinstance(feature, datasets.Image)]
    # Class names of columns of numbers, or of lists of numbers.
    named = {name: getattr(getattr(feature, "feature", feature), "names", None) for name, feature in features}
    words = {name: tuple(names) for name, names in named.items() if names}
    # Columns of files, such as images or sounds, rather than JSON values.
    decoded = {name: type(feature).__name__ for name, feature in features if hasattr(feature, "decode_example")}
    opaque = tuple(name for name, class_name in decoded.items() if class_name != "Json")
    tests = {part: _Columns(rows) for part, rows in parts.items()}
    table = Table(source, source, _Columns(train), tests, (), words, opaque)
    if text_column is not None or not pictured:
        return table
    label = table.needed_column("label", label_column, label_names)
    part = next((name for name, rows in parts.items() if set(rows[label]) != {-1}), None)
    column = next((name for name in IMAGE_COLUMNS if name in pictured), pictured[0])
    divided = [(_Pictures(rows, column), list(rows[label])) for rows in (train, part and parts[part]) if rows]
    data = _labelled(source, "image", *divided, test_name=part or "")
    if parts and (first := next(iter(parts))) != part:
        data = dataclasses.replace(data, hidden=(first, _Pictures(parts[first], column)))
    return data.with_words(words[label]) if label in words else data


class _Columns(Mapping[str, Sequence[Any]]):
    """The columns of a part of ``datasets``, each read on access."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, name: str) -> Sequence[Any]:
        if name not in self.rows.column_names:
            raise KeyError(name)
        return list(self.rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.column_names)

    def __len__(self) -> int:
        return len(self.rows.column_names)


class _Pictures:
    """A column of images, each decoded on access."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index][self.column]

    def take(self, indices: Labels) -> _Pictures:
        return _Pictures(self.rows.select(indices), self.column)


# -- Messages of other libraries ---------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """Return the message of another library's error as one line of limited length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A line that ends with a colon introduces the others.
    return " ".join(lines)[:500] if lines[0].endswith(":") else lines[0][:300]


# -- Any of these sources ----------------------------------------------------------------------------------------------


def open_source(
    source: str, text_column: str | None = None, label_column: str | None = None, label_names: Sequence[str] = ()
) -> Table | Data:
    """Open the data that ``--data`` names: a table of texts, or labeled images.

    Parameters
    ----------
    source : str
        A ``.csv`` or ``.tsv`` file with a header line; a ``.jsonl`` or ``.json`` file of objects; a folder with one
        sub-folder per class (or with ``train`` and ``test`` folders that have these); an ``.npz`` with ``x_train``,
        ``y_train``, ``x_test``, ``y_test``, with ``x`` and ``y``, or with ``images`` and ``labels``, of at most 16 GiB
        in total; a folder saved by ``datasets``; else a name for ``datasets.load_dataset``, as ``NAME`` or
        ``NAME:CONFIG``.
    text_column, label_column : str, optional
        With a text column, a source of ``datasets`` is a table even if it has images, too.
    label_names : sequence of str
        Possible names of the label column of images, tried before the usual ones.

    Raises
    ------
    TnadaptError
        If the source does not exist or cannot be read.
    """
    path = Path(source)
    # These functions of os.path return False for a path that cannot be one, such as one that is too long.
    if os.path.isdir(source) and not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _folder(path)
    require_data(source)
    if os.path.isfile(source):
        return read_table(path) if path.suffix.lower() in TABLES else _npz(path)
    return _from_datasets(source, text_column, label_column, (*label_names, *LABEL_COLUMNS))


# Suffixes of files that can be read.
_SUFFIXES = (*TABLES, NPZ)


@checks_arguments
def require_data(source: str, one_image: bool = False) -> None:
    """Raise an error if a source of data is a file of another kind, or a path at which nothing is.

    Parameters
    ----------
    source : str
        As for :func:`~tnadapt.finetune.data.open_source`.
    one_image : bool
        Whether it may be an image, too.

    Raises
    ------
    FileError

    Examples
    --------
    >>> require_data("imdb")  # perhaps a name for datasets
    >>> require_data("nowhere.csv")
    Traceback (most recent call last):
    tnadapt.errors.FileError: no data at nowhere.csv: there is no such file or folder
    """
    path = Path(path_of(source))
    # These functions of os.path return False for a path that cannot be one, such as one that is too long.
    if os.path.isdir(path):
        return
    if os.path.isfile(path):
        if path.suffix.lower() not in (*_SUFFIXES, *(IMAGES if one_image else ())):
            images = "an image or a folder of images" if one_image else "a folder of images"
            raise FileError(
                f"cannot read data from {path}: expected a .csv, .tsv, .jsonl, .json or .npz file, or {images}"
            )
    elif path.suffix.lower() in _SUFFIXES or source.startswith((".", "/", "~")):
        raise FileError(f"no data at {path}: there is no such file or folder")
