"""Layers of HQQ: packed codes of 1 to 8 bits, with scales and zeros of groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized_layer import QuantizedLayer, is_instance, twin

__all__ = ["HQQLayer"]


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
