"""The rows of a file of predictions: the columns of the data, and next to them those of the predictions."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._sample_tables import Table

__all__ = ["prediction_rows"]

_LEFT_OUT = object()


def prediction_rows(
    source: Table | None, inputs: Sequence[Any], answers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each sample: JSON values, with None for a number that is not finite.

    Parameters
    ----------
    source : Table, optional
        The table that the samples are the first rows of. Its columns keep their names and values; those that JSON
        cannot hold, such as images, are left out.
    inputs : sequence
        The inputs of the samples, which are shown without a table.
    answers : sequence of mapping
        The prediction for each sample, by column. If the table has one of these columns, such as the predictions of
        another adapter, all of them get the first number that makes them new: ``prediction_2``, ``score_2``.

    Examples
    --------
    >>> table = Table("a.csv", "a.csv", {"id": ["7"], "review": ["good"], "score": ["4"]})
    >>> prediction_rows(table, ["good"], [{"prediction": "yes", "score": 0.75}])
    [{'id': '7', 'review': 'good', 'score': '4', 'prediction_2': 'yes', 'score_2': 0.75}]
    """
    if source is None:
        shown = [{"image": str(one) if isinstance(one, Path) else place} for place, one in enumerate(inputs)]
        return [{**one, **_json(answer)} for one, answer in zip(shown, answers, strict=True)]
    columns = _columns(source, len(answers))
    suffix = _suffix(columns, {name: None for answer in answers for name in answer})
    return [
        {name: cells[place] for name, cells in columns.items()}
        | {name + suffix: _json(value) for name, value in answer.items()}
        for place, answer in enumerate(answers)
    ]


def _columns(source: Table, count: int) -> dict[str, list[Any]]:
    """Return the first cells of each column, of those that JSON can hold."""
    found = {}
    for name in source.columns:
        if name not in source.opaque:
            cells = [_json(cell) for cell in source.columns[name][:count]]
            if not any(cell is _LEFT_OUT for cell in cells):
                found[name] = cells
    return found


def _suffix(columns: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """Return what is added to the names of new columns so that none of them is there already."""
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(ending for ending in endings if not any(name + ending in columns for name in names))


def _json(value: Any) -> Any:
    """Return a value of JSON, None for a number that is not finite, or ``_LEFT_OUT`` for what JSON cannot hold."""
    if isinstance(value, Mapping):
        found = {str(name): _json(one) for name, one in value.items()}
        return _LEFT_OUT if any(one is _LEFT_OUT for one in found.values()) else found
    if isinstance(value, (list, tuple)):
        some = [_json(one) for one in value]
        return _LEFT_OUT if any(one is _LEFT_OUT for one in some) else some
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else _LEFT_OUT
