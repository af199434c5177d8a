"""The page that the documentation shows is that of the published results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality import evidence, figures, page, readme, replication, store, tasks, which
from benchmarks.quality.command import PUBLISHED, main
from benchmarks.quality.comparison import outcomes_of
from benchmarks.quality.page import RUNS
from tests.support.depth import long_only


def test_the_page_is_that_of_the_results() -> None:
    assert (PUBLISHED / "page.md").read_text(encoding="utf-8") == page.page(PUBLISHED)


def test_which_method_is_that_of_the_results() -> None:
    assert (PUBLISHED / "which.md").read_text(encoding="utf-8") == which.page(PUBLISHED)


def test_readme_has_the_table_of_the_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert f"{readme.BEGIN}\n{readme.section(PUBLISHED)}{readme.END}\n" in text


@pytest.mark.slow
@long_only  # the grids take half a minute
@pytest.mark.parametrize(
    "arguments", [f"{name} {run}" for name in RUNS if store.files_of(PUBLISHED, name, "small") for run in RUNS[name]]
)
def test_the_commands_on_the_page_leave_nothing_to_train(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", *arguments.split(), "--profile", "day", "--dry-run", "--out", str(PUBLISHED)])
    assert "; 0 can be run now" in capsys.readouterr().out


def test_the_commands_of_every_task_with_results_are_known() -> None:
    assert {name for name in tasks.TASKS if store.files_of(PUBLISHED, name, "small")} <= set(RUNS)


def test_what_plans_rank_by_is_that_of_the_results() -> None:
    assert evidence.PACKAGED.read_text(encoding="utf-8") == evidence.evidence(PUBLISHED)


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if store.files_of(PUBLISHED, name, "small")])
def test_no_text_above_a_picture_covers_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    task, drawn = tasks.find(name), list[Any]()
    monkeypatch.setattr(figures, "saved", lambda figure, path: drawn.append(figure))
    found = store.read(PUBLISHED, name, "small")
    assert found is not None
    figures.draw_scores(task, outcomes_of(task, found.records.values()), tmp_path / "scores.png", "A note.")
    (axes,) = drawn[0].axes
    drawn[0].draw_without_rendering()
    title = next(one for one in axes.get_children() if getattr(one, "get_text", str)() == task.title)
    assert not title.get_window_extent().overlaps(axes.get_legend().get_window_extent())
    assert title.get_window_extent().x1 <= drawn[0].bbox.x1


@pytest.mark.parametrize("folder", [PUBLISHED, PUBLISHED / replication.FOLDER], ids=["first", "second"])
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_results_are_finished(name: str, folder: Path) -> None:
    task = tasks.find(name)
    for scale in task.scales:
        found = store.read(folder, name, scale)
        if found is None:
            continue
        path = store.path_of(folder, name, scale)
        assert store.files_of(folder, name, scale) == [path], "merge the shards"
        if folder == PUBLISHED:
            for end in (".png", "-methods.png"):
                assert (folder / (path.stem + end)).read_bytes().startswith(b"\x89PNG")
        # What is shown has seeds and rates, and every setting is finished.
        outcomes = outcomes_of(task, found.records.values())
        assert len(outcomes) == len(outcomes_of(task, found.records.values(), every=True))
        assert all(len(one.test) >= 3 and len(one.tried) >= 3 for one in outcomes if one.measured and one.budget)
