"""The shape of the tree: what is at the root, and that classes are found once.

The order of the packages, import cycles and imports of private modules are import-linter's (``[tool.importlinter]``).
"""

from __future__ import annotations

import ast
import collections
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnadapt"
FILES = sorted(PACKAGE.rglob("*.py"))
# Short names of modules of tnadapt.algebra, which users import from the root.
SHORT = {"maps", "presets", "sources"}

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("the project's own files are not in this copy", allow_module_level=True)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_root_has_the_public_names_and_what_all_packages_use_alone() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py", "__main__.py", "argument_checks.py", "errors.py", "lazy_names.py", "plugins.py", "py.typed",
        "report.py",
        *(f"{name}.py" for name in SHORT),
    }  # fmt: skip


def test_no_two_classes_have_one_name() -> None:
    found = collections.defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name_of(path))
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_import_linter_ignores_nothing() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    assert [contract["name"] for contract in contracts if "ignore_imports" in contract] == []
    kinds = {contract["type"] for contract in contracts}
    assert {"layers", "acyclic_siblings", "private_modules", "forbidden"} <= kinds


def test_tests_mirror_the_tree() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}


def test_private_names_are_imported_in_one_module_of_a_package() -> None:
    wrong = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name == "internals.py" or "support" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names = [f"{node.module or ''}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            private = [name for name in names if re.match(r"tnadapt\..*\b_[a-z]", name, flags=re.IGNORECASE)]
            wrong |= {path.relative_to(ROOT).as_posix()} if private else set()
    assert wrong == set(), "import private names in internals.py of the package, if no public one shows the behaviour"
