"""Which stored tensors of a checkpoint are queries and values, by their names and shapes: no model is built.

A checkpoint says less than a model. Where one tensor makes q, k and v and its layout does not follow from
its shape and the model's ``config.json``, it is refused, and the rows can be named by the caller.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import TargetError, shown
from .roles import AMBIGUOUS_OUTPUTS, OUTPUTS, Name, evident, is_attention, layer_of, natural, read
from .target import ROLES, Rows, Target

__all__ = ["find_stored"]

_LETTERS = frozenset("qkvo")

# Models of transformers whose linear layers are stored as (in, out).
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


def find_stored(
    shapes: Mapping[str, tuple[int, ...]], targets: Any = "qv", config: Mapping[str, Any] | None = None
) -> list[Target]:
    """The weights of a checkpoint that are to be adapted.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The name and shape of every stored tensor.
    targets : str or list of str
        Roles such as ``"qv"``; a list of the paths of modules, whole or their last parts; else a regular
        expression for the whole path of a module.
    config : mapping, optional
        The model's ``config.json``: numbers of heads, and what kind of model it is.

    Returns
    -------
    list of Target
        Attention by attention in the order of their paths (numbers as numbers), q before k before v before o.

    Raises
    ------
    TargetError
        If nothing is found, or the layout of a fused weight is not known.

    Examples
    --------
    >>> stored = {f"h.{i}.attn.{name}_proj.weight": (8, 8) for i in (0, 10, 2) for name in "vkq"}
    >>> [target.module for target in find_stored(stored)][:3]
    ['h.0.attn.q_proj', 'h.0.attn.v_proj', 'h.2.attn.q_proj']
    >>> find_stored({"blocks.0.attn.qkv.weight": (24, 8)}, "v")[0].rows
    Rows(start=16, length=8, stride=24, count=1)
    """
    weights = {name: tuple(shape) for name, shape in shapes.items() if _is_weight(name, shape)}
    settings = config or {}
    if isinstance(targets, str) and targets and _LETTERS.issuperset(targets):
        found = _by_roles(weights, targets, settings)
    else:
        chosen = _chosen(targets)
        names = sorted((name for name in weights if chosen(_module(name))), key=natural)
        found = [_whole(name, weights[name], settings) for name in names]
    if not found:
        raise _nothing(targets, weights)
    return found


def _is_weight(name: str, shape: Sequence[int]) -> bool:
    parameter = name.rpartition(".")[2]
    # Others are biases, norms and tables, or an attention's own, such as in_proj_weight.
    layer = parameter == "weight" or (parameter.endswith("_weight") and read(parameter, attention=True) is not None)
    return layer and 2 <= len(shape) <= 8 and min(shape) > 0


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _chosen(targets: Any) -> Callable[[str], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"targets={shown(targets)} is no roles and no regular expression: {error}") from None
        return lambda path: pattern.fullmatch(path) is not None
    if not isinstance(targets, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in targets):
        raise TargetError(
            f"targets must be roles such as 'qv', a regular expression, or a list of paths; got {shown(targets)}"
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
    return TargetError(
        f"no tensor of the checkpoint is a target for {shown(targets)}; {there}. Give roles such as 'qv', paths in a "
        "list, or a regular expression for whole paths"
    )


# -- Whole weights -------------------------------------------------------------------------------


def _whole(name: str, shape: tuple[int, ...], config: Mapping[str, Any], role: str = "") -> Target:
    module, _, parameter = name.rpartition(".")
    last = read(module.rpartition(".")[2])
    if not role:
        role = last.letters if last is not None and last.letters in ("q", "k", "v") else "linear"
        role = "conv" if role == "linear" and len(shape) > 2 else role
    transposed = config.get("model_type") in _TRANSPOSED and len(shape) == 2
    return Target(module, shape, role, parameter, transposed=transposed, layer=layer_of(_module(module)))


# -- By role -------------------------------------------------------------------------------------


def _by_roles(weights: Mapping[str, tuple[int, ...]], roles: str, config: Mapping[str, Any]) -> list[Target]:
    # A module's children of a name, each with the stored tensor: q_proj.weight; or a parameter of its own.
    children: dict[str, dict[str, str]] = {}
    for name in weights:
        module, _, parameter = name.rpartition(".")
        parent, child = (module, parameter) if parameter != "weight" else (_module(module), module.rpartition(".")[2])
        children.setdefault(parent, {})[child] = name
    found: list[Target] = []
    for parent in sorted(children, key=natural):
        own = children[parent]
        named = is_attention(*parent.split(".")[-2:])
        called = [(child, says) for child in own if (says := read(child, named)) is not None]
        if any(says.letters == "q" for _, says in called):
            # GPT-2's cross-attention: queries are made elsewhere, by q_attn.
            called = [(child, says._replace(letters="kv") if child == "c_attn" else says) for child, says in called]
        outputs = _outputs(parent, children, called)
        inputs = []
        for place in evident([says for _, says in called], named, bool(outputs)):
            child, says = called[place]
            inputs += _parts(own[child], weights[own[child]], says, roles, config)
        found += sorted(inputs, key=lambda target: (ROLES.index(target.role), natural(target.module)))
        if "o" in roles and called:
            found += [_whole(stored, weights[stored], config, "o") for stored in outputs]
    return found


def _outputs(parent: str, children: Mapping[str, Mapping[str, str]], called: Sequence[tuple[str, Name]]) -> list[str]:
    if not called:
        return []
    own = children[parent]
    for names in (OUTPUTS, AMBIGUOUS_OUTPUTS):
        found = [own[child] for child in own if child in names]
        if found:
            return found
    # diffusers' to_out.0, and BERT's way: the attention's parent has the output projection, in output.dense.
    for beside, child in ((f"{parent}.to_out", "0"), (f"{_module(parent)}.output", "dense")):
        if child in children.get(beside, {}):
            return [children[beside][child]]
    return []


def _parts(stored: str, shape: tuple[int, ...], name: Name, roles: str, config: Mapping[str, Any]) -> list[Target]:
    """What of one tensor makes the roles."""
    wanted = [letter for letter in "qkv" if letter in roles and letter in name.letters]
    if not wanted:
        return []
    if len(name.letters) == 1:
        return [_whole(stored, shape, config, wanted[0])]
    whole = _whole(stored, shape, config, "linear")
    out, cols = whole.shape
    rows = _rows(name.letters, stored, out, cols, config)
    module = whole.module
    return [
        Target(module, shape, letter, whole.parameter, rows[letter], whole.transposed, layer_of(_module(module)))
        for letter in wanted
    ]


def _rows(letters: str, stored: str, out: int, cols: int, config: Mapping[str, Any]) -> dict[str, Rows]:
    """Which rows of a fused weight make q, k and v."""
    kind = config.get("model_type")
    heads, kv_heads = _number(config, _HEADS), _number(config, _KV_HEADS)
    if kind in ("gpt_neox", "bloom") and letters == "qkv" and heads and out % (3 * heads) == 0:
        size = out // (3 * heads)  # head by head
        return {letter: Rows(place * size, size, 3 * size, heads) for place, letter in enumerate(letters)}
    # Names under which some libraries interleave heads and others do not.
    doubtful = any(part in ("query_key_value", "linear_qkv", "kv_b_proj") for part in stored.split("."))
    sizes = [out // len(letters)] * len(letters)
    if heads and kv_heads and kv_heads != heads and letters == "qkv":
        head = _number(config, ("head_dim",)) or out // (heads + 2 * kv_heads)
        sizes = [heads * head, kv_heads * head, kv_heads * head]
    elif letters == "qkv" and out != 3 * cols:
        doubtful = True
    if doubtful or sum(sizes) != out or kind in ("gpt_bigcode", "falcon", "codegen"):
        raise TargetError(
            f"{stored} makes {', '.join(letters)} with one weight of {out} rows, and in a checkpoint nothing says "
            f"which rows make which (model_type {shown(kind)}): build the model and use tnadapt.torch, which reads "
            "its classes, or name whole weights"
        )
    starts = [sum(sizes[:place]) for place in range(len(letters))]
    return {letter: Rows(start, size, out) for letter, start, size in zip(letters, starts, sizes, strict=True)}


_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for holder in (config, config.get("text_config")):
        for name in names:
            value = holder.get(name) if isinstance(holder, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
