"""One method for each budget, over several tasks."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

import tnadapt as tna
from benchmarks.quality.comparison import outcomes_of, share
from benchmarks.quality.recommendation import Study, recommendations, table
from tests.quality.played_task import PlayedTask

#: Times of steps.
STEPS = {"fourierft": 1.234, "lora": 1.0}
TASK = PlayedTask()
LORA, FOURIER = tna.presets.lora(3).to_dict(), tna.presets.fourierft(4).to_dict()


class Other(PlayedTask):
    """Lower scores are better, in both parts."""

    name = "other"
    lower = chosen_lower = True


def lines(method: str, held_out: list[float], test: list[float], config: Any = FOURIER) -> list[dict[str, Any]]:
    """Return the lines of a method at 100 parameters, or of a control, one for each seed."""
    library = "control" if method in ("base", "dense") else "tnadapt"
    return [
        {
            "key": f"{method}-{seed}", "method": method, "title": method, "library": library, "label": "",
            "budget": 0 if library == "control" else 100, "parameters": 90, "config": config, "seed": seed,
            "rate": 0.1, "kept": 0, "diverged": False, "validation": pair[0], "validation_loss": 1.0,
            "test": pair[1],
        }
        for seed, pair in enumerate(zip(held_out, test, strict=True))
    ]  # fmt: skip


def study(task: PlayedTask, *records: list[dict[str, Any]]) -> Study:
    outcomes = outcomes_of(task, [line for own in records for line in own])
    return Study(task, task.facts(task.sketch()), outcomes)


def near(value: float) -> list[float]:
    return [value, value + 0.01, value - 0.01]


CONTROLS = (lines("base", near(0.2), near(0.2)), lines("dense", near(0.8), near(0.8)))
FALLING = (lines("base", near(0.9), near(0.9)), lines("dense", near(0.1), near(0.1)))


def test_held_out_samples_choose_and_the_shares_are_of_test_samples() -> None:
    first = study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5)), lines("b", near(0.6), near(0.75)))
    second = study(Other(), *FALLING, lines("a", near(0.3), near(0.5)), lines("b", near(0.4), near(0.2)))
    (answer,) = recommendations([first, second])
    assert (answer.budget, answer.tasks, answer.best.name) == (100, ("played", "other"), "a")
    assert answer.best.shares == pytest.approx([0.3 / 0.6, 0.4 / 0.8])
    assert answer.served is None
    assert list(table([answer], STEPS))[2] == "| 100 | a | 50 % (50 to 50) | – | – | – | – | 2 | played, other |"


def test_a_method_has_to_be_measured_on_every_task_that_counts() -> None:
    first = study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5)), lines("b", near(0.3), near(0.4)))
    second = study(Other(), *FALLING, lines("b", near(0.4), near(0.2)), lines("c", near(0.2), near(0.2)))
    assert [one.best.name for one in recommendations([first, second])] == ["b"]
    assert [one.best.name for one in recommendations([first])] == ["a"]
    # Without a method that was measured on all of them, there is no answer.
    assert recommendations([study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5))), second]) == []


def test_a_task_in_which_nothing_is_gained_does_not_count() -> None:
    first = study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5)))
    nothing = study(Other(), *FALLING, lines("b", near(0.2), near(0.9)))
    (answer,) = recommendations([first, nothing])
    assert (answer.best.name, answer.tasks, answer.idle) == ("a", ("played",), ("other",))
    assert list(table([answer], STEPS))[2].endswith("| 1 | played; no gain by any method: other |")
    assert recommendations([nothing]) == []


def test_a_choice_that_gains_nothing_somewhere_says_so() -> None:
    first = study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5)), lines("b", near(0.3), near(0.2)))
    second = study(Other(), *FALLING, lines("a", near(0.3), near(0.9)), lines("b", near(0.8), near(0.2)))
    (answer,) = recommendations([first, second])
    assert (answer.best.name, answer.best.undecided, answer.compared) == ("a", ("other",), 2)
    assert list(table([answer], STEPS))[2].startswith("| 100 | a (no gain: other) | 25 % (0 to 50) |")


@pytest.mark.parametrize("controls", [CONTROLS[:1], CONTROLS[1:], [CONTROLS[0], lines("dense", near(0.1), near(0.8))]])
def test_a_task_without_a_share_does_not_count(controls: list[list[dict[str, Any]]]) -> None:
    assert recommendations([study(TASK, *controls, lines("a", near(0.7), near(0.5)))]) == []


def test_the_methods_of_one_library_are_chosen_from_alike() -> None:
    peft = [{**line, "library": "PEFT"} for line in lines("b", near(0.75), near(0.7))]
    own = study(TASK, *CONTROLS, lines("a", near(0.7), near(0.5)), peft)
    assert [(one.best.name, one.compared) for one in recommendations([own])] == [("b (PEFT)", 2)]
    assert [(one.best.name, one.compared) for one in recommendations([own], "tnadapt")] == [("a", 1)]
    assert recommendations([own], "LyCORIS") == []


def test_what_is_served_as_lora_is_chosen_alike_and_says_its_ranks() -> None:
    records = [lines("fourierft", near(0.7), near(0.7)), lines("lora", near(0.5), near(0.5), LORA)]
    better = [
        lines("lora", near(0.5), near(0.5), tna.presets.lora(1).to_dict()),
        lines("fourierft", near(0.4), near(0.5)),
    ]
    (answer,) = recommendations([study(TASK, *CONTROLS, *records), study(Other(), *FALLING, *better)])
    assert answer.served is not None
    assert (answer.served.name, answer.served.ranks) == ("lora", (3, 1))
    found = (
        "| 100 | fourierft | 67 % (50 to 83) | 1.23 | lora, rank 1 to 3 | 50 % (50 to 50) | 1.00 | 2 | played, other |"
    )
    assert list(table([answer], STEPS))[2] == found


scores = st.lists(st.integers(30, 100).map(lambda score: score / 100), min_size=3, max_size=3)


@given(given=st.lists(st.tuples(scores, scores), min_size=1, max_size=5))
def test_the_choice_has_the_largest_share_on_held_out_samples(given: list[tuple[list[float], list[float]]]) -> None:
    gain = lines("always", near(0.25), near(0.29))
    own = study(TASK, *CONTROLS, gain, *(lines(f"m{i}", *pair) for i, pair in enumerate(given)))
    (answer,) = recommendations([own])
    means = {f"m{i}": statistics.fmean(pair[0]) for i, pair in enumerate(given)}
    assert means.get(answer.best.name, 0.25) == pytest.approx(max(means.values()), abs=1e-12)
    (chosen,) = [one for one in own.outcomes if one.name == answer.best.name]
    assert answer.best.shares == (share(TASK, chosen, own.outcomes),)
