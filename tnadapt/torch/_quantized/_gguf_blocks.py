"""Layers of transformers whose weights stay in the blocks of a GGUF file.

transformers 5.24 makes them of some architectures where there is a kernel for the device, and numbers elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized_layer import QuantizedLayer, is_instance, rows_of

__all__ = ["GgufEmbedding", "GgufLayer"]

_MODULE = "transformers.integrations.gguf"


class GgufLayer(QuantizedLayer):
    """``GgufLinear`` of transformers."""

    stored = ("weight",)
    moved = 4.0
    _own = f"{_MODULE}.utils.GgufLinear"

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a layer of this type."""
        return is_instance(module, self._own)

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight in float32, for the input as it comes: some layers permute it first."""
        layer: Any = module
        if layer.weight.device.type == "meta":
            return None
        rows, cols = self.shape(module)
        kernels = importlib.import_module(f"{_MODULE}.kernels")
        with torch.no_grad():
            found: Tensor = kernels.dequantize_blocks(layer.weight, layer.ggml_type, rows, cols, torch.float32)
        order = getattr(layer, "input_permutation", None)
        return found if order is None else torch.empty_like(found).index_copy_(1, order, found)

    def passes_gradient(self, module: nn.Module) -> bool:
        """Return False: kernels for few tokens have no backward."""
        return self.looks_up(module)

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the package gguf, which knows how for some types of blocks."""
        layer: Any = module
        order = getattr(layer, "input_permutation", None)
        weight = weight if order is None else weight.index_select(1, order)
        try:
            gguf: Any = importlib.import_module("gguf")
            kind = gguf.GGMLQuantizationType(layer.ggml_type)
            blocks = gguf.quants.quantize(weight.float().cpu().numpy(), kind)
        except ImportError:
            raise TargetError(
                "merging into GGUF's blocks needs the package gguf: pip install 'tnadapt[gguf]'"
            ) from None
        except NotImplementedError:
            raise TargetError(
                f"the package gguf cannot quantize to {kind.name}: keep the adapter attached, or merge into the "
                "unquantized model and quantize that"
            ) from None
        found = torch.from_numpy(blocks).to(layer.weight.device).reshape(layer.weight.shape)
        return {"weight": nn.Parameter(found, requires_grad=False)}

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Keep the blocks of rows, each of which has its own."""
        held: Any = module._parameters["weight"]
        return {"weight": nn.Parameter(rows_of(changed, state["weight"].data, held.data), requires_grad=False)}


class GgufEmbedding(GgufLayer):
    """``GgufEmbedding`` of transformers."""

    _own = f"{_MODULE}.utils.GgufEmbedding"

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True
