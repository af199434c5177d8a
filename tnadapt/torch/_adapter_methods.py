"""The methods by which transformers' models manage adapters of PEFT, for those of this library.

transformers' own look for layers of PEFT, and raise whatever the lack of them leads to. While adapters are attached, a
model has these instead. Where it has adapters of PEFT, too (``model.add_adapter``), the names are PEFT's, and its own
methods run.

TRL copies a model to vLLM by ``named_parameters``, its own or that of a module around it, which both go through
``named_modules``; under FSDP1, after a walk through ``named_children``. TRL merges the adapters of PEFT models before,
and no others: nothing that TRL passes to a model says what for, so its calling function tells.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tnadapt.errors import TargetError, safe_repr

from ._registry import attached, mix
from ._state import need_unmerged

__all__ = ["AdapterMethod"]


class AdapterMethod:
    """One of these methods of one model.

    It is an object rather than a closure, so that ``copy.deepcopy`` and ``pickle`` connect a copied model to the copy.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    @staticmethod
    def install(model: nn.Module) -> None:
        """Replace the methods that the model's class has."""
        for name in _METHODS:
            if callable(getattr(type(model), name, None)) and name not in model.__dict__:
                model.__dict__[name] = AdapterMethod(model, name)

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Undo :meth:`install`."""
        for name in _METHODS:
            if isinstance(model.__dict__.get(name), AdapterMethod):
                del model.__dict__[name]

    @property
    def __func__(self) -> Callable[..., Any]:
        """The method of the model's class, as bound methods have it: torch's compiler compares it."""
        function: Callable[..., Any] = getattr(type(self.model), self.name)
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if getattr(self.model, "peft_config", None):
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        return _METHODS[self.name](self.model, *args, **kwargs)


def _active_adapters(model: nn.Module) -> list[str]:
    return [name for name, state in attached(model).items() if state.enabled and state.weight != 0.0]


def _set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    mix(model, dict.fromkeys(_names(adapter_name), 1.0))


def _disable_adapters(model: nn.Module) -> None:
    states = list(attached(model).values())
    for state in states:
        need_unmerged(state, "disable_adapters()")
    for state in states:
        state.enabled = False


def _enable_adapters(model: nn.Module) -> None:
    for state in attached(model).values():
        state.enabled = True


def _delete_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    there = attached(model)
    lost = [name for name in _names(adapter_names) if name not in there]
    if lost:
        raise TargetError(f"no adapter {lost[0]!r} on this model; there are: {', '.join(map(repr, there))}")
    for name in _names(adapter_names):
        there[name].handle.detach()


def _get_adapter_state_dict(model: nn.Module, adapter_name: str | None = None, state_dict: Any = None) -> None:
    name = next(iter(attached(model))) if adapter_name is None else adapter_name
    own = f"tnadapt.torch.adapters(model)[{safe_repr(name)}]"
    raise TargetError(
        f"this model has no adapter of PEFT: {own}.arrays() are the arrays of its own, and {own}.save(path) writes them"
    )


def _unless_sent(name: str) -> Callable[..., Any]:
    """Return a method of the class that raises an error if TRL calls it to send vLLM the weights without adapters."""

    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(2)
        while caller.f_code.co_name in _PASSED_THROUGH and caller.f_back is not None:
            caller = caller.f_back
        place = f"{caller.f_globals.get('__name__')}.{caller.f_code.co_qualname}"
        if place.startswith("trl.") and "vllm" in place:
            for state in attached(model).values():
                if state.managed_by is None and state.merged is None:
                    raise TargetError(
                        f"TRL would send vLLM the base weights without adapter {state.name!r}, and its arrays, which "
                        "vLLM does not have: detach() it and train through tnadapt.torch.peft, by "
                        "peft_config=TnadaptConfig(…), whose weights TRL merges before it sends them; or train without "
                        "vLLM"
                    )
        return getattr(type(model), name)(model, *args, **kwargs)

    return method


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


#: torch's functions between the caller of ``named_parameters`` and ``named_modules`` of a module inside.
_PASSED_THROUGH = ("named_parameters", "_named_members", "named_modules")
_METHODS: dict[str, Callable[..., Any]] = {
    "active_adapters": _active_adapters,
    "set_adapter": _set_adapter,
    "disable_adapters": _disable_adapters,
    "enable_adapters": _enable_adapters,
    "delete_adapter": _delete_adapter,
    "get_adapter_state_dict": _get_adapter_state_dict,
    "named_children": _unless_sent("named_children"),
    "named_modules": _unless_sent("named_modules"),
}
