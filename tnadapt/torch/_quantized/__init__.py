"""Quantized layers: how to recognize them, their shapes, their dequantized weights, and how to merge into them.

One class in one file for each type of layer, listed in one table. None of them imports the library whose layers it
knows: layers are recognized by the names of their classes, and a library is loaded already if a model has its layers.

A layer with ``in_features``, ``out_features`` and an integer weight needs no entry here to be adapted. Without one it
has no fingerprint, and nothing is merged into it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tnadapt.plugins import Registry, load_plugins

from ._bitsandbytes import FourBitEmbedding, FourBitLayer, Int4Embedding, Int8Embedding, Int8Layer
from ._packed_codes import AWQLayer, GPTQEmbedding, GPTQLayer, HQQLayer
from ._quantized_layer import QuantizedLayer, twin
from ._tensor_types import GgufEmbedding, GgufLayer, QuantoLayer, TorchAOLayer

__all__ = ["QUANTIZED", "QuantizedLayer", "is_embedding", "is_packed", "quantized_type", "register_quantized", "twin"]

QUANTIZED: Registry[QuantizedLayer] = Registry(
    "quantized layer",
    QuantizedLayer,
    {
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
    },
)


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
    >>> adapter = tt.attach(torch.nn.Sequential(SignLinear(4, 6)), targets="all-linear")
    >>> adapter.targets[0].shape
    (4, 6)
    """
    QUANTIZED.register(name, cls)


def quantized_type(module: nn.Module) -> QuantizedLayer | None:
    """Return the type that matches a module, or None."""
    load_plugins()
    for name in sorted(QUANTIZED, key=QUANTIZED.built_in.__contains__):
        found = QUANTIZED[name]()
        if found.matches(module):
            return found
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
    kind = quantized_type(module)
    return kind is not None and kind.looks_up(module)


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
