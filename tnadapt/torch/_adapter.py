"""The handle of an adapter on a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.decomposition import FitReport

from . import _adapter_saving as saving
from . import _arrays, _merging, _removal, _trainable
from ._registry import attached, mix, set_weight
from ._state import AdapterState, need_unmerged
from ._summary import Summary

__all__ = ["Adapter", "adapters"]


class Adapter:
    """An adapter on a model; :func:`tnadapt.torch.attach` makes it.

    Attributes
    ----------
    model : Module
        What it is attached to. Its parameters are registered there, once, as ``tnadapt_{name}_{array}``; those of a
        PEFT model's adapters beside it, where PEFT looks for them.
    name : str
    config : Config
    targets : tuple of Target
        The weights it updates.
    plan : SuperLoRA
        What it computes; see :class:`tnadapt.SuperLoRA`.
    strategy : tuple of str
        How each weight is updated: ``"weight"``, ``"factored"`` or ``"additive"``.
    activation : str or None
        LoDA's nonlinearity between the two factors.
    trained : tuple of str or None
        The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all.
    report : Report or None
        How near it came, where :func:`tnadapt.torch.extract` made it.
    """

    def __init__(self, state: AdapterState) -> None:
        self._state = state
        state.handle = self
        self.model, self.name, self.plan = state.model, state.name, state.plan
        self.targets, self.activation = state.targets, state.activation
        self.report: FitReport | None = None

    def __repr__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "disabled"
        return (
            f"<tnadapt adapter {self.name!r}: {self.num_parameters:,} parameters for {len(self.targets)} weights of "
            f"{type(self.model).__name__}, {state}, weight {self.weight:g}>"
        )

    # -- What it is --------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """Its settings."""
        return self.plan.config

    @property
    def num_parameters(self) -> int:
        """Elements of its arrays that are trained: of all, unless :meth:`set_trainable` chose some."""
        return _trainable.num_parameters(self._state)

    @property
    def strategy(self) -> tuple[str, ...]:
        """How each weight is updated."""
        return tuple(slot.strategy for slot in self._state.slots)

    @property
    def trained(self) -> tuple[str, ...] | None:
        """The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all."""
        return self._state.trained

    @property
    def kept(self) -> tuple[str, ...]:
        """The model's own parameters that ``keep_trainable`` left free, which are saved with it."""
        return self._state.kept

    @property
    def merged(self) -> bool:
        """Whether ΔW is in the weights themselves; see :meth:`merge`."""
        return self._state.merged is not None

    @property
    def enabled(self) -> bool:
        """False inside :meth:`disabled`."""
        return self._state.enabled

    def summary(self) -> Summary:
        """A table of targets, shapes, groups and slices, and the counts; ``print`` it, or read its ``rows``."""
        return Summary(self._state)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its arrays, trainable or not, under their names in the plan (``group0.split0.factor0``)."""
        return _arrays.named_parameters(self._state)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of its arrays that are trained: what an optimiser is given.

        Parameters of the model that ``keep_trainable`` left free are not among them; those of
        ``model.parameters()`` that require a gradient are both together.
        """
        return (parameter for _, parameter in self.named_parameters() if parameter.requires_grad)

    def arrays(self) -> dict[str, Tensor]:
        """Its arrays by name, whole: sharded ones are gathered (every process must call)."""
        return _arrays.full_arrays(self._state)

    def deltas(self) -> list[Tensor]:
        """The update of every target, ``(rows, cols)``, differentiable; not weighted by its mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between its factors: then there is no ΔW.
        """
        return _arrays.deltas(self._state)

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

        Under ``torch.distributed`` every process must call. Create a new optimiser afterwards, or give it all
        parameters with ``weight_decay=0``: an optimiser skips parameters that have no gradient.
        """
        _trainable.choose(self._state, groups, arrays)

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Parameter groups of LoRA+ for an optimiser.

        ``lr * ratio`` is for what starts from zero (LoRA's B), ``lr`` for the rest; where nothing does (a nonlinear F),
        all have ``lr``.

        References
        ----------
        Hayou, Ghosh, Yu, "LoRA+: efficient low rank adaptation of large models", arXiv 2402.12354.
        """
        return _trainable.parameter_groups(self._state, lr, ratio)

    def reset(self) -> None:
        """Start again: ΔW = 0, with the zero in an array that is trained.

        Also what fills the arrays after ``model.to_empty()`` of a meta-device model."""
        need_unmerged(self._state, "reset()")
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
        _arrays.load_arrays(self._state, arrays)

    # -- Which adapters act ------------------------------------------------------------------

    @property
    def weight(self) -> float:
        """What its update is multiplied with; 0 is inactive. :meth:`activate` and :func:`mix` set it."""
        return self._state.weight

    def activate(self) -> None:
        """Let this adapter act, with weight 1, and no other on this model."""
        mix(self.model, {self.name: 1.0})

    def set_weight(self, weight: float) -> None:
        """Set the mixing weight."""
        set_weight(self._state, weight)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside ``with`` the base model, bit for bit (and other adapters, where there are); merged or not."""
        return _merging.disabled(self._state)

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
        _merging.merge(self._state)

    def unmerge(self) -> None:
        """Give the weights the bits back that they had before :meth:`merge`.

        Raises
        ------
        TargetError
            If it is not merged, or a weight was changed since.
        """
        _merging.unmerge(self._state)

    def detach(self) -> None:
        """Take the adapter off: the model is what it was, its parameters trainable as before.

        Raises
        ------
        TargetError
            If it is merged (unmerge first, or keep it merged by :meth:`bake`), not attached any more, or its arrays
            belong to a PEFT model.
        """
        _removal.detach(self._state)

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
        _removal.bake(self._state)
        return self.model

    # -- Files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: its arrays, what ``keep_trainable`` kept, and the recipe.

        Parameters
        ----------
        path : path-like
            Written under another name and renamed, so that an existing file is replaced at once or not at all.

        Raises
        ------
        FileError
            If it cannot be written, or an array is not finite.

        Notes
        -----
        Under ``torch.distributed`` every process must call (sharded arrays are gathered), and process 0 writes.
        """
        saving.save(self._state, path)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the file as ``adapter.safetensors`` in a folder, which is made if need be."""
        saving.save_pretrained(self._state, folder)

    def swap(self, path: str | os.PathLike[str]) -> None:
        """Take the arrays of another adapter's file of the same config and targets, in place, without recompiling.

        Raises
        ------
        FileError
            If the file does not fit; nothing is changed.
        """
        saving.swap(self._state, path)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, those on parts of it included.

    Parameters
    ----------
    model : Module
        As it was given to ``attach``, or a deep copy of it, or what it is wrapped in.

    Examples
    --------
    >>> import copy, torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> _ = tnadapt.torch.attach(model, name="a")
    >>> list(adapters(copy.deepcopy(model)))
    ['a']
    """
    return {name: state.handle for name, state in attached(model).items()}
