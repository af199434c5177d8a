"""What adapters keep that do not act: up to a number of bytes for each model.

An adapter that has acted keeps what makes the next pass fast: its updates, and the draws of its F. Once others are
activated in its place, that memory is of use only if it comes back. Beyond the limit, the adapters that have been idle
longest lose theirs, which is computed again when they act.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, integer

from ._kept_draws import drawn, forget_draws, held_by_draws
from ._state import AdapterState, Idle

__all__ = ["DEFAULT_LIMIT", "set_cache_limit", "trim_idle"]

#: Bytes that the idle adapters of a model keep together, where nothing else was set.
DEFAULT_LIMIT = 32 * 2**20
_LIMIT_ATTR = "_tnadapt_cache_limit"
_turns = itertools.count(1)


@checks_arguments
def set_cache_limit(model: nn.Module, limit: int) -> None:
    """Set how many bytes the inactive adapters of a model keep together, so that they are fast once they come back.

    Parameters
    ----------
    model : Module
        The one that the adapters are attached to.
    limit : int
        In bytes. The default is 32 MiB. 0 keeps nothing of an adapter that is deactivated.

    Raises
    ------
    ConfigError
        If the limit is not an integer of at least 0.

    Notes
    -----
    An adapter that has acted without gradients keeps its updates (unless its layers apply them as factors) and the
    draws of its F. The limit counts those of adapters whose weight is 0, after :meth:`Adapter.activate`,
    :func:`mix` or the end of ``with rows(...)``; beyond it, those that were idle longest lose theirs. Active adapters
    keep what they need, whatever the limit is. Adapters with the same F share its draws.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> adapter = tnadapt.torch.attach(model)
    >>> set_cache_limit(model, 100 * 2**20)
    """
    model.__dict__[_LIMIT_ATTR] = integer("limit", limit, 0, 1 << 62, ConfigError)


def trim_idle(states: Iterable[AdapterState]) -> None:
    """Note which of a model's adapters are idle now, and free what they keep beyond the limit.

    Parameters
    ----------
    states : iterable of AdapterState
        All adapters of the model.
    """
    states = list(states)
    new, total = list[AdapterState](), 0
    for state in states:
        if state.weight != 0.0 or state.by_rows:
            state.idle = None
        elif state.idle is None:
            new.append(state)
        else:
            total += state.idle.held
    for state in new:
        state.idle = Idle(next(_turns), _held(state))
        total += state.idle.held
    limits = [state.model.__dict__[_LIMIT_ATTR] for state in states if _LIMIT_ATTR in state.model.__dict__]
    limit = min(limits, default=DEFAULT_LIMIT)
    if total <= limit:
        return
    idle = [(state.idle, state) for state in states if state.idle is not None and state.idle.held]
    used = {id(one) for state in states if state.idle is None for one in drawn(state.plan)}
    for own, state in sorted(idle, key=lambda pair: pair[0].turn):
        if total <= limit:
            break
        total -= own.held
        _forget(state, used)
        state.idle = own._replace(held=0)


def _held(state: AdapterState) -> int:
    """Return the bytes that an adapter keeps beyond its own parameters."""
    made = 0 if state.made is None else state.made.held()
    return state.cache.held() + state.quotients.held() + made + held_by_draws(drawn(state.plan))


def _forget(state: AdapterState, used: set[int]) -> None:
    state.clear_cache()
    forget_draws(state.plan, used)
