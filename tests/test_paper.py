"""The page of the paper's claims is made of its results, and its verdicts are what the differences say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tnadapt as tna
from tnadapt.reproduce import open_recipe

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


@pytest.fixture
def paper(benchmark_scripts: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_scripts("paper")


def test_the_page_is_that_of_its_results(paper: ModuleType, tmp_path: Path) -> None:
    paper.write(paper.RESULTS, tmp_path)
    shown = (paper.RESULTS / "claims.md").read_text(encoding="utf-8")
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == shown
    pictures = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    assert pictures
    for picture in pictures:
        assert (paper.RESULTS / picture).is_file(), picture
        assert f"({picture.as_posix()})" in shown, picture


def test_every_study_has_three_seeds_and_every_setting_all_rates(paper: ModuleType) -> None:
    paths = list(paper.RESULTS.glob("*/results.jsonl"))
    assert {path.parent.name for path in paths} >= {"cifar10", "digits", "geometry"}
    for path in paths:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        records = [line for line in lines if "key" in line and line["config"] is not None]
        seeds, rates = ({line[name] for line in records} for name in ("seed", "rate"))
        assert len(seeds) >= 3, path
        tried: dict[str, set[float]] = {}
        for line in records:
            if line["seed"] == 0:
                tried.setdefault(json.dumps(line["config"], sort_keys=True), set()).add(line["rate"])
        assert all(own == rates for own in tried.values()), path
        configs = {tna.Config.from_dict(json.loads(one)) for one in tried}
        assert configs == {point.config for point in open_recipe(path.parent.name, "mini").points()}, path


# -- Verdicts, of numbers that are known -----------------------------------------------------------


def study(claims: ModuleType, *settings: tuple[str, tna.Config | None, int, tuple[float, ...]]) -> Any:
    made = tuple(claims.Setting(arm, "", config, count, values, values) for arm, config, count, values in settings)
    return claims.Study("x", "x", "x", "x", 1.0, made)


def claim_of(claims: ModuleType, beginning: str) -> Any:
    (found,) = (claim for claim in claims.CLAIMS if claim.title.startswith(beginning))
    return found


def test_pairs_differ_in_one_thing(paper: ModuleType) -> None:
    claims = paper.claims
    square, stacked = (tna.Config(groups=1, fold=fold, rank=4) for fold in ("hypercube", "stack"))
    two = square.replace(groups=4, rank=2)
    linear = square.replace(projection="linear", ratio=0.1)
    found = study(
        claims,
        ("SuperLoRA 2D, reshape", square, 100, (90.0, 92.0, 94.0)),
        ("SuperLoRA 2D", stacked, 160, (89.0, 91.0, 93.0)),
        ("SuperLoRA 2D, reshape", two, 101, (80.0, 80.0, 80.0)),
        ("SuperLoRA 2D, reshape", two.replace(rank=3), 150, (80.0, 80.0, 80.0)),
        ("with projection", linear, 20, (50.0, 50.0, 50.0)),
        ("with projection", linear.replace(projection="nonlinear"), 20, (40.0, 45.0, 50.0)),
        ("with projection", linear.replace(projection="linear_v2"), 20, (55.0, 55.0, 55.0)),
        ("with projection", linear.replace(projection="nonlinear_v2"), 20, (55.0, 55.0, 55.0)),
        ("with projection", linear.replace(ratio=0.5), 900, (55.0, 55.0, 55.0)),
        ("with projection", linear.replace(ratio=0.5, projection="linear_v2"), 900, (55.0, 55.0, 55.0)),
        ("LoRTA 3D", tna.presets.lorta(1), 50, (70.0, 70.0, 70.0)),
        ("shuffled", stacked.replace(projection="shuffle"), 160, (80.0, 90.0, 99.0)),
        ("head alone", None, 0, (30.0, 30.0, 31.0)),
        ("LoRA", tna.presets.lora(4), 400, (60.0, 60.0, 60.0)),
    )
    pairs = {claim.title.split()[0]: claim.pairs(found) for claim in claims.CLAIMS}
    assert [(one.first.config, one.second.config) for one in pairs["Reshaping"]] == [(square, stacked)]
    assert [(one.first.config, one.second.config) for one in pairs["Fewer"]] == [(square, two)]
    assert [(one.first.config, one.second.config) for one in pairs["A"]] == [
        (linear, linear.replace(projection="nonlinear")),
        (linear.replace(projection="linear_v2"), linear.replace(projection="nonlinear_v2")),
    ]
    assert [one.second.config for one in pairs["linear"]] == [linear.replace(projection="linear_v2")]
    assert [(one.first.arm, one.second.config) for one in pairs["Shuffling"]] == [("shuffled", stacked)]
    assert {one.first.parameters for one in pairs["31"]} == {20}
    assert [one.first.parameters for one in pairs["LoRTA"]] == [50]
    assert all(one.second.arm == "head alone" for one in (*pairs["31"], *pairs["LoRTA"]))
    assert [(one.first.parameters, one.second.arm) for one in pairs["SuperLoRA"]] == [(20, "LoRA")]


@pytest.mark.parametrize(
    ("first", "word"),
    [
        ((91.0, 92.0, 93.0), "comes out"), ((79.0, 78.0, 77.0), "the other way"), ((99.0, 80.0, 81.0), "not decided"),
    ],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(paper: ModuleType, first: tuple[float, ...], word: str) -> None:
    claims = paper.claims
    square = tna.Config(groups=1, fold="hypercube", rank=4)
    found = study(claims, ("a", square, 9, first), ("b", square.replace(fold="stack"), 9, (85.0, 85.0, 85.0)))
    assert claims._verdict(claim_of(claims, "Reshaping"), found).startswith(word)
    mean, low, high = claims.interval([a - 85.0 for a in first])
    assert low < mean < high
    # Of three numbers: t = 4.303 with two degrees of freedom.
    spread = (sum((a - 85.0 - mean) ** 2 for a in first) / 2) ** 0.5
    assert high - mean == pytest.approx(4.3027 * spread / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("shuffled", "word"),
    [
        ((85.1, 84.9, 85.0), "no harm"), ((82.0, 82.1, 81.9), "harm"), ((45.0, 65.0, 85.0), "not decided"),
        ((45.0,), "not decided"),
    ],
)  # fmt: skip
def test_no_harm_has_to_be_shown(paper: ModuleType, shuffled: tuple[float, ...], word: str) -> None:
    claims = paper.claims
    plain = tna.Config(groups=1, fold="stack", rank=4)
    settings = ("a", plain.replace(projection="shuffle"), 9, shuffled), ("b", plain, 9, (85.0,) * len(shuffled))
    found = study(claims, *settings)
    assert claims._verdict(claim_of(claims, "Shuffling"), found).startswith(f"{word} (")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((89.5, 89.6, 89.4), "comes out"), ((88.0, 88.1, 87.9), "the other way"), ((80.0, 90.0, 99.0), "not decided"),
    ],
)  # fmt: skip
def test_a_third_of_the_parameters_is_as_good(paper: ModuleType, values: tuple[float, ...], word: str) -> None:
    claims = paper.claims
    lora = [("LoRA", tna.presets.lora(rank), 1000 * rank, (90.0,) * 3) for rank in (1, 2, 4)]
    others = [("SuperLoRA 2D, reshape", tna.presets.superlora(rank), 350 * rank, values) for rank in (1, 4)]
    found = study(claims, *lora, *others, ("tiny", tna.presets.lorta(1), 40, (30.0,) * 3))
    three, ten = (claim for claim in claims.CLAIMS if claim.as_good)
    assert [(pair.first.parameters, pair.second.parameters) for pair in three.pairs(found)] == [
        (40, 1000), (350, 2000), (350, 4000),
    ]  # fmt: skip
    assert [(pair.first.parameters, pair.second.parameters) for pair in ten.pairs(found)] == [
        (40, 1000), (40, 2000), (350, 4000),
    ]  # fmt: skip
    better = study(claims, *lora[1:], *others)
    assert claims._verdict(three, better).startswith(f"{word} (")


def test_what_stands_at_an_edge_is_marked_and_what_diverged_left_out(paper: ModuleType, tmp_path: Path) -> None:
    claims = paper.claims
    from tnadapt.finetune import Method, Task

    lines: list[dict[str, Any]] = [
        {"format": "tnadapt finetune 1", "study": {"problem": "x", "samples": {"training": 1}}}
    ]
    lines.append({"session": {"cores": 2, "processor": "x", "versions": {"torch": "2"}}})
    for method, best in (
        (Method("LoRA", "r = 1", tna.presets.lora(1)), 0.1),
        (Method("LoRA", "r = 2", tna.presets.lora(2)), 0.2),
    ):
        for seed in range(3):
            for rate in (0.1, 0.2, 0.3):
                task = Task(method, seed, rate)
                accuracy = 0.9 if rate == best else 0.5
                lines.append(
                    {
                        "key": task.key, "family": "LoRA", "label": method.label, "config": task.settings(),
                        "seed": seed, "rate": rate, "parameters": 5, "kept": 0, "validation": accuracy,
                        "test": accuracy, "diverged": method.label == "r = 2" and seed == 1, "validation_loss": 1.0,
                        "seconds": 1.0,
                    }
                )  # fmt: skip
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = claims.studies(tmp_path)["digits"]
    assert [(one.label, one.edge) for one in found.settings] == [("r = 1", True)]
    assert "1 settings diverged" in found.about
    (pair,) = [claims.Pair(found.settings[0], found.settings[0])]
    assert "90.0 ± 0.0°" in "".join(claims._table([pair]))
