"""Quantized layers (bitsandbytes, GPTQ, AWQ, HQQ, torchao, quanto, GGUF): recognize, dequantize and requantize them.

:class:`QuantizedLayer` is the contract, with one subclass for each type of layer. None of them imports the library of
its layers: layers are recognized by the names of their classes, and if a model has such layers, their library is loaded
already. :data:`QUANTIZED` at the end lists the classes, and :func:`quantized_type` finds the one of a layer.

A layer with ``in_features``, ``out_features`` and an integer weight needs no entry here to be adapted. Without one it
has no fingerprint, and nothing is merged into it.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tnadapt.errors import TargetError
from tnadapt.plugins import Registry, load_plugins

# -- The contract of a type of quantized layer -------------------------------------------------------------------------


class QuantizedLayer:
    """Support for one type of quantized layer: a linear one, or an embedding.

    A subclass defines :meth:`matches`, :meth:`shape` where the layer has no ``in_features`` and ``out_features``, and
    :meth:`looks_up` for an embedding with a forward of its own.
    Adapters act on it by the strategies ``"factored"`` and ``"additive"``, which leave the weight alone. With
    :meth:`dequantize`, files have a fingerprint of the base, and settings that need its numbers work. With
    :meth:`requantize` as well, updates can be merged into it.

    Attributes
    ----------
    stored : tuple of str
        Names of the module's attributes that together store the weight: parameters, buffers or others. They are kept
        during a merge, and put back by ``unmerge()``. Empty for a type that cannot be merged into.
    moved : float
        The time to dequantize one element of the weight, in elements of float32 that are read or written meanwhile:
        what ``"auto"`` counts where a strategy dequantizes (:mod:`tnadapt.torch._strategy_choice`). The built-in types'
        are those of ``benchmarks/quantized.py`` on a CPU.
    library : str
        The module without which there is no such layer: the type is asked only once it is imported. By default,
        always.
    """

    library: str = ""
    stored: tuple[str, ...] = ()
    moved: float = 4.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether the module is a layer of this type.

        Called for every module of a model, so look at classes and at which attributes there are, not at values.
        """
        raise TargetError(f"{type(self).__name__} does not define matches(module)")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return rows and columns of the weight: output and input features; of an embedding, number and size."""
        rows, cols = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if self.looks_up(module) or isinstance(module, nn.Embedding):
            rows, cols = getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)
        if not (isinstance(rows, int) and isinstance(cols, int)):
            raise TargetError(
                f"{type(module).__name__} has no in_features and out_features: define "
                f"{type(self).__name__}.shape(module)"
            )
        return rows, cols

    def looks_up(self, module: nn.Module) -> bool:
        """Return whether the module is an embedding: its forward takes indices, and returns those rows of the weight.

        The forward of :class:`torch.nn.Embedding` is known; others are known by this method only.
        """
        return False

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight as numbers, ``(rows, cols)``, or None if that is not possible.

        The fingerprint by which a file recognizes its base model is computed from it; without it nothing is checked.
        """
        return None

    def passes_gradient(self, module: nn.Module) -> bool:
        """Return whether backward through the layer computes the gradient of its input.

        Layers that round their input do not. On an adapted layer the gradient is then that of x times the dequantized
        weight, as if nothing were rounded.
        """
        return True

    def while_attached(self, module: nn.Module) -> Mapping[str, Any]:
        """Return attributes to set on the module while an adapter is attached to the model, by name.

        Called for every layer of this type in a model, adapted or not.
        """
        return {}

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize a weight as the module's own is quantized, by a call of its library; do not change the module.

        Parameters
        ----------
        module : Module
        weight : Tensor
            ``(rows, cols)`` in float32, on the device of the dequantized weight.

        Returns
        -------
        mapping of str to object
            A value for each name in ``stored``.

        Raises
        ------
        TargetError
            If that is not possible; by default always.
        """
        raise TargetError(
            f"{type(module).__name__} cannot be merged into, because {type(self).__name__} does not define "
            "requantize(module, weight)"
        )

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Return a new state with the module's own codes and scales in all rows but some; do not change the module.

        Called where an update leaves rows as they are. A library that quantizes its own numbers again may round them to
        others; where that is so, and rows have codes and scales of their own, they can be kept. By default, the state
        is returned as it is.

        Parameters
        ----------
        module : Module
        state : mapping of str to object
            As :meth:`requantize` returned it.
        changed : Tensor of bool, shape (rows,)
            The rows whose new codes are needed.
        """
        return state

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Return what stores the module's weight: the attributes in ``stored``, not copied."""
        return {name: getattr(module, name, None) for name in self.stored}

    def restore(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Put a state in place, as :meth:`state` or :meth:`requantize` returned it; can be repeated."""
        for name, value in state.items():
            held = next(
                (tensors for tensors in (module._parameters, module._buffers) if name in tensors), module.__dict__
            )
            held[name] = value


class LibraryLayer(QuantizedLayer):
    """A layer of a library, recognized without importing it.

    Attributes
    ----------
    layer_class : str
        Name of its class in the module ``library``.
    embeds : bool
        Whether it is an embedding with a forward of its own.
    """

    layer_class = ""
    embeds = False
    stored: tuple[str, ...] = ("weight",)

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is of this class or a subclass."""
        return _is_of(module, self.library, self.layer_class)

    def looks_up(self, module: nn.Module) -> bool:
        """Return whether it is an embedding."""
        return self.embeds

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight, without gradients; None on the meta device."""
        if cast(Tensor, getattr(module, self.stored[0])).device.type == "meta":
            return None
        with torch.no_grad():
            return self.numbers(module)

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight of a layer that is not on the meta device."""
        raise NotImplementedError


def _is_of(module: nn.Module, library: str, name: str) -> bool:
    """Return whether a module is an instance of a class that is given by name, without importing its library."""
    return any((cls.__module__, cls.__qualname__) == (library, name) for cls in type(module).__mro__)


def twin(module: nn.Module) -> Any:
    """Return a module with the same tensors and attributes, on which others can be set without changing the first."""
    duplicate = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        duplicate.__dict__[name] = dict(module.__dict__[name])
    return duplicate


def rows_of(changed: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of one tensor where a mask is true, and those of another elsewhere.

    Examples
    --------
    >>> rows_of(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
    tensor([[1., 1.],
            [0., 0.]])
    """
    return torch.where(changed.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)


# -- bitsandbytes: 4-bit codes of nf4 and fp4, and int8 rows with a scale each (LLM.int8()) ----------------------------


class FourBitLayer(LibraryLayer):
    """``bitsandbytes.nn.Linear4bit``: nf4 or fp4, with plain or quantized scales."""

    library, layer_class = "bitsandbytes.nn.modules", "Linear4bit"
    stored = ("weight", "quant_state")
    moved = 1.0

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight; before its first move to a device it is not quantized yet."""
        weight: Tensor = module._parameters["weight"]
        if _quant_state(module) is None:
            return weight.detach() if weight.is_floating_point() else None
        _unpack(module)
        numbers: Tensor = _functional().dequantize_4bit(module._parameters["weight"].data, _quant_state(module))
        return numbers.reshape(self.shape(module))

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
        codes, state = _functional().quantize_4bit(
            weight.to(known.dtype).contiguous(),
            blocksize=known.blocksize,
            compress_statistics=known.nested,
            quant_type=known.quant_type,
            quant_storage=held.dtype,
        )
        new = _same_class(held, codes.reshape(held.shape))
        new.quant_state = state
        return {"weight": new, "quant_state": state}


class Int8Layer(LibraryLayer):
    """``bitsandbytes.nn.Linear8bitLt``: int8 codes, with the largest absolute value of each row as its scale."""

    library, layer_class = "bitsandbytes.nn.modules", "Linear8bitLt"
    stored: tuple[str, ...] = ("weight", "state")
    moved = 1.0

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight; before its first move to a device it is not quantized yet."""
        weight: Tensor = module._parameters["weight"]
        if weight.dtype is not torch.int8:
            return weight.detach()
        holders = (weight, getattr(module, "state", None))  # an embedding has no state
        scales = next(scales for holder in holders if (scales := getattr(holder, "SCB", None)) is not None)
        codes: Tensor = weight.detach().as_subclass(Tensor)
        return codes.float() * cast(Tensor, scales.float() / 127.0).view(-1, 1)

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by ``int8_vectorwise_quant`` from float16, as the library does when a layer is moved."""
        held: Any = module._parameters["weight"]
        state: dict[str, Any] = {}
        if "state" in self.stored:
            state["state"] = copy.copy(module.state)
            state["state"].reset_grads()  # drops the codes and scales of the original
        if held.dtype is not torch.int8:
            return {**state, "weight": _same_class(held, weight.to(held.dtype))}
        codes, scales, _ = _functional().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        new = _same_class(held, codes)
        new.CB, new.SCB = codes, scales
        return {**state, "weight": new}


def _functional() -> Any:
    return sys.modules["bitsandbytes"].functional


def _quant_state(module: nn.Module) -> Any:
    # A parameter converted by FSDP, say, has lost it, but the module still has it.
    state = getattr(module._parameters["weight"], "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _unpack(module: Any) -> None:
    """Undo the packing for the CPU kernel by the library's own code, which runs when a state dict is built."""
    state = _quant_state(module)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        module._save_to_state_dict({}, "", False)
        state = _quant_state(module)
    # That code (0.50) leaves plain scales transposed and in bfloat16, as the kernel reads them.
    if state is not None and not state.nested and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def _same_class(held: Any, data: Tensor) -> Any:
    """Return a parameter of the same class and settings with different data."""
    new = torch.Tensor._make_subclass(type(held), data, held.requires_grad)
    new.__dict__.update(held.__dict__)
    return new


# -- Embeddings with a forward of their own: bitsandbytes, and torchao after training for 4 bits -----------------------

# Embeddings after ``torchao.quantization.quantize_`` are torch's own, with a tensor of torchao's
# (:class:`TorchAOLayer`).


class FourBitEmbedding(FourBitLayer):
    """``bitsandbytes.nn.Embedding4bit``, and its subclasses for nf4 and fp4."""

    library, layer_class = "bitsandbytes.nn.modules", "Embedding4bit"
    embeds = True


class Int8Embedding(Int8Layer):
    """``bitsandbytes.nn.Embedding8bit``."""

    library, layer_class = "bitsandbytes.nn.modules", "Embedding8bit"
    embeds = True
    stored = ("weight",)


class Int4Embedding(LibraryLayer):
    """``Int4WeightOnlyEmbedding``, which torchao's ``Int4WeightOnlyEmbeddingQATQuantizer`` leaves after training."""

    library, layer_class = "torchao.quantization.qat.embedding", "Int4WeightOnlyEmbedding"
    embeds = True
    stored = ("weight", "scale", "zero_point")
    moved = 2.0

    def numbers(self, module: Any) -> Tensor | None:
        """Return what the module's own forward returns for all indices."""
        return cast(
            Tensor, type(module).forward(module, torch.arange(module.num_embeddings, device=module.weight.device))
        )

    def requantize(self, module: Any, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the functions of torchao that its quantizer calls, with the layer's group size and dtypes."""
        utils = importlib.import_module("torchao.quantization.utils")
        operations = importlib.import_module("torchao._executorch_ops")
        bits, size, precision = module.bit_width, module.group_size, module.scale_precision
        weight = weight.to(module.output_dtype)
        scale, zero = utils.get_group_qparams_symmetric(weight, bits, size, precision=precision)
        zero = zero.to(module.zero_point_precision)
        quantize = operations._quantized_decomposed_quantize_per_channel_group_wrapper
        codes = quantize(weight, scale, zero, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, torch.int8, size)
        return {"weight": codes, "scale": scale.to(precision), "zero_point": zero}

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Keep codes, scales and zero points, which are row by row."""
        return {name: rows_of(changed, state[name], old) for name, old in self.state(module).items()}


# -- Small integers packed into words of 32 bits, as GPTQ and AWQ store codes and zero points --------------------------


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
    integers = _aligned(words, bits, count) if 32 % bits == 0 else crossing(words, bits, count)
    return integers.movedim(-1, axis)


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
    integers = torch.zeros(*blocks.shape[:-1], 32, dtype=torch.int32, device=words.device)
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            integers |= _aligned(blocks[..., low : low + width], width, 32) << low
            low += width
    return integers.flatten(-2)[..., :count].movedim(-1, axis)


def _aligned(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers packed along the last axis, none of which spans two words."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    # The shift fills in sign bits, which the mask removes.
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]


def crossing(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers along the last axis, which may begin in one word and end in the next."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    place, shift = first // 32, first % 32
    # The word after the last one is read only with a shift that removes all of it.
    low = words[..., place] >> shift
    high = words[..., (place + 1).clamp_max(words.shape[-1] - 1)] << (32 - shift)
    return ((low | high) & ((1 << bits) - 1)).to(torch.int32)


# -- GPTQ and AWQ: packed words, and scales that were chosen by calibration data ---------------------------------------

# Their packages have one class for each kernel. Some keep the format's words, others repack them when a model is
# loaded, or in the first evaluation.


# Names of classes that store the words in a kernel's own order, or rotate their input first.
_OWN_LAYOUT = ("bitblas", "exllama", "gemv", "machete", "marlin", "mlx", "paro", "qqq", "swordfish")


#: Names of the tensors that both formats have.
CODES = {"qweight", "qzeros", "scales"}


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


def is_readable(module: Any) -> bool:
    """Return whether a layer keeps the words of its format, and multiplies its input as it is with their numbers."""
    if module.qweight is None or module.qweight.device.type == "meta" or module.qweight.dtype is not torch.int32:
        return False
    # SpinQuant's and QuaRot's layers rotate their input.
    rotates = getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False)
    return not rotates and not any(name in _names(module) for name in _OWN_LAYOUT)


def _names(module: nn.Module) -> str:
    # AutoGPTQ calls each of its classes QuantLinear, and names the module for the kernel.
    return " ".join([*(cls.__name__ for cls in type(module).__mro__), type(module).__module__]).lower()


# -- AWQ: codes along the output features, those of 4 bits eight to a word in interleaved order ------------------------


# The order of a word's eight output features, from the lowest bits up.
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
        return held >= CODES and "g_idx" not in held and _bits(module) is not None

    def dequantize(self, module: Any) -> Tensor | None:
        """Return the weight in the dtype of the scales; None for another layout."""
        bits = _bits(module)
        if bits is None or not is_readable(module):
            return None
        rows, cols = self.shape(module)
        groups, words = module.scales.shape[0], -(-rows * bits // 32)
        expected = (cols, words), (groups, words), (groups, rows)
        tensors = module.qweight, module.qzeros, module.scales
        if tuple(tuple(tensor.shape) for tensor in tensors) != expected or cols % groups or (bits == 4 and rows % 8):
            return None
        codes, zeros = (_in_order(unpacked(packed, bits, rows, axis=1), bits) for packed in tensors[:2])
        scales, zeros = (tensor.repeat_interleave(cols // groups, 0) for tensor in (module.scales, zeros))
        return ((codes - zeros).to(scales.dtype) * scales).T.contiguous()


def _bits(module: Any) -> int | None:
    bits = getattr(module, "w_bit", getattr(module, "bits", None))
    return bits if isinstance(bits, int) else None


def _in_order(codes: Tensor, bits: int) -> Tensor:
    return codes if bits != 4 else codes.view(len(codes), -1, 8)[:, :, list(_PLACES)].reshape(codes.shape)


# -- GPTQ: integer codes along the input features, with scales and zeros of groups of them -----------------------------


_EMBEDDING = "gptqmodel.nn_modules.qlinear.torch", "TorchQuantEmbeddings"


class GPTQLayer(CalibratedLayer):
    """The linear layers of AutoGPTQ and GPTQModel, recognized by what they hold.

    ``qweight`` has codes of ``bits`` bits in int32 words along the input features, ``qzeros`` the zero points along the
    output features, and ``g_idx`` the group of each input feature. The weight is ``scales[g] * (codes - zeros[g])``. In
    AutoGPTQ's format, "gptq", zeros are stored less one; in "gptq_v2" as they are. In GPTQModel's "gptq_p", and for 5,
    6 and 7 bits in any format, words hold parts of codes (:func:`planar`).
    """

    method = "GPTQ"
    chosen = "codes"

    embeds = False

    def matches(self, module: nn.Module) -> bool:
        """Return whether it has the tensors of this format, whatever its class is called."""
        held = module._buffers.keys() | module._parameters.keys()
        has_bits = isinstance(getattr(module, "bits", None), int)
        return held >= {*CODES, "g_idx"} and has_bits and _is_of(module, *_EMBEDDING) == self.embeds

    def shape(self, module: Any) -> tuple[int, int]:
        """Return output and input features, from the scales and the groups."""
        return int(module.scales.shape[1]), int(module.g_idx.shape[0])

    def dequantize(self, module: Any) -> Tensor | None:
        """Return the weight in the dtype of the scales; None if a kernel has put the codes into its own order."""
        if not is_readable(module):
            return None
        rows, cols = GPTQLayer.shape(self, module)
        if tuple(module.qweight.shape) != (-(-cols * module.bits // 32), rows):
            return None
        unpack = planar if getattr(module, "planar", False) else unpacked
        codes = unpack(module.qweight, module.bits, cols, axis=0)
        zeros = unpack(module.qzeros, module.bits, rows, axis=1)
        zeros = zeros + 1 if _less_one(module) else zeros
        group = module.g_idx.long()
        scales: Tensor = module.scales[group]
        return ((codes - zeros[group]).to(scales.dtype) * scales).T.contiguous()


class GPTQEmbedding(GPTQLayer):
    """GPTQModel's quantized embedding: its vectors are numbered as the input features of a linear layer are."""

    embeds = True

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of vectors and their size."""
        size, count = super().shape(module)
        return count, size

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the table of vectors in the dtype of the scales."""
        weight = super().dequantize(module)
        return None if weight is None else weight.T.contiguous()

    def looks_up(self, module: nn.Module) -> bool:
        """Return True."""
        return True


def _less_one(layer: Any) -> bool:
    """Return whether the layer's forward adds one to the stored zeros."""
    # GPTQModel's kernels with REQUIRES_FORMAT_V2 take them as they are. Their zeros are converted when a "gptq" model
    # is loaded; those of a "gptq_v2" model need no conversion, and ``qzero_format()`` still returns 1.
    needs_v2 = getattr(layer, "REQUIRES_FORMAT_V2", None)
    method = getattr(layer, "qzero_format", None)
    return needs_v2 is not True and (method is None or method() == 1)


# -- HQQ: packed codes of 1 to 8 bits, with scales and zeros of groups -------------------------------------------------


class HQQLayer(LibraryLayer):
    """``hqq.core.quantize.HQQLinear``."""

    library, layer_class = "hqq.core.quantize", "HQQLinear"
    stored = ("W_q", "meta")
    moved = 4.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is an HQQLinear that has been quantized or loaded."""
        return super().matches(module) and bool(getattr(module, "ready", False))

    def shape(self, module: Any) -> tuple[int, int]:
        """Return the shape that was quantized."""
        rows, cols = module.meta["shape"]
        return int(rows), int(cols)

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight in the layer's dtype."""
        other = twin(module)
        # The library completes this dictionary temporarily.
        other.meta = dict(other.meta)
        return cast(Tensor, other.dequantize())

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


# -- torchao: the module is torch's own, and the class of its weight is torchao's --------------------------------------

# Such a tensor reports the dtype that it was quantized from, and the shape that it stands for: nothing but its class
# distinguishes it from an ordinary tensor.


class TorchAOLayer(LibraryLayer):
    """A linear layer or an embedding after ``torchao.quantization.quantize_``: int8, float8, int4 and others, nf4."""

    library = "torchao"
    moved = 2.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a linear layer or an embedding, and its weight is of a class of torchao's."""
        weight = module._parameters.get("weight")
        return isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None and _is_torchao(weight)

    def shape(self, module: Any) -> tuple[int, int]:
        """Return the shape that the tensor reports."""
        rows, cols = module._parameters["weight"].shape
        return rows, cols

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight; None if its class has no dequantize(), as kernels' own layouts."""
        weight = module._parameters["weight"]
        method = getattr(weight, "get_original_weight", weight.dequantize)  # nf4's own name
        try:
            numbers: Tensor = method()
        except (AttributeError, NotImplementedError):
            return None
        # A class that does not define the method inherits torch's, which returns something else.
        return numbers if type(numbers) is Tensor and numbers.shape == weight.shape else None

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
        if not by_rows or any(
            len(old_part) != rows or new_part.shape != old_part.shape for new_part, old_part in parts.values()
        ):
            return state
        kept = {name: rows_of(changed, new_part, old_part) for name, (new_part, old_part) in parts.items()}
        tensor = type(held).__tensor_unflatten__(kept, settings, held.shape, held.stride())
        return {"weight": nn.Parameter(tensor, requires_grad=False)}


def _is_torchao(tensor: Tensor) -> bool:
    return any(f"{cls.__module__}.".startswith("torchao.") for cls in type(tensor).__mro__)


def _granularity(held: Any) -> Any:
    """Return the granularity that a block size stands for."""
    granularity = importlib.import_module("torchao.quantization.granularity")
    block = tuple(held.block_size)
    if block == tuple(held.shape):
        return granularity.PerTensor()
    if block == (1, held.shape[1]):
        return granularity.PerRow()
    return granularity.PerGroup(block[1]) if block[0] == 1 else granularity.PerBlock(block)


def _mapping(held: Any) -> Any:
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    plain = held.zero_point is None or not bool(held.zero_point.any())
    return mapping.SYMMETRIC if plain else mapping.ASYMMETRIC


def _settings(held: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(held, name) for name in names}


def _int8(held: Any, weight: Tensor) -> Any:
    settings = _settings(held, "act_quant_kwargs", "reduce_range")
    return type(held).from_hp(weight, _granularity(held), mapping_type=_mapping(held), **settings)


def _float8(held: Any, weight: Tensor) -> Any:
    settings = _settings(held, "mm_config", "kernel_preference", "act_quant_kwargs")
    return type(held).from_hp(weight, float8_dtype=held.qdata.dtype, granularity=_granularity(held), **settings)


def _intx(held: Any, weight: Tensor) -> Any:
    settings = {"mapping_type": _mapping(held), **_settings(held, "activation_quantization")}
    return type(held).from_hp(weight, tuple(held.block_size), held.target_dtype, **settings)


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


# -- optimum-quanto: int8, int4, int2 and float8, frozen, or requantized in each forward pass --------------------------


class QuantoLayer(LibraryLayer):
    """``optimum.quanto.QLinear``, before and after ``freeze``."""

    library, layer_class = "optimum.quanto.nn.qlinear", "QLinear"
    moved = 2.0

    def matches(self, module: nn.Module) -> bool:
        """Return whether it is a QLinear whose weight is quantized."""
        return super().matches(module) and getattr(module, "weight_qtype", None) is not None

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight that the layer computes with: before ``freeze``, its float weight after rounding."""
        return cast(Tensor, module.qweight.dequantize())

    def requantize(self, module: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the layer's own optimizer of scales; a layer that is not frozen keeps a float weight."""
        held: Any = module._parameters["weight"]
        other = twin(module)
        new = nn.Parameter(weight.to(held.dtype), requires_grad=held.requires_grad and not other.frozen)
        if not other.frozen:
            return {"weight": new}
        other._parameters["weight"] = new
        with torch.no_grad():
            return {"weight": nn.Parameter(other.qweight, requires_grad=False)}


# -- GGUF: layers of transformers whose weights stay in the blocks of the file -----------------------------------------

# transformers 5.24 makes them of some architectures where there is a kernel for the device, and numbers elsewhere.


_GGUF = "transformers.integrations.gguf"


class GgufLayer(LibraryLayer):
    """``GgufLinear`` of transformers."""

    library, layer_class = f"{_GGUF}.utils", "GgufLinear"
    moved = 4.0

    def numbers(self, module: Any) -> Tensor | None:
        """Return the weight in float32, for the input as it comes: some layers permute it first."""
        kernels = importlib.import_module(f"{_GGUF}.kernels")
        numbers: Tensor = kernels.dequantize_blocks(module.weight, module.ggml_type, *self.shape(module), torch.float32)
        order = getattr(module, "input_permutation", None)
        return numbers if order is None else torch.empty_like(numbers).index_copy_(1, order, numbers)

    def passes_gradient(self, module: nn.Module) -> bool:
        """Return False: kernels for few tokens have no backward."""
        return self.embeds

    def requantize(self, module: Any, weight: Tensor) -> Mapping[str, Any]:
        """Quantize by the package gguf, which knows how for some types of blocks."""
        order = getattr(module, "input_permutation", None)
        weight = weight if order is None else weight.index_select(1, order)
        try:
            gguf: Any = importlib.import_module("gguf")
            block_type = gguf.GGMLQuantizationType(module.ggml_type)
            blocks = gguf.quants.quantize(weight.float().cpu().numpy(), block_type)
        except ImportError:
            raise TargetError(
                "merging into GGUF's blocks needs the package gguf: pip install 'tnadapt[gguf]'"
            ) from None
        except NotImplementedError:
            raise TargetError(
                f"the package gguf cannot quantize to {block_type.name}: keep the adapter attached, or merge into the "
                "unquantized model and quantize that"
            ) from None
        codes = torch.from_numpy(blocks).to(module.weight.device).reshape(module.weight.shape)
        return {"weight": nn.Parameter(codes, requires_grad=False)}

    def keep_rows(self, module: nn.Module, state: Mapping[str, Any], changed: Tensor) -> Mapping[str, Any]:
        """Keep the blocks of rows, each of which has its own."""
        held: Any = module._parameters["weight"]
        return {"weight": nn.Parameter(rows_of(changed, state["weight"].data, held.data), requires_grad=False)}


class GgufEmbedding(GgufLayer):
    """``GgufEmbedding`` of transformers."""

    library, layer_class = f"{_GGUF}.utils", "GgufEmbedding"
    embeds = True


# -- The table of types, and the type of a module ----------------------------------------------------------------------


_BUILT_IN: Mapping[str, type[QuantizedLayer]] = {
    "bitsandbytes-4bit": FourBitLayer,
    "bitsandbytes-int8": Int8Layer,
    "bitsandbytes-4bit-embedding": FourBitEmbedding,
    "bitsandbytes-int8-embedding": Int8Embedding,
    "torchao": TorchAOLayer,
    "torchao-int4-embedding": Int4Embedding,
    "quanto": QuantoLayer,
    "hqq": HQQLayer,
    "gguf": GgufLayer,
    "gguf-embedding": GgufEmbedding,
    "gptq": GPTQLayer,
    "gptq-embedding": GPTQEmbedding,
    "awq": AWQLayer,
}
QUANTIZED: Registry[QuantizedLayer] = Registry("quantized layer", QuantizedLayer, _BUILT_IN)


def register_quantized(name: str, cls: type[QuantizedLayer]) -> None:
    """Make a type of quantized layer known to :func:`attach` and :func:`load`.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. The module that registered it can
        replace the class.
    cls : type
        A subclass of :class:`QuantizedLayer`, called without arguments. It is asked before the built-in types.

    Raises
    ------
    ConfigError
        If the name does not have that form, is built in, or registered by another module, or the class is not a
        subclass of QuantizedLayer.

    Examples
    --------
    >>> import torch, tnadapt.torch as tt
    >>> class SignLinear(torch.nn.Module):
    ...     def __init__(self, rows, cols):
    ...         super().__init__()
    ...         self.register_buffer("signs", torch.randn(rows, cols) > 0)
    ...     def forward(self, x):
    ...         return x @ (2.0 * self.signs - 1.0).T
    >>> class Sign(tt.QuantizedLayer):
    ...     stored = ("signs",)
    ...     def matches(self, module):
    ...         return isinstance(module, SignLinear)
    ...     def shape(self, module):
    ...         return tuple(module.signs.shape)
    ...     def dequantize(self, module):
    ...         return 2.0 * module.signs - 1.0
    ...     def requantize(self, module, weight):
    ...         return {"signs": weight > 0}
    >>> tt.register_quantized("sign", Sign)
    >>> adapter = tt.attach(torch.nn.Sequential(SignLinear(4, 6)), "dense", "all-linear")
    >>> adapter.targets[0].shape
    (4, 6)

    Signs do not hold an update of half their size:

    >>> adapter.load_arrays({name: torch.full(array.shape, 0.5) for name, array in adapter.arrays().items()})
    >>> adapter.merge(max_error=0.5)
    Traceback (most recent call last):
        ...
    tnadapt.errors.TargetError: quantizing 0.weight plus its update again is off by 1 of the update's norm, ...
    >>> adapter.merge()
    >>> adapter.merge_report[0].update_error, adapter.merge_report.kept
    (1.0, 0.0)
    """
    QUANTIZED.register(name, cls)


def quantized_type(module: nn.Module) -> QuantizedLayer | None:
    """Return the type that matches a module, or None."""
    load_plugins()
    registered = [QUANTIZED[name] for name in QUANTIZED if name not in _BUILT_IN]
    for cls in (*registered, *_BUILT_IN.values()):
        if (not cls.library or cls.library in sys.modules) and (layer_type := cls()).matches(module):
            return layer_type
    return None


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding, of numbers or quantized.

    Examples
    --------
    >>> is_embedding(nn.Embedding(4, 2)), is_embedding(nn.Linear(4, 2))
    (True, False)
    """
    if isinstance(module, nn.Embedding):
        return True
    layer_type = quantized_type(module)
    return layer_type is not None and layer_type.looks_up(module)


def is_packed(weight: Tensor) -> bool:
    """Return whether a tensor is of a subclass that keeps something else than its elements, as torchao's codes.

    Such a tensor may report a floating-point dtype. The parts of a DTensor are elements.

    Examples
    --------
    >>> import torch
    >>> is_packed(torch.zeros(2)), is_packed(nn.Parameter(torch.zeros(2)))
    (False, False)
    """
    anything: Any = weight
    return bool(is_traceable_wrapper_subclass(anything)) and not hasattr(weight, "full_tensor")
