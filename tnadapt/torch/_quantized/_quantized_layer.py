"""The contract of a type of quantized layer, linear or an embedding, which one class per type fulfills."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

__all__ = ["QuantizedLayer", "is_instance", "rows_of", "twin"]


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
    """

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
            held = next((own for own in (module._parameters, module._buffers) if name in own), module.__dict__)
            held[name] = value


def is_instance(found: object, *names: str) -> bool:
    """Return whether an object is of one of these classes, or of a subclass, without importing them.

    Parameters
    ----------
    found : object
    *names : str
        Full names: ``"package.module.Class"``.

    Examples
    --------
    >>> is_instance(nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), is_instance(nn.ReLU(), "other.ReLU")
    (True, False)
    """
    return any(f"{cls.__module__}.{cls.__qualname__}" in names for cls in type(found).__mro__)


def twin(module: nn.Module) -> Any:
    """Return a module with the same tensors and attributes, on which others can be set without changing the first."""
    found = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        found.__dict__[name] = dict(module.__dict__[name])
    return found


def rows_of(changed: Tensor, new: Tensor, own: Tensor) -> Tensor:
    """Return the rows of one tensor where a mask is true, and those of another elsewhere.

    Examples
    --------
    >>> rows_of(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
    tensor([[1., 1.],
            [0., 0.]])
    """
    return torch.where(changed.to(own.device).view(-1, *[1] * (own.ndim - 1)), new, own)
