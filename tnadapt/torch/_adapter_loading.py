"""Loading of adapters from files onto models."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.checkpoints.module_names import ModuleNames
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import FileError, TargetError
from tnadapt.targets.pairing import paired
from tnadapt.targets.prefixes import renamed_targets
from tnadapt.targets.target import Target

from . import _merging as merging
from ._adapter import Adapter
from ._adapter_saving import FileErrorContext, check_kept, fingerprint_of, kept_pairs, need_base
from ._arrays import checked_pairs
from ._attach import attach_with, check_name, checked_dtype
from ._bundle.hub import adapter_path
from ._bundle.libraries import describe
from ._removal import take_off
from ._sharding import copy_all
from ._state import ADAPTERS_ATTR
from ._target_selection import find_targets
from ._tied_weights import names_of_shared, split_by_file
from ._trainable import keep

__all__ = ["attach_file", "from_pretrained", "load"]

_log = logging.getLogger(__name__)

# Of weights whose sketches are not far apart; those of another model are 1.4 apart.
_CLOSE = (
    "They are about {:.2g} % apart, as quantized weights are from the originals (a common factor of all weights does "
    "not count). "
)


@checks_arguments
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    untie: bool = False,
    keep_tied: bool = False,
    detach_norm: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype | str | None = None,
) -> Adapter:
    """Load an adapter from a file and attach it.

    Parameters
    ----------
    model : Module
        The base model that it was trained on.
    path : path-like
        A file that :meth:`Adapter.save` or :func:`tnadapt.save` wrote.
    name : str
        Name of the adapter on this model.
    check_base : bool
        Whether the model's weights must be those that it was trained on. False allows another model whose weights have
        the same shapes.
    untie : bool
        As in :func:`tnadapt.torch.attach`; an adapter that was attached with it must be loaded with it. A parameter
        that the file keeps of one module alone, as PEFT's ``modules_to_save`` are, becomes a copy as well.
    keep_tied : bool
        As in :func:`tnadapt.torch.attach`. A file of an adapter that was attached with it says so; it is for files that
        do not, such as those that :func:`tnadapt.extract` makes of checkpoints.
    detach_norm : bool
        As in :func:`tnadapt.torch.attach`.
    dropout : float
        As in :func:`tnadapt.torch.attach`, for training it further.
    dtype : torch.dtype or str, optional
        Dtype of the arrays, such as ``torch.bfloat16`` or ``"bfloat16"``. By default, that of the file if it is
        float32 or float64, and float32 for arrays in half precision, as in PEFT. If the update depends on the dtype,
        as frozen arrays or a start that is subtracted are rounded to it, it stays that of the file.

    Returns
    -------
    Adapter
        Attached, with its parameters, the choice of trained arrays and the kept parameters as they were saved.

    Raises
    ------
    FileError
        If the file is damaged, its random draws differ from this machine's, or it does not belong to this model: names,
        shapes, or the fingerprint of the adapted weights. The model is then unchanged.
    TargetError
        If the model already has an adapter of that name.

    Notes
    -----
    Weights are found by their paths, or by the names that transformers gives them in checkpoints. If modules have been
    renamed since, all weights are matched by role and shape.

    Float32 holds all numbers of half precision, so the update is that of the file. If it is saved again, it is in
    float32; ``dtype=`` keeps another dtype.

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
    wanted = checked_dtype(dtype) if dtype is not None else None
    return attach_file(
        model, adapter_format.load(path), path, name, check_base, wanted, untie=untie, keep_tied=keep_tied,
        detach_norm=detach_norm, dropout=dropout,
    )  # fmt: skip


def attach_file(
    model: nn.Module,
    file: AdapterFile,
    path: str | os.PathLike[str],
    name: str,
    check_base: bool,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Adapter:
    """Attach an adapter that was read from a path, with these options of ``attach``; see :func:`load`."""
    with FileErrorContext(path):
        dtype = dtype or _dtype_on_load(file)
        targets = _located(model, file)
        check_kept(model, file)
        copies = split_by_file(model, file, options.get("untie", False), options.get("keep_tied", False))
        kept = _kept(model, file, copies)
        base = _base(model, targets, file.base)
        if check_base and file.base is not None and base is not None:
            difference = file.base.difference(base)
            if difference is not None:
                apart = file.base.apart(base)
                close = _CLOSE.format(100 * apart) if apart < 0.5 else ""
                raise FileError(
                    f"it was trained on another base model than this {type(model).__name__}: of the adapted weights, "
                    f"{difference}. {close}Give the model it was trained on, or "
                    "check_base=False"
                )
        if not file.complete and (not check_base or file.base is None or base is None):
            raise FileError(
                "its arrays are computed from the base weights, which have to be those that it was trained on: give "
                "the model with its weights and leave check_base=False out, or save the adapter with store_bases=True"
            )
    check_name(model, name)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        adapter = attach_with(
            model, file.config, targets, name, kept=kept, activation=file.activation, dtype=dtype, given=file.given,
            fresh=False, copies=copies, **options,
        )  # fmt: skip
        state = adapter._state
        state.alone += tuple(one for one, others in file.ties.items() if not others and one not in state.alone)
        state.pretrained = _recorded(model, file.pretrained, check_base)
        own = kept_pairs(model, file)
        before = [(tensor, tensor.detach().clone()) for tensor, _ in own]
        copy_all([*checked_pairs(state, file.arrays), *own])
        keep(state, file.trained)
    except BaseException:  # KeyboardInterrupt, too, at any point after attaching
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        left = model.__dict__.get(ADAPTERS_ATTR, {}).get(name)
        if left is not None:
            take_off(left)
        raise
    _log.info("loaded %r", adapter)
    return adapter


@checks_arguments
def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    untie: bool = False,
    keep_tied: bool = False,
    detach_norm: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Attach the adapter that :meth:`Adapter.save_pretrained` wrote to a folder, or one on the hub; see :func:`load`.

    ``revision`` and ``token`` are those of a repository on the hub. :func:`load_pretrained` builds the model, too.
    """
    return load(
        model, adapter_path(folder, revision, token), name, check_base=check_base, untie=untie, keep_tied=keep_tied,
        detach_norm=detach_norm, dropout=dropout, dtype=dtype,
    )  # fmt: skip


def _dtype_on_load(file: AdapterFile) -> torch.dtype:
    """Return the dtype that an adapter's arrays get by default: half precision is for storage, not for training."""
    dtype: torch.dtype = getattr(torch, file.dtype)
    return dtype if dtype.itemsize > 2 or file.depends_on_dtype else torch.float32


def _recorded(model: nn.Module, about: Pretrained | None, check_base: bool) -> Pretrained | None:
    """Return what the file says about its base; of another base, only what does not depend on it."""
    if about is None or check_base or (own := describe(model)) is None:
        return about
    labels = about.labels if len(about.labels) == len(own.labels) else own.labels
    return dataclasses.replace(own, labels=labels, inputs=about.inputs)


def _located(model: nn.Module, file: AdapterFile) -> list[Target]:
    """Return the file's targets on this model: at the recorded paths, or else those of the same roles and shapes."""
    try:
        return find_targets(model, list(file.targets), untie=True)
    except TargetError as error:
        wrong = str(error).partition(";")[0] + _in_the_file(str(error), file.targets)
    renamed = _renamed(model, file.targets)
    if renamed is not None:
        return find_targets(model, renamed, untie=True)
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
        unclear = " that can be matched unambiguously" if sorted(theirs) == sorted(ours) else ""
        raise FileError(
            f"this {type(model).__name__} does not have its weights ({wrong}), nor weights of the same roles and "
            f"shapes{unclear}: the file has {_counted(theirs)}, the model {_counted(ours)}"
        )
    return [dataclasses.replace(new, layer=old.layer) for new, old in zip(partners, file.targets, strict=True)]


def _kept(model: nn.Module, file: AdapterFile, copies: Sequence[str]) -> list[str]:
    """Return what the file keeps by the names on the model: of a weight that stays tied, the first one."""
    names = names_of_shared(model)
    kept = list(dict.fromkeys(name if name in copies else names.get(name, [name])[0] for name in file.kept))
    both = next((target.name for target in file.targets if target.name in kept), None)
    if both is not None:
        raise FileError(f"it both updates and keeps {both}: it can be adapted or trained itself, not both")
    return kept


def _renamed(model: nn.Module, targets: Sequence[Target]) -> list[Target] | None:
    """Return targets with the names of a checkpoint, as :func:`tnadapt.extract` finds them, under those of a model."""
    config: Any = getattr(model, "config", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not callable(getattr(config, "to_dict", None)) or all(target.name in shapes for target in targets):
        return None
    names = ModuleNames({**config.to_dict(), "architectures": [type(model).__name__]}).inverse(shapes)
    found = renamed_targets(targets, shapes, lambda name: names.get(name, []))
    return None if found is None else [found[1].target(target) for target in found[0]]


def _in_the_file(error: str, targets: Sequence[Target]) -> str:
    """Return how the file's target is stored, if that is what an error is about."""
    target = next((target for target in targets if error.startswith(f"{target.name} is stored as ")), None)
    if target is None:
        return ""
    if "which is (in, out)" in error and not target.transposed:
        return (
            ": if the file was converted, convert it again with base= (--base), the folder of the model with its "
            "config.json"
        )
    resized = ": call resize_token_embeddings() as before training" if target.role == "embedding" else ""
    return f", and was stored as {target.stored} when it was trained{resized}"


def _counted(weights: list[tuple[str, tuple[int, int]]]) -> str:
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for weight in weights:
        counts[weight] = counts.get(weight, 0) + 1
    listed = [f"{count} {role} of {rows}×{cols}" for (role, (rows, cols)), count in list(counts.items())[:6]]
    return ", ".join(listed) + (", …" if len(counts) > 6 else "") or "none"


def _base(model: nn.Module, targets: list[Target], expected: Fingerprint | None) -> Fingerprint | None:
    need_base(model)
    weights: list[Tensor | None] = []
    for target in targets:
        weight = merging.numbers(model.get_submodule(target.module), target.parameter)
        weights.append(None if weight is None else target.select(weight))
    return fingerprint_of(weights, expected)
