"""Saving of adapters to files, and swapping in the arrays of another adapter's file."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint, compare, fingerprint
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import FileError, TargetError, TnadaptError, pluralize, safe_repr
from tnadapt.targets.target import Target

from . import _merging as merging
from ._delta_cache import copy_all, gather_full
from ._merging import is_bound
from ._registry import refuse_merged
from ._state import AdapterState, checked_pairs, named_parameters, need_attached
from ._weights import names_of_shared, split_by_file

__all__ = [
    "FileErrorContext",
    "base_fingerprint",
    "check_kept",
    "check_same",
    "fingerprint_of",
    "is_writer",
    "kept_pairs",
    "need_base",
    "save",
    "swap",
    "to_file",
]


# -- The check that a file's adapter has the form of one on a model, and what is said of the difference ----------------


def check_same(adapter: AdapterState, file: AdapterFile) -> None:
    """Raise a FileError unless config, activation, targets and kept parameters are the same."""
    names = names_of_shared(adapter.model)
    # Of a tied weight, an adapter keeps the first name, and a file any of them.
    their_kept, our_kept = (sorted({names.get(name, [name])[0] for name in own}) for own in (file.kept, adapter.kept))
    compared: list[tuple[str, Any, Any, Callable[[Any, Any], str]]] = [
        # How it is trained changes no array.
        ("config", file.config.replace(rate="sgd"), adapter.plan.config.replace(rate="sgd"), _settings),
        ("activation", file.activation, adapter.activation, _values),
        ("list of targets", _places(file.targets), _places(adapter.targets), _targets),
        ("list of kept parameters", their_kept, our_kept, _values),
    ]
    for what, theirs, ours, difference in compared:
        if theirs != ours:
            raise FileError(
                f"its {what} differs from that of adapter {adapter.name!r} ({difference(theirs, ours)}): attach the "
                "adapter as it was for this file, or load the file under another name"
            )


def _values(theirs: Any, ours: Any) -> str:
    return f"{safe_repr(theirs)} in the file, {safe_repr(ours)} here"


def _settings(theirs: Any, ours: Any) -> str:
    """Return the settings that differ, of which the others need no mention."""
    mine, other = ours.to_dict(), theirs.to_dict()
    names = [name for name in mine if name in other and mine[name] != other[name]]
    if not names or mine.keys() != other.keys() or "parts" in mine:
        return _values(theirs, ours)
    return "; ".join(f"{name}: {_values(other[name], mine[name])}" for name in names)


def _targets(theirs: Sequence[tuple[Any, ...]], ours: Sequence[tuple[Any, ...]]) -> str:
    numbers = f"{pluralize(len(theirs), 'weight')} in the file, {len(ours)} here"
    for place in theirs:
        if place not in ours:
            return f"{numbers}; not here: {safe_repr(place[0])} of {place[1]}"
    extra = next((place for place in ours if place not in theirs), None)
    return (
        f"{numbers}; not in the file: {safe_repr(extra[0])} of {extra[1]}" if extra else f"{numbers}, in another order"
    )


def _places(targets: Sequence[Target]) -> list[tuple[Any, ...]]:
    return [(target.label, target.shape, target.index, target.rows, target.tied) for target in targets]


# -- Saving of adapters to files, and swapping in the arrays of another adapter's file ---------------------------------


_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def to_file(adapter: AdapterState, store_bases: bool = False) -> AdapterFile:
    """Return the contents of an adapter's file; if the model is sharded, every process must call.

    The arrays that are computed from the base weights are included with ``store_bases``, and where the weights have no
    fingerprint by which the file could recognize them.
    """
    if not is_bound(adapter.plan):
        raise TargetError(
            f"adapter {adapter.name!r} has arrays that are computed from the base weights, which had no values when it "
            "was attached: call reset() once the model has its weights"
        )
    plan, base = adapter.plan.file_plan, base_fingerprint(adapter)
    all_stored = store_bases or base is None
    stored = {name: array for name, array in plan.given.items() if all_stored or name not in plan.base_shapes}
    dtypes: dict[str, str] = {}

    def host(name: str, tensor: Tensor) -> np.ndarray:
        if tensor.device.type == "meta":
            raise TargetError(f"adapter {adapter.name!r} is on the meta device and has no values to save")
        tensor = gather_full(tensor.detach()).cpu()
        if tensor.dtype is torch.bfloat16:
            dtypes[name] = "bfloat16"
            tensor = tensor.float()
        return tensor.numpy().copy()

    own, shared = _tensors(adapter.model), names_of_shared(adapter.model)
    ties: dict[str, tuple[str, ...]] = dict.fromkeys(adapter.alone, ())
    ties |= {name: tuple(one for one in shared[name] if one != name) for name in adapter.kept if name in shared}
    return AdapterFile(
        config=plan.config,
        targets=adapter.targets,
        arrays=adapter.plan.to_arrays({name: host(name, parameter) for name, parameter in named_parameters(adapter)}),
        kept={name: host(KEPT + name, own[name]) for name in adapter.kept},
        dtypes=dtypes,
        base=base,
        activation=adapter.activation,
        model=adapter.model_name,
        trained=adapter.trained,
        given=stored,
        ties=ties,
    )


def base_fingerprint(adapter: AdapterState) -> Fingerprint | None:
    """Return the fingerprint of the adapted weights without the update; None if one cannot be dequantized."""
    need_base(adapter.model, adapter)
    weights = [merging.original(adapter, index) for index in range(len(adapter.targets))]
    adapter.base = fingerprint_of(weights, adapter.base)
    return adapter.base


def fingerprint_of(weights: list[Tensor | None], expected: Fingerprint | None = None) -> Fingerprint | None:
    """Return the fingerprint of weights; None if one has no numbers.

    Where it is probably the expected one, only the SHA-256 is computed, which takes a fraction of the time.
    """
    known = [weight for weight in weights if weight is not None and weight.device.type != "meta"]
    kinds = {weight.dtype for weight in known}
    if len(known) != len(weights) or not known or not kinds <= _NAMES.keys():
        return None
    # Several dtypes are promoted to one that represents all their values.
    kind = functools.reduce(torch.promote_types, kinds)

    def host() -> Iterator[np.ndarray]:
        for weight in known:
            one = weight.detach().cpu().to(kind).contiguous()
            yield one.view(torch.int16).numpy().view(np.uint16) if one.dtype is torch.bfloat16 else one.numpy()

    if expected is not None and expected.dtype == _NAMES[kind] and compare(expected, host(), _NAMES[kind]) is None:
        return expected
    return fingerprint(host(), _NAMES[kind])


def need_base(model: nn.Module, but: AdapterState | None = None) -> None:
    """Raise a TargetError if another adapter is merged into the weights."""
    refuse_merged(model, "another adapter is saved or loaded", but)


def save(
    adapter: AdapterState, path: str | os.PathLike[str], about: Pretrained | None, store_bases: bool = False
) -> None:
    """Save an adapter; see :meth:`Adapter.save`."""
    need_attached(adapter)
    file = dataclasses.replace(to_file(adapter, store_bases), pretrained=about)
    if is_writer():
        adapter_format.save(path, file)


def is_writer() -> bool:
    """Return whether this process writes files: process 0 of several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def swap(adapter: AdapterState, path: str | os.PathLike[str]) -> None:
    """Load another adapter's arrays in place; see :meth:`Adapter.swap`."""
    need_attached(adapter)
    file = adapter_format.load(path, like=adapter.plan.file_plan)
    with FileErrorContext(path):
        check_same(adapter, file)
        check_kept(adapter.model, file)
        split_by_file(adapter.model, file, False)
        base = base_fingerprint(adapter)
        if file.base is not None and base is not None and not file.base.matches(base):
            raise FileError(f"it was trained on another base model: {file.base.difference(base)}")
        own = adapter.plan.given
        brought = [name for name in own if name not in adapter.plan.base_shapes]
        for array in dict.fromkeys([*file.given, *brought]):
            if array not in own or array not in file.given or not np.array_equal(file.given[array], own[array]):
                raise FileError(
                    f"its frozen array {array!r} differs from that of adapter {adapter.name!r}: load it under another "
                    "name"
                )
    copy_all([*checked_pairs(adapter, file.arrays), *kept_pairs(adapter.model, file)])


class FileErrorContext:
    """A context that turns the package's errors into FileErrors that begin with the path."""

    def __init__(self, path: Any) -> None:
        self.path = os.fsdecode(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TnadaptError):
            raise FileError(f"{self.path}: {error}") from error


def check_kept(model: nn.Module, file: AdapterFile) -> None:
    """Raise a FileError if the model lacks a parameter that the file keeps, or its shape differs."""
    tensors = _tensors(model)
    for name, array in file.kept.items():
        there = tensors.get(name)
        if there is None:
            raise FileError(f"it keeps {name!r}, which this {type(model).__name__} does not have")
        if tuple(there.shape) != array.shape:
            raise FileError(
                f"it keeps {name!r} of shape {array.shape}, and this model's is {tuple(there.shape)}: "
                "build the model with the head that it was trained with"
            )


def kept_pairs(model: nn.Module, file: AdapterFile) -> list[tuple[Tensor, np.ndarray]]:
    """Return the model's tensors that the file keeps, with their values in the file."""
    tensors = _tensors(model)
    return [(tensors[name], array.copy()) for name, array in file.kept.items()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, of a tied weight by each of its names."""
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**own, **dict(model.named_buffers(remove_duplicate=False))}
