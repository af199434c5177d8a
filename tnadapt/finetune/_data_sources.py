"""Readers of user data: a table of texts, a folder of images, an ``.npz``, or a ``datasets`` name."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.errors import FileError, TnadaptError, safe_repr, summarize

from ._data import Data, Labels, Samples
from ._data_place import IMAGES, require_data
from ._sample_tables import TABLES, Table, needed_column, read_table
from .archives import read_npz

__all__ = ["LABEL_COLUMNS", "TEXT_COLUMNS", "labelled_texts", "open_source", "read"]

ARRAYS = frozenset({"x_train", "y_train", "x_test", "y_test", "x", "y", "images", "labels"})
TEST_FOLDERS = ("test", "validation", "valid", "val")
TEXT_COLUMNS = ("text", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "labels", "class", "target")
IMAGE_COLUMNS = ("image", "img")


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
    if os.path.isdir(source):
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _from_datasets(source, text_column, label_column, (*label_names, *LABEL_COLUMNS))
        return _folder(path)
    require_data(source)
    if os.path.isfile(source):
        return read_table(path) if path.suffix.lower() in TABLES else _npz(path)
    return _from_datasets(source, text_column, label_column, (*label_names, *LABEL_COLUMNS))


def read(
    source: str, text_column: str | None = None, label_column: str | None = None, label_names: Sequence[str] = ()
) -> Data:
    """Read texts or images that each have one class.

    Parameters
    ----------
    source : str
        As in :func:`open_source`.
    text_column, label_column : str, optional
        Columns of a table; found by their usual names by default.
    label_names : sequence of str
        Possible names of the label column, tried before the usual ones if ``label_column`` is not given.

    Returns
    -------
    Data

    Raises
    ------
    TnadaptError
        If the source does not exist or does not hold labeled texts or images.
    """
    found = open_source(source, text_column, label_column, label_names)
    return found if isinstance(found, Data) else labelled_texts(found, text_column, label_column, label_names)


def labelled_texts(
    table: Table, text_column: str | None = None, label_column: str | None = None, label_names: Sequence[str] = ()
) -> Data:
    """Return the texts of a table, each with one class.

    Raises
    ------
    FileError
        If there is no column of texts or of labels, or a cell holds something else.
    """
    names = list(table.columns)
    text = needed_column(table.path, "text", text_column, TEXT_COLUMNS, names)
    label = needed_column(table.path, "label", label_column, (*label_names, *LABEL_COLUMNS), names)
    table.filled([text, label])

    def of(part: Table) -> tuple[Any, list[Any]]:
        labels = list(part.columns[label])
        for row, one in enumerate(labels):
            part.word(label, row, one)  # raises if it is not the number of a class
        return list(part.columns[text]), labels

    test = table.test([text, label], label)
    data = _labelled(table.name, "text", *of(table), None if test is None else of(test))
    words = table.words.get(label)
    return data if not words else data.with_words(words)


def _labelled(
    name: str,
    kind: str,
    inputs: Any,
    labels: Sequence[Any],
    test: tuple[Any, Any] | None = None,
    test_name: str = "test",
) -> Data:
    """Return data whose classes are the distinct labels, sorted (numbers numerically), without outer spaces."""
    for part in [(inputs, labels)] if test is None else [(inputs, labels), test]:
        _check(name, kind, *part)
    labels = _stripped(labels)
    test = None if test is None else (test[0], _stripped(test[1]))
    found = sorted(set(labels) if test is None else set(labels) | set(test[1]))
    place = {label: index for index, label in enumerate(found)}

    def samples(inputs: Any, labels: Sequence[Any]) -> Samples:
        return Samples(inputs, np.array([place[label] for label in labels], np.int64))

    return Data(
        name,
        kind,
        tuple(str(label) for label in found),
        samples(inputs, labels),
        None if test is None else samples(*test),
        test_name,
    )


def _stripped(labels: Sequence[Any]) -> list[Any]:
    return [label.strip() if isinstance(label, str) else label for label in labels]


def _check(name: str, kind: str, inputs: Any, labels: Sequence[Any]) -> None:
    """Raise a FileError unless the labels are words or integers and the texts are strings."""
    kinds = {type(label) for label in labels}
    if not kinds or not (kinds == {str} or kinds <= {int, bool}):
        known = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise FileError(f"the labels of {name} are of type {known}; expected words, or integers")
    for index, text in enumerate(inputs if kind == "text" else []):
        if not isinstance(text, str):
            raise FileError(f"the text of sample {index} of {name} is {safe_repr(text)}")


# -- Images ------------------------------------------------------------------------------------


def _folder(path: Path) -> Data:
    names = {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] != "."}
    if "train" in names and not names.keys().isdisjoint(TEST_FOLDERS) and not names.keys() <= {"train", *TEST_FOLDERS}:
        others = ", ".join(sorted(names.keys() - {"train", *TEST_FOLDERS}))
        raise FileError(
            f"{path} has folders named train and test and others ({others}): it is unclear whether they are parts or "
            "classes; move the others away, or rename train and test"
        )
    if "train" in names and names.keys() <= {"train", *TEST_FOLDERS}:
        part = next((name for name in TEST_FOLDERS if name in names), None)
        divided = None if part is None else _class_folders(names[part])
        return _labelled(path.name, "image", *_class_folders(names["train"]), divided, part or "")
    return _labelled(path.name, "image", *_class_folders(path))


def _class_folders(path: Path) -> tuple[list[Path], list[str]]:
    files, labels = [], []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."):
        inside = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        if not inside:
            raise FileError(f"no image in {folder}: expected a folder of images for each class")
        files += inside
        labels += [folder.name] * len(inside)
    if not files:
        raise FileError(f"no sub-folders with images in {path}: expected one for each class")
    return files, labels


def _npz(path: Path) -> Data:
    try:
        arrays, known = read_npz(path, ARRAYS)
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds of errors for a damaged file
        raise FileError(f"cannot read {path} as an .npz of plain arrays: {first_line(error)}") from None
    for x, y in (("x_train", "y_train"), ("x", "y"), ("images", "labels")):
        if x in arrays and y in arrays:
            inputs, labels = _images(path, x, arrays[x]), _labels(path, y, arrays[y], len(arrays[x]))
            test = None
            if x == "x_train" and {"x_test", "y_test"} <= set(arrays):
                test = (
                    _images(path, "x_test", arrays["x_test"]),
                    _labels(path, "y_test", arrays["y_test"], len(arrays["x_test"])),
                )
                if test[0].dtype != inputs.dtype:
                    raise FileError(f"x_train and x_test of {path} are of different types")
            return _labelled(path.name, "image", inputs, labels, test)
    raise FileError(
        f"{path} holds {summarize(known) if known else 'nothing'}; "
        "expected x_train, y_train, x_test and y_test, or x and y, or images and labels"
    )


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


def _labels(path: Path, name: str, array: NDArray[Any], count: int) -> list[Any]:
    if array.size != count or array.ndim not in (1, 2) or array.dtype.kind not in "iubUS":
        raise FileError(
            f"{name} of {path} is {array.dtype} of shape {array.shape}; expected {count} integers or words, "
            "one per image"
        )
    labels: list[Any] = array.reshape(-1).tolist()
    return [label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in labels]


# -- The datasets library ----------------------------------------------------------------------


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
                found = datasets.load_from_disk(source)
            else:
                found = datasets.load_dataset(name, config or None)
    except Exception as error:  # hubs, proxies and parsers raise many kinds of errors
        raise TnadaptError(
            f"no file or folder {safe_repr(source)}, and datasets cannot load that name: {first_line(error)}; "
            "give --data a file or folder"
        ) from None
    if not isinstance(found, dict):
        found = {"train": found}
    train = found.get("train")
    if train is None:
        raise TnadaptError(f"{source} has the splits {', '.join(found)}; expected one named train")
    parts = {part: found[part] for part in TEST_FOLDERS if part in found}
    pictured = [name for name, feature in train.features.items() if isinstance(feature, datasets.Image)]
    words = {name: names for name, feature in train.features.items() if (names := _class_names(feature))}
    if text_column is not None or not pictured:
        tests = {part: _Columns(rows) for part, rows in parts.items()}
        opaque = tuple(name for name, feature in train.features.items() if _is_decoded(feature))
        return Table(source, source, _Columns(train), tests, (), words, opaque)
    label = needed_column(source, "label", label_column, label_names, train.column_names)
    part = next((name for name, rows in parts.items() if set(rows[label]) != {-1}), None)
    column = next((name for name in IMAGE_COLUMNS if name in pictured), pictured[0])
    divided = None if part is None else (_Pictures(parts[part], column), list(parts[part][label]))
    data = _labelled(source, "image", _Pictures(train, column), list(train[label]), divided, part or "")
    if parts and (first := next(iter(parts))) != part:
        data = dataclasses.replace(data, hidden=(first, _Pictures(parts[first], column)))
    return data.with_words(words[label]) if label in words else data


def _is_decoded(feature: Any) -> bool:
    """Return whether a column holds files, such as images or sounds, rather than values of JSON."""
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the class names of a column of numbers, or of lists of numbers; empty if it has none."""
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


class _Columns(Mapping[str, Sequence[Any]]):
    """The columns of a part of ``datasets``, each read when it is asked for."""

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


def first_line(error: Exception) -> str:
    """Return the message of another library's error as one line of limited length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A line that ends in a colon announces the others.
    return " ".join(lines)[:500] if lines[0].endswith(":") else lines[0][:300]


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence the loggers of other libraries inside ``with``."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
