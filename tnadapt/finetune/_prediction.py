"""Predictions with a saved adapter: the other half of a study."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tnadapt import torch as tnt
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import FileError, TnadaptError

from ._data import Data, Samples
from ._data_sources import IMAGES, open_source
from ._encode import Images
from ._foreign_messages import silent, transformers_library
from ._learning_task import LearningTask
from ._pretrained import logits_of
from ._sample_tables import Table
from ._saved_task import task_in
from ._specification import Part, Spec
from ._text_inputs import encoded, longest_text, tokenizer_of
from .loop import evaluate

__all__ = ["Predictions", "predict"]

#: Settings of images in a file.
_PIXELS = ("image_size", "channels", "pixel_mean", "pixel_std")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The outcome of :func:`predict`.

    Attributes
    ----------
    task : str
    rows : list of dict
        For each sample its input, ``prediction``, and scores where the task has them: JSON values.
    metrics : dict of str to float
        Of all samples; empty if the data have no targets.
    """

    task: str
    rows: list[dict[str, Any]]
    metrics: dict[str, float]


def predict(
    adapter: str | os.PathLike[str],
    data: str,
    *,
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
        As for a study, with or without targets. For images also a folder of images.
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
    about = adapter_format.load(adapter, check_draws=False).pretrained
    task, inputs = task_in(about, os.fspath(adapter))
    assert about is not None
    spec = Spec(data=data, text_column=text_column, label_column=label_column, separator=separator)
    samples, known = _samples(task, data, spec)
    samples = samples if limit is None else samples.take(np.arange(min(limit, len(samples))))
    progress("loading the model")
    # A base by another name is the caller's choice; without one the file's name is used.
    model = tnt.load_pretrained(adapter, base=base, device=device, dtype=torch.float32)
    where = torch.device(device)
    progress("predicting")
    if task.kind == "image":
        return _finished(task, model, about, _pixels(inputs, samples), samples, known, batch, where, None)
    name = tokenizer or inputs.get("tokenizer") or base or about.name
    words = tokenizer_of(str(name), transformers_library())
    longest = longest_text(inputs.get("max_length"), str(base or about.name), words, model)
    made = task.complete(model, words, samples, longest, batch, new_tokens, where)
    part = encoded(task, {"data": samples}, words, longest, model, str(name))["data"] if known or made is None else None
    return _finished(task, model, about, part, samples, known, batch, where, made)


def _finished(
    task: LearningTask,
    model: nn.Module,
    about: Pretrained,
    part: Part | None,
    samples: Samples,
    known: bool,
    batch: int,
    device: torch.device,
    made: list[str] | None,
) -> Predictions:
    """Return predictions from logits, or from the completions that were made, with the metrics of known targets."""
    shown = [_shown(one, place) for place, one in enumerate(samples.inputs)]
    answers: list[dict[str, Any]] = [{} if made is None else {"prediction": one} for one in made or shown]
    metrics: dict[str, float] = {}
    if part is not None:
        compute = logits_of(model, task.kind, about.library)
        with silent(transformers_library()):
            rows = evaluate(model, compute, task, part, device, batch)
        answers = [{**one, **more} for one, more in zip(answers, task.answers(rows, part, samples), strict=True)]
        if known:
            found = task.measure(rows, part.labels)
            metrics = {task.metric.name: found.score, **found.more}
    return Predictions(task.name, [{**one, **more} for one, more in zip(shown, answers, strict=True)], metrics)


def _samples(task: LearningTask, data: str, spec: Spec) -> tuple[Samples, bool]:
    path = Path(data)
    if task.kind == "image" and path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in IMAGES and one.is_file())
        if files:
            return Samples(files, np.zeros(len(files), np.int64)), False
    source: Table | Data = open_source(data, spec.text_column, spec.label_column)
    if task.kind == "text" and isinstance(source, Data):
        raise FileError(f"{source.name} has images, and the adapter was trained on texts ({task.name})")
    return task.samples(source, spec)


def _pixels(inputs: Mapping[str, Any], samples: Samples) -> Part:
    if any(inputs.get(name) is None for name in _PIXELS):
        raise TnadaptError("the adapter's file does not say how images are scaled")
    size, channels, mean, std = (inputs[name] for name in _PIXELS)
    shape = (channels, 1, 1)
    return Images(samples, size, channels, (torch.tensor(mean).reshape(shape), torch.tensor(std).reshape(shape)))


def _shown(one: Any, place: int) -> dict[str, Any]:
    """Return an input as a reader of the predictions recognizes it."""
    if isinstance(one, str):
        return {"text": one}
    if isinstance(one, tuple):
        return {"prompt": one[0]}
    if isinstance(one, list):
        return {"tokens": one} if all(isinstance(word, str) for word in one) else {"messages": one}
    return {"image": str(one) if isinstance(one, Path) else place}
