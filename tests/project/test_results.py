"""The tables and numbers that the documentation shows of benchmarks are those of the committed results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import BENCHMARKS

pytest.importorskip("torch")
if not (BENCHMARKS / "rates.py").is_file():
    pytest.skip("the benchmarks are not in this copy of the project", allow_module_level=True)

Scripts = Callable[[str], ModuleType]

DOCS = BENCHMARKS.parent / "docs"


def results(name: str) -> Any:
    text = (BENCHMARKS / "results" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


#: The scripts that make the tables, and how.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rates/digits": ("rates", lambda script: script.table("digits")),
    "rates/reviews": ("rates", lambda script: script.table("reviews")),
    "rates/cifar10": ("rates", lambda script: script.table("cifar10")),
    "rates/summary": ("rates", lambda script: script.summary()),
    "rates/power": ("rates", lambda script: script.power_table()),
    "rates/norm": ("rates", lambda script: script.norm_table()),
    "unmerge": ("unmerge", lambda script: script.table(results("unmerge.json")["rows"])),
    "quantized": ("quantized", lambda script: script.tables(results("quantized.json"))),
    "extract_large": ("extract_large", lambda script: script.table(results("extract_large.json"))),
    "mixed_batch": ("mixed_batch", lambda script: script.table(results("mixed_batch.jsonl"))),
    "decompositions": ("decompositions", lambda script: script.table(results("decompositions.jsonl"))),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_made_of_its_results(benchmark_scripts: Scripts, name: str) -> None:
    script, table = TABLES[name]
    assert (BENCHMARKS / "results" / f"{name}.rst").read_text(encoding="utf-8") == table(benchmark_scripts(script))


# -- Learning rates -------------------------------------------------------------------------------


def test_what_the_tables_of_rates_say_together(benchmark_scripts: Scripts) -> None:
    script = benchmark_scripts("rates")
    rows_of = {task: script.rows_of(script.read_lines(script.RESULTS / f"{task}.jsonl")) for task in script.TASKS}
    for task, rows in rows_of.items():
        assert len(rows) == len(script.CONFIGS[task]), f"a setting of {task} lacks a rate"
    rows = [row for task in script.TASKS for row in rows_of[task]]
    within = [max(row.best, script.DEFAULT) <= 2 * min(row.best, script.DEFAULT) for row in rows]
    lost = [100 * (statistics.fmean(row.test_best) - statistics.fmean(row.test_default)) for row in rows]
    text = script.summary()
    assert text.startswith(f"On all tasks, {sum(within)} of {len(rows)} settings have their best rate within a factor")
    assert f"loses more than half a point in {sum(one > 0.5 for one in lost)} settings" in text
    assert text.endswith(f"at most {max(lost):.2f}.\n")


# -- Decompositions -------------------------------------------------------------------------------


def test_only_results_as_good_as_ours_are_among_the_best(benchmark_scripts: Scripts) -> None:
    over_the_best = benchmark_scripts("decompositions").over_the_best
    ratios = {"slow": 0.5, "as good": 1.5, "fast and wrong": 9.0, "fast, of a random matrix": 8.0}
    errors = {"tnadapt": 0.1, "slow": 0.1, "as good": 0.1005, "fast and wrong": 0.2, "fast, of a random matrix": 0.2}
    assert over_the_best(ratios, errors) == 1.5
    # A rank of 4 leaves 99 % of a random matrix, whatever the triplets.
    random = {**dict.fromkeys(errors, 0.990), "fast, of a random matrix": 0.995, "fast and wrong": 0.999}
    assert over_the_best(ratios, random) == 1.5
    assert over_the_best({"wrong": 2.0}, {"tnadapt": 0.1, "wrong": 0.2}) == 0.0


# -- Quantized bases ------------------------------------------------------------------------------


def test_every_quantization_was_tried_and_only_calibrated_ones_refuse_a_merge() -> None:
    from tests.torch.quantized_models import EMBEDDINGS, KINDS

    kinds = results("quantized.json")["kinds"]
    assert {name for name in kinds if not name.startswith(("GPTQ", "AWQ"))} == {*KINDS, *EMBEDDINGS}
    for name, row in kinds.items():
        refused = {step for step, outcome in row["steps"].items() if outcome != "yes"}
        assert refused == ({"merge"} if name.startswith(("GPTQ", "AWQ")) else set()), name


def test_the_numbers_of_quantized_bases_are_measured() -> None:
    kinds = results("quantized.json")["kinds"]
    text = " ".join((DOCS / "quantized.rst").read_text(encoding="utf-8").split())
    nf4 = kinds["bitsandbytes nf4"]
    small, large = nf4["merges"]["0.01"], nf4["merges"]["0.1"]
    kept, most, off = (round(100 * number) for number in (small["kept"], large["kept"], large["update_error"]))
    assert f"of an update of 1 % of the weight, nf4 keeps {kept} %, and of 10 % it keeps {most} %" in text
    assert f"with an error of {off} %" in text
    wrong, right = (round(100 * nf4[shape]) for shape in ("64 by 96", "96 by 64"))
    assert f"an nf4 layer of 64 by 96 is off by {wrong} % instead of {right} %" in text
    for name, row in kinds.items():
        for bits, size in (("8", "0.1"), ("int8", "0.03")):
            if bits in name and "merges" in row:
                assert row["merges"][size]["kept"] > 0.95, name


# -- Language models ------------------------------------------------------------------------------


def test_the_table_of_language_models_is_that_of_the_results() -> None:
    lines = [line.strip().removeprefix("* ") for line in (DOCS / "language_models.rst").read_text("utf-8").splitlines()]
    cells = [line[1:].strip() for line in lines if line == "-" or line.startswith("- ")]
    both = [results("smollm2_sft.json"), results("smollm2_grpo.json")]
    for label, key, form in (
        ("trained parameters", "trained parameters", "{:,}"),
        ("bytes of the file", "bytes of the file", "{:,}"),
        ("right before", "accuracy of the base", "{:.1%}"),
        ("right after", "accuracy", "{:.1%}"),
        ("the likelier label is right, before", "accuracy of the base's likelier label", "{:.1%}"),
        ("the likelier label is right, after", "accuracy of the likelier label", "{:.1%}"),
        ("held-out examples", "tests", "{}"),
    ):
        at = cells.index(label)
        # Only classification has labels.
        expected = [form.format(one[key]).replace("%", " %") if key in one else "" for one in both]
        assert cells[at : at + 3] == [label, *expected]
    at = cells.index("steps")
    assert cells[at : at + 3] == ["steps", *(one["settings"]["steps"] for one in both)]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_few_parameters_learned_something(name: str) -> None:
    result = results(f"smollm2_{name}.json")
    assert result["trained parameters"] <= 1000
    # More than three standard deviations of the difference of two shares.
    assert result["accuracy"] - result["accuracy of the base"] > 3 * (2 * 0.25 / result["tests"]) ** 0.5
