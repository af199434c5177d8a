"""Targets for the matrices of MoE experts in a checkpoint, stacked or one tensor each, and the names of such tensors.

Either way they become the targets that the model has in memory, where transformers stacks them. Whether the matrices of
a stack are stored as ``(in, out)`` follows from the shapes of two parameters: the rows of one are the columns of the
other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.errors import TargetError

from .roles import layer_of, natural
from .target import Target

# -- Names of experts' matrices in checkpoints that store each as a tensor of its own ----------------------------------

# In memory, transformers stacks the matrices of a layer's experts in parameters such as ``mlp.experts.gate_up_proj``.
# In most checkpoints each expert has its own ``mlp.experts.3.gate_proj.weight`` and ``up_proj.weight``, or
# ``block_sparse_moe.experts.3.w1.weight`` and ``w3.weight``. The rows of a matrix in memory are those of these tensors,
# one after the other.


#: The tensors that make up a parameter, in each convention.
PARTS = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
#: The module's name in memory and in the checkpoint, if they differ.
MODULES = (("", ""), (".mlp.experts", ".block_sparse_moe.experts"))


def expert_tensors(targets: Sequence[Target]) -> Iterator[list[tuple[Target, ...]]]:
    """Yield, for each convention, the tensors in which targets are stored: several for one expert's gate and up.

    Nothing is yielded if there are no experts, if a target is only some rows of one, or where matrices are stored as
    ``(in, out)``: such models store them as they are in memory.

    Examples
    --------
    >>> up = Target("layers.0.mlp.experts", (8, 12, 4), parameter="gate_up_proj", index=3)
    >>> for (parts,) in expert_tensors([up]):
    ...     print(*(part.name.removeprefix("layers.0.") for part in parts))
    mlp.experts.3.gate_proj.weight mlp.experts.3.up_proj.weight
    mlp.experts.3.w1.weight mlp.experts.3.w3.weight
    block_sparse_moe.experts.3.gate_proj.weight block_sparse_moe.experts.3.up_proj.weight
    block_sparse_moe.experts.3.w1.weight block_sparse_moe.experts.3.w3.weight
    """
    experts = [target for target in targets if target.index is not None]
    if not experts or any(target.rows is not None or target.transposed for target in experts):
        return
    for old, new in MODULES:
        if any(not target.module.endswith(old) for target in experts):
            continue
        for parts in PARTS:
            tensors = [_tensors(target, old, new, parts.get(target.parameter, ())) for target in targets]
            if all(tensors):
                yield tensors


def _tensors(target: Target, old: str, new: str, parts: Sequence[str]) -> tuple[Target, ...]:
    if target.index is None:
        return (target,)
    if not parts or target.out % len(parts):
        return ()
    stored = (target.out // len(parts), target.shape[1])
    module = f"{target.module.removesuffix(old)}{new}.{target.index}"
    whole = dataclasses.replace(target, stored=stored, index=None, parameter="weight")
    return tuple(dataclasses.replace(whole, module=f"{module}.{part}") for part in parts)


# -- The matrices of experts as targets --------------------------------------------------------------------------------


#: Names of parameters that stack matrices, in the order in which modules define them.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_SINGLE = re.compile(r"(.*\bexperts)\.(\d+)\.([a-z0-9_]+)\.weight", re.ASCII)

Shape = tuple[int, ...]


class StoredExpert(NamedTuple):
    """The matrix of one expert as a target, and the tensors that it is stored in."""

    target: Target
    tensors: tuple[str, ...]


def experts_of(
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any] | None = None,
    chosen: Callable[[str, str], bool] = lambda module, parameter: True,
) -> list[StoredExpert]:
    """Return the matrices of experts.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        The name and shape of every stored tensor.
    config : mapping, optional
        The model's ``config.json``, whose ``hidden_size`` tells the axes of stacks without a gate.
    chosen : function of (str, str), optional
        Whether a module's parameter, by their names in memory, is wanted.

    Returns
    -------
    list of StoredExpert
        Module by module, and in each one parameter after the other.

    Raises
    ------
    TargetError
        If it is unclear how the matrices of a wanted stack are stored.

    Examples
    --------
    >>> stacks = {"mlp.experts.gate_up_proj": (2, 8, 12), "mlp.experts.down_proj": (2, 6, 8)}
    >>> [(expert.target.label, expert.target.shape) for expert in experts_of(stacks)][1:3]
    [('mlp.experts.gate_up_proj[1]', (12, 8)), ('mlp.experts.down_proj[0]', (8, 6))]
    >>> single = {f"moe.experts.{i}.{x}_proj.weight": (4, 8) for i in (0, 1) for x in ("gate", "up")}
    >>> [(expert.target.label, expert.tensors[0]) for expert in experts_of(single)]
    [('moe.experts.gate_up_proj[0]', 'moe.experts.0.gate_proj.weight'),
     ('moe.experts.gate_up_proj[1]', 'moe.experts.1.gate_proj.weight')]
    """
    single = [expert for expert in _single(shapes) if chosen(expert.target.module, expert.target.parameter)]
    experts = [*_stacked(shapes, config, chosen), *single]
    return sorted(
        experts,
        key=lambda expert: (
            natural(expert.target.module),
            PARAMETERS.index(expert.target.parameter),
            expert.target.index,
        ),
    )


# -- Stacks ------------------------------------------------------------------------------------------------------


def _stacked(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None, chosen: Callable[[str, str], bool]
) -> list[StoredExpert]:
    of_module: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter in PARAMETERS and len(shape) == 3 and min(shape) > 0 and "experts" in module.rpartition(".")[2]:
            of_module.setdefault(module, {})[parameter] = tuple(shape)
    experts = []
    for module, stacks in of_module.items():
        wanted = {parameter: shape for parameter, shape in stacks.items() if chosen(module, parameter)}
        transposed = bool(wanted) and _is_transposed(module, stacks, config or {})
        for parameter, shape in wanted.items():
            whole = Target(module, shape, "linear", parameter, None, transposed, _layer(module), 0)
            experts += [
                StoredExpert(dataclasses.replace(whole, index=index), (whole.name,)) for index in range(shape[0])
            ]
    return experts


def _is_transposed(module: str, stacks: Mapping[str, Shape], config: Mapping[str, Any]) -> bool:
    down = stacks.get("down_proj")
    first, factor = (stacks["gate_up_proj"], 2) if "gate_up_proj" in stacks else (stacks.get("up_proj"), 1)
    if first is not None and down is not None:
        # (out, in), where the in of one matrix is the out of the other; gate and up together have twice as many rows.
        plain = (first[1], first[2]) == (factor * down[2], down[1])
        turned = (first[2], first[1]) == (factor * down[1], down[2])
        if plain != turned:
            return turned
        hidden = config.get("hidden_size")
        if plain and first[1] != first[2] and hidden in first[1:]:
            return bool(first[1] == hidden)
    raise TargetError(
        f"{module} stacks the matrices of experts in tensors of shapes {list(stacks.values())}, which do not tell "
        "inputs from outputs: build the model and use tnadapt.torch, which reads its classes"
    )


# -- A tensor for each expert ------------------------------------------------------------------------------------


def _single(shapes: Mapping[str, Sequence[int]]) -> list[StoredExpert]:
    of_module: dict[str, dict[str, dict[int, Shape]]] = {}
    for name, shape in shapes.items():
        match = _SINGLE.fullmatch(name)
        if match is not None and len(shape) == 2 and min(shape) > 0:
            by_number = of_module.setdefault(match[1], {}).setdefault(match[3], {})
            by_number[int(match[2])] = tuple(shape)
    return [expert for module, shapes_by_name in of_module.items() for expert in _joined(module, shapes_by_name)]


def _joined(module: str, shapes: Mapping[str, Mapping[int, Shape]]) -> list[StoredExpert]:
    """Return the experts of one module whose tensors have known names, are complete and have the same shape."""
    known: set[str] = set()
    experts = []
    for parts in PARTS:
        for parameter, names in parts.items():
            several = [shapes[name] for name in names if name in shapes]
            if len(several) < len(names) or known.intersection(names):
                continue
            (shape, *others) = {shape for numbered in several for shape in numbered.values()}
            numbers = {frozenset(numbered) for numbered in several}
            count = len(several[0])
            if others or numbers != {frozenset(range(count))}:
                continue
            known.update(names)
            stored = (count, len(names) * shape[0], shape[1])
            whole = Target(_in_memory(module), stored, "linear", parameter, None, False, _layer(module), 0)
            for index in range(count):
                tensors = tuple(f"{module}.{index}.{name}.weight" for name in names)
                experts.append(StoredExpert(dataclasses.replace(whole, index=index), tensors))
    return experts


def _in_memory(module: str) -> str:
    for old, new in MODULES:
        if new and module.endswith(new):
            return module.removesuffix(new) + old
    return module


def _layer(module: str) -> str:
    return layer_of(module.rpartition(".")[0])
