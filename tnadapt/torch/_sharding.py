"""Models that are distributed over processes (FSDP2, DDP)."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._transaction import all_or_none

__all__ = ["copy_all", "distribute", "gather_full", "is_sharded", "refuse_reentrant", "reshard"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it only (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the tensor as one process would have it; every process must call."""
    return cast(Tensor, tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """Distribute a full tensor, equal on all processes, over them as another one is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def copy_all(pairs: Sequence[tuple[Tensor, Any]]) -> None:
    """Copy whole arrays, equal on all processes, into tensors: into all, or none if that fails or is interrupted."""
    # Whatever cannot be converted is found before the first write.
    sources = [torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device) for tensor, array in pairs]
    with torch.no_grad():
        new = [(tensor, distribute(source, tensor)) for (tensor, _), source in zip(pairs, sources, strict=True)]
        old = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        all_or_none(lambda tensor, value: tensor.copy_(value), new, old)


def reshard(*models: nn.Module) -> None:
    """Let the shards be these modules' parameters: what is written into gathered ones is dropped at the next pass.

    FSDP2 keeps its outermost module gathered after a forward pass. That module manages the parameters of everything
    below it, so it may be one that contains the given ones.
    """
    inside = {module: None for model in models for module in model.modules()}
    for module in [*inside, *_sharded_around(inside)]:
        again = getattr(module, "reshard", None)
        if callable(again) and hasattr(module, "unshard"):
            again()


def _sharded_around(inside: Collection[nn.Module]) -> list[nn.Module]:
    """The modules that torch shards and that contain some of these."""
    # Nothing leads from a module to what contains it. torch lists the sharded ones in private; it has sharded none if
    # it has not imported the list, and a version without the list leaves us with what lies inside.
    known: Any = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", ())
    return [
        outer for outer in list(known) if outer not in inside and any(module in inside for module in outer.modules())
    ]


def refuse_reentrant(name: str) -> None:
    """An error where DistributedDataParallel would give wrong gradients without a word.

    Reentrant checkpointing runs a backward pass of its own for each region. DistributedDataParallel takes the first
    of them for the whole gradient of an array that several regions share, unless it was told that its graph is static.
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
