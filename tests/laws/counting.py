"""Cases of every law, counted as the tests run: ``pytest --laws FILE``.

What a case is of (library, dtype, fold, variant) is read off its parameters. With pytest-xdist the workers mark and the
controller counts.
"""

from __future__ import annotations

import ast
import functools
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tnadapt.algebra.config import FOLDS

from .book import TESTS, Law, laws, of_test

__all__ = ["Counting", "about"]

MARK = "laws"
LIBRARIES = ("numpy", "array_api_strict", "torch", "jax", "cupy")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# Of these parameters the values are names: of a method, a config, a model, a fault.
NAMES = (
    "bad", "case", "check", "config", "damage", "format", "kind", "label", "method", "model", "name", "preset",
    "projection", "target", "variant", "what",
)  # fmt: skip
PACKAGES = ("tnadapt", "numpy", "scipy", "torch", "jax", "peft", "transformers", "hypothesis", "pytest")
# A test that names no library computes on that of its folder, or on what it or its file cannot do without, or on NumPy.
HOME = {
    "torch": "torch", "finetune": "torch", "paper": "torch",
    "kernels/test_fastfood.py": "torch", "test_jax.py": "jax",
}  # fmt: skip
NEEDS = {"torch": "torch", "transformers": "torch", "triton": "torch", "jax": "jax", "cupy": "cupy"}


def about(item: pytest.Item) -> dict[str, list[str]]:
    """Libraries, dtypes, folds and variants of one case."""
    values = dict(item.callspec.params) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    found: dict[str, list[str]] = {"libraries": [], "dtypes": [], "folds": [], "variants": []}
    for key, value in values.items():
        # What a worker reports must be UTF-8, and a name of a fault need not be.
        text = str(value).removeprefix("torch.").encode(errors="backslashreplace").decode()
        if text in LIBRARIES:
            found["libraries"].append(text)
        elif text in DTYPES:
            found["dtypes"].append(text)
        elif text in FOLDS:
            found["folds"].append(text)
        elif key in NAMES and isinstance(value, str | float):
            found["variants"].append(text[:60])
    if not found["libraries"]:
        found["libraries"] = [home(_file(item), _name(item))]
    return found


def home(file: str, test: str) -> str:
    """The library of a test that names none."""
    needs = _needed(file)
    return HOME.get(file) or HOME.get(file.partition("/")[0]) or needs.get("") or needs.get(test) or "numpy"


@functools.cache
def _needed(file: str) -> dict[str, str]:
    """Without which library ``pytest.importorskip`` skips a test, by its name; the whole file, by the empty one.

    What a test calls or is given by other functions of its file counts, too.
    """
    found: dict[str, str] = {}
    names: dict[str, set[str]] = {}
    tree = ast.parse((TESTS / file).read_bytes() if file.endswith(".py") else b"")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    outside = [("", node) for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for name, top in [*outside, *((function.name, function) for function in functions)]:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                package = ast.unparse(node.args[0]).strip("\"'").partition(".")[0]
                if package in NEEDS:
                    found.setdefault(name, NEEDS[package])
            elif name and isinstance(node, ast.Name | ast.arg):
                names.setdefault(name, set()).add(node.id if isinstance(node, ast.Name) else node.arg)
    for _ in functions:
        for name, others in names.items():
            if name not in found and (through := sorted(others & found.keys())):
                found[name] = found[through[0]]
    return found


def _name(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""


class Counting:
    """The plugin; ``path`` is where the controller writes what it counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.laws: list[Law] = laws()
        self.numbers = of_test(self.laws)
        self.cases: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Write on every case of a law which laws, and of what it is: its reports carry it."""
        for item in items:
            if numbers := self.numbers.get(f"{_file(item)}::{_name(item)}"):
                drawn = bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False))
                item.user_properties.append((MARK, {"numbers": numbers, "drawn": drawn, **about(item)}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, of a case, its call, or what kept it from being called."""
        marked = dict(report.user_properties).get(MARK)
        if marked is None or (report.when != "call" and report.passed):
            return
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        was = self.cases.get(report.nodeid)
        if was is None or was["outcome"] == "passed":  # a teardown that fails spoils the case
            self.cases[report.nodeid] = {**marked, "outcome": report.outcome, "reason": reason}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write, unless this is a worker."""
        if hasattr(session.config, "workerinput"):
            return
        self.path.write_text(json.dumps(self.counted(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def counted(self) -> dict[str, Any]:
        """Law by law."""
        return {
            "cases": len(self.cases),
            "python": platform.python_version(),
            "system": platform.system(),
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "laws": [self._law(law) for law in self.laws],
        }

    def _law(self, law: Law) -> dict[str, Any]:
        own = [case for case in self.cases.values() if law.number in case["numbers"]]
        passed = [case for case in own if case["outcome"] == "passed"]
        skipped = [case["reason"] for case in own if case["outcome"] == "skipped"]
        return {
            "group": law.group,
            "says": law.says,
            "passed": len(passed),
            "failed": sum(case["outcome"] == "failed" for case in own),
            "drawn": sum(case["drawn"] for case in passed),
            "skipped": {reason: skipped.count(reason) for reason in sorted(set(skipped))},
            **{
                what: sorted({one for case in passed for one in case[what]})
                for what in ("libraries", "dtypes", "folds", "variants")
            },
        }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
