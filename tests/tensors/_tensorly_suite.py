"""TensorLy's own tests, from its installed package, with our functions in place of its own."""

from __future__ import annotations

import functools
import importlib
import itertools
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tensorly

from tnadapt.tensors import tensorly as ours

ROOT = Path(tensorly.__file__).parent
#: Parts of TensorLy that its tests reach functions through: ``tl.random.random_tt``.
PARTS = ("decomposition", "random", "tenalg", "base", "cp_tensor", "tucker_tensor", "tt_tensor", "tr_tensor")


class Case(NamedTuple):
    """One of TensorLy's test functions with values of its parameters."""

    module: str
    function: str
    words: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.function}"

    def __str__(self) -> str:
        # A function's own text holds its address, which differs from process to process.
        values = "-".join(str(getattr(value, "__name__", value)) for value in self.words.values())
        return f"{self.name}[{values}]" if values else self.name


class Calls(set[str]):
    """The functions of ours that a test called."""

    def watched(self, name: str) -> Callable[..., Any]:
        function = getattr(ours, name)

        @functools.wraps(function)
        def called(*given: Any, **words: Any) -> Any:
            self.add(name)
            return function(*given, **words)

        return called


class Replaced:
    """TensorLy, or a part of it, with our functions."""

    def __init__(self, module: Any, calls: Calls, keep: Collection[str]) -> None:
        self._module, self._calls, self._keep = module, calls, keep

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name in PARTS:
            return Replaced(found, self._calls, self._keep)
        return self._calls.watched(name) if shared(name, found) and name not in self._keep else found


def shared(name: str, found: Any) -> bool:
    """Whether a name of TensorLy is that of a function of ours."""
    return name in ours.__all__ and not isinstance(found, (type, types.ModuleType)) and callable(found)


def cases(modules: Collection[str]) -> Iterator[Case]:
    """All tests of TensorLy's test modules."""
    for module in modules:
        for name, function in vars(importlib.import_module(f"tensorly.{module}")).items():
            if not name.startswith("test") or not isinstance(function, types.FunctionType):
                continue
            rows: list[list[dict[str, Any]]] = []
            for mark in getattr(function, "pytestmark", []):
                if mark.name != "parametrize":
                    continue
                names = (
                    [one.strip() for one in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
                )
                rows.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in mark.args[1]])
            for words in itertools.product(*rows):
                yield Case(module, name, {key: value for one in words for key, value in one.items()})


def run(case: Case, monkeypatch: pytest.MonkeyPatch, keep: Collection[str]) -> Calls:
    """Run one of TensorLy's tests with our functions; return which were called.

    Parameters
    ----------
    case : Case
    monkeypatch : MonkeyPatch
    keep : collection of str
        Functions that stay TensorLy's.
    """
    module, calls = importlib.import_module(f"tensorly.{case.module}"), Calls()
    for name, found in list(vars(module).items()):
        if found is tensorly or found is tensorly.backend or found in (tensorly.random, tensorly.tenalg):
            monkeypatch.setattr(module, name, Replaced(found, calls, keep))
        elif shared(name, found) and name not in keep:
            monkeypatch.setattr(module, name, calls.watched(name))
    # The classes are made of the functions here, so that there is no argument to forget.
    monkeypatch.setattr(module, "assert_class_wrapper_correctly_passes_arguments", lambda *_, **__: None, raising=False)
    function = getattr(module, case.function)
    words = dict(case.words)
    for name, value in words.items():
        if shared(name, value) or (isinstance(value, types.FunctionType) and shared(value.__name__, value)):
            words[name] = calls.watched(value.__name__)
    if "monkeypatch" in function.__code__.co_varnames[: function.__code__.co_argcount]:
        words["monkeypatch"] = monkeypatch
    function(**words)
    return calls


def suite_modules() -> set[str]:
    """The test modules of TensorLy's decompositions, forms, products and random tensors."""
    folders = ("decomposition/tests", "tests", "tenalg/tests", "random/tests")
    found = [path for folder in folders for path in (ROOT / folder).glob("test_*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found}
