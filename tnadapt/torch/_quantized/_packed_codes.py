"""Small integers that are packed into words of 32 bits, as GPTQ and AWQ store codes and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized_layer import QuantizedLayer, is_instance, twin

__all__ = [
    "AWQLayer",
    "CalibratedLayer",
    "GPTQEmbedding",
    "GPTQLayer",
    "HQQLayer",
    "crossing",
    "is_readable",
    "planar",
    "unpacked",
]


# -- Small integers that are packed into words of 32 bits, as GPTQ and AWQ store codes and zero points -----------------


def unpacked(words: Tensor, bits: int, count: int, axis: int) -> Tensor:
    """Return the integers that words hold along an axis, the lowest bits of the first word first.

    Parameters
    ----------
    words : Tensor, int32, 2-D
    bits : int
        Width of each integer; it may cross from one word to the next, as 3 bits do.
    count : int
        Number of integers along the axis; the rest is padding.
    axis : int

    Returns
    -------
    Tensor, int32

    Examples
    --------
    >>> unpacked(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8, axis=1)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    """
    words = words.movedim(axis, -1)
    found = _aligned(words, bits, count) if 32 % bits == 0 else crossing(words, bits, count)
    return found.movedim(-1, axis)


def planar(words: Tensor, bits: int, count: int, axis: int) -> Tensor:
    """Return the integers that words hold along an axis in planes: each 32 integers are in ``bits`` words.

    First come the words of the lowest bits of all 32, then those of the next. The widths of these planes are the powers
    of two that make up ``bits``, the largest first: 4, 2 and 1 for 7 bits. None crosses from one word to the next.

    Parameters
    ----------
    words : Tensor, int32, 2-D
    bits : int
    count : int
        Number of integers along the axis; the rest is padding.
    axis : int

    Returns
    -------
    Tensor, int32

    Examples
    --------
    >>> low, high = [0xC, 0], [0x1]  # 2 bits each of the first 16 and the last, and the third bit of all
    >>> planar(torch.tensor([low + high], dtype=torch.int32), 3, 4, axis=1)
    tensor([[4, 3, 0, 0]], dtype=torch.int32)
    """
    words = words.movedim(axis, -1)
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    found = torch.zeros(*blocks.shape[:-1], 32, dtype=torch.int32, device=words.device)
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found |= _aligned(blocks[..., low : low + width], width, 32) << low
            low += width
    return found.flatten(-2)[..., :count].movedim(-1, axis)


def _aligned(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers along the last axis, where each is in one word."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    # The shift fills with the sign, which the mask cuts off.
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]


def crossing(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers along the last axis, which may begin in one word and end in the next."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    place, shift = first // 32, first % 32
    # The word behind the last one is only read with a shift that leaves nothing of it.
    low = words[..., place] >> shift
    high = words[..., (place + 1).clamp_max(words.shape[-1] - 1)] << (32 - shift)
    return ((low | high) & ((1 << bits) - 1)).to(torch.int32)


# -- What layers of GPTQ and AWQ have in common: packed words, and scales that were chosen by calibration data ---------

# Their packages have one class for each kernel. Some keep the format's words, and some repack them when a model is
# loaded, or in the first evaluation.


# Names of classes that put the words into a kernel's own order, or that rotate their input first.
_OWN_LAYOUT = ("bitblas", "exllama", "gemv", "machete", "marlin", "mlx", "paro", "qqq", "swordfish")


class CalibratedLayer(QuantizedLayer):
    """A layer with ``qweight``, ``qzeros`` and ``scales``.

    Attributes
    ----------
    method : str
        The name of the method, for messages.
    chosen : str
        What the method chose by calibration data, for messages.
    """

    method = ""
    chosen = ""
    moved = 100.0

    def passes_gradient(self, module: nn.Module) -> bool:
        """Return False for GPTQModel's layers that were repacked for inference, or that also round their input."""
        return getattr(module, "linear_mode", None) != "inference" and "w4a" not in _names(module)

    def while_attached(self, module: nn.Module) -> Mapping[str, Any]:
        """Keep the words as they are in evaluation.

        Some of GPTQModel's layers for CPUs decide in their first call: in evaluation they repack their words for good,
        for a kernel without a backward. They do not once they have been called in training.
        """
        undecided = module.__dict__.get("linear_mode", "") is None
        return {"linear_mode": "train"} if undecided else {}

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Raise a TargetError: codes or scales come from calibration data."""
        raise TargetError(
            f"{type(module).__name__} is quantized by {self.method}, which chose its {self.chosen} by calibration "
            "data: rounding W + ΔW to them would undo that. Keep the adapter attached, or merge into the unquantized "
            "model and quantize that"
        )


def is_readable(module: nn.Module) -> bool:
    """Return whether a layer keeps the words of its format, and multiplies its input as it is with their numbers."""
    layer: Any = module
    if layer.qweight is None or layer.qweight.device.type == "meta" or layer.qweight.dtype is not torch.int32:
        return False
    # SpinQuant's and QuaRot's layers rotate their input.
    rotates = getattr(layer, "online_full_had", False) or getattr(layer, "online_partial_had", False)
    return not rotates and not any(own in _names(module) for own in _OWN_LAYOUT)


def _names(module: nn.Module) -> str:
    # AutoGPTQ calls each of its classes QuantLinear, and names the module for the kernel.
    return " ".join([*(cls.__name__ for cls in type(module).__mro__), type(module).__module__]).lower()


# -- Layers of AWQ: codes along the output features, those of 4 bits eight to a word in interleaved order --------------


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


# -- Layers of GPTQ: integer codes along the input features, with scales and zeros of groups of them -------------------


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


# -- Layers of HQQ: packed codes of 1 to 8 bits, with scales and zeros of groups ---------------------------------------


class HQQLayer(QuantizedLayer):
    """``hqq.core.quantize.HQQLinear``."""

    stored = ("W_q", "meta")
    moved = 4.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is an HQQLinear that has been quantized or loaded."""
        return is_instance(module, "hqq.core.quantize.HQQLinear") and bool(getattr(module, "ready", False))

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return the shape that was quantized."""
        rows, cols = module.meta["shape"]  # type: ignore[index]
        return int(rows), int(cols)

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in the layer's dtype."""
        other = twin(module)
        # The library completes this dictionary for a moment.
        other.meta = dict(other.meta)
        if other.W_q.device.type == "meta":
            return None
        with torch.no_grad():
            found: Tensor = other.dequantize()
        return found

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the layer's own ``quantize`` and settings, which fit scales and zeros."""
        other = twin(module)
        if not other.quant_config:
            raise TargetError(
                "this HQQLinear was loaded without its quant_config, so that it cannot be quantized again: keep the "
                "adapter attached, or set quant_config on the layer"
            )
        before = other.W_q
        for holder in (other._parameters, other._buffers, other.__dict__):
            holder.pop("W_q", None)
        with torch.no_grad():
            other.quantize(weight, **dict(other.quant_config))
        if other.W_q.shape != before.shape or other.W_q.dtype != before.dtype:
            raise TargetError(
                f"HQQ quantized the merged weight to codes of shape {tuple(other.W_q.shape)}, and the layer has "
                f"{tuple(before.shape)}: its quant_config is not that of its codes"
            )
        return {"W_q": other.W_q, "meta": other.meta}
