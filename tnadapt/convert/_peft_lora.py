"""Read PEFT's LoRA, DoRA, HiRA, LoKr and LoHa folders: layers, embeddings, rows of single tokens, stacked experts.

LoRA of embeddings and experts, for which PEFT has layouts of its own, is written here, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import PARAMETERS
from tnadapt.targets.target import RowIndices, Target

from . import _updates
from ._base_model import Base, target_of
from ._file_format import MERGE
from ._files import LOHA, LOKR, decode, recorded, without_groups
from ._peft_content import CONFIG_NAME, OwnStructure, PeftContent, PeftMethod, is_head
from ._peft_settings import LOW_RANK, Scales, names_of
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
    # Modules tied to the embedding have the same update again; a head has it as a linear layer.
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
    """Return the heads that a base does not store because they are tied, each with the embedding of equal rows."""
    known = [path for path in tensors if path in base.shapes and path not in base.heads]
    return {
        path: of for path in tensors if path not in known for of in known if np.array_equal(tensors[path], tensors[of])
    }


def _untrained_heads(path: str, tensors: Mapping[str, Float], base: Base) -> list[str]:
    """Return the heads that PEFT ties to an embedding: all that a base ties, unless one has rows of its own."""
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
    """Return the stacks that ``target_parameters`` names."""
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
    modules: Tensors, content: PeftContent, scales: Scales
) -> tuple[list[TargetUpdate], dict[str, Mapping[str, Float]]]:
    """Return the updates of experts, and the tensors of all other modules, each by path."""
    updates, rest = list[TargetUpdate](), dict(modules)
    names = names_of("target_parameters", content.config)
    for path, stacks in _stacks(names, recorded(content.metadata, EXPERTS, list), content.base).items():
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
            updates += _experts(target, a, b, turned, scales)
    return updates, rest


def _is_turned(whole: Sequence[tuple[Target, Float, Float]]) -> bool:
    """Return whether PEFT takes the matrices of a module to be (in, out), which it tells by a module attribute."""
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


def _experts(target: Target, a: Float, b: Float, turned: bool, scales: Scales) -> list[TargetUpdate]:
    count = target.stored[0]
    rank, rest = divmod(a.shape[0], count)
    if rest or not rank or b.shape[1] != a.shape[0]:
        raise FileError(
            f"the factors of {safe_repr(target.name)} have {a.shape[0]} rows and {b.shape[1]} columns, and there are "
            f"{count} experts"
        )
    first, last = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    scale, updates = scales.of(target.name, rank), []
    for index in range(count):
        left, right = np.ascontiguousarray(last[:, :, index]), np.ascontiguousarray(first[index].T)
        # PEFT transposes the matrices unless it knows that they are stored as (in, out).
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
    """Return the stacked factors of all experts of a parameter, zeros for those without a target; the rank; alpha."""
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


# -- LoRA, DoRA, HiRA, LoKr and LoHa -----------------------------------------------------------------------------------


NO_GROUPS = "PEFT's DoRA of it takes the norms of other numbers than the weight's, and it has no HiRA"

MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


class PeftLora(PeftMethod):
    """LoRA and DoRA: of layers, embeddings and experts, with new rows of tokens next to them.

    Attributes
    ----------
    factors : mapping of str to str
        Maps names of tensors to those under which they are decoded.
    apply : str
        How the updates meet the weights, without DoRA.
    alpha : str
        Name of the setting.
    """

    title, peft_type = "LoRA", "LORA"
    factors: Mapping[str, str] = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}
    tensors: tuple[str, ...] = (*factors, *EMBEDDING, TOKENS, *MAGNITUDES)
    fields = LOW_RANK
    may_transpose = True
    apply, alpha = "add", "lora_alpha"

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the updates of all that may be in such a folder."""
        config, base = content.config, content.base
        for field in ("use_dora", "target_parameters"):
            if config.get(field) and self.peft_type != "LORA":
                raise FileError(f"{field}={safe_repr(config[field])} belongs to LoRA; peft_type is {self.peft_type}")
        modules, embeddings, tokens, magnitudes = self._sorted(content)
        apply = "magnitude" if config.get("use_dora") else self.apply
        if apply == "magnitude" and (embeddings or tokens or magnitudes.keys() != modules.keys()):
            wrong = [*embeddings, *tokens] or magnitudes.keys() ^ modules.keys()
            raise FileError(
                f"use_dora of {CONFIG_NAME} is true, and these lack a magnitude or factors, or are embeddings, which "
                f"cannot have DoRA here: {summarize(wrong)}; merge the adapter with PEFT, and extract one from the "
                "merged weights"
            )
        if magnitudes and apply != "magnitude":
            raise FileError(
                f"{summarize(magnitudes)} has a magnitude of DoRA, and use_dora of {CONFIG_NAME} is not true"
            )
        scales = Scales(config, self.alpha)
        updates, rest = decoded_experts(modules, content, scales)
        for path, tensors in rest.items():
            update, target = self._layer(content, path, tensors, scales, apply)
            if path in embeddings:
                target = target_of(path, update.shape, base, may_transpose=True)
                target = dataclasses.replace(target, role="embedding", transposed=False)
            updates.append(TargetUpdate(target, update))
        if content.settings.ties:
            updates = joined_ties(updates)
        rows = decoded_tokens(tokens, config.get("trainable_token_indices"), base)
        notes: tuple[str, ...] = ()
        if any(not entry.target.tied for entry in rows) and base is not None and base.unknown_heads:
            notes = (
                "base ties an embedding to its output head, which PEFT's rows of tokens change as well: load the "
                "result with keep_tied=True, and save it again for PEFT, so that the file says so",
            )
        alone = [target.name for target, _ in updates if target.role == "embedding"]
        return OwnStructure(
            [entry.target for entry in (*updates, *rows)], updates=[entry.update for entry in (*updates, *rows)],
            notes=notes, alone=(*alone, *separate_rows(rows, base)), apply=apply, magnitudes=magnitudes,
        )  # fmt: skip

    def _layer(
        self, content: PeftContent, path: str, tensors: Mapping[str, Float], scales: Scales, apply: str
    ) -> tuple[ModuleUpdate, Target]:
        """Return the update of a layer's weight, and its target."""
        if ".base_layer." in f".{path}.":
            raise FileError(
                f"{safe_repr(path)} cannot be converted: it is PEFT's LoRA on nn.MultiheadAttention, which adds its "
                "update of the output projection twice, and of q, k and v to a parameter that is no module's weight"
            )
        factors, groups = without_groups(path, tensors)
        if groups > 1 and apply != "add":
            raise FileError(f"{safe_repr(path)} is a convolution in {groups} groups: {NO_GROUPS}")
        update, shape, rank = decode(path, factors, kron_last_axes=True)
        if apply != "hadamard":  # HiRA has no alpha, and PEFT makes all of its factors of rank r
            # The scale is that of PEFT's factors, whatever the rank of ours.
            scale = scales.of(path, rank if groups == 1 else len(tensors["lora_down"]))
            update = update._replace(scale=scale)
        return update, dataclasses.replace(content.target(path, shape), groups=groups)

    def _sorted(
        self, content: PeftContent
    ) -> tuple[dict[str, Mapping[str, Float]], set[str], dict[str, Float], dict[str, Float]]:
        """Return factors by path, transposed for embeddings; the embeddings' paths; rows of tokens; magnitudes."""
        modules, embeddings = dict[str, Mapping[str, Float]](), set[str]()
        tokens, magnitudes = dict[str, Float](), dict[str, Float]()
        for path, tensors in content.modules.items():
            factors = {self.factors[name]: array for name, array in tensors.items() if name in self.factors}
            turned = {
                decoded: np.ascontiguousarray(content.tensor(path, name, 2).T)
                for name, decoded in EMBEDDING.items()
                if name in tensors
            }
            if bool(factors) + bool(turned) + (TOKENS in tensors) > 1:
                raise FileError(f"{safe_repr(path)} has tensors of an embedding next to those of another layer")
            if TOKENS in tensors:
                tokens[path] = tensors[TOKENS]
            elif factors or turned:
                modules[path] = factors or turned
            if turned:
                embeddings.add(path)
            for name in MAGNITUDES:
                if name in tensors:
                    magnitudes[path] = tensors[name].reshape(-1)
        return modules, embeddings, tokens, magnitudes


class PeftHira(PeftLora):
    """HiRA: factors of which the product is multiplied by the weight."""

    title, peft_type, apply = "HiRA", "HIRA", "hadamard"
    factors: Mapping[str, str] = {"hira_A": "lora_down", "hira_B": "lora_up"}
    tensors = tuple(factors)


class PeftLokr(PeftLora):
    """LoKr."""

    title, peft_type = "LoKr", "LOKR"
    factors: Mapping[str, str] = dict(zip(LOKR, LOKR, strict=True))
    tensors: tuple[str, ...] = LOKR
    may_transpose = False
    alpha = "alpha"


class PeftLoha(PeftLokr):
    """LoHa."""

    title, peft_type = "LoHa", "LOHA"
    factors: Mapping[str, str] = dict(zip(LOHA, LOHA, strict=True))
    tensors: tuple[str, ...] = LOHA
