"""Find the queries, keys, values and outputs of every attention in a checkpoint by tensor names and shapes.

The counterpart of ``tnadapt.torch._attention_search``: the same names identify an attention, and the same table places
q, k and v in the rows of a fused weight. Paths stand in for the classes that a model in memory has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._checkpoint_layouts import is_transposed, stored_rows
from .attention_grouping import (
    PARENT_OUTPUTS,
    Called,
    distinct_rows,
    main_projection,
    settled_names,
    unclear_children,
)
from .attention_layouts import StoredWeight
from .fused_rows import Fused, LayoutError
from .roles import (
    AMBIGUOUS_OUTPUTS,
    OUTPUTS,
    ProjectionName,
    attention_group,
    is_attention,
    layer_of,
    natural,
    parse_projection_name,
)
from .target import ROLES, Rows, Target

__all__ = ["StoredModel", "targets_of"]

# No model nests its modules this deep. The paths of all ancestors of a name take memory quadratic in its depth:
# gigabytes for a hostile name of 40 KB that consists of dots.
_MAX_DEPTH = 64


class StoredModel:
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
    children : dict of str to dict of str to list of str
        Maps each module's path to the names of its children and parameters, and each of these to the tensors at or
        below it.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None) -> None:
        shapes = {name: shape for name, shape in shapes.items() if name.count(".") <= _MAX_DEPTH}
        self.weights = {name: tuple(shape) for name, shape in shapes.items() if _is_weight(name, shape)}
        self.config = config
        self.children: dict[str, dict[str, list[str]]] = {}
        for name in shapes:
            module, _, parameter = name.rpartition(".")
            if parameter != "weight":
                self.children.setdefault(module, {}).setdefault(parameter, []).append(name)
            parts = module.split(".") if module else []
            for place, child in enumerate(parts):
                self.children.setdefault(".".join(parts[:place]), {}).setdefault(child, []).append(name)

    def whole(self, name: str, role: str, layer: str) -> Target:
        """Return a whole tensor as a target."""
        module, _, parameter = name.rpartition(".")
        shape = self.weights[name]
        return Target(module, shape, role, parameter, None, is_transposed(name, shape, self.config), layer)

    def projections(self, path: str, child: str) -> list[str]:
        """Return the weights of a projection, which may be wrapped: just one if it is the only one or is named so."""
        found = [name for name in self.children[path][child] if _projects(self.weights.get(name))]
        return main_projection(found, _join(path, child), lambda name: name.removesuffix(".weight"))

    def outputs(self, path: str, names: frozenset[str]) -> list[str]:
        """Return the weights of the children with these names that hold exactly one weight."""
        found = [self.projections(path, child) for child in self.children.get(path, {}) if child in names]
        return [weights[0] for weights in found if len(weights) == 1]


def _is_weight(name: str, shape: Sequence[int]) -> bool:
    parameter = name.rpartition(".")[2]
    # A parameter of the attention itself, such as in_proj_weight, counts too.
    layer = parameter == "weight" or (
        parameter.endswith("_weight") and parse_projection_name(parameter, attention=True) is not None
    )
    return layer and 2 <= len(shape) <= 8 and min(shape) > 0


def _projects(shape: tuple[int, ...] | None) -> bool:
    # A depthwise convolution is no projection.
    return shape is not None and (len(shape) == 2 or shape[1] > 1 or shape[0] == 1)


_Input = Called[str]


class _StoredAttention(NamedTuple):
    path: str
    inputs: list[_Input]
    outputs: list[str]


def targets_of(model: StoredModel, roles: str) -> list[Target]:
    """Return every weight, or part of one, that produces one of the roles.

    Parameters
    ----------
    model : StoredModel
    roles : str
        Letters among q, k, v and o.

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
    found: list[Target] = []
    for attention in _attentions(model):
        _check_clear(model, attention, roles)
        inputs = [target for entry in attention.inputs for target in _inputs(model, attention, entry, roles)]
        found += sorted(inputs, key=lambda target: (ROLES.index(target.role), natural(target.module)))
        if "o" in roles:
            found += [model.whole(name, "o", layer_of(attention.path)) for name in attention.outputs]
    return found


def _attentions(model: StoredModel) -> Iterator[_StoredAttention]:
    seen: set[str] = set()

    def new(name: str) -> bool:
        known = name in seen
        seen.add(name)
        return not known

    for path in sorted(model.children, key=natural):
        named = _is_attention(path)
        called = _called(model, path, named)
        outputs = model.outputs(path, OUTPUTS)
        called = [called[place] for place in attention_group([says for _, says, _ in called], named, bool(outputs))]
        inputs = [entry for entry in called if len(entry[2]) > 1 or new(entry[2][0])]
        if not inputs:
            continue
        above = path.rpartition(".")[0]
        outputs = outputs or model.outputs(path, AMBIGUOUS_OUTPUTS)
        if not outputs and is_attention(above.rpartition(".")[2]):
            outputs = model.outputs(above, PARENT_OUTPUTS)
        yield _StoredAttention(path, inputs, [name for name in outputs if new(name)])


def _is_attention(path: str) -> bool:
    """Return whether a module is named as an attention, or lies in one: BERT's attention.self, XLM's attentions.3."""
    above, _, last = path.rpartition(".")
    return is_attention(last) or ((last == "self" or last.isdecimal()) and is_attention(above.rpartition(".")[2]))


def _called(model: StoredModel, path: str, named: bool) -> list[_Input]:
    """Return the parameters and children of a module that are named as projections to q, k or v."""
    found = []
    for child in model.children[path]:
        says = parse_projection_name(child, named)
        weights = model.projections(path, child) if says is not None else []
        if says is not None and weights:
            found.append((child, says, weights))
    return settled_names(found)


def _check_clear(model: StoredModel, attention: _StoredAttention, roles: str) -> None:
    """Raise an error if it is ambiguous which weight produces a requested role."""
    path = attention.path
    unclear = unclear_children(
        attention.inputs, model.children[path], lambda child: bool(model.projections(path, child))
    )
    for child, makes in unclear:
        if not set(makes).isdisjoint(roles):
            raise LayoutError(
                f"{_join(attention.path, child)} of the checkpoint seems to produce {makes}, but it is unclear with "
                "which weight or rows: build the model and use tnadapt.torch, or name whole weights by a list of paths"
            )


def _inputs(model: StoredModel, attention: _StoredAttention, entry: _Input, roles: str) -> Iterator[Target]:
    child, says, weights = entry
    wanted = [letter for letter in "qkv" if letter in roles and letter in says.letters]
    if not wanted or len(weights) > 1:
        return
    layer = layer_of(attention.path)
    whole = model.whole(weights[0], "linear", layer)
    rows: dict[str, Rows | None] = dict.fromkeys(says.letters)
    if len(says.letters) > 1:
        rows = _rows_in(model, attention, child, says, whole)
    for letter, own in distinct_rows(wanted, rows):
        yield Target(whole.module, whole.stored, letter, whole.parameter, own, whole.transposed, whole.layer)


def _rows_in(
    model: StoredModel, attention: _StoredAttention, child: str, says: ProjectionName, whole: Target
) -> dict[str, Rows | None]:
    path = _join(attention.path, child)
    below = whole.module.removeprefix(path).lstrip(".")
    beside = [name for name in model.children[attention.path] if name != child]
    stored = StoredWeight(child, below, beside, len(whole.stored))
    out, cols = whole.shape
    queries = [
        model.whole(weights[0], "q", "").shape[0] for _, other, weights in attention.inputs if other.letters == "q"
    ]
    o_in = model.whole(attention.outputs[0], "o", "").shape[1] if len(attention.outputs) == 1 else None
    fused = Fused(says.letters, out, queries[0] if queries else None, o_in)
    return stored_rows(whole.name, stored, fused, cols, model.config)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
