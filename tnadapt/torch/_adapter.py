"""Adapter, the handle of an adapter on a model: its methods and its summary; ``adapters``, the handles of a model.

:class:`Adapter` is one class in three parts: its parameters, its files, and the rest. The methods are thin: what they
do is in the modules for loading, saving, merging, training and removal.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.lora_export import LoraExport, lora_export
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, escaped, pluralize, safe_repr
from tnadapt.report import TextTable

from . import _adapter_saving as saving
from . import _merging, _registry, _state, _trainable
from ._base_models import describe
from ._merging import RequantizationReport
from ._quantized import quantized_type
from ._registry import attached, mix, set_weight
from ._state import AdapterState, is_array, named_parameters, need_unmerged
from ._trainable import num_parameters
from ._weights import join

if TYPE_CHECKING:
    from tnadapt.decomposition import FitReport

__all__ = ["Adapter", "adapters"]


# -- What a handle has instead of PEFT's methods, for the error of somebody who calls them -----------------------------


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


def refuse_attribute(class_name: str, name: str) -> NoReturn:
    """Raise the AttributeError of an attribute that is missing.

    Examples
    --------
    >>> refuse_attribute("Adapter", "merge_and_unload")
    Traceback (most recent call last):
        ...
    AttributeError: 'Adapter' object has no attribute 'merge_and_unload'; PEFT's merge_and_unload is bake() here
    """
    hint = f"; PEFT's {name} is {_INSTEAD[name]} here" if name in _INSTEAD else ""
    raise AttributeError(f"{class_name!r} object has no attribute {safe_repr(name)}{hint}")


# -- The summary: the slices of groups that each weight's update consists of -------------------------------------------


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
        A matrix rank that the update never exceeds: :meth:`tnadapt.SuperLoRA.largest_rank`.
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
        self.parameters = num_parameters(adapter)
        self.frozen = plan.num_parameters - self.parameters
        self.adapted = plan.size
        sizes = _sizes(adapter)
        self.kept = sum(sizes.get(name, 0) for name in adapter.kept)
        self.base = sum(sizes.values())

    @property
    def lora_rank(self) -> int | None:
        """The rank of LoRA that holds the update of every module exactly, or None: that of ``export``."""
        return self.export.rank

    def trainable_line(self) -> str:
        """Return the numbers of trainable and of all parameters, in the words of PEFT."""
        trained, every = self.parameters + self.kept, self.base + self.parameters + self.frozen
        return f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100.0 * trained / every:.4f}"

    def __str__(self) -> str:
        return f"{self.title}\n{self._table()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        return TextTable(list(map(self._cells, self.rows)), _HEAD, caption=self.title, notes=self._notes())

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
    def _cells(row: SummaryRow) -> tuple[str, ...]:
        slices = " + ".join(f"{group}[{start}:{stop}]" for group, start, stop in row.slices)
        return escaped(row.target), row.role, "×".join(map(str, row.shape)), slices, row.strategy


def _sizes(adapter: AdapterState) -> dict[str, int]:
    """Return the elements of each of the base's parameters; of a quantized weight, those that it stands for."""
    model = adapter.model
    adapter_ids = {id(parameter) for _, parameter in named_parameters(adapter)}
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not is_array(name) and id(parameter) not in adapter_ids
    }
    for path, module in model.named_modules():
        layer_type = quantized_type(module)
        if layer_type is not None:
            for name in layer_type.stored:
                sizes.pop(join(path, name), None)
            sizes[join(path, "weight")] = math.prod(layer_type.shape(module))
    return sizes


# -- The methods that read, choose and start the parameters ------------------------------------------------------------


class AdapterParameters:
    """The part of an :class:`Adapter` that has to do with what is trained."""

    _state: AdapterState
    plan: SuperLoRA

    @property
    def num_parameters(self) -> int:
        """Number of trained elements: of all arrays, unless :meth:`set_trainable` chose some."""
        return _trainable.num_parameters(self._state)

    @property
    def trained(self) -> tuple[str, ...] | None:
        """The arrays that :meth:`set_trainable` chose, by their names in the plan; None for all."""
        return self._state.trained

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all parameters, trainable or not, with the names of their arrays in the plan.

        An array is its unit in ``plan.units`` times the parameter: see :meth:`arrays`.

        Yields
        ------
        str, nn.Parameter
            Such as ``group0.split0.factor0``.
        """
        return _state.named_parameters(self._state)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters that are trained, for an optimizer.

        Parameters of the model that ``keep_trainable`` left trainable are not included; the parameters in
        ``model.parameters()`` that require a gradient are both together.
        """
        return (parameter for _, parameter in self.named_parameters() if parameter.requires_grad)

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by name, as files have them; sharded ones are gathered (every process must call).

        They are the parameters times their units in ``plan.units``, which are 1 for ``rate="sgd"``.
        """
        return self._state.plan.to_arrays(_state.full_arrays(self._state))

    def deltas(self) -> list[Tensor]:
        """Return the update of every target, ``(rows, cols)``, differentiable and without the mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between the factors, in which case no ΔW exists.
        """
        return _state.deltas(self._state)

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

        Under ``torch.distributed`` every process must call. Create a new optimizer afterwards, or give it all
        parameters with ``weight_decay=0``: an optimizer skips parameters that have no gradient.
        """
        _trainable.choose(self._state, groups, arrays)

    @checks_arguments
    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Return the parameter groups of LoRA+ for an optimizer.

        Arrays that start from zero (LoRA's B) have rate ``lr * ratio``, the others ``lr``. Where none starts from zero
        (a nonlinear F), all have ``lr``.

        Parameters
        ----------
        lr : float
        ratio : float
            16, as in the paper, by default.

        Returns
        -------
        list of dict
            Each with ``params``, trained parameters, and ``lr``.

        References
        ----------
        Hayou, Ghosh, Yu, "LoRA+: efficient low rank adaptation of large models", arXiv 2402.12354.
        """
        return _trainable.parameter_groups(self._state, lr, ratio)

    @checks_arguments
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
        [0.08]
        >>> optimizer = torch.optim.Adam(adapter.adam_groups(1e-2))
        """
        return _trainable.adam_groups(self._state, lr)

    def reset(self) -> None:
        """Reinitialize the arrays: ΔW = 0, with the zero in an array that is trained.

        Also use it to fill the arrays after ``model.to_empty()`` of a meta-device model, once its weights are loaded:
        frozen arrays that are computed from them are computed then."""
        need_unmerged(self._state, "reset()")
        _trainable.fill(self._state)
        self.load_arrays(self.plan.init(trained=self.trained))

    @checks_arguments
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
        _trainable.start_from(self._state, arrays)

    @checks_arguments
    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Copy arrays into the parameters in place, without recompilation; an optimizer keeps its parameters.

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
        _state.load_arrays(self._state, arrays)


# -- The methods that save, upload and exchange the adapter ------------------------------------------------------------


_log = logging.getLogger(__name__)


class AdapterFiles:
    """The part of an :class:`Adapter` that has to do with files."""

    _state: AdapterState

    @property
    def pretrained(self) -> Pretrained | None:
        """The pretrained model it belongs to, which files record: name, revision, task, labels.

        What the file had if the adapter was loaded, else what a model of transformers or timm says about itself, else
        None. Assign another one to change what is recorded: ``adapter.pretrained =
        dataclasses.replace(adapter.pretrained, labels=["no", "yes"])``. None reads it from the model again.
        """
        return self._state.pretrained or describe(self._state.model)

    @pretrained.setter
    def pretrained(self, about: Pretrained | None) -> None:
        if about is not None and not isinstance(about, Pretrained):
            raise ConfigError(f"pretrained must be a tnadapt.Pretrained or None; got {type(about).__name__}")
        self._state.pretrained = about

    @checks_arguments
    def save(self, path: str | os.PathLike[str], *, store_bases: bool = False) -> None:
        """Write one safetensors file: arrays, parameters in ``keep_trainable``, config, targets, :attr:`pretrained`.

        Parameters
        ----------
        path : path-like
            Written to a temporary name and renamed, so that an existing file is replaced atomically.
        store_bases : bool
            Whether to store the arrays that are computed from the base weights (``FromBase``, starts), so that the file
            gives the same bits on every machine. By default the file has the base's fingerprint, and they are computed
            again; a base without a fingerprint has them stored anyway.

        Raises
        ------
        FileError
            If it cannot be written, or an array is not finite.

        Notes
        -----
        Under ``torch.distributed`` every process must call (sharded arrays are gathered), and process 0 writes.
        """
        saving.save(self._state, path, self.pretrained, store_bases)
        _log.info("saved %r to %s", self, escaped(str(path)))

    @checks_arguments
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        processor: Any = None,
        metrics: Mapping[str, float] | None = None,
        store_bases: bool = False,
        overwrite_card: bool = False,
    ) -> None:
        """Write a folder for :func:`tnadapt.torch.load_pretrained`: the file, a model card, tokenizer or processor.

        Parameters
        ----------
        folder : path-like
            Created if needed. The file is ``adapter.safetensors``, the card ``README.md``.
        tokenizer, processor : object, optional
            What prepares the model's inputs, as transformers loads it; its own ``save_pretrained`` writes its files.
        metrics : dict of str to float, optional
            Results for the card, such as ``{"accuracy": 0.93}``.
        store_bases : bool
            As in :meth:`save`.
        overwrite_card : bool
            Whether to replace a ``README.md`` that was written or edited by hand. A card that is as tnadapt wrote it
            is always replaced.

        Raises
        ------
        FileError
            If a file cannot be written.
        ConfigError
            If a metric is not a number, or the tokenizer or processor cannot be saved.

        Notes
        -----
        Under ``torch.distributed`` every process must call, and process 0 writes.
        """
        saving.save_folder(
            self._state, folder, self.pretrained, (tokenizer, processor), metrics, store_bases, overwrite_card
        )

    @checks_arguments
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        metrics: Mapping[str, float] | None = None,
        store_bases: bool = False,
        overwrite_card: bool = False,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, and return the commit's address.

        Parameters
        ----------
        repo_id : str
            A repository such as "user/my-adapter", created if needed.
        private : bool, optional
            Whether a new repository is private; None for the hub's default.
        token : str or bool, optional
            As in huggingface_hub; None for the stored one.
        commit_message : str, optional
        revision : str, optional
            The branch, created if needed; None for the main one.
        tokenizer, processor, metrics, store_bases
            As in :meth:`save_pretrained`.
        overwrite_card : bool
            Whether to replace the ``README.md`` of the repository if it has one.

        Raises
        ------
        TnadaptError
            If huggingface_hub is missing or the upload fails.

        Notes
        -----
        A base or tokenizer in a local folder is not named in the upload, as nobody else has it. Call it in one process.
        """
        return saving.push(
            self._state, repo_id, self.pretrained, (tokenizer, processor), metrics, store_bases, overwrite_card,
            {"private": private, "token": token, "commit_message": commit_message, "revision": revision},
        )  # fmt: skip

    @checks_arguments
    def swap(self, path: str | os.PathLike[str]) -> None:
        """Load the arrays of another adapter's file, of the same config and targets, in place without recompiling.

        Raises
        ------
        FileError
            If the file does not fit; nothing is changed.
        """
        saving.swap(self._state, path)
        _log.info("swapped the arrays of %r for those in %s", self, escaped(str(path)))


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
        _registry.detach(self._state)
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
        _registry.bake(self._state, max_error)
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
