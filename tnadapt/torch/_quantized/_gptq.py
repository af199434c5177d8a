"""Layers of GPTQ: integer codes along the input features, with scales and zeros of groups of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._calibrated_layer import CalibratedLayer, is_readable
from ._integer_codes import planar, unpacked
from ._quantized_layer import is_instance

__all__ = ["GPTQEmbedding", "GPTQLayer"]

_EMBEDDING = "gptqmodel.nn_modules.qlinear.torch.TorchQuantEmbeddings"


class GPTQLayer(CalibratedLayer):
    """The linear layers of AutoGPTQ and GPTQModel, recognized by what they hold.

    ``qweight`` has codes of ``bits`` bits in int32 words along the input features, ``qzeros`` the zero points along the
    output features, and ``g_idx`` the group of each input feature. The weight is ``scales[g] * (codes - zeros[g])``. In
    AutoGPTQ's format, "gptq", zeros are stored less one; in "gptq_v2" as they are. In GPTQModel's "gptq_p", and for 5,
    6 and 7 bits in any format, words hold parts of codes (:func:`planar`).
    """

    method = "GPTQ"
    chosen = "codes"

    def matches(self, module: nn.Module) -> bool:
        """Return whether it has the tensors of this format, whatever its class is called."""
        return _holds_gptq(module) and not is_instance(module, _EMBEDDING)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return output and input features, from the scales and the groups."""
        anything: Any = module
        return int(anything.scales.shape[1]), int(anything.g_idx.shape[0])

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in the dtype of the scales; None if a kernel has put the codes into its own order."""
        layer: Any = module
        if not is_readable(module):
            return None
        rows, cols = int(layer.scales.shape[1]), int(layer.g_idx.shape[0])
        if tuple(layer.qweight.shape) != (-(-cols * layer.bits // 32), rows):
            return None
        unpack = planar if getattr(layer, "planar", False) else unpacked
        codes = unpack(layer.qweight, layer.bits, cols, axis=0)
        zeros = unpack(layer.qzeros, layer.bits, rows, axis=1)
        zeros = zeros + 1 if _less_one(layer) else zeros
        group = layer.g_idx.long()
        scales: Tensor = layer.scales[group]
        return ((codes - zeros[group]).to(scales.dtype) * scales).T.contiguous()


class GPTQEmbedding(GPTQLayer):
    """GPTQModel's quantized embedding: its vectors are numbered as the input features of a linear layer are."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a TorchQuantEmbeddings."""
        return is_instance(module, _EMBEDDING) and _holds_gptq(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of vectors and their size."""
        size, count = super().shape(module)
        return count, size

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the table of vectors in the dtype of the scales."""
        found = super().dequantize(module)
        return None if found is None else found.T.contiguous()

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True


def _holds_gptq(module: nn.Module) -> bool:
    held = module._buffers.keys() | module._parameters.keys()
    return held >= {"qweight", "qzeros", "scales", "g_idx"} and isinstance(getattr(module, "bits", None), int)


def _less_one(layer: Any) -> bool:
    """Return whether the layer's forward adds one to the zeros that it holds.

    GPTQModel's kernels with REQUIRES_FORMAT_V2 take them as they are. Their zeros are converted when a "gptq" model is
    loaded; those of a "gptq_v2" model need no conversion, and ``qzero_format()`` goes on saying 1.
    """
    own = getattr(layer, "REQUIRES_FORMAT_V2", None)
    method = getattr(layer, "qzero_format", None)
    return own is not True and (method is None or method() == 1)
