"""The weights of a model that an adapter can update: found, read, stacked, tied; and the modules that read them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import integer
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, TargetError, safe_repr
from tnadapt.targets.target import MAX_SIZE, RowIndices, Rows, Target

from ._delta import gather_full
from ._quantized import is_embedding, is_packed, quantized_type

#: The dtypes of arrays, and of weights that have a fingerprint, with their names in files.
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, of a tied weight by each of its names."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


# -- A weight's numbers, gathered, computed or dequantized -------------------------------------------------------------


def numbers(owner: nn.Module, parameter: str) -> Tensor | None:
    """Return a whole weight as numbers: gathered, computed if parametrized, dequantized; None if unknown."""
    quantized = quantized_type(owner)
    if quantized is not None:
        return quantized.dequantize(owner)
    weight = current_value(owner, parameter)
    if weight is None or is_packed(weight) or not weight.is_floating_point():
        return None
    return gather_full(weight.detach())


def current_value(owner: nn.Module, parameter: str) -> Tensor | None:
    """Return a weight, computed if it is parametrized; None if the module has none of that name."""
    weight: Tensor | None = owner._parameters.get(parameter)
    if weight is None and hasattr(owner, "parametrizations"):
        with torch.no_grad():
            weight = getattr(owner, parameter)
    return weight


# -- Arrays that a plan computes from the weights of its model: frozen arrays, and starts ------------------------------


def bound(
    plan: UpdatePlan,
    targets: Sequence[Target],
    owners: Sequence[nn.Module],
    progress: Callable[[int, int], None] | None = None,
) -> UpdatePlan:
    """Return the plan with what is computed from the weights of the model.

    Quantized weights are dequantized. The plan is returned as it is if the weights are on the meta device.

    Raises
    ------
    TargetError
        If a weight has no values that can be read.
    """
    devices = {tensor.device.type for owner in owners for tensor in [*owner.parameters(), *owner.buffers()]}
    if not plan.needs_base or "meta" in devices:
        return plan

    def rows_of(index: int) -> Tensor:
        settings = f"sources, start={plan.config.start!r} or apply={plan.config.apply!r}"
        target, weight = targets[index], numbers(owners[index], targets[index].parameter)
        if weight is None:
            raise _unreadable(
                target, f"the adapter has arrays that are computed from the base weights ({settings})",
                "give the arrays of sources as given=",
            )  # fmt: skip
        rows: Tensor = target.select(weight).cpu()
        return rows if rows.dtype is torch.float64 else rows.float()

    return plan.with_base(rows_of, progress)


def base_weights(targets: Sequence[Target], owners: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Yield the rows of each target as numbers; a weight of several targets in turn is read once.

    Raises
    ------
    TargetError
        If a weight has no values that can be read.
    """
    last: tuple[nn.Module, str] | None = None
    weight: Tensor | None = None
    for target, owner in zip(targets, owners, strict=False):
        if last is None or last[0] is not owner or last[1] != target.parameter:
            last, weight = (owner, target.parameter), numbers(owner, target.parameter)
        if weight is None:
            raise _unreadable(target, "the learning rate depends on the base weights", "choose one yourself")
        yield target.select(weight)


def _unreadable(target: Target, why: str, otherwise: str) -> TargetError:
    return TargetError(
        f"{why}, and the values of {target.name} cannot be read: register its layer type with "
        f"tnadapt.torch.register_quantized, or {otherwise}"
    )


# -- Stacks: the matrices of experts that a module keeps in parameters of three axes -----------------------------------


# Classes without attributes for how they store their matrices, and whether that is as (in, out).
_TRANSPOSED = {
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}


def sees_tokens_in_order(module: nn.Module) -> bool:
    """Return whether a module of experts gets all tokens in the batch's order, next to the experts of each.

    Others get the tokens sorted, or repeated, by expert. Those of transformers that are called with the choice of
    experts do the sorting themselves.
    """
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1:2] == ["hidden_states"] and names[2:3] in (["top_k_index"], ["router_indices"])


# Those of transformers' expert implementations that consist of torch functions.
_OF_TORCH = (None, "eager", "grouped_mm", "batched_mm")


def shows_products(module: Any) -> bool:
    """Return whether the products of a module of experts are functions of torch, and not kernels of other libraries."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) in _OF_TORCH


def tokens_of_one(module: Any, tokens: int, experts: int) -> int:
    """Return how many of a layer's tokens one of its experts gets on average."""
    chosen = getattr(getattr(module, "config", None), "num_experts_per_tok", None)
    return max(1, tokens * (chosen if isinstance(chosen, int) else 1) // experts)


def _is_transposed(module: Any) -> bool | None:
    """Return whether a module of experts stores each matrix as ``(in, out)``, or None if this is unknown."""
    # Set on every module by transformers.integrations.moe.use_experts_implementation. Others are in the table above.
    transposed: Any = module.__dict__.get("is_transposed")
    if isinstance(transposed, bool) and isinstance(module.__dict__.get("is_concatenated"), bool):
        return transposed
    return next((_TRANSPOSED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _TRANSPOSED), None)


# -- The weights, whatever kind of module holds them -------------------------------------------------------------------


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
    kind : {"linear", "conv", "embedding", "other"}
        "other" is a matrix of an unknown module: like an embedding, it becomes a target only where it is named.
    transposed : bool
        Whether it is stored as ``(in, out)``.
    index : int, optional
        Which of the matrices that the parameter stacks, as experts are kept.
    groups : int
        In how many groups the channels of a convolution are.
    """

    path: str
    parameter: str
    module: nn.Module
    stored: tuple[int, ...] | None
    kind: str
    transposed: bool = False
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index
    groups: int = 1

    @property
    def name(self) -> str:
        """Dotted path, as in a state dict."""
        return join(self.path, self.parameter)

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
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        names = [_BASE] if wraps(module) else reversed(module._modules)
        waiting += [(join(path, name), child) for name in names if (child := module._modules[name]) is not None]


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
    weights = []
    for name, tensor in module._parameters.items():
        if tensor is None or not tensor.is_floating_point():
            continue
        if tensor.ndim == 2 and (name.endswith("_proj_weight") or name == "in_proj_weight"):
            weights.append(Weight(path, name, module, tuple(tensor.shape), "linear"))
        elif tensor.ndim == 3 and (transposed := _is_transposed(module)) is not None:
            stored = tuple(tensor.shape)
            weights += [Weight(path, name, module, stored, "linear", transposed, index) for index in range(len(tensor))]
    weight = _weight(path, module)
    return [*weights, weight] if weight is not None else weights


def _weight(path: str, module: Any) -> Weight | None:
    layer_type = quantized_type(module)
    embeds = isinstance(module, nn.Embedding) or (layer_type is not None and layer_type.looks_up(module))
    if layer_type is not None:
        return Weight(path, "weight", module, layer_type.shape(module), "embedding" if embeds else "linear")
    # It may also be parametrized, quantized, or a method of this name.
    weight: Any = module._parameters.get("weight")
    weight = getattr(module, "weight", None) if weight is None else weight
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if nn.parameter.is_lazy(weight):
        return Weight(path, "weight", module, None, "linear" if isinstance(module, nn.Linear) else "conv")
    has_numbers = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    if all(isinstance(size, int) and size > 0 for size in sizes) and (weight is not None or hasattr(module, "qweight")):
        # FSDP and others store the parameter in another shape, so the module's sizes decide. A 2-D parameter takes
        # precedence, because in_features and out_features may be out of date.
        stored = tuple(weight.shape) if has_numbers and weight.ndim == 2 else sizes
        return Weight(path, "weight", module, stored, "linear")
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Weight(path, "weight", module, tuple(module.weight.shape), "conv", groups=module.groups)
    if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
        return None
    if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and getattr(module, "nf", None) is not None:
        stored = tuple(weight.shape) if has_numbers else (module.nx, module.nf)
        return Weight(path, "weight", module, stored, "linear", transposed=True)
    weight_kind = "embedding" if embeds else "other"
    if not has_numbers:
        return Weight(path, "weight", module, None, weight_kind)
    return Weight(path, "weight", module, tuple(weight.shape), weight_kind) if weight.ndim == 2 else None


def join(path: str, name: str) -> str:
    """Join a dotted path and a name, either of which may be empty."""
    if not path or not name:
        return path or name
    return f"{path}.{name}"


# -- The rows of some tokens in an embedding ---------------------------------------------------------------------------


def token_targets(model: nn.Module, tokens: Iterable[int], module: str | None = None) -> list[Target]:
    """Return the rows of some tokens in an embedding as a target, for :func:`attach`.

    With ``tnadapt.presets.dense()`` exactly these rows are trained, as with PEFT's ``trainable_token_indices``. Any
    other config makes the rows, too.

    Parameters
    ----------
    model : Module
    tokens : iterable of int
        Their indices in the vocabulary, in any order: what a tokenizer's ``convert_tokens_to_ids`` returns.
    module : str, optional
        Path of the embedding; by default the one that the model's ``get_input_embeddings()`` returns, or the only one
        it has.

    Returns
    -------
    list of Target
        One target. Where the embedding is tied to the output head, attach it with ``keep_tied=True``, and the head has
        the changed rows, too.

    Raises
    ------
    TargetError
        If there is no such embedding, or a token is not in it.

    Examples
    --------
    >>> import torch, tnadapt, tnadapt.torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    >>> adapter = tnadapt.torch.attach(model, tnadapt.presets.dense(), tnadapt.torch.token_targets(model, [9, 5]))
    >>> adapter.num_parameters, adapter.targets[0].rows
    (8, RowIndices(numbers=(5, 9)))
    """
    if module is not None and not isinstance(module, str):
        raise TargetError(f"module must be the path of an embedding, or None; got {safe_repr(module)}")
    if not isinstance(model, nn.Module):
        raise TargetError(f"tokens are rows of an embedding in a torch module; got {type(model).__name__}")
    try:
        token_list = list(tokens)
    except TypeError:
        raise TargetError(f"tokens must be indices of a vocabulary; got {safe_repr(tokens)}") from None
    numbers = {integer("a token", token, 0, MAX_SIZE, TargetError) for token in token_list}
    if not numbers:
        raise TargetError("tokens must be at least one index of a vocabulary; got none")
    whole = _embedding(model, module)
    if max(numbers) >= whole.out:
        raise TargetError(
            f"token {max(numbers)} is not among the {whole.out} of {whole.name}: resize the embedding first"
        )
    return [dataclasses.replace(whole, rows=RowIndices(tuple(sorted(numbers))))]


def _embedding(model: nn.Module, path: str | None) -> Target:
    """Return the whole weight of a model's token embedding."""
    embeddings = {name: module for name, module in modules_of(model) if is_embedding(module)}
    reported = reported_by(model, "get_input_embeddings")
    names = [name for name, module in embeddings.items() if reported is None or module is reported]
    names = names if path is None else [name for name in embeddings if name == path]
    if len(names) != 1:
        which = "which embedding has the tokens is unclear" if path is None else f"{safe_repr(path)} is no embedding"
        raise TargetError(
            f"{which}: this {type(model).__name__} has {', '.join(embeddings) or 'none'}; give one as module='path'"
        )
    (weight,) = weights_of(names[0], embeddings[names[0]])
    return weight.target("embedding", "")


def reported_by(model: Any, method: str) -> Any:
    """Return what a method of a model reports about its parts; None if it has no such method."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


# -- Tied weights: one tensor that several modules hold ----------------------------------------------------------------


def tied(names: Mapping[str, Sequence[str]], targets: Iterable[Target]) -> list[tuple[str, str]]:
    """Return pairs of names that refer to one tensor, where the tensor belongs to a target that does not list them.

    Parameters
    ----------
    names : mapping
        Of the model, by :func:`names_of_shared`.
    targets : iterable of Target

    Returns
    -------
    list of (str, str)
        Dotted paths of parameters. The first entry of each pair is the tensor's first name in the model's order.

    Notes
    -----
    One module registered under two paths is not a tie: it is a single module with a single update.

    Examples
    --------
    >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    >>> model["head"].weight = model["embed"].weight
    >>> tied(names_of_shared(model), [Target("head", (5, 4))])
    [('embed.weight', 'head.weight')]
    >>> tied(names_of_shared(model), usable(model, [Target("head", (5, 4))], False, keep_tied=True))
    []
    """
    wanted = {target.name for target in targets if not target.tied}
    return [(same[0], name) for name, same in names.items() if name != same[0] and not wanted.isdisjoint(same)]


def usable(model: nn.Module, targets: Sequence[Target], untie: bool, keep_tied: bool) -> list[Target]:
    """Return targets with all names of their weights, for those that list them already, or for all with ``keep_tied``.

    Raises
    ------
    TargetError
        If a target lists other names than those of its weight in this model; a weight is tied, and neither ``untie``
        nor ``keep_tied`` is true; or it is that of an embedding that changes it.
    """
    names = names_of_shared(model)
    resolved = [
        _with_tied(model, target, names.get(target.name, [target.name]), keep_tied)
        if target.tied or target.name in names
        else target
        for target in targets
    ]
    for target in resolved:
        for name in (target.name, *target.tied):
            check_embedding(name, model.get_submodule(name.rpartition(".")[0]))
    shared = [] if untie else tied(names, resolved)
    if shared:
        raise TargetError(
            f"{shared[0][0]} and {shared[0][1]} are one tensor (tied weights), and an update of one would change both: "
            "give keep_tied=True, so that one update acts in both, or untie=True, which gives the second its own copy, "
            "or leave it out of the targets"
        )
    return resolved


def _with_tied(model: nn.Module, target: Target, same: Sequence[str], keep: bool) -> Target:
    """Return a target with all names of its weight, if it lists them already or the caller wants them."""
    if target.tied and {target.name, *target.tied} != set(same):
        ties = f"it is tied to {', '.join(same[1:])}" if len(same) > 1 else "it is not tied"
        raise TargetError(
            f"{target.name} is updated together with {', '.join(target.tied)}, as one tensor, and in this "
            f"{type(model).__name__} {ties}: tie the weights of the model as they were"
        )
    if len(same) == 1 or not (keep or target.tied):
        return target
    module, _, parameter = same[0].rpartition(".")
    # Under its first name it has the role of that module; a file keeps the role that it was saved with.
    embeds = is_embedding(model.get_submodule(module)) and not target.tied
    role = "embedding" if embeds else target.role
    return dataclasses.replace(target, module=module, parameter=parameter, tied=tuple(same[1:]), role=role)


def split_by_file(model: nn.Module, file: AdapterFile, untie: bool, keep_tied: bool = False) -> list[str]:
    """Return the names of tied weights that need copies of their own, so that all are tied as they are in a file.

    Parameters
    ----------
    model : Module
    file : AdapterFile
    untie : bool
        Whether the caller allows copies.
    keep_tied : bool
        Whether the caller wants one update for tied weights.

    Raises
    ------
    FileError
        If weights are tied otherwise than in the file, and not just tied more and ``untie``; or if the file keeps one
        tensor under two names.
    """
    names, copies = names_of_shared(model), list[str]()
    firsts = dict[str, str]()
    for name in dict.fromkeys([*file.kept, *file.ties]):
        same = names.get(name, [name])
        twin = firsts.setdefault(same[0], name) if name in file.kept else name
        # PEFT stores a bias that two modules share for each of them.
        alone = file.ties.get(name) == () or (twin != name and not np.array_equal(file.kept[name], file.kept[twin]))
        if alone and len(same) > 1:
            if not untie or keep_tied:
                raise FileError(
                    f"{same[0]} and {same[1]} are one tensor (tied weights) in this {type(model).__name__}, and it has "
                    f"{name} of that module alone: load it with untie=True, which gives the second its own copy"
                )
            copies += [other for other in same[1:] if other not in copies]
        elif not alone and name in file.ties and {name, *file.ties[name]} != set(same):
            ties = (
                f"it is tied to {', '.join(other for other in same if other != name)}" if len(same) > 1 else "it is not"
            )
            raise FileError(
                f"it keeps {name}, which is tied to {', '.join(file.ties[name])}, and in this {type(model).__name__} "
                f"{ties}: tie the weights of the model as they were"
            )
    return copies


def names_of_shared(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each tensor that has several, in the model's order, by each of them."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for path, module in modules_of(model):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(_place(tensor), []).append(join(path, name))
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of the tensor's memory: parameters with equal keys are one tensor, even as different objects."""
    try:
        pointer = 0 if nn.parameter.is_lazy(tensor) else tensor.data_ptr()
    except RuntimeError:
        pointer = 0  # a subclass without storage
    if pointer == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return tensor.device, pointer, tuple(tensor.shape)


# -- The module whose forward reads a weight, where an adapter has to act, by its source code --------------------------

# Usually it is the module that holds the weight. Some parents read a child's weight directly and never call the child:
# timm's BEiT, ``F.linear(x, self.qkv.weight, bias)``; the fast path of :class:`torch.nn.TransformerEncoderLayer`. This
# is visible in their source, which is parsed here but never run.


# All dotted paths of each module, by the module's id.
Paths = Mapping[int, Sequence[str]]

# A step of a chain that is only known at run time: a loop variable or a computed index.
_ANY = "*"

# These read their first layer's weights only to check whether they need gradients.
_ONLY_LOOK = (nn.TransformerEncoder.forward,)

# Attributes of a weight that do not depend on its values.
_ABOUT = {
    "dtype", "device", "shape", "ndim", "dim", "size", "numel", "requires_grad", "is_cuda", "is_nested", "layout",
    "stride", "is_contiguous", "is_quantized", "grad",
}  # fmt: skip


def paths_of(model: nn.Module) -> Paths:
    """Return all dotted paths of each module of a model by the module's id; compute it once for many targets.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> paths_of(nn.Sequential(linear, linear))[id(linear)]
    ['0', '1']
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def host_of(model: nn.Module, target: Target, paths: Paths | None = None) -> str:
    """Return the module whose forward must apply an update: the weight's owner, or a parent that reads it directly.

    Parameters
    ----------
    model : Module
    target : Target
    paths : mapping, optional
        :func:`paths_of` the model, if already computed.

    Returns
    -------
    str
        Dotted path; empty for the model itself. If several modules read the weight, the outermost, whose forward
        encloses the others.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> host_of(layer, Target("self_attn", (24, 8), "q", "in_proj_weight")) == ""
    True
    >>> host_of(nn.Sequential(nn.Linear(2, 2)), Target("0", (2, 2)))
    '0'
    """
    outside = reads_outside(model, target, paths)
    return outside[0] if outside else target.module


def reads_outside(model: nn.Module, target: Target, paths: Paths | None = None) -> list[str]:
    """Return the ancestors of a weight's module whose forward reads the weight directly, outermost first.

    Parameters
    ----------
    model : Module
    target : Target
    paths : mapping, optional
        :func:`paths_of` the model, if already computed.

    Returns
    -------
    list of str
        Dotted paths; empty if only the owner reads the weight.

    Notes
    -----
    Detects reads of attributes of ``self``, also through local names, ``getattr``, an index or a loop, in ``forward``
    and the methods that it uses. Reads in other functions or in classes without source are not detected.

    Examples
    --------
    >>> attention = nn.MultiheadAttention(8, 2)
    >>> reads_outside(attention, Target("out_proj", (8, 8))) == [""]
    True
    """
    outside: dict[str, None] = {}
    for path in (paths_of(model) if paths is None else paths)[id(model.get_submodule(target.module))]:
        parts = path.split(".") if path else []
        for length in range(len(parts)):
            above = ".".join(parts[:length])
            # PEFT's wrapper exposes its base layer's weight as its own.
            below = (*(part for part in parts[length:] if part != _BASE), target.parameter)
            cls: Any = type(model.get_submodule(above))
            reads = _reads(cls) if len(below) > 1 else frozenset()
            if any(
                len(read) == len(below) and all(step in (name, _ANY) for step, name in zip(read, below, strict=True))
                for read in reads
            ):
                outside[above] = None
    return sorted(outside, key=lambda path: path.count(".") + bool(path))


@functools.lru_cache(maxsize=1024)
def _reads(cls: type) -> frozenset[tuple[str, ...]]:
    """Return the chains of attributes of ``self`` that the forward reads, each ending at a child's attribute."""
    chains: set[tuple[str, ...]] = set()
    waiting, known = ["forward"], {"forward"}
    while waiting:
        for chain in _chains(_source(cls, waiting.pop())):
            if len(chain) > 1:
                chains.add(chain)
            if chain[0] not in known:
                known.add(chain[0])
                waiting.append(chain[0])
    return frozenset(chains)


def _source(cls: type, name: str) -> ast.FunctionDef | None:
    """Return the parsed function behind a method or property, or None if there is none or it has no source."""
    attribute = inspect.getattr_static(cls, name, None)
    for holder in ("fget", "func", "__func__"):
        attribute = getattr(attribute, holder, attribute)
    function = inspect.unwrap(attribute) if inspect.isfunction(attribute) else None
    if function is None or function in _ONLY_LOOK or inspect.getattr_static(nn.Module, name, None) is function:
        return None
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


def _chains(function: ast.FunctionDef | None) -> Iterator[tuple[str, ...]]:
    if function is None or not function.args.args:
        return
    known: dict[str, tuple[str, ...]] = {function.args.args[0].arg: ()}
    for node in ast.walk(function):
        for name, chain in _named(node, known):
            known.setdefault(name, chain)
    inner: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
            if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
                inner.add(id(node.value))
                continue
            read = _chain(node, known)
            if read and id(node) not in inner:
                yield read


def _named(node: ast.AST, known: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield local names that are bound to a chain: ``attn = self.attn``, or ``for layer in self.layers``."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _assigned(target, node.value, known)
    elif isinstance(node, (ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
        yield from _assigned(node.target, node.value, known)
    elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
        several = isinstance(node.iter, (ast.Tuple, ast.List))
        chain = _common(node.iter, known) if several else _chain(node.iter, known)
        if chain:
            yield node.target.id, chain if several else (*chain, _ANY)


def _assigned(
    target: ast.AST, value: ast.AST, known: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for part, part_value in zip(target.elts, value.elts, strict=False):
            yield from _assigned(part, part_value, known)
    elif isinstance(target, ast.Name) and (chain := _chain(value, known)):
        yield target.id, chain


def _common(several: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return one chain that covers all of ``(self.q, self.v)``: ("*",)."""
    chains = [chain for item in ast.iter_child_nodes(several) if (chain := _chain(item, known))]
    if len({len(chain) for chain in chains}) != 1:
        return None
    return tuple(steps[0] if len(set(steps)) == 1 else _ANY for steps in zip(*chains, strict=True))


def _chain(node: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return ``self.a.b[0]`` as ("a", "b", "0"), or None for an expression that does not start at ``self``."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.NamedExpr):
        return _chain(node.value, known)
    owner: ast.expr
    step: ast.expr
    if isinstance(node, ast.Attribute):
        owner, step = node.value, ast.Constant(node.attr)
    elif isinstance(node, ast.Subscript):
        owner, step = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args[1:]:
        owner, step = node.args[0], node.args[1]
    else:
        return None
    before = _chain(owner, known)
    return None if before is None else (*before, str(step.value) if isinstance(step, ast.Constant) else _ANY)
