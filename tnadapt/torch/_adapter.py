"""The handle of an adapter on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.decomposition import FitReport
from tnadapt.errors import pluralize

from . import _arrays, _begin, _merging, _removal, _trainable
from ._adapter_files import AdapterFiles
from ._bound_plan import fill
from ._peft_words import refuse_attribute
from ._registry import attached, mix, set_weight
from ._requantizing import RequantizationReport
from ._state import AdapterState, need_unmerged
from ._summary import Summary

__all__ = ["Adapter", "adapters"]


class Adapter(AdapterFiles):
    """An adapter on a model, as returned by :func:`tnadapt.torch.attach`.

    Attributes
    ----------
    model : Module
        The model it is attached to. The adapter's parameters are registered there, once, as
        ``tnadapt_{name}_{array}``; those of a PEFT model's adapters are next to it, where PEFT looks for them.
    name : str
    config : Config
    targets : tuple of Target
        The weights it updates.
    plan : SuperLoRA
        The computation of the updates; see :class:`tnadapt.SuperLoRA`.
    strategy : tuple of str
        How each weight is updated: ``"weight"``, ``"factored"`` or ``"additive"``.
    activation : str or None
        LoDA's nonlinearity between the two factors.
    trained : tuple of str or None
        The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all.
    report : FitReport or None
        The error of the fit, if :func:`tnadapt.torch.extract` created the adapter.
    """

    def __init__(self, state: AdapterState) -> None:
        self._state = state
        state.handle = self
        self.model, self.name, self.plan = state.model, state.name, state.plan.file_plan
        self.targets, self.activation = state.targets, state.activation
        self.report: FitReport | None = None

    def __repr__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "disabled"
        weights = pluralize(len(self.targets), "weight")
        return (
            f"<tnadapt adapter {self.name!r}: {self.num_parameters:,} parameters for {weights} of "
            f"{type(self.model).__name__}, {state}, weight {self.weight:g}>"
        )

    if not TYPE_CHECKING:  # where every attribute would pass for existing

        def __getattr__(self, name: str) -> Any:
            refuse_attribute(type(self).__name__, name)

    # -- Properties --------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The adapter's config."""
        return self.plan.config

    @property
    def num_parameters(self) -> int:
        """Number of trained elements: of all arrays, unless :meth:`set_trainable` chose some."""
        return _trainable.num_parameters(self._state)

    @property
    def strategy(self) -> tuple[str, ...]:
        """How each weight is updated: ``"weight"``, ``"factored"`` or ``"additive"``."""
        return tuple(slot.strategy for slot in self._state.slots[: len(self._state.targets)])

    @property
    def dropout(self) -> float:
        """The probability of dropout in training, as given to ``attach`` or ``load``; files do not have it."""
        return self._state.dropout

    @property
    def trained(self) -> tuple[str, ...] | None:
        """The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all."""
        return self._state.trained

    @property
    def kept(self) -> tuple[str, ...]:
        """The model's own parameters that ``keep_trainable`` left trainable; they are saved with the adapter."""
        return self._state.kept

    @property
    def merged(self) -> bool:
        """Whether ΔW is merged into the weights; see :meth:`merge`."""
        return self._state.merged is not None

    @property
    def merge_report(self) -> RequantizationReport | None:
        """How well the quantized weights hold what was merged into them, one row each; None if nothing is merged."""
        return cast("RequantizationReport | None", self._state.merge_report)

    @property
    def enabled(self) -> bool:
        """False inside :meth:`disabled`."""
        return self._state.enabled

    def summary(self) -> Summary:
        """Return a table of targets, shapes, groups and slices with counts; ``print`` it, or read its ``rows``."""
        return Summary(self._state)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all arrays, trainable or not, with their names in the plan (``group0.split0.factor0``)."""
        return _arrays.named_parameters(self._state)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the arrays that are trained, for an optimiser.

        Parameters of the model that ``keep_trainable`` left trainable are not included; the parameters in
        ``model.parameters()`` that require a gradient are both together.
        """
        return (parameter for _, parameter in self.named_parameters() if parameter.requires_grad)

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by name, as files have them; sharded ones are gathered (every process must call).

        They are the parameters times their units in ``plan.units``, which are 1 for ``rate="sgd"``.
        """
        return self._state.plan.to_arrays(_arrays.full_arrays(self._state))

    def deltas(self) -> list[Tensor]:
        """Return the update of every target, ``(rows, cols)``, differentiable and without the mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between the factors, in which case no ΔW exists.
        """
        return _arrays.deltas(self._state)

    # -- Training ----------------------------------------------------------------------------

    def set_trainable(self, groups: Any = None, arrays: Any = None) -> None:
        """Train only the given groups and arrays, and freeze the others.

        Parameters
        ----------
        groups : int or sequence of int, optional
            Groups to train, all if None. Training one group after another is Local LoRA.
        arrays : str or sequence of str, optional
            The last parts of array names (``"factor0"``, ``"core"``, ``"dense"`` …), all if None. ``"factor0"``
            alone leaves the factor of the columns as it was drawn: asymmetric LoRA.

        Raises
        ------
        ConfigError
            If no array matches, or none of the chosen arrays could learn: because the arrays have been trained or
            loaded and those that would be frozen are zero, or because ``activation="relu"`` passes no gradient to the
            factor of the columns while that is zero.

        Warns
        -----
        UserWarning
            If that is so in some groups but not in all.

        Notes
        -----
        ΔW does not change. In groups that are still at the start (:meth:`reset`), the array of zeros must be one that
        is trained: if it would be frozen, it is drawn from the seed like the others, and a trained one becomes zero
        (:mod:`tnadapt.algebra.init`). So a core alone, or the factor of the columns alone, learns from the first step.
        Groups that have been trained or loaded keep their values.

        Frozen arrays are not counted in ``num_parameters`` and the summary. A file records the choice, and of the
        frozen arrays only those that differ from what the seed draws.

        Under ``torch.distributed`` every process must call. Create a new optimiser afterwards, or give it all
        parameters with ``weight_decay=0``: an optimiser skips parameters that have no gradient.
        """
        _trainable.choose(self._state, groups, arrays)

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Return the parameter groups of LoRA+ for an optimiser.

        Arrays that start from zero (LoRA's B) have rate ``lr * ratio``, the others ``lr``. Where none starts from zero
        (a nonlinear F), all have ``lr``.

        References
        ----------
        Hayou, Ghosh, Yu, "LoRA+: efficient low rank adaptation of large models", arXiv 2402.12354.
        """
        return _trainable.parameter_groups(self._state, lr, ratio)

    def adam_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return parameter groups with which Adam takes the steps of ``rate="adam"``, whatever the config's rate is.

        For adapters that train the arrays themselves (``rate="sgd"``: a config without a preset, an older file): each
        array has its own rate, ``lr * unit``. With ``rate="adam"`` the rates are all ``lr``, and
        ``adapter.parameters()`` does the same.

        Parameters
        ----------
        lr : float
            1e-2 suits all configs.

        Returns
        -------
        list of dict
            Each with ``params``, trained parameters of one unit, and ``lr``.

        Examples
        --------
        >>> import torch, tnadapt as tna, tnadapt.torch
        >>> adapter = tnadapt.torch.attach(torch.nn.Sequential(torch.nn.Linear(64, 64)), tna.Config(), "all-linear")
        >>> [group["lr"] for group in adapter.adam_groups(1e-2)]
        [0.04]
        >>> optimizer = torch.optim.Adam(adapter.adam_groups(1e-2))
        """
        return _trainable.adam_groups(self._state, lr)

    def reset(self) -> None:
        """Reinitialize the arrays: ΔW = 0, with the zero in an array that is trained.

        Also use it to fill the arrays after ``model.to_empty()`` of a meta-device model, once its weights are loaded:
        frozen arrays that are computed from them are computed then."""
        need_unmerged(self._state, "reset()")
        fill(self._state)
        self.load_arrays(self.plan.init(trained=self.trained))

    def start_from(self, arrays: Mapping[str, Any]) -> None:
        """Start training from these arrays; ΔW, which is the difference to them, stays exactly 0.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or tensors for some or all names in ``plan.array_shapes``, such as those that
            :mod:`tnadapt.torch.starts` computes from data. The others start as usual. Copied, in float32.

        Raises
        ------
        ConfigError
            If the config's ``start`` is not "given", the adapter has been trained or loaded, a name is unknown, an
            array is not finite, or nothing could learn from these arrays.
        ShapeError
            If an array has another shape.
        TargetError
            If the adapter is merged or detached.

        In each case nothing is changed.

        Warns
        -----
        UserWarning
            If nothing could learn in some groups.

        Notes
        -----
        Files store the arrays: no seed gives them again. :meth:`reset` returns to them. Under ``torch.distributed``
        every process must call.

        Examples
        --------
        >>> import torch, tnadapt as tna, tnadapt.torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> adapter = tnadapt.torch.attach(model, tna.presets.lora(1, start="given"), "all-linear")
        >>> adapter.start_from({"group0.split0.factor0": torch.ones(4, 1)})
        >>> adapter.arrays()["group0.split0.factor0"].any(), adapter.deltas()[0].any()
        (tensor(True), tensor(False))
        """
        _begin.start_from(self._state, arrays)

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Copy arrays into the parameters in place, without recompilation; an optimiser keeps its parameters.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or tensors, named and shaped as ``plan.param_shapes``.

        Raises
        ------
        ShapeError
            If a name or a shape does not fit; nothing is changed.

        Notes
        -----
        An exception during the call, KeyboardInterrupt included, leaves the old arrays in place.

        It is **not** atomic for forward passes that other threads are running at that moment: such a pass may use the
        old arrays in some layers, the new ones in others, and a mixture of both within a layer. The same is true of
        :meth:`swap`, :meth:`activate`, :func:`mix`, :meth:`merge`, :meth:`unmerge` and :meth:`disabled`. Passes that
        begin after the call has returned are exact. A server that changes adapters while it answers requests needs a
        lock around both, or a copy of the model for each adapter.
        """
        _arrays.load_arrays(self._state, arrays)

    # -- Which adapters act ------------------------------------------------------------------

    @property
    def weight(self) -> float:
        """The mixing weight, a factor of the update; 0 is inactive. :meth:`activate` and :func:`mix` set it."""
        return self._state.weight

    def activate(self) -> None:
        """Activate this adapter with weight 1, and deactivate all others on this model."""
        mix(self.model, {self.name: 1.0})

    def set_weight(self, weight: float) -> None:
        """Set the mixing weight."""
        set_weight(self._state, weight)

    def disabled(self) -> AbstractContextManager[None]:
        """Disable the adapter inside ``with``: the model is the base, bit for bit, plus other adapters if any.

        Works for merged adapters, too.
        """
        return _merging.disabled(self._state)

    def clear_cache(self) -> None:
        """Discard the updates that are cached for passes without gradients.

        It is needed only on a GPU, and only after the arrays were written to in a way that torch does not record, such
        as ``p.data.copy_(…)``, DLPack or a kernel of one's own; ``p.copy_(…)``, optimizers, ``load_state_dict`` and
        :meth:`load_arrays` are seen. On the CPU every change is.

        Examples
        --------
        >>> import torch, tnadapt.torch
        >>> adapter = tnadapt.torch.attach(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True))
        >>> for parameter in adapter.parameters():
        ...     _ = parameter.data.mul_(0.5)
        >>> adapter.clear_cache()
        """
        self._state.clear_cache()

    # -- Merging -----------------------------------------------------------------------------

    def merge(self, max_error: float | None = None) -> None:
        """Add ΔW to the weights; the model then runs at the speed of the base.

        Parameters
        ----------
        max_error : float, optional
            For quantized weights: refuse if quantizing W + ΔW again is off by more than this part of ‖ΔW‖. At 1 a
            merge is as far off as none. :attr:`merge_report` has the errors.

        Raises
        ------
        TargetError
            If it is merged, inactive, a weight cannot be written to (sharded, of a quantized type that cannot be
            merged into), or the error is above ``max_error``; nothing is changed.
        ConfigError
            If the update depends on the input (LoDA).
        BackendError
            If an update or a sum is not finite; **no** weight is changed.

        Notes
        -----
        The sum is computed in float64 and rounded to float32 and then to the weight's dtype, exactly as
        :func:`tnadapt.merge` does on disk (:mod:`tnadapt.algebra.rounding`). A quantized weight is dequantized, and the
        sum is quantized again by its library. The original rows, or codes, are kept, so that :meth:`unmerge` restores
        the exact bits. This takes the memory of the adapted weights once more, and twice during the merge.
        """
        _merging.merge(self._state, max_error)

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before :meth:`merge`.

        Raises
        ------
        TargetError
            If it is not merged, or a weight has changed since.
        """
        _merging.unmerge(self._state)

    def detach(self) -> None:
        """Remove the adapter and restore the model, including which parameters are trainable.

        Raises
        ------
        TargetError
            If it is merged (unmerge first, or keep it merged with :meth:`bake`), no longer attached, or its arrays
            belong to a PEFT model.
        """
        _removal.detach(self._state)

    def bake(self, max_error: float | None = None) -> nn.Module:
        """Merge for good and remove the adapter; return the model, which then has no trace of tnadapt.

        ``max_error`` is that of :meth:`merge`; :attr:`merge_report` stays readable.

        Examples
        --------
        >>> import torch, tnadapt.torch
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> names = [name for name, _ in model.named_parameters()]
        >>> _ = tnadapt.torch.attach(model).bake()
        >>> [name for name, _ in model.named_parameters()] == names
        True
        """
        _removal.bake(self._state, max_error)
        return self.model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters on a model and its submodules by name.

    Parameters
    ----------
    model : Module
        The model given to ``attach``, a deep copy of it, or a module that contains it.

    Examples
    --------
    >>> import copy, torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> _ = tnadapt.torch.attach(model, name="a")
    >>> list(adapters(copy.deepcopy(model)))
    ['a']
    """
    return {name: state.handle for name, state in attached(model).items()}
