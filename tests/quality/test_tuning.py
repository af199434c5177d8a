"""Rates: the default with all seeds, others around it by the same rule for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, ClassVar

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality.comparison import outcomes_of
from benchmarks.quality.engine import failed, line_of
from benchmarks.quality.grid import Trial
from benchmarks.quality.methods import Setting
from benchmarks.quality.tuning import Plan, default_rate, due
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
        ("dense", [0.0033, 0.01, 0.03]),  # the default is the best
        ("lora", [0.0033, 0.01, 0.03, 0.09]),  # three times the default is, so one beyond it
        ("lora_xs", [0.0033, 0.01, 0.03, 0.09, 0.27, 0.81, 2.4]),  # at the limit of four beyond
        ("unilora", [4.1e-5, 0.00012, 0.00037, 0.0011, 0.0033, 0.01, 0.03]),
        ("peft-lora", [3.3e-5, 1e-4, 3e-4, 9e-4, 2.7e-3]),  # around PEFT's default: the second beyond is worse
    ],
)
@pytest.mark.parametrize("tuned_by", [1, 2, 3])
def test_all_seeds_get_the_default_rate_and_some_get_others(method: str, tried: list[float], tuned_by: int) -> None:
    records = played(setting_of(method), Plan(seeds=4, tuned_by=tuned_by))
    rates = [sorted(line["rate"] for line in records.values() if line["seed"] == seed) for seed in range(5)]
    default = 1e-4 if method == "peft-lora" else 1e-2
    assert rates == [tried] * tuned_by + [[default]] * (4 - tuned_by) + [[]]
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.rate, outcome.tuned_by, outcome.tried) == (default, tuned_by, tuple(tried))
    assert (outcome.best_rate, list(outcome.test)) == (FOUND[method], [0, 1, 2, 3])
    assert outcome.edge == (FOUND[method] in (tried[0], tried[-1]))
    best = [line["test"] for line in records.values() if line["rate"] == FOUND[method] and line["seed"] < tuned_by]
    assert outcome.best_test == pytest.approx(sum(best) / len(best))


def test_the_default_rate_is_scaled_to_the_base_but_for_methods_of_others() -> None:
    class Large(PlayedTask):
        rate = 0.08

    found = {name: default_rate(Large(), "small", setting_of(name)) for name in ("dense", "lora-1", "lora", "biases")}
    assert found == {"dense": 0.08, "lora-1": 0.08, "lora": 0.08, "biases": 1e-3}
    assert default_rate(Large(), "small", setting_of("peft-lora")) == default_rate(
        TASK, "small", setting_of("peft-lora")
    )


def test_no_other_rate_is_tried_until_it_is_asked_for() -> None:
    setting = setting_of("lora")
    records = played(setting, Plan(seeds=3, tuned_by=0))
    assert sorted((line["seed"], line["rate"]) for line in records.values()) == [(0, 0.01), (1, 0.01), (2, 0.01)]
    assert played(setting, Plan(seeds=3, tuned_by=1), before=records) == played(setting, Plan(seeds=3, tuned_by=1))


def test_a_new_head_has_its_own_rate_and_what_trains_nothing_is_measured_once() -> None:
    class Headless(PlayedTask):
        has_head = False

    class Headed(PlayedTask):
        scales: ClassVar = {"small": {"head_rate": 0.2}}

    for task, method, trainings in (
        (Headless(), "base", [(0, 0.0)]),
        (Headed(), "base", [(0, 0.2), (1, 0.2), (2, 0.2), (0, 0.067), (0, 0.6)]),
        (TASK, "fitted-head", [(0, 0.0)]),
        (Headless(), "few-shot", [(0, 0.0)]),
    ):
        trials = due(task, "small", [setting_of(method, budget=0)], {}, Plan(3))
        assert [(trial.seed, trial.rate) for trial in trials] == trainings
    # It has the same score with every seed.
    few = line(Trial(TASK.name, "small", setting_of("few-shot", budget=0), 0, 0.0))
    outcomes = outcomes_of(Headless(), [few, *played(setting_of("lora"), Plan(3)).values()])
    assert [list(outcome.test) for outcome in outcomes] == [[0, 1, 2]] * 2
    assert len(set(outcomes[0].test.values())) == 1


@pytest.mark.parametrize(
    ("first", "then"), [(Plan(3, 1), Plan(5, 2)), (Plan(2, 2), Plan(5, 1)), (Plan(1, 1), Plan(4, 3))]
)
def test_results_of_an_earlier_plan_do_not_hide_a_setting(first: Plan, then: Plan) -> None:
    setting = setting_of("lora")
    for number in range(20):
        random = Random(number)

        def make(trial: Trial, random: Random = random) -> dict[str, Any]:
            return line(trial) | {"validation": random.random()}

        records = played(setting, then, make, before=played(setting, first, make))
        (outcome,) = outcomes_of(TASK, records.values())
        assert (outcome.rate, sorted(outcome.test)) == (0.01, list(range(then.seeds)))


def test_a_method_that_fails_is_not_tried_again_and_others_go_on() -> None:
    plan, bad = Plan(seeds=2), setting_of("lora")
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
    plan, setting = Plan(seeds=2), setting_of("lora")
    records = played(setting, plan, lambda trial: line(trial) | (lost if trial.rate > 0.01 else {}))
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.rate, outcome.best_rate, outcome.measured, sorted(outcome.test)) == (0.01, 0.01, True, [0, 1])
    # A failure at the default rate is one of the setting; and what always diverges ends.
    records = played(setting, plan, lambda trial: line(trial) | (lost if trial.seed == 1 else {}))
    (outcome,) = outcomes_of(TASK, records.values())
    assert (outcome.measured, outcome.failed, outcome.diverged) == (False, lost.get("failed", ""), True)
    (outcome,) = outcomes_of(TASK, played(setting, plan, lambda trial: line(trial) | lost).values())
    assert (outcome.measured, outcome.best_test) == (False, None)
