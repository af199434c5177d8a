"""Tied weights: one tensor that several modules of a model hold, such as an embedding and the output head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.target import Target

from ._quantized import is_embedding
from ._weights import join, modules_of

__all__ = ["tied", "with_tied"]


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
    return [(same[0], other) for same in _groups(model) if not wanted.isdisjoint(same) for other in same[1:]]


def with_tied(model: nn.Module, targets: Sequence[Target], keep: bool) -> list[Target]:
    """Return targets with all names of their weights, for those that list them already, or for all with ``keep``.

    Raises
    ------
    TargetError
        If a target lists other names than those of its weight in this model.
    """
    if not keep and not any(target.tied for target in targets):
        return list(targets)
    names = {name: same for same in _groups(model) for name in same}
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


def _groups(model: nn.Module) -> list[list[str]]:
    """Return the names of each tensor that has several."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for path, module in modules_of(model):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(_place(tensor), []).append(join(path, name))
    return [same for same in names.values() if len(same) > 1]


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
