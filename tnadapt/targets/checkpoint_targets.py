"""Select targets in a checkpoint by tensor names and shapes, without building the model.

A checkpoint carries less information than a model. If one tensor produces q, k and v and its layout does not follow
from its name and the model's ``config.json``, it is rejected: wrong rows would be merged without any error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from tnadapt.errors import TargetError, safe_repr

from ._checkpoint_attention import StoredModel, targets_of
from ._checkpoint_layouts import is_transposed
from .checkpoint_experts import experts_of
from .roles import layer_of, natural, parse_projection_name
from .target import Target

__all__ = ["find_stored", "is_transposed"]

_LETTERS = frozenset("qkvo")

# What attach takes besides, as it knows the layers.
_KINDS = ("all-linear", "conv")

# Last parts of the paths of embeddings, by which they are told from other matrices.
_EMBEDDINGS = {
    "embed_in", "embed_positions", "embed_tokens", "position_embeddings", "shared", "tok_embeddings",
    "token_type_embeddings", "word_embedding", "word_embeddings", "wpe", "wte",
}  # fmt: skip


def find_stored(
    shapes: Mapping[str, tuple[int, ...]], targets: Any = "qv", config: Mapping[str, Any] | None = None
) -> list[Target]:
    """Return the weights of a checkpoint that an adapter should update.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The name and shape of every stored tensor.
    targets : str or list of str
        Roles such as ``"qv"``; ``"embeddings"``, those of the usual names; a list of module paths, whole or their last
        parts; or a regular expression that matches the whole path of a module. Experts have the paths that transformers
        gives them in memory, such as ``mlp.experts`` and ``mlp.experts.down_proj``, however they are stored.
    config : mapping, optional
        The model's ``config.json``, for the model type and numbers of heads.

    Returns
    -------
    list of Target
        Attention by attention in the order of their paths (numbers as numbers), q before k before v before o.

    Raises
    ------
    TargetError
        If nothing is found, or the layout of a fused weight is unknown.

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
    model = StoredModel(shapes, config)
    if isinstance(targets, str) and targets and _LETTERS.issuperset(targets):
        found = targets_of(model, targets)
    elif targets == "embeddings":
        found = [_whole(model, name) for name in sorted(model.weights, key=natural) if _is_embedding(model, name)]
    else:
        found = _named(model, shapes, targets)
    if not found:
        raise _nothing(targets, model.weights)
    return found


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
    return [*(_whole(model, name) for name in sorted(names, key=natural)), *(one.target for one in experts)]


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
            f"targets must be roles such as 'qv', a regular expression, or a list of paths; got {safe_repr(targets)}"
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
    says = parse_projection_name(path.rpartition(".")[2])
    role = says.letters if says is not None and says.letters in ("q", "k", "v") else "linear"
    role = "embedding" if _is_embedding(model, name) else role
    role = "conv" if role == "linear" and len(model.weights[name]) > 2 else role
    # A number at the end is the module's own place in a Sequential, not the layer's.
    return model.whole(name, role, layer_of(_module(path)))
