"""Published results in plans: which apply, to which rows, and what the plan says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.planning.internals import measured, plan_search
from tnadapt.planning import Plan
from tnadapt.presets import PRESETS, AdaptedWeights

WEIGHTS = AdaptedWeights([(64, 64)] * 8, [i // 2 for i in range(8)], ["q", "v"] * 4, 16)
SHAPES = [(64, 64)] * 8

Gain, kind_of, measurements, read = measured.Gain, measured.kind_of, measured.measurements, measured.read
gain_of, without_gain = measured.gain_of, measured.without_gain


def task(
    title: str, elements: int, *settings: tuple[tna.Config, int, float], no_gain: Sequence[int] = ()
) -> dict[str, Any]:
    own = [
        {
            "config": config.to_dict(),
            "parameters": count,
            "held_out_share": share,
            "test_share": share,
            "seeds": 3,
        }
        for config, count, share in settings
    ]
    return {
        "name": title, "title": title, "scale": "small", "elements": elements, "settings": own, "no_gain": [*no_gain],
    }  # fmt: skip


SEARCHED: dict[tuple[Any, ...], dict[tna.Config, None]] = {}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the published results. They do not change which settings there are: these are searched for once."""

    def searched(search: Any, kinds: Any, allowed: int, progress: Any) -> dict[tna.Config, None]:
        key = (*search.shapes, allowed, *(answer["method"] for answer in measured._content()["answers"]))
        if key not in SEARCHED:
            SEARCHED[key] = search_down(search, kinds, allowed, progress)
        return dict(SEARCHED[key])

    def put(
        *tasks: dict[str, Any],
        answers: Mapping[int, str] = MappingProxyType({}),
        method: str = "LoRA",
        served: str = "LoRA",
    ) -> None:
        words = [
            {"budget": budget, "method": method, "served": served, "words": words} for budget, words in answers.items()
        ]
        monkeypatch.setattr(measured, "_measured", lambda: read(json.loads(json.dumps(tasks))))
        monkeypatch.setattr(measured, "_content", lambda: {"answers": words})

    search_down = plan_search._down
    monkeypatch.setattr(plan_search, "_down", searched)
    put()
    return put


def test_settings_of_a_preset_are_of_one_kind_whatever_their_size_and_no_other_s() -> None:
    names: dict[Any, str] = {}
    for name, preset in PRESETS.items():
        ladders = preset.ladders(WEIGHTS)
        kinds = {kind_of(ladder.config(size).replace(seed=size)) for ladder in ladders for size in (1, 2)}
        # The size of these is in their fold or terms; plans do not compare them.
        several = {"quanta", "randlora"}
        assert (len(kinds) == 1) == (name not in several), name
        # LoTR is FacT-TT, and on weights of one shape and one group FacT-TK.
        same = {names.setdefault(kind_of(ladders[0].config(1)), name), name}
        assert len(same) == 1 or same <= {"lotr", "fact_tk", "fact_tt"}


@given(elements=st.integers(1, 10**9), size=st.integers(1, 10**9))
def test_results_apply_to_weights_of_about_the_same_size(elements: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_measured", lambda: read([task("a", elements)]))
        assert bool(measurements(size)) == (10 * elements >= size and elements <= 10 * size)


def test_the_setting_with_about_as_many_parameters_counts(published: Any) -> None:
    lora = tna.presets.lora
    published(task("a", 32768, (lora(1), 1024, 0.5), (lora(8), 8192, 0.9)))
    known = measurements(32768)
    for counts, share in (((324, 1024, 2800), 0.5), ((2900, 25_000), 0.9), ((323, 26_000), None)):
        gains = [gain_of(known, lora(2), count) for count in counts]
        assert [None if gain is None else gain.held_out for gain in gains] == [share] * len(counts)
    assert gain_of(known, tna.presets.superlora(2), 1024) is None


def test_a_method_is_not_ahead_because_it_was_measured_on_the_easier_task_alone(published: Any) -> None:
    lora, superlora, dense = tna.presets.lora(1), tna.presets.superlora(1), tna.presets.dense()
    easy = task("a", 30_000, (lora, 1000, 0.8), (dense, 1000, 0.9), (superlora, 1000, 0.7))
    hard = task("b", 40_000, (lora, 1000, 0.2), (dense, 1000, 0.1))
    elsewhere = task("c", 40_000, (lora, 9, 0.1))
    published(easy, hard, elsewhere)
    known = measurements(32768)
    for both in (lora, dense):
        assert gain_of(known, both, 1000) == Gain(pytest.approx(0.5), pytest.approx(0.5), ("a", "b"), ())
    # .15 below the two others where they were measured together; their mean over the tasks is .5.
    assert gain_of(known, superlora, 1000) == Gain(pytest.approx(0.35), pytest.approx(0.35), ("a",), ("b",))
    published(easy, task("b", 40_000, (tna.presets.loha(1), 1000, 0.2)))
    assert gain_of(measurements(32768), superlora, 1000) == Gain(
        0.7, 0.7, ("a",), ("b",)
    )  # nothing was measured on both


def test_budgets_without_a_gain_apply_as_settings_do(published: Any) -> None:
    lora = tna.presets.lora(1)
    published(
        task("a", 30_000, (lora, 10_000, 0.5), no_gain=[100, 1000]), task("b", 40_000, no_gain=[1000]),
        task("c", 10**9, no_gain=[1000]),
    )  # fmt: skip
    known = measurements(32768)
    assert [without_gain(known, [count]) for count in (31, 32, 316, 317, 3162, 3163)] == [
        (), (("a", 100),), (("a", 100),), (("a", 1000), ("b", 1000)), (("a", 1000), ("b", 1000)), (),
    ]  # fmt: skip
    assert without_gain(known, [5, 100, 3000]) == (("a", 100), ("a", 1000), ("b", 1000))


ESTIMATED = "  ~ estimated: not measured on all of these tasks"
DIFFERENT = "  compare rows with similar numbers of parameters: others were measured on different tasks"


def gains(found: Plan) -> dict[tuple[str, str], str]:
    """Return the gain that the table shows for each method and number of parameters, where there is one."""
    titles, *rows = found.table()
    cells = [dict(zip(titles, row, strict=True)) for row in rows]
    return {(one["method"], one["parameters"]): one["gain"] for one in cells if one["gain"] != "–"}


def test_rows_are_in_the_order_of_the_results(published: Any) -> None:
    before = tna.plan(SHAPES, 1024)
    assert all(row.measured is None for row in before.rows)
    assert "order: by parameters, as no published results apply to weights and budgets of this size" in str(before)
    assert "gain" not in str(before).splitlines()[0]
    tried = task("The task", 32768, (tna.presets.superlora(2), 700, 0.9), (tna.presets.lora(1), 1024, 0.754))
    tried["settings"][0]["test_share"] = 0.45  # it is shown, and chooses nothing
    published(tried)
    found = tna.plan(SHAPES, 1024)
    assert [row.config for row in found.rows] != [row.config for row in before.rows]
    for ours, theirs in ((found.rows, before.rows), (found.front, before.front)):
        assert {row.config for row in ours} == {row.config for row in theirs}
    order = [(row.measured is None, -(row.measured or 0.0), -row.parameters) for row in found.rows]
    assert order == sorted(order)
    assert {str(row.name.family) for row in found.rows if row.measured is not None} == {"SuperLoRA", "LoRA"}
    # The most accurate row of a method is shown, though others have more freedom.
    assert found.rows[0] in found.shown
    assert found.rows[0] not in (*found.front, *found.freest)
    text = str(found)
    assert "order: by held-out accuracy on The task ('Which method?' in the documentation)" in text
    assert "gain: on test samples, with about as many parameters; 0% is the best control, 100% dense updates" in text
    assert not any(line in text for line in (ESTIMATED, DIFFERENT, "no gain: "))
    assert set(gains(found).values()) == {"45%", "75%"}
    content = found.to_dict()
    assert (content["measured_on"], content["no_gain_on"]) == (["The task"], [])
    names = ("measured", "gain", "measured_on", "estimated_on")
    assert [content["rows"][0][name] for name in names] == [0.9, 0.45, ["The task"], []]
    assert [content["rows"][-1][name] for name in names] == [None, None, [], []]
    # Results at other budgets.
    few = tna.plan(SHAPES, 40)
    assert "order: by parameters, as no published results apply" in str(few)
    assert few.measured_on == ()


def test_a_list_of_tasks_is_wrapped(published: Any) -> None:
    titles = [
        f"A task with a title that is as long as those of language models, number {number}" for number in range(4)
    ]
    published(*(task(title, 32768, (tna.presets.lora(1), 1024, 0.5)) for title in titles))
    text = str(tna.plan(SHAPES, 1024))
    assert max(map(len, text.splitlines())) <= 120
    assert f"order: by held-out accuracy on {'; '.join(titles)} ('Which method?'" in " ".join(text.split())


def test_estimates_and_rows_whose_results_are_of_different_tasks_are_marked(published: Any) -> None:
    lora, superlora = tna.presets.lora(1), (tna.presets.superlora(2), 700, 0.7)
    tasks = [(lora, 1024, 0.8), superlora], [(lora, 1024, 0.6)]
    published(task("One", 32768, *tasks[0]), task("Two", 32768, *tasks[1]))
    found = tna.plan(SHAPES, 1024)
    assert gains(found) == {("LoRA", "1,024"): "70%", ("SuperLoRA", "728"): "~60%"}
    lines = str(found).splitlines()
    assert lines[lines.index(ESTIMATED) - 1].startswith("gain: on test samples")
    assert DIFFERENT not in lines
    first, second, *_ = found.to_dict()["rows"]
    assert (first["measured_on"], first["estimated_on"]) == (["One", "Two"], [])
    assert (second["measured_on"], second["estimated_on"]) == (["One"], ["Two"])
    assert found.measured_on == ("One", "Two")
    published(task("One", 32768, (lora, 1024, 0.8), (lora, 10_240, 0.9)), task("Two", 32768, *tasks[1]))
    found = tna.plan(SHAPES, 10_240)
    assert gains(found) == {("LoRA", "10,240"): "90%", ("LoRA", "1,024"): "70%"}
    lines = str(found).splitlines()
    assert DIFFERENT in lines
    assert ESTIMATED not in lines
    # All rows of this plan that have results have those of both tasks.
    assert DIFFERENT not in str(tna.plan(SHAPES, 1024)).splitlines()


def test_tasks_on_which_nothing_was_gained_are_named(published: Any) -> None:
    lora, superlora = tna.presets.lora(1), tna.presets.superlora(2)
    published(
        task("One", 32768, (lora, 1024, 0.8)), task("Two", 32768, (superlora, 10_240, 0.8), no_gain=[100, 1000]),
        task("Three", 32768, no_gain=[1000]), task("Other", 10**9, no_gain=[1000]),
    )  # fmt: skip
    found = tna.plan(SHAPES, 1024)
    assert found.no_gain_on == (("Two", 1000), ("Three", 1000))
    assert found.measured_on == ("One",)
    none = "no method was clearly better than the best control on"
    assert f"no gain: {none} Two with 1,000 parameters; Three with 1,000 parameters" in str(found).splitlines()
    assert found.to_dict()["no_gain_on"] == [{"task": title, "parameters": 1000} for title in ("Two", "Three")]
    # Rows of that size are in the order of a larger budget, too.
    assert tna.plan(SHAPES, 10_240).no_gain_on == found.no_gain_on
    few = tna.plan(SHAPES, 316)
    assert few.no_gain_on == (("Two", 100),)
    assert f"order: by parameters, as {none} Two with 100 parameters" in str(few).splitlines()
    published(task("Two", 32768, no_gain=[500, 1000]))
    assert f"order: by parameters, as {none} Two with 500 and 1,000 parameters" in str(tna.plan(SHAPES, 1024))


def test_the_recommendation_of_the_nearest_budget_comes_first(published: Any) -> None:
    words = "Up to 1,000 parameters, choose LoRA. Measured on a task with a long title, where no other method is tied."
    published(answers={100: "Up to 100.", 1000: words})
    few = "Nearest measured budget: 100 parameters. Up to 100."
    many = f"Nearest measured budget: 1,000 parameters. {words}"
    for budget, said in ((31, ""), (100, "Up to 100."), (316, few), (317, many), (3163, "")):
        plan = tna.plan(SHAPES, budget)
        assert plan.recommendation == plan.to_dict()["recommendation"]
        # LoRA of rank 1 has 1,024 numbers on these weights.
        recommended, *others = plan.recommendation.partition(" On these weights, ")
        assert recommended == said
        least = "LoRA takes 1,024 parameters or more; of the settings below, LoRA servers take Uni-LoRA p = "
        assert others[1].startswith(least) == (bool(said) and budget < 1024)
    published(answers={1000: "Choose."}, method="FourierFT")
    plan = tna.plan(SHAPES, 1000)
    assert plan.recommendation.startswith("Choose. On these weights, LoRA takes 1,024")
    assert (plan.rows[0], str(plan.rows[0].name)) == (plan.shown[0], "FourierFT n = 125")
    assert "first row: tna.torch.attach(model, 'fourierft', n=125)" in str(plan).splitlines()
    published(answers={1000: "Choose."}, served="")
    assert tna.plan(SHAPES, 1000).recommendation == "Choose."
    published(answers={1000: words}, served="Uni-LoRA")
    found = tna.plan(SHAPES, 1000)
    *lines, _ = " ".join(str(found).split()).partition(" method setting")
    assert lines[0] == words
    assert max(map(len, str(found).splitlines())) <= 120
    assert words in found._repr_html_()


def test_the_published_results_can_be_read() -> None:
    assert [answer["budget"] for answer in measured._content()["answers"]] != []
    for one in measured._measured():
        assert one.settings or one.no_gain
        assert all(setting.parameters > 0 for setting in one.settings)
