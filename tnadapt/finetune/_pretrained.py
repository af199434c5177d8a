"""Open a problem: the user's data and the task that fits them, and the model, from transformers or timm."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, TnadaptError, safe_repr
from tnadapt.report import quiet, silent

from . import _inputs
from ._digits import digits
from ._learning_task import LearningTask, encoded, evidence_of
from ._saved_task import check_recordable
from ._specification import Part, Spec, model_place
from .data import LABEL_COLUMNS, TEXT_COLUMNS, Data, Samples, Table, choose, divide, open_source
from .problem import Problem, check_kept, under
from .tasks import TASKS

# -- Opening a problem -------------------------------------------------------------------------------------------------


@checks_arguments
def open_problem(spec: Spec, progress: Callable[[str, float], None] = lambda what, done: None) -> Problem:
    """Open the model and the data.

    Parameters
    ----------
    spec : Spec
    progress : callable
        Called with ``(what, fraction done)`` during long steps.

    Returns
    -------
    Problem

    Raises
    ------
    TnadaptError
        If one of the two is missing or cannot be read, or they do not fit together.
    """
    spec.check()
    return digits(spec, progress) if spec.model is None else _own_problem(spec)


def _own_problem(spec: Spec) -> Problem:
    """Return the problem of the user's model and data."""
    assert spec.model is not None
    assert spec.data is not None
    source = open_source(spec.data, spec.text_column, spec.label_column, spec.label_names)
    task_class = choose_task(source, spec)
    data = task_class.read(source, spec)
    test = None if data.test is None else choose(data.test, spec.limit, stratified=task_class.stratified)
    some = choose(data.samples, spec.limit, stratified=task_class.stratified)
    data = Data(data.name, data.kind, data.classes, some, test)
    samples = divide(data, validation=spec.holdout, stratified=task_class.stratified)
    task = task_class.of(data, samples["training"])
    model, problem = (_timm if spec.model.startswith("timm:") else _transformers)(spec, data, task, samples)
    with _inputs.refused(f"{safe_repr(spec.model)} does not take the samples of {data.name}"), torch.no_grad():
        part = problem.parts["training"]
        largest = torch.arange(len(part.labels)) if part.lengths is None else part.lengths.argsort(descending=True)
        inputs = part.batch(largest[:2], torch.device("cpu"))
        model.eval()
        task.check(lambda inputs: problem.logits(model, inputs), inputs, f"{safe_repr(spec.model)}", data.name)
    check_kept(model, spec.keep_trainable)
    # Randomly initialized modules must be trained and saved in any case.
    head = spec.keep_trainable or problem.keep_trainable
    keep = (*head, *(name for name in problem.drawn if not under(name, head)))
    problem = dataclasses.replace(problem, keep_trainable=keep)
    check_recordable(problem)
    return problem


# -- The task that fits the data ---------------------------------------------------------------------------------------


def choose_task(source: Table | Data, spec: Spec) -> type[LearningTask]:
    """Return the class of the task.

    Parameters
    ----------
    source : Table or Data
    spec : Spec

    Raises
    ------
    TnadaptError
        If the data do not fit the task that was named, or fit several tasks, or none. The message says what was found
        and what to give.
    """
    task = _evident(source, spec) if spec.task is None else _named(source, spec, spec.task)
    for option in dict.fromkeys(name for task in TASKS.values() for name in task.options):
        if getattr(spec, option) is not None and option not in task.options:
            takers = [name for name, task in TASKS.items() if option in task.options]
            raise TnadaptError(f"--{option} is for {_given(takers)}; the task of {source.name} is {task.name}")
    return task


def _evident(source: Table | Data, spec: Spec) -> type[LearningTask]:
    fits = {name: evidence_of(task, source, spec) for name, task in TASKS.items()}
    evident = [name for name, evidence in fits.items() if evidence.level == "evident"]
    if len(evident) == 1:
        return TASKS[evident[0]]
    open_ones = evident or [name for name, evidence in fits.items() if evidence.level == "possible"]
    if isinstance(source, Table) and open_ones in ([], ["causal-lm"]):
        _need_columns(source, spec, bool(open_ones))
    if not open_ones:
        reasons = "; ".join(f"{name}: {evidence.why}" for name, evidence in fits.items())
        raise TnadaptError(f"{source.name} fits no task ({reasons})")
    reasons = "; ".join(f"{fits[name].why} (--task {name})" for name in open_ones)
    raise TnadaptError(f"the task is not evident from {source.name}: {reasons}; give {_given(open_ones)}")


def _named(source: Table | Data, spec: Spec, name: str) -> type[LearningTask]:
    try:
        chosen = TASKS.find(name)
    except ConfigError as error:
        raise TnadaptError(f"--{error}") from None
    evidence = evidence_of(chosen, source, spec)
    if evidence.level == "no":
        fits = {other: evidence_of(task, source, spec) for other, task in TASKS.items()}
        others = [other for other, evidence in fits.items() if evidence.level in ("evident", "possible")]
        way = f"; these data fit {_given(others)}" if others else ""
        raise TnadaptError(f"--task {name} does not fit: {evidence.why}{way}")
    return chosen


def _given(names: list[str]) -> str:
    return " or ".join(f"--task {name}" for name in names)


def _need_columns(table: Table, spec: Spec, texts: bool) -> None:
    """Raise the error for a missing column of texts or labels."""
    table.needed_column("text", spec.text_column, TEXT_COLUMNS)
    usual = (*spec.label_names, *LABEL_COLUMNS)
    if texts and spec.label_column is None and table.column(None, usual) is None:
        raise TnadaptError(
            f"which column of {table.path} is the label? It has {table.listed()}: give --label-column NAME, or "
            "--task causal-lm to learn the texts themselves"
        )
    table.needed_column("label", spec.label_column, usual)


# -- Models of transformers --------------------------------------------------------------------------------------------


# Usual names of a head that comes with the checkpoint.
HEADS = ("classifier", "score", "head", "classification_head", "fc")


def _transformers(spec: Spec, data: Data, task: LearningTask, samples: dict[str, Samples]) -> tuple[nn.Module, Problem]:
    name = str(spec.model)
    folder, file = model_place(name, data.kind)
    transformers = _inputs.transformers_library()
    auto = getattr(transformers, task.auto)
    new: list[str] = []
    settings: dict[str, Any] = {}
    # A head of another size is initialized randomly; a head to take rows from must come from the checkpoint.
    new_head = task.needs_head and not spec.head_rows
    options: dict[str, Any] = {"num_labels": task.outputs, "ignore_mismatched_sizes": True} if new_head else {}
    options |= {"gguf_file": file} if file else {}

    def build(seed: int) -> nn.Module:
        with silent(transformers), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loaded = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
        if spec.head_rows:
            _cut_head(model, loaded["missing_keys"], spec.head_rows, len(data.classes))
        new[:] = sorted({*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])})
        for setting, value in settings.items():
            setattr(model.config, setting, value)
        return model  # type: ignore[no-any-return]

    way = "" if Path(name).exists() else "; no such folder is here: check the name, or use --model with a folder"
    what = f"cannot load {safe_repr(name)} for {data.kind}s through transformers"
    with _inputs.refused(what, way):
        model = build(0)
    drawn = tuple(dict.fromkeys(key.rpartition(".")[0] or key for key in new))
    if len(new) == len(model.state_dict()):
        raise TnadaptError(
            f"{safe_repr(name)} has none of the weights of {type(model).__name__}; give a checkpoint of that model"
        )
    if task.kind == "image":
        size, channels, statistics = _inputs.image_settings(name, transformers, model.config, spec.image_size)
        images = dict(_inputs.divided_images(samples, size, channels, statistics))
        parts, source = cast("Mapping[str, Part]", images), _described(images)
    else:
        vocabulary = spec.tokenizer or name
        tokenizer = _inputs.tokenizer_of(vocabulary, transformers, split_words=task.split_words)
        settings["pad_token_id"] = tokenizer.pad_token_id
        longest = _inputs.longest_text(spec.max_length, name, tokenizer, model)
        parts = encoded(task, samples, tokenizer, longest, model, vocabulary)
        # Predictions may be run in another folder.
        is_folder = spec.tokenizer and os.path.isdir(spec.tokenizer)
        source = {"tokenizer": os.path.abspath(vocabulary) if is_folder else spec.tokenizer, "max_length": longest}
    model = build(0)
    brought = () if drawn or not new_head else _head(model)
    return model, Problem(
        f"{data.name} with {Path(name).name}", data.kind, data.classes, dict(parts), build,
        logits_of(model, data.kind), brought, drawn, task, source=source,
    )  # fmt: skip


def _described(images: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, channels and normalization as JSON values."""
    training = images["training"]
    mean, std = (numbers.flatten().tolist() for numbers in training.statistics)
    return {"image_size": training.size, "channels": training.channels, "pixel_mean": mean, "pixel_std": std}


def _cut_head(model: nn.Module, missing: Sequence[str], rows: Sequence[int], classes: int) -> None:
    """Reduce the checkpoint's head to some of its classes."""
    name = _head(model)[0]
    whole = getattr(model, name)
    if not isinstance(whole, nn.Linear) or any(under(key, [name]) for key in missing):
        raise TnadaptError(f"the checkpoint has no linear head {name!r} to take rows from; leave head_rows out")
    if len(rows) != classes or not all(0 <= row < whole.out_features for row in rows):
        raise TnadaptError(
            f"head_rows needs {classes} of the {whole.out_features} classes of the checkpoint's head, one for each "
            f"class of the data; got {list(rows)}"
        )
    cut = nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None)
    cut.load_state_dict({key: tensor[list(rows)] for key, tensor in whole.state_dict().items()})
    setattr(model, name, cut)
    model.config.num_labels = len(rows)  # type: ignore[union-attr]


def _head(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's heads from the checkpoint, which must be among the usual names."""
    heads = tuple(name for name in HEADS if hasattr(model, name))
    if not heads:
        raise TnadaptError(
            f"cannot tell which part of {type(model).__name__} is its head; its parts are "
            f"{', '.join(name for name, _ in model.named_children())}: give --keep-trainable NAME"
        )
    return heads


# -- Models of timm ----------------------------------------------------------------------------------------------------


def _timm(spec: Spec, data: Data, task: LearningTask, samples: dict[str, Samples]) -> tuple[nn.Module, Problem]:
    if spec.head_rows:
        raise TnadaptError("head_rows needs a head that transformers loads: use --model with a folder or a hub name")
    if data.kind != "image":
        raise TnadaptError(f"{spec.model} is an image model, but {data.name} has texts")
    try:
        import timm
    except ImportError:
        raise TnadaptError("timm is not installed: pip install 'tnadapt[hub]'") from None
    name = str(spec.model).removeprefix("timm:")

    def build(seed: int) -> nn.Module:
        more: dict[str, Any] = {"img_size": spec.image_size} if spec.image_size else {}
        with quiet("timm", "huggingface_hub"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return timm.create_model(name, pretrained=True, num_classes=len(data.classes), **more)  # type: ignore[no-any-return]
            except TypeError:  # models that accept any size have no img_size argument
                return timm.create_model(name, pretrained=True, num_classes=len(data.classes))  # type: ignore[no-any-return]

    with _inputs.refused(f"cannot load {safe_repr(name)} through timm"):
        model = build(0)
    config: Any = model.pretrained_cfg
    if spec.image_size:
        _inputs.require_whole_patches(spec.image_size, getattr(getattr(model, "patch_embed", None), "patch_size", None))
    named = config.get("classifier") or "head"
    head = (named,) if isinstance(named, str) else tuple(named)
    channels, *_, side = config["input_size"]
    statistics = (config["mean"], config["std"])
    parts = dict(_inputs.divided_images(samples, spec.image_size or side, channels, statistics))
    return model, Problem(
        f"{data.name} with {Path(name).name}", data.kind, data.classes, dict[str, Part](parts), build,
        logits_of(model, data.kind, "timm"), head, (), task, source=_described(parts),
    )  # fmt: skip


def logits_of(model: nn.Module, kind: str, library: str = "transformers") -> Callable[[nn.Module, Any], Tensor]:
    """Return the function that computes the logits of a model like this one from a batch.

    Parameters
    ----------
    model : nn.Module
    kind : {"text", "image"}
    library : {"transformers", "timm"}
    """
    if library == "timm":
        return lambda model, images: model(images)
    if kind == "text":
        return lambda model, inputs: model(**inputs).logits
    name = "interpolate_pos_encoding"
    more = {name: True} if name in inspect.signature(model.forward).parameters else {}
    return lambda model, inputs: model(pixel_values=inputs, **more).logits
