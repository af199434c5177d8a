"""How a layer uses ΔW: added to the weight, beside it, or as the two factors of a low-rank update.

A :class:`Site` stands in for the ``forward`` of one module. Nothing else of the module changes: its class,
path, parameters and state dict stay what they were.

- *weight*: ``x (W + ΔW)ᵀ``; the sum is rounded once to the weight's dtype, and formed again in
  backward, not kept. The only way for weights that several rows share, that are read by something other than
  their own module's forward, or that belong to a convolution.
- *factored*: ``x Wᵀ + s (x A) Bᵀ`` for one low-rank matrix a weight; ΔW never exists. With an ``activation`` between
  the two factors this is LoDA.
- *beside*: ``x Wᵀ + x ΔWᵀ``, for weights that cannot be added to (quantised ones).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..target import Target

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["ACTIVATIONS", "STRATEGIES", "Part", "Site", "Stored", "summed"]

STRATEGIES = ("auto", "weight", "factored", "beside")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclasses.dataclass(eq=False)
class Part:
    """One adapter's share in one weight: which of its updates, on which rows, and how it is used."""

    adapter: Adapter
    index: int
    target: Target
    strategy: str


@dataclasses.dataclass(eq=False)
class Stored:
    """A parameter of a module, and the parts of adapters that update it."""

    owner: nn.Module
    parameter: str
    parts: list[Part] = dataclasses.field(default_factory=list)

    @property
    def tensor(self) -> Tensor:
        """The base weight, as the module has it now."""
        found = self.owner._parameters.get(self.parameter)
        # A parametrised weight is no parameter, but computed.
        return cast(Tensor, getattr(self.owner, self.parameter) if found is None else found)


def summed(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """The stored weight with updates added to their rows; summed in the wider dtype and rounded once."""
    kind = stored.dtype
    for _, delta in changes:
        kind = torch.promote_types(kind, delta.dtype)
    total = stored.to(kind)
    for target, delta in changes:
        delta = delta.to(stored.device)
        if target.rows is None:
            total = total + (delta.T if target.transposed else delta.reshape(stored.shape))
        else:
            # The other rows stay as they are, to the bit. Of a weight in channels_last a block would be a copy.
            total = total.clone(memory_format=torch.contiguous_format)
            target.block(total).add_(target.like_block(delta))
    return total.to(stored.dtype)


class SummedLinear(torch.autograd.Function):
    """``x (W + ΔW)ᵀ + b``; the sum is formed again in backward instead of being kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Sequence[Target], *deltas: Tensor) -> Tensor:
        y = functional.linear(x, summed(weight, list(zip(targets, deltas, strict=True))), bias)
        # Of a batch it is a view, and a view that is made in here must not be written to in place, as an inplace ReLU
        # after the layer would. This is the same numbers, and no view.
        return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.targets, *deltas = inputs
        ctx.save_for_backward(x, weight, *deltas)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *deltas = ctx.saved_tensors
        grad = grads[0]
        need_x, need_weight, need_bias, _, *need_deltas = ctx.needs_input_grad
        # Under autocast the output, and so its gradient, is of the lower precision: so are the products.
        found: list[Tensor | None] = [None] * (4 + len(deltas))
        if need_x:
            total = summed(weight, list(zip(ctx.targets, deltas, strict=True)))
            found[0] = (grad @ total.to(grad.dtype)).to(x.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if need_weight or any(need_deltas):
            whole = rows.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            found[1] = whole.to(weight.dtype) if need_weight else None
            for index, (target, delta, need) in enumerate(zip(ctx.targets, deltas, need_deltas, strict=True)):
                found[4 + index] = target.select(whole).to(delta) if need else None
        if need_bias:
            found[2] = rows.sum(0)
        return tuple(found)


class Site:
    """The stand-in for one module's ``forward``.

    Parameters
    ----------
    host : Module
        Whose forward it is. Usually it owns the weights; where a parent reads a child's weight itself,
        the parent is the host.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.weights: list[Stored] = []
        #: A forward that was put on the module itself, by accelerate say; None where it is the class's.
        self.before: Callable[..., Any] | None = host.__dict__.get("forward")
        #: Whether it is the forward of torch's Linear or convolutions, on the host's own weight.
        self.is_plain = False
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # No lock can be copied or pickled.
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @classmethod
    def of(cls, host: nn.Module) -> Site | None:
        """The site of a module, if it has one."""
        found = host.__dict__.get("forward")
        return found if isinstance(found, Site) else None

    def add(self, owner: nn.Module, part: Part) -> None:
        """Let a part act here."""
        for stored in self.weights:
            if stored.owner is owner and stored.parameter == part.target.parameter:
                stored.parts.append(part)
                return
        self.weights.append(Stored(owner, part.target.parameter, [part]))
        self.is_plain = self._is_plain()

    def install(self) -> None:
        """Take the place of the module's forward."""
        # The site itself, not a method of it: accelerate takes methods apart.
        self.host.forward = self

    def remove(self, adapter: Adapter) -> None:
        """Take an adapter's parts away, and oneself when none is left."""
        for stored in self.weights:
            stored.parts = [part for part in stored.parts if part.adapter is not adapter]
        self.weights = [stored for stored in self.weights if stored.parts]
        if not self.weights:
            if self.before is None:
                self.host.__dict__.pop("forward", None)
            else:
                self.host.__dict__["forward"] = self.before

    # -- Forward -----------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with every active update."""
        changes: list[tuple[Stored, list[tuple[Target, Tensor]]]] = []
        added: list[Part] = []
        compiling = torch.compiler.is_compiling()
        again = not compiling and _in_backward()
        for stored in self.weights:
            here = []
            for part in stored.parts:
                if again:
                    part.adapter.need_same()
                if not part.adapter.acts:
                    continue
                if not compiling:
                    part.adapter.used.add(threading.get_ident())
                if part.strategy == "weight":
                    here.append((part.target, part.adapter.update(part.index)))
                else:
                    added.append(part)
            if here:
                changes.append((stored, here))
        y = self._base(changes, args, kwargs)
        if added:
            x = args[0] if args else next(iter(kwargs.values()))
            for part in added:
                y = _plus(y, part.target, self._output(part, x))
        return y

    def _base(self, changes: list[tuple[Stored, list[tuple[Target, Tensor]]]], args: Any, kwargs: Any) -> Any:
        if not changes:
            return self._original(*args, **kwargs)
        if self.is_plain and not kwargs and len(args) == 1:
            stored, here = changes[0]
            host: Any = self.host
            if isinstance(host, nn.Linear):
                return _linear(args[0], stored.tensor, host.bias, here)
            if isinstance(host, nn.modules.conv._ConvNd):
                return host._conv_forward(args[0], summed(stored.tensor, here), host.bias)
        return self._shadowed(changes, args, kwargs)

    def _is_plain(self) -> bool:
        if self.before is not None or len(self.weights) != 1 or self.weights[0].owner is not self.host:
            return False
        return self.weights[0].parameter == "weight" and type(self.host).forward in _PLAIN

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _shadowed(self, changes: list[tuple[Stored, list[tuple[Target, Tensor]]]], args: Any, kwargs: Any) -> Any:
        """The original forward, which finds the sum where it looks for the weight.

        An attribute of the instance is found before a parameter of that name, which stays registered and
        untouched: not even for a moment does another look at ``parameters()`` or the state dict see the sum.
        """
        names = [(stored.owner, stored.parameter) for stored, _ in changes]
        sums = [summed(stored.tensor, here) for stored, here in changes]
        # One thread at a time: another would find this one's sum, or take it away.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock:
            try:
                for (owner, name), total in zip(names, sums, strict=True):
                    owner.__dict__[name] = total
                return self._original(*args, **kwargs)
            finally:
                for owner, name in names:
                    if name in owner.__dict__:
                        del owner.__dict__[name]

    def _output(self, part: Part, x: Tensor) -> Tensor:
        """What the update adds to the output."""
        adapter = part.adapter
        if part.strategy == "beside":
            delta = adapter.update(part.index)
            return functional.linear(
                x, delta.to(x) if not torch.is_autocast_enabled(x.device.type) else delta.to(x.device)
            )
        b, a, scale = adapter.factors(part.index)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        hidden = functional.linear(x, a.T.to(x.device))
        if adapter.activation is not None:
            hidden = ACTIVATIONS[adapter.activation](hidden)
        return adapter.weighted(functional.linear(hidden, b.to(x.device)) * scale)


def _in_backward() -> bool:
    """Whether this is a part of a backward pass, as a checkpointed region that runs again is."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: list[tuple[Target, Tensor]]) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_nested:
        return functional.linear(x, summed(weight, changes), bias)
    targets, deltas = zip(*changes, strict=True)
    return cast(Tensor, SummedLinear.apply(x, weight, bias, targets, *deltas))  # type: ignore[no-untyped-call]


def _plus(y: Tensor, target: Target, change: Tensor) -> Tensor:
    """The output with something added to the features that the target's rows make."""
    change = change.to(y.dtype)
    if target.rows is None:
        return y + change
    rows = target.rows
    blocks = y.reshape(*y.shape[:-1], rows.count, rows.stride)
    stop = rows.start + rows.length
    middle = blocks[..., rows.start : stop] + change.reshape(*y.shape[:-1], rows.count, rows.length)
    return torch.cat([blocks[..., : rows.start], middle, blocks[..., stop:]], -1).reshape(y.shape)
