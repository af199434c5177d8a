"""Statistics of the benchmark against SciPy, its table, and its recommendations.

What the published results show is in test_published_quality.py: tables, answers, and what plans rank by.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

import tnadapt as tna
from benchmarks.quality import report, store
from benchmarks.quality.comparison import (
    added_by_search,
    at_budget,
    control_of,
    difference,
    half_learned,
    improves,
    leader_of,
    outcomes_of,
    share,
    spread_of_methods,
    tells,
    worse_than_base,
)
from benchmarks.quality.recommendation import Study, recommendations, sentence
from tests.quality.played_task import PlayedTask

TASK = PlayedTask()


class Falling(PlayedTask):
    """Lower scores are better, in both parts."""

    name = "other"
    lower = chosen_lower = True


def lines(
    method: str, tests: list[float], library: str = "tnadapt", rate: float = 0.1, **more: Any
) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{method}-{rate}-{seed}", "method": method, "title": method, "library": library, "label": "r = 1",
            "budget": 0 if library == "control" else 100, "parameters": 90, "config": {"of": method}, "seed": seed,
            "rate": rate, "kept": 5, "diverged": False, "validation": 0.5, "validation_loss": 1.0, "test": test,
            "seconds": 1.0, **more,
        }
        for seed, test in enumerate(tests)
    ]  # fmt: skip


scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8)


@given(pairs=scores)
def test_a_difference_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    one, two = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    first, second = outcomes_of(TASK, [*lines("a", one), *lines("b", two)])
    found = difference(TASK, first, second)
    assert found is not None
    gains = np.subtract(one, two)
    assert found.seeds == len(pairs)
    assert found.mean == pytest.approx(gains.mean(), abs=1e-12)
    if gains.std() > 1e-9:
        ends = scipy.stats.ttest_rel(one, two).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-6, abs=1e-9)
        # The interval excludes 0 if and only if the test rejects at 5 %.
        p = scipy.stats.ttest_rel(one, two).pvalue
        if abs(p - 0.05) > 1e-6:
            assert found.decided == (p < 0.05)


def test_only_seeds_of_both_are_compared() -> None:
    long, short = lines("a", [0.5, 0.6, 0.9]), lines("b", [0.4, 0.4])
    gain = difference(TASK, *outcomes_of(TASK, [*long, *short], every=True))
    assert gain is not None
    assert (gain.seeds, gain.mean) == (2, pytest.approx(0.15))
    # A setting with fewer seeds than others is not finished.
    assert [outcome.method for outcome in outcomes_of(TASK, [*long, *short])] == ["a"]
    # Where lower is better, a gain is a loss.
    falling = Falling()
    first, second = outcomes_of(falling, [*lines("a", [3.0, 4.0]), *lines("b", [1.0, 1.5])])
    loss = difference(falling, second, first)
    assert loss is not None
    assert loss.mean == pytest.approx(2.25)


def test_the_table_says_what_was_found() -> None:
    records = [
        *lines("base", [0.30, 0.31, 0.32], "control"),
        *lines("good", [0.80, 0.82, 0.81], validation=0.9),  # leads by its held-out score
        *lines("good", [0.10], rate=1.0, validation=0.1),
        *lines("good", [0.10], rate=10.0, failed="LinAlgError: no", diverged=True),
        *lines("near", [0.79, 0.84, 0.82], "PEFT", validation=0.8),
        *lines("equal", [0.31, 0.30, 0.33], rate=0.01, validation=0.4),
        *lines("bad", [0.10, 0.12, 0.11], rate=0.01, validation=0.4),
        *lines("lost", [0.0], failed="ValueError: no", diverged=True),
    ]
    session = {"cores": 2, "processor": "a processor", "device": "cpu", "versions": {"python": "3.12", "torch": "2"}}
    found = store.TaskResults({"samples": {"training": 3}}, {one["key"]: one for one in records}, [session])
    text = report.table(TASK, found, "played")
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert "2 trainings ended with an error; a rate with one counts as one that diverges." in text
    leader = "| ● | good | r = 1 | 90 | 0.1 | 90.0 | 81.0 ± 1.0 | the same ← |"
    assert any(line.startswith(leader) for line in shown), text
    assert any(line.startswith("| ○ | near (PEFT) |") for line in shown), text
    assert any(line.startswith("|  | bad |") for line in shown), text
    assert "Best rates: tnadapt from 0.01 to 0.1, 0.01 for 2 of 3 settings; PEFT 0.1 for all settings." in text
    assert "- lost, at most 100: failed: ValueError: no" in text
    assert "2 cores of a processor, device cpu, Python 3.12, torch 2" in text
    # A gain is an interval above no adapter.
    outcomes = {one.method: one for one in outcomes_of(TASK, records)}
    gains = [improves(TASK, outcomes[name], outcomes["base"]) for name in ("good", "near", "equal", "bad")]
    assert gains == [True, True, False, False]
    assert improves(TASK, outcomes["equal"], None)


LORA, FOURIER = tna.presets.lora(3).to_dict(), tna.presets.fourierft(4).to_dict()


# -- One method for each budget, over several tasks ---------------------------------------------------


def seeds(
    method: str, held_out: list[float], test: list[float], config: Any = FOURIER, **more: Any
) -> list[dict[str, Any]]:
    """Return the lines of a method at 100 parameters, or of a control, one for each seed."""
    library = "control" if method in ("base", "dense") else "tnadapt"
    some = lines(method, test, library, config=config, kept=0, label="", **more)
    return [{**line, "validation": validation} for line, validation in zip(some, held_out, strict=True)]


def study(task: PlayedTask, *records: list[dict[str, Any]]) -> Study:
    outcomes = outcomes_of(task, [line for own in records for line in own])
    return Study(task, task.facts(task.sketch()), outcomes)


def near(value: float) -> list[float]:
    return [value, value + 0.01, value - 0.01]


CONTROLS = (seeds("base", near(0.2), near(0.2)), seeds("dense", near(0.8), near(0.8)))
FALLING = (seeds("base", near(0.9), near(0.9)), seeds("dense", near(0.1), near(0.1)))


def test_held_out_samples_choose_and_the_shares_are_of_test_samples() -> None:
    first = study(TASK, *CONTROLS, seeds("a", near(0.7), near(0.5)), seeds("b", near(0.6), near(0.75)))
    second = study(Falling(), *FALLING, seeds("a", near(0.3), near(0.5)), seeds("b", near(0.4), near(0.2)))
    (answer,) = recommendations([first, second])
    assert (answer.budget, answer.tasks, answer.best.name) == (100, ("played", "other"), "a")
    assert answer.best.shares == pytest.approx([0.3 / 0.6, 0.4 / 0.8])
    assert answer.served is None
    told = "Up to 100 parameters, choose a (50% of dense updates' gain, from 50% to 50%)"
    assert sentence(answer) == f"{told}; LoRA servers such as vLLM take no measured method."
    assert sentence(dataclasses.replace(answer, served=answer.best)) == f"{told}, which LoRA servers such as vLLM take."
    other = dataclasses.replace(answer.best, name="b", method="b", shares=(0.25,), undecided=("other",))
    words = "b (no gain: other) (25%)"
    assert sentence(dataclasses.replace(answer, served=other)) == f"{told}; for LoRA servers such as vLLM, {words}."
    # On test samples b is ahead, but on held-out ones it is not.
    assert (answer.compared, answer.tied) == (2, 1)


def test_methods_that_are_decided_to_be_worse_are_not_tied() -> None:
    own = study(TASK, *CONTROLS, seeds("a", near(0.7), near(0.7)), seeds("b", near(0.6), near(0.5)))
    (answer,) = recommendations([own, study(Falling(), *FALLING, *(seeds(x, near(0.3), near(0.3)) for x in "ab"))])
    assert (answer.best.name, answer.compared, answer.tied) == ("a", 2, 0)


def test_settings_that_are_worse_than_the_base_with_some_seed_fail() -> None:
    held_out = near(0.5)
    good, tied = seeds("a", held_out, near(0.5)), seeds("b", held_out, near(0.2))
    bad, diverged = seeds("c", held_out, [0.5, 0.2, 0.5]), seeds("d", held_out, near(0.5), diverged=True)
    theirs = [{**line, "library": "PEFT"} for line in seeds("e", held_out, near(0.1))]
    own = study(TASK, *CONTROLS, good, tied, bad, diverged, theirs)
    assert worse_than_base(TASK, own.outcomes) == (2, 4)
    # Lower scores are better.
    own = study(Falling(), *FALLING, good, seeds("b", held_out, [0.5, 0.92, 0.5]))
    assert worse_than_base(Falling(), own.outcomes) == (1, 2)
    assert worse_than_base(TASK, study(TASK, good).outcomes) is None


def test_what_a_search_of_the_rate_adds() -> None:
    """Held-out samples choose the rate, test samples tell what it adds, and the seeds are those of the search."""
    a = [*seeds("a", near(0.5), near(0.5)), *seeds("a", [0.6], [0.44], rate=0.3), *seeds("a", [0.4], [0.9], rate=0.03)]
    b = [*seeds("b", near(0.5), near(0.4)), *seeds("b", [0.1], [0.9], rate=0.3), *seeds("b", [0.1], [0.9], rate=0.03)]
    c = [*seeds("c", near(0.5), near(0.3)), *seeds("c", [0.6], [0.6], rate=0.3), *seeds("c", [0.7], [0.42], rate=0.03)]
    # Of the first seed: from 0.5 to 0.44, not at all, and from 0.3 to 0.42, over dense updates' gain of 0.6.
    for some, median in ((a, -0.1), (b, 0.0), (c, 0.2), ([*a, *b, *c], 0.0), ([*a, *c], 0.05)):
        own = study(TASK, *CONTROLS, some)
        assert added_by_search(TASK, own.outcomes) == pytest.approx(median, abs=1e-12)
    theirs = [{**line, "library": "PEFT"} for line in c]
    for records in ([theirs, *CONTROLS], [c], [c, CONTROLS[0]], [seeds("c", near(0.5), near(0.3)), *CONTROLS]):
        assert added_by_search(TASK, study(TASK, *records).outcomes) is None
    # Lower scores are better.
    own = study(
        Falling(), *FALLING, seeds("a", near(0.5), near(0.5)), *(seeds("a", [0.4], [0.3], rate=x) for x in (0.2, 0.4))
    )
    assert added_by_search(Falling(), own.outcomes) == pytest.approx(0.25)


def test_a_method_has_to_be_measured_on_every_task_that_counts() -> None:
    a, b = seeds("a", near(0.7), near(0.5)), seeds("b", near(0.3), near(0.4))
    first = study(TASK, *CONTROLS, a, b)
    second = study(Falling(), *FALLING, seeds("b", near(0.4), near(0.2)), seeds("c", near(0.2), near(0.2)))
    assert [one.best.name for one in recommendations([first, second])] == ["b"]
    assert [one.best.name for one in recommendations([first])] == ["a"]
    # Without a method that was measured on all of them, there is no answer.
    assert recommendations([study(TASK, *CONTROLS, a), second]) == []
    # A task without a share does not count.
    for controls in (CONTROLS[:1], CONTROLS[1:], [CONTROLS[0], seeds("dense", near(0.1), near(0.8))]):
        assert recommendations([study(TASK, *controls, a)]) == []
    # The methods of one library are chosen from alike.
    peft = [{**line, "library": "PEFT"} for line in seeds("b", near(0.75), near(0.7))]
    both = study(TASK, *CONTROLS, a, peft)
    for library, choice in ((None, [("b (PEFT)", 2)]), ("tnadapt", [("a", 1)]), ("LyCORIS", [])):
        assert [(one.best.name, one.compared) for one in recommendations([both], library)] == choice


scores = st.lists(st.integers(30, 100).map(lambda score: score / 100), min_size=3, max_size=3)


def test_gains_are_over_the_best_control_and_a_task_tells_by_three_standard_errors() -> None:
    base, head, dense = (
        lines(name, tests, "control", validation=held_out)
        for name, tests, held_out in (
            ("base", [0.2, 0.3, 0.4], 0.3), ("biases", [0.5, 0.4, 0.6], 0.5), ("dense", [0.8, 0.75, 0.85], 0.8),
        )
    )  # fmt: skip
    outcomes = outcomes_of(TASK, [*base, *head, *dense, *lines("lora", [0.6, 0.6, 0.6], validation=0.6)])
    control = control_of(TASK, outcomes)
    assert control is not None
    assert control.method == "biases"
    assert share(TASK, outcomes[3], outcomes) == pytest.approx((0.6 - 0.5) / (0.8 - 0.5))
    # Dense gains 0.3, 0.35 and 0.25 over it.
    assert tells(TASK, outcomes)
    near = outcomes_of(TASK, [*head, *lines("dense", [0.55, 0.42, 0.78], "control")])
    gains = np.array([0.05, 0.02, 0.18])
    assert gains.mean() < 3.0 * gains.std(ddof=1) / math.sqrt(3)
    assert not tells(TASK, near)
    assert not tells(TASK, outcomes_of(TASK, dense))


def test_a_task_is_half_learned_between_the_budgets_around_half_of_the_gain() -> None:
    def at(budget: int, name: str, test: float, held_out: float) -> list[dict[str, Any]]:
        return seeds(name, near(held_out), near(test), {"of": budget}, budget=budget, parameters=budget)

    few, many = at(100, "a", 0.3, 0.3), at(10_000, "a", 0.7, 0.7)
    outcomes = outcomes_of(TASK, [line for some in (*CONTROLS, few, many, at(100, "b", 0.4, 0.25)) for line in some])
    # Half of the way from 0.2 to 0.8 is halfway between 0.3, the best by held-out score, and 0.7.
    assert half_learned(TASK, outcomes) == pytest.approx(1000.0)
    assert spread_of_methods(TASK, outcomes, 100) == pytest.approx((0.25, 1 / 3))
    assert spread_of_methods(TASK, outcomes, 10_000) is None
    for some, half in (([few], None), ([many], 10_000.0)):
        assert half_learned(TASK, outcomes_of(TASK, [line for part in (*CONTROLS, *some) for line in part])) == half


@given(given=st.lists(st.tuples(scores, scores), min_size=1, max_size=5))
def test_the_choice_has_the_largest_share_on_held_out_samples(given: list[tuple[list[float], list[float]]]) -> None:
    gain = seeds("always", near(0.25), near(0.29))
    own = study(TASK, *CONTROLS, gain, *(seeds(f"m{i}", *pair) for i, pair in enumerate(given)))
    means = {f"m{i}": statistics.fmean(pair[0]) for i, pair in enumerate(given)}
    answers = recommendations([own])
    if not answers:  # what has the best held-out score does not gain on test samples
        leader = leader_of(TASK, at_budget(own.outcomes, 100))
        assert leader is not None
        assert not improves(TASK, leader, control_of(TASK, own.outcomes))
        return
    (answer,) = answers
    assert means.get(answer.best.name, 0.25) == pytest.approx(max(means.values()), abs=1e-12)
    (chosen,) = [one for one in own.outcomes if one.name == answer.best.name]
    assert answer.best.shares == (share(TASK, chosen, own.outcomes),)
