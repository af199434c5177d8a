"""The forward of an adapted layer or stack of experts: ΔW applied to the weight, to the output, or as factors.

A :class:`ForwardPatch` replaces the ``forward`` of one module instance. Nothing else about the module changes: class,
path, parameters and state dict stay the same. Wrapping the module, as PEFT does, or changing its class, as
parametrizations do, would be visible in names, state dicts and ``isinstance`` checks. A pair of hooks around the
forward could not clean up after an interrupted pass, for which torch runs no hook.

- *weight*: ``x (W + ΔW)ᵀ``; the sum is rounded once to the weight's dtype, and recomputed in backward instead of
  being saved. The only strategy for weights with several targets among their rows, weights that are read by something
  other than their own module's forward, and weights of convolutions.
- *factored*: ``x Wᵀ + s (x A) Bᵀ`` for one low-rank matrix per weight; ΔW is never formed. With an ``activation``
  between the two factors this is LoDA.
- *additive*: ``x Wᵀ + x ΔWᵀ``, for weights that cannot be added to (quantized ones).

For experts, whose products are inside a module's forward, :class:`LazyStack` does the last two.

If an adapter's W' is not a sum, no other adapter may act on the same rows (:meth:`ForwardPatch.rivals`).

A patch keeps no state of a running pass, so several threads may run the same module. Only ``_shadowed`` changes the
module for the duration of a forward, under a lock.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from tnadapt.algebra.factoring import Factored
from tnadapt.errors import TargetError

from . import _forms, _forward_pass
from ._delta import Function, recomputed, traced
from ._forms import ITSELF, LINEAR, Convolution
from ._forward_pass import LowRankLayer, PatchedParameter, dropped_inputs, factors, updated_weight
from ._quantized import is_packed, quantized_type
from ._state import AdapterSlot, AdapterState, assignment_of, mixing_weight, unnamed_member
from ._weights import shows_products

# -- Experts: updates added to the products of the tokens that are routed to them --------------------------------------

# The strategies "factored" and "additive" for one of the matrices that a parameter stacks: as in a linear layer, the
# update is added to the output of the product with W. Only experts that have tokens compute anything.


class RoutedChanges:
    """The updates of the matrices of one parameter, as functions of outputs and inputs.

    Parameters
    ----------
    patch : ForwardPatch
    stored : Tensor, shape (matrices, …, …)
        The base weight.
    slots : sequence of AdapterSlot
        Those that are added to outputs, and to the weight.
    """

    def __init__(self, patch: ForwardPatch, stored: Tensor, slots: Sequence[AdapterSlot]) -> None:
        self.patch, self.stored = patch, stored
        self.transposed = slots[0].target.transposed  # the same for all matrices of a parameter
        self.by_index: dict[Any, list[AdapterSlot]] = {}
        to_weight: list[AdapterSlot] = []
        for slot in slots:
            several = to_weight if slot.strategy == "weight" else self.by_index.setdefault(slot.target.index, [])
            several.append(slot)
        #: The weight that the module multiplies by: the base weight, or its sum with updates of the strategy "weight".
        self.base = updated_parameter(stored, to_weight, patch.host) if to_weight else stored
        #: Returns the changed weight with all updates, computed once, for operations other than products.
        self.total = functools.cache(lambda: updated_parameter(stored, slots, patch.host))

    def of_one(self, y: Tensor, x: Tensor, index: int) -> Tensor:
        """Return ``x W'ᵀ`` for one of the matrices, given ``y = x Wᵀ``."""
        slots, added = self.by_index.get(index, []), self.patch.added
        dropping = [slot for slot in slots if slot.adapter.dropout > 0.0 and self.patch.host.training]
        y = added(y, x, [slot for slot in slots if slot not in dropping], biased=False)
        for dropped, several in dropped_inputs(dropping, x):
            if several[0].adapter.plan.applying.additive:
                y = added(y, dropped, several, biased=False)
                continue
            # Only the change sees the input after dropout.
            matrix = self.base[index]
            plain = functional.linear(dropped, matrix.mT if self.transposed else matrix)
            y = y + (added(plain, dropped, several, biased=False) - plain)
        return y

    def of_segments(self, y: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the outputs for rows that are sorted by expert, given the numbers of rows of each.

        Parameters
        ----------
        y : Tensor, shape (n, out)
        x : Tensor, shape (n, in)
        counts : sequence of int
            Rows beyond their sum belong to no expert and are left alone.
        """
        if not any(counts[index] for index in self.by_index):
            return y
        sizes = [*counts, y.shape[0] - sum(counts)]
        parts = list(torch.split(y, sizes))
        for index, rows in enumerate(torch.split(x, sizes)[:-1]):
            if len(rows) and index in self.by_index:
                parts[index] = self.of_one(parts[index], rows, index)
        return torch.cat(parts)

    def of_batch(self, y: Tensor, x: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the outputs of a batch of products, each with the matrix of its number; None for each with its own.

        Parameters
        ----------
        y : Tensor, shape (batch, n, out)
        x : Tensor, shape (batch, n, in)
        numbers : Tensor of int, shape (batch,)
        """
        matrices, count = self.stored.shape[0], y.shape[1]
        if numbers is None:
            return self.of_segments(y.flatten(0, 1), x.flatten(0, 1), [count] * matrices).view(y.shape)
        order = torch.argsort(numbers, stable=True)
        counts = [count * number for number in torch.bincount(numbers, minlength=matrices).tolist()]
        outputs = self.of_segments(y[order].flatten(0, 1), x[order].flatten(0, 1), counts).view(y.shape)
        return outputs[torch.argsort(order)]


# -- Experts: a stacked parameter to which products add the updates, without forming the sum ---------------------------

# A module of experts multiplies by its parameters itself, each module in its own way: expert by expert (``linear(x,
# self.up_proj[i])``), sorted tokens by all experts (``grouped_mm``), or token by token (``bmm`` with
# ``self.up_proj[ids]``). :class:`LazyStack` replaces such a parameter while the module's forward runs, and intercepts
# every torch function that receives it (``__torch_function__``). Selecting matrices and transposing gives another lazy
# stack. A product is the product with W plus the updates of its experts (:class:`RoutedChanges`). For any other
# function, the changed weight is computed: a module that does something unknown gets the result of the strategy
# "weight", at its cost.
#
# It holds no data. Code that avoids ``__torch_function__``, such as a kernel that takes the address of its argument,
# fails instead of reading W by mistake.


#: A tensor of matrix numbers, one number, or None for all matrices.
Picked = Tensor | int | None


class LazyStack(Tensor):
    """The changed matrices of experts, all or some of them, as an operand of products.

    Parameters
    ----------
    changes : RoutedChanges
    base : Tensor, optional
        The matrices without the changes, as they are presented here.
    picked : int or Tensor of int, optional
        Which of them.
    flipped : bool
        Whether they are presented as the transposes of what is stored.
    """

    changes: RoutedChanges
    base: Tensor
    picked: Picked
    flipped: bool

    @staticmethod
    def __new__(
        cls, changes: RoutedChanges, base: Tensor | None = None, picked: Picked = None, flipped: bool = False
    ) -> LazyStack:
        """Return a tensor without storage."""
        base = changes.base if base is None else base
        stack: Any = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        stack.changes, stack.base, stack.picked, stack.flipped = changes, base, picked, flipped
        return cast(LazyStack, stack)

    @property
    def takes_rows(self) -> bool:
        """Whether a row of x is multiplied from the left, ``x @ matrix``: the matrices are presented as (in, out)."""
        return self.changes.transposed != self.flipped

    def formed(self) -> Tensor:
        """Return the changed matrices as an ordinary tensor."""
        total = self.changes.total()
        total = total if self.picked is None else total[self.picked]
        return total.mT if self.flipped else total

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply a function of torch: as a product where it is one, else to the changed weight."""
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func) or _RULES.get(str(func))
        known = rule is not None and kwargs.keys() <= _KEYWORDS.get(rule, set())
        result = rule(func, *args, **kwargs) if rule is not None and known else None
        return func(*_formed(args), **_formed(kwargs)) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise: nothing below torch's functions may take it for the weight."""
        raise RuntimeError(
            f"{func} reached the matrices of experts past torch's functions, so that their updates cannot be applied: "
            "attach the adapter with strategy='weight'"
        )


def _formed(values: Any) -> Any:
    return tree_map(lambda value: value.formed() if isinstance(value, LazyStack) else value, values)


# -- Selecting and transposing -----------------------------------------------------------------------------------


def _item(func: Any, stack: Any, index: Any) -> Tensor | None:
    """Return one matrix of a stack, or several by a tensor of indices."""
    if not isinstance(stack, LazyStack) or stack.picked is not None:
        return None
    changes, whole = stack.changes, isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if whole and index.ndim == 1:
        return LazyStack(changes, stack.base[index], index, stack.flipped)
    if not (whole and index.ndim == 0) and type(index) is not int:
        return None
    number = int(index)
    base = stack.base[number]
    number %= changes.stored.shape[0]
    return LazyStack(changes, base, number, stack.flipped) if number in changes.by_index else base


def _transposed(func: Any, stack: Any, *dims: Any, **named: Any) -> Tensor | None:
    """Return the stack with its last two axes exchanged."""
    dims = (*dims, *named.values())
    if not isinstance(stack, LazyStack) or {dim % stack.ndim for dim in dims} != {stack.ndim - 2, stack.ndim - 1}:
        return None
    return LazyStack(stack.changes, stack.base.mT, stack.picked, not stack.flipped)


def _as_t(func: Any, stack: Any) -> Tensor | None:
    return _transposed(func, stack, -2, -1) if stack.ndim == 2 else None


# -- Products ----------------------------------------------------------------------------------------------------


def _linear_product(func: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return ``x W'ᵀ + b`` for one matrix."""
    if isinstance(input, LazyStack) or isinstance(bias, LazyStack) or not isinstance(weight.picked, int):
        return None
    if weight.takes_rows:
        return None
    y: Tensor = weight.changes.of_one(functional.linear(input, weight.base), input, weight.picked)
    return y if bias is None else y + bias


def _matmul(func: Any, input: Any, other: Any) -> Tensor | None:
    """Return ``x W'`` for one matrix."""
    if isinstance(input, LazyStack) or not isinstance(other.picked, int) or not other.takes_rows or input.ndim == 0:
        return None
    return cast(Tensor, other.changes.of_one(func(input, other.base), input, other.picked))


def _bmm(func: Any, one: Any, other: Any) -> Tensor | None:
    """Return a product for each of several matrices: all of them, or those of a list of numbers."""
    if isinstance(one, LazyStack):
        if isinstance(other, LazyStack) or one.takes_rows:
            return None
        y = torch.bmm(one.base, other)
        return one.changes.of_batch(y.mT, other.mT, cast(Any, one.picked)).mT
    if not other.takes_rows:
        return None
    return cast(Tensor, other.changes.of_batch(torch.bmm(one, other.base), one, other.picked))


def _grouped(func: Any, one: Any, other: Any, offs: Any = None) -> Tensor | None:
    """Return a product for rows that are sorted by matrix; ``offs`` are the ends of their segments."""
    lazy = isinstance(other, LazyStack) and not isinstance(one, LazyStack)
    if not lazy or offs is None or one.ndim != 2 or other.picked is not None or not other.takes_rows:
        return None
    y = func(one, other.base, offs=offs)
    ends = offs.tolist()
    counts = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    return cast(Tensor, other.changes.of_segments(y, one, counts))


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.mT.__get__: lambda func, stack: _transposed(func, stack, -2, -1),  # type: ignore[attr-defined]
    Tensor.T.__get__: _as_t,  # type: ignore[attr-defined]
    Tensor.t: _as_t,
    torch.t: _as_t,
    functional.linear: _linear_product,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    # Each if this version of torch has it; the last is transformers' own, for when torch has none.
    getattr(functional, "grouped_mm", None): _grouped,
    getattr(torch, "_grouped_mm", None): _grouped,
    "transformers.grouped_mm_fallback": _grouped,
}

#: Their keywords; a call with others, such as ``out``, does not count as a product.
_KEYWORDS: dict[Any, set[str]] = {
    _linear_product: {"input", "weight", "bias"},
    _grouped: {"offs"},
    _transposed: {"dim0", "dim1"},
}

#: Functions that depend on a tensor's shape, dtype and device, but not on its values.
_METHODS = "size dim stride numel __len__ is_floating_point element_size get_device is_contiguous is_complex"
_PROPERTIES = "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse"
_ABOUT: set[Any] = {
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    torch.is_floating_point,
    torch.numel,
}


# -- A module's parameter together with the updates that act on it -----------------------------------------------------


def is_read(slot: AdapterSlot) -> bool:
    """Return whether a slot acts where the module reads the parameter, and not on the module's output."""
    return slot.strategy == "weight" or slot.target.index is not None


def updated_parameter(stored: Tensor, slots: Sequence[AdapterSlot], host: nn.Module) -> Tensor:
    """Return W' as a tensor, for a module that reads it."""
    return updated_weight(ITSELF, None, stored, None, slots, _forward_pass.ColumnDropout(host))


def changed_parameter(patch: ForwardPatch, patched: PatchedParameter, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return what stands in the place of a parameter: the sum, or for experts a stack that products add updates to."""
    stored = patched.tensor
    # A stack reads each expert's number of tokens from the device: not in a trace, which must hold for all inputs, nor
    # in a captured graph, nor on the meta device.
    unread = traced() or stored.is_meta or (stored.is_cuda and torch.cuda.is_current_stream_capturing())
    if unread or all(slot.strategy == "weight" for slot in slots) or not shows_products(patched.owner):
        return updated_parameter(stored, slots, patch.host)
    return LazyStack(RoutedChanges(patch, stored, slots))


# -- The gradient of a layer that rounds its input, as if nothing were rounded -----------------------------------------

# Layers that quantize their input in each call (int8 by int8) have no backward: rounding has none. Without it, the
# arrays of all adapted layers before them would silently get only a part of their gradients.


class StraightThrough(Function):
    """The forward of a layer as a function of its input, with the gradient of its dequantized weight."""

    keeps = "nothing"

    def __init__(self, host: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        self.host, self.run = host, run

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    def vjp(self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> list[Tensor]:
        layer_type = quantized_type(self.host)
        weight = None if layer_type is None else layer_type.dequantize(self.host)
        if weight is None:
            raise TargetError(
                f"{type(self.host).__name__} passes no gradient to its input, and its weight cannot be dequantized to "
                "compute one: attach to a freshly loaded model, before its first evaluation, or use a type of "
                "quantization that leaves the input alone"
            )
        return [gradient @ weight.to(gradient.dtype)]


# -- The forward of an adapted layer -----------------------------------------------------------------------------------


STRATEGIES = ("auto", "weight", "factored", "additive")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class ForwardPatch:
    """The replacement for one module's ``forward``.

    Parameters
    ----------
    host : Module
        The module whose forward is replaced. Usually it owns the weights; where a parent reads a child's weight
        directly, the parent is the host.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.weights: list[PatchedParameter] = []
        #: The forward set on the instance before, such as by accelerate; None if it was the class's.
        self.before: Callable[..., Any] | None = host.__dict__.get("forward")
        #: Whether the original is the unmodified forward of torch's Linear or convolutions, on the host's own weight.
        self.is_plain = False
        #: Whether the original is the forward of an embedding, so that rows can be looked up in updates.
        self.looks_up = False
        #: The fast path through the host, if its updates allow it; None while they change.
        self.short: LowRankLayer | None = None
        layer_type = quantized_type(host)
        self.is_quantized = layer_type is not None
        #: Whether backward through the original does not reach its input, because it rounds it.
        self.blocks = layer_type is not None and not layer_type.passes_gradient(host)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied or pickled: a copy gets a new one.
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @classmethod
    def of(cls, host: nn.Module) -> ForwardPatch | None:
        """Return the patch of a module, or None."""
        patch = host.__dict__.get("forward")
        return patch if isinstance(patch, ForwardPatch) else None

    def add(self, slot: AdapterSlot) -> None:
        """Add a slot to this module."""
        self.short = None
        patched = self._patched(slot)
        if patched is None:
            patched = PatchedParameter(slot.owner, slot.target.parameter)
            self.weights.append(patched)
            self.is_plain = self._is_plain()
            self.looks_up = self.before is None and _forward_pass.is_lookup(self.host)
        patched.put([*patched.slots, slot])
        self._look_for_short()

    def _patched(self, slot: AdapterSlot) -> PatchedParameter | None:
        return next((patched for patched in self.weights if patched.among([slot])), None)

    def exchange(self, slots: Mapping[AdapterSlot, AdapterSlot]) -> None:
        """Put other slots in the place of some, each for the same weight."""
        self.short = None
        for patched in self.weights:
            patched.slots = [slots.get(slot, slot) for slot in patched.slots]
        self._look_for_short()

    def install(self) -> None:
        """Replace the module's forward."""
        # The patch itself rather than a bound method: accelerate unwraps methods.
        self.host.forward = self

    def remove(self, adapter: AdapterState) -> None:
        """Remove an adapter's slots; with the last one, restore the module's forward."""
        self.short = None
        for patched in self.weights:
            patched.put([slot for slot in patched.slots if slot.adapter is not adapter])
        self.weights = [patched for patched in self.weights if patched.slots]
        self._look_for_short()
        if not self.weights:
            if self.before is None:
                self.host.__dict__.pop("forward", None)
            else:
                self.host.__dict__["forward"] = self.before

    def _look_for_short(self) -> None:
        self.short = LowRankLayer.of(self.host, self.weights) if self.is_plain else None

    def rivals(self, adapter: AdapterState) -> list[AdapterState]:
        """Return the adapters of the same rows with which this one does not add up."""
        pairs = [(slot.adapter, other.adapter) for patched in self.weights for slot, other in patched.rivals]
        return [state for pair in pairs if adapter in pair for state in pair if state is not adapter]

    # -- Forward -----------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward with every active update."""
        if self.short is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            y = self.short(args[0])
            if y is not None:
                return y
        for patched in self.weights:  # plain loops: any() of a generator takes as long as a small layer's overhead
            for slot in patched.slots:
                if slot.adapter.by_rows:
                    runner = slot.adapter.row_runner
                    assert runner is not None
                    return runner(self, args, kwargs)
        return self.run(self.acting(), args, kwargs)

    def acting(self, alone: bool = True) -> list[AdapterSlot]:
        """Return the slots of active adapters; with ``alone``, check that those that have to be alone are."""
        acting: list[AdapterSlot] = []
        compiling = torch.compiler.is_compiling()
        recomputing = not compiling and _forward_pass.in_backward()
        for patched in self.weights:
            if alone and patched.rivals and not compiling:
                patched.check_alone()
            for slot in patched.slots:
                if recomputing:
                    _forward_pass.check_recomputation(slot.adapter)
                if not _forward_pass.acts(slot.adapter):
                    continue
                if not compiling:  # for the warning that no patch ran; a changing set would break the graph
                    slot.adapter.threads.add(threading.get_ident())
                acting.append(slot if slot.adapter.members is None else _of_member(slot))
        return acting

    def run(self, acting: Sequence[AdapterSlot], args: Any, kwargs: Any, drop: bool = True) -> Any:
        """Run the module's forward with the updates of these slots; with ``drop=False`` without dropout."""
        # Updates are sorted by whether they are added to the weight or to the output.
        dropping: list[AdapterSlot] = []
        to_weights: list[AdapterSlot] = []
        to_output: list[AdapterSlot] = []
        for slot in acting:
            if drop and _forward_pass.drops_input(slot, self.host):
                dropping.append(slot)
            else:
                (to_weights if is_read(slot) else to_output).append(slot)
        if to_output and self.looks_up:
            return self._embedded(to_weights, to_output, args, kwargs)
        known: list[Factored] = []
        if to_output and not to_weights and not dropping and self._can_factor(to_output, args, kwargs):
            known = [factors(slot) for slot in to_output]
            y = self._fused(args[0], to_output, known)
            if y is not None:
                return self.rescaled(y, to_output)
        y = self._base(to_weights, args, kwargs)
        if to_output:
            y = self.added(y, _input(args, kwargs), to_output, known)
        return self._with_dropout(y, dropping, _input(args, kwargs)) if dropping else y

    def added(
        self, y: Tensor, x: Tensor, slots: Sequence[AdapterSlot], known: Sequence[Factored] = (), biased: bool = True
    ) -> Tensor:
        """Return an output plus what slots add to it, whose factors may be known."""
        for number, slot in enumerate(slots):
            y = _forms.add_features(y, slot.target, self.output(slot, x, known[number] if known else None))
        return self.rescaled(y, slots, biased)

    def _with_dropout(self, y: Tensor, dropping: Sequence[AdapterSlot], x: Tensor) -> Tensor:
        """Return the output plus the updates of adapters that apply dropout to their input."""
        for dropped, slots in dropped_inputs(dropping, x):
            if all(slot.strategy != "weight" for slot in slots) and slots[0].adapter.plan.applying.additive:
                y = self.added(y, dropped, slots)
            elif self.is_plain:
                y = y + self._product(dropped, slots, less=True)
            else:
                # Right for any layer that is linear in x, whatever its W' is; the bias cancels.
                y = y + (self.run(slots, (dropped,), {}, drop=False) - self._original(dropped))
        return y

    def _embedded(self, to_weight: list[AdapterSlot], added: list[AdapterSlot], args: Any, kwargs: Any) -> Tensor:
        """Return the output of an embedding, with rows of updates looked up like those of the weight."""
        host: Any = self.host
        if self.is_quantized:
            return _forward_pass.beside(host, self._original(*args, **kwargs), _input(args, kwargs), added)
        stored = self.weights[0].tensor
        weight = updated_parameter(stored, to_weight, self.host) if to_weight else stored
        return _forward_pass.embedded(host, weight, _input(args, kwargs), added)

    def rescaled(
        self,
        y: Tensor,
        slots: Sequence[AdapterSlot],
        biased: bool = True,
        quotient: Callable[[AdapterSlot, Tensor | None], Tensor] = _forward_pass.quotient,
    ) -> Tensor:
        """Return an output with the features scaled that a magnitude scales; the bias in it is not."""
        for slot in slots:
            if slot.adapter.plan.applying.rescales:
                bias = getattr(self.host, "bias", None) if biased else None
                y = _forward_pass.scaled_output(y, bias, slot.target, quotient(slot, self._stored(slot)))
        return y

    def _stored(self, slot: AdapterSlot) -> Tensor | None:
        """Return the base weight of a slot as the module has it now, or None if it is quantized."""
        patched = None if slot.quantized else self._patched(slot)
        return None if patched is None else patched.tensor

    def _base(self, to_weights: list[AdapterSlot], args: Any, kwargs: Any) -> Any:
        if self.is_plain and not args and list(kwargs) == ["input"]:
            args, kwargs = (kwargs["input"],), {}
        plain = self.is_plain and len(args) == 1 and not kwargs
        if not to_weights:
            # Another thread, with other rows of adapters, may be shadowing a weight with its sum at this moment.
            summing = not plain and any(is_read(slot) for patched in self.weights for slot in patched.slots)
            return self._shadowed([], args, kwargs) if summing else self._original(*args, **kwargs)
        # The fast path for nearly all layers: the sum is passed as an argument, without shadowing and lock. Only for
        # torch's own forwards, because a subclass may do more in its forward.
        return self._product(args[0], to_weights) if plain else self._shadowed(to_weights, args, kwargs)

    def _product(self, x: Tensor, slots: Sequence[AdapterSlot], less: bool = False) -> Tensor:
        """Return the output of a plain layer with W', or if ``less`` with W' - W and without bias."""
        host: Any = self.host
        stored, bias = self.weights[0].tensor, None if less else host.bias
        if isinstance(host, nn.Linear):
            if not less and _forward_pass.has_few_rows(x, stored, slots):
                return _forward_pass.added_products(x, stored, bias, slots)
            return updated_weight(LINEAR, x, stored, bias, slots, less=less)
        operation = Convolution.of(host, x)
        if operation is not None:
            return updated_weight(operation, x, stored, bias, slots, less=less)
        weight = updated_weight(ITSELF, None, stored, None, slots, less=less)
        return cast(Tensor, host._conv_forward(x, weight, bias))

    def _can_factor(self, added: list[AdapterSlot], args: Any, kwargs: Any) -> bool:
        """Return whether all updates are factors that a linear layer can accumulate in its output."""
        if not (self.is_plain and isinstance(self.host, nn.Linear) and len(args) == 1 and not kwargs):
            return False
        if any(slot.strategy != "factored" or slot.adapter.activation is not None for slot in added):
            return False
        return isinstance(args[0], Tensor) and _forms.is_ordinary(args[0])

    def _fused(self, x: Tensor, added: list[AdapterSlot], known: Sequence[Factored]) -> Tensor | None:
        """Return the output of the fused computation, if all tensors have the same dtype."""
        changes = [
            (slot.target, factored._replace(scale=factored.scale * mixing_weight(slot.adapter)))
            for slot, factored in zip(added, known, strict=True)
        ]
        weight, bias = self.weights[0].tensor, cast(Any, self.host).bias
        return _forms.factored_linear(x, weight, bias, changes) if _forms.can_fuse(x, weight, changes) else None

    def _is_plain(self) -> bool:
        if self.before is not None or len(self.weights) != 1 or self.weights[0].owner is not self.host:
            return False
        if self.weights[0].parameter != "weight" or type(self.host).forward not in _forward_pass.LINEAR_FORWARDS:
            return False
        held = self.host._parameters.get("weight")
        return held is None or not is_packed(held)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (self.blocks and isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad):
            return self._run(*args, **kwargs)
        y = recomputed(StraightThrough(self.host, self._run), x)
        bias = self.host._parameters.get("bias")
        # Nothing is added, except to the gradient.
        return y if bias is None or not bias.requires_grad else y + (bias - bias.detach()).to(y.dtype)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _shadowed(self, slots: list[AdapterSlot], args: Any, kwargs: Any) -> Any:
        """Run the original forward with the sum shadowing the weight that it reads."""
        # Python looks up an attribute in the instance's ``__dict__`` first and calls ``Module.__getattr__``, which
        # finds parameters, only if it is missing. So a sum in ``__dict__`` shadows the parameter for ``self.weight``,
        # while the parameter stays registered and unchanged: ``parameters()`` and the state dict never show the sum.
        read = [patched for patched in self.weights if patched.among(slots)]
        names = [(patched.owner, patched.parameter) for patched in read]
        sums = [changed_parameter(self, patched, patched.among(slots)) for patched in read]
        # All threads see the shadow. Without the lock, a second thread could compute with this thread's sum (of another
        # dtype, graph or mixing weight), or read the base weight after this thread has removed the shadow. The lock is
        # reentrant because a forward may call itself. The sums are computed outside of it, so that threads wait only
        # for the layer. A compiler traces in a single thread and could not trace the lock.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock:
            return self._covered(names, sums, args, kwargs)

    def _covered(self, names: Sequence[tuple[nn.Module, str]], sums: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        try:
            try:
                for (owner, name), total in zip(names, sums, strict=True):
                    owner.__dict__[name] = total
                return self._original(*args, **kwargs)
            finally:
                _uncover(names)
        finally:
            # Repeated, because a KeyboardInterrupt may arrive during the first cleanup, and a remaining sum would pass
            # for the weight from then on.
            _uncover(names)

    def output(self, slot: AdapterSlot, x: Tensor, factored: Factored | None = None) -> Tensor:
        """Return what the update adds to the output; ``factored`` are its factors, if they have been computed."""
        adapter = slot.adapter
        if slot.strategy != "factored":  # rows() adds small updates of weights, too
            plain = adapter.plan.applying.takes_factors
            update = _forward_pass.delta(slot) if plain else _forward_pass.added_matrix(slot, self._stored(slot))
            autocast = torch.is_autocast_enabled(x.device.type)
            return functional.linear(x, update.to(x.device) if autocast else update.to(x))
        factored = factors(slot) if factored is None else factored
        first = factored.terms[0][0].left
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(first.dtype)
        if x.device != first.device:
            factored = _forms.on_device(factored, x.device)
        activation = None if adapter.activation is None else ACTIVATIONS[adapter.activation]
        return _forward_pass.scaled(adapter, _forms.product(x, factored, activation))


def _of_member(slot: AdapterSlot) -> AdapterSlot:
    """Return a population's slot for the member that acts on all rows; the slot itself where rows have members."""
    state = slot.adapter
    if state.by_rows and assignment_of(state) is not None:
        return slot
    active = cast(Any, state.members).active
    if active is None:
        raise unnamed_member(state)
    return slot if torch.compiler.is_compiling() else cast(AdapterSlot, active.slot(slot))


def _uncover(names: Sequence[tuple[nn.Module, str]]) -> None:
    """Remove the sums that shadow parameters."""
    for owner, name in names:
        owner.__dict__.pop(name, None)


def _input(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
