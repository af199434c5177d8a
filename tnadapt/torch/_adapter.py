"""Adapter, the handle of an adapter on a model: its methods and its summary; ``adapters``, the handles of a model.

:class:`Adapter` is one class in three parts: the methods for parameters are in ``_trainable``, those for files in
``_adapter_saving``, and the rest is here.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.info import alike_but_for_layers, common_pattern
from tnadapt.checkpoints.lora_export import LoraExport, lora_export
from tnadapt.errors import escaped, pluralize, safe_repr
from tnadapt.planning import known_as
from tnadapt.report import TextTable

from . import _merging, _registry
from ._adapter_saving import AdapterFiles
from ._merging import RequantizationReport
from ._quantized import quantized_type
from ._registry import attached, mix, set_weight
from ._state import AdapterState, is_array
from ._trainable import AdapterParameters
from ._weights import join

if TYPE_CHECKING:
    from tnadapt.decomposition import FitReport


# -- Replacements for PEFT's methods, for the error when they are called -----------------------------------------------


_INSTEAD = {
    "add_weighted_adapter": "tnadapt.torch.mix(model, {'first': 0.5, 'second': 0.5}), which needs no new adapter",
    "delete_adapter": "detach()",
    "disable_adapter": "disabled()",
    "merge_adapter": "merge()",
    "merge_and_unload": "bake()",
    "set_adapter": "activate()",
    "unload": "detach()",
    "unmerge_adapter": "unmerge()",
}


# -- The summary: the slices of groups that make up each weight's update -----------------------------------------------


# A summary of more weights than this has one line for those that differ in the layer alone.
_SHOWN = 12
_HEAD = ("target", "role", "shape", "group[slice]", "strategy")


class SummaryRow(NamedTuple):
    """The row of one weight.

    Attributes
    ----------
    target : str
        The parameter's path in the model.
    role : str
        Its role in the model, such as ``"q"``.
    shape : tuple of int
        ``(rows, cols)`` of the update.
    slices : tuple of (group, start, stop)
        The ranges of elements of groups that the update consists of.
    strategy : str
        How the layer uses the update.
    rank : int
        A matrix rank that the update never exceeds: :meth:`tnadapt.UpdatePlan.largest_rank`.
    """

    target: str
    role: str
    shape: tuple[int, int]
    slices: tuple[tuple[int, int, int], ...]
    strategy: str
    rank: int


class Summary:
    """The result of :meth:`Adapter.summary`: ``rows`` and counts; prints as a table.

    Attributes
    ----------
    rows : list of SummaryRow
    parameters : int
        Trained elements of the adapter.
    frozen : int
        Elements of the arrays that :meth:`Adapter.set_trainable` froze.
    members : int
        The members of a population, each of which has these; 1 for a single adapter.
    adapted : int
        Elements of the weights that the adapter updates.
    kept : int
        Elements of the model's own parameters that ``keep_trainable`` left free.
    base : int
        Elements of the base model.
    export : LoraExport
        Whether :func:`tnadapt.convert` exports the adapter exactly as LoRA, at which rank, and at which rank vLLM
        serves it; or why it can only be merged.
    """

    def __init__(self, adapter: AdapterState) -> None:
        plan = adapter.plan
        self.title = f"adapter {adapter.name!r} on {type(adapter.model).__name__}"
        self.rows = [
            SummaryRow(
                target.name,
                target.role,
                target.shape,
                tuple((p.group, p.group_start, p.group_start + p.length) for p in plan.layout.of_weight(index)),
                slot.strategy,
                plan.largest_rank(index),
            )
            for index, (target, slot) in enumerate(zip(adapter.targets, adapter.slots, strict=False))
        ]
        self.groups = plan.num_groups
        self.export: LoraExport = lora_export(plan, adapter.targets, adapter.activation)
        self.parameters = adapter.handle.num_parameters
        self.frozen = plan.num_parameters - self.parameters
        self.members = 1 if adapter.members is None or adapter is not adapter.whole else adapter.members.count
        self.adapted = plan.size
        sizes = _sizes(adapter)
        self.kept = sum(sizes.get(name, 0) for name in adapter.kept)
        self.base = sum(sizes.values())

    def trainable_line(self) -> str:
        """Return the numbers of trainable and of all parameters, in the words of PEFT."""
        trained = self.members * self.parameters + self.kept
        every = self.base + self.members * (self.parameters + self.frozen)
        return f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100.0 * trained / every:.4f}"

    def __str__(self) -> str:
        return f"{self.title}\n{self._table()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        rows = [self._cells([row]) for row in self.rows]
        if len(rows) > _SHOWN:
            alike = alike_but_for_layers(self.rows, lambda row: row.target, lambda row: (row[1:3], row.strategy))
            rows = list(map(self._cells, alike))
        return TextTable(rows, _HEAD, caption=self.title, notes=self._notes())

    def _notes(self) -> list[str]:
        share = 100.0 * self.parameters / self.base
        count = (
            f"{self.parameters:,} parameters in {self.groups} group{'s' * (self.groups != 1)} for {self.adapted:,} "
            f"elements of {pluralize(len(self.rows), 'weight')}; {share:.3g} % of the base's {self.base:,}"
        )
        if self.frozen:
            count += f"; {self.frozen:,} more frozen"
        if self.kept:
            count += f"; {self.kept:,} of the model kept trainable"
        return [count, str(self.export)]

    @staticmethod
    def _cells(rows: list[SummaryRow]) -> tuple[str, ...]:
        """Return the cells of a line for rows that are alike."""
        ends = [
            " + ".join(f"{group}[{start}:{stop}]" for group, start, stop in row.slices)
            for row in dict.fromkeys((rows[0], rows[-1]))
        ]
        row, name = rows[0], common_pattern([row.target for row in rows])
        times = f"{len(rows)} × " if len(rows) > 1 else ""
        return times + escaped(name), row.role, "×".join(map(str, row.shape)), " … ".join(ends), row.strategy


def _sizes(adapter: AdapterState) -> dict[str, int]:
    """Return the number of elements of each base parameter, counting a quantized weight's dequantized elements."""
    model = adapter.model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if not is_array(name)}
    for path, module in model.named_modules():
        layer_type = quantized_type(module)
        if layer_type is not None:
            for name in layer_type.stored:
                sizes.pop(join(path, name), None)
            sizes[join(path, "weight")] = math.prod(layer_type.shape(module))
    return sizes


_log = logging.getLogger(__name__)


# -- The handle --------------------------------------------------------------------------------------------------------


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
    plan : UpdatePlan
        The computation of the updates; see :class:`tnadapt.UpdatePlan`.
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
        self.model, self.plan = state.model, state.plan.file_plan
        self.targets, self.activation = state.targets, state.activation
        self.report: FitReport | None = None

    @property
    def _method(self) -> str:
        """The method and its setting; of several configs, that of the first."""
        name, *others = dict.fromkeys(str(known_as(plan.config)) for plan, _ in self.plan.config_plans)
        return f"{name} and {pluralize(len(others), 'other setting')}" if others else name

    def __repr__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "disabled"
        weights = pluralize(len(self.targets), "weight")
        return (
            f"<tnadapt adapter {self.name!r}: {self._method}, {self.num_parameters:,} parameters for {weights} of "
            f"{type(self.model).__name__}, {state}, weight {self.weight:g}>"
        )

    if not TYPE_CHECKING:  # a type checker would accept any attribute

        def __getattr__(self, name: str) -> Any:
            hint = f"; PEFT's {name} is {_INSTEAD[name]} here" if name in _INSTEAD else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {safe_repr(name)}{hint}")

    # -- Properties --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name on the model."""
        return self._state.name

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
        """Return a table of targets, shapes, groups and slices with counts; ``print`` it, or read its ``rows``.

        A row has ``target``, ``role``, ``shape``, ``slices`` (group, start and stop of each), ``strategy``, and a bound
        on the matrix rank of the update, ``rank``. ``parameters``, ``frozen``, ``members``, ``adapted``, ``kept`` and
        ``base`` count elements and members. ``export`` says whether the adapter exports exactly as LoRA.
        """
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
        _registry.need_own_arrays(self._state, "detach()")
        _registry.let_go(self._state)
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
        _registry.need_own_arrays(self._state, "bake()")
        _registry.let_go_merged(self._state, max_error)
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
