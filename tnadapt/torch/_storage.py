"""Adapters to and from files, and onto the models they belong to."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint, fingerprint
from tnadapt.errors import FileError, TargetError, TnadaptError
from tnadapt.targets.pairing import paired
from tnadapt.targets.target import Target

from . import _merging as merging
from ._attach import attach, check_name
from ._registry import BOOK, overlapping
from ._sharding import copy_all, whole
from ._target_selection import find_targets
from ._trainable import keep

if TYPE_CHECKING:
    from ._adapter import Adapter

__all__ = ["FILE_NAME", "base_fingerprint", "from_pretrained", "load", "save", "save_pretrained", "swap", "to_file"]

FILE_NAME = "adapter.safetensors"

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


# -- Out -----------------------------------------------------------------------------------------------------


def to_file(adapter: Adapter) -> AdapterFile:
    """What a file of an adapter holds; every process must call where the model is sharded."""
    dtypes: dict[str, str] = {}

    def host(name: str, tensor: Tensor) -> np.ndarray:
        if tensor.device.type == "meta":
            raise TargetError(f"adapter {adapter.name!r} is on the meta device and has no numbers to save")
        tensor = whole(tensor.detach()).cpu()
        if tensor.dtype is torch.bfloat16:
            dtypes[name] = "bfloat16"
            tensor = tensor.float()
        return tensor.numpy().copy()

    own = {**dict(adapter.model.named_parameters()), **dict(adapter.model.named_buffers())}
    return AdapterFile(
        config=adapter.config,
        targets=adapter.targets,
        arrays={name: host(name, parameter) for name, parameter in adapter.named_parameters()},
        kept={name: host(KEPT + name, own[name]) for name in adapter.kept},
        dtypes=dtypes,
        base=base_fingerprint(adapter),
        activation=adapter.activation,
        model=adapter.model_name,
        trained=adapter.trained,
    )


def base_fingerprint(adapter: Adapter) -> Fingerprint | None:
    """Of the weights it updates, as they are without it; None for quantised ones."""
    _need_base(adapter.model, adapter)
    return _fingerprint([merging.original(adapter, index) for index in range(len(adapter.targets))])


def _fingerprint(weights: list[Tensor | None]) -> Fingerprint | None:
    known = [weight for weight in weights if weight is not None and weight.device.type != "meta"]
    kinds = {weight.dtype for weight in known}
    if len(known) != len(weights) or not known or not kinds <= _NAMES.keys():
        return None
    # Of several dtypes, the one that has all their numbers.
    kind = functools.reduce(torch.promote_types, kinds)

    def host() -> Iterator[np.ndarray]:
        for weight in known:
            one = weight.detach().cpu().to(kind).contiguous()
            yield one.view(torch.int16).numpy().view(np.uint16) if one.dtype is torch.bfloat16 else one.numpy()

    return fingerprint(host(), _NAMES[kind])


def _need_base(model: nn.Module, but: Adapter | None = None) -> None:
    """A TargetError where another adapter is merged into the weights."""
    for other in overlapping(model):
        if other is not but and other.merged is not None:
            raise TargetError(
                f"adapter {other.name!r} is merged into the base: unmerge it before another is saved or loaded"
            )


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """See :meth:`Adapter.save`."""
    adapter.need_attached()
    file = to_file(adapter)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        adapter_format.save(path, file)


def save_pretrained(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """See :meth:`Adapter.save_pretrained`."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{os.fspath(folder)}: cannot make this folder: {error}") from None
    save(adapter, Path(folder) / FILE_NAME)


# -- In ------------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    untie: bool = False,
) -> Adapter:
    """Attach the adapter of a file.

    Parameters
    ----------
    model : Module
        The base model that it was trained on.
    path : path-like
        A file that :meth:`Adapter.save` or :func:`tnadapt.save` wrote.
    name : str
        Of the adapter on this model.
    check_base : bool
        Whether the model's weights must be those that it was trained on. False applies it to another model whose
        weights have the same shapes.
    untie : bool
        As :func:`tnadapt.torch.attach` takes it: an adapter that was attached so is loaded so.

    Returns
    -------
    Adapter
        Attached, its parameters, which of them are trained, and what was kept trainable as they were saved.

    Raises
    ------
    FileError
        If the file is damaged, draws other numbers than this machine, or does not belong to this model: names, shapes,
        or the fingerprint of the adapted weights. The model is as it was then.
    TargetError
        If there is an adapter of that name on the model.

    Notes
    -----
    Weights are found by their paths; where a model's modules have been renamed since, by role and shape, all or none.

    Examples
    --------
    >>> import tempfile, torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter = tnadapt.torch.attach(model)
    ...     adapter.save(folder + "/adapter.safetensors")
    ...     adapter.detach()
    ...     tnadapt.torch.load(model, folder + "/adapter.safetensors").num_parameters
    368
    """
    file = adapter_format.load(path)
    with _about(path):
        targets = _located(model, file)
        kept = _kept(model, file)
        base = _base(model, targets)
        if check_base and file.base is not None and base is not None:
            difference = file.base.difference(base)
            if difference is not None:
                raise FileError(
                    f"it was trained on another base model than this {type(model).__name__}: of the adapted weights, "
                    f"{difference}. Give the model it was trained on, or check_base=False"
                )
        dtype = getattr(torch, file.dtype)
    check_name(model, name)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        adapter = attach(
            model, file.config, targets, name, keep_trainable=list(kept), activation=file.activation, dtype=dtype,
            untie=untie,
        )  # fmt: skip
        adapter.kept = tuple(file.kept)
        kept_pairs = _kept_pairs(model, file)
        before = [(tensor, tensor.detach().clone()) for tensor, _ in kept_pairs]
        copy_all([*adapter.fitting(file.arrays), *kept_pairs])
        keep(adapter, file.trained)
    except BaseException:  # KeyboardInterrupt, too, from when on it is attached
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        left = model.__dict__.get(BOOK, {}).get(name)
        if left is not None:
            left.take_off()
        raise
    return adapter


def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    untie: bool = False,
) -> Adapter:
    """Attach the adapter that :meth:`Adapter.save_pretrained` wrote to a folder; see :func:`load`."""
    return load(model, Path(folder) / FILE_NAME, name, check_base=check_base, untie=untie)


def swap(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """See :meth:`Adapter.swap`."""
    adapter.need_attached()
    file = adapter_format.load(path)
    with _about(path):
        for what, theirs, ours in (
            ("config", file.config, adapter.config),
            ("activation", file.activation, adapter.activation),
            ("targets", [(t.name, t.shape) for t in file.targets], [(t.name, t.shape) for t in adapter.targets]),
            ("list of kept parameters", sorted(file.kept), sorted(adapter.kept)),
        ):
            if theirs != ours:
                raise FileError(f"its {what} is not that of adapter {adapter.name!r}: load it under a name of its own")
        _kept(adapter.model, file)
        base = base_fingerprint(adapter)
        if file.base is not None and base is not None and not file.base.matches(base):
            raise FileError(f"it was trained on another base model: {file.base.difference(base)}")
    copy_all([*adapter.fitting(file.arrays), *_kept_pairs(adapter.model, file)])


class _about:  # noqa: N801  # a context manager reads as a word
    """Errors inside are FileErrors that begin with the path."""

    def __init__(self, path: Any) -> None:
        self.path = os.fsdecode(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TnadaptError):
            raise FileError(f"{self.path}: {error}") from error


def _located(model: nn.Module, file: AdapterFile) -> list[Target]:
    """The file's targets on this model: where it says, or else those of the same roles and shapes."""
    try:
        return find_targets(model, list(file.targets), untie=True)
    except TargetError as error:
        wrong = str(error).partition(";")[0]
    roles = "".join(dict.fromkeys(target.role for target in file.targets))
    if not set(roles) <= set("qkvo"):
        raise FileError(f"this {type(model).__name__} does not have its weights: {wrong}")
    try:
        found = find_targets(model, roles)
    except TargetError:
        found = []
    theirs, ours = ([(target.role, target.shape) for target in targets] for targets in (file.targets, found))
    partners = paired(file.targets, found)
    if partners is None:
        unclear = " of which it is clear which is which" if sorted(theirs) == sorted(ours) else ""
        raise FileError(
            f"this {type(model).__name__} does not have its weights ({wrong}), nor weights of the same roles and "
            f"shapes{unclear}: the file has {_counted(theirs)}, the model {_counted(ours)}"
        )
    return [dataclasses.replace(new, layer=old.layer) for new, old in zip(partners, file.targets, strict=True)]


def _counted(weights: list[tuple[str, tuple[int, int]]]) -> str:
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for weight in weights:
        counts[weight] = counts.get(weight, 0) + 1
    listed = [f"{count} {role} of {rows}×{cols}" for (role, (rows, cols)), count in list(counts.items())[:6]]
    return ", ".join(listed) + (", …" if len(counts) > 6 else "") or "none"


def _kept(model: nn.Module, file: AdapterFile) -> dict[str, nn.Parameter]:
    """The model's parameters among those that the file keeps; an error if it lacks any, or their shapes differ."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, array in file.kept.items():
        there = parameters.get(name, buffers.get(name))
        if there is None:
            raise FileError(f"it keeps {name!r}, which this {type(model).__name__} does not have")
        if tuple(there.shape) != array.shape:
            raise FileError(
                f"it keeps {name!r} of shape {array.shape}, and this model's is {tuple(there.shape)}: "
                "build the model with the head that it was trained with"
            )
    return {name: parameters[name] for name in file.kept if name in parameters}


def _kept_pairs(model: nn.Module, file: AdapterFile) -> list[tuple[Tensor, np.ndarray]]:
    """The model's own tensors that the file keeps, and their values there."""
    own: Mapping[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [(own[name], array.copy()) for name, array in file.kept.items()]


def _base(model: nn.Module, targets: list[Target]) -> Fingerprint | None:
    _need_base(model)
    weights: list[Tensor | None] = []
    for target in targets:
        owner = model.get_submodule(target.module)
        parameter: Tensor | None = owner._parameters.get(target.parameter)
        parameter = merging.computed(owner, target.parameter) if parameter is None else parameter
        plain = parameter is not None and parameter.is_floating_point()
        weights.append(target.select(whole(parameter.detach())) if parameter is not None and plain else None)
    return _fingerprint(weights)
