"""PEFT's LoRA of experts: of the matrices that a parameter stacks (``target_parameters``).

A parameter of ``count`` matrices has one pair of factors. ``lora_A``, of shape (count · rank, in), has the factors of
one expert after the other; in ``lora_B``, of shape (out, rank · count), the number of the expert varies fastest. PEFT
wraps the module once for each of its adapted parameters, the last one outermost, and names neither parameter nor
expert: ``base_layer`` stands for the wrappers that are inside.

The shapes of the stacks come from the base model, or from the record of a folder that this library wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import PARAMETERS
from tnadapt.targets.target import Target

from ._base_model import Base
from ._peft_settings import PeftSettings
from ._unpack import Module, TargetUpdate
from ._updates import Float, ModuleUpdate, Pair, alpha_of, uniform

__all__ = ["EXPERTS", "check_method", "decoded", "encoded", "is_expert", "record_of"]

#: The entry of a conversion's record that has the shapes of the stacks.
EXPERTS = "experts"
_INNER = ".base_layer"
_FACTORS = {"lora_down", "lora_up"}

#: Parameters by module and name; each as the target of its first matrix.
Stacks = Mapping[str, Mapping[str, Target]]
#: The tensors of modules and wrappers, by path and name.
Tensors = Mapping[str, Mapping[str, Float]]


# -- Reading -----------------------------------------------------------------------------------------------------


def _stacks(names: Sequence[str], recorded: Mapping[str, Any], base: Base | None) -> dict[str, dict[str, Target]]:
    """Return the stacks that ``target_parameters`` names.

    Raises
    ------
    FileError
        If there is neither a base nor a record, or a name fits none of the stacks.
    """
    names = [name for name in names if not name.endswith(".weight")]  # ordinary layers
    if not names:
        return {}
    if base is None and not recorded:
        raise FileError(
            f"target_parameters={safe_repr(list(names))}: PEFT does not store which parameter and expert a factor "
            "belongs to: give base= (--base), a folder or safetensors file of the base model, or {name: "
            "tuple(p.shape) for name, p in model.named_parameters()}"
        )
    found: dict[str, dict[str, Target]] = {}
    for target in _recorded(recorded) if base is None else base.experts:
        if any(f".{target.name}".endswith(f".{name}") for name in names):
            found.setdefault(target.module, {})[target.parameter] = target
    every = [target.name for own in found.values() for target in own.values()]
    lost = [name for name in names if not any(f".{one}".endswith(f".{name}") for one in every)]
    if lost:
        raise FileError(f"target_parameters names {summarize(lost)}, and the base has no experts of that name")
    return found


def _recorded(recorded: Mapping[str, Any]) -> list[Target]:
    try:
        return [
            Target(path, stored, "linear", name, None, turned, layer, 0)
            for path, rows in recorded.items()
            for name, stored, turned, layer in rows
        ]
    except (TargetError, TypeError, ValueError):
        raise FileError("the record of the experts' shapes is damaged: give base= (--base)") from None


def decoded(
    modules: Tensors, settings: PeftSettings, recorded: Mapping[str, Any], base: Base | None
) -> tuple[list[TargetUpdate], dict[str, Mapping[str, Float]]]:
    """Return the updates of experts, and the tensors of all other modules.

    Parameters
    ----------
    modules : mapping
        The tensors of all modules, by path.
    settings : PeftSettings
    recorded : mapping
        The entry :data:`EXPERTS` of the record.
    base : Base, optional
    """
    updates, rest = list[TargetUpdate](), dict(modules)
    for path, stacks in _stacks(settings.parameters, recorded, base).items():
        order = [name for name in PARAMETERS if name in stacks]
        wrappers = [path + _INNER * depth for depth in range(len(order))][::-1]
        own = {name: rest.pop(name) for name in modules if name.split(_INNER)[0] == path}
        if own.keys() != set(wrappers) or any(tensors.keys() != _FACTORS for tensors in own.values()):
            raise FileError(
                f"{safe_repr(path)} has factors for {len(own)} parameters, and target_parameters names "
                f"{', '.join(order)}"
            )
        whole = [
            (stacks[name], own[wrapper]["lora_down"], own[wrapper]["lora_up"])
            for name, wrapper in zip(order, wrappers, strict=True)
        ]
        turned = _is_turned(whole)
        for target, a, b in whole:
            updates += _experts(target, a, b, turned, settings.scale)
    return updates, rest


def _is_turned(whole: Sequence[tuple[Target, Float, Float]]) -> bool:
    """Return whether PEFT takes the matrices of a module for (in, out), which it does by an attribute of the module."""
    views = set()
    for target, a, b in whole:
        stored, factors = target.stored[1:], (b.shape[0], a.shape[-1])
        if a.ndim != 2 or b.ndim != 2 or factors not in (stored, stored[::-1]):
            raise TargetError(
                f"the adapter's update of {safe_repr(target.name)} has the shape {factors}, and its matrices in base "
                f"have {stored}: this is another model"
            )
        if stored[0] != stored[1]:
            views.add(factors != stored)
    if len(views) > 1:
        raise FileError(f"the factors of {safe_repr(whole[0][0].module)} are stored in two ways")
    return views.pop() if views else whole[0][0].transposed


def _experts(
    target: Target, a: Float, b: Float, turned: bool, scale: Callable[[str, int | None], float]
) -> list[TargetUpdate]:
    count = target.stored[0]
    rank, rest = divmod(a.shape[0], count)
    if rest or not rank or b.shape[1] != a.shape[0]:
        raise FileError(
            f"the factors of {safe_repr(target.name)} have {a.shape[0]} rows and {b.shape[1]} columns, and there are "
            f"{count} experts"
        )
    first, last = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    factor, found = scale(target.name, rank), []
    for index in range(count):
        left, right = np.ascontiguousarray(last[:, :, index]), np.ascontiguousarray(first[index].T)
        # PEFT transposes what it does not know to be stored as (in, out).
        pair = Pair(left, right) if turned == target.transposed else Pair(right, left)
        one = dataclasses.replace(target, index=index)
        found.append(TargetUpdate(one, ModuleUpdate("lora", one.shape, (pair,), factor)))
    return found


# -- Writing -----------------------------------------------------------------------------------------------------


def is_expert(module: Module) -> bool:
    """Return whether a module stands for one of the matrices of a parameter."""
    return module.targets[0][1].index is not None


def check_method(module: Module, form: str) -> None:
    """Raise ConfigError for an expert, unless it is to be LoRA of PEFT."""
    if is_expert(module) and form != "peft-lora":
        target = module.targets[0][1]
        raise ConfigError(
            f"{target.label} cannot be converted to {form!r}: it is one of the {target.stored[0]} matrices of a "
            "parameter, as experts are kept, which only PEFT's LoRA adapts: convert to 'peft-lora' (--to peft-lora), "
            "or merge the adapter into the base with tnadapt.merge (tnadapt merge)"
        )


class EncodedExperts(NamedTuple):
    """The tensors of all experts, and the rank and alpha of each parameter by its name."""

    tensors: dict[str, Float]
    ranks: dict[str, int]
    alphas: dict[str, float]


def encoded(modules: Sequence[Module], updates: Sequence[ModuleUpdate]) -> EncodedExperts:
    """Encode the updates of those modules that are experts as tensors, by their names without PEFT's prefix."""
    stacks: dict[str, dict[str, list[tuple[Target, ModuleUpdate]]]] = {}
    for module, update in zip(modules, updates, strict=True):
        if not is_expert(module):
            continue
        target = module.targets[0][1]
        stacks.setdefault(target.module, {}).setdefault(target.parameter, []).append((target, update))
    found = EncodedExperts({}, {}, {})
    for path, own in stacks.items():
        order = [name for name in PARAMETERS if name in own]
        if len(order) < len(own):
            raise ConfigError(
                f"{safe_repr(path)} has parameters {', '.join(own)}, and it is unknown in which order PEFT wraps them: "
                "merge the adapter into the base with tnadapt.merge (tnadapt merge)"
            )
        for depth, parameter in enumerate(reversed(order)):
            _encode(path + _INNER * depth, f"{path}.{parameter}", own[parameter], found)
    return found


def _encode(path: str, name: str, own: Sequence[tuple[Target, ModuleUpdate]], found: EncodedExperts) -> None:
    updates = [update for _, update in own]
    rank = max(update.rank for update in updates)
    alpha = alpha_of([update.scale for update in updates], rank) if len({u.rank for u in updates}) == 1 else None
    whole = uniform(updates, rank) if alpha is None else updates
    (rows, cols), count = own[0][0].shape, own[0][0].stored[0]
    first, last = np.zeros((count, rank, cols)), np.zeros((rows, rank, count))
    for (target, _), update in zip(own, whole, strict=True):
        first[target.index], last[:, :, target.index] = update.pair.a.T, update.pair.b
    found.tensors[f"{path}.lora_A.weight"] = first.reshape(count * rank, cols)
    found.tensors[f"{path}.lora_B.weight"] = last.reshape(rows, rank * count)
    found.ranks[name], found.alphas[name] = rank, float(rank) if alpha is None else alpha


def record_of(modules: Sequence[Module]) -> dict[str, Any]:
    """Return the shapes of the stacks, for the record of a conversion."""
    found: dict[str, dict[str, list[Any]]] = {}
    for target in (module.targets[0][1] for module in modules if is_expert(module)):
        row = [target.parameter, list(target.stored), target.transposed, target.layer]
        found.setdefault(target.module, {})[target.parameter] = row
    return {path: list(rows.values()) for path, rows in found.items()}
