"""Layers of AWQ: codes along the output features, those of 4 bits eight to a word in interleaved order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._calibrated_layer import CalibratedLayer, is_readable
from ._integer_codes import unpacked

__all__ = ["AWQLayer"]

# Which of a word's eight output features is in which place, from the lowest bits on.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQLayer(CalibratedLayer):
    """The linear layers of AutoAWQ and of GPTQModel for AWQ in the GEMM layout, recognized by what they hold.

    ``qweight`` is ``(cols, rows * bits / 32)``, ``qzeros`` ``(groups, rows * bits / 32)`` and ``scales`` ``(groups,
    rows)``. The weight is ``(codes - zeros) * scales``. Codes of other than 4 bits, which GPTQModel has, are in order,
    and may cross from one word to the next. Layouts of other kernels (GEMV, Marlin, ExLlama) have other shapes: their
    layers are adapted, and their weights are not read.
    """

    method = "AWQ"
    chosen = "scales"

    def matches(self, module: nn.Module) -> bool:
        """Return whether it has the tensors of this format, and no groups by index, which GPTQ has."""
        held = module._buffers.keys() | module._parameters.keys()
        return held >= {"qweight", "qzeros", "scales"} and "g_idx" not in held and _bits(module) is not None

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in the dtype of the scales; None for another layout."""
        layer: Any = module
        bits = _bits(module)
        if bits is None or not is_readable(module):
            return None
        rows, cols = self.shape(module)
        groups, words = layer.scales.shape[0], -(-rows * bits // 32)
        expected = (cols, words), (groups, words), (groups, rows)
        found = tuple(tuple(tensor.shape) for tensor in (layer.qweight, layer.qzeros, layer.scales))
        if found != expected or cols % groups or (bits == 4 and rows % 8):
            return None
        codes, zeros = (_in_order(unpacked(held, bits, rows, axis=1), bits) for held in (layer.qweight, layer.qzeros))
        size = cols // groups
        scales, zeros = (tensor.repeat_interleave(size, 0) for tensor in (layer.scales, zeros))
        return ((codes - zeros).to(scales.dtype) * scales).T.contiguous()


def _bits(module: Any) -> int | None:
    found = getattr(module, "w_bit", getattr(module, "bits", None))
    return found if isinstance(found, int) else None


def _in_order(codes: Tensor, bits: int) -> Tensor:
    return codes if bits != 4 else codes.view(len(codes), -1, 8)[:, :, list(_PLACES)].reshape(codes.shape)
