"""The check that PEFT is there, and an adapter's arrays where PEFT's code looks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, KeysView
from typing import Any

from torch import nn

from tnadapt.errors import BackendError, TargetError, safe_repr
from tnadapt.torch._state import DOT, encoded

# -- PEFT, and the error if it is missing or too old -------------------------------------------------------------------


class PeftMissingError(BackendError, ImportError):
    """PEFT is not installed, or too old."""


try:
    import peft

    if not hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("the installed PEFT lacks the hooks that an external method needs")
except ImportError as error:
    raise PeftMissingError(
        f'tnadapt.torch.peft needs PEFT 0.21 or newer: pip install "tnadapt[peft]" ({error})'
    ) from error


# -- The container of arrays, where PEFT's and TRL's code looks for them -----------------------------------------------


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


# -- The names of arrays on a PEFT model and in PEFT's files -----------------------------------------------------------

# On the model ``base_model.tnadapt.tnadapt_arrays.default.group0_split0_factor0``, in a file
# ``base_model.model.tnadapt.group0.split0.factor0``.


_ARRAY = r"(?:group\d+_(?:term\d+_)?split\d+_[a-z]+\d*(?:_[a-z]+)?|(?:group\d+_)?theta|weight\d+_[a-z]+)"
_RESERVED = re.compile(rf"tnadapt|tnadapt_arrays|{_ARRAY}")


def in_file(key: str, adapter_name: str) -> str | None:
    """Return an array's name in a file, given its name in a state dict; None if it does not belong to this adapter.

    Examples
    --------
    >>> in_file("base_model.tnadapt.tnadapt_arrays.v1%2E0.group0_split0_factor0", "v1.0")
    'base_model.model.tnadapt.group0.split0.factor0'
    >>> in_file("base_model.model.lm_head.weight", "v1.0")
    """
    # Whatever is in an adapter's container is one of its arrays: formats and sources of other packages name theirs.
    match = re.fullmatch(rf"(.*\.)?tnadapt\.tnadapt_arrays\.{re.escape(encoded(adapter_name))}\.([^.]+)", key)
    return None if match is None else f"{match[1] or ''}model.tnadapt.{match[2].replace('_', '.')}"


def check_adapter_name(name: str, modules_to_save: Any) -> None:
    """Raise a TargetError if PEFT would confuse the name with a part of every array's name, or torch forbids it."""
    if _RESERVED.fullmatch(name):
        raise TargetError(
            f"an adapter cannot be called {name!r}: the arrays of all adapters have this word in their names, and PEFT "
            "could not tell them apart; give another name"
        )
    if hasattr(AdapterArrays(), encoded(name)):
        raise TargetError(
            f"an adapter cannot be called {name!r}: its arrays are kept in an nn.ModuleDict, which has an attribute of "
            "that name; give another name"
        )
    if modules_to_save and "." in name:
        raise TargetError(
            f"an adapter cannot be called {name!r} with modules_to_save={safe_repr(modules_to_save)}: PEFT keeps the "
            "trained copies under the adapter's name, in which torch allows no dot; give a name without dots"
        )
