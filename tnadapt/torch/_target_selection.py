"""Which weights an adapter updates: by role, by kind, by name, or by the caller's own function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.target import ROLES, Target

from ._hosts import host_of, paths_of, reads_outside
from ._target_search import TargetSearch
from ._weights import check_embedding, join, modules_of

__all__ = ["find_targets", "host_of", "paths_of", "reads_outside", "tied"]


def find_targets(model: nn.Module, targets: Any = "qv", *, untie: bool = False) -> list[Target]:
    """The weights of a model that are to be adapted.

    Parameters
    ----------
    model : Module
        Any. It is only looked at; it may lie on the meta device.
    targets : str, list or callable
        - roles, such as ``"qv"``, ``"q"`` or ``"qkvo"``: projections of attention modules, under whatever name and in
          whatever form, also as some rows of a fused weight;
        - ``"all-linear"``: every linear layer but the output head; fused weights whole;
        - ``"conv"``: every convolution of any kernel as a matrix ``(out, in * kh * kw)``, grouped ones as they are
          stored; transposed convolutions are left out, as their weights do not start with the output;
        - any other string: a regular expression for the whole dotted path of a module;
        - a list of paths, whole or their last parts (``"query"``, ``"attention.self.query"``), of
          :class:`tnadapt.Target`, or of ``"path:roles"``, such as ``"blocks.0.attn:qv"`` or ``"attn.qkv:v"``, which
          takes the roles of the attention or weight of that path; a plain path takes a fused weight whole, and an
          ``nn.Embedding``, which nothing else finds (its whole update is formed in each forward pass);
        - a function of a path and a module, called with every module, that gives True for its whole weight, roles, a
          Target or a list of them, or nothing.
    untie : bool
        Whether to allow targets whose weight another module has as well: see :func:`tied`.

    Returns
    -------
    list of Target
        In the order of the model's modules, q before k before v within one; Targets that are all the caller's own in
        the caller's order, repeated ones too, which :func:`attach` refuses. Else none twice: a module with several
        paths counts once, under the first.

    Raises
    ------
    TargetError
        If nothing is found, an entry of a list matches nothing, the layout of a fused weight is not known, the shape
        of a quantised weight is not known, a weight is tied and ``untie`` is false, or an embedding has ``sparse=True``
        or a ``max_norm``.

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
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"targets are found in a torch module; got {type(model).__name__}")
    search = TargetSearch(model)
    found = search.find(targets)
    if not found:
        raise search.nothing(targets)
    own = not isinstance(targets, str) and not callable(targets) and all(isinstance(entry, Target) for entry in targets)
    if own:
        # Never fewer than were given: the caller has a place for each in the long vector.
        chosen = list(found)
    else:
        chosen = list({(target.module, target.parameter, target.rows): target for target in found}.values())
        order = {path: place for place, (path, _) in enumerate(modules_of(model))}
        chosen.sort(key=lambda target: (order[target.module], ROLES.index(target.role)))
    for target in chosen:
        check_embedding(target.name, model.get_submodule(target.module))
    shared = [] if untie else tied(model, chosen)
    if shared:
        raise TargetError(
            f"{shared[0][0]} and {shared[0][1]} are one tensor (tied weights), and an update of one would change both; "
            "leave it out of the targets, or untie=True, which gives the second a copy of its own"
        )
    return chosen


def tied(model: nn.Module, targets: Iterable[Target]) -> list[tuple[str, str]]:
    """Pairs of names that are one tensor, of which at least one is a target's.

    Parameters
    ----------
    model : Module
    targets : iterable of Target

    Returns
    -------
    list of (str, str)
        Dotted paths of parameters. Of several that are one, the first in the model's order stands first in each pair.

    Notes
    -----
    One module under two paths is not meant: it is one, and has one update.

    Examples
    --------
    >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    >>> model["head"].weight = model["embed"].weight
    >>> tied(model, [Target("head", (5, 4))])
    [('embed.weight', 'head.weight')]
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for path, module in modules_of(model):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(_place(tensor), []).append(join(path, name))
    wanted = {target.name for target in targets}
    return [(same[0], other) for same in names.values() if not wanted.isdisjoint(same) for other in same[1:]]


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: two parameters there are one, even as different objects."""
    if nn.parameter.is_lazy(tensor):
        return (id(tensor),)
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        pointer = 0  # a subclass without storage
    if pointer == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return tensor.device, pointer, tuple(tensor.shape)
