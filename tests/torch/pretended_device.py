"""CPU tensors that pass for tensors on an accelerator, on which it is an error to wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: No such device is there, and no library has kernels for it.
DEVICE = torch.device("xpu")

_WAITS = {
    torch.equal, torch.nonzero, torch.is_nonzero, torch.masked_select, torch.unique, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.equal,
    Tensor.nonzero, Tensor.is_nonzero, Tensor.masked_select, Tensor.unique, Tensor.cuda,
}  # fmt: skip
_COPIES = (torch.tensor, torch.as_tensor)


class PretendedDevice(TorchFunctionMode):
    """Say that every tensor is on the device; raise a RuntimeError for what waits for it, or copies numbers to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func in _WAITS or (func in _COPIES and not isinstance(args[0], Tensor)):
            raise RuntimeError(f"{func.__name__} waits for the device")
        return func(*(_there(a) for a in args), **{name: _there(a) for name, a in kwargs.items()})


def _there(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
