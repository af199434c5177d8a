"""Query, key, value and output projections of every attention in a model, found by structure and names.

A module is an attention if it holds projections to q and v next to each other (one weight or several, or only k and v
if the query is learned). A single ``value`` or ``query`` elsewhere does not count, nor does deformable attention, which
has only values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.attention_grouping import (
    PARENT_OUTPUTS,
    Called,
    distinct_rows,
    settled_names,
    unclear_children,
)
from tnadapt.targets.roles import (
    AMBIGUOUS_OUTPUTS,
    OUTPUTS,
    ProjectionName,
    attention_group,
    is_attention,
    layer_of,
    parse_projection_name,
)
from tnadapt.targets.target import Rows, Target

from ._fused_weights import rows_of
from ._layout_hints import is_known
from ._weights import Weight, join, modules_of, plain, projections_in, weights_of

__all__ = ["AttentionModule", "attentions"]


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
