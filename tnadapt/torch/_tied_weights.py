"""Tied weights: one tensor that several modules of a model hold, such as an embedding and the output head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, TargetError
from tnadapt.targets.target import Target

from ._quantized import is_embedding
from ._weights import join, modules_of

__all__ = ["names_of_shared", "split_by_file", "tied", "with_tied"]


def tied(model: nn.Module, targets: Iterable[Target]) -> list[tuple[str, str]]:
    """Return pairs of names that refer to one tensor, where the tensor belongs to a target that does not list them.

    Parameters
    ----------
    model : Module
    targets : iterable of Target

    Returns
    -------
    list of (str, str)
        Dotted paths of parameters. The first entry of each pair is the tensor's first name in the model's order.

    Notes
    -----
    One module registered under two paths is not a tie: it is a single module with a single update.

    Examples
    --------
    >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    >>> model["head"].weight = model["embed"].weight
    >>> tied(model, [Target("head", (5, 4))])
    [('embed.weight', 'head.weight')]
    >>> tied(model, with_tied(model, [Target("head", (5, 4))], True))
    []
    """
    wanted = {target.name for target in targets if not target.tied}
    groups = names_of_shared(model).items()
    return [(same[0], name) for name, same in groups if name != same[0] and not wanted.isdisjoint(same)]


def with_tied(model: nn.Module, targets: Sequence[Target], keep: bool) -> list[Target]:
    """Return targets with all names of their weights, for those that list them already, or for all with ``keep``.

    Raises
    ------
    TargetError
        If a target lists other names than those of its weight in this model.
    """
    if not keep and not any(target.tied for target in targets):
        return list(targets)
    names = names_of_shared(model)
    found = []
    for target in targets:
        same = names.get(target.name, [target.name])
        if target.tied and {target.name, *target.tied} != set(same):
            there = f"it is tied to {', '.join(same[1:])}" if len(same) > 1 else "it is not tied"
            raise TargetError(
                f"{target.name} is updated together with {', '.join(target.tied)}, as one tensor, and in this "
                f"{type(model).__name__} {there}: tie the weights of the model as they were"
            )
        if len(same) > 1 and (keep or target.tied):
            module, _, parameter = same[0].rpartition(".")
            # With its first name it has the role of its first module; a file keeps the role that it was saved with.
            embeds = is_embedding(model.get_submodule(module)) and not target.tied
            target = dataclasses.replace(
                target, module=module, parameter=parameter, tied=tuple(same[1:]),
                role="embedding" if embeds else target.role,
            )  # fmt: skip
        found.append(target)
    return found


def split_by_file(model: nn.Module, file: AdapterFile, untie: bool, keep_tied: bool = False) -> list[str]:
    """Return the names of tied weights that need copies of their own, so that all are tied as they are in a file.

    Parameters
    ----------
    model : Module
    file : AdapterFile
    untie : bool
        Whether the caller allows copies.
    keep_tied : bool
        Whether the caller wants one update for tied weights.

    Raises
    ------
    FileError
        If weights are tied otherwise than in the file, and not just tied more and ``untie``; or if the file keeps one
        tensor under two names.
    """
    names, copies = names_of_shared(model), list[str]()
    firsts = dict[str, str]()
    for name in dict.fromkeys([*file.kept, *file.ties]):
        same = names.get(name, [name])
        twin = firsts.setdefault(same[0], name) if name in file.kept else name
        # PEFT stores a bias that two modules share for each of them.
        alone = file.ties.get(name) == () or (twin != name and not np.array_equal(file.kept[name], file.kept[twin]))
        if alone and len(same) > 1:
            if not untie or keep_tied:
                raise FileError(
                    f"{same[0]} and {same[1]} are one tensor (tied weights) in this {type(model).__name__}, and it has "
                    f"{name} of that module alone: load it with untie=True, which gives the second its own copy"
                )
            copies += [one for one in same[1:] if one not in copies]
        elif not alone and name in file.ties and {name, *file.ties[name]} != set(same):
            there = f"it is tied to {', '.join(one for one in same if one != name)}" if len(same) > 1 else "it is not"
            raise FileError(
                f"it keeps {name}, which is tied to {', '.join(file.ties[name])}, and in this {type(model).__name__} "
                f"{there}: tie the weights of the model as they were"
            )
    return copies


def names_of_shared(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each tensor that has several, in the model's order, by each of them."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for path, module in modules_of(model):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(_place(tensor), []).append(join(path, name))
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of the tensor's memory: parameters with equal keys are one, even as different objects."""
    if nn.parameter.is_lazy(tensor):
        return (id(tensor),)
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        pointer = 0  # a subclass without storage
    if pointer == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return tensor.device, pointer, tuple(tensor.shape)
