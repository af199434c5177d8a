"""Which arrays of an adapter are trained, and at which rates: Local LoRA, asymmetric LoRA, LoRA+."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, shown

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["choose", "parameter_groups"]


def choose(adapter: Adapter, groups: Any, arrays: Any) -> None:
    """See :meth:`Adapter.set_trainable`."""
    known = range(adapter.plan.num_groups)
    places = {
        name: (int(name.partition(".")[0][len("group") :]), name.rpartition(".")[2])
        for name in adapter.plan.param_shapes
    }
    last = sorted({word for _, word in places.values()})
    numbers, words = _listed(groups, known), _listed(arrays, last)
    chosen = [name for name, (number, word) in places.items() if number in numbers and word in words]
    if not chosen:
        raise ConfigError(
            f"adapter {adapter.name!r} has no arrays {shown(arrays)} in groups {shown(groups)}; it has groups 0 to "
            f"{len(known) - 1} and arrays {', '.join(last)}"
        )
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name in chosen)


def _listed(given: Any, known: Sequence[Any]) -> list[Any]:
    """What was asked for, as a list; all that is known for None, and nothing where one of them is not known."""
    if given is None:
        return list(known)
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    return listed if all(type(one) in (int, str) and one in known for one in listed) else []


def parameter_groups(adapter: Adapter, lr: float, ratio: float) -> list[dict[str, Any]]:
    """See :meth:`Adapter.parameter_groups`."""
    zero = set(_start_zero(adapter))
    fast = [p for name, p in adapter.named_parameters() if p.requires_grad and name in zero]
    slow = [p for name, p in adapter.named_parameters() if p.requires_grad and name not in zero]
    if not slow:
        return [{"params": fast, "lr": lr}]
    return [{"params": slow, "lr": lr}, *([{"params": fast, "lr": lr * ratio}] if fast else [])]


def _start_zero(adapter: Adapter) -> Iterator[str]:
    for group in adapter.plan.groups:
        for name, full in group.names.items():
            if not group.start.host(name).any():
                yield full
