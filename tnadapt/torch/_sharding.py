"""Support for models that are distributed over processes (FSDP2, DDP)."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._transaction import all_or_none

__all__ = ["copy_all", "distribute", "gather_full", "is_sharded", "refuse_reentrant", "reshard"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only a part of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call."""
    return cast(Tensor, tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """Distribute a full tensor, equal on all processes, in the same way as ``like``."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def copy_all(pairs: Sequence[tuple[Tensor, Any]]) -> None:
    """Copy whole arrays, equal on all processes, into tensors: all of them, or none on failure or interruption."""
    # Convert everything before the first write, so that bad input changes nothing.
    sources = [torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device) for tensor, array in pairs]
    with torch.no_grad():
        new = [(tensor, distribute(source, tensor)) for (tensor, _), source in zip(pairs, sources, strict=True)]
        old = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        all_or_none(lambda tensor, value: tensor.copy_(value), new, old)


def reshard(*models: nn.Module) -> None:
    """Make the shards the modules' parameters again, before they are written to.

    FSDP2 keeps its outermost module gathered after a forward pass, and drops what is written into gathered parameters
    at the next pass. That module manages all parameters below it, so it may be one that contains the given modules.
    """
    inside = {module: None for model in models for module in model.modules()}
    for module in [*inside, *_sharded_around(inside)]:
        again = getattr(module, "reshard", None)
        if callable(again) and hasattr(module, "unshard"):
            again()


def _sharded_around(inside: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules sharded by torch that contain any of these."""
    # A module has no reference to its parents, but torch keeps a private list of sharded modules. If the list is not
    # imported, nothing is sharded; with a version of torch that has no such list, only the given modules are resharded.
    known: Any = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", ())
    return [
        outer for outer in list(known) if outer not in inside and any(module in inside for module in outer.modules())
    ]


def refuse_reentrant(name: str) -> None:
    """Raise a RuntimeError where DistributedDataParallel would silently compute wrong gradients.

    Reentrant checkpointing runs a separate backward pass for each region. DistributedDataParallel takes the first one
    for the complete gradient of an array that several regions share, unless it was told that the graph is static.
    """
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.nn.parallel import DistributedDataParallel

    active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None and not getattr(active, "static_graph", False):
        raise RuntimeError(
            "a part of the model runs without gradients inside a training pass of DistributedDataParallel, as "
            f"reentrant checkpointing does, and adapter {name!r} is shared by several parts: its gradients would be "
            "wrong. Use checkpointing with use_reentrant=False, or DistributedDataParallel(…, static_graph=True)"
        )
