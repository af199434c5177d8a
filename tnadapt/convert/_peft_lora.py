"""PEFT's folders of LoRA, DoRA, HiRA, LoKr and LoHa, read: layers, embeddings, single tokens' rows and stacked experts.

The parts of LoRA that PEFT stores in its own way, those of embeddings and experts, are written here, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import PARAMETERS
from tnadapt.targets.roles import natural
from tnadapt.targets.target import RowIndices, Target

from . import _peft_content, _updates
from ._base_model import Base, target_of
from ._file_format import MERGE, Application, ForeignAdapter
from ._files import LOHA, LOKR, decode, kind_of, without_groups
from ._peft_content import CONFIG_NAME, PREFIX, TRANSPOSED, OwnStructure, PeftContent, PeftMethod, is_head, recorded
from ._peft_settings import PeftSettings
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, is_embedding, is_expert

# -- An embedding: the factors of the transposed update, under names of their own --------------------------------------

# PEFT looks a token up in ``lora_embedding_A``, of shape (rank, tokens), and multiplies by ``lora_embedding_B``, of
# shape (width, rank): ΔW is the transpose of ``B @ A``. Here the same factors are those of a linear layer's update,
# with the tokens as rows.


#: Maps suffixes of names in the file to the names under which the transposed tensors are decoded.
EMBEDDING = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}


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


def without_ties(target: Target) -> Target:
    """Return an embedding's target as one that is not tied, if its other names are the weights of modules."""
    ties = target.role == "embedding" and all(name.endswith(".weight") for name in target.tied)
    return dataclasses.replace(target, tied=()) if ties else target


def tied_paths(module: Module) -> list[str]:
    """Return the paths of the modules to which an embedding is tied."""
    return [name.removesuffix(".weight") for name in module.targets[0][1].tied]


def joined_ties(updates: Sequence[TargetUpdate]) -> list[TargetUpdate]:
    """Return updates of which those of a head that equal an embedding's are one with it."""
    joined, heads = list(updates), set[int]()
    for place, (target, update) in enumerate(updates):
        if target.role == "embedding" and update.kind == "lora" and place not in heads:
            others = [
                number
                for number, other in enumerate(updates)
                if number != place and number not in heads and _same(update, other.update)
            ]
            tied = tuple(updates[number].target.name for number in others)
            joined[place] = TargetUpdate(dataclasses.replace(target, tied=tied), update)
            heads.update(others)
    return [entry for place, entry in enumerate(joined) if place not in heads]


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
    updates, copies = [], {} if base is None else _copies(tensors, base)
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
        updates.append(TargetUpdate(target, ModuleUpdate("dense", target.shape, (rows[order] - before,))))
    return updates


def separate_rows(updates: Sequence[TargetUpdate], base: Base | None) -> list[str]:
    """Return the names of tied weights of which an embedding and a head have different rows, or the head alone has."""
    heads = {} if base is None else base.heads
    targets = {entry.target.module: entry.target.name for entry in updates}
    apart = {module for pair in heads.items() if pair[0] in targets for module in pair}
    return [name for module, name in targets.items() if module in apart]


def _copies(tensors: Mapping[str, Float], base: Base) -> dict[str, str]:
    """Return the heads that a base does not store because they are tied, each with the embedding of the same rows."""
    known = [path for path in tensors if path in base.shapes and path not in base.heads]
    return {
        path: of for path in tensors if path not in known for of in known if np.array_equal(tensors[path], tensors[of])
    }


def _untrained_heads(path: str, tensors: Mapping[str, Float], base: Base) -> list[str]:
    """Return the heads that PEFT ties to an embedding: all that a base ties, unless one has other rows of its own."""
    heads, copies = [head for head, embedding in base.heads.items() if embedding == path], _copies(tensors, base)
    apart = any(head in tensors and head not in copies for head in heads)
    return [] if apart else [head for head in heads if head not in tensors]


def _numbers(path: str, indices: Any) -> list[int]:
    if isinstance(indices, Mapping):
        lists = [value for key, value in indices.items() if f".{path}".endswith(f".{key}")]
        indices = lists[0] if len(lists) == 1 else None
    whole = isinstance(indices, list) and all(type(number) is int and number >= 0 for number in indices)
    if not whole or not indices or len(set(indices)) < len(indices):
        raise FileError(f"the settings have no list of different tokens for {safe_repr(path)}")
    return list(indices)


_TENSOR = "trainable_tokens_delta"


class PeftTrainableTokens(PeftMethod):
    """New rows, which replace those of the base; written as LoRA."""

    title = "Trainable_Tokens"
    peft_type = "TRAINABLE_TOKENS"
    tensors = (_TENSOR,)
    fields = ("token_indices", "init_weights", "ensure_weight_tying")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the rows; an update is their difference from the base's."""
        rows = {path: content.tensor(path, _TENSOR, 2) for path in content.modules}
        updates = decoded_tokens(rows, content.config.get("token_indices"), content.base)
        return OwnStructure(
            [entry.target for entry in updates], updates=[entry.update for entry in updates],
            alone=separate_rows(updates, content.base),
        )  # fmt: skip


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
    stacks: dict[str, dict[str, Target]] = {}
    for target in _recorded(recorded) if base is None else base.experts:
        if any(f".{target.name}".endswith(f".{name}") for name in names):
            stacks.setdefault(target.module, {})[target.parameter] = target
    every = [target.name for stack in stacks.values() for target in stack.values()]
    lost = [name for name in names if not any(f".{parameter}".endswith(f".{name}") for parameter in every)]
    if lost:
        raise FileError(f"target_parameters names {summarize(lost)}, and the base has no experts of that name")
    return stacks


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
        wrappers = {path + _INNER * depth: stacks[name] for depth, name in enumerate(reversed(order))}
        factors = {name: rest.pop(name) for name in modules if name.split(_INNER)[0] == path}
        if factors.keys() != wrappers.keys() or any(tensors.keys() != _FACTORS for tensors in factors.values()):
            raise FileError(
                f"{safe_repr(path)} has factors for {len(factors)} parameters, and target_parameters names "
                f"{', '.join(order)}"
            )
        whole = [
            (target, factors[wrapper]["lora_down"], factors[wrapper]["lora_up"])
            for wrapper, target in reversed(wrappers.items())
        ]
        turned = _is_turned(whole)
        for target, a, b in whole:
            updates += _experts(target, a, b, turned, settings)
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


def _experts(target: Target, a: Float, b: Float, turned: bool, settings: PeftSettings) -> list[TargetUpdate]:
    count = target.stored[0]
    rank, rest = divmod(a.shape[0], count)
    if rest or not rank or b.shape[1] != a.shape[0]:
        raise FileError(
            f"the factors of {safe_repr(target.name)} have {a.shape[0]} rows and {b.shape[1]} columns, and there are "
            f"{count} experts"
        )
    first, last = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    scale, updates = settings.scale(target.name, rank), []
    for index in range(count):
        left, right = np.ascontiguousarray(last[:, :, index]), np.ascontiguousarray(first[index].T)
        # PEFT transposes what it does not know to be stored as (in, out).
        pair = Pair(left, right) if turned == target.transposed else Pair(right, left)
        expert = dataclasses.replace(target, index=index)
        updates.append(TargetUpdate(expert, ModuleUpdate("lora", expert.shape, (pair,), scale)))
    return updates


# -- Writing -----------------------------------------------------------------------------------------------------


def encoded_experts(
    modules: Sequence[Module], updates: Sequence[ModuleUpdate]
) -> tuple[dict[str, Float], dict[str, tuple[int, float]]]:
    """Encode the updates of those modules that are experts.

    Returns
    -------
    dict, dict
        The tensors, by their names without PEFT's prefix, and the rank and alpha of each parameter.
    """
    stacks: dict[str, dict[str, list[tuple[Target, ModuleUpdate]]]] = {}
    for module, update in zip(modules, updates, strict=True):
        if is_expert(module):
            target = module.targets[0][1]
            stacks.setdefault(target.module, {}).setdefault(target.parameter, []).append((target, update))
    tensors, settings = dict[str, Float](), dict[str, tuple[int, float]]()
    for path, parameters in stacks.items():
        order = [name for name in PARAMETERS if name in parameters]
        if len(order) < len(parameters):
            raise ConfigError(
                f"{safe_repr(path)} has parameters {', '.join(parameters)}, and it is unknown in which order PEFT "
                f"wraps them: {MERGE}"
            )
        for depth, parameter in enumerate(reversed(order)):
            targets, of_experts = zip(*parameters[parameter], strict=True)
            a, b, rank, alpha = _stacked(targets, of_experts)
            settings[f"{path}.{parameter}"] = rank, alpha
            wrapper = path + _INNER * depth
            tensors |= {f"{wrapper}.lora_A.weight": a, f"{wrapper}.lora_B.weight": b}
    return tensors, settings


def _stacked(targets: Sequence[Target], updates: Sequence[ModuleUpdate]) -> tuple[Float, Float, int, float]:
    """Return the factors of all experts of a parameter, with zeros for those without a target; the rank and alpha."""
    rank = max(update.rank for update in updates)
    alpha = (
        _updates.alpha_of([update.scale for update in updates], rank) if len({u.rank for u in updates}) == 1 else None
    )
    if alpha is None:
        updates, alpha = _updates.uniform(updates, rank), float(rank)
    (rows, cols), count = targets[0].shape, targets[0].stored[0]
    first, last = np.zeros((count, rank, cols)), np.zeros((rows, rank, count))
    for target, update in zip(targets, updates, strict=True):
        first[target.index], last[:, :, target.index] = update.pair.a.T, update.pair.b
    return first.reshape(count * rank, cols), last.reshape(rows, rank * count), rank, alpha


def record_of(modules: Sequence[Module]) -> dict[str, Any]:
    """Return the shapes of the stacks, for the record of a conversion."""
    stacks: dict[str, dict[str, list[Any]]] = {}
    for target in (module.targets[0][1] for module in modules if is_expert(module)):
        row = [target.parameter, list(target.stored), target.transposed, target.layer]
        stacks.setdefault(target.module, {})[target.parameter] = row
    return {path: list(rows.values()) for path, rows in stacks.items()}


# -- A folder, with all that may be in it ------------------------------------------------------------------------------


NO_GROUPS = "PEFT's DoRA of it takes the norms of other numbers than the weight's, and it has no HiRA"

# Maps suffixes of names in the file to the names under which the tensors are decoded.
_SUFFIXES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"} | {name: name for name in (*LOKR, *LOHA)}
# Those of HiRA are not in "LORA" adapters, nor the others in "HIRA" ones.
_HIRA = {"hira_A": "lora_down", "hira_B": "lora_up"}
_NAMES = {"magnitude": "DoRA", "hadamard": "HiRA"}
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_REFUSED = {
    "lora_A.bias": "a bias",
    "lora_B.bias": "it adds to the layer's bias, which is not in the file",
    "trainable_tokens_delta": "rows of an embedding, of a method of their own",
}


def low_rank_adapter(container: Container, settings: PeftSettings, base: Base | None) -> ForeignAdapter:
    """Read the adapter of an open file of weights, of any of these methods."""
    method, apply, common = settings.kind, settings.apply, settings.common
    modules, magnitudes, tokens = dict[str, dict[str, Float]](), dict[str, Float](), dict[str, Float]()
    dtypes, unread, linear, embeddings = set[str](), list[str](), set[str](), set[str]()
    suffixes = _HIRA if apply == "hadamard" else _SUFFIXES

    def numbers(name: str) -> Float:
        tag = container.entries[name].dtype
        array = _updates.widen(name, tag, container.array(name))
        dtypes.add(DTYPES[tag])
        return array

    for name in container.entries:
        path, suffix = _split_name(name)
        if suffix in (*EMBEDDING, TOKENS) and apply != "add":
            raise FileError(
                f"{safe_repr(path)} is an embedding next to layers with {_NAMES[apply]}, which an embedding "
                "cannot have here: merge the adapter with PEFT, and extract one from the merged weights"
            )
        if suffix in EMBEDDING and method == "lora":
            array = numbers(name)
            if array.ndim != 2:
                raise FileError(f"{suffix} must be a matrix; its shape is {array.shape}")
            modules.setdefault(path, {})[EMBEDDING[suffix]] = np.ascontiguousarray(array.T)
            embeddings.add(path)
        elif suffix in suffixes:
            modules.setdefault(path, {})[suffixes[suffix]] = numbers(name)
            linear.add(path)
        elif suffix == TOKENS:
            tokens[path] = numbers(name)
        elif suffix in MAGNITUDES:
            if apply != "magnitude":
                raise FileError(f"{safe_repr(name)} is a magnitude of DoRA, and use_dora of {CONFIG_NAME} is not true")
            magnitudes[path] = numbers(name).reshape(-1)
        elif suffix in _REFUSED:
            raise FileError(f"{safe_repr(name)} cannot be converted: {_REFUSED[suffix]}")
        else:
            unread.append(name)
    both = sorted((linear & embeddings) | (tokens.keys() & modules.keys()))
    if both:
        raise FileError(f"{safe_repr(both[0])} has tensors of an embedding next to those of another layer")
    others = _peft_content.other_tensors(container, unread, modules, common, method, base, settings.ties)
    if not modules and not tokens:
        raise FileError("has no adapted weight")
    updates, rest = decoded_experts(modules, settings, recorded(container.metadata, EXPERTS, list), base)
    wrapped = next((path for path in rest if ".base_layer." in f".{path}."), None)
    if wrapped is not None:
        raise FileError(
            f"{safe_repr(wrapped)} cannot be converted: it is PEFT's LoRA on nn.MultiheadAttention, which adds its "
            "update of the output projection twice, and of q, k and v to a parameter that is no module's weight"
        )
    transposed, conv1ds = recorded(container.metadata, TRANSPOSED, bool), set[str]()
    for path in sorted(rest, key=natural):
        stored = kind_of(path, rest[path])
        if stored != method:
            raise FileError(f"{safe_repr(path)} has tensors of {stored}, and {CONFIG_NAME} says {method}")
        tensors, groups = without_groups(path, rest[path])
        if groups > 1 and apply != "add":
            raise FileError(f"{safe_repr(path)} is a convolution in {groups} groups: {NO_GROUPS}")
        update, shape, rank = decode(path, tensors, kron_last_axes=True)
        # The scale is that of PEFT's factors, whatever the rank of ours.
        update = update._replace(scale=settings.scale(path, rank if groups == 1 else len(rest[path]["lora_down"])))
        if method == "lora" and path not in embeddings and _peft_content.is_conv1d(path, common.model_type, base):
            conv1ds.add(path)
        says = transposed.get(path, common.transposed or path in conv1ds) and path not in embeddings
        target = target_of(path, shape, base, says and len(shape) == 2, method == "lora")
        target = dataclasses.replace(target, groups=groups)
        if path in embeddings:
            target = dataclasses.replace(target, role="embedding", transposed=False)
        updates.append(TargetUpdate(target, update))
    if base is not None and method == "lora":
        known = {*transposed, *embeddings, *conv1ds}
        _peft_content.check_transposed(
            [entry.target for entry in updates if entry.target.module not in known], common.transposed
        )
    if settings.ties:
        updates = joined_ties(updates)
    # Embeddings and heads that PEFT adapts alone, also where the model ties them.
    alone = [
        target.name
        for target, _ in updates
        if not target.tied and (target.role == "embedding" or target.module in others.bases or is_head(target.module))
    ]
    rows = decoded_tokens(tokens, settings.tokens, base)
    ties, notes = others.ties | dict.fromkeys([*alone, *separate_rows(rows, base)], ()), others.notes
    if any(not entry.target.tied for entry in rows) and base is not None and base.unknown_heads:
        notes += (
            "base ties an embedding to its output head, which PEFT's rows of tokens change as well: load the result "
            "with keep_tied=True, and save it again for PEFT, so that the file says so",
        )
    if apply == "magnitude" and magnitudes.keys() != modules.keys():
        wrong = summarize(magnitudes.keys() ^ modules.keys())
        raise FileError(f"use_dora of {CONFIG_NAME} is true, and these lack a magnitude or factors: {wrong}")
    return ForeignAdapter(
        method if apply == "add" else _NAMES[apply].lower(), [*updates, *rows], _updates.common_dtype(dtypes),
        others.kept, others.dtypes, common.model, notes=notes,
        application=Application(apply, magnitudes=magnitudes), ties=ties,
    )  # fmt: skip


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into the module's path and the suffix of an adapter's tensor, "" if it has none."""
    path = name.removeprefix(PREFIX)
    for suffix in (TOKENS, *_SUFFIXES, *EMBEDDING, *_HIRA, *MAGNITUDES, *_REFUSED):
        if path != name and path.endswith(f".{suffix}"):
            return path.removesuffix(f".{suffix}"), suffix
    return path, ""
