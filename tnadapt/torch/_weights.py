"""The weights of a model that an adapter can update, whatever kind of module holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.attention_grouping import main_projection
from tnadapt.targets.target import Rows, Target

from ._experts import stacks_of
from ._quantized import is_embedding, quantized_type

__all__ = ["Weight", "check_embedding", "join", "modules_of", "plain", "projections_in", "weights_of", "wraps"]

# The attribute in which PEFT keeps the layer that it wraps.
_BASE = "base_layer"

_NOT_LINEAR = (nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd, nn.Bilinear)


class Weight(NamedTuple):
    """One stored weight.

    Attributes
    ----------
    path, parameter : str
        Dotted path of its module, and its name there.
    module : Module
    stored : tuple of int, optional
        Shape in which the model stores it, before quantization; None if the module does not reveal it.
    kind : {"linear", "conv", "other"}
        "other" is an embedding or a matrix of an unknown module: it becomes a target only where it is named.
    transposed : bool
        Whether it is stored as ``(in, out)``.
    index : int, optional
        Which of the matrices that the parameter stacks, as experts are kept.
    """

    path: str
    parameter: str
    module: nn.Module
    stored: tuple[int, ...] | None
    kind: str
    transposed: bool = False
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index

    @property
    def name(self) -> str:
        """Dotted path, as in a state dict."""
        return join(self.path, self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the whole weight, in torch's order."""
        return self.target("linear", "").shape

    def target(self, role: str, layer: str, rows: Rows | None = None) -> Target:
        """Return the weight, or some of its rows, as a target.

        Raises
        ------
        TargetError
            If its shape is unknown.
        """
        held: Any = self.module._parameters.get(self.parameter)
        if nn.parameter.is_lazy(held):
            raise TargetError(f"{self.name} of {type(self.module).__name__} has no shape yet; run the model once first")
        if self.stored is None:
            raise TargetError(
                f"{self.name} of {type(self.module).__name__} is quantized, and the module has no in_features and "
                "out_features that tell its shape: leave it out, or give tnadapt.Target(path, shape, …) yourself"
            )
        return Target(
            self.path, self.stored, role, self.parameter, rows, self.transposed, layer, self.index, groups=self.groups
        )

    @property
    def groups(self) -> int:
        """In how many groups the channels of a convolution are."""
        return self.module.groups if isinstance(self.module, nn.modules.conv._ConvNd) else 1


def check_embedding(name: str, module: nn.Module) -> None:
    """Raise a TargetError if a weight belongs to an embedding that cannot be adapted.

    Parameters
    ----------
    name : str
        Dotted path of the weight.
    module : Module
        The module that holds it.
    """
    if getattr(module, "sparse", False) is True:
        raise TargetError(
            f"{name} belongs to an embedding with sparse=True, whose gradients are sparse, and an update's are not: "
            "set sparse=False on the module, or leave it out of the targets"
        )
    norm = module.max_norm if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
    if norm is not None:
        raise TargetError(
            f"{name} belongs to an embedding with max_norm={norm:g}, which rescales rows of its weight in place in "
            "each forward pass, and an adapted weight must stay as it is: set max_norm=None on the module, or leave "
            "it out of the targets"
        )


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, in the model's order, without those that PEFT adds next to the layers it wraps.

    Yields
    ------
    path, module
        The first path of a module that has several.
    """
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and (name == _BASE or not wraps(module)):
                yield from walk(join(path, name), child)

    yield from walk("", model)


def wraps(module: nn.Module) -> bool:
    """Return whether this is PEFT's wrapper, which takes a layer's place in the model and holds none of its weights."""
    return module._modules.get(_BASE) is not None


def plain(path: str) -> str:
    """Return a path without the components that PEFT's wrappers add.

    Examples
    --------
    >>> plain("attn.q_proj.base_layer")
    'attn.q_proj'
    """
    return ".".join(part for part in path.split(".") if part != _BASE)


def weights_of(path: str, module: nn.Module) -> list[Weight]:
    """Return the weights that a module itself holds: one for each expert where it stacks the matrices of experts.

    Usually one; those of q, k and v where a module like :class:`torch.nn.MultiheadAttention` keeps them as its own
    parameters; none for a norm or a transposed convolution.

    Examples
    --------
    >>> weights_of("head", nn.Linear(4, 2))[0].stored
    (2, 4)
    >>> [weight.name for weight in weights_of("attn", nn.MultiheadAttention(4, 2, kdim=3))]
    ['attn.q_proj_weight', 'attn.k_proj_weight', 'attn.v_proj_weight']
    """
    if isinstance(module, _NOT_LINEAR) or wraps(module):
        return []
    own = [
        Weight(path, name, module, tuple(tensor.shape), "linear")
        for name, tensor in module._parameters.items()
        if name.endswith("_proj_weight") or name == "in_proj_weight"
        if tensor is not None and tensor.ndim == 2 and tensor.is_floating_point()
    ]
    own += [
        Weight(path, name, module, stored, "linear", transposed, index)
        for name, stored, transposed in stacks_of(module)
        for index in range(stored[0])
    ]
    one = _weight(path, module)
    return [*own, one] if one is not None else own


def projections_in(path: str, module: nn.Module) -> list[Weight]:
    """Return the weights of a projection that may be wrapped by PEFT or combined with a norm, pooling or convolution.

    A single weight where that is unambiguous: it is the only one, or its name says that it is the projection.
    Depthwise convolutions and embeddings are not projections.

    Examples
    --------
    >>> [weight.path for weight in projections_in("q", nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
    ['q.0']
    """
    found = [
        weight
        for below, inner in modules_of(module)
        for weight in weights_of(join(path, below), inner)
        if weight.kind != "other" or not plain(below)
        if not is_embedding(inner)
        if not (isinstance(inner, nn.modules.conv._ConvNd) and inner.groups == inner.in_channels > 1)
    ]
    return main_projection(found, path, lambda weight: weight.path)


def _weight(path: str, module: nn.Module) -> Weight | None:
    anything: Any = module
    own = quantized_type(module)
    if own is not None:
        return Weight(path, "weight", module, own.shape(module), "other" if is_embedding(module) else "linear")
    # It need not be a parameter: it may be parametrized, quantized, or a method of this name.
    weight: Any = module._parameters.get("weight")
    weight = getattr(module, "weight", None) if weight is None else weight
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if nn.parameter.is_lazy(weight):
        return Weight(path, "weight", module, None, "linear" if isinstance(module, nn.Linear) else "conv")
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    if all(isinstance(size, int) and size > 0 for size in sizes) and (weight is not None or hasattr(module, "qweight")):
        # FSDP and others store the parameter in another shape, so the module's sizes decide. A 2-D parameter takes
        # precedence, because in_features and out_features may be out of date.
        stored = tuple(weight.shape) if plain and weight.ndim == 2 else sizes
        return Weight(path, "weight", module, stored, "linear")
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Weight(path, "weight", module, tuple(module.weight.shape), "conv")
    if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
        return None
    if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and getattr(module, "nf", None) is not None:
        stored = tuple(weight.shape) if plain else (anything.nx, anything.nf)
        return Weight(path, "weight", module, stored, "linear", transposed=True)
    if not plain:
        return Weight(path, "weight", module, None, "other")
    return Weight(path, "weight", module, tuple(weight.shape), "other") if weight.ndim == 2 else None


def join(path: str, name: str) -> str:
    """Join a dotted path and a name, either of which may be empty."""
    if not path or not name:
        return path or name
    return f"{path}.{name}"
