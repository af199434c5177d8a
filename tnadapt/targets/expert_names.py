"""Names of experts' matrices in checkpoints that store each of them as a tensor of its own.

In memory, transformers stacks the matrices of a layer's experts in parameters such as ``mlp.experts.gate_up_proj``.
In most checkpoints each expert has its own ``mlp.experts.3.gate_proj.weight`` and ``up_proj.weight``, or
``block_sparse_moe.experts.3.w1.weight`` and ``w3.weight``. The rows of a matrix in memory are those of these tensors,
one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from .target import Target

__all__ = ["MODULES", "PARTS", "expert_tensors"]

#: The tensors of which a parameter consists, in each convention.
PARTS = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
#: The module's name in memory and in the checkpoint, where it is not the same.
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
            found = [_tensors(target, old, new, parts.get(target.parameter, ())) for target in targets]
            if all(found):
                yield found


def _tensors(target: Target, old: str, new: str, parts: Sequence[str]) -> tuple[Target, ...]:
    if target.index is None:
        return (target,)
    if not parts or target.out % len(parts):
        return ()
    stored = (target.out // len(parts), target.shape[1])
    module = f"{target.module.removesuffix(old)}{new}.{target.index}"
    whole = dataclasses.replace(target, stored=stored, index=None, parameter="weight")
    return tuple(dataclasses.replace(whole, module=f"{module}.{part}") for part in parts)
