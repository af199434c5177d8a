"""PEFT's LoRA of embeddings, of single tokens' rows, and of stacked experts (``target_parameters``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import PARAMETERS
from tnadapt.targets.target import RowIndices, Target

from ._base_model import Base
from ._peft_settings import PeftSettings
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, alpha_of, uniform

__all__ = [
    "EMBEDDING",
    "EXPERTS",
    "TOKENS",
    "as_embedding",
    "check_method",
    "decoded_embedding",
    "decoded_experts",
    "decoded_tokens",
    "encoded_embedding",
    "encoded_experts",
    "is_embedding",
    "is_expert",
    "is_head",
    "joined_ties",
    "record_of",
    "separate_rows",
    "tied_paths",
    "without_ties",
]


# -- An embedding: the factors of the transposed update, under names of their own --------------------------------------

# PEFT looks a token up in ``lora_embedding_A``, of shape (rank, tokens), and multiplies by ``lora_embedding_B``, of
# shape (width, rank): ΔW is the transpose of ``B @ A``. Here the same factors are those of a linear layer's update,
# with the tokens as rows.


#: Maps suffixes of names in the file to the names under which the transposed tensors are decoded_embedding.
EMBEDDING = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}

# All names of the heads that transformers ties to embeddings.
_HEADS = (
    "decoder", "embed_out", "generator_lm_head", "head", "lm_head", "lm_loss", "out_proj", "output",
    "output_projection", "proj", "proj_out", "vocab_projector",
)  # fmt: skip


def is_embedding(module: Module) -> bool:
    """Return whether a module is an embedding."""
    return module.targets[0][1].role == "embedding"


def encoded_embedding(module: Module, factors: Mapping[str, Float]) -> dict[str, Float]:
    """Return the tensors of a module's update, given the factors of a linear layer's: by path and name."""
    if not is_embedding(module):
        return {f"{module.path}.{name}": array for name, array in factors.items()}
    turned = {"lora_embedding_A": factors["lora_B.weight"].T, "lora_embedding_B": factors["lora_A.weight"].T}
    # What is tied to the embedding has the same update once more; a head has it as a linear layer.
    return {
        f"{path}.{name}": array
        for path in (module.path, *tied_paths(module))
        for name, array in (factors if path != module.path and is_head(path) else turned).items()
    }


def is_head(path: str) -> bool:
    """Return whether a module is an output head, by its name outside of all numbered layers."""
    *outer, last = path.split(".")
    return last in _HEADS and not any(map(str.isdecimal, outer))


def decoded_embedding(suffix: str, array: Float) -> Float:
    """Return a factor of a linear layer's update, given that of an embedding."""
    if array.ndim != 2:
        raise FileError(f"{suffix} must be a matrix; its shape is {array.shape}")
    return np.ascontiguousarray(array.T)


def as_embedding(update: TargetUpdate, embeddings: Mapping[str, object]) -> TargetUpdate:
    """Return an update whose target has the role of an embedding, if its module is one."""
    if update.target.module not in embeddings:
        return update
    return update._replace(target=_with_role(update.target))


def _with_role(target: Target) -> Target:
    return dataclasses.replace(target, role="embedding", transposed=False)


def without_ties(target: Target) -> Target:
    """Return an embedding's target as one that is not tied, if its other names are the weights of modules."""
    ties = target.role == "embedding" and all(name.endswith(".weight") for name in target.tied)
    return dataclasses.replace(target, tied=()) if ties else target


def tied_paths(module: Module) -> list[str]:
    """Return the paths of the modules to which an embedding is tied."""
    return [name.removesuffix(".weight") for name in module.targets[0][1].tied]


def joined_ties(found: Sequence[TargetUpdate]) -> list[TargetUpdate]:
    """Return updates of which those of a head that equal an embedding's are one with it."""
    joined = list(found)
    for one in found:
        if one.target.role != "embedding" or one.update.kind != "lora" or not any(own is one for own in joined):
            continue
        others = [other for other in joined if other is not one and _same(one.update, other.update)]
        if others:
            tied = dataclasses.replace(one.target, tied=tuple(other.target.name for other in others))
            joined = [one._replace(target=tied) if own is one else own for own in joined if own not in others]
    return joined


def _same(one: ModuleUpdate, other: ModuleUpdate) -> bool:
    if other.kind != "lora" or (one.shape, one.scale, one.rank) != (other.shape, other.scale, other.rank):
        return False
    return all(np.array_equal(a, b) for a, b in zip(one.pair, other.pair, strict=True))


# -- Rows of single tokens: next to LoRA, or by a method of their own --------------------------------------------------

# PEFT stores the new rows themselves, in the order of the tokens' numbers in its settings. Here an update is added, so
# it is the difference of these rows and the base's, and reading needs the base's numbers. A row that is added to the
# base rounds to the stored one: exactly in half precision, to the last bit in float32.


#: The suffix of the tensors' names.
TOKENS = "token_adapter.trainable_tokens_delta"


def decoded_tokens(tensors: Mapping[str, Float], indices: Any, base: Base | None) -> list[TargetUpdate]:
    """Return the updates of embeddings.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        The new rows, by the path of the embedding.
    indices
        The tokens' numbers in the settings: a list, or one for each embedding.
    base : Base, optional

    Raises
    ------
    FileError, TargetError
        If the base or its numbers are missing, or rows and indices do not fit.
    """
    found, copies = [], {} if base is None else _copies(tensors, base)
    for path, rows in tensors.items():
        if path in copies:
            continue
        numbers = _numbers(path, indices)
        if rows.ndim != 2 or len(rows) != len(numbers):
            raise FileError(f"{safe_repr(path)} has rows of shape {rows.shape} for {len(numbers)} tokens")
        if base is None:
            raise FileError(
                f"the rows of tokens of {safe_repr(path)} replace those of the base, and an update is the "
                "difference: give base= (--base), a folder or safetensors file of the base model"
            )
        order = np.argsort(numbers)
        chosen = tuple(numbers[place] for place in order)
        before = base.rows(path, chosen)
        if before.shape != (len(chosen), rows.shape[1]):
            raise FileError(f"{safe_repr(path)} has rows of {rows.shape[1]} numbers, and in base of {before.shape[1]}")
        stored = base.shapes[path]
        assert stored is not None  # its rows were read
        heads = [*(copy for copy, of in copies.items() if of == path), *_untrained_heads(path, tensors, base)]
        tied = tuple(f"{head}.weight" for head in heads)
        role = "linear" if is_head(path) else "embedding"
        target = Target(path, stored, role, rows=RowIndices(chosen), tied=tied)
        found.append(TargetUpdate(target, ModuleUpdate("dense", target.shape, (rows[order] - before,))))
    return found


def separate_rows(found: Sequence[TargetUpdate], base: Base | None) -> list[str]:
    """Return the names of tied weights of which an embedding and a head have different rows, or the head alone has."""
    heads = {} if base is None else base.heads
    trained = {one.target.module for one in found}
    apart = {name for pair in heads.items() if pair[0] in trained for name in pair}
    return [one.target.name for one in found if one.target.module in apart]


def _copies(tensors: Mapping[str, Float], base: Base) -> dict[str, str]:
    """Return the heads that a base does not store because they are tied, each with the embedding of the same rows."""
    there = [path for path in tensors if path in base.shapes and path not in base.heads]
    return {
        path: of for path in tensors if path not in there for of in there if np.array_equal(tensors[path], tensors[of])
    }


def _untrained_heads(path: str, tensors: Mapping[str, Float], base: Base) -> list[str]:
    """Return the heads that PEFT ties to an embedding: all that a base ties, unless one has other rows of its own."""
    heads, copies = [head for head, embedding in base.heads.items() if embedding == path], _copies(tensors, base)
    apart = any(head in tensors and head not in copies for head in heads)
    return [] if apart else [head for head in heads if head not in tensors]


def _numbers(path: str, indices: Any) -> list[int]:
    if isinstance(indices, Mapping):
        own = [value for key, value in indices.items() if f".{path}".endswith(f".{key}")]
        indices = own[0] if len(own) == 1 else None
    whole = isinstance(indices, list) and all(type(number) is int and number >= 0 for number in indices)
    if not whole or not indices or len(set(indices)) < len(indices):
        raise FileError(f"the settings have no list of different tokens for {safe_repr(path)}")
    return list(indices)


# -- Experts: the matrices that a parameter stacks ---------------------------------------------------------------------

# A parameter of ``count`` matrices has one pair of factors. ``lora_A``, of shape (count · rank, in), has the factors of
# one expert after the other; in ``lora_B``, of shape (out, rank · count), the number of the expert varies fastest. PEFT
# wraps the module once for each of its adapted parameters, the last one outermost, and names neither parameter nor
# expert: ``base_layer`` stands for the wrappers that are inside.
#
# The shapes of the stacks come from the base model, or from the record of a folder that this library wrote.


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


def decoded_experts(
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


def encoded_experts(modules: Sequence[Module], updates: Sequence[ModuleUpdate]) -> EncodedExperts:
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
