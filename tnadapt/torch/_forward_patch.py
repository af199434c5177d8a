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

from tnadapt.algebra.factoring import Factored, Factoring, Matrix
from tnadapt.targets.target import Target

from ._factored_linear import can_fuse, factored_linear, product
from ._merged_linear import Source, SummedLinear, summed, transformed, watched

if TYPE_CHECKING:
    from ._adapter import Adapter

__all__ = ["ACTIVATIONS", "STRATEGIES", "Part", "Site", "Stored"]

STRATEGIES = ("auto", "weight", "factored", "beside")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One adapter's share in one weight: which of its updates, on which rows, and how it is used."""

    adapter: Adapter
    index: int
    target: Target
    strategy: str
    #: How the update factors, where it is used factored.
    factoring: Factoring | None = None

    def factors(self) -> Factored:
        """The factors of the update; not weighted."""
        assert self.factoring is not None  # attach has seen to that
        return self.adapter.factors(self.factoring)


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
        into: list[tuple[Stored, list[Part]]] = []
        added: list[Part] = []
        compiling = torch.compiler.is_compiling()
        again = not compiling and _in_backward()
        for stored in self.weights:
            here: list[Part] = []
            for part in stored.parts:
                if again:
                    part.adapter.need_same()
                if not part.adapter.acts:
                    continue
                if not compiling:
                    part.adapter.used.add(threading.get_ident())
                (here if part.strategy == "weight" else added).append(part)
            if here:
                into.append((stored, here))
        if added and not into and not compiling:
            fused = self._fused(added, args, kwargs)
            if fused is not None:
                return fused
        y = self._base(into, args, kwargs)
        if added:
            x = args[0] if args else next(iter(kwargs.values()))
            for part in added:
                y = _plus(y, part.target, self._output(part, x))
        return y

    def _base(self, into: list[tuple[Stored, list[Part]]], args: Any, kwargs: Any) -> Any:
        if not into:
            return self._original(*args, **kwargs)
        if self.is_plain and not kwargs and len(args) == 1:
            stored, here = into[0]
            host: Any = self.host
            if isinstance(host, nn.Linear):
                return _linear(args[0], stored.tensor, host.bias, here)
            if isinstance(host, nn.modules.conv._ConvNd):
                return host._conv_forward(args[0], _sum(stored, here), host.bias)
        return self._shadowed(into, args, kwargs)

    def _fused(self, added: list[Part], args: Any, kwargs: Any) -> Tensor | None:
        """The output where all updates are factored and the layer is a linear one of their own dtype; else None."""
        host, x = self.host, args[0] if len(args) == 1 and not kwargs else None
        if not (self.is_plain and isinstance(host, nn.Linear) and isinstance(x, Tensor)):
            return None
        if any(part.strategy != "factored" or part.adapter.activation is not None for part in added):
            return None
        changes = []
        for part in added:
            found = part.factors()
            changes.append((part.target, found._replace(scale=found.scale * part.adapter.weight)))
        weight = self.weights[0].tensor
        return factored_linear(x, weight, host.bias, changes) if can_fuse(x, weight, changes) else None

    def _is_plain(self) -> bool:
        if self.before is not None or len(self.weights) != 1 or self.weights[0].owner is not self.host:
            return False
        return self.weights[0].parameter == "weight" and type(self.host).forward in _PLAIN

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _shadowed(self, into: list[tuple[Stored, list[Part]]], args: Any, kwargs: Any) -> Any:
        """The original forward, which finds the sum where it looks for the weight.

        An attribute of the instance is found before a parameter of that name, which stays registered and
        untouched: not even for a moment does another look at ``parameters()`` or the state dict see the sum.
        """
        names = [(stored.owner, stored.parameter) for stored, _ in into]
        sums = [_sum(stored, here) for stored, here in into]
        # One thread at a time: another would find this one's sum, or take it away.
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
            # Again: a KeyboardInterrupt may come in the middle of cleaning up, and a sum that stayed would be taken for
            # the weight from then on.
            _uncover(names)

    def _output(self, part: Part, x: Tensor) -> Tensor:
        """What the update adds to the output."""
        adapter = part.adapter
        if part.strategy == "beside":
            delta = adapter.update(part.index)
            return functional.linear(
                x, delta.to(x) if not torch.is_autocast_enabled(x.device.type) else delta.to(x.device)
            )
        found = part.factors()
        first = found.terms[0][0].left
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(first.dtype)
        if x.device != first.device:
            found = _moved(found, x.device)
        activation = None if adapter.activation is None else ACTIVATIONS[adapter.activation]
        return adapter.weighted(product(x, found, activation))


def _uncover(names: Sequence[tuple[nn.Module, str]]) -> None:
    """Remove the sums that stand in front of parameters."""
    for owner, name in names:
        if name in owner.__dict__:
            del owner.__dict__[name]


def _moved(factored: Factored, device: torch.device) -> Factored:
    terms = [
        [Matrix(m.left.to(device), None if m.right is None else m.right.to(device)) for m in term]
        for term in factored.terms
    ]
    return Factored(terms, factored.scale)


def _sum(stored: Stored, parts: Sequence[Part]) -> Tensor:
    return summed(stored.tensor, [(part.target, part.adapter.update(part.index)) for part in parts])


def _in_backward() -> bool:
    """Whether this is a part of a backward pass, as a checkpointed region that runs again is."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_nested or transformed() or watched():
        changes = [(part.target, part.adapter.update(part.index)) for part in parts]
        return functional.linear(x, summed(weight, changes), bias)
    sources: list[Source] = []
    arrays: list[Tensor] = []
    for part in parts:
        source, own = part.adapter.source(part.index)
        sources.append(source)
        arrays += own
    return cast(Tensor, SummedLinear.apply(x, weight, bias, tuple(sources), *arrays))  # type: ignore[no-untyped-call]


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
