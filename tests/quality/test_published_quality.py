"""What is published is that of the results, the times of steps are read strictly, and examples hold."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
quality = pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality import evidence, page, readme, report, store, tasks
from benchmarks.quality.command import PUBLISHED, main
from benchmarks.quality.comparison import outcomes_of
from benchmarks.quality.page import RUNS
from benchmarks.quality.recommendation import STEPS, recommendations, step_ratio, step_ratios, studies_of
from tests.support.depth import long_only
from tnadapt.errors import FileError


def test_pages_are_those_of_the_results() -> None:
    assert (PUBLISHED / "page.md").read_text(encoding="utf-8") == page.page(PUBLISHED)
    for name in tasks.TASKS:
        task = tasks.find(name)
        for scale in task.scales:
            found, path = store.read(PUBLISHED, name, scale), store.path_of(PUBLISHED, name, scale)
            if found is not None:
                shown = path.with_suffix(".md").read_text(encoding="utf-8")
                assert shown == report.table(task, found, path.stem)
    text, section = readme.README.read_text(encoding="utf-8"), readme.section(PUBLISHED)
    assert f"{readme.BEGIN}\n{section}{readme.END}\n" in text
    assert len(text.split()) <= 900  # what a newcomer reads
    # What plans rank by and say, too: the same sentences.
    packaged = evidence.PACKAGED.read_text(encoding="utf-8")
    assert packaged == evidence.evidence(PUBLISHED)
    joined = " ".join(section.split())
    for answer in json.loads(packaged)["answers"]:
        assert f"- {answer['words'].partition(' Measured on ')[0]}" in joined


@pytest.mark.slow
@long_only  # the grids take half a minute
@pytest.mark.parametrize("arguments", [f"{name} {run}" for name, runs in RUNS.items() for run in runs])
def test_the_commands_on_the_page_leave_nothing_to_train(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", *arguments.split(), "--profile", "day", "--dry-run", "--out", str(PUBLISHED)])
    assert "; 0 can be run now" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_results_are_finished(name: str) -> None:
    task = tasks.find(name)
    for scale in task.scales:
        found = store.read(PUBLISHED, name, scale)
        if found is None:
            continue
        path = store.path_of(PUBLISHED, name, scale)
        assert store.files_of(PUBLISHED, name, scale) == [path], "merge the shards"
        for end in (".png", "-methods.png"):
            assert (PUBLISHED / (path.stem + end)).read_bytes().startswith(b"\x89PNG")
        # What is shown has seeds and rates, and every setting is finished.
        outcomes = outcomes_of(task, found.records.values())
        assert len(outcomes) == len(outcomes_of(task, found.records.values(), every=True))
        assert all(len(one.test) >= 3 and len(one.tried) >= 3 for one in outcomes if one.measured and one.budget)


def test_every_recommended_method_is_measured() -> None:
    rows = [json.loads(line) for line in STEPS.read_text(encoding="utf-8").splitlines()]
    assert all(row["problem"] == "minilm" and row["layers"] == 6 for row in rows)
    assert all(row["rounds"] >= 12 and {"torch", "cores"} <= set(row) for row in rows)
    ratios, studies = step_ratios(), studies_of(PUBLISHED)
    for library in (None, "tnadapt"):
        for one in recommendations(studies, library):
            for choice in filter(None, (one.best, one.served)):
                assert step_ratio(ratios, choice.method) != "–", (library, one.budget, choice.method)


def test_a_method_without_a_time_has_a_dash_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for content in (None, "{}", "[1]", '{"case": "lora"}', '{"case": "lora", "ratio": null}', "{"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(FileError, match=r"steps\.jsonl has no times of steps: "):
            step_ratios(path)
    path.write_text('{"case": "superlora F 0.01", "ratio": 1.234}\n')
    ratios = step_ratios(path)
    assert [step_ratio(ratios, name) for name in ("superlora-projected", "superlora")] == ["1.23", "–"]


def test_examples_hold() -> None:
    names = [one.name for one in pkgutil.walk_packages(quality.__path__, "benchmarks.quality.")]
    found = [doctest.testmod(importlib.import_module(name)) for name in names if "__main__" not in name]
    assert sum(one.failed for one in found) == 0
    assert sum(one.attempted for one in found) >= 6
