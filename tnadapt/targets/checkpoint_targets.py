"""Find targets in a checkpoint by names and shapes, without building the model; q, k and v in its fused weights.

A checkpoint carries less information than a model. If one tensor produces q, k and v and its layout does not follow
from its name and the model's ``config.json``, it is rejected: wrong rows would be merged without any error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TargetError, safe_repr

from . import roles
from .attention_layouts import TRANSPOSED, StoredWeight, by_name, contested, of_config
from .checkpoint_experts import PARAMETERS, experts_of
from .fused_rows import Facts, Fused, LayoutError, place_rows
from .target import ROLES, Rows, Target

# -- Rows of q, k and v in a fused weight, by its name, config.json and neighboring tensors ----------------------------

# A checkpoint has no classes, so the table of layouts is searched by model type. If that finds nothing, the name of the
# weight decides, unless some entry of the table has a weight that looks the same. Then the weight is rejected with a
# message that says what is missing.


Config = Mapping[str, Any]

# The Conv1D layers of these models; heads and embeddings are stored as usual.
_CONV1D = [["c_attn"], ["q_attn"], ["c_proj"], ["c_fc"]]

_WHICH_PART = "config.json has several parts, and the name does not say to which it belongs"

# Maps the name of a model's part in its config to the words for it in the names of weights.
_TEXT, _VISION = {"text", "language", "llm"}, {"vision", "visual", "image", "img", "vit"}
_WORDS = {
    "text": _TEXT, "llm": _TEXT, "language": _TEXT, "vision": _VISION, "vit": _VISION, "audio": {"audio", "speech"},
}  # fmt: skip


def stored_rows(
    name: str, stored: StoredWeight, fused: Fused, cols: int, config: Config | None
) -> dict[str, Rows | None]:
    """Return the rows of a fused weight that produce q, k and v.

    Parameters
    ----------
    name : str
        The tensor's name. It appears in messages and selects the part of the config.
    stored : StoredWeight
    fused : Fused
    cols : int
        Columns of the weight.
    config : mapping or None

    Returns
    -------
    dict of str to Rows or None
        By letter; None where the whole weight produces it.

    Raises
    ------
    LayoutError
        If the layout cannot be determined.
    """
    layouts: list[dict[str, Rows | None]] = []
    reasons: list[str] = []
    parts = _parts_for(name, config or {})
    for part in parts:
        try:
            rows = _rows(stored, fused, cols, part, config is not None)
            if len(parts) > 1 and fused.letters == "qkv" and fused.o_in is None and fused.out != 3 * cols:
                raise LayoutError(_WHICH_PART)
        except LayoutError as error:
            reasons.append(str(error))
        else:
            layouts += [rows] if rows not in layouts else []
    if len(layouts) == 1:
        return layouts[0]
    why = _WHICH_PART if layouts else reasons[0]
    raise LayoutError(
        f"{name} produces {', '.join(fused.letters)} with one weight of {fused.out} rows, in an unknown layout: {why}. "
        "Put the model's own config.json next to the weights, build the model and use tnadapt.torch, which reads its "
        "classes, or name whole weights"
    )


def is_transposed(name: str, shape: tuple[int, ...], config: Config | None) -> bool:
    """Return whether a matrix is stored as (in, out), as transformers' Conv1D does.

    Examples
    --------
    >>> is_transposed("h.0.attn.c_attn.weight", (4, 12), {"model_type": "gpt2"})
    True
    """
    if len(shape) != 2 or name.split(".")[-2:-1] not in _CONV1D:
        return False
    kinds = [part.get("model_type") for part in _parts_for(name, config or {})]
    return any(isinstance(type_name, str) and type_name in TRANSPOSED for type_name in kinds)


def _rows(stored: StoredWeight, fused: Fused, cols: int, config: Config, has_config: bool) -> dict[str, Rows | None]:
    entry = of_config(config, stored)
    rule = by_name(stored.name) if entry is None else entry.rule
    if rule is None or (entry is None and contested(config, stored)):
        model_type = config.get("model_type") or config.get("architecture")
        says = f"{safe_repr(model_type)} has no known layout" if model_type else "config.json has no model_type"
        raise LayoutError(
            f"libraries lay out {safe_repr(stored.name)} in different ways, and "
            + (says if has_config else "there is no config.json that says what kind of model this is")
        )
    inner = config.get("attn_config")
    lookups = [config.get, *([inner.get] if isinstance(inner, Mapping) else [])]
    rows = place_rows(
        rule(Facts(lookups, "config.json lacks" if has_config else "without a config.json, there is no"), fused), fused
    )
    if entry is None and fused.letters == "qkv" and fused.o_in is None:
        # There is no output projection to check the sizes against.
        equal = len({span.length for span in rows.values() if span is not None}) == 1
        facts = Facts([config.get], "")
        if equal and fused.out != 3 * cols and None in (facts.heads, facts.kv_heads):
            raise LayoutError("no output projection and no numbers of heads determine its sizes")
        if not equal and fused.out == 3 * cols:
            raise LayoutError("config.json has fewer key heads, but the shape suggests as many as query heads")
    return rows


def _parts_for(name: str, config: Config) -> list[Config]:
    """Return the parts of a config that a tensor may belong to: those its name mentions, or else all."""
    words = set(re.split(r"[._]", name))
    parts = list(_nested(config))
    named = [part for key, part in parts if words & _WORDS.get(key, {key})]
    return named or [config, *(part for _, part in parts)]


def _nested(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the nested configs of a config's sub-models, with their keys."""
    for key, part in config.items():
        if isinstance(part, Mapping) and (part.get("model_type") or Facts([part.get], "").heads):
            yield key.removesuffix("_config"), part


# -- The queries, keys, values and outputs of every attention ----------------------------------------------------------

# The counterpart of ``tnadapt.torch._target_selection``: the same names identify an attention, and the same table
# places q, k and v in the rows of a fused weight. Paths stand in for the classes that a model in memory has.


# No model nests its modules this deep. The paths of all ancestors of a name take memory quadratic in its depth:
# gigabytes for a hostile name of 40 KB that consists of dots.
_MAX_DEPTH = 64


class StoredModel(roles.ModuleTree[str]):
    """The tensors and module tree that a checkpoint's headers describe.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The name and shape of every stored tensor. Names with more than 64 dots are ignored.
    config : mapping or None
        Its ``config.json``.

    Attributes
    ----------
    weights : dict of str to tuple of int
        The tensors that are weights of layers; others are biases, norms and tables.
    tensors : dict of str to dict of str to list of str
        Maps each module's path to the names of its children and parameters, and each of these to the tensors at or
        below it.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None) -> None:
        shapes = {name: shape for name, shape in shapes.items() if name.count(".") <= _MAX_DEPTH}
        self.weights = {name: tuple(shape) for name, shape in shapes.items() if _is_weight(name, shape)}
        self.config = config
        self.tensors: dict[str, dict[str, list[str]]] = {}
        for name in shapes:
            module, _, parameter = name.rpartition(".")
            if parameter != "weight":
                self.tensors.setdefault(module, {}).setdefault(parameter, []).append(name)
            parts = module.split(".") if module else []
            for place, child in enumerate(parts):
                self.tensors.setdefault(".".join(parts[:place]), {}).setdefault(child, []).append(name)

    def whole(self, name: str, role: str, layer: str) -> Target:
        """Return a whole tensor as a target."""
        module, _, parameter = name.rpartition(".")
        shape = self.weights[name]
        return Target(module, shape, role, parameter, None, is_transposed(name, shape, self.config), layer)

    def paths(self) -> list[str]:
        """Return the paths of all modules, numbers in them in the order of numbers."""
        return sorted(self.tensors, key=roles.natural)

    def is_attention(self, path: str) -> bool:
        """Return whether a module is named as an attention, or lies in one: BERT's attention.self, attentions.3."""
        above, _, last = path.rpartition(".")
        inner = last == "self" or last.isdecimal()
        return roles.is_attention(last) or (inner and roles.is_attention(above.rpartition(".")[2]))

    def children(self, path: str) -> Iterable[str]:
        """Return the names of a module's parameters, except for its weight, and children."""
        return self.tensors.get(path, {})

    def projections(self, path: str, child: str) -> list[str]:
        """Return the weights of a projection, which may be wrapped: just one if it is the only one or is named so."""
        weights = [name for name in self.tensors[path][child] if _projects(self.weights.get(name))]
        return roles.main_projection(weights, _join(path, child), lambda name: name.removesuffix(".weight"))

    def sizes(self, weight: str) -> tuple[int, int]:
        """Return the rows and columns of a tensor."""
        return self.whole(weight, "linear", "").shape

    def fused_rows(self, path: str, child: str, weight: str, fused: Fused) -> dict[str, Rows | None]:
        """Return the rows that produce each letter, by :func:`stored_rows`."""
        whole = self.whole(weight, "linear", "")
        beside = [other for other in self.tensors[path] if other != child]
        stored = StoredWeight(child, beside, len(whole.stored))
        return stored_rows(weight, stored, fused, whole.shape[1], self.config)


def _is_weight(name: str, shape: Sequence[int]) -> bool:
    parameter = name.rpartition(".")[2]
    # A parameter of the attention itself, such as in_proj_weight, counts too.
    layer = parameter == "weight" or (
        parameter.endswith("_weight") and roles.parse_projection_name(parameter, attention=True) is not None
    )
    return layer and 2 <= len(shape) <= 8 and min(shape) > 0


def _projects(shape: tuple[int, ...] | None) -> bool:
    # A depthwise convolution is no projection.
    return shape is not None and (len(shape) == 2 or shape[1] > 1 or shape[0] == 1)


def targets_of(model: StoredModel, letters: str) -> list[Target]:
    """Return every weight, or part of one, that produces one of the roles.

    Parameters
    ----------
    model : StoredModel
    letters : str
        Those of the roles, among q, k, v and o.

    Returns
    -------
    list of Target
        Attention by attention in the order of their paths (numbers as numbers), q before k before v before o.

    Raises
    ------
    LayoutError
        If a weight produces several roles in an unknown layout, or it is ambiguous which weight produces a role.

    Examples
    --------
    >>> model = StoredModel({"attn.in_proj.weight": (12, 4)}, {"model_type": "deberta", "num_attention_heads": 2})
    >>> [(target.role, target.rows) for target in targets_of(model, "q")]
    [('q', Rows(start=0, length=2, stride=6, count=2))]
    """
    targets = list[Target]()
    for attention in model.attentions:
        layer = roles.layer_of(attention.path)
        of_attention = [
            dataclasses.replace(model.whole(name, role, layer), rows=rows)
            for name, role, rows in model.parts(attention, letters)
        ]
        targets += sorted(of_attention, key=lambda target: (ROLES.index(target.role), roles.natural(target.module)))
    return targets


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -- Selection of targets ----------------------------------------------------------------------------------------------


# Words that only attach accepts, which knows the layers.
_KINDS = ("all-linear", "conv")

# A checkpoint does not say in which order its model defines the modules. These words are in the order of most
# transformers models; others come between the two lists, alphabetically.
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
# Next to all of these, q comes after k and v.
_REVERSED = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})

# Last parts of the paths of embeddings, which distinguish them from other matrices.
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
    if isinstance(targets, str) and roles.are_roles(targets):
        selected = targets_of(model, targets)
    elif isinstance(targets, str) and targets == "embeddings":
        selected = [_whole(model, name) for name in model.weights if _is_embedding(model, name)]
    else:
        selected = _named(model, shapes, targets)
    if not selected:
        raise _nothing(targets, model.weights)
    return sorted(selected, key=lambda target: _order(model, target))


def _stored_as_given(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Target:
    """Return a target, or raise TargetError if the tensor of its name has another shape."""
    stored = shapes.get(target.name, target.stored)
    if tuple(stored) != target.stored:
        raise TargetError(
            f"{target.name} has shape {tuple(stored)} in the checkpoint, and the target given for it is stored as "
            f"{target.stored}: give targets of this model"
        )
    return target


def _order(model: StoredModel, target: Target) -> tuple[Any, ...]:
    """Return the sort key of a target: the position of its module in most models, then that within the module."""
    parts, place = target.module.split("."), []
    for depth, part in enumerate(parts):
        rank = _RANKS.get(part, 0.0)
        if part == "q_proj" and model.tensors.get(".".join(parts[:depth]), {}).keys() >= _REVERSED:
            rank = _RANKS["v_proj"] + 0.5
        place.append((rank, roles.natural(part)))
    stacked = PARAMETERS.index(target.parameter) if target.parameter in PARAMETERS else -1
    return place, ROLES.index(target.role), stacked, -1 if target.index is None else target.index


def _named(model: StoredModel, shapes: Mapping[str, tuple[int, ...]], targets: Any) -> list[Target]:
    chosen = _chosen(targets)
    several = isinstance(targets, (list, tuple))
    experts = experts_of(
        shapes, model.config, lambda module, parameter: chosen(module) or (several and chosen(f"{module}.{parameter}"))
    )
    # A pattern that also fits the single tensors of experts selects them once, as the model has them in memory.
    theirs = {name for expert in experts for name in expert.tensors}
    names = [name for name in model.weights if name not in theirs and chosen(_module(name))]
    return [*(_whole(model, name) for name in names), *(expert.target for expert in experts)]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_embedding(model: StoredModel, name: str) -> bool:
    return _module(name).rpartition(".")[2] in _EMBEDDINGS and len(model.weights[name]) == 2


def _chosen(targets: Any) -> Callable[[str], bool]:
    if isinstance(targets, str):
        return roles.path_matcher(targets, "targets")
    if not isinstance(targets, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in targets):
        raise TargetError(
            "targets must be roles such as 'qv', a regular expression, or a list of paths or of tnadapt.Target; got "
            f"{safe_repr(targets)}"
        )
    return lambda path: any(roles.ends_in(path, entry) for entry in targets)


def _nothing(targets: Any, weights: Mapping[str, Any]) -> TargetError:
    paths = [_module(name) for name in weights]
    wanted = targets if isinstance(targets, str) else str(next(iter(targets), ""))
    close = roles.similar_paths(wanted, paths) or paths[:6]
    reason = (
        f"it has {len(paths)} weights, such as {', '.join(close)}" if paths else "it has no weights of layers at all"
    )
    if targets in _KINDS:
        reason = "a checkpoint does not say which layer a tensor is of"
    return TargetError(
        f"no tensor of the checkpoint is a target for {safe_repr(targets)}; {reason}. Give roles such as 'qv', paths "
        "in a list, or a regular expression for whole paths"
    )


def _whole(model: StoredModel, name: str) -> Target:
    path = _module(name)
    role = "embedding" if _is_embedding(model, name) else "conv" if len(model.weights[name]) > 2 else "linear"
    # A number at the end is the module's own index in a Sequential, not the layer's.
    return model.whole(name, role, roles.layer_of(_module(path)))
