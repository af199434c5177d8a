"""Layers of AWQ: 4-bit codes along the output features, eight to a word in interleaved order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._integer_codes import unpacked
from ._quantized_layer import QuantizedLayer

__all__ = ["AWQLayer"]

# Which of a word's eight output features is in which place, from the lowest bits on.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQLayer(QuantizedLayer):
    """The linear layers of AutoAWQ and of GPTQModel for AWQ in the GEMM layout, recognized by what they hold.

    ``qweight`` is ``(cols, rows / 8)``, ``qzeros`` ``(groups, rows / 8)`` and ``scales`` ``(groups, rows)``. The weight
    is ``(codes - zeros) * scales``. Layouts of other kernels (GEMV, Marlin, ExLlama) have other shapes: their layers
    are adapted, and their weights are not read.
    """

    moved = 100.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it has the tensors of this format, and no groups by index, which GPTQ has."""
        held = module._buffers.keys() | module._parameters.keys()
        return held >= {"qweight", "qzeros", "scales"} and "g_idx" not in held and _bits(module) is not None

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in the dtype of the scales; None for another layout."""
        layer: Any = module
        rows, cols = self.shape(module)
        groups = layer.scales.shape[0]
        expected = (cols, rows // 8), (groups, rows // 8), (groups, rows)
        found = tuple(tuple(tensor.shape) for tensor in (layer.qweight, layer.qzeros, layer.scales))
        if layer.qweight.device.type == "meta" or layer.qweight.dtype is not torch.int32 or _bits(module) != 4:
            return None
        if found != expected or _own_layout(layer):
            return None
        codes, zeros = (_in_order(unpacked(words, 4, rows, axis=1)) for words in (layer.qweight, layer.qzeros))
        size = cols // groups
        scales, zeros = (tensor.repeat_interleave(size, 0) for tensor in (layer.scales, zeros))
        return ((codes - zeros).to(scales.dtype) * scales).T.contiguous()

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Raise a TargetError: the scales come from calibration data."""
        raise TargetError(
            f"{type(module).__name__} is quantized by AWQ, which chose its scales by calibration data: rounding W + ΔW "
            "to them would undo that. Keep the adapter attached, or merge into the unquantized model and quantize that"
        )


def _bits(module: Any) -> int | None:
    found = getattr(module, "w_bit", getattr(module, "bits", None))
    return found if isinstance(found, int) else None


def _in_order(codes: Tensor) -> Tensor:
    return codes.view(len(codes), -1, 8)[:, :, list(_PLACES)].reshape(codes.shape)


def _own_layout(layer: Any) -> bool:
    name = type(layer).__name__.lower()
    return any(own in name for own in ("gemv", "marlin", "exllama", "machete", "bitblas", "swordfish"))
