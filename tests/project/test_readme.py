"""The README's table is what the code gives. (Its examples are run as doctests.)"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

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
ROWS = [
    (name, arguments, int(count.replace(",", "")))
    for calls, count in re.findall(r"^\| (`.*?`) \| .* \| ([\d,]+) \|$", TEXT, flags=re.MULTILINE)
    for name, arguments in re.findall(r"`(\w+)(?:\((.*?)\))?`", calls)
]


@pytest.mark.parametrize(("name", "arguments", "count"), ROWS)
def test_the_table_s_counts(name: str, arguments: str, count: int) -> None:
    positional, named = [], dict(GIVEN.get(name, {}))
    for part in filter(None, (part.strip(" …") for part in arguments.split(","))):
        key, equals, value = part.rpartition("=")
        if equals:
            named[key] = int(value)
        else:
            positional.append(float(value) if "." in value else int(value))
    config = getattr(tna.presets, name)(*positional, **named)
    assert tna.parameter_count(config, [(768, 768)] * 24, roles="qv" * 12) == count


def test_the_table_names_every_preset() -> None:
    assert {name for name, _, _ in ROWS} == set(tna.presets.__all__)


def test_setup_and_tests_are_what_ci_runs() -> None:
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
    # The fast tests first: they fail soonest.
    assert [ci.index(command) for command in commands] == sorted(ci.index(command) for command in commands)


def test_the_commands_are_contributing_s() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in re.findall(r"^\.venv/bin/python -m (?:pip|pytest).*$", TEXT, flags=re.MULTILINE):
        assert f"\n{command}\n" in text


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    said = re.search(r"^Extras: (.*?)\n\n", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert said
    assert set(re.findall(r"`([a-z]+)`", said[1])) == set(extras)
