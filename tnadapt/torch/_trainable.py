"""Which arrays of an adapter are trained, their learning rates (LoRA+ and others), and given starts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.group import Group
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.units import learning_rate
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, is_sequence
from tnadapt.errors import ConfigError, safe_repr, warn

from . import _state
from ._delta import DeltaCache, ThetaArrays, copy_all, gather_full, reshard
from ._state import (
    AdapterSlot,
    AdapterState,
    full_arrays,
    initial_arrays,
    named_parameters,
    need_unmerged,
    pairs,
)
from ._weights import base_weights, bound

# -- The arrays to train, and learning rates: Local LoRA, asymmetric LoRA, LoRA+ ---------------------------------------


def _places(plan: UpdatePlan) -> dict[str, tuple[int | None, set[str]]]:
    """Return the group of each parameter, and the words by which its array can be chosen."""
    places = {name: _place(name) for name in plan.param_shapes if name not in plan.weight_param_shapes}
    for index, names in enumerate(plan.weight_param_names):
        # A weight cut into several groups belongs to all of them.
        groups = {piece.group for piece in plan.layout.of_weight(index)} if names else set()
        for name in names:
            places[name] = groups.pop() if len(groups) == 1 else None, {name.rpartition(".")[2]}
    return places


def _place(name: str) -> tuple[int | None, set[str]]:
    """Return the group of a parameter, and the words by which its array can be chosen."""
    # ``group0.split0.factor0`` is ``factor0``; a diagonal ``group0.split0.factor0.size`` is ``factor0`` and ``size``.
    group, _, rest = name.rpartition("group")[2].partition(".")
    if not rest:
        return None, {name}
    parts = [part for part in rest.split(".") if not part.startswith(("term", "split"))]
    return int(group), set(parts)


def keep(adapter: AdapterState, trained: Collection[str] | None, arrays: Mapping[str, Any] | None = None) -> None:
    """Train only these arrays (None: all), and load new values into some.

    On failure or interruption everything is restored.
    """
    # FSDP2 discards changes to gathered parameters, requires_grad included.
    reshard(adapter.model, adapter.owner)
    everything = adapter.plan.param_shapes
    chosen = everything if trained is None else set(trained)
    names = None if len(chosen) == len(everything) else tuple(name for name in everything if name in chosen)
    new = pairs(adapter, arrays) if arrays else []
    required = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in named_parameters(adapter)]
    numbers = [(parameter, parameter.detach().clone()) for parameter, _ in new]
    before = adapter.trained
    try:
        copy_all(new)
        for name, parameter in named_parameters(adapter):
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None  # an optimizer that holds the parameter would keep updating it
        adapter.trained = names
    except BaseException:  # KeyboardInterrupt, too
        adapter.trained = before
        for parameter, was, gradient in required:
            parameter.requires_grad_(was)
            parameter.grad = gradient
        with torch.no_grad():
            for parameter, number in numbers:
                parameter.copy_(number)
        raise


def _moved_zero(adapter: AdapterState, trained: Collection[str]) -> dict[str, Any]:
    """Return new values for groups still at their start, so that the array that starts at zero is a trained one."""
    plan, everything = adapter.plan, dict(named_parameters(adapter))
    if plan.theta is not None or next(iter(everything.values())).device.type == "meta":
        return {}  # each θ moves all of its arrays; on the meta device, reset() fills them in
    new_values: dict[str, Any] = {}
    able, unable = 0, list[int]()
    for number, (group, old, new) in enumerate(
        zip(plan.groups, plan.starts(adapter.trained), plan.starts(trained), strict=True)
    ):
        names = {name for name, full in group.names.items() if full in trained}
        if not names or (len(names) == len(group.names) and new.zeros == old.zeros):
            continue
        values = {name: gather_full(everything[full]).detach() for name, full in group.names.items()}
        if new.zeros != old.zeros and _is_start(_initial(adapter, group, old), values):
            if adapter.activation == "relu" and new is not group.start:
                raise ConfigError(
                    f"adapter {adapter.name!r} has 'relu' between its factors, whose derivative at zero is zero: "
                    f"{_last_words(names)} alone could never be trained from ΔW = 0. Train "
                    f"{_last_words(group.start.zeros)} too, or use another activation"
                )
            initial = _initial(adapter, group, new)
            new_values.update({full: initial[name] for name, full in group.names.items()})
        elif not can_learn(group, values, names):
            unable.append(number)
            continue
        able += 1
    _refuse_or_warn(
        f"adapter {adapter.name!r} has arrays of zeros next to {_last_words(trained)} that would be frozen, so that "
        "the gradient of the trained arrays is zero",
        "Train the others too, or call reset(), which starts over with the zero in a trained array",
        unable,
        able,
    )
    return new_values


def _initial(adapter: AdapterState, group: Group, start: Initializer) -> Mapping[str, Any]:
    return initial_arrays(adapter, {name: start.host(name) for name in group.names}, start.drawn_for)


def _is_start(initial: Mapping[str, Any], values: Mapping[str, Tensor]) -> bool:
    """Return whether arrays are bit for bit the initial ones."""
    return all(
        torch.equal(array.cpu(), torch.as_tensor(initial[name]).to(array.dtype)) for name, array in values.items()
    )


def can_learn(group: Group, values: Mapping[str, Tensor], trained: Collection[str]) -> bool:
    """Return whether some trained array has a nonzero gradient.

    With a linear F the gradient of an array is the product of the others of its term, so it is zero where one of those
    is zero.
    """
    if not group.projection.linear:
        return True
    alive = {name for name, array in values.items() if bool(array.any())} | group.frozen_names.keys()
    parts = {
        array: [
            array,
            *(f"{array}.{part}" for part in (group.multiplied[array].multipliers if array in group.multiplied else ())),
        ]
        for array in group.network.shapes
    }
    for prefixes in group.network.prefixes:
        term = {
            part
            for prefix, split in zip(prefixes, group.network.splits, strict=True)
            for name in split.shapes
            for part in parts[prefix + name]
        }
        if any(term - {name} <= alive for name in term & set(trained)):
            return True
    return False


def _refuse_or_warn(problem: str, way: str, unable: Sequence[int], able: int) -> None:
    """Raise a ConfigError if no group can learn, and warn if some cannot."""
    if not unable:
        return
    some = ", ".join(map(str, unable[:4])) + (f" and {len(unable) - 4} more" if len(unable) > 4 else "")
    if not able:
        raise ConfigError(f"{problem} in groups {some}: nothing would learn. {way}")
    warn(f"{problem} in groups {some}. {way}")


def _last_words(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _listed(value: Any, known: Sequence[Any]) -> list[Any]:
    """Return the requested items as a list: all known ones for None, and none if any item is unknown."""
    if value is None:
        return list(known)
    listed = list(value) if is_sequence(value) else [value]
    return listed if all(type(item) in (int, str) and item in known for item in listed) else []


# -- Starts: given arrays, and what is computed once the weights have values -------------------------------------------


def _on_host(arrays: Any) -> Any:
    """Return tensors as float32 on the host, and everything else as it is."""
    if not isinstance(arrays, Mapping):
        return arrays
    tensors = {name: array for name, array in arrays.items() if isinstance(array, torch.Tensor)}
    return {**arrays, **{name: tensor.detach().float().cpu() for name, tensor in tensors.items()}}


def _check_gradient(adapter: AdapterState, plan: UpdatePlan) -> None:
    """Raise a ConfigError if no trained array has a gradient at the start, and warn if some groups have none."""
    if plan.theta is not None:
        return
    trained, unable, able = set(adapter.trained or plan.param_shapes), list[int](), 0
    for number, group in enumerate(plan.groups):
        names = {name for name, full in group.names.items() if full in trained}
        values = {name: torch.from_numpy(group.start.host(name)) for name in group.names}
        if names and not can_learn(group, values, names):
            unable.append(number)
        elif names:
            able += 1
    _refuse_or_warn(
        f"adapter {adapter.name!r} would start where the gradient of every trained array is zero, because more than "
        "one array of a product is zero or frozen at zero,",
        "Start one of them at other numbers",
        unable,
        able,
    )


def _exchange(adapter: AdapterState, plan: UpdatePlan, slots: Mapping[AdapterSlot, AdapterSlot]) -> None:
    """Switch an adapter to another plan of the same config, shapes and names, and to new slots."""
    adapter.plan = plan
    adapter.cache = DeltaCache(plan.arrays_plan)
    adapter.made = None if plan.theta is None else ThetaArrays(plan)
    for patch in dict.fromkeys(adapter.patches):
        patch.exchange(slots)
    adapter.slots = [slots.get(slot, slot) for slot in adapter.slots]
    adapter.handle.plan = plan.file_plan
    if adapter.members is not None:
        adapter.members.renew()


# -- The methods that read, choose and start the parameters ------------------------------------------------------------


class AdapterParameters:
    """The part of an :class:`Adapter` that has to do with what is trained."""

    _state: AdapterState
    plan: UpdatePlan

    @property
    def num_parameters(self) -> int:
        """Number of trained elements: of all arrays, unless :meth:`set_trainable` chose some."""
        if self.trained is None:
            return self.plan.num_parameters
        return sum(math.prod(self.plan.param_shapes[name]) for name in self.trained)

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
        return named_parameters(self._state)

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
        return self._state.plan.to_arrays(full_arrays(self._state))

    def deltas(self) -> list[Tensor]:
        """Return the update of every target, ``(rows, cols)``, differentiable and without the mixing weight.

        Raises
        ------
        ConfigError
            If there is an activation between the factors, in which case no ΔW exists.
        """
        _state.need_linear(self._state, "there is no ΔW")
        return self._state.plan.deltas(full_arrays(self._state))

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
        state = self._state
        known = range(state.plan.num_groups)
        places = _places(state.plan)
        last = sorted({word for _, words in places.values() for word in words})
        numbers, words = _listed(groups, known), _listed(arrays, last)
        chosen = [
            name
            for name, (number, array_words) in places.items()
            # A θ of the whole plan belongs to all groups, as does the magnitude of a weight in several of them.
            if (number in numbers or (number is None and numbers)) and not array_words.isdisjoint(words)
        ]
        if not chosen:
            raise ConfigError(
                f"adapter {state.name!r} has no arrays {safe_repr(arrays)} in groups {safe_repr(groups)}; it has "
                f"groups 0 to {len(known) - 1} and arrays {', '.join(last)}"
            )
        keep(state, chosen, _moved_zero(state, chosen))

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
        starts = zip(self._state.plan.groups, self._state.plan.starts(self.trained), strict=True)
        zero = {full for group, start in starts for name, full in group.names.items() if not start.host(name).any()}
        fast = [p for name, p in self.named_parameters() if p.requires_grad and name in zero]
        slow = [p for name, p in self.named_parameters() if p.requires_grad and name not in zero]
        if not slow:
            return [{"params": fast, "lr": lr}]
        return [{"params": slow, "lr": lr}, *([{"params": fast, "lr": lr * ratio}] if fast else [])]

    def learning_rate(self) -> float:
        """Return the learning rate for Adam that suits the base: :func:`tnadapt.learning_rate` of the adapted weights.

        Quantized weights are dequantized, and sharded ones gathered (every process must call), one at a time.

        Raises
        ------
        ConfigError
            If the adapter trains the arrays themselves (``rate="sgd"``), which have no common rate: see
            :meth:`adam_groups`. If the adapted weights are zero, one holds NaN or infinity, or they are on the meta
            device.
        TargetError
            If the adapter is merged, or the values of a weight cannot be read.

        Examples
        --------
        >>> import torch, tnadapt as tna, tnadapt.torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> adapter = tnadapt.torch.attach(model, tna.presets.lora(4), "all-linear")
        >>> adapter.learning_rate()
        0.005
        >>> optimizer = torch.optim.AdamW(adapter.parameters(), lr=adapter.learning_rate(), betas=(0.9, 0.9))
        """
        if self.plan.units != self.plan.units_for("adam"):
            raise ConfigError(
                f"adapter {self._state.name!r} trains the arrays themselves (rate='sgd'), which have no common "
                "learning rate: give the optimizer adapter.adam_groups(), or attach a config with rate='adam', as "
                "presets have"
            )
        return self._rate_of_base("learning_rate()")

    def _rate_of_base(self, what: str) -> float:
        """Return the learning rate that suits the base, for a method that needs it."""
        need_unmerged(self._state, what)
        return learning_rate(base_weights(self._state.targets, [slot.owner for slot in self._state.slots]))

    @checks_arguments
    def adam_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Return parameter groups with which Adam takes the steps of ``rate="adam"``, whatever the config's rate is.

        For adapters that train the arrays themselves (``rate="sgd"``: a config without a preset, an older file): each
        array has its own rate, ``lr * unit``. With ``rate="adam"`` the rates are all ``lr``, and
        ``adapter.parameters()`` does the same.

        Parameters
        ----------
        lr : float, optional
            By default the one that suits the base: :func:`tnadapt.learning_rate`, with the errors of
            :meth:`learning_rate`.

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
        >>> optimizer = torch.optim.AdamW(adapter.adam_groups(), betas=(0.9, 0.9))
        """
        wanted, units = self.plan.units_for("adam"), self.plan.units
        lr = self._rate_of_base("adam_groups()") if lr is None else lr
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(lr * wanted[name] / units[name], []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    def reset(self) -> None:
        """Reinitialize the arrays: ΔW = 0, with the zero in an array that is trained.

        Also use it to fill the arrays after ``model.to_empty()`` of a meta-device model, once its weights are loaded:
        frozen arrays that are computed from them are computed then."""
        need_unmerged(self._state, "reset()")
        state = self._state
        if state.plan.needs_base:
            owners = [slot.owner for slot in state.slots[: len(state.targets)]]
            state.plan.fill(bound(state.plan, state.targets, owners))
        drawn = functools.partial(self.plan.drawn_for, trained=self.trained)
        self.load_arrays(initial_arrays(state, self.plan.init(trained=self.trained), drawn))

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
        state = self._state
        _state.need_attached(state)
        need_unmerged(state, "start_from()")
        plan = state.plan.with_start(_on_host(arrays)).training_plan
        current = dict(named_parameters(state))
        if next(iter(current.values())).device.type == "meta":
            raise ConfigError(
                f"adapter {state.name!r} is on the meta device: give the model its weights and call reset() before "
                "start_from()"
            )
        drawn = functools.partial(state.plan.drawn_for, trained=state.trained)
        for name, start in initial_arrays(state, state.plan.init(trained=state.trained), drawn).items():
            value = gather_full(current[name]).detach().cpu()
            if not torch.equal(value, torch.as_tensor(start).to(value.dtype)):
                raise ConfigError(
                    f"adapter {state.name!r} has been trained or loaded, and another start would change its ΔW: call "
                    "reset(), which discards what was trained, before start_from(), or attach another adapter"
                )
        _check_gradient(state, plan)
        new = pairs(state, initial_arrays(state, plan.init(), plan.drawn_for))
        numbers = [(parameter, parameter.detach().clone()) for parameter, _ in new]
        before = state.plan
        slots = {
            slot: dataclasses.replace(slot, factoring=None if slot.factoring is None else factoring(plan, slot.index))
            for slot in state.slots
        }
        try:
            _exchange(state, plan, slots)
            copy_all(new)
        except BaseException:  # KeyboardInterrupt, too: at any point of the exchange, which is undone slot by slot
            _exchange(state, before, {new_slot: slot for slot, new_slot in slots.items()})
            with torch.no_grad():
                for parameter, number in numbers:
                    parameter.copy_(number)
            raise

    @checks_arguments
    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Copy arrays into the parameters in place, without recompilation; an optimizer keeps its parameters.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or tensors, named and shaped as ``plan.param_shapes``; of a population with the axis of members
            in front, as :meth:`arrays` returns them.

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
        copy_all(_state.checked_pairs(self._state, arrays))
