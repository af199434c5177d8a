"""Layers of GPTQ: integer codes along the input features, with scales and zeros of groups of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._integer_codes import unpacked
from ._quantized_layer import QuantizedLayer

__all__ = ["GPTQLayer"]

# Classes whose codes are in a kernel's own order.
_OWN_ORDER = ("marlin", "machete", "bitblas", "swordfish", "qqq", "exllama")


class GPTQLayer(QuantizedLayer):
    """The linear layers of AutoGPTQ and GPTQModel, recognized by what they hold.

    ``qweight`` has codes of ``bits`` bits in int32 words along the input features, ``qzeros`` the zero points along the
    output features, and ``g_idx`` the group of each input feature. The weight is ``scales[g] * (codes - zeros[g])``. In
    AutoGPTQ's format, "gptq", zeros are stored less one; in "gptq_v2" as they are. GPTQModel converts the first into
    the second when it loads a model, and says which it is by ``qzero_format()``.
    """

    moved = 100.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it has the tensors of this format, whatever its class is called."""
        held = module._buffers.keys() | module._parameters.keys()
        return held >= {"qweight", "qzeros", "scales", "g_idx"} and isinstance(getattr(module, "bits", None), int)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return output and input features, from the scales and the groups."""
        anything: Any = module
        return int(anything.scales.shape[1]), int(anything.g_idx.shape[0])

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in the dtype of the scales; None if a kernel has put the codes into its own order."""
        layer: Any = module
        rows, cols = self.shape(module)
        words = -(-cols * layer.bits // 32)
        if layer.qweight.device.type == "meta" or layer.qweight.dtype is not torch.int32 or _reordered(layer):
            return None
        if tuple(layer.qweight.shape) != (words, rows) or getattr(layer, "planar", False):
            return None
        codes = unpacked(layer.qweight, layer.bits, cols, axis=0)
        zeros = unpacked(layer.qzeros, layer.bits, rows, axis=1)
        zeros = zeros + 1 if _less_one(layer) else zeros
        group = layer.g_idx.long()
        scales: Tensor = layer.scales[group]
        return ((codes - zeros[group]).to(scales.dtype) * scales).T.contiguous()

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Raise a TargetError: the codes come from calibration data."""
        raise TargetError(
            f"{type(module).__name__} is quantized by GPTQ, which chose its codes by calibration data: rounding W + ΔW "
            "to them would undo that. Keep the adapter attached, or merge into the unquantized model and quantize that"
        )


def _less_one(layer: Any) -> bool:
    method = getattr(layer, "qzero_format", None)
    return method is None or method() == 1


def _reordered(layer: Any) -> bool:
    # AutoGPTQ calls each of them QuantLinear, and names the module for the kernel.
    names = " ".join([*(cls.__name__ for cls in type(layer).__mro__), type(layer).__module__]).lower()
    return any(own in names for own in _OWN_ORDER)
