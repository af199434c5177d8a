"""Populations: K adapters of one model as one, whose arrays have a leading axis; ``members`` gives each row its own.

:class:`Population` is what ``attach(…, population=K)`` returns, and :class:`Member` the view of one of its members.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments, flag
from tnadapt.checkpoints.population_file import checked_names
from tnadapt.errors import ConfigError, TargetError, pluralize, safe_repr, summarize

from . import _merging, _registry, _rows
from ._adapter import Adapter
from ._members import MemberRows
from ._state import AdapterState, Members, MemberState, entered, need_attached, open_assignments

# -- The members that are meant: numbers and names, checked ------------------------------------------------------------


def member_number(state: AdapterState, member: Any) -> int:
    """Return the number of a member that is given by its number or name."""
    members = state.members
    assert members is not None
    if isinstance(member, str):
        number = members.number(member)
        if number is None:
            names = [name for name in members.names or () if name is not None]
            listed = f"the names {summarize(names)}" if names else "no names"
            raise TargetError(f"population {state.name!r} has no member {safe_repr(member)}; its members have {listed}")
        return number
    try:
        if isinstance(member, bool) or (isinstance(member, Tensor) and member.dtype not in _INTEGERS):
            raise TypeError
        number = operator.index(member)
    except TypeError:
        raise ConfigError(
            f"a member of population {state.name!r} is a number from 0 to {members.count - 1}, or a name; got "
            + safe_repr(member)
        ) from None
    if not 0 <= number < members.count:
        raise TargetError(
            f"population {state.name!r} has members 0 to {members.count - 1}; got {number}"
            + ("; negative numbers do not count from the end" if number < 0 else "")
        )
    return number


def member_numbers(state: AdapterState, index: Any) -> list[int | None]:
    """Return the members of the rows of a batch as numbers."""
    if isinstance(index, (Tensor, np.ndarray)):
        integers = index.dtype in _INTEGERS if isinstance(index, Tensor) else index.dtype.kind in "iu"
        if index.ndim != 1 or not integers:
            raise ConfigError(
                f"members() needs one integer for each row; got {type(index).__name__} of shape {tuple(index.shape)} "
                f"and dtype {str(index.dtype).removeprefix('torch.')}"
            )
        index = index.tolist()
    # Sets have no order, and iterators can be read once.
    if isinstance(index, (str, bytes)) or not isinstance(index, Sequence) or not index:
        raise ConfigError(
            "members() needs a list with a member's number or name, or None, for each row of the batch; got "
            + safe_repr(index)
        )
    return [None if member is None else member_number(state, member) for member in index]


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# -- The handles -------------------------------------------------------------------------------------------------------


class Population(Adapter):
    """K adapters of one plan on one model, whose arrays have a leading axis of length K.

    ``attach(model, …, population=K)`` returns one. It is an :class:`Adapter` for what concerns all members: its
    parameters, which rows they act on, files, ``disabled()`` and ``detach()``. What concerns a single adapter, such as
    merging, is a method of a member: ``population[3]``, or ``population["user-17"]`` where members have names.

    Attributes
    ----------
    population : int
        K.
    names : list of (str or None)
        The names of the members. Assign a sequence of K distinct names, with None for members that have none, or None.
    sparse : bool
        Whether gradients are row-sparse, as those of ``torch.nn.Embedding(sparse=True)``: sparse tensors with rows of
        the members in the batch alone, so that the cost of ``backward`` does not depend on K. :class:`MemberAdamW`,
        :class:`torch.optim.SparseAdam`, and SGD and Adagrad without weight decay take them; torch's other optimizers
        and ``clip_grad_norm_``, which Trainer calls, do not. ``attach(…, sparse=True)`` sets it, and it may be assigned
        at any time.

        A program that is compiled as a whole, ``torch.func`` and ``create_graph=True`` give dense ones in any case. A
        forward pass under FSDP2 or DistributedDataParallel, which need dense ones, raises a ConfigError.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> users = tnadapt.torch.attach(model, "lora", "all-linear", rank=2, population=100)
    >>> users.num_parameters, [tuple(parameter.shape) for parameter in users.parameters()][:2]
    (52, [(100, 8, 2), (100, 8, 2)])

    A training step, in which each row of the batch is that of a member:

    >>> x, y = torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
    >>> with users.members([17, 3, 17, 99]):
    ...     loss = torch.nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()

    One member alone:

    >>> users[17].activate()
    >>> output = model(x)
    """

    @property
    def population(self) -> int:
        """The number of members."""
        return self._members.count

    @property
    def _members(self) -> Members:
        return cast(Members, self._state.members)

    def __len__(self) -> int:
        return self.population

    @property
    def names(self) -> list[str | None]:
        """The names of the members, in order, and None for those that have none."""
        names = self._members.names
        return [None] * self.population if names is None else list(names)

    @names.setter
    def names(self, names: Sequence[str | None] | None) -> None:
        self._members.names = None if names is None else tuple(checked_names(names, self.population))

    @property
    def sparse(self) -> bool:
        """Whether gradients are row-sparse where they can be."""
        return self._members.sparse

    @sparse.setter
    def sparse(self, sparse: bool) -> None:
        self._members.sparse = flag("sparse", sparse)

    def __getitem__(self, member: int | str) -> Member:
        """Return the view of a member, given by its number or name.

        Raises
        ------
        TargetError
            If there is no such member; negative numbers do not count from the end.
        ConfigError
            If it is neither an integer nor a string.
        """
        need_attached(self._state)
        state = self._members.state(self._state, member_number(self._state, member))
        if state.handle is None:
            Member(state)
        handle: Member = state.handle
        return handle

    def __iter__(self) -> Iterator[Member]:
        return (self[number] for number in range(self.population))

    def __repr__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "disabled"
        return (
            f"<tnadapt population {self.name!r}: {self.population:,} member{'s' * (self.population != 1)} of "
            f"{self.num_parameters:,} parameters ({self._method}) for {pluralize(len(self.targets), 'weight')} of "
            f"{type(self.model).__name__}, {state}, weight {self.weight:g}>"
        )

    @contextlib.contextmanager
    def members(self, index: Any) -> Iterator[None]:
        """Give each row of a batch its member, or none, inside ``with``.

        Parameters
        ----------
        index : sequence or array of int, or sequence of str or None
            A member's number for each row, or its name; None for the base alone. If a layer gets more rows, each entry
            stands for the same number of consecutive ones, as in :func:`tnadapt.torch.rows`, whose rules hold here.

        Raises
        ------
        TargetError
            If there is no such member, one is merged, rows cannot be told apart, or this is inside
            ``with rows(...)``, or ``with members(...)`` of another population. In a forward pass: if the first
            dimension of a layer's input is not a multiple of the number of entries.
        ConfigError
            If ``index`` is no sequence of integers or names.

        Notes
        -----
        A row's output is that of the row alone with its member activated, and gradients reach the members of the batch
        alone: the others' rows of ``parameter.grad`` are zeros. Other adapters on the model act as they do outside.

        The cost grows with the members in the batch, not with K, except that ``backward`` fills a gradient of all K
        members with zeros, unless gradients are sparse. Where an update is low-rank, all rows are two batched products.
        Where ΔW has to be formed, it is formed once for each member in the batch. On a GPU, arrays that several layers
        share are selected once only in a pass of the model that the population is attached to, not in calls of its
        parts alone.
        """
        need_attached(self._state)
        numbers = member_numbers(self._state, index)
        _rows.check_rows(self._state)
        inside = [state for assignment in open_assignments() for state in assignment.governed]
        if any(state is not self._state for state in inside if state in _registry.overlapping(self.model)):
            raise TargetError(
                f"members() of population {self.name!r} cannot be used inside rows(), or inside members() of another "
                "population of this model: a row has one adapter or member"
            )
        try:
            with entered(MemberRows(self._state, numbers), _rows.row_runner()):
                yield
        finally:
            _registry.trim_idle([self._state])

    def _single(self, what: str) -> NoReturn:
        raise ConfigError(
            f"adapter {self.name!r} is a population of {self.population:,} members, and {what} is of a single adapter: "
            f"name a member, as in adapter[0].{what}"
        )

    def merge(self, max_error: float | None = None) -> None:
        """Raise a ConfigError: a member is merged, ``population[k].merge()``."""
        self._single("merge()")

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before a member was merged."""
        if self.merged:
            _merging.unmerge(self._state)
        else:
            self._single("unmerge()")

    def bake(self, max_error: float | None = None) -> nn.Module:
        """Raise a ConfigError: a member is baked, ``population[k].bake()``."""
        self._single("bake()")

    def deltas(self) -> list[Tensor]:
        """Raise a ConfigError: a member has updates, ``population[k].deltas()``."""
        self._single("deltas()")

    def swap(self, path: Any, member: int | str | None = None) -> None:
        """Raise a ConfigError: a member takes the arrays of a file, ``population[k].swap(path)``."""
        self._single("swap(path)")


class Member(Adapter):
    """A view of one member of a :class:`Population`: an adapter that shares its arrays.

    Its ``named_parameters()`` are views of the population's parameters: numbers that are written to them are those of
    the member, but they are not what an optimizer can train. :class:`MemberAdamW` takes the population, and steps the
    members that have gradients, such as the one that :meth:`activate` lets act.

    Attributes
    ----------
    number : int
        Its place in the population.
    """

    def __init__(self, state: MemberState) -> None:
        super().__init__(state)
        self.number, self._members = state.number, cast(Members, state.whole.members)

    @property
    def name(self) -> str:
        """The population's name with that of the member, or its number, in brackets."""
        names = self._members.names
        name = None if names is None else names[self.number]
        return f"{self._state.name}[{self.number if name is None else repr(name)}]"

    def __repr__(self) -> str:
        names = self._members.names
        name = None if names is None else names[self.number]
        return (
            f"<tnadapt member {self.number}{'' if name is None else f' ({name!r})'} of population "
            f"{self._state.name!r}: {self.num_parameters:,} parameters for {pluralize(len(self.targets), 'weight')} of "
            f"{type(self.model).__name__}>"
        )

    @property
    def merged(self) -> bool:
        """Whether this member is merged into the weights."""
        return self._state.merged is not None and self._members.merged == self.number

    def activate(self) -> None:
        """Let this member act on all rows of passes outside of ``with members(...)``, and deactivate other adapters.

        What was cached for the member that acted before is discarded.
        """
        self._refuse_another()
        _registry.mix(self.model, {self._state.name: 1.0})
        self._members.activate(cast(MemberState, self._state))
        _registry.trim_idle([self._state])

    @checks_arguments
    def merge(self, max_error: float | None = None) -> None:
        """Add this member's ΔW to the weights, as :meth:`Adapter.merge` does; until :meth:`unmerge` no other acts."""
        self._refuse_another()
        if not self.merged:
            self._members.merged = self.number  # before: a merge that is interrupted when it is done knows its member
        super().merge(max_error)

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before :meth:`merge`."""
        self._refuse_another()
        super().unmerge()

    @checks_arguments
    def bake(self, max_error: float | None = None) -> nn.Module:
        """Merge this member for good and remove the population, as :meth:`Adapter.bake` does; return the model."""
        self._refuse_another()
        return super().bake(max_error)

    def _refuse_another(self) -> None:
        """Raise a TargetError if another member is merged."""
        if self._state.merged is not None and not self.merged:
            raise TargetError(
                f"member {self._members.merged} of population {self._state.name!r} is merged, and not member "
                f"{self.number}: unmerge() that one"
            )

    def detach(self) -> None:
        """Raise a ConfigError: the whole population is detached."""
        raise ConfigError(
            f"member {self.number} is a part of population {self._state.name!r}: detach() the population itself"
        )

    def _of_all(self, what: str, call: str) -> NoReturn:
        raise ConfigError(f"all members of population {self._state.name!r} {what}: call {call} of the population")

    def set_weight(self, weight: float) -> None:
        """Raise a ConfigError: all members have one mixing weight."""
        self._of_all("have one mixing weight", "set_weight()")

    def start_from(self, arrays: Any) -> None:
        """Raise a ConfigError: the start is a part of the plan, which all members have."""
        self._of_all("start from the same given arrays", "start_from()")

    def set_trainable(self, groups: Any = None, arrays: Any = None) -> None:
        """Raise a ConfigError: all members train the same arrays."""
        self._of_all("train the same arrays", "set_trainable()")

    def _untrained(self, params: str) -> NoReturn:
        raise ConfigError(
            f"the parameters of member {self.number} are views of those of population {self._state.name!r}, which no "
            f"optimizer can train: use tnadapt.torch.MemberAdamW(population, population.{params}), which steps the "
            "members that have gradients. named_parameters() has the views"
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Raise a ConfigError: optimizers train the parameters of the population."""
        self._untrained("parameters()")

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Raise a ConfigError: optimizers train the parameters of the population."""
        self._untrained("parameter_groups(…)")

    def adam_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Raise a ConfigError: optimizers train the parameters of the population."""
        self._untrained("adam_groups(…)")
