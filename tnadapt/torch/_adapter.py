"""The handle of an adapter on a model."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.algebra.factoring import Factored, Factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend
from tnadapt.decomposition import Report
from tnadapt.errors import ConfigError, ShapeError, TargetError
from tnadapt.targets.target import Target

from . import _merging as merging
from ._delta import Update
from ._delta_cache import Updates
from ._forward_patch import Part, Site
from ._freezing import Untied, restore
from ._merged_linear import Source
from ._registry import BOOK, PREFIX, encoded, finite, mix
from ._sharding import copy_all, refuse_reentrant, reshard, whole
from ._summary import Summary
from ._trainable import choose, parameter_groups
from ._transaction import all_or_none

__all__ = ["Adapter"]


class Adapter:
    """An adapter on a model; :func:`tnadapt.torch.attach` makes it.

    Attributes
    ----------
    model : Module
        What it is attached to. Its parameters are registered there, once, as ``tnadapt_{name}_{array}``, unless
        :meth:`keep_arrays_in` moved them.
    name : str
    config : Config
    targets : tuple of Target
        The weights it updates.
    plan : SuperLoRA
        What it computes; see :class:`tnadapt.SuperLoRA`.
    strategy : tuple of str
        How each weight is updated: ``"weight"``, ``"factored"`` or ``"beside"``.
    activation : str or None
        LoDA's nonlinearity between the two factors.
    trained : tuple of str or None
        The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all.
    report : Report or None
        How near it came, where :func:`tnadapt.torch.extract` made it.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        plan: SuperLoRA,
        targets: Sequence[Target],
        kept: Sequence[str],
        activation: str | None,
    ) -> None:
        self.model, self.name, self.plan = model, name, plan
        #: Before anything that shards the model gives it a class of its own.
        self.model_name = type(model).__name__
        self.targets = tuple(targets)
        self.activation = activation
        self.kept = tuple(kept)
        self.trained: tuple[str, ...] | None = None
        self.report: Report | None = None
        self.parts: list[Part] = []
        self.sites: list[Site] = []
        #: requires_grad of the base's parameters before.
        self.was_trainable: dict[str, bool] = {}
        self.untied: list[Untied] = []
        self.merged: list[merging.Merged] | None = None
        self._updates = Updates(plan)
        self._enabled = True
        self._weight = 1.0
        #: The threads in whose forward pass a site has acted for it.
        self.used: set[int] = set()
        self._warned = False
        # With which states passes with gradients have begun since its arrays were last written to.
        self._began: tuple[int, set[tuple[bool, float, bool]]] = -1, set()
        # What a compiled program reads instead of the number, so that a swap changes no program.
        self._mix = torch.tensor(1.0)
        #: The module that its parameters are registered on, and their names there.
        self._owner = model
        #: What to call instead of detach() and bake() where the owner has to know of it.
        self._instead: str | None = None
        self._names = {array: f"{PREFIX}{encoded(name)}_{array.replace('.', '_')}" for array in plan.param_shapes}

    def __repr__(self) -> str:
        state = "merged" if self.merged is not None else "attached" if self._enabled else "disabled"
        return (
            f"<tnadapt adapter {self.name!r}: {self.num_parameters:,} parameters for {len(self.targets)} weights of "
            f"{type(self.model).__name__}, {state}, weight {self._weight:g}>"
        )

    # -- What it is --------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """Its settings."""
        return self.plan.config

    @property
    def num_parameters(self) -> int:
        """Elements of its arrays that are trained: of all, unless :meth:`set_trainable` chose some."""
        if self.trained is None:
            return self.plan.num_parameters
        return sum(math.prod(self.plan.param_shapes[name]) for name in self.trained)

    @property
    def strategy(self) -> tuple[str, ...]:
        """How each weight is updated."""
        return tuple(part.strategy for part in self.parts)

    def summary(self) -> Summary:
        """A table of targets, shapes, groups and slices, and the counts; ``print`` it, or read its ``rows``."""
        return Summary(self)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its arrays, trainable or not, under their names in the plan (``group0.split0.factor0``)."""
        for array, name in self._names.items():
            yield array, self._owner._parameters[name]  # type: ignore[misc]

    def keep_arrays_in(self, owner: nn.ParameterDict, instead: str) -> None:
        """Register its parameters in ``owner`` instead of on the model, under their array names with ``_`` for dots.

        The parameters stay the same objects. Whoever calls it keeps ``owner`` in the same module tree as the model, so
        that moving, sharding and copying treat them alike, and takes the adapter off by :meth:`let_go` or
        :meth:`let_go_merged`; :meth:`detach` and :meth:`bake` are then refused with what to call ``instead``.
        """
        names = {array: array.replace(".", "_") for array in self._names}
        left, old = self._owner, list(self._names.values())
        # In this order: at every moment, the parameters are where they are looked for.
        for array, parameter in self.named_parameters():
            owner[names[array]] = parameter
        try:
            self._move(owner, names, instead, left, old)
        except BaseException:  # half of it would leave them in two places
            self._move(owner, names, instead, left, old)
            raise

    def _move(self, owner: nn.Module, names: dict[str, str], instead: str, left: nn.Module, old: Sequence[str]) -> None:
        self._owner, self._names, self._instead = owner, names, instead
        for name in old:
            left._parameters.pop(name, None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of its arrays that are trained: what an optimiser is given.

        Parameters of the model that ``keep_trainable`` left free are not among them; those of
        ``model.parameters()`` that require a gradient are both together.
        """
        return (parameter for _, parameter in self.named_parameters() if parameter.requires_grad)

    def arrays(self) -> dict[str, Tensor]:
        """Its arrays by name, whole: sharded ones are gathered (every process must call)."""
        return {name: whole(parameter) for name, parameter in self.named_parameters()}

    def deltas(self) -> list[Tensor]:
        """The update of every target, ``(rows, cols)``, differentiable; not weighted by its mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between its factors: then there is no ΔW.
        """
        self.need_linear("there is no ΔW")
        return self.plan.deltas(self.arrays())

    def need_linear(self, what: str) -> None:
        """A ConfigError where the update depends on the input."""
        if self.activation is not None:
            raise ConfigError(
                f"adapter {self.name!r} has {self.activation!r} between its factors (LoDA), so that its update "
                f"depends on the input: {what}. Keep it attached, or train with activation=None"
            )

    # -- Training ----------------------------------------------------------------------------

    def set_trainable(self, groups: Any = None, arrays: Any = None) -> None:
        """Choose what is trained: the groups and arrays named, and no others.

        Parameters
        ----------
        groups : int or sequence of int, optional
            Groups to train, all if None. One after another is Local LoRA.
        arrays : str or sequence of str, optional
            The last parts of array names (``"factor0"``, ``"core"``, ``"dense"`` …), all if None. ``"factor0"``
            alone leaves the factor of the columns as it was drawn: asymmetric LoRA.

        Raises
        ------
        ConfigError
            If nothing is of that name or number, or nothing that is chosen could learn: because the arrays have been
            trained or loaded and those that would be frozen hold zeros, or because ``activation="relu"`` passes nothing
            back to the factor of the columns while that is zero.

        Warns
        -----
        UserWarning
            If that is so in some groups and not in all.

        Notes
        -----
        ΔW does not change. In groups that are still at the start (:meth:`reset`), the array of zeros is one that is
        trained: where it would be frozen, it is drawn from the seed like the others, and a trained one becomes zero
        (:mod:`tnadapt.algebra.init`). A core alone, or the factor of the columns alone, so learns from the first step.
        Groups that have been trained or loaded keep every number.

        The frozen arrays are not counted in ``num_parameters`` and the summary. A file has the choice, and of the
        frozen arrays those that are not what the seed draws.

        Under ``torch.distributed`` every process must call. Make the optimiser anew afterwards, or give it all
        parameters with ``weight_decay=0``: an optimiser skips parameters that have no gradient.
        """
        choose(self, groups, arrays)

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Parameter groups of LoRA+ for an optimiser.

        ``lr * ratio`` is for what starts from zero (LoRA's B), ``lr`` for the rest; where nothing does (a nonlinear F),
        all have ``lr``.

        References
        ----------
        Hayou, Ghosh, Yu, "LoRA+: efficient low rank adaptation of large models", arXiv 2402.12354.
        """
        return parameter_groups(self, lr, ratio)

    def reset(self) -> None:
        """Start again: ΔW = 0, with the zero in an array that is trained.

        Also what fills the arrays after ``model.to_empty()`` of a meta-device model."""
        self._need_unmerged("reset()")
        self.load_arrays(self.plan.init(trained=self.trained))

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Copy arrays into its parameters, in place: a swap that recompiles nothing and keeps the optimiser's view.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or tensors, named and shaped as ``plan.param_shapes``.

        Raises
        ------
        ShapeError
            If a name or a shape does not fit; nothing is changed then.

        Notes
        -----
        An exception in the middle of it, KeyboardInterrupt included, leaves the arrays that there were.

        It is **not** atomic for forward passes that other threads are in at that moment: such a pass may use the old
        arrays in some layers, the new ones in others, and a mixture of both in one. The same is true of :meth:`swap`,
        :meth:`activate`, :func:`mix`, :meth:`merge`, :meth:`unmerge` and :meth:`disabled`. Passes that begin after
        the call has returned are exact, whatever was going on during it. A server that changes adapters while it
        answers needs a lock around both, or a copy of the model for each adapter.
        """
        copy_all(self.fitting(arrays))

    def fitting(self, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
        """Its parameters, each with the array to be copied into it; a ShapeError where these do not fit."""
        self._need_unmerged("new arrays")
        expected = self.plan.param_shapes
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[:4]
            raise ShapeError(
                f"adapter {self.name!r} needs arrays named and shaped as its plan says; differing: {wrong}"
            )
        return self.pairs(arrays)

    def pairs(self, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
        """The parameters of these arrays, whose names and shapes are known to fit, each with its array."""
        self._need_unmerged("new arrays")
        reshard(self.model, self._owner)
        return [(parameter, arrays[name]) for name, parameter in self.named_parameters() if name in arrays]

    # -- Which adapters act ------------------------------------------------------------------

    @property
    def weight(self) -> float:
        """What its update is multiplied with; 0 is inactive. :meth:`activate` and :func:`mix` set it."""
        return self._weight

    def activate(self) -> None:
        """Let this adapter act, with weight 1, and no other on this model."""
        mix(self.model, {self.name: 1.0})

    def set_weight(self, weight: float) -> None:
        """Set the mixing weight."""
        number = finite(weight)
        if number != self._weight:
            self._need_unmerged("another weight")
        all_or_none(Adapter._weigh, [(self, number)], [(self, self._weight)])

    def _weigh(self, number: float) -> None:
        self._weight = number
        self._mix.fill_(number)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside ``with`` the base model, bit for bit (and other adapters, where there are); merged or not."""
        was, merged = self._enabled, self.merged is not None
        try:
            try:
                if merged:
                    self.unmerge()
                self._enabled = False
                yield
            finally:
                self._enable(was, merged)
        finally:
            self._enable(was, merged)  # again, for a KeyboardInterrupt in the middle of the first time

    def _enable(self, enabled: bool, merged: bool) -> None:
        self._enabled = enabled
        if merged and self.merged is None:
            self.merge()

    # -- Merging -----------------------------------------------------------------------------

    def merge(self) -> None:
        """Add ΔW to the weights themselves; the model then runs at the base's own speed.

        Raises
        ------
        TargetError
            If it is merged, inactive, or a weight cannot be written to (quantised, sharded); nothing is changed.
        ConfigError
            If its update depends on the input (LoDA).
        BackendError
            If an update or a sum is not finite; **no** weight is touched.

        Notes
        -----
        The sum is made in float64 and rounded to float32 and then to the weight's dtype, as :func:`tnadapt.merge` does
        it on disk (:mod:`tnadapt.algebra.rounding`). The original rows are kept: :meth:`unmerge` gives the very bits
        back, in every dtype. Memory: that of the adapted weights, twice while it is merging, then once.
        """
        merging.merge(self)

    def unmerge(self) -> None:
        """Give the weights the bits back that they had before :meth:`merge`.

        Raises
        ------
        TargetError
            If it is not merged, or a weight was changed since.
        """
        merging.unmerge(self)

    def detach(self) -> None:
        """Take the adapter off: the model is what it was, its parameters trainable as before.

        Raises
        ------
        TargetError
            If it is merged (unmerge first, or keep it merged by :meth:`bake`), not attached any more, or its arrays
            belong to a PEFT model.
        """
        self._need_own_arrays("detach()")
        self.let_go()

    def let_go(self) -> None:
        """What :meth:`detach` does, for whoever keeps the arrays (:meth:`keep_arrays_in`)."""
        self._need_unmerged("detach()")
        self.need_attached()
        try:
            self.take_off()
        except BaseException:  # half of it would be a model with some of its weights adapted
            self.take_off()
            raise

    def take_off(self) -> None:
        """What :meth:`detach` does; also of an adapter that is attached in part only, and may be repeated."""
        for site in dict.fromkeys(self.sites):
            site.remove(self)
        for hooks in (self.model._forward_pre_hooks, self.model._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
                    self.model._forward_hooks_always_called.pop(key, None)
        for name in self._names.values():
            if isinstance(self._owner, nn.ParameterDict) and name in self._owner:
                del self._owner[name]  # it has a list of names, too
            self._owner._parameters.pop(name, None)
        restore(self)
        # Last: an adapter that is in the book can be taken off again.
        book = self.model.__dict__.get(BOOK, {})
        book.pop(self.name, None)
        if not book:
            self.model.__dict__.pop(BOOK, None)

    def bake(self) -> nn.Module:
        """Merge for good and take the adapter off; returns the model, which then knows nothing of tnadapt.

        Examples
        --------
        >>> import torch, tnadapt.torch
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> names = [name for name, _ in model.named_parameters()]
        >>> _ = tnadapt.torch.attach(model).bake()
        >>> [name for name, _ in model.named_parameters()] == names
        True
        """
        self._need_own_arrays("bake()")
        self.let_go_merged()
        return self.model

    def let_go_merged(self) -> None:
        """What :meth:`bake` does, for whoever keeps the arrays."""
        self.need_attached()
        if self.merged is None:
            self.merge()
        try:
            self._baked()
        except BaseException:  # half of it would add the update twice
            self._baked()
            raise

    def _baked(self) -> None:
        self.untied.clear()  # its copy has the update in it
        self.take_off()
        # Until now it was merged, and so did not act.
        self.merged = None

    def _need_unmerged(self, what: str) -> None:
        if self.merged is not None:
            raise TargetError(f"adapter {self.name!r} is merged, and {what} needs it unmerged: call unmerge() first")

    def _need_own_arrays(self, what: str) -> None:
        self.need_attached()
        if self._instead is not None:
            raise TargetError(
                f"the arrays of adapter {self.name!r} are not its own, so {what} is refused: {self._instead}"
            )

    def need_attached(self) -> None:
        """A TargetError where it was taken off."""
        if self.model.__dict__.get(BOOK, {}).get(self.name) is not self:
            raise TargetError(f"adapter {self.name!r} is not attached to its model any more")

    # -- Files (the room that reads them attaches, too, and so lies below this one) -------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: its arrays, what ``keep_trainable`` kept, and the recipe.

        Parameters
        ----------
        path : path-like
            Written beside and renamed, so that a file that is there stays whole until the new one is.

        Raises
        ------
        FileError
            If it cannot be written, or an array is not finite.

        Notes
        -----
        Under ``torch.distributed`` every process must call (sharded arrays are gathered), and process 0 writes.
        """
        from ._storage import save

        save(self, path)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the file as ``adapter.safetensors`` in a folder, which is made if need be."""
        from ._storage import save_pretrained

        save_pretrained(self, folder)

    def swap(self, path: str | os.PathLike[str]) -> None:
        """Take the arrays of another adapter's file of the same config and targets, in place, without recompiling.

        Raises
        ------
        FileError
            If the file does not fit; nothing is changed.
        """
        from ._storage import swap

        swap(self, path)

    # -- What sites and hooks ask for --------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """False inside :meth:`disabled`."""
        return self._enabled

    @property
    def acts(self) -> bool:
        """Whether it has a part in a forward pass."""
        if not self._enabled or self.merged is not None:
            return False
        return torch.compiler.is_compiling() or self._weight != 0.0

    def need_same(self) -> None:
        """A RuntimeError where a checkpointed region runs again otherwise than it did in the forward pass."""
        if self._began[1] and self._state() not in self._began[1]:
            raise RuntimeError(
                f"adapter {self.name!r} was activated, mixed, merged or disabled between a forward pass with "
                "activation checkpointing and its backward pass, which runs a part of it again: do so after backward()"
            )

    def _remember(self) -> None:
        # Several passes may come before one backward pass, as the base's answer beside the adapter's does.
        written = sum(parameter._version for _, parameter in self.named_parameters() if not parameter.is_inference())
        if written != self._began[0]:
            self._began = written, set()
        self._began[1].add(self._state())

    def _state(self) -> tuple[bool, float, bool]:
        return self._enabled, self._weight, self.merged is not None

    def update(self, index: int) -> Tensor:
        """The update of one weight, weighted."""
        self._refuse_reentrant()
        own = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        made = self._updates.slice(index) if own else None
        if made is None:
            return self.weighted(self._updates.get(self.given, index))
        return self.weighted(Update.apply(made, *self.given(made.names)))  # type: ignore[no-untyped-call]

    def source(self, index: int) -> tuple[Source, list[Tensor]]:
        """For a linear layer on the sum: where the update comes from, and the arrays that it is made of."""
        made, target = self._updates.slice(index), self.targets[index]
        if made is None:
            return Source(target), [self.update(index)]
        return Source(target, made, len(made.names), self._weight), self.given(made.names)

    def factors(self, how: Factoring) -> Factored:
        """The factors of one weight's update; not weighted."""
        if how.shared:
            self._refuse_reentrant()
        return how(load_backend("torch"), dict(zip(how.names, self.given(how.names), strict=True)))

    def _refuse_reentrant(self) -> None:
        if self._updates.began_with_gradients and not torch.is_grad_enabled():
            refuse_reentrant(self.name)

    def given(self, names: Sequence[str]) -> list[Tensor]:
        """Some of its arrays, as the model has them at this moment."""
        return [self._owner._parameters[self._names[name]] for name in names]  # type: ignore[misc]

    def weighted(self, value: Tensor) -> Tensor:
        """Something times the mixing weight."""
        if torch.compiler.is_compiling():
            # An inactive adapter adds nothing, whatever is in it.
            return torch.where(self._mix == 0, torch.zeros_like(value), value * self._mix)
        return value if self._weight == 1.0 else value * self._weight

    @property
    def shares(self) -> bool:
        """Whether some weight needs the updates formed (not the factors alone)."""
        return any(part.strategy != "factored" for part in self.parts)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Hook: a forward pass of the whole model starts."""
        if getattr(module, "_is_replica", False):
            raise TargetError(
                "nn.DataParallel copies the model for each device, and an adapter is on one model: use "
                "DistributedDataParallel, a process a device"
            )
        if not torch.compiler.is_compiling():
            self.used.discard(threading.get_ident())
            if torch.is_grad_enabled():
                self._remember()
        if not self.acts:
            return
        if self.shares:
            self._updates.begin()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: it is over, or failed."""
        self._updates.end()
        if torch.compiler.is_compiling() or self._warned or output is None or not self.acts:
            return
        if threading.get_ident() in self.used:
            return
        self._warned = True
        warnings.warn(
            f"no module that adapter {self.name!r} is on was called in a forward pass of "
            f"{type(self.model).__name__}: its updates had no part in the result. If the model reads the weights in "
            f"another way than by calling {self.targets[0].module!r}, as fused projections do, merge() is the way",
            stacklevel=2,
        )
