"""The handle of an adapter on a model."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments
from tnadapt.decomposition import FitReport
from tnadapt.errors import pluralize

from . import _merging, _removal
from ._adapter_files import AdapterFiles
from ._adapter_parameters import AdapterParameters
from ._peft_words import refuse_attribute
from ._registry import attached, mix, set_weight
from ._requantizing import RequantizationReport
from ._state import AdapterState
from ._summary import Summary

__all__ = ["Adapter", "adapters"]

_log = logging.getLogger(__name__)


class Adapter(AdapterParameters, AdapterFiles):
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
    def strategy(self) -> tuple[str, ...]:
        """How each weight is updated: ``"weight"``, ``"factored"`` or ``"additive"``."""
        return tuple(slot.strategy for slot in self._state.slots[: len(self._state.targets)])

    @property
    def dropout(self) -> float:
        """The probability of dropout in training, as given to ``attach`` or ``load``; files do not have it."""
        return self._state.dropout

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

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters in a line, as PEFT's models do.

        Parameters of the model itself that are trained, such as a new head, are counted among both. :meth:`summary`
        lists the weights, too.

        Examples
        --------
        >>> import torch, tnadapt as tna
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> adapter = tna.torch.attach(model, "lora", ["0"], rank=2, keep_trainable=["1"])
        >>> adapter.print_trainable_parameters()
        trainable params: 776 || all params: 4,936 || trainable%: 15.7212
        """
        print(self.summary().trainable_line())

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

    @checks_arguments
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
        _log.info("merged %r", self)

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before :meth:`merge`.

        Raises
        ------
        TargetError
            If it is not merged, or a weight has changed since.
        """
        _merging.unmerge(self._state)
        _log.info("unmerged %r", self)

    def detach(self) -> None:
        """Remove the adapter and restore the model, including which parameters are trainable.

        Raises
        ------
        TargetError
            If it is merged (unmerge first, or keep it merged with :meth:`bake`), no longer attached, or its arrays
            belong to a PEFT model.
        """
        _removal.detach(self._state)
        _log.info("detached %r", self)

    @checks_arguments
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
        _log.info("baked %r", self)
        return self.model


@checks_arguments
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
