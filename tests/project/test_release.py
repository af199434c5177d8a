"""What a release consists of: one version everywhere, a recipe for conda, and an entry for each extra.

``.ci/package`` builds and installs it, over the network; these tests do not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tnadapt

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
HOME = PROJECT["urls"]["Homepage"]
pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="the scripts of CI are not in this copy")


def text(place: str) -> str:
    return (ROOT / place).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """Import a script of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- One version --------------------------------------------------------------------------------

#: The files that have the version, or the date of its release.
VERSIONED = ("tnadapt/__init__.py", "CHANGELOG.md", "CITATION.cff", "conda-recipe/recipe.yaml")
VERSION = tnadapt.__version__


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes a release's text, on a copy of the files that it reads. Nothing is under Unreleased."""
    for place in VERSIONED:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    edit(tmp_path / "CHANGELOG.md", r"(?s)^## \[Unreleased\]\n.*?(?=^## \[)", "## [Unreleased]\n\n")
    module = script("release_notes")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace the first match of a pattern in a file."""
    found, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count == 1, pattern
    path.write_text(found, encoding="utf-8")


def test_the_text_of_the_release_is_the_section_without_its_heading(notes: ModuleType) -> None:
    # The links below the oldest section are not part of it.
    assert [body for _, body in notes.sections().values() if re.search(r"^\[.*\]: ", body, flags=re.MULTILINE)] == []
    path = notes.ROOT / "CHANGELOG.md"
    edit(path, r"^## \[Unreleased\]\n", "## [Unreleased]\n\n### Added\n\n- Something new.\n")
    edit(path, rf"(?s)(^## \[{re.escape(VERSION)}\][^\n]*\n).*", r"\1\n- One.\n\n## [0.0.1] - 2020-02-02\n\n- Two.\n")
    assert notes.notes() == "- One."
    with pytest.raises(SystemExit, match=rf"changes under Unreleased that v{VERSION} contains: move them to {VERSION}"):
        notes.notes(f"v{VERSION}")


@pytest.mark.parametrize(
    ("place", "pattern", "replacement", "message"),
    [
        ("tnadapt/__init__.py", rf'"{VERSION}"', '"9.9.9"', f"newest section of CHANGELOG.md has {VERSION}: they must"),
        ("CHANGELOG.md", rf"^## \[{VERSION}\]", "## [9.9.9]", "newest section of CHANGELOG.md has 9.9.9: they must be"),
        ("CITATION.cff", r"^version: .*", "version: 9.9.9", "CITATION.cff has 9.9.9: they must be equal"),
        ("conda-recipe/recipe.yaml", rf'"{VERSION}"', '"9.9.9"', "recipe.yaml has 9.9.9: they must be equal"),
        ("CITATION.cff", r"^date-released: .*", 'date-released: "2020-02-02"', "CITATION.cff 2020-02-02: they must be"),
        ("CITATION.cff", r"^date-released: .*", "", "CITATION.cff has no line that matches .*date-released"),
    ],
)
def test_another_version_or_date_is_refused(
    notes: ModuleType, place: str, pattern: str, replacement: str, message: str
) -> None:
    assert notes.notes(f"v{VERSION}")
    with pytest.raises(SystemExit, match=r"the tag has 9\.9\.9: they must be equal"):
        notes.notes("v9.9.9")
    edit(notes.ROOT / place, pattern, replacement)
    with pytest.raises(SystemExit, match=message):
        notes.notes()


# -- Extras -------------------------------------------------------------------------------------


def test_each_extra_has_something_that_must_work() -> None:
    checks = script("extras").CHECKS
    assert set(checks) == {"core", *PROJECT["optional-dependencies"]}
    assert all(checks.values())
    for commands in checks.values():
        for command in commands:
            if command[0] == "python":
                compile(command[2], "check", "exec")


def test_a_wheel_that_does_not_work_is_reported(tmp_path: Path) -> None:
    """A wheel without dependencies, whose command is missing: pip installs it without a network."""
    wheel = tmp_path / "tnadapt-0.0.1-py3-none-any.whl"
    info = "tnadapt-0.0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tnadapt/__init__.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tnadapt\nVersion: 0.0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    command = [sys.executable, ROOT / ".ci" / "extras.py", wheel, "gguf"]
    # The checkout is on the path of modules here, and must not be there.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^gguf +FAILED", done.stdout, flags=re.MULTILINE)
    assert "python -c import gguf, tnadapt.convert\nended with 1:" in done.stdout
    assert "No module named 'gguf'" in done.stdout
    assert done.stdout.endswith("do not work: gguf\n")


@pytest.mark.skipif(os.name == "nt", reason="the scripts of CI are bash")
def test_results_are_not_mixed_with_older_ones(tmp_path: Path) -> None:
    (tmp_path / "tnadapt-0.0.1.tar.gz").touch()
    command = [ROOT / ".ci" / "package", "core"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OUT": str(tmp_path)}
    )
    assert done.returncode == 2
    assert f"OUT must be an empty folder or a new one; {tmp_path} has files" in done.stderr


# -- The recipe for conda -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(text("conda-recipe/recipe.yaml"))


def conda(requirement: str) -> str:
    """Return a requirement of pyproject.toml as conda writes it. conda-forge has the same names for all of them."""
    return requirement.replace(">=", " >=")


def test_the_recipe_requires_what_the_project_requires(recipe: Any) -> None:
    python = ["python >=${{ python_min }}"]
    assert recipe["requirements"]["run"] == [*python, *map(conda, PROJECT["dependencies"])]
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    host = recipe["requirements"]["host"]
    assert set(map(conda, BUILD["requires"])) <= set(host)
    assert "python ${{ python_min }}.*" in host


def test_the_recipe_is_of_this_version_and_project(recipe: Any) -> None:
    assert recipe["context"]["version"] == VERSION
    assert recipe["package"] == {"name": PROJECT["name"], "version": "${{ version }}"}
    commands = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == commands
    about = recipe["about"]
    assert about["summary"] == PROJECT["description"]
    assert about["license"] == PROJECT["license"]
    assert [about["license_file"]] == PROJECT["license-files"]
    assert about["homepage"] == HOME
    assert about["repository"] == PROJECT["urls"]["Source"]
    assert about["documentation"] == PROJECT["urls"]["Documentation"]


def test_the_digest_of_the_recipe_is_left_to_the_script(recipe: Any) -> None:
    """The sdist contains the recipe, which cannot contain the sdist's digest."""
    assert set(recipe["source"]["sha256"]) == {"0"}
    assert len(recipe["source"]["sha256"]) == 64
    assert "conda-recipe/recipe.yaml" in text(".ci/package")
