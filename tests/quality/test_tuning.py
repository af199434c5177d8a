"""Rates: the same rule for every method, by held-out scores alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality.comparison import outcomes_of
from benchmarks.quality.engine import failed, line_of
from benchmarks.quality.grid import Trial
from benchmarks.quality.methods import Setting
from benchmarks.quality.tuning import Plan, due, tuned
from tests.quality.played_task import FOUND, PlayedBench, PlayedTask, setting_of

TASK = PlayedTask()


def line(trial: Trial) -> dict[str, Any]:
    return line_of(trial, PlayedBench().train(trial.setting, trial.seed, trial.rate, lambda done: None))


def played(
    setting: Setting,
    plan: Plan,
    make: Callable[[Trial], dict[str, Any]] = line,
    before: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train all that is due until nothing is; return the lines by key, with those that were there before."""
    records = dict(before or {})
    rounds = []
    while trials := due(TASK, "small", [setting], records, plan):
        assert len({trial.key for trial in trials}) == len(trials)
        assert not any(trial.key in records for trial in trials)
        rounds.append(len(trials))
        records |= {trial.key: make(trial) for trial in trials}
        assert len(rounds) < 20
    return records


@pytest.mark.parametrize(
    ("method", "tried"),
    [
        ("lora", [0.001, 0.01, 0.032, 0.1, 0.0032, 1.0]),  # inside the list: two neighbours of 0.01
        ("lora_xs", [0.001, 0.01, 0.1, 1.0, 10.0, 3.2, 0.32]),  # one beyond, then neighbours of 1
        ("peft-lora", [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 3.2, 32.0]),  # two beyond: the second is worse
        ("unilora", [1e-5, 1e-4, 0.001, 0.01, 0.1, 1.0, 3.2e-6, 3.2e-5]),  # at the limit of two beyond
    ],
)
def test_rates_are_extended_and_refined(method: str, tried: list[float]) -> None:
    records = played(setting_of(method), Plan(TASK.rates, seeds=1))
    assert sorted({one["rate"] for one in records.values()}) == sorted(tried)


@pytest.mark.parametrize("method", ["lora", "peft-lora"])
@pytest.mark.parametrize("tuned_by", [1, 2, 3])
def test_all_seeds_get_the_rate_that_is_best_on_held_out_samples(method: str, tuned_by: int) -> None:
    plan = Plan(TASK.rates, seeds=4, tuned_by=tuned_by)
    records = played(setting_of(method), plan)
    rates = {seed: {one["rate"] for one in records.values() if one["seed"] == seed} for seed in range(5)}
    assert [len(rates[seed]) > 1 for seed in range(tuned_by)] == [True] * tuned_by
    assert [rates[seed] for seed in range(tuned_by, 5)] == [{FOUND[method]}] * (4 - tuned_by) + [set()]
    state = tuned(TASK, "small", setting_of(method), records, plan)
    assert (state.rate, state.missing) == (FOUND[method], ())
    # What the results alone say is the same.
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.rate, outcome.tuned_by, outcome.tried) == (FOUND[method], tuned_by, state.tried)
    assert list(outcome.test) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Plan(TASK.rates, 3, 1), Plan(TASK.rates, 8, 2)),  # the profiles quick and new
        (Plan(TASK.rates, 2, 2), Plan(TASK.rates, 5, 1)),
        (Plan(TASK.rates, 1, 1), Plan(TASK.rates, 4, 3)),
        (Plan(TASK.rates, 2, 1, refine=False), Plan((0.02, 0.2, 2.0), 4, 2)),
        (Plan((0.05,), 1, 1), Plan(TASK.rates, 3, 1)),
        (Plan(TASK.rates, 5, 2), Plan(TASK.rates, 5, 1)),  # may choose another rate, of which all seeds are there
    ],
)
def test_results_of_an_earlier_plan_do_not_hide_a_setting(first: Plan, then: Plan) -> None:
    setting = setting_of("lora")
    for number in range(40):
        random = Random(number)

        def make(trial: Trial, random: Random = random) -> dict[str, Any]:
            return line(trial) | {"validation": random.random()}

        records = played(setting, then, make, before=played(setting, first, make))
        plans = (first, then) if first.seeds == then.seeds else (then,)
        (outcome,) = outcomes_of(TASK, records.values())
        assert outcome.rate in [tuned(TASK, "small", setting, records, plan).rate for plan in plans]
        assert len(plans) == 2 or outcome.tuned_by == max(first.tuned_by, then.tuned_by)
        assert sorted(outcome.test) == list(range(then.seeds))


def test_a_method_that_fails_is_not_tried_again_and_others_go_on() -> None:
    plan, bad = Plan(TASK.rates, seeds=2), setting_of("lora")
    records = {trial.key: line_of(trial, failed("ValueError: no")) for trial in due(TASK, "small", [bad], {}, plan)}
    assert due(TASK, "small", [bad], records, plan) == []
    assert {trial.setting.method for trial in due(TASK, "small", [bad, setting_of("dense")], records, plan)} == {
        "dense"
    }
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.measured, outcome.failed) == (False, "ValueError: no")


DIVERGED = {"diverged": True, "validation": None, "test": None}


@pytest.mark.parametrize("lost", [DIVERGED, failed("LinAlgError: no")], ids=["diverged", "failed"])
def test_a_rate_that_diverges_or_fails_is_not_chosen(lost: dict[str, Any]) -> None:
    plan, setting = Plan(TASK.rates, seeds=2), setting_of("dense")
    records = played(setting, plan, lambda trial: line(trial) | (lost if trial.rate >= 0.01 else {}))
    assert tuned(TASK, "small", setting, records, plan).rate == 0.0032
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.rate, outcome.measured, sorted(outcome.test)) == (0.0032, True, [0, 1])
    # A failure at the chosen rate is one of the setting; and what always diverges ends.
    records = played(setting, plan, lambda trial: line(trial) | (lost if trial.seed == 1 else {}))
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.measured, outcome.failed, outcome.diverged) == (False, lost.get("failed", ""), True)
    assert not outcomes_of(TASK, played(setting, plan, lambda trial: line(trial) | lost).values())[0].measured
