"""Quantized embeddings with a forward of their own: those of bitsandbytes, and torchao's after training for 4 bits.

Embeddings after ``torchao.quantization.quantize_`` are torch's own, with a tensor of torchao's
(:class:`~._torchao.TorchAOLayer`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._bitsandbytes import FourBitLayer, Int8Layer
from ._quantized_layer import QuantizedLayer, is_instance, rows_of

__all__ = ["FourBitEmbedding", "Int4Embedding", "Int8Embedding"]


class FourBitEmbedding(FourBitLayer):
    """``bitsandbytes.nn.Embedding4bit``, and its subclasses for nf4 and fp4."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is an Embedding4bit."""
        return is_instance(module, "bitsandbytes.nn.modules.Embedding4bit")

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True


class Int8Embedding(Int8Layer):
    """``bitsandbytes.nn.Embedding8bit``."""

    stored = ("weight",)

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is an Embedding8bit."""
        return is_instance(module, "bitsandbytes.nn.modules.Embedding8bit")

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True


class Int4Embedding(QuantizedLayer):
    """``Int4WeightOnlyEmbedding``, which torchao's ``Int4WeightOnlyEmbeddingQATQuantizer`` leaves after training."""

    stored = ("weight", "scale", "zero_point")
    moved = 2.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is an Int4WeightOnlyEmbedding."""
        return is_instance(module, "torchao.quantization.qat.embedding.Int4WeightOnlyEmbedding")

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return what the module's own forward returns for all indices."""
        layer: Any = module
        if layer.weight.device.type == "meta":
            return None
        with torch.no_grad():
            found: Tensor = type(layer).forward(layer, torch.arange(layer.num_embeddings, device=layer.weight.device))
        return found

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the functions of torchao that its quantizer calls, with the layer's group size and dtypes."""
        layer: Any = module
        utils = importlib.import_module("torchao.quantization.utils")
        operations = importlib.import_module("torchao._executorch_ops")
        low, high = -(1 << (layer.bit_width - 1)), (1 << (layer.bit_width - 1)) - 1
        weight = weight.to(layer.output_dtype)
        scale, zero = utils.get_group_qparams_symmetric(
            weight, layer.bit_width, layer.group_size, precision=layer.scale_precision
        )
        zero = zero.to(layer.zero_point_precision)
        quantize = operations._quantized_decomposed_quantize_per_channel_group_wrapper
        codes = quantize(weight, scale, zero, low, high, torch.int8, layer.group_size)
        return {"weight": codes, "scale": scale.to(layer.scale_precision), "zero_point": zero}

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Keep codes, scales and zero points, which are row by row."""
        return {name: rows_of(changed, state[name], own) for name, own in self.state(module).items()}
