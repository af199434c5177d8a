"""The forward of an adapted layer, which applies ΔW: to the weight, to the output, or as low-rank factors.

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

For experts, whose products are inside a module's forward, :mod:`tnadapt.torch._experts_forward` does the last two.

That is for ``apply="add"``. :mod:`tnadapt.torch._changed_forward` has the same strategies for W' that is not a sum, of
an adapter that has to act on its rows alone (:meth:`ForwardPatch.rivals`).

A patch keeps no state of a running pass, so several threads may run the same module. Only ``_shadowed`` changes the
module for the duration of a forward, under a lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.algebra.factoring import Factored
from tnadapt.errors import TargetError

from ._changed_forward import added_matrix, changed_linear, scaled_output
from ._delta import in_dispatch_mode, in_functorch
from ._experts_forward import changed_parameter, is_read, parameter_sum
from ._forward_pass import (
    LowRankLayer,
    PatchedParameter,
    acts,
    added_products,
    beside,
    check_recomputation,
    delta,
    delta_source,
    dropped_inputs,
    drops_input,
    embedded,
    factors,
    has_few_rows,
    in_backward,
    is_lookup,
    scaled,
)
from ._linear import (
    DeltaSource,
    MergedWeightLinear,
    add_features,
    can_fuse,
    factored_linear,
    on_device,
    product,
    summed,
)
from ._quantized import is_packed, quantized_type
from ._state import AdapterSlot, AdapterState, mixing_weight

__all__ = ["ACTIVATIONS", "STRATEGIES", "ForwardPatch", "blocks_gradient", "straight_through"]


# ----------------------------------------------------------------------------------------------------------------------
# The gradient of a layer that rounds its input: that of x times the dequantized weight, as if nothing were rounded

# Layers that quantize their input in each call (int8 by int8) have no backward: rounding has none. Without one, the
# arrays of all adapted layers before them would silently get a part of their gradients only.


def blocks_gradient(module: nn.Module) -> bool:
    """Return whether backward through a layer does not compute the gradient of its input."""
    kind = quantized_type(module)
    return kind is not None and not kind.passes_gradient(module)


def straight_through(x: Tensor, host: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a layer's output, with the gradient of the product with its dequantized weight.

    Parameters
    ----------
    x : Tensor
    host : Module
        The layer.
    run : callable
        Its forward.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    y = cast(Tensor, _StraightThrough.apply(x, host, run))  # type: ignore[no-untyped-call]
    bias: Any = host._parameters.get("bias")
    # Nothing is added, except to the gradient.
    return y if bias is None or not bias.requires_grad else y + (bias - bias.detach()).to(y.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, host: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.host, ctx.dtype = host, x.dtype
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        kind = quantized_type(ctx.host)
        weight = None if kind is None else kind.dequantize(ctx.host)
        if weight is None:
            raise TargetError(
                f"{type(ctx.host).__name__} passes no gradient to its input, and its weight cannot be dequantized to "
                "compute one: attach to a freshly loaded model, before its first evaluation, or use a type of "
                "quantization that leaves the input alone"
            )
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None, None


# -- The forward of an adapted layer, which applies ΔW: to the weight, to the output, or as low-rank factors -----------


STRATEGIES = ("auto", "weight", "factored", "additive")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


#: A slot with the parameter that it updates.
Placed = tuple[PatchedParameter, AdapterSlot]


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
        #: The forward that was set on the instance before, by accelerate say; None where it is the class's.
        self.before: Callable[..., Any] | None = host.__dict__.get("forward")
        #: Whether the original is the unmodified forward of torch's Linear or convolutions, on the host's own weight.
        self.is_plain = False
        #: Whether the original is the forward of an embedding, so that rows can be looked up in updates.
        self.looks_up = False
        #: The shortest way through the host, where its updates allow it; None while they change.
        self.short: LowRankLayer | None = None
        self.is_quantized = quantized_type(host) is not None
        #: Whether backward through the original does not reach its input, because it rounds it.
        self.blocks = blocks_gradient(host)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied or pickled: a copy gets a new one.
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @classmethod
    def of(cls, host: nn.Module) -> ForwardPatch | None:
        """Return the patch of a module, or None."""
        found = host.__dict__.get("forward")
        return found if isinstance(found, ForwardPatch) else None

    def add(self, slot: AdapterSlot) -> None:
        """Add a slot to this module."""
        self.short = None
        for patched in self.weights:
            if patched.owner is slot.owner and patched.parameter == slot.target.parameter:
                patched.put([*patched.slots, slot])
                break
        else:
            self.weights.append(PatchedParameter(slot.owner, slot.target.parameter))
            self.weights[-1].put([slot])
            self.is_plain = self._is_plain()
            self.looks_up = self.before is None and is_lookup(self.host)
        self._look_for_short()

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
        pairs = [(one.adapter, other.adapter) for patched in self.weights for one, other in patched.rivals]
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

    def acting(self, alone: bool = True) -> list[Placed]:
        """Return the slots of active adapters; with ``alone``, check that those that have to be alone are."""
        found: list[Placed] = []
        compiling = torch.compiler.is_compiling()
        recomputing = not compiling and in_backward()
        for patched in self.weights:
            if alone and patched.rivals and not compiling:
                patched.check_alone()
            for slot in patched.slots:
                if recomputing:
                    check_recomputation(slot.adapter)
                if not acts(slot.adapter):
                    continue
                if not compiling:  # for the warning that no patch was used; a changing set would break the graph
                    slot.adapter.threads.add(threading.get_ident())
                found.append((patched, slot))
        return found

    def run(self, acting: Sequence[Placed], args: Any, kwargs: Any, drop: bool = True) -> Any:
        """Run the module's forward with the updates of these slots; with ``drop=False`` without dropout."""
        # Updates are sorted by what they are added to: the weight or the output.
        to_weights: list[tuple[PatchedParameter, list[AdapterSlot]]] = []
        to_output: list[AdapterSlot] = []
        dropping: list[Placed] = []
        for patched, slot in acting:
            if drop and drops_input(slot, self.host):
                dropping.append((patched, slot))
            elif not is_read(slot):
                to_output.append(slot)
            elif to_weights and to_weights[-1][0] is patched:
                to_weights[-1][1].append(slot)
            else:
                to_weights.append((patched, [slot]))
        ready: list[Factored] = []
        if to_output and not to_weights and not dropping and not torch.compiler.is_compiling():
            fused = self._fused(to_output, args, kwargs, ready)
            if fused is not None:
                return self.rescaled(fused, to_output)
        if to_output and self.looks_up:
            return self._embedded(to_weights, to_output, args, kwargs)
        y = self._base(to_weights, args, kwargs)
        if to_output:
            x = _input(args, kwargs)
            for number, slot in enumerate(to_output):
                y = add_features(y, slot.target, self.output(slot, x, ready[number] if ready else None))
            y = self.rescaled(y, to_output)
        return self._with_dropout(y, dropping, _input(args, kwargs)) if dropping else y

    def _with_dropout(self, y: Tensor, dropping: Sequence[Placed], x: Tensor) -> Tensor:
        """Return the output plus what adapters add to it that drop elements of their input."""
        for dropped, slots in dropped_inputs([slot for _, slot in dropping], x):
            if all(slot.strategy != "weight" for slot in slots) and slots[0].adapter.plan.applying.additive:
                for slot in slots:
                    y = add_features(y, slot.target, self.output(slot, dropped))
                continue
            own = [placed for placed in dropping if placed[1] in slots]
            if isinstance(self.host, nn.Linear) and self.is_plain and own[0][0].sums:
                # Plus a weight of zeros: in backward the update is recomputed, as without dropout.
                zeros = own[0][0].tensor.new_zeros(()).expand(own[0][0].tensor.shape)
                y = y + _linear(dropped, zeros, None, slots)
            else:
                # Right for any layer that is linear in x, whatever its W' is; the bias cancels.
                y = y + (self.run(own, (dropped,), {}, drop=False) - self._original(dropped))
        return y

    def _embedded(
        self,
        to_weights: list[tuple[PatchedParameter, list[AdapterSlot]]],
        added: list[AdapterSlot],
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """Return the output of an embedding, whose updates are looked up like its weight."""
        host: Any = self.host
        if self.is_quantized:
            return beside(host, self._original(*args, **kwargs), _input(args, kwargs), added)
        weight = parameter_sum(*to_weights[0], self.host) if to_weights else self.weights[0].tensor
        return embedded(host, weight, _input(args, kwargs), added)

    def rescaled(self, y: Any, added: list[AdapterSlot]) -> Any:
        """Return the output with the features scaled that a magnitude scales."""
        for slot in added:
            if slot.adapter.plan.applying.rescales:
                y = scaled_output(y, getattr(self.host, "bias", None), slot, self._stored(slot))
        return y

    def _stored(self, slot: AdapterSlot) -> Tensor | None:
        """Return the base weight of a slot as the module has it now; None if it is quantized."""
        if slot.quantized:
            return None
        return next(
            one.tensor for one in self.weights if one.owner is slot.owner and one.parameter == slot.target.parameter
        )

    def _base(self, to_weights: list[tuple[PatchedParameter, list[AdapterSlot]]], args: Any, kwargs: Any) -> Any:
        if self.is_plain and not args and list(kwargs) == ["input"]:
            args, kwargs = (kwargs["input"],), {}
        plain = self.is_plain and len(args) == 1 and not kwargs
        if not to_weights:
            # Another thread, with other rows of adapters, may have its sum in the place of a weight at this moment.
            summing = not plain and any(is_read(slot) for one in self.weights for slot in one.slots)
            return self._shadowed([], args, kwargs) if summing else self._original(*args, **kwargs)
        # The fast path for nearly all layers: the sum is passed as an argument, without shadowing and lock. Only for
        # torch's own forwards (_PLAIN), because a subclass may do more in its forward.
        if plain:
            patched, here = to_weights[0]
            host: Any = self.host
            if isinstance(host, nn.Linear):
                if not patched.sums:
                    return changed_linear(args[0], patched.tensor, host.bias, here)
                return _linear(args[0], patched.tensor, host.bias, here)
            if isinstance(host, nn.modules.conv._ConvNd):
                return host._conv_forward(args[0], parameter_sum(patched, here, host), host.bias)
        return self._shadowed(to_weights, args, kwargs)

    def _fused(self, added: list[AdapterSlot], args: Any, kwargs: Any, ready: list[Factored]) -> Tensor | None:
        """Return the output if all updates are factored and of a linear layer's dtype; else None, and the factors."""
        host, x = self.host, args[0] if len(args) == 1 and not kwargs else None
        if not (self.is_plain and isinstance(host, nn.Linear) and isinstance(x, Tensor)):
            return None
        if any(slot.strategy != "factored" or slot.adapter.activation is not None for slot in added):
            return None
        changes = []
        for slot in added:
            found = factors(slot)
            ready.append(found)
            changes.append((slot.target, found._replace(scale=found.scale * mixing_weight(slot.adapter))))
        weight = self.weights[0].tensor
        return factored_linear(x, weight, host.bias, changes) if can_fuse(x, weight, changes) else None

    def _is_plain(self) -> bool:
        if self.before is not None or len(self.weights) != 1 or self.weights[0].owner is not self.host:
            return False
        if self.weights[0].parameter != "weight" or type(self.host).forward not in _PLAIN:
            return False
        held = self.host._parameters.get("weight")
        return held is None or not is_packed(held)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self.blocks and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return straight_through(args[0], self.host, self._run)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _shadowed(self, to_weights: list[tuple[PatchedParameter, list[AdapterSlot]]], args: Any, kwargs: Any) -> Any:
        """Run the original forward, with the sum in the place where it reads the weight.

        Python looks up an attribute in the instance's ``__dict__`` first and calls ``Module.__getattr__``, which finds
        parameters, only if it is missing. So a sum in ``__dict__`` shadows the parameter for ``self.weight``, while the
        parameter stays registered and unchanged: ``parameters()`` and the state dict never show the sum.
        """
        names = [(patched.owner, patched.parameter) for patched, _ in to_weights]
        sums = [changed_parameter(patched, here, self.host, self.output) for patched, here in to_weights]
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

    def output(self, slot: AdapterSlot, x: Tensor, found: Factored | None = None) -> Tensor:
        """Return what the update adds to the output; ``found`` are its factors, if they have been computed."""
        adapter = slot.adapter
        if slot.strategy == "additive":
            plain = adapter.plan.applying.takes_factors
            update = delta(slot) if plain else added_matrix(slot, self._stored(slot))
            autocast = torch.is_autocast_enabled(x.device.type)
            return functional.linear(x, update.to(x.device) if autocast else update.to(x))
        found = factors(slot) if found is None else found
        first = found.terms[0][0].left
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(first.dtype)
        if x.device != first.device:
            found = on_device(found, x.device)
        activation = None if adapter.activation is None else ACTIVATIONS[adapter.activation]
        return scaled(adapter, product(x, found, activation))


def _uncover(names: Sequence[tuple[nn.Module, str]]) -> None:
    """Remove the sums that shadow parameters."""
    for owner, name in names:
        if name in owner.__dict__:
            del owner.__dict__[name]


def _input(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Sequence[AdapterSlot]) -> Tensor:
    if has_few_rows(x, weight, slots):
        return added_products(x, weight, bias, slots)
    # Where operations are traced or intercepted, a custom autograd function would hide them: use ordinary ones, which
    # give the same numbers.
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.is_nested
        or in_functorch()
        or in_dispatch_mode()
    ):
        changes = [(slot.target, delta(slot)) for slot in slots]
        return functional.linear(x, summed(weight, changes), bias)
    sources: list[DeltaSource] = []
    arrays: list[Tensor] = []
    for slot in slots:
        source, own = delta_source(slot)
        sources.append(source)
        arrays += own
    return cast(Tensor, MergedWeightLinear.apply(x, weight, bias, tuple(sources), *arrays))  # type: ignore[no-untyped-call]
