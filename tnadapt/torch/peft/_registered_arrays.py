"""The arrays of the adapters on a model, registered where PEFT's and TRL's code looks for an adapter's parameters."""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from typing import Any

from torch import nn

from .._state import DOT, encoded

__all__ = ["AdapterArrays"]


class AdapterArrays(nn.ModuleDict):
    """One ``nn.ParameterDict`` per adapter, by the adapter's name.

    PEFT's layers keep their parameters in such containers, and code built on PEFT relies on it: it asks whether a name
    is in one, and TRL finds an adapter's parameters by ``.default.`` in their names. Unlike in ``nn.ModuleDict``, a
    name may contain dots; they are encoded in the names of the parameters.

    Examples
    --------
    >>> arrays = AdapterArrays()
    >>> arrays["v1.0"] = nn.ParameterDict({"factor": nn.Parameter()})
    >>> list(arrays), "v1.0" in arrays, [name for name, _ in arrays.named_parameters()]
    (['v1.0'], True, ['v1%2E0.factor'])
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(encoded(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(encoded(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(encoded(key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and encoded(key) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> KeysView[str]:
        """Return the adapters' names."""
        return {key.replace(DOT, "."): None for key in self._modules}.keys()

    def items(self) -> Any:
        """Return the adapters' names and arrays."""
        return {key.replace(DOT, "."): module for key, module in self._modules.items()}.items()
