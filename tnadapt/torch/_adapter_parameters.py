"""The parameters of an adapter: the methods of :class:`tnadapt.torch.Adapter` that read, choose and start them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments

from . import _arrays, _begin, _trainable
from ._bound_plan import fill
from ._state import AdapterState, need_unmerged

__all__ = ["AdapterParameters"]


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
        return _arrays.named_parameters(self._state)

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
        return self._state.plan.to_arrays(_arrays.full_arrays(self._state))

    def deltas(self) -> list[Tensor]:
        """Return the update of every target, ``(rows, cols)``, differentiable and without the mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between the factors, in which case no ΔW exists.
        """
        return _arrays.deltas(self._state)

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
        fill(self._state)
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
        _begin.start_from(self._state, arrays)

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
        _arrays.load_arrays(self._state, arrays)
