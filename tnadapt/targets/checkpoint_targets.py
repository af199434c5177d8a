"""Select targets in a checkpoint by tensor names and shapes, without building the model.

A checkpoint carries less information than a model. If one tensor produces q, k and v and its layout does not follow
from its name and the model's ``config.json``, it is rejected: wrong rows would be merged without any error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TargetError, safe_repr

from ._checkpoint_attention import StoredModel, targets_of
from ._checkpoint_layouts import is_transposed
from .checkpoint_experts import PARAMETERS, experts_of
from .roles import layer_of, natural
from .target import ROLES, Target

__all__ = ["find_stored", "is_transposed"]

_LETTERS = frozenset("qkvo")

# What attach takes besides, as it knows the layers.
_KINDS = ("all-linear", "conv")

# A checkpoint does not say in which order its model defines the modules; these words are in the order of most models of
# transformers. Others are in the order of the alphabet, between the two.
_FIRST = (
    "stem", "embedder", "embeddings", "feature_projection", "text_model", "text_encoder", "vision_tower",
    "vision_model", "visual", "vision_encoder", "visual_projection", "encoder", "attn", "self_attn", "self_attention",
    "norm_attn_norm", "self", "cross_attn", "encoder_attn", "multihead_attn", "qkv", "query_key_value", "qkv_proj",
    "in_proj", "in_proj_qkvz", "query", "q_attn", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "q_proj",
    "q_lin", "to_q", "q", "wq", "k_proj", "v_proj", "query_proj", "key_proj", "fc1", "linear1", "lin1", "gate_proj",
    "wi", "dense_h_to_4h", "w1", "up_proj",
)  # fmt: skip
_LAST = (
    "Wo", "o", "dense", "proj", "projection", "output", "fc2", "w3", "w2", "wo", "wo_0", "language_model", "decoder",
    "to_out", "out_lin", "out_proj", "output_proj", "down_proj", "dense_4h_to_h", "experts", "shared_expert",
    "shared_expert_gate", "shared_experts",
)  # fmt: skip
_RANKS = {word: place - len(_FIRST) for place, word in enumerate(_FIRST)} | {
    word: place for place, word in enumerate(_LAST, 1)
}
# In this company, q comes after k and v.
_REVERSED = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})

# Last parts of the paths of embeddings, by which they are told from other matrices.
_EMBEDDINGS = {
    "embed_in", "embed_positions", "embed_tokens", "position_embeddings", "shared", "tok_embeddings",
    "token_type_embeddings", "word_embedding", "word_embeddings", "wpe", "wte",
}  # fmt: skip


@checks_arguments
def find_stored(
    shapes: Mapping[str, tuple[int, ...]], targets: Any = "qv", config: Mapping[str, Any] | None = None
) -> list[Target]:
    """Return the weights of a checkpoint that an adapter should update.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The name and shape of every stored tensor.
    targets : str, list of str or list of Target
        Roles such as ``"qv"``; ``"embeddings"``, those of the usual names; a list of module paths, whole or their last
        parts; or a regular expression that matches the whole path of a module. Experts have the paths that transformers
        gives them in memory, such as ``mlp.experts`` and ``mlp.experts.down_proj``, however they are stored. Or a list
        of targets, such as :func:`tnadapt.torch.find_targets` returns, which keeps its order. A target of which no
        tensor has the name is kept as it is, since the checkpoint may have it under another name.
    config : mapping, optional
        The model's ``config.json``, for the model type and numbers of heads.

    Returns
    -------
    list of Target
        In the order in which most models define their modules, and q before k before v before o within a module. A
        checkpoint does not store this order; where it matters, and a model defines its modules in another one than
        :func:`tnadapt.torch.attach` would find here, give a list of Target.

    Raises
    ------
    TargetError
        If nothing is found, the layout of a fused weight is unknown, or a tensor has another shape than the target
        given for it.

    Examples
    --------
    >>> stored = {f"h.{i}.attn.{name}_proj.weight": (8, 8) for i in (0, 10, 2) for name in "vkq"}
    >>> [target.module for target in find_stored(stored)][:3]
    ['h.0.attn.q_proj', 'h.0.attn.v_proj', 'h.2.attn.q_proj']
    >>> find_stored({"blocks.0.attn.qkv.weight": (24, 8)}, "v")[0].rows
    Rows(start=16, length=8, stride=24, count=1)
    >>> find_stored({"moe.experts.0.w2.weight": (4, 6), "moe.experts.1.w2.weight": (4, 6)}, ["experts"])[1].label
    'moe.experts.down_proj[1]'
    """
    if isinstance(targets, (list, tuple)) and targets and all(isinstance(target, Target) for target in targets):
        return [_stored_as_given(target, shapes) for target in targets]
    model = StoredModel(shapes, config)
    if isinstance(targets, str) and targets and _LETTERS.issuperset(targets):
        found = targets_of(model, targets)
    elif isinstance(targets, str) and targets == "embeddings":
        found = [_whole(model, name) for name in model.weights if _is_embedding(model, name)]
    else:
        found = _named(model, shapes, targets)
    if not found:
        raise _nothing(targets, model.weights)
    return sorted(found, key=lambda target: _order(model, target))


def _stored_as_given(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Target:
    """Return a target; raise TargetError if the tensor of its name has another shape."""
    stored = shapes.get(target.name, target.stored)
    if tuple(stored) != target.stored:
        raise TargetError(
            f"{target.name} has shape {tuple(stored)} in the checkpoint, and the target given for it is stored as "
            f"{target.stored}: give targets of this model"
        )
    return target


def _order(model: StoredModel, target: Target) -> tuple[Any, ...]:
    """Return the sort key of a target: the place of its module in most models, and that within the module."""
    parts, place = target.module.split("."), []
    for depth, part in enumerate(parts):
        rank = _RANKS.get(part, 0.0)
        if part == "q_proj" and model.children.get(".".join(parts[:depth]), {}).keys() >= _REVERSED:
            rank = _RANKS["v_proj"] + 0.5
        place.append((rank, natural(part)))
    stacked = PARAMETERS.index(target.parameter) if target.parameter in PARAMETERS else -1
    return place, ROLES.index(target.role), stacked, -1 if target.index is None else target.index


def _named(model: StoredModel, shapes: Mapping[str, tuple[int, ...]], targets: Any) -> list[Target]:
    chosen = _chosen(targets)
    several = isinstance(targets, (list, tuple))
    experts = experts_of(
        shapes,
        model.config,
        lambda module, parameter: chosen(module) or (several and chosen(f"{module}.{parameter}")),
    )
    # A pattern that also fits the single tensors of experts selects them once, as the model has them in memory.
    theirs = {name for one in experts for name in one.tensors}
    names = [name for name in model.weights if name not in theirs and chosen(_module(name))]
    return [*(_whole(model, name) for name in names), *(one.target for one in experts)]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_embedding(model: StoredModel, name: str) -> bool:
    return _module(name).rpartition(".")[2] in _EMBEDDINGS and len(model.weights[name]) == 2


def _chosen(targets: Any) -> Callable[[str], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(
                f"targets={safe_repr(targets)} is neither a set of roles nor a regular expression: {error}"
            ) from None
        return lambda path: pattern.fullmatch(path) is not None
    if not isinstance(targets, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in targets):
        raise TargetError(
            "targets must be roles such as 'qv', a regular expression, or a list of paths or of tnadapt.Target; got "
            f"{safe_repr(targets)}"
        )
    return lambda path: any(f".{path}".endswith(f".{entry}") for entry in targets)


def _nothing(targets: Any, weights: Mapping[str, Any]) -> TargetError:
    paths = [_module(name) for name in weights]
    wanted = targets if isinstance(targets, str) else str(next(iter(targets), ""))
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = [last[near] for near in difflib.get_close_matches(wanted, list(last), 4)] or paths[:6]
    there = (
        f"it has {len(paths)} weights, such as {', '.join(close)}" if paths else "it has no weights of layers at all"
    )
    if targets in _KINDS:
        there = "a checkpoint does not say which layer a tensor is of"
    return TargetError(
        f"no tensor of the checkpoint is a target for {safe_repr(targets)}; {there}. Give roles such as 'qv', paths in "
        "a list, or a regular expression for whole paths"
    )


def _whole(model: StoredModel, name: str) -> Target:
    path = _module(name)
    role = "embedding" if _is_embedding(model, name) else "conv" if len(model.weights[name]) > 2 else "linear"
    # A number at the end is the module's own place in a Sequential, not the layer's.
    return model.whole(name, role, layer_of(_module(path)))
