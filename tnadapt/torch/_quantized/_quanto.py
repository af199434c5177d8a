"""Layers of optimum-quanto: int8, int4, int2 and float8 weights, frozen, or requantized in each forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._quantized_layer import QuantizedLayer, is_instance, twin

__all__ = ["QuantoLayer"]


class QuantoLayer(QuantizedLayer):
    """``optimum.quanto.QLinear``, before and after ``freeze``."""

    stored = ("weight",)
    moved = 2.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a QLinear whose weight is quantized."""
        return (
            is_instance(module, "optimum.quanto.nn.qlinear.QLinear")
            and getattr(module, "weight_qtype", None) is not None
        )

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight that the layer computes with: before ``freeze``, its float weight after rounding."""
        weight: Any = module._parameters["weight"]
        if weight.device.type == "meta":
            return None
        anything: Any = module
        with torch.no_grad():
            found: Tensor = anything.qweight.dequantize()
        return found

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the layer's own optimizer of scales; a layer that is not frozen keeps a float weight."""
        held: Any = module._parameters["weight"]
        other = twin(module)
        frozen = other.frozen
        new = nn.Parameter(weight.to(held.dtype), requires_grad=held.requires_grad and not frozen)
        if not frozen:
            return {"weight": new}
        other._parameters["weight"] = new
        with torch.no_grad():
            return {"weight": nn.Parameter(other.qweight, requires_grad=False)}
