"""The shape of the tree: what is at the root, what is private, and that names are found once.

The order of the packages, import cycles and imports of private modules are import-linter's (``[tool.importlinter]``).
"""

from __future__ import annotations

import ast
import collections
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnadapt"
FILES = sorted(PACKAGE.rglob("*.py"))
# Short names of modules of tnadapt.algebra, which users import from the root.
SHORT = {"maps", "presets", "sources"}
# Names by convention: a backend is called as its library is.
CONVENTIONS = {"torch", *SHORT}

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("the project's own files are not in this copy", allow_module_level=True)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules of tnadapt that a file imports anywhere, for types too."""
    own = name_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            full = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{full}.{alias.name}"
                yield inner if inner in MODULES else full
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_root_has_the_public_names_and_what_all_packages_use_alone() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py", "__main__.py", "argument_checks.py", "errors.py", "lazy_names.py", "py.typed", "report.py",
        *(f"{name}.py" for name in SHORT),
    }  # fmt: skip


def test_no_two_modules_have_one_name() -> None:
    names = collections.Counter(module.split(".")[-1].lstrip("_") for module in MODULES)
    assert {name for name, count in names.items() if count > 1} <= CONVENTIONS


def test_no_two_classes_have_one_name() -> None:
    found = collections.defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name_of(path))
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_a_module_that_only_its_package_uses_is_private() -> None:
    users = collections.defaultdict(set)
    # The paper's experiments are a package of their own, which uses what is public.
    for path in [*FILES, *sorted((ROOT / "paper").rglob("*.py"))]:
        for target in imported(path):
            users[target].add(name_of(path))
    # Imported by name when first used (PEP 562), or the command's start.
    lazily = {"tnadapt.__main__", *_lazy()}
    public = []
    for module, path in MODULES.items():
        package, _, base = module.rpartition(".")
        inside = f".{module}.".find("._", 0, len(package) + 1) >= 0
        if path.name == "__init__.py" or base.startswith("_") or inside or package == "tnadapt" or module in lazily:
            continue
        if users[module] and all(user == package or user.startswith(f"{package}.") for user in users[module]):
            public.append(module)
    assert sorted(set(public) - PUBLIC) == []


#: Public though nothing else here imports them: documented for users, or used by the scripts of the repository.
PUBLIC = {
    "tnadapt.planning.preset_families",
    "tnadapt.plugins.class_registry",
    "tnadapt.plugins.entry_points",
    "tnadapt.testing.strategies",
    "tnadapt.torch.starts",
}


def _lazy() -> Iterator[str]:
    for path in FILES:
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_LAZY":
                    for module in ast.literal_eval(node.value).values():
                        yield f"{name_of(path)}.{module}"


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
