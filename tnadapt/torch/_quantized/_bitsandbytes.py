"""Layers of bitsandbytes: 4-bit codes of nf4 and fp4, and int8 rows with a scale each (LLM.int8())."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._quantized_layer import QuantizedLayer, is_instance, rows_of

__all__ = [
    "FourBitEmbedding",
    "FourBitLayer",
    "Int4Embedding",
    "Int8Embedding",
    "Int8Layer",
]


# -- Layers of bitsandbytes: 4-bit codes of nf4 and fp4, and int8 rows with a scale each (LLM.int8()) ------------------


class FourBitLayer(QuantizedLayer):
    """``bitsandbytes.nn.Linear4bit``: nf4 or fp4, with plain or quantized scales."""

    stored = ("weight", "quant_state")
    moved = 1.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a Linear4bit."""
        return is_instance(module, "bitsandbytes.nn.modules.Linear4bit")

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight; before its first move to a device it is not quantized yet."""
        weight: Any = module._parameters["weight"]
        if weight.device.type == "meta":
            return None
        state = _quant_state(module)
        if state is None:
            return cast(Tensor, weight.detach()) if weight.is_floating_point() else None
        _unpack(module)
        weight = module._parameters["weight"]
        found: Tensor = _functional().dequantize_4bit(weight.data, _quant_state(module))
        return found.reshape(self.shape(module))

    def while_attached(self, module: nn.Module) -> Mapping[str, Any]:
        """Keep the weight as it is in evaluation on CPUs with AVX-512 BF16.

        There the first call in evaluation mode would repack it for a kernel that has no backward, with scales rounded
        to bfloat16, for good.
        """
        _unpack(module)
        return {"support_avx512bf16_for_cpu": False} if hasattr(module, "support_avx512bf16_for_cpu") else {}

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Return weight and quantization state, in the layout that files have."""
        _unpack(module)
        return super().state(module)

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by ``quantize_4bit`` with the weight's own type, block size and dtypes."""
        held: Any = module._parameters["weight"]
        known = _quant_state(module)
        if known is None:
            return {"weight": _same_class(held, weight.to(held.dtype)), "quant_state": None}
        codes, found = _functional().quantize_4bit(
            weight.to(known.dtype).contiguous(),
            blocksize=known.blocksize,
            compress_statistics=known.nested,
            quant_type=known.quant_type,
            quant_storage=held.dtype,
        )
        new = _same_class(held, codes.reshape(held.shape))
        new.quant_state = found
        return {"weight": new, "quant_state": found}


class Int8Layer(QuantizedLayer):
    """``bitsandbytes.nn.Linear8bitLt``: int8 codes, with the largest absolute value of each row as its scale."""

    stored: tuple[str, ...] = ("weight", "state")
    moved = 1.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a Linear8bitLt."""
        return is_instance(module, "bitsandbytes.nn.modules.Linear8bitLt")

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight; before its first move to a device it is not quantized yet."""
        weight: Any = module._parameters["weight"]
        if weight.device.type == "meta":
            return None
        if weight.dtype is not torch.int8:
            return cast(Tensor, weight.detach())
        holders = (weight, getattr(module, "state", None))  # an embedding has no state
        scales = next(scales for holder in holders if (scales := getattr(holder, "SCB", None)) is not None)
        codes: Tensor = weight.detach().as_subclass(Tensor)
        return codes.float() * cast(Tensor, scales.float() / 127.0).view(-1, 1)

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by ``int8_vectorwise_quant`` from float16, as the library does when a layer is moved."""
        held: Any = module._parameters["weight"]
        found: dict[str, Any] = {}
        if "state" in self.stored:
            found["state"] = copy.copy(module.state)
            found["state"].reset_grads()  # forgets the codes and scales of the original
        if held.dtype is not torch.int8:
            return {**found, "weight": _same_class(held, weight.to(held.dtype))}
        codes, scales, _ = _functional().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        new = _same_class(held, codes)
        new.CB, new.SCB = codes, scales
        return {**found, "weight": new}


def _functional() -> Any:
    return sys.modules["bitsandbytes"].functional


def _quant_state(module: nn.Module) -> Any:
    # A parameter that was converted, as by FSDP, has lost it, and the module still has it.
    found = getattr(module._parameters["weight"], "quant_state", None)
    return getattr(module, "quant_state", None) if found is None else found


def _unpack(module: Any) -> None:
    """Undo the packing for the CPU's kernel, by the library's own code, which runs when a state dict is made."""
    state = _quant_state(module)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        module._save_to_state_dict({}, "", False)
        state = _quant_state(module)
    # That code (0.50) leaves plain scales transposed and in bfloat16, as the kernel reads them.
    if state is not None and not state.nested and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def _same_class(held: Any, data: Tensor) -> Any:
    """Return a parameter of the same class and settings with other data."""
    new = torch.Tensor._make_subclass(type(held), data, held.requires_grad)
    new.__dict__.update(held.__dict__)
    return new


# ----------------------------------------------------------------------------------------------------------------------
# Quantized embeddings with a forward of their own: those of bitsandbytes, and torchao's after training for 4 bits

# Embeddings after ``torchao.quantization.quantize_`` are torch's own, with a tensor of torchao's
# (:class:`~._torchao.TorchAOLayer`).


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
