"""The tree, and what the documentation says of it: where symbols are, the picture of the packages, every path."""

from __future__ import annotations

import ast
import collections
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.links import broken

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnadapt"
PLACES = {
    (page, *place)
    for page in ("conventions.rst", "architecture.rst")
    for place in re.findall(
        r"``([\w/]+\.py)``(?:,\s+``([\w.]+)``)?", (ROOT / "docs" / page).read_text(encoding="utf-8")
    )
}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.rst"), *(ROOT / "docs" / "api").glob("*.rst")]
# What is past is told by the names that it had.
PAGES.remove(ROOT / "CHANGELOG.md")
PATHS = sorted(
    (page.relative_to(ROOT).as_posix(), path)
    for page in PAGES
    for path in set(
        re.findall(
            r"`((?:tnadapt|paper|tests|benchmarks|examples|fuzz|mutation)/[\w./-]*\w)/?`",
            page.read_text(encoding="utf-8"),
        )
    )
)


@pytest.mark.parametrize(("page", "file", "name"), sorted(PLACES))
def test_where_a_symbol_is(page: str, file: str, name: str) -> None:
    assert (PACKAGE / file).is_file(), f"{page} names {file}, which is not there"
    if file.startswith("torch/"):
        pytest.importorskip("torch")
    place: Any = importlib.import_module(".".join(("tnadapt", *Path(file).with_suffix("").parts)))
    for part in filter(None, name.split(".")):
        assert hasattr(place, part), f"{file} has no {name}"
        place = getattr(place, part)


def test_the_picture_of_the_packages_is_that_of_the_imports() -> None:
    pytest.importorskip("grimp")  # comes with import-linter
    script = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["drawing"](), "run python docs/architecture.py"


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_a_path_on_a_page_is_there(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}, which is not there"


def test_pages_name_places_and_paths() -> None:
    counts = collections.Counter(page for page, *_ in PLACES)
    assert counts["conventions.rst"] > 25
    assert counts["architecture.rst"] > 20
    assert {page for page, _ in PATHS} >= {"CONTRIBUTING.md", "SECURITY.md", "docs/slices.rst"}


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def in_tree(path: str) -> Path:
    """Return the file of a recipe, whose paths are in the package or in another folder of the repository."""
    return next((folder / path for folder in (ROOT, PACKAGE) if (folder / path).exists()), ROOT / path)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w.]+/[\w./]*|\w+\.py)`", CONTRIBUTING))))
def test_a_path_of_a_recipe_is_there(path: str) -> None:
    assert in_tree(path).exists()


@pytest.mark.parametrize(
    ("name", "path"), sorted(set(re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", CONTRIBUTING)))
)
def test_a_name_of_a_recipe_is_in_its_file(name: str, path: str) -> None:
    text = in_tree(path).read_text(encoding="utf-8")
    assert re.search(rf"^(?:    )?(?:(?:def|class) {name}\b|{name}(?::.*)? = )", text, flags=re.MULTILINE)


# -- The check of links in the built pages ---------------------------------------------------------

BUILT = {
    "index.html": '<h1 id="start">A</h1><a href="#start"></a><a href="#"></a><a href="https://example.org/x#y"></a>'
    '<a href="deep/page.html#here"></a><a href="deep/page.html?q=1"></a><img src="gone.png">',
    "deep/page.html": '<p id="here"></p><a href="../index.html#none"></a><a href="../a%20b.txt"></a>'
    '<a href="mailto:a@b.org"></a>',
    "_modules/code.html": '<a href="nowhere.html"></a>',
    "a b.txt": "",
}


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    for name, text in BUILT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert broken(tmp_path) == [
        "deep/page.html: ../index.html#none: no such anchor",
        "index.html: gone.png: no such file",
    ]
    (tmp_path / "gone.png").touch()
    (tmp_path / "deep" / "page.html").write_text('<p id="here">', encoding="utf-8")
    assert broken(tmp_path) == []


def test_an_empty_folder_is_no_documentation(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.links", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no index.html" in done.stderr


# -- The tree: its order, import cycles and imports of private modules are import-linter's ----------


def test_the_root_has_the_public_names_and_what_all_packages_use_alone() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py", "__main__.py", "argument_checks.py", "errors.py", "lazy_names.py", "plugins.py", "py.typed",
        "report.py",
        # Short names of modules of tnadapt.algebra, which users import from the root.
        "maps.py", "presets.py", "sources.py",
    }  # fmt: skip


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
