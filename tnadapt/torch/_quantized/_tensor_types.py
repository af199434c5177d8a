"""Layers whose weight is a tensor of torchao: the module is torch's own, and the tensor's class is torchao's.

Such a tensor reports the dtype that it was quantized from, and the shape that it stands for: nothing but its class
tells it from ordinary numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized_layer import QuantizedLayer, is_instance, rows_of, twin

__all__ = [
    "GgufEmbedding",
    "GgufLayer",
    "QuantoLayer",
    "TorchAOLayer",
]


# -- Layers whose weight is a tensor of torchao: the module is torch's own, and the tensor's class is torchao's --------

# Such a tensor reports the dtype that it was quantized from, and the shape that it stands for: nothing but its class
# tells it from ordinary numbers.


class TorchAOLayer(QuantizedLayer):
    """A linear layer or an embedding after ``torchao.quantization.quantize_``: int8, float8, int4 and others, nf4."""

    stored = ("weight",)
    moved = 2.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a linear layer or an embedding, and its weight is of a class of torchao's."""
        weight = module._parameters.get("weight")
        return isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None and _is_torchao(weight)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return the shape that the tensor reports."""
        rows, cols = module._parameters["weight"].shape  # type: ignore[union-attr]
        return rows, cols

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight; None if its class has no dequantize(), as kernels' own layouts."""
        weight: Any = module._parameters["weight"]
        if weight.device.type == "meta":
            return None
        method = getattr(weight, "get_original_weight", weight.dequantize)  # nf4's own name
        with torch.no_grad():
            try:
                found: Tensor = method()
            except (AttributeError, NotImplementedError):
                return None
            # A class that does not define the method inherits torch's, which returns something else.
            return found if type(found) is Tensor and found.shape == weight.shape else None

    def passes_gradient(self, module: nn.Module) -> bool:
        """Return False for weights whose layer quantizes its input, too."""
        weight: Any = module._parameters["weight"]
        names = ("act_quant_kwargs", "activation_quantization", "input_quant_func")
        return all(getattr(weight, name, None) is None for name in names)

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the tensor class's own method with the settings of the module's weight."""
        held: Any = module._parameters["weight"]
        how = _AGAIN.get(type(held).__name__)
        if how is None:
            raise TargetError(
                f"torchao's {type(held).__name__} cannot be merged into: tnadapt knows how to quantize again for "
                f"{', '.join(_AGAIN)}. Keep the adapter attached, or register a type with tnadapt.torch."
                "register_quantized"
            )
        new = how(held, weight.to(held.dtype).contiguous())
        for name in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point"):
            if getattr(held, name, None) is not None:
                setattr(new, name, getattr(held, name))
        return {"weight": nn.Parameter(new, requires_grad=False)}

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Keep codes and scales where all of them are row by row: not those of one scale, or of a kernel's layout."""
        weight: Any = module._parameters["weight"]
        held, new = weight.data, state["weight"].data
        names, settings = held.__tensor_flatten__()
        rows = len(changed)
        parts = {name: (getattr(new, name), getattr(held, name)) for name in names}
        # Blocks of one row: codes and scales have a row for each.
        by_rows = tuple(getattr(held, "block_size", ()))[:1] == (1,)
        if not by_rows or any(len(own) != rows or one.shape != own.shape for one, own in parts.values()):
            return state
        kept = {name: rows_of(changed, one, own) for name, (one, own) in parts.items()}
        found = type(held).__tensor_unflatten__(kept, settings, held.shape, held.stride())
        return {"weight": nn.Parameter(found, requires_grad=False)}


def _is_torchao(tensor: Tensor) -> bool:
    return any(f"{cls.__module__}.".startswith("torchao.") for cls in type(tensor).__mro__)


def _granularity(held: Any) -> Any:
    """Return the granularity that a block size stands for."""
    found = importlib.import_module("torchao.quantization.granularity")
    block = tuple(held.block_size)
    if block == tuple(held.shape):
        return found.PerTensor()
    if block == (1, held.shape[1]):
        return found.PerRow()
    return found.PerGroup(block[1]) if block[0] == 1 else found.PerBlock(block)


def _mapping(held: Any) -> Any:
    found = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    plain = held.zero_point is None or not bool(held.zero_point.any())
    return found.SYMMETRIC if plain else found.ASYMMETRIC


def _int8(held: Any, weight: Tensor) -> Any:
    return type(held).from_hp(
        weight,
        _granularity(held),
        mapping_type=_mapping(held),
        act_quant_kwargs=held.act_quant_kwargs,
        reduce_range=held.reduce_range,
    )


def _float8(held: Any, weight: Tensor) -> Any:
    return type(held).from_hp(
        weight,
        float8_dtype=held.qdata.dtype,
        granularity=_granularity(held),
        mm_config=held.mm_config,
        kernel_preference=held.kernel_preference,
        act_quant_kwargs=held.act_quant_kwargs,
    )


def _intx(held: Any, weight: Tensor) -> Any:
    return type(held).from_hp(
        weight,
        tuple(held.block_size),
        held.target_dtype,
        mapping_type=_mapping(held),
        activation_quantization=held.activation_quantization,
    )


def _int4(held: Any, weight: Tensor) -> Any:
    return type(held).from_hp(weight, list(held.block_size))


def _nf4(held: Any, weight: Tensor) -> Any:
    return type(held).from_tensor(weight, held.block_size, held.scaler_block_size)


#: By the name of the tensor's class: quantize numbers again with a tensor's settings.
_AGAIN: Mapping[str, Callable[[Any, Tensor], Any]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4PlainInt32Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "NF4Tensor": _nf4,
}


# -- Layers of optimum-quanto: int8, int4, int2 and float8 weights, frozen, or requantized in each forward pass --------


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


# -- Layers of transformers whose weights stay in the blocks of a GGUF file --------------------------------------------

# transformers 5.24 makes them of some architectures where there is a kernel for the device, and numbers elsewhere.


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
