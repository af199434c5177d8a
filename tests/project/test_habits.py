"""What surrounds the code: workflows, citation, packaging and policies agree with each other and with the code.

``.ci/package`` builds and installs a release, over the network; these tests do not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tnadapt

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
pytestmark = pytest.mark.skipif(
    not (WORKFLOWS.is_dir() and (ROOT / ".ci").is_dir()), reason="the workflows and their scripts are not in this copy"
)

YAML_FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (".github/**/*.yml", ".*.yaml", "CITATION.cff", "conda-recipe/*.yaml")
    for path in ROOT.glob(pattern)
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


def readme_commands() -> set[str]:
    """Return the commands of README.md's shell blocks, without the path of the virtual environment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text("README.md"), flags=re.MULTILINE | re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return {line.removeprefix(".venv/bin/") for line in lines if line}


# -- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", YAML_FILES)
def test_yaml_parses_without_repeated_keys(place: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert isinstance(load_yaml(place), dict)

    # A repeated key silently replaces the first one.
    def check(node: Any) -> None:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{place}, line {node.start_mark.line + 1}: {keys}"
            for _, value in node.value:
                check(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check(item)

    check(yaml.compose(text(place), Loader=yaml.SafeLoader))


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


def test_other_systems_run_the_commands_of_the_readme() -> None:
    quick = workflow("ci")["jobs"]["quick"]
    assert {system.split("-")[0] for system in quick["strategy"]["matrix"]["os"]} == {"macos", "windows"}
    assert "python -m pytest" in commands(quick)
    assert set(commands(quick)) <= readme_commands()


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


def test_the_documentation_is_built_with_an_extra_that_exists() -> None:
    config = load_yaml(".readthedocs.yaml")
    for install in config["python"]["install"]:
        assert set(install["extra_requirements"]) <= set(PROJECT["optional-dependencies"])
    assert (ROOT / config["sphinx"]["configuration"]).is_file()
    assert config["sphinx"]["fail_on_warning"] is True
    assert config["build"]["tools"]["python"] in supported_pythons()


# -- Citation and metadata ----------------------------------------------------------------------


def test_the_citation_is_of_this_project() -> None:
    citation = load_yaml("CITATION.cff")
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_citation_of_the_paper_is_that_of_the_documentation() -> None:
    (paper,) = load_yaml("CITATION.cff")["references"]
    entry = re.search(r"@article\{.*?\n   \}", text("docs/citing.rst"), flags=re.DOTALL)
    assert entry
    authors = re.search(r"author\s*= \{(.*?)\}", entry[0], flags=re.DOTALL)
    assert authors
    expected = [" ".join(name.split()) for name in re.split(r"\s+and\s+", authors[1])]
    assert [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]] == expected
    title = re.search(r"title\s*= \{(.*)\},\n", entry[0])
    assert title
    assert paper["title"] == re.sub(r"[{}]", "", title[1])
    assert paper["journal"] in entry[0]
    assert str(paper["year"]) in entry[0]


def test_the_project_has_one_home() -> None:
    home = PROJECT["urls"]["Homepage"]
    assert load_yaml("CITATION.cff")["repository-code"] == home
    for place in ("pyproject.toml", ".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/config.yml"):
        found = re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text(place))
        assert set(found) == {home}, place
    report = PROJECT["urls"]["Report a vulnerability"]
    assert f"]({report})" in text("SECURITY.md")
    assert f"url: {report}\n" in text(".github/ISSUE_TEMPLATE/config.yml")


def test_classifiers_are_known() -> None:
    trove = pytest.importorskip("trove_classifiers", reason="trove-classifiers is not installed")
    assert set(PROJECT["classifiers"]) <= trove.classifiers
    # The license is an SPDX expression, beside which PyPI accepts no classifier.
    assert not any(line.startswith("License ::") for line in PROJECT["classifiers"])


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


def has_files(path: Path) -> bool:
    """Whether it is a file, or a folder with one: git leaves folders with only compiled files behind."""
    return path.is_file() or any(one.is_file() and "__pycache__" not in one.parts for one in path.rglob("*"))


def named() -> set[str]:
    """Return the files and folders that the same texts name in code spans, results of commands excepted."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.rst"), ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]
    spans = {span for path in texts for span in re.findall(r"`+([\w.][\w./-]*)`", path.read_text(encoding="utf-8"))}
    ignored = [line.rstrip("/") for line in text(".gitignore").splitlines()]
    return {
        span
        for span in spans
        if re.search(r"\w[./]|\.\w", span)
        and has_files(ROOT / span)
        and not any(f"{span}/".startswith(f"{line}/") for line in ignored)
    }


def test_links_lead_to_files() -> None:
    links = linked()
    assert {"CHANGELOG.md", "benchmarks/results/digits.png", "examples/distributed/train.py"} <= links
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_the_sdist_holds_what_the_texts_name(tmp_path: Path) -> None:
    sdist = pytest.importorskip(
        "hatchling.builders.sdist", reason="hatchling, which builds the sdist, is not installed"
    )
    (archive,) = sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    held = names | {parent.as_posix() for name in names for parent in Path(name).parents}
    assert "PKG-INFO" in names
    assert sorted(place for place in {*linked(), *named()} if place.rstrip("/") not in held) == []


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
    return load_yaml("conda-recipe/recipe.yaml")


def conda(requirement: str) -> str:
    """Return a requirement of pyproject.toml as conda writes it. conda-forge has the same names for all of them."""
    return requirement.replace(">=", " >=")


def test_the_recipe_requires_what_the_project_requires(recipe: Any) -> None:
    python = ["python >=${{ python_min }}"]
    assert recipe["requirements"]["run"] == [*python, *map(conda, PROJECT["dependencies"])]
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    host = recipe["requirements"]["host"]
    assert set(map(conda, PYPROJECT["build-system"]["requires"])) <= set(host)
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
    assert about["homepage"] == PROJECT["urls"]["Homepage"]
    assert about["repository"] == PROJECT["urls"]["Source"]
    assert about["documentation"] == PROJECT["urls"]["Documentation"]


def test_the_digest_of_the_recipe_is_left_to_the_script(recipe: Any) -> None:
    """The sdist contains the recipe, which cannot contain the sdist's digest."""
    assert set(recipe["source"]["sha256"]) == {"0"}
    assert len(recipe["source"]["sha256"]) == 64
    assert "conda-recipe/recipe.yaml" in text(".ci/package")
