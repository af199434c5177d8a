"""What surrounds the code: workflows, citation, packaging and policies agree with each other and with the code."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
pytestmark = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="the workflows are not in this copy of the project")

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


def test_nightly_runs_the_long_jobs() -> None:
    jobs = workflow("nightly")["jobs"]
    assert re.fullmatch(r"timeout .*\d+h \.ci/long", commands(jobs["long"])[0])
    assert {name: commands(jobs[name]) for name in ("oldest", "audit", "package")} == {
        "oldest": [".ci/oldest"], "audit": [".ci/audit"], "package": [".ci/package"],
    }  # fmt: skip


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


# -- Stability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(re.findall(r":mod:`(\w[\w.]*)`", text("docs/stability.rst")))))
def test_public_modules_list_names_that_exist(name: str) -> None:
    assert importlib.util.find_spec(name) is not None
    module = pytest.importorskip(name, exc_type=ImportError)  # of a framework that is not installed
    assert module.__all__
    assert [one for one in module.__all__ if not hasattr(module, one)] == []
    assert len(set(module.__all__)) == len(module.__all__)


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
