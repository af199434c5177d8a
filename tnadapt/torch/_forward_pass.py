"""What an adapter contributes to a forward pass: whether it acts, ΔW, W' and factors, dropout, lookups, and the hooks.

:class:`PassHooks` runs around a pass of the whole model. Within it, an :class:`~tnadapt.torch._state.AdapterSlot` gives
a layer :func:`acts`, :func:`delta` and :func:`factors`. The later sections are forms of a layer's forward that
:mod:`tnadapt.torch._forward_patch` chooses from: stored low-rank factors, few rows of input, embeddings, and W' that is
not a sum.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.backends import load_backend
from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.target import Target

from . import _delta, _forms, _state
from ._delta import backward_number, recomputed, traced
from ._forms import Change, LowRank, Operation, Update, UpdatedWeight, add_features, updated
from ._quantized import quantized_type
from ._state import AdapterSlot, AdapterState, current, mixing_weight, weight_params
from ._weights import numbers

# -- Dropout of an adapter's contribution: on its input, in training mode only -----------------------------------------

# A layer computes ``y = x Wᵀ + b + drop(x) (W' - W)ᵀ``, where W' - W is ΔW if the update is added. Whatever the
# strategy, ``drop`` zeroes single elements of x and scales the others by 1 / (1 - p). The expectation is the output
# without dropout, and the base's own part sees the whole x. In evaluation mode nothing is different.
#
# So a layer in the weight strategy computes a second product of its size while it drops. The alternative, zeros in
# columns of ΔW, would keep the single product but drop the same features for all tokens of a batch, and the noise would
# depend on a strategy that is chosen by speed. That form (:class:`ColumnDropout`) is used only where there is no
# choice: a module that reads its child's weight, as nn.MultiheadAttention does, does not show the child's input.


#: Torch's own forwards of layers that are linear in their input.
LINEAR_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def check_dropout(dropout: Any) -> float:
    """Return the probability as a float, or raise a ConfigError."""
    is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not is_number or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be a probability from 0 to below 1; got {safe_repr(dropout)}")
    return float(dropout)


def drops_input(slot: AdapterSlot, host: nn.Module) -> bool:
    """Return whether elements of the host's input are dropped for this slot."""
    if slot.adapter.dropout == 0.0 or not host.training:
        return False
    if isinstance(host, nn.Embedding) or getattr(host.__dict__.get("forward"), "looks_up", False):
        return False  # its inputs are indices
    if slot.target.index is not None:
        return False  # the experts' second matrices multiply something else
    return slot.strategy != "weight" or _shows_input(slot, host)


def _shows_input(slot: AdapterSlot, host: nn.Module) -> bool:
    """Return whether the host's input is multiplied with the weight and nothing else happens to it."""
    if slot.owner is not host or slot.target.parameter != "weight":
        return False
    return type(host).forward in LINEAR_FORWARDS or type(host).__name__ == "Conv1D"  # from transformers


def dropped_inputs(slots: Sequence[AdapterSlot], x: Tensor) -> list[tuple[Tensor, list[AdapterSlot]]]:
    """Return for each adapter its own dropped input, which all its slots in this layer share."""
    several: dict[AdapterState, list[AdapterSlot]] = {}
    for slot in slots:
        several.setdefault(slot.adapter, []).append(slot)
    return [(functional.dropout(x, state.dropout, training=True), shared) for state, shared in several.items()]


class ColumnDropout:
    """Zeros in columns of the changes of one weight: input features that are dropped for the whole batch.

    Parameters
    ----------
    host : Module
        The module whose forward reads the weight. Where it shows the weight's input, nothing is dropped here.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        # All slots of an adapter in one weight share an input.
        self._masks: dict[AdapterState, Tensor] = {}

    def acts(self, slot: AdapterSlot) -> bool:
        """Return whether columns of this slot's change are dropped."""
        if slot.adapter.dropout == 0.0 or not self.host.training or isinstance(slot.owner, nn.Embedding):
            return False
        return not _shows_input(slot, self.host)

    def mask(self, slot: AdapterSlot, change: Tensor) -> Tensor:
        """Return what a change ``(rows, cols)`` is multiplied by: zeros in the columns that are dropped."""
        state = slot.adapter
        if state not in self._masks:
            ones = torch.ones(1, change.shape[1], dtype=change.dtype, device=change.device)
            self._masks[state] = functional.dropout(ones, state.dropout, training=True)
        return self._masks[state]


# -- Whether an adapter acts, and its updates and factors --------------------------------------------------------------


def acts(state: AdapterState) -> bool:
    """Return whether the adapter contributes to a forward pass."""
    if not state.enabled or state.merged is not None:
        return False
    # One compiled program serves all mixing weights, zero included, so it must contain the update.
    return torch.compiler.is_compiling() or mixing_weight(state) != 0.0


def delta(slot: AdapterSlot) -> Tensor:
    """Return the update of one weight, times the adapter's mixing weight."""
    return scaled(slot.adapter, rounded_delta(slot))


def rounded_delta(slot: AdapterSlot, dtype: torch.dtype | None = None) -> Tensor:
    """Return the update of one weight without the mixing weight; where it is cached, in a dtype if one is given."""
    state = slot.adapter
    _refuse_reentrant(state)
    return state.cache.get(lambda names: current(state, names), slot.index, dtype)


def factors(slot: AdapterSlot) -> Factored:
    """Return the factors of one weight's update, without the adapter's mixing weight."""
    state, how = slot.adapter, slot.factoring
    assert how is not None  # ensured by attach
    if how.shared:
        _refuse_reentrant(state)
    return how(load_backend("torch"), dict(zip(how.names, current(state, how.names), strict=True)))


def scaled(state: AdapterState, value: Tensor) -> Tensor:
    """Return a tensor times the adapter's mixing weight."""
    if torch.compiler.is_compiling():
        # torch.where rather than a product alone: an inactive adapter adds nothing, even if it contains a NaN.
        weight = _state.weight_on(state, value.device)
        return torch.where(weight == 0, torch.zeros_like(value), value * weight)
    factor = mixing_weight(state)
    return value if factor == 1.0 else value * factor


def _refuse_reentrant(state: AdapterState) -> None:
    """Raise a RuntimeError where DistributedDataParallel would silently compute wrong gradients."""
    # Reentrant checkpointing runs a separate backward pass for each region. DistributedDataParallel takes the first one
    # for the complete gradient of an array that several regions share, unless it was told that the graph is static.
    # A pass that began with gradients but runs without them here is inside reentrant checkpointing.
    if not state.cache.passing.with_gradients or torch.is_grad_enabled():
        return
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.nn.parallel import DistributedDataParallel

    active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None and not active.static_graph:
        raise RuntimeError(
            "a part of the model runs without gradients inside a training pass of DistributedDataParallel, as "
            f"reentrant checkpointing does, and adapter {state.name!r} is shared by several parts: its gradients would "
            "be wrong. Use checkpointing with use_reentrant=False, or DistributedDataParallel(…, static_graph=True)"
        )


# -- Activation checkpointing ----------------------------------------------------------------------------------


def in_backward() -> bool:
    """Return whether a backward pass is running, as when a checkpointed region is recomputed."""
    return backward_number() != -1


def check_recomputation(state: AdapterState) -> None:
    """Raise a RuntimeError if a checkpointed region is recomputed with settings that differ from the forward pass."""
    if state.passes[1] and _settings(state) not in state.passes[1]:
        raise RuntimeError(
            f"adapter {state.name!r} was activated, mixed, merged or disabled, or rows() left, between a forward pass "
            "with activation checkpointing and its backward pass, which recomputes parts of it: do so after backward()"
        )


def _settings(state: AdapterState) -> tuple[Hashable, ...]:
    assignment = _state.assignment_of(state)
    names = None if assignment is None else assignment.names
    active = None if state.members is None or state.members.active is None else state.members.active.number
    return state.enabled, mixing_weight(state), state.merged is not None, names, active


# -- Hooks -----------------------------------------------------------------------------------------------------


class PassHooks:
    """Hooks on the model that an adapter is attached to.

    They are bound methods of a small object rather than closures, so that ``copy.deepcopy`` and ``pickle`` connect a
    copied model to the copied state.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def begin(self, module: nn.Module, args: Any) -> None:
        """Prepare for a forward pass of the whole model (forward pre-hook)."""
        state = self.state
        if getattr(module, "_is_replica", False):
            raise TargetError(
                "nn.DataParallel copies the model for each device, and an adapter is on one model: use "
                "DistributedDataParallel, with one process per device"
            )
        if not torch.compiler.is_compiling():
            state.threads.discard(threading.get_ident())
            if torch.is_grad_enabled():
                # Several passes may precede one backward pass (DPO runs the base model and the adapted one), so all
                # settings since the last optimizer step are allowed, not only the latest. The version counters show
                # when a step was taken.
                arrays = [array for _, array in _state.named_parameters(state)]
                written = sum(array._version for array in arrays if not array.is_inference())
                if written != state.passes[0]:
                    state.passes = written, set()
                state.passes[1].add(_settings(state))
            on_host = (_delta.on_host(array) for _, array in _state.named_parameters(state))
            if hasattr(state.owner, "unshard") and not all(on_host):
                # FSDP2 writes gathered shards into the same memory, and keeps the version counters.
                state.clear_cache()
        elif torch.is_grad_enabled() and state.acting.made is not None:
            state.acting.made.forget()  # as in DeltaCache.begin
        # What is selected of the members in a batch serves all layers of a pass.
        if acts(state) and (state.members is not None or any(slot.strategy != "factored" for slot in state.slots)):
            state.acting.cache.begin()
        if state.members is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            state.clear_cache()  # any member may be trained in this pass

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clean up after the pass, also if it failed; ``output`` is then None (forward hook)."""
        state = self.state
        state.acting.cache.end()
        if state.acting.made is not None:
            state.acting.made.end()
        if torch.compiler.is_compiling() or output is None:
            return
        if not acts(state):
            if module.training:
                _warn_idle(state, args, output)
            return
        if state.warned or threading.get_ident() in state.threads:
            return
        state.warned = True
        warnings.warn(
            f"none of the modules that adapter {state.name!r} updates was called in a forward pass of "
            f"{type(state.model).__name__}: its updates did not affect the result. If the model reads the weights "
            f"without calling {state.targets[0].module!r}, as fused projections do, call merge()",
            stacklevel=2,
        )


# -- The warning about a training that cannot change an adapter because it is merged or inactive -----------------------

# If nothing else is trained, torch raises an error, because the loss has no gradient. It does not if the model keeps
# parameters of its own trainable, or its inputs require gradients for activation checkpointing.


def _warn_idle(state: AdapterState, args: Any, output: Any) -> None:
    """Warn once if a training pass, in which an adapter did not act, belongs to a training that cannot change it."""
    if state.idle_warned or not state.enabled or state.shares_weights or not torch.is_grad_enabled():
        return
    # Training one adapter while another is merged or inactive is a deliberate choice.
    others = state.model.__dict__.get(_state.ADAPTERS_ATTR, {}).values()
    if any(other.merged is None and mixing_weight(other) != 0.0 for other in others):
        return
    trained = any(parameter.requires_grad for _, parameter in _state.named_parameters(state))
    # A caller whose inputs require gradients may want only those.
    if not trained or not _has_gradient(output) or _has_gradient(args):
        return
    state.idle_warned = True
    merged = state.merged is not None
    what, way = ("merged", "unmerge() it") if merged else ("not active (its weight is 0)", "activate() it")
    warnings.warn(
        f"adapter {state.name!r} is {what}, so training does not change it: {way} first; to train only what else is "
        "trainable, bake() or detach() it",
        stacklevel=2,
    )


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_has_gradient, values))


# -- A parameter of a module, and the slots of the adapters that update it ---------------------------------------------


@dataclasses.dataclass(eq=False)
class PatchedParameter:
    """A parameter of a module, and the slots of the adapters that update it.

    Attributes
    ----------
    rivals : list of (AdapterSlot, AdapterSlot)
        Slots with rows in common, the first of which does not add to the weight.
    """

    owner: nn.Module
    parameter: str
    slots: list[AdapterSlot] = dataclasses.field(default_factory=list)
    rivals: list[tuple[AdapterSlot, AdapterSlot]] = dataclasses.field(default_factory=list)

    def put(self, slots: list[AdapterSlot]) -> None:
        """Set the slots."""
        self.slots = slots
        others = [slot for slot in slots if not slot.adapter.plan.applying.additive]
        alone = len({id(slot.adapter) for slot in slots}) < 2  # as with the many experts of one weight
        self.rivals = [
            (slot, other)
            for slot in ([] if alone else others)
            for other in slots
            if other.adapter is not slot.adapter and _forms.overlap(slot.target, other.target)
        ]

    def check_alone(self) -> None:
        """Raise a TargetError if an adapter acts on the rows of one that is not a sum."""
        for slot, other in self.rivals:
            states = slot.adapter, other.adapter
            if all(acts(state) or state.merged is not None for state in states):
                raise TargetError(
                    f"adapters {states[0].name!r} and {states[1].name!r} both act on {slot.target.name}, and "
                    f"{_state.not_a_sum(*states)}: activate() one of them, or detach the other"
                )

    def among(self, slots: Sequence[AdapterSlot]) -> list[AdapterSlot]:
        """Return those of some slots that update this parameter."""
        return [slot for slot in slots if slot.owner is self.owner and slot.target.parameter == self.parameter]

    @property
    def tensor(self) -> Tensor:
        """The base weight as the module has it now."""
        weight = self.owner._parameters.get(self.parameter)
        # A parametrized weight is computed, not registered as a parameter.
        return cast(Tensor, getattr(self.owner, self.parameter) if weight is None else weight)


# -- The fast path of a linear layer: low-rank updates whose factors are stored arrays ---------------------------------

# For a small layer, the checks that :class:`~tnadapt.torch._forward_patch.ForwardPatch` makes in each call take longer
# than the products. Here those that cannot change between calls are made once, when slots are added or removed, and the
# rest in as few steps as possible. The general path is the reference: it computes the same bits.


#: Subclasses, such as sharded tensors, take the general path.
_PLAIN = (Tensor, nn.Parameter)


class _Stored(NamedTuple):
    """An adapter, the names of its arrays that are the two factors of its update, and the scale."""

    state: AdapterState
    left: str
    right: str
    scale: float


class LowRankLayer:
    """A call of a linear layer with the updates of its adapters, where all are stored low-rank matrices.

    Parameters
    ----------
    host : Linear
    updates : sequence of _Stored
    """

    def __init__(self, host: nn.Linear, updates: Sequence[_Stored]) -> None:
        self.host, self.updates = host, tuple(updates)

    @classmethod
    def of(cls, host: nn.Module, weights: Sequence[PatchedParameter]) -> LowRankLayer | None:
        """Return the way through a host with torch's own forward, or None if some slot needs the general one."""
        if not isinstance(host, nn.Linear) or len(weights) != 1 or weights[0].rivals:
            return None
        candidates = [_stored(slot) for slot in weights[0].slots]
        updates = [update for update in candidates if update is not None]
        return cls(host, updates) if len(updates) == len(candidates) else None

    def __call__(self, x: Any) -> Tensor | None:
        """Return the output; None, with nothing done, where this call needs the general way."""
        host = self.host
        parameters = host._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if type(x) not in _PLAIN or type(weight) not in _PLAIN or (bias is None and "bias" not in parameters):
            return None
        assert weight is not None  # true for these types
        dtype, device = x.dtype, x.device
        if weight.dtype is not dtype or weight.device != device or not _forms.is_ordinary(x):
            return None
        changes: list[LowRank] = []
        acting: list[AdapterState] = []
        recomputing = in_backward()
        for state, left_name, right_name, scale in self.updates:
            if state.by_rows or (state.dropout != 0.0 and host.training):
                return None
            if recomputing:
                check_recomputation(state)
            if not acts(state):
                continue
            # Looked up in each call: FSDP and load_state_dict(assign=True) replace the parameter objects.
            names, arrays = state.parameter_names, cast(Any, state.owner._parameters)
            left, right = arrays[names[left_name]], arrays[names[right_name]]
            for array in (left, right):
                if type(array) not in _PLAIN or array.device != device:
                    return None
            if left.dtype is not right.dtype or (changes and left.dtype is not changes[0].left.dtype):
                return None
            changes.append(LowRank(left, right, scale, state.weight))
            acting.append(state)
        if not changes:
            return None
        alike = changes[0].left.dtype is dtype
        if alike and torch.is_grad_enabled() and not _forms.is_small(x, weight):
            return None
        for state in acting:
            state.threads.add(threading.get_ident())
        return (_forms.low_rank_linear if alike else _forms.mixed_low_rank_linear)(x, weight, bias, changes)


def _stored(slot: AdapterSlot) -> _Stored | None:
    """Return the names of the arrays that are the factors of a slot's update, if it is their plain product."""
    state, how, target = slot.adapter, slot.factoring, slot.target
    if slot.strategy != "factored" or how is None or how.stored is None or how.shared:
        return None
    if target.rows is not None or target.index is not None or target.transposed or slot.quantized:
        return None
    if (
        state.activation is not None
        or state.made is not None
        or state.members is not None
        or not state.plan.applying.additive
    ):
        return None
    return _Stored(state, *how.stored, how.network.scale)


# -- A linear layer on few rows of input, without gradients: decoding, token by token ----------------------------------

# ``x (W + ΔW)ᵀ`` writes a sum as large as the weight, for a product that does little more than read it once. For few
# rows ``x Wᵀ + x ΔWᵀ`` is cheaper: nothing of the size of the weight is written. ΔW is cached in the weight's dtype.


#: Up to this many rows, the second product takes less time than the sum, whose rounding to half precision is slow.
MOST_ROWS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 32, torch.float16: 32}
#: For a smaller weight there is nothing to gain, and its outputs keep the bits that they have with gradients.
LEAST_ELEMENTS = 1 << 16


def has_few_rows(x: Tensor, weight: Tensor, slots: Sequence[AdapterSlot]) -> bool:
    """Return whether :func:`added_products` is the cheaper way to compute the output of a layer."""
    if torch.is_grad_enabled() or x.is_nested or x.ndim == 0 or weight.numel() < LEAST_ELEMENTS:
        return False
    if any(slot.target.transposed or not slot.adapter.plan.applying.additive for slot in slots):
        return False
    if x.numel() > MOST_ROWS.get(weight.dtype, 0) * x.shape[-1]:
        return False
    # An exported program has to contain the computation, as it is run without this library.
    return not torch.compiler.is_exporting() if torch.compiler.is_compiling() else not traced()


def added_products(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return ``x Wᵀ + b`` plus the product of x with each update; requires :func:`has_few_rows`."""
    y = functional.linear(x, weight, bias)
    for slot in slots:
        state = slot.adapter
        if torch.compiler.is_compiling():
            y = add_features(y, slot.target, scaled(state, _compiled_product(slot, x.to(y.dtype))))
            continue
        update = rounded_delta(slot, weight.dtype).to(x.device).reshape(-1, weight.shape[-1])
        scale = mixing_weight(state)
        # An uncached update keeps its own dtype if that is wider: converting it takes longer.
        change = _delta.wide_product(x, update)
        y = add_features(y, slot.target, change if scale == 1.0 else change * scale)
    return y


def _compiled_product(slot: AdapterSlot, x: Tensor) -> Tensor:
    cache, index = slot.adapter.cache, slot.index
    if x.device.type != "cpu" and cache.slice(index) is not None:
        # On a GPU such an update is not cached, and the compiler can fuse its computation.
        return _delta.wide_product(x, rounded_delta(slot, x.dtype).reshape(-1, x.shape[-1]))
    # The number is an attribute that the compiler guards on: a program is compiled again for another cache.
    arrays = current(slot.adapter, cache.names(index))
    return cast(Tensor, _delta.update_product(x, arrays, cache.number, index, cache.plan.shapes[index][0]))


# -- An embedding: rows of ΔW are looked up next to the rows of W ------------------------------------------------------

# The sum of two rows is a row of the sum, so this gives what the strategy "weight" gives, without computing W + ΔW for
# the whole vocabulary: the rows are added in the wider dtype and rounded once.
#
# - *factored*: rows of the left factor are looked up and multiplied by the right one; ΔW is never formed.
# - *additive*: ΔW is formed, as for a list of tokens' rows, and its rows are looked up.
#
# Only if the module's forward is known to be a lookup, possibly times a scale (:func:`is_lookup`). A quantized
# embedding runs its own forward, and the rows of updates are added to the output.


# What a subclass may do with the rows, such as in Gemma and BART.
_SCALES = ("super().forward({0}) * self.embed_scale", "super().forward({0}) * self.embed_scale.to(self.weight.dtype)")


def is_lookup(module: nn.Module) -> bool:
    """Return whether a module's forward is that of nn.Embedding, times ``embed_scale`` perhaps, or a quantized one's.

    Examples
    --------
    >>> is_lookup(nn.Embedding(5, 2)), is_lookup(nn.EmbeddingBag(5, 2))
    (True, False)
    """
    layer_type = quantized_type(module)
    if layer_type is not None and layer_type.looks_up(module):
        return True
    # Gradients of a factor cannot be scaled by token frequency.
    if not isinstance(module, nn.Embedding) or module.scale_grad_by_freq:
        return False
    cls: Any = type(module)
    return cls.forward is nn.Embedding.forward or _scales(cls.forward)


@functools.lru_cache(maxsize=256)
def _scales(forward: Any) -> bool:
    """Return whether a forward's source is one of :data:`_SCALES`."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(node, ast.FunctionDef) or len(node.args.args) != 2 or node.decorator_list:
        return False
    body = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return False
    return ast.unparse(body[0].value) in [text.format(node.args.args[1].arg) for text in _SCALES]


def embedded(module: nn.Embedding, weight: Tensor, ids: Tensor, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return the output of an embedding, its weight and the updates of slots looked up separately."""
    rows = functional.embedding(ids, weight, module.padding_idx)
    return _times_scale(module, _plus_rows(rows, slots, ids, module.padding_idx).to(weight.dtype))


def beside(module: nn.Module, y: Tensor, ids: Tensor, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return a quantized embedding's output ``y`` plus the updates of slots, looked up."""
    total = _plus_rows(torch.zeros_like(y), slots, ids, getattr(module, "padding_idx", None))
    return (y + _times_scale(module, total)).to(y.dtype)


def _times_scale(module: Any, rows: Tensor) -> Tensor:
    """Return rows scaled as in the forward of a module that :func:`is_lookup` knows."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or type(module).forward is nn.Embedding.forward:
        return rows
    product: Tensor = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
    return product


def _plus_rows(total: Tensor, slots: Sequence[AdapterSlot], ids: Tensor, padding: int | None) -> Tensor:
    """Add the rows of the slots' updates to rows."""
    ids = ids.to(total.device)
    for slot in slots:
        places, is_updated = _forms.updated_places(slot.target, ids)
        if slot.strategy == "factored":
            rows = scaled(slot.adapter, _factored_rows(factors(slot), places))
        else:
            update = delta(slot)
            rows = functional.embedding(places.to(update.device), update)
        rows = rows.to(total.device)
        if padding is not None:
            # As in nn.Embedding, the padding row has no gradient.
            rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
        total = total.to(torch.promote_types(total.dtype, rows.dtype))
        total = total + rows if is_updated is None else torch.where(is_updated.unsqueeze(-1), total + rows, total)
    return total


def _factored_rows(factored: Factored, places: Tensor) -> Tensor:
    """Return rows of an update from its factors."""
    total = functools.reduce(torch.add, [_rows_of_term(term, places) for term in factored.terms])
    return total if factored.scale == 1.0 else total * factored.scale


def _rows_of_term(term: Sequence[Matrix], places: Tensor) -> Tensor:
    """Return rows of a Kronecker product: products of rows of its matrices, whose indices are digits of the row's."""
    places = places.to(term[0].left.device)
    several: list[Tensor] = []
    for matrix in reversed(term):
        rows = functional.embedding(places % matrix.left.shape[0], matrix.left)
        places = torch.div(places, matrix.left.shape[0], rounding_mode="floor")
        several.append(rows if matrix.right is None else rows @ matrix.right.T)
    return functools.reduce(lambda last, rows: (rows.unsqueeze(-1) * last.unsqueeze(-2)).flatten(-2), several)


# -- W' for the slots of a layer or stack, the quotient of magnitude and norm, and additions to outputs ----------------


def updated_weight(
    operation: Operation,
    x: Tensor | None,
    stored: Tensor,
    bias: Tensor | None,
    slots: Sequence[AdapterSlot],
    drop: ColumnDropout | None = None,
    less: bool = False,
) -> Tensor:
    """Return the result of an operation with W', with ``less`` with W' - W; recomputed in backward where possible."""
    slots = sorted(slots, key=lambda slot: slot.target.index or 0)
    dropping = drop is not None and any(drop.acts(slot) for slot in slots)
    if dropping or traced() or not torch.is_grad_enabled() or (x is not None and x.is_nested):
        return operation(x, updated(stored, (_change(slot, stored, drop) for slot in slots), less), bias)
    updates, arrays = list[Update](), list[Tensor]()
    for slot in slots:
        state, params = slot.adapter, weight_params(slot.adapter, slot.index)
        source, of_delta, scale = _computation(slot)
        updates.append(
            Update(slot.target, state.plan.applying, source, len(of_delta), len(params), scale, state.detach_norm)
        )
        arrays += [*of_delta, *params]
    return recomputed(UpdatedWeight(operation, updates, less), x, stored, bias, *arrays)


def _computation(slot: AdapterSlot) -> tuple[_delta.Slice | None, list[Tensor], float]:
    """Return the arguments of :func:`tnadapt.torch._delta.computed` for the update of one weight."""
    state = slot.adapter
    source = None if torch.compiler.is_compiling() else state.cache.slice(slot.index)
    return (
        (source, [delta(slot)], 1.0) if source is None else (source, current(state, source.names), mixing_weight(state))
    )


def _change(slot: AdapterSlot, stored: Tensor, drop: ColumnDropout | None) -> Change:
    """Return the current change of one slot, differentiable."""
    state, update, params = slot.adapter, delta(slot), weight_params(slot.adapter, slot.index)
    applying = state.plan.applying
    change = Change(Update(slot.target, applying, None, 1, len(params), detach=state.detach_norm), update, params)
    if drop is not None and drop.acts(slot):
        change = change._replace(mask=drop.mask(slot, update))
    if applying.rescales and applying.scales_outputs and not torch.is_grad_enabled() and not traced():
        change = change._replace(quotient=quotient(slot, stored))
    if not applying.additive and torch.compiler.is_compiling():
        change = change._replace(inactive=_state.weight_on(state, stored.device) == 0)
    return change


def quotient(slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return q of one weight, one number for each row; ``stored`` is None for a quantized weight."""
    state = slot.adapter
    source, of_delta, scale = _computation(slot)
    arrays = [*of_delta, *weight_params(state, slot.index)]
    weight = functools.partial(base_rows, slot, stored)
    function = _delta.Quotient(state.plan.applying, weight, source, scale, state.detach_norm)
    trained = torch.is_grad_enabled()
    # The node passes no gradient to the weight, and traces must contain the single operations.
    if traced() or (trained and (state.detach_norm or (stored is not None and stored.requires_grad))):
        factor = function(*arrays)
        if torch.compiler.is_compiling():  # one program serves all mixing weights
            factor = torch.where(_state.weight_on(state, factor.device) == 0, torch.ones_like(factor), factor)
        return factor
    if trained:
        return recomputed(function, *arrays)
    if source is None or stored is None or stored.is_inference() or not _delta.can_cache(arrays, True):
        return function(*arrays)
    # The weight is too large to compare: it must be the same memory with the same version counter, which every in-place
    # operation changes. (A write through ``weight.data`` or NumPy does not.)
    names = (*source.names, *state.plan.weight_param_names[slot.index])
    settings = stored.data_ptr(), stored.dtype, _delta.version(stored), scale
    entry = state.quotients.entry(slot.index, names, arrays, lambda copies: {0: function(*copies)}, settings)
    return entry.tensors[0]


def scaled_output(y: Tensor, bias: Tensor | None, target: Target, scale: Tensor) -> Tensor:
    """Return a layer's output with the features of the target's rows times q; the bias is not scaled."""
    if target.rows is not None:
        # Ones for all other features.
        place = torch.ones(*scale.shape[:-1], target.out, dtype=scale.dtype, device=scale.device)
        scale = place.index_copy(-1, _forms.index_tensor(target, scale.device), scale)
    scale = scale.to(y.device)
    dtype = torch.promote_types(y.dtype, scale.dtype)
    product = y if bias is None else y - bias.to(y.device, y.dtype)
    return (y.to(dtype) + (scale - 1.0).to(dtype) * product.to(dtype)).to(y.dtype)


def added_matrix(slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return C, which is added to the weight and is not ΔW, in the dtype of the update."""
    applying, update = slot.adapter.plan.applying, delta(slot)
    base, wide = _delta.wide_pair(base_rows(slot, stored), update)
    return cast(Tensor, applying.change(load_backend("torch"), base, wide).to(update.dtype))


def base_rows(slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return the rows of the base weight, dequantized if ``stored`` is None."""
    weight: Any = numbers(slot.owner, slot.target.parameter) if stored is None else stored
    if weight is None:
        raise TargetError(f"the values of {slot.target.name} can no longer be read")
    return cast(Tensor, slot.target.select(weight))
