"""What the library hands out as a dataclass cannot be changed behind its back."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import tnadapt

MUTABLE = {
    "tnadapt.torch._forward_pass.PatchedParameter": "its list of slots is another one when an adapter leaves",
    "tnadapt.torch.peft._peft_config.TnadaptConfig": "PEFT writes into the configs of adapters, and so do its users",
}


def modules() -> Iterator[ModuleType]:
    """All modules of the package, but those that need a library which cannot be imported here."""
    folder = Path(tnadapt.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(("tnadapt", *parts)).removesuffix(".__init__")
        try:
            yield importlib.import_module(name)
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] == "tnadapt":
                raise


def test_dataclasses_cannot_be_changed() -> None:
    dataclass_of = {
        f"{value.__module__}.{value.__qualname__}": value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__.split(".")[0] == "tnadapt"
    }
    mutable = {name for name, cls in dataclass_of.items() if not cls.__dataclass_params__.frozen}
    assert mutable == MUTABLE.keys() & dataclass_of.keys()
