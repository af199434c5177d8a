"""Quantized linear layers: how to recognize them, their shapes, and their dequantized weights.

A layer with ``in_features``, ``out_features`` and an integer weight needs no entry here. Others do: layers that keep
packed codes under other names, or in a tensor of a floating-point dtype.
"""

from __future__ import annotations

from torch import Tensor, nn

from tnadapt.errors import TargetError
from tnadapt.plugins import Registry, load_plugins

__all__ = ["QUANTIZED", "QuantizedLayer", "quantized_type", "register_quantized"]


class QuantizedLayer:
    """Support for one type of quantized linear layer.

    A subclass defines :meth:`matches`, and :meth:`shape` where the layer has no ``in_features`` and ``out_features``.
    Adapters act on it by the strategies ``"factored"`` and ``"additive"``, which leave the weight alone.
    """

    def matches(self, module: nn.Module) -> bool:
        """Return whether the module is a layer of this type.

        Called for every module of a model, so look only at the class.
        """
        raise TargetError(f"{type(self).__name__} does not define matches(module)")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return rows and columns of the weight: output and input features."""
        rows, cols = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if not (isinstance(rows, int) and isinstance(cols, int)):
            raise TargetError(
                f"{type(module).__name__} has no in_features and out_features: define "
                f"{type(self).__name__}.shape(module)"
            )
        return rows, cols

    def dequantize(self, module: nn.Module) -> Tensor | None:
        """Return the weight as numbers, ``(rows, cols)``, or None if that is not possible.

        The fingerprint by which a file recognizes its base model is computed from it; without it nothing is checked.
        """
        return None


QUANTIZED: Registry[QuantizedLayer] = Registry("quantized layer", QuantizedLayer, {})


def register_quantized(name: str, cls: type[QuantizedLayer]) -> None:
    """Make a type of quantized linear layer known to :func:`attach` and :func:`load`.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. Registering it again replaces the class.
    cls : type
        A subclass of :class:`QuantizedLayer`, called without arguments.

    Raises
    ------
    ConfigError
        If the name does not have that form, or the class is not a subclass of QuantizedLayer.

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
    ...     def matches(self, module):
    ...         return isinstance(module, SignLinear)
    ...     def shape(self, module):
    ...         return tuple(module.signs.shape)
    ...     def dequantize(self, module):
    ...         return 2.0 * module.signs - 1.0
    >>> tt.register_quantized("sign", Sign)
    >>> adapter = tt.attach(torch.nn.Sequential(SignLinear(4, 6)), targets="all-linear")
    >>> adapter.targets[0].shape
    (4, 6)
    """
    QUANTIZED.register(name, cls)


def quantized_type(module: nn.Module) -> QuantizedLayer | None:
    """Return the registered type that matches a module, or None."""
    load_plugins()
    for cls in QUANTIZED.values():
        found = cls()
        if found.matches(module):
            return found
    return None
