"""What an array was when something was computed from it, to be compared with what it is now."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._delta import version
from ._sharding import is_sharded

__all__ = ["Snapshot", "on_host"]


_UNSHARDED = (Tensor, torch.nn.Parameter)


def on_host(array: Tensor) -> bool:
    """Return whether the contents of an array can be read without waiting for a device."""
    return array.device.type == "cpu"


class Snapshot(NamedTuple):
    """An array at one moment.

    On the CPU this is a copy, which is compared by content: ``param.data.copy_()``, ``param.numpy()[...] = ...`` and
    writes through DLPack change no version counter. Elsewhere a comparison would make the CPU wait for the device, and
    is forbidden while a CUDA graph is captured. There, it is the memory and its version counter, which every operation
    of torch in place changes; the writes above are not seen.

    Attributes
    ----------
    array : Tensor
        A copy, or the same memory. It keeps the memory alive, so that no other array can be allocated at its address.
    version : int, optional
        The version counter; None for a copy.

    Examples
    --------
    >>> array = torch.ones(3)
    >>> before = Snapshot.of(array)
    >>> array.data[1] = 2.0
    >>> before.is_of(array)
    False
    """

    array: Tensor
    version: int | None = None

    @classmethod
    def of(cls, array: Tensor) -> Snapshot:
        """Take a snapshot of an array; not of an inference tensor on a device, which has no version counter."""
        with torch.no_grad():
            if on_host(array):
                return cls(array.detach().clone())
            # The version first: what is written after this line makes the snapshot an old one.
            written = _versions(array)
            return cls(array.detach(), written)

    def is_of(self, array: Tensor) -> bool:
        """Return whether an array is still what it was."""
        own = self.array
        if self.version is None and type(array) in _UNSHARDED and type(own) in _UNSHARDED:
            # The same comparisons in less time: a layer may have a dozen arrays.
            return array.is_cpu and array.dtype == own.dtype and torch.equal(array, own)
        if array.device != own.device or array.dtype != own.dtype or array.shape != own.shape:
            return False
        if is_sharded(array) != is_sharded(own):
            return False  # sharded meanwhile: sharded and ordinary tensors cannot be compared
        if self.version is None:
            return torch.equal(array, own)
        return _versions(array) == self.version and _memory(array) == _memory(own)


def _local(array: Tensor) -> Tensor:
    """Return the part of an array in the memory of this process."""
    return array._local_tensor if is_sharded(array) else array  # type: ignore[attr-defined]


def _versions(array: Tensor) -> int:
    # Each process can write to its shard as well as to the whole.
    return version(array) + version(_local(array))


def _memory(array: Tensor) -> tuple[Any, ...]:
    local = _local(array)
    # The identity of the storage, since the address is zero where there is no memory.
    return local.untyped_storage()._cdata, local.storage_offset(), local.stride()
