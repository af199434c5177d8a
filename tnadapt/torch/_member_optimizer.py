"""MemberAdamW: AdamW for populations, which steps the members that have gradients, each at its own rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from ._delta import is_sharded, reshard
from ._population import Member, Population
from ._state import named_parameters

#: The settings that may differ between members.
_PER_MEMBER = ("lr", "weight_decay")


class _Rows(NamedTuple):
    """The members of one parameter that take a step, and their gradients."""

    group: int
    parameter: Tensor
    #: In ascending order.
    numbers: list[int]
    #: Their rows in the part of the parameter that this process has, on its device.
    places: Tensor
    gradient: Tensor


class MemberAdamW(Optimizer):
    """AdamW for a population: each member is trained as by an AdamW of its own.

    A step changes the members that have gradients, and nothing of the others: no decay, no momentum, no count of steps.
    Rates and weight decays may differ between members.

    Parameters
    ----------
    population : Population
    params : iterable of Parameter, or of dict, optional
        What to train, as for any optimizer of torch; ``population.parameters()`` by default. Parameters that are not
        the population's, such as a head that its members share, take the steps of :class:`torch.optim.AdamW`. A dict
        may have settings of its own.
    lr : float or array_like, shape (K,)
        Learning rate; one for each member if it is a sequence or an array.
    betas : (float, float)
    eps : float
    weight_decay : float or array_like, shape (K,)
        One for each member if it is a sequence or an array.
    max_norm : float, optional
        Clip the gradient of each member to this norm, over all of the member's arrays that are trained.
        :func:`torch.nn.utils.clip_grad_norm_` would clip the norm over all members of a batch: the step of a member
        would depend on who else is in its batch.

    Raises
    ------
    ConfigError
        If ``population`` is no population or sharded within members, a setting is negative or not finite, or parameters
        that are not the population's would get one rate for each member.
    ShapeError
        If there is not one rate or weight decay for each member.

    Notes
    -----
    With the same gradients, a member takes the steps of :class:`torch.optim.AdamW` on that member alone, at the times
    when it has gradients. Those that ``zero_grad()`` has not dropped count in the next step, too.

    The gradients say which members take a step. Row-sparse ones (``sparse=True`` of :func:`attach`) have the members
    that were in a batch: each takes a step with the arrays that it has used, even where its gradient is zero. Dense
    ones have zeros for the others: all rows are read, and a member takes a step with all of these arrays if its
    gradient is not zero in one of them, as in one factor of LoRA at the start, or sparse in another.

    The cost of a step, but for reading dense gradients, and the memory of the state grow with the members that are
    trained, and not with K; rows of the state are allocated as members come, up to twice as many as are in use.

    Schedulers multiply ``group["lr"]``, which is the largest of the members' rates; ``group["lr_factors"]`` has the
    members' ratios to it. The groups of :meth:`Adapter.parameter_groups` and :meth:`Adapter.adam_groups` may be
    ``params``: multiply their rates by the members' to combine both. Transformers' ``Trainer`` takes
    ``optimizers=(optimizer, None)`` and dense gradients; set its ``max_grad_norm`` to 0, and ``max_norm`` here instead.

    Under DistributedDataParallel, all processes take the same steps. FSDP2 gives each process some of the members, with
    their state: each saves and loads the ``state_dict()`` of its own.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> users = tnadapt.torch.attach(model, "lora", ["0"], rank=2, population=1000, keep_trainable=["2"])
    >>> rates = torch.full((1000,), users.learning_rate())
    >>> rates[17] = 1e-3
    >>> optimizer = tnadapt.torch.MemberAdamW(
    ...     users, [{"params": users.parameters(), "lr": rates}, {"params": model[2].parameters()}], weight_decay=0.1
    ... )
    >>> before = [parameter.detach().clone() for parameter in users.parameters()]
    >>> with users.members([17, 3, 17, None]):
    ...     model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Members 3 and 17 have changed, and only they have a state:

    >>> changed = [(old != new).flatten(1).any(1) for old, new in zip(before, users.parameters())]
    >>> torch.stack(changed).any(0).nonzero().flatten().tolist()
    [3, 17]
    >>> [tuple(optimizer.state[parameter]["exp_avg"].shape) for parameter in users.parameters()]
    [(2, 8, 2), (2, 8, 2)]
    """

    @checks_arguments
    def __init__(
        self,
        population: Population,
        params: Iterable[Any] | None = None,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Any = 0.0,
        max_norm: float | None = None,
    ) -> None:
        if not isinstance(population, Population):
            raise ConfigError(
                f"MemberAdamW trains a population, which attach(…, population=K) returns; got {safe_repr(population)}. "
                + (
                    "For a member, give its population, of which the members step that have gradients"
                    if isinstance(population, Member)
                    else "For a single adapter, use torch.optim.AdamW"
                )
            )
        if max_norm is not None and not 0.0 < max_norm < float("inf"):
            raise ConfigError(f"max_norm must be a positive number, or None; got {max_norm}")
        self.population, self.max_norm = population, max_norm
        #: For each group, the row of the state that each member has in use.
        self._rows: list[dict[int, int]] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_entries(population.parameters() if params is None else params), defaults)

    def _of_population(self) -> set[Tensor]:
        """Return the population's parameters in this optimizer."""
        state, held = self.population._state, {p for group in self.param_groups for p in group["params"]}
        if any(map(is_sharded, held)):
            reshard(state.model, state.owner)
        return {parameter for _, parameter in named_parameters(state) if parameter in held}

    def _span(self, arrays: Iterable[Tensor]) -> range:
        """Return the members of which this process has these parameters of the population."""
        spans = {_span_of(parameter, self.population.population) for parameter in arrays}
        if len(spans) > 1:
            raise ConfigError(
                f"some arrays of population {self.population.name!r} are sharded and others not, and MemberAdamW needs "
                "all of a member's numbers in one process: shard all of them in the same way"
            )
        return spans.pop() if spans else range(self.population.population)

    # -- Settings, and what is saved of them ---------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose ``lr`` and ``weight_decay`` may be one for each member."""
        settings = {**self.defaults, **param_group}
        _check(settings["betas"], settings["eps"])
        for key in _PER_MEMBER:
            settings[key], settings[f"{key}_factors"] = _largest(key, settings[key], self.population.population)
        settings["members"] = torch.zeros(0, dtype=torch.int64)
        super().add_param_group(settings)
        self._rows.append({})
        try:
            self._check_parameters(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            self._rows.pop()
            raise

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        ours = self._of_population()
        self._span(ours)
        several = [key for key in _PER_MEMBER if group[f"{key}_factors"] is not None]
        if several and not ours.issuperset(group["params"]):
            raise ConfigError(
                f"{several[0]} is one for each member, and some of its parameters are not of population "
                f"{self.population.name!r}: put those into a group with a number, "
                f"{{'params': …, '{several[0]}': {group[several[0]]:g}}}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned for a population of as many members."""
        count, span = self.population.population, self._span(self._of_population())
        for group in state_dict["param_groups"]:
            if "members" not in group:
                raise ConfigError("this is the state of another optimizer; MemberAdamW loads that of MemberAdamW")
            factors = [group[f"{key}_factors"] for key in _PER_MEMBER]
            counts = {len(several) for several in factors if several is not None}
            if counts - {count} or (len(group["members"]) and int(group["members"].max()) >= count):
                raise ShapeError(
                    f"population {self.population.name!r} has {count} members, and this is the state of an optimizer "
                    "for another number of them"
                )
            if not set(group["members"].tolist()) <= set(span):
                raise ShapeError(
                    f"this process has members {span.start} to {span.stop - 1} of population "
                    f"{self.population.name!r}, and this is the state of others: each process loads the state that it "
                    "has saved, with as many processes"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "population": self.population, "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Libraries move all tensors of a state to the device of the model. These are read on the host.
        for group in self.param_groups:
            for key in ("members", *(f"{key}_factors" for key in _PER_MEMBER)):
                group[key] = None if group[key] is None else group[key].cpu()
        ours = self._of_population()
        for parameter, held in self.state.items():
            if parameter in ours:
                held["step"] = held["step"].cpu()
        self._rows = [
            {number: row for row, number in enumerate(group["members"].tolist())} for group in self.param_groups
        ]

    # -- The step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the members that have gradients.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients again, and returns the loss.

        Returns
        -------
        object
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours, trained = self._of_population(), list[tuple[int, Tensor]]()
        for number, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            _step_whole(group, [parameter for parameter in parameters if parameter not in ours], self.state)
            trained += [(number, parameter) for parameter in parameters if parameter in ours]
        pieces = _pieces(trained, self._span(ours).start)
        if self.max_norm is not None and pieces:
            pieces = _clipped(pieces, self.max_norm)
        for piece in pieces:
            self._step_rows(piece)
        return loss

    def _step_rows(self, piece: _Rows) -> None:
        """Take the step of AdamW with some members of one parameter, in the order of operations of torch."""
        group, parameter, gradient = self.param_groups[piece.group], _local(piece.parameter), piece.gradient
        state, rows = self._allocated(piece)
        row_index = torch.tensor(rows, device=parameter.device)
        steps = state["step"].numpy()
        steps[rows] += 1
        beta1, beta2 = group["betas"]
        rates, decays = (_of_members(group, key, piece.numbers) for key in _PER_MEMBER)
        scalars = np.stack([1 - rates * decays, -rates / (1 - beta1 ** steps[rows]), (1 - beta2 ** steps[rows]) ** 0.5])
        # Torch multiplies numbers in half precision by scalars in single precision.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shape = (3, len(rows), *[1] * (parameter.ndim - 1))
        kept, rate, correction = torch.from_numpy(scalars).to(parameter.device, dtype).reshape(shape)

        value = parameter.index_select(0, piece.places).mul_(kept)
        average = state["exp_avg"].index_select(0, row_index).lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, row_index).mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        value.add_((average * rate).div_(square.sqrt().div_(correction).add_(group["eps"])))
        parameter.index_copy_(0, piece.places, value)
        state["exp_avg"].index_copy_(0, row_index, average)
        state["exp_avg_sq"].index_copy_(0, row_index, square)

    def _allocated(self, piece: _Rows) -> tuple[dict[str, Tensor], list[int]]:
        """Return the state of a parameter, and the rows of its members, with new ones for those that have none."""
        group, known, parameter = self.param_groups[piece.group], self._rows[piece.group], _local(piece.parameter)
        new = [number for number in piece.numbers if number not in known]
        known.update(zip(new, itertools.count(len(known))))
        if new:
            group["members"] = torch.cat([group["members"], torch.tensor(new)])
        state = self.state[piece.parameter]
        held = len(state["step"]) if state else 0
        if held < len(known):
            more = min(max(len(known), 2 * held), self.population.population)
            old = dict(state)
            state["step"] = torch.zeros(more, dtype=torch.int64)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = parameter.new_zeros(more, *parameter.shape[1:])
            for key, rows in old.items():
                state[key][:held] = rows
        return state, [known[number] for number in piece.numbers]


def _entries(params: Any) -> list[Any]:
    entries = list(params)
    if not entries or not all(
        isinstance(entry, (Tensor, tuple)) or (isinstance(entry, dict) and "params" in entry) for entry in entries
    ):
        raise ConfigError(
            "params must be parameters of the model, or dicts with 'params', as for an optimizer of torch; got "
            + (safe_repr(params) if entries else "none")
        )
    return entries


def _check(betas: Any, eps: Any) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"betas must be from 0 to below 1; got {safe_repr(betas)}")
    if not 0.0 <= eps < float("inf"):
        raise ConfigError(f"eps must be a number from 0; got {safe_repr(eps)}")


def _largest(key: str, value: Any, count: int) -> tuple[float, Tensor | None]:
    """Return the largest number of a setting, and the ratios of the members to it; None for a single number."""
    try:
        host = value.detach().cpu() if isinstance(value, Tensor) else value
        numbers = np.asarray(host, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} must be a number, or one for each member; got {safe_repr(value)}") from None
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise ConfigError(f"{key} must be finite and not negative; got {safe_repr(value)}")
    if numbers.ndim == 0:
        return float(numbers), None
    if numbers.shape != (count,):
        raise ShapeError(f"{key} must be a number, or {count} numbers, one for each member; got shape {numbers.shape}")
    largest = float(numbers.max())
    return largest, torch.from_numpy(numbers / largest if largest else np.ones(count))


def _of_members(group: Mapping[str, Any], key: str, numbers: Sequence[int]) -> np.ndarray:
    """Return a setting of some members."""
    factors = group[f"{key}_factors"]
    ratios = np.ones(len(numbers)) if factors is None else factors.numpy()[numbers]
    return cast(np.ndarray, float(group[key]) * ratios)


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _span_of(parameter: Tensor, count: int) -> range:
    """Return the members of which this process has their part of a parameter."""
    if not is_sharded(parameter):
        return range(count)
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(split) != 1 or not placements[split[0]].is_shard(0):
        raise ConfigError(
            f"the population's arrays are sharded by {placements}, and MemberAdamW needs all of a member's numbers in "
            "one process: shard them along their first axis alone, as FSDP2 does by default"
        )
    size = -(-count // mesh.size(split[0]))
    first = min(size * mesh.get_local_rank(split[0]), count)
    return range(first, min(first + size, count))


def _pieces(trained: Sequence[tuple[int, Tensor]], first: int) -> list[_Rows]:
    """Return the members of parameters, given with their groups, that have gradients; ``first`` is that of row 0."""
    gradients = [_local(cast(Tensor, parameter.grad)) for _, parameter in trained]
    nonzero = None
    if not all(gradient.is_sparse for gradient in gradients):
        masks = [_mask(gradient) for gradient in gradients]
        nonzero = torch.stack([mask.to(masks[0].device) for mask in masks]).any(0).nonzero().flatten()
    pieces = []
    for (group, parameter), gradient in zip(trained, gradients, strict=True):
        if gradient.is_sparse:
            summed = gradient.coalesce()
            places, rows = summed.indices()[0], summed.values()
        else:
            places = cast(Tensor, nonzero).to(gradient.device)
            rows = gradient.index_select(0, places)
        if len(places):
            pieces.append(_Rows(group, parameter, [first + place for place in places.tolist()], places, rows))
    return pieces


def _mask(gradient: Tensor) -> Tensor:
    """Return of each row of a gradient whether it is not zero, or of a sparse one whether it has the row."""
    if not gradient.is_sparse:
        return gradient.reshape(len(gradient), math.prod(gradient.shape[1:])).any(1)
    rows = gradient.coalesce().indices()[0]
    return torch.zeros(len(gradient), dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)


def _clipped(pieces: Sequence[_Rows], max_norm: float) -> list[_Rows]:
    """Return gradients of each member clipped to a norm, as by ``torch.nn.utils.clip_grad_norm_``."""
    members = sorted({number for piece in pieces for number in piece.numbers})
    places = {number: place for place, number in enumerate(members)}
    norms = torch.zeros(len(members), len(pieces), device=pieces[0].gradient.device, dtype=torch.float64)
    rows = [[places[number] for number in piece.numbers] for piece in pieces]
    for column, piece in enumerate(pieces):
        norms[rows[column], column] = piece.gradient.flatten(1).norm(dim=1).to(norms)
    factors = (max_norm / (norms.norm(dim=1) + 1e-6)).clamp(max=1.0)
    clipped = []
    for row, piece in zip(rows, pieces, strict=True):
        factor = factors[row].to(piece.gradient).reshape(-1, *[1] * (piece.gradient.ndim - 1))
        clipped.append(piece._replace(gradient=piece.gradient * factor))
    return clipped


def _step_whole(group: Mapping[str, Any], parameters: Sequence[Tensor], state: Mapping[Tensor, Any]) -> None:
    """Take a step of torch's AdamW."""
    for parameter in parameters:
        if not state[parameter]:
            state[parameter].update(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
    held = [state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    adamw(
        list(parameters), [cast(Tensor, parameter.grad) for parameter in parameters],
        [entry["exp_avg"] for entry in held], [entry["exp_avg_sq"] for entry in held], [],
        [entry["step"] for entry in held],
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip
