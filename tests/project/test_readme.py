"""What README.md says is so. (Its examples with >>> are run as doctests.)"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna

ROOT = Path(__file__).parents[2]
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
    counted = json.loads((ROOT / "docs" / "laws.json").read_text(encoding="utf-8"))
    assert "More than a hundred [laws]" in TEXT
    assert len(counted["laws"]) > 100
    assert "hold in over 9,000 test" in TEXT
    assert counted["cases"] > 9_000
    results = ROOT / "benchmarks" / "results"
    # What is left after unmerging.
    unmerged = json.loads((results / "unmerge.json").read_text(encoding="utf-8"))["rows"]
    rows = {(row["library"], row["dtype"], row["times"]): row for row in unmerged}
    theirs = rows["PEFT", "bfloat16", 100]
    assert f"[{100 * theirs['error']:.0f} % of an adapter's update]" in TEXT
    assert all(row["changed"] == 0 for (library, _, _), row in rows.items() if library == "tnadapt")
    # The learning rate.
    heads = [
        re.match(r"(\d+) of (\d+) settings", path.read_text(encoding="utf-8"))
        for path in sorted((results / "rates").glob("*.rst"))
    ]
    counts = [(int(head[1]), int(head[2])) for head in heads if head]
    assert len(counts) == 3
    assert f"[{sum(within for within, _ in counts)} of {sum(every for _, every in counts)} settings]" in TEXT


PAGES = re.findall(r"\]\(https://tnadapt\.readthedocs\.io/en/latest/([\w/]+)\.html\)", TEXT)
FILES = re.findall(
    r"\]\(https://(?:github\.com|raw\.githubusercontent\.com)/tnadapt/tnadapt/(?:blob/)?main/([\w./-]+)\)", TEXT
)


def test_links_are_absolute_as_pypi_needs_them_and_lead_to_pages_and_files() -> None:
    assert [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")] == []
    assert len(PAGES) > 10
    assert len(FILES) > 3
    assert [page for page in PAGES if not list((ROOT / "docs").glob(f"{page}.*"))] == []
    assert [file for file in FILES if not (ROOT / file).is_file()] == []


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


def test_setup_and_tests_are_what_ci_runs_and_contributing_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = (
        "-m venv",
        '-m pip install --quiet --no-compile -e ".[dev]"',
        "python -m pytest\n",
        "python -m pytest -m slow\n",
    )
    for command in (*commands, "tnadapt", "finetune", "python -m sphinx"):
        assert command in ci
        assert command.replace(" --quiet", "") in TEXT
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in re.findall(r"^\.venv/bin/python -m (?:pip|pytest).*$", TEXT, flags=re.MULTILINE):
        assert f"\n{command}\n" in contributing
    # The fast tests first: they fail soonest.
    assert [ci.index(command) for command in commands] == sorted(ci.index(command) for command in commands)


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    said = re.search(r"^Extras: (.*?)\n\n", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert said
    assert set(re.findall(r"`([a-z]+)`", said[1])) == set(extras)
