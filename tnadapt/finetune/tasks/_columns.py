"""What tasks on tables share: their columns of texts and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.errors import FileError, safe_repr

from .._data import Data
from .._data_sources import LABEL_COLUMNS, TEXT_COLUMNS
from .._label_facts import LabelFacts, facts_of
from .._learning_task import Evidence
from .._sample_tables import Table, find_column, needed_column
from .._specification import Spec

__all__ = [
    "class_numbers",
    "columns_of",
    "label_facts",
    "labels_of",
    "missing_columns",
    "texts_of",
]


def class_numbers(classes: Sequence[str], labels: Sequence[str], name: str) -> list[int]:
    """Return the numbers of classes by their names.

    Raises
    ------
    FileError
        If there is no such class.
    """
    place = {one: index for index, one in enumerate(classes)}
    for label in labels:
        if label not in place:
            known = ", ".join(map(repr, classes[:20]))
            raise FileError(f"{name} has the label {safe_repr(label)}; the adapter knows {known}")
    return [place[label] for label in labels]


def columns_of(table: Table, spec: Spec) -> tuple[str | None, str | None]:
    """Return the columns of texts and of labels; None for one that is not there."""
    names = list(table.columns)
    usual = (*spec.label_names, *LABEL_COLUMNS)
    text = find_column(table.path, spec.text_column, TEXT_COLUMNS, names)
    return text, find_column(table.path, spec.label_column, usual, names)


def missing_columns(source: Table | Data, spec: Spec) -> Evidence | None:
    """Return the evidence against a task on labeled texts, or None if there are both columns."""
    if isinstance(source, Data):
        return Evidence("no", f"{source.name} has images")
    text, label = columns_of(source, spec)
    if text is not None and label is not None:
        return None
    what = "texts" if text is None else "labels"
    return Evidence("no", f"{source.name} has no column of {what}, only {source.listed()}")


def label_facts(table: Table, spec: Spec) -> tuple[str, LabelFacts]:
    """Return the name of the label column, and what is in it."""
    name = columns_of(table, spec)[1]
    assert name is not None
    table.filled([name])
    return name, facts_of(list(table.columns[name]), spec.separator)


def texts_of(table: Table, spec: Spec) -> list[str]:
    """Return the texts.

    Raises
    ------
    FileError
        If there is no column of texts, or a cell of it holds something else.
    """
    name = needed_column(table.path, "text", spec.text_column, TEXT_COLUMNS, list(table.columns))
    table.filled([name])
    texts = list(table.columns[name])
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise FileError(f"the text of sample {index} of {table.name} is {safe_repr(text)}")
    return texts


def labels_of(table: Table, spec: Spec) -> list[Any]:
    """Return the labels.

    Raises
    ------
    FileError
        If there is no column of labels.
    """
    usual = (*spec.label_names, *LABEL_COLUMNS)
    name = needed_column(table.path, "label", spec.label_column, usual, list(table.columns))
    table.filled([name])
    return list(table.columns[name])
