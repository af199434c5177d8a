"""What surrounds the code: workflows, citation, packaging and policies agree with each other and with the code.

``.ci/package`` builds and installs a release, over the network; these tests do not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tnadapt

from .test_docs import PATHS

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
pytestmark = pytest.mark.skipif(
    not (WORKFLOWS.is_dir() and (ROOT / ".ci").is_dir()), reason="the workflows and their scripts are not in this copy"
)


def text(place: str) -> str:
    return (ROOT / place).read_text(encoding="utf-8")


def load_yaml(place: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(text(place))


def workflow(name: str) -> Any:
    return load_yaml(f".github/workflows/{name}.yml")


def commands(job: Any) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


# -- Workflows ----------------------------------------------------------------------------------


def supported_pythons() -> list[str]:
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    return [match[1] for match in found if match]


def test_ci_runs_everything_on_every_supported_python() -> None:
    pythons = supported_pythons()
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == pythons[0]
    full = workflow("ci")["jobs"]["full"]
    assert commands(full) == [".ci/run"]
    assert full["strategy"]["matrix"]["python"] == pythons
    # A newer Python may work. CI and the classifiers have to say so before anybody else does.
    if sys.version_info.releaselevel == "final":
        assert f"{sys.version_info.major}.{sys.version_info.minor}" in pythons


def test_a_release_is_built_checked_and_published_without_a_token() -> None:
    release = workflow("release")
    build, extras, publish = (release["jobs"][name] for name in ("build", "extras", "publish"))
    (step,) = [step for step in build["steps"] if "run" in step]
    # No package of an extra runs where the files that are published are built.
    assert step["run"] == ".ci/package core"
    script = text(".ci/package")
    for check in ("-m build", "-m twine check --strict", "check-wheel-contents", "-m readme_renderer", "cyclonedx-py"):
        assert check in script
    assert commands(extras) == [".ci/package"]
    assert publish["needs"] == ["build", "extras"]
    assert publish["permissions"] == {"id-token": "write"}
    # The job that may publish runs no code of this repository or of its dependencies.
    assert commands(publish) == []
    assert "secrets." not in text(".github/workflows/release.yml")


@pytest.mark.parametrize("name", ["ci", "nightly", "release"])
def test_workflows_are_limited(name: str) -> None:
    data = workflow(name)
    assert data["permissions"] == {"contents": "read"}
    assert data["concurrency"]["cancel-in-progress"] is (name != "release")
    for key, job in data["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 360, key
        # What may publish or write is handed files and runs nothing of this repository.
        if job.get("permissions"):
            assert key in ("publish", "announce")
            assert not any("checkout" in step.get("uses", "") for step in job["steps"])
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])
                if step["uses"].startswith("actions/checkout"):
                    assert step["with"]["persist-credentials"] is False
    for script in re.findall(r"\.ci/\w+", text(f".github/workflows/{name}.yml")):
        assert os.access(ROOT / script, os.X_OK), script


# -- Citation and metadata ----------------------------------------------------------------------


def test_the_citation_is_of_this_project_and_of_the_paper_in_the_documentation() -> None:
    citation = load_yaml("CITATION.cff")
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    (paper,) = citation["references"]
    entry = re.search(r"@article\{.*?\n   \}", text("docs/paper.rst"), flags=re.DOTALL)
    assert entry
    fields = dict(re.findall(r"(author|title)\s*= \{(.*?)\},\n", entry[0], flags=re.DOTALL))
    authors = [" ".join(name.split()) for name in re.split(r"\s+and\s+", fields["author"])]
    assert [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]] == authors
    assert paper["title"] == re.sub(r"[{}]", "", fields["title"])
    assert {word for word in (paper["journal"], str(paper["year"])) if word not in entry[0]} == set()


def test_the_project_has_one_home() -> None:
    home = PROJECT["urls"]["Homepage"]
    assert load_yaml("CITATION.cff")["repository-code"] == home
    for place in ("pyproject.toml", ".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/config.yml"):
        assert set(re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text(place))) == {home}, place
    report = PROJECT["urls"]["Report a vulnerability"]
    assert f"]({report})" in text("SECURITY.md")
    assert f"url: {report}\n" in text(".github/ISSUE_TEMPLATE/config.yml")


def test_the_recipe_for_conda_is_of_this_version_and_project() -> None:
    recipe = load_yaml("conda-recipe/recipe.yaml")
    # conda-forge has the same names for all requirements.
    required, built = ([one.replace(">=", " >=") for one in several] for several in (
        PROJECT["dependencies"], PYPROJECT["build-system"]["requires"],
    ))  # fmt: skip
    assert recipe["requirements"]["run"] == ["python >=${{ python_min }}", *required]
    assert {"python ${{ python_min }}.*", *built} <= set(recipe["requirements"]["host"])
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    assert recipe["context"]["version"] == VERSION
    assert recipe["package"] == {"name": PROJECT["name"], "version": "${{ version }}"}
    commands = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == commands
    urls = PROJECT["urls"]
    assert recipe["about"] == recipe["about"] | {
        "summary": PROJECT["description"], "license": PROJECT["license"], "license_file": PROJECT["license-files"][0],
        "homepage": urls["Homepage"], "repository": urls["Source"], "documentation": urls["Documentation"],
    }  # fmt: skip
    # The sdist contains the recipe, which cannot contain the sdist's digest: the script puts it in.
    assert recipe["source"]["sha256"] == 64 * "0"
    assert "conda-recipe/recipe.yaml" in text(".ci/package")


# -- The source distribution --------------------------------------------------------------------


def linked() -> set[str]:
    """Return the files that the texts of the project link to, include or show, relative to the root."""
    found = set()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.rst")]:
        content = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#\s]+)", content)
        links += re.findall(r"^ *\.\. (?:literalinclude|include|image|figure):: (\S+)", content, flags=re.MULTILINE)
        links += re.findall(r":download:`[^`<]*<([^`>]+)>`", content)
        found |= {
            Path(os.path.relpath(path.parent / link, ROOT)).as_posix() for link in links if not re.match(r"\w+:", link)
        }
    return found


def test_links_lead_to_files_and_the_sdist_has_them_and_the_named_ones(tmp_path: Path) -> None:
    links = linked()
    assert {"CHANGELOG.md", "benchmarks/results/digits.png", "examples/distributed/train.py"} <= links
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []
    sdist = pytest.importorskip(
        "hatchling.builders.sdist", reason="hatchling, which builds the sdist, is not installed"
    )
    (archive,) = sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    held = names | {parent.as_posix() for name in names for parent in Path(name).parents}
    assert "PKG-INFO" in names
    assert sorted(place for place in {*links, *(path for _, path in PATHS)} if place.rstrip("/") not in held) == []


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
