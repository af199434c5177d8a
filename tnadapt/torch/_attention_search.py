"""Query, key, value and output projections of every attention in a model, found by structure and names.

A module is an attention if it holds projections to q and v next to each other (one weight or several, or only k and v
if the query is learned). A single ``value`` or ``query`` elsewhere does not count, nor does deformable attention, which
has only values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.attention_layouts import AttentionLayout, by_name, of_class
from tnadapt.targets.fused_rows import Facts, Fused, LayoutError, place_rows
from tnadapt.targets.roles import (
    AMBIGUOUS_OUTPUTS,
    OUTPUTS,
    PARENT_OUTPUTS,
    Called,
    ProjectionName,
    attention_group,
    distinct_rows,
    is_attention,
    layer_of,
    parse_projection_name,
    settled_names,
    unclear_children,
)
from tnadapt.targets.target import Rows, Target

from ._weights import Weight, join, modules_of, plain, projections_in, weights_of

__all__ = [
    "AttentionModule",
    "attentions",
    "facts_of",
    "is_known",
    "layout_of",
    "rows_of",
]


# -- Layout facts of a torch attention module, for the table in tnadapt.targets.attention_layouts ----------------------


def facts_of(parent: Any) -> Facts:
    """Return the sizes that an attention module has as attributes, or else in its config."""
    config = getattr(parent, "config", None)
    lookups = [lambda name: getattr(parent, name, None), lambda name: getattr(config, name, None)]
    return Facts(lookups, "its attributes are not those that were expected: there is no")


def layout_of(parent: Any, weight: str = "") -> AttentionLayout | None:
    """Return the table's entry for an attention of this class with a fused weight of this name, or None."""
    names = [name for cls in type(parent).__mro__ for name in (f"{cls.__module__}.{cls.__name__}", cls.__name__)]
    return of_class(names, lambda name: hasattr(parent, name), weight)


def is_known(parent: Any) -> bool:
    """Return whether the class is in the table, which makes it an attention whatever its name."""
    return layout_of(parent) is not None


# -- The rows of a model's fused weight that produce q, k and v --------------------------------------------------------

# Layouts that are known by the class of the attention come from a table shared with checkpoints on disk. The layout of
# an unknown class is inferred from the weight's name, with one block per letter in order, as in most libraries. Block
# sizes come from the numbers of heads where keys and values have fewer heads, else the blocks are equal; they are
# checked against the width of the output projection. Where the name is ambiguous, the caller must give the rows.


def rows_of(
    parent: Any, name: str, letters: str, out: int, path: str, q_out: int | None = None, o_in: int | None = None
) -> dict[str, Rows | None]:
    """Return the rows of a fused weight that produce q, k and v.

    Parameters
    ----------
    parent : Module
        The attention module.
    name : str
        The weight's name there.
    letters : {"qkv", "qk", "kv"}
        The projections in the weight, in the order of its name.
    out : int
        Number of output rows.
    path : str
        Dotted path of the weight, for the error message.
    q_out, o_in : int, optional
        Rows of a separate query projection, and columns of the output projection, where the attention has them.

    Returns
    -------
    dict of str to Rows or None
        The rows of each letter; None where the whole weight produces it.

    Raises
    ------
    TargetError
        If the layout is unknown or does not fit.
    """
    entry = layout_of(parent, name)
    rule = by_name(name) if entry is None else entry.rule
    fused = Fused(letters, out, q_out, o_in)
    try:
        if rule is None:
            raise LayoutError("libraries lay it out in different ways")
        return place_rows(rule(facts_of(parent), fused), fused)
    except LayoutError as error:
        why = str(error)
    raise TargetError(
        f"{path} computes {', '.join(letters)} with one weight of {out} rows, and the layout of the rows in a "
        f"{type(parent).__name__} is unknown: {why}; give the rows, targets=[tnadapt.Target({path!r}, stored shape, "
        "'q', rows=tnadapt.Rows(start, length, stride, count)), …], or leave it out with a list of paths or a function"
    )


# -- Query, key, value and output projections of every attention in a model, found by structure and names --------------


class AttentionModule(NamedTuple):
    """One attention and its projections.

    Attributes
    ----------
    path : str
    module : Module
    inputs : list of (str, ProjectionName, Weight)
        Name in the module, what the name says about q, k and v, and the weight; in the module's order.
    outputs : list of Weight
    unclear : list of (str, str)
        Children that seem to produce q, k or v in an unknown way, and the letters they seem to produce.
    """

    path: str
    module: nn.Module
    inputs: list[tuple[str, ProjectionName, Weight]]
    outputs: list[Weight]
    unclear: list[tuple[str, str]]

    def targets(self, letters: str) -> Iterator[Target]:
        """Yield each weight, or part of one, that produces one of the letters.

        Raises
        ------
        TargetError
            If a fused weight's layout is unknown, or it is unclear what produces a letter.
        """
        for name, makes in self.unclear:
            if not set(makes).isdisjoint(letters):
                raise TargetError(
                    f"{join(self.path, name)} of {type(self.module).__name__} seems to compute {makes}, but with which "
                    "weight or rows is unknown: give tnadapt.Target(path, shape, role, rows=tnadapt.Rows(…)) for it, "
                    "or name other targets in a list of paths or with a function"
                )
        layer = layer_of(plain(self.path))
        whole_q = [weight for _, found, weight in self.inputs if found.letters == "q"]
        q_out = whole_q[0].shape[0] if whole_q else None
        o_in = self.outputs[0].shape[1] if len(self.outputs) == 1 else None
        for name, found, weight in self.inputs:
            wanted = [letter for letter in "qkv" if letter in found.letters and letter in letters]
            if not wanted:
                continue
            rows: dict[str, Rows | None] = dict.fromkeys(found.letters)
            if len(found.letters) > 1:
                out = weight.shape[0]
                rows = rows_of(self.module, name, found.letters, out, weight.path, q_out, o_in)
            for letter, own in distinct_rows(wanted, rows):
                yield weight.target(letter, layer, own)
        if "o" in letters:
            for weight in self.outputs:
                yield weight.target("o", layer)


def attentions(model: nn.Module) -> Iterator[AttentionModule]:
    """Yield every attention of a model, in the model's order.

    Examples
    --------
    >>> [found.path for found in attentions(nn.TransformerEncoderLayer(8, 2, 8))]
    ['self_attn']
    """
    places = list(modules_of(model))
    by_plain_path = {plain(path): module for path, module in places}
    first = {id(module): path for path, module in places}
    seen: set[tuple[int, str]] = set()

    def new(weight: Weight) -> bool:
        key = id(weight.module), weight.parameter
        known = key in seen
        seen.add(key)
        return not known

    def named_first(weight: Weight) -> Weight:
        return weight._replace(path=first[id(weight.module)])

    for path, module in places:
        named = is_attention(type(module).__name__, plain(path).rpartition(".")[2])
        called = _called(path, module, named or is_known(module))
        outputs = _children(path, module, OUTPUTS)
        called = [called[place] for place in attention_group([name for _, name, _ in called], named, bool(outputs))]
        inputs = [
            (child, name, named_first(weights[0]))
            for child, name, weights in called
            if len(weights) == 1 and new(weights[0])
        ]
        unclear = _unclear(module, called)
        if not inputs and not unclear:
            continue
        outputs = outputs or _children(path, module, AMBIGUOUS_OUTPUTS) or _outputs_of_parent(path, by_plain_path)
        outputs = [named_first(weight) for weight in outputs if new(weight)]
        yield AttentionModule(path, module, _in_use(module, inputs), outputs, unclear)


def _called(path: str, module: nn.Module, attention: bool) -> list[Called[Weight]]:
    """Return a module's parameters and children whose names say that they project to q, k or v."""
    found: list[Called[Weight]] = []
    for weight in weights_of(path, module):
        name = parse_projection_name(weight.parameter, attention=True)
        if name is not None:
            found.append((weight.parameter, name, [weight]))
    for child_name, child in module._modules.items():
        name = parse_projection_name(child_name, attention)
        weights = [] if name is None or child is None else projections_in(join(path, child_name), child)
        if name is not None and weights:
            found.append((child_name, name, weights))
    return settled_names(found)


def _unclear(module: nn.Module, called: list[Called[Weight]]) -> list[tuple[str, str]]:
    """Return an attention's children with the name of a projection but several weights, or with a partial name."""
    if not called:
        return []
    children = {name: child for name, child in module._modules.items() if child is not None}
    return unclear_children(called, children, lambda name: bool(projections_in(name, children[name])))


def _in_use(
    module: nn.Module, inputs: list[tuple[str, ProjectionName, Weight]]
) -> list[tuple[str, ProjectionName, Weight]]:
    """Drop the separate weights that diffusers keeps next to a fused copy and no longer reads."""
    if not getattr(module, "fused_projections", False):
        return inputs

    def stream(name: ProjectionName) -> bool:
        return name.family.startswith("add_") or "added" in name.family

    fused = {(stream(name), letter) for _, name, _ in inputs if len(name.letters) > 1 for letter in name.letters}
    return [entry for entry in inputs if len(entry[1].letters) > 1 or (stream(entry[1]), entry[1].letters) not in fused]


def _children(path: str, module: nn.Module, names: frozenset[str]) -> list[Weight]:
    """Return the weights of the children with these names, of children that hold a single weight."""
    found = [
        projections_in(join(path, name), child)
        for name, child in module._modules.items()
        if child is not None and name in names
    ]
    return [weights[0] for weights in found if len(weights) == 1]


def _outputs_of_parent(path: str, by_plain_path: dict[str, nn.Module]) -> list[Weight]:
    """Return the output projections of the attention's parent, if that is an attention itself."""
    above = plain(path).rpartition(".")[0]
    parent = by_plain_path.get(above)
    if parent is None or not is_attention(type(parent).__name__):
        return []
    return _children(above, parent, PARENT_OUTPUTS)
