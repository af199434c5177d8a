"""Predictions with a saved adapter, and the rows of the files in which they are written."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tnadapt import torch as tnt
from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import adapter_format
from tnadapt.errors import FileError, safe_repr
from tnadapt.report import silent

from ._inputs import Images, lengths, longest_text, refused, tokenizer_of, transformers_library
from ._learning_task import LearningTask, encoded, evidence_of
from ._pretrained import logits_of
from ._saved_task import pixel_settings, task_in, tokenizer_in
from ._specification import Part, Spec
from .data import IMAGES, Data, Samples, Table, open_source
from .loop import evaluate

# -- The rows of a file of predictions ---------------------------------------------------------------------------------


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
        shown = [{"image": str(row) if isinstance(row, Path) else place} for place, row in enumerate(inputs)]
        return [{**row, **_json(answer)} for row, answer in zip(shown, answers, strict=True)]
    columns = {
        name: [_json(cell) for cell in source.columns[name][: len(answers)]]
        for name in source.columns
        if name not in source.opaque
    }
    columns = {name: cells for name, cells in columns.items() if _LEFT_OUT not in cells}
    names = {name for answer in answers for name in answer}
    suffixes = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    suffix = next(suffix for suffix in suffixes if not any(name + suffix in columns for name in names))
    return [
        {name: cells[place] for name, cells in columns.items()}
        | {name + suffix: _json(value) for name, value in answer.items()}
        for place, answer in enumerate(answers)
    ]


def _json(value: Any) -> Any:
    """Return a JSON value, None for a number that is not finite, or ``_LEFT_OUT`` for what JSON cannot represent."""
    if isinstance(value, Mapping):
        fields = {str(name): _json(item) for name, item in value.items()}
        return _LEFT_OUT if _LEFT_OUT in fields.values() else fields
    if isinstance(value, (list, tuple)):
        items = [_json(item) for item in value]
        return _LEFT_OUT if _LEFT_OUT in items else items
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else _LEFT_OUT


# -- Predictions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The outcome of :func:`predict`.

    Attributes
    ----------
    task : str
    rows : list of dict
        For each sample the columns of the data, ``prediction``, and scores where the task has them: JSON values, with
        None for a number that is not finite. Where the data have such a column, the new ones are called
        ``prediction_2`` and so on. Of images there is one column, ``image``.
    metrics : dict of str to float
        Of all samples; empty if the data have no targets.
    part : str
        The part that was predicted, such as ``test``; "" if the data are not divided.
    """

    task: str
    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    part: str = ""


@checks_arguments
def predict(
    adapter: str | os.PathLike[str],
    data: str,
    *,
    member: int | str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    separator: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    new_tokens: int | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> Predictions:
    """Predict with an adapter that a study of the user's own model saved.

    Parameters
    ----------
    adapter : path-like
        The file.
    data : str
        As for a study, with or without targets. For images also a folder of images, or a single one. Of data with
        parts, only the test part is predicted.
    member : int or str, optional
        Of a population's file, the number or name of the member to predict with.
    base, tokenizer : str, optional
        Folder or hub name, instead of those in the file.
    text_column, label_column, separator : str, optional
        As for a study.
    limit : int, optional
        Only the first samples.
    batch : int
        Batch size.
    new_tokens : int, optional
        The most tokens of a completion; 64 by default, or half of the model's positions if these are fewer.
    device : str
    progress : callable
        Called with the name of each step that takes time.

    Returns
    -------
    Predictions

    Raises
    ------
    TnadaptError
        If the file has no task, the data do not fit it, or the base is missing or another one.
    """
    path = os.fspath(adapter)
    about = adapter_format.load_single(adapter, check_draws=False, member=member).pretrained
    task, inputs = task_in(about, path)
    assert about is not None
    spec = Spec(data=data, text_column=text_column, label_column=label_column, separator=separator)
    which, samples, known, table = _samples(task, data, spec)
    samples = samples if limit is None else samples.take(np.arange(min(limit, len(samples))))
    pixels = pixel_settings(inputs, path) if task.kind == "image" else None
    vocabulary, at = tokenizer_in(about, inputs, tokenizer, base, path)
    progress("loading the model")
    # A base by another name is the caller's choice; by default, the file's name is used.
    model = tnt.load_pretrained(adapter, member=member, base=base, device=device, dtype=torch.float32)
    where, completions = torch.device(device), None
    progress(f"predicting the {which} part of {data}" if which else "predicting")
    part: Part | None
    if pixels is not None:
        size, channels, *statistics = pixels
        mean, std = (torch.tensor(numbers, dtype=torch.float32).reshape(channels, 1, 1) for numbers in statistics)
        part = Images(samples, size, channels, (mean, std))
    else:
        words = tokenizer_of(vocabulary, transformers_library(), split_words=task.split_words, revision=at)
        longest = _longest(inputs, path, str(base or about.name), words, model)
        completions = task.complete(model, words, samples, longest, batch, new_tokens, where)
        wanted = known or completions is None
        part = encoded(task, {"data": samples}, words, longest, model, vocabulary)["data"] if wanted else None
    answers = [{} if completions is None else {"prediction": completions[row]} for row in range(len(samples))]
    metrics: dict[str, float] = {}
    if part is not None:
        compute, name = logits_of(model, task.kind, about.library), f"the model of {path}"
        with silent(transformers_library()):
            if task.outputs is not None:
                with refused(f"{name} does not take the samples of {data}"), torch.no_grad():
                    first = part.batch(torch.arange(min(2, len(part.labels))), where)
                    task.check(lambda inputs: compute(model, inputs), first, name, data)
            rows = evaluate(model, compute, task, part, where, batch)
        answers = [{**answer, **more} for answer, more in zip(answers, task.answers(rows, part, samples), strict=True)]
        if known:
            measured = task.measure(rows, part.labels)
            metrics = {task.metric.name: measured.score, **measured.more}
    return Predictions(task.name, prediction_rows(table, samples.inputs, answers), metrics, which)


def _longest(inputs: Mapping[str, Any], path: str, base: str, tokenizer: Any, model: Any) -> int:
    """Return the number of tokens to which texts are truncated."""
    length, (least, most) = inputs.get("max_length"), lengths(tokenizer, model)
    if length is not None and not least <= length <= most:
        raise FileError(
            f"{path} has the max_length {length}; expected {least} to {most}, for the base {safe_repr(base)} and its "
            "tokenizer"
        )
    return longest_text(length, base, tokenizer, model)


def _samples(task: LearningTask, data: str, spec: Spec) -> tuple[str, Samples, bool, Table | None]:
    """Return the name of the part to predict, its samples, whether they have targets, and their table."""
    path = Path(data)
    if task.kind == "image":
        inside = path.iterdir() if path.is_dir() else [path]
        files = sorted(path for path in inside if path.suffix.lower() in IMAGES and path.is_file())
        if files:
            return "", Samples(files, np.zeros(len(files), np.int64)), False, None
    source: Table | Data = open_source(data, spec.text_column, spec.label_column)
    if (task.kind == "image") != isinstance(source, Data):
        raise FileError(f"{evidence_of(task, source, spec).why}, and the adapter was trained for {task.name}")
    part = ""
    if isinstance(source, Table) and source.tests:
        part = next(iter(source.tests))
        source = source.part(part)
    elif isinstance(source, Data) and source.hidden is not None:
        part, inputs = source.hidden
        return part, Samples(inputs, np.zeros(len(inputs), np.int64)), False, None
    elif isinstance(source, Data) and source.test is not None:
        part, source = source.test_name, dataclasses.replace(source, samples=source.test, test=None)
    return part, *task.samples(source, spec), source if isinstance(source, Table) else None
