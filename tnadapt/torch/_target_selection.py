"""Selection of the weights that an adapter updates: by role, by kind, by name, or by the caller's function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tnadapt.argument_checks import flag
from tnadapt.errors import TargetError
from tnadapt.targets.target import ROLES, Target

from ._hosts import host_of, paths_of, reads_outside
from ._target_filters import in_layers, without
from ._target_search import TargetSearch
from ._tied_weights import tied, with_tied
from ._weights import check_embedding

__all__ = [
    "check_usable",
    "filtered",
    "find_targets",
    "host_of",
    "in_order",
    "paths_of",
    "reads_outside",
    "tied",
]


def find_targets(
    model: nn.Module,
    targets: Any = "qv",
    *,
    layers: Any = None,
    exclude: Any = None,
    untie: bool = False,
    keep_tied: bool = False,
) -> list[Target]:
    """Find the weights of a model to adapt.

    Parameters
    ----------
    model : Module
        Any module. It is only inspected, so it may be on the meta device.
    targets : str, list or callable
        - roles, such as ``"qv"``, ``"q"`` or ``"qkvo"``: projections of attention modules, whatever their names and
          storage, including rows of a fused weight;
        - ``"all-linear"``: every linear layer except the output head, and every matrix of experts that a module keeps
          stacked in a parameter of three axes; fused weights whole;
        - ``"conv"``: every convolution of any kernel size as a matrix ``(out, in * kh * kw)``, grouped ones as they are
          stored; transposed convolutions are skipped, because the first axis of their weight is not the output;
        - ``"embeddings"``: every ``nn.Embedding``, of tokens, positions or types;
        - any other string: a regular expression for the whole dotted path of a module;
        - a list whose entries are paths, full or their last parts (``"query"``, ``"attention.self.query"``),
          :class:`tnadapt.Target` objects, or ``"path:roles"``, such as ``"blocks.0.attn:qv"`` or ``"attn.qkv:v"``,
          which selects roles of the attention or weight at that path. A path without roles selects a fused weight
          whole;
        - a function of a path and a module, called for every module, that returns True for the whole weight, roles, a
          Target or a list of Targets, or None.
    layers : int, range or list of int, optional
        Only targets in layers of these numbers; negative ones count from the end. A layer's number is the first number
        above the module in its path: 3 in ``model.layers.3.mlp.experts.7.up``. Where a model has several stacks of
        layers, such as an encoder and a decoder, they are counted separately. Targets outside of layers are left out.
    exclude : str, list or callable, optional
        Targets to leave out, in the words of ``targets``. The path of a module, as an entry of a list or matched by a
        regular expression, stands for everything in it: ``["vision_tower"]``.
    untie : bool
        Whether to allow targets whose weight is shared with another module, which :func:`attach` then gives its own
        copy.
    keep_tied : bool
        Whether a target whose weight is shared with other modules updates it in all of them. The target then has its
        first name in the model, and the others as ``tied``.

    Returns
    -------
    list of Target
        In the order of the model's modules, and q before k before v within a module, without duplicates; a module with
        several paths appears under the first. A list of only Targets keeps the caller's order and any duplicates, which
        :func:`attach` rejects.

    Raises
    ------
    TargetError
        If nothing is found, an entry of a list matches nothing, the layout of a fused weight or the shape of a
        quantized weight is unknown, a weight is tied and neither ``untie`` nor ``keep_tied`` is true, or an embedding
        has ``sparse=True`` or a ``max_norm``. If a layer does not exist, or ``exclude`` matches nothing or everything.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> for target in find_targets(model):
    ...     print(target.role, target.name, target.rows)
    q self_attn.in_proj_weight Rows(start=0, length=8, stride=24, count=1)
    v self_attn.in_proj_weight Rows(start=16, length=8, stride=24, count=1)
    >>> [target.module for target in find_targets(model, ["linear1", "self_attn:o"])]
    ['self_attn.out_proj', 'linear1']
    >>> encoder = nn.TransformerEncoder(model, 3, enable_nested_tensor=False)
    >>> [target.module for target in find_targets(encoder, "all-linear", layers=-1, exclude=["self_attn", "linear2"])]
    ['layers.2.linear1']
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"targets are found in a torch module; got {type(model).__name__}")
    untie, keep_tied = flag("untie", untie), flag("keep_tied", keep_tied)
    search = TargetSearch(model)
    found = search.find(targets)
    if not found:
        raise search.nothing(targets)
    if untie and keep_tied:
        raise TargetError("untie=True gives tied weights their own copies, and keep_tied=True keeps them one: give one")
    found = with_tied(model, filtered(search, found, layers, exclude), keep_tied)
    own = not isinstance(targets, str) and not callable(targets) and all(isinstance(entry, Target) for entry in targets)
    # Of given Targets nothing is dropped: each has its place in the vector of all updates.
    chosen = list(found) if own else in_order(search, found)
    check_usable(model, chosen, untie)
    return chosen


def filtered(search: TargetSearch, found: Sequence[Target], layers: Any, exclude: Any) -> list[Target]:
    """Return the targets that ``layers`` and ``exclude`` leave."""
    if layers is not None:
        found = in_layers(search, found, layers)
    return list(found) if exclude is None else without(search, found, exclude)


def in_order(search: TargetSearch, found: Iterable[Target]) -> list[Target]:
    """Return targets in the order of the model's modules, of roles and of their parameters, each once."""
    order = {path: place for place, (path, _) in enumerate(search.places)}
    stored = {(weight.path, weight.parameter, weight.index): place for place, weight in enumerate(search.weights)}
    chosen = {(target.module, target.parameter, target.index, target.rows): target for target in found}.values()

    def place(target: Target) -> tuple[int, ...]:
        among = stored.get((target.module, target.parameter, target.index), len(stored))
        return order[target.module], ROLES.index(target.role), among

    return sorted(chosen, key=place)


def check_usable(model: nn.Module, chosen: Sequence[Target], untie: bool) -> None:
    """Raise a TargetError if a weight is tied, and ``untie`` is false, or is that of an embedding that changes it."""
    places = dict.fromkeys((one.module, one.name) for target in chosen for one in (target, *target.tied_targets()))
    for module, name in places:
        check_embedding(name, model.get_submodule(module))
    shared = [] if untie else tied(model, chosen)
    if shared:
        raise TargetError(
            f"{shared[0][0]} and {shared[0][1]} are one tensor (tied weights), and an update of one would change both: "
            "give keep_tied=True, so that one update acts in both, or untie=True, which gives the second its own copy, "
            "or leave it out of the targets"
        )
