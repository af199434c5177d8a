"""The arrays that θ makes, with autograd: computed once for all layers and passes while θ is unchanged.

``a_start + P θ`` is one autograd node for each θ. P is linear, so that the node saves nothing for backward: gradients
of any number of backward passes go through it, each by one call of Pᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.algebra.theta import ThetaPart
from tnadapt.backends import load_backend

from ._array_snapshot import Snapshot, on_host
from ._delta_cache import CacheEntry, array_state, can_cache, held_bytes, trace_number

__all__ = ["ThetaArrays"]


class ThetaFunction(torch.autograd.Function):
    """``P θ`` as one autograd node that saves no tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(part: ThetaPart, on_backward: Callable[[], None] | None, theta: Tensor) -> Tensor:
        return cast(Tensor, part.forward(theta))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.part, ctx.on_backward, _ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        if ctx.on_backward is not None:
            ctx.on_backward()
        return None, None, ctx.part.adjoint(grads[0])


class ThetaArrays:
    """The arrays of a plan with a map before the network, cached and checked against θ at every use.

    Parameters
    ----------
    plan : SuperLoRA
        With ``plan.theta``.

    Notes
    -----
    The rules are those of :class:`~tnadapt.torch._delta_cache.DeltaCache`: an entry is immutable, holds snapshots of
    the θ it was computed from, and with gradients is valid only for the same parameter objects and version counters.
    """

    def __init__(self, plan: SuperLoRA) -> None:
        assert plan.theta is not None
        self.plan, self.theta = plan, plan.theta
        self._entries: dict[tuple[bool, bool], tuple[CacheEntry, dict[str, Tensor]]] = {}
        self._traced: tuple[int, dict[str, Tensor]] | None = None

    def get(self, thetas: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the arrays by their names in the plan, for the current θ in the order of ``theta.shapes``."""
        if torch.compiler.is_compiling():
            number = trace_number()
            if self._traced is None or self._traced[0] != number or number == 0:
                self._traced = number, self._made(thetas)
            return self._traced[1]
        if not can_cache(thetas, False):
            return self._made(thetas)
        names = list(self.theta.shapes)
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = self._entries.get(key)
        if found is not None and found[0].is_of(names, thetas):
            return found[1]
        state: list[Hashable] = array_state(thetas) if torch.is_grad_enabled() else []
        copies = {name: Snapshot.of(theta) for name, theta in zip(names, thetas, strict=True)}
        made = self._made(thetas)
        leaves = dict(zip(names, zip(thetas, state, strict=True), strict=True)) if state else None
        entry = CacheEntry(copies, {}, leaves, sum(-1 if t.is_inference() else t._version for t in thetas))
        self._entries[key] = entry, made
        return made

    def forget(self) -> None:
        """Empty the cache."""
        self._entries = {}

    def held(self) -> int:
        """Return the bytes that it keeps."""
        return held_bytes(array for _, made in self._entries.values() for array in made.values())

    def end(self) -> None:
        """Record that a pass has ended, so that the next one does not begin with what a trace left."""
        self._traced = None

    def _made(self, thetas: Sequence[Tensor]) -> dict[str, Tensor]:
        backend = load_backend("torch")
        found: dict[str, Tensor] = {}  # which torch.compile traces, unlike dict[str, Tensor]()
        for part, theta in zip(self.theta.parts, thetas, strict=True):
            sizes = [torch.Size(shape).numel() for shape in part.arrays.values()]
            if torch.compiler.is_compiling():
                vec = part.forward(theta)
            else:
                # Steps of fused optimizers, which follow a backward pass, change no version counter.
                vec = ThetaFunction.apply(part, None if on_host(theta) else self.forget, theta)  # type: ignore[no-untyped-call]
            for (full, shape), piece in zip(part.arrays.items(), torch.split(vec, sizes), strict=True):
                moved = piece.view(shape)
                found[full] = self.plan.array_start(backend, full, theta) + moved if self.theta.offset else moved
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> ThetaArrays:
        return ThetaArrays(self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return ThetaArrays, (self.plan,)
