"""What layers of GPTQ and AWQ have in common: packed words, and scales that were chosen by calibration data.

Their packages have one class for each kernel. Some keep the format's words, and some repack them when a model is
loaded, or in the first evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized_layer import QuantizedLayer

__all__ = ["CalibratedLayer", "is_readable"]

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
