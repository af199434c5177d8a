"""The page of the paper's claims matches its results, and its verdicts follow from the differences."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from paper import claims, compared_studies, paired_statistics
from paper.compared_studies import Setting
from paper.report import RESULTS, write


def test_the_page_is_that_of_its_results(tmp_path: Path) -> None:
    write(RESULTS, tmp_path)
    shown = (RESULTS / "claims.md").read_text(encoding="utf-8")
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == shown
    pictures = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    assert pictures
    for picture in pictures:
        assert (RESULTS / picture).is_file(), picture
        assert f"({picture.as_posix()})" in shown, picture
        drawn, there = (Image.open(folder / picture) for folder in (tmp_path, RESULTS))
        # Another matplotlib draws letters elsewhere; by the same one a picture of these results is the same.
        if drawn.info["Software"] == there.info["Software"]:
            assert drawn.tobytes() == there.tobytes(), picture


# -- Verdicts, of numbers that are known -----------------------------------------------------------


def test_a_setting_that_lacks_a_seed_is_said_to_be_left_out(tmp_path: Path) -> None:
    lines = (RESULTS / "cifar10" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    gone = next(
        line for line in lines if (read := json.loads(line)).get("family") == "LoRA" and read["seed"] == 2
    )  # fmt: skip
    (tmp_path / "cifar10").mkdir()
    for kept, said in ((lines, False), ([line for line in lines if line != gone], True)):
        (tmp_path / "cifar10" / "results.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        about = compared_studies.studies(tmp_path)["cifar10"].about
        assert ("left out: 1 setting without all seeds" in about) is said


def study(*settings: tuple[str, tna.Config | None, int, tuple[float, ...]]) -> Any:
    made = tuple(Setting(arm, "", config, count, values, values) for arm, config, count, values in settings)
    return compared_studies.ComparedStudy("x", "x", "x", "x", settings=made)


def claim_of(beginning: str) -> Any:
    (found,) = (claim for claim in claims.CLAIMS if claim.title.startswith(beginning))
    return found


def verdict(beginning: str, *settings: Any) -> str:
    return str(claims._verdict(claim_of(beginning), study(*settings)).rpartition(" ")[0])


def test_pairs_differ_in_one_thing() -> None:
    square, stacked = (tna.Config(groups=1, fold=fold, rank=4) for fold in ("hypercube", "stack"))
    two = square.replace(groups=4, rank=2)
    linear = square.replace(projection="linear", ratio=0.1)
    found = study(
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
    pairs = {claim.title: claim.pairs(found) for claim in claims.CLAIMS}

    def of(beginning: str) -> Any:
        return pairs[claim_of(beginning).title]

    assert [(one.first.config, one.second.config) for one in of("Reshaping")] == [(square, stacked)]
    assert [(one.first.config, one.second.config) for one in of("Fewer groups are better with few parameters")] == [
        (square, two)
    ]
    assert [(one.first.config, one.second.config) for one in of("A linear")] == [
        (linear, linear.replace(projection="nonlinear")),
        (linear.replace(projection="linear_v2"), linear.replace(projection="nonlinear_v2")),
    ]
    assert [one.second.config for one in of("linear is better")] == [linear.replace(projection="linear_v2")]
    assert [(one.first.config, one.second.config) for one in of("linear_v2 is better")] == [
        (linear.replace(ratio=0.5, projection="linear_v2"), linear.replace(ratio=0.5))
    ]
    assert {one.first.config.projection for one in of("A nonlinear")} == {"nonlinear", "nonlinear_v2"}
    assert [(one.first.arm, one.second.config) for one in of("Shuffling")] == [("shuffled", stacked)]
    assert {one.first.parameters for one in of("31")} == {20}
    assert [one.first.parameters for one in of("LoRTA")] == [50]
    assert all(one.second.arm == "head alone" for one in (*of("31"), *of("LoRTA")))
    assert [(one.first.parameters, one.second.arm) for one in of("SuperLoRA needs 3 ")] == [(100, "LoRA")]
    assert [(one.first.parameters, one.second.arm) for one in of("SuperLoRA needs 10 ")] == [(20, "LoRA")]


@pytest.mark.parametrize(
    ("first", "word"),
    [
        ((91.0, 92.0, 93.0), "confirmed"), ((79.0, 78.0, 77.0), "reversed"), ((99.0, 80.0, 81.0), "inconclusive"),
    ],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(first: tuple[float, ...], word: str) -> None:
    square = tna.Config(groups=1, fold="hypercube", rank=4)
    found = study(("a", square, 9, first), ("b", square.replace(fold="stack"), 9, (85.0, 85.0, 85.0)))
    assert claims._verdict(claim_of("Reshaping"), found).rpartition(" ")[0] == word
    mean, low, high = paired_statistics.interval([a - 85.0 for a in first])
    assert low < mean < high
    # Of three numbers: t = 4.303 with two degrees of freedom.
    spread = (sum((a - 85.0 - mean) ** 2 for a in first) / 2) ** 0.5
    assert high - mean == pytest.approx(4.3027 * spread / 3**0.5, rel=1e-4)


def test_a_pair_that_says_the_contrary_makes_it_mixed() -> None:
    square = tna.Config(groups=1, fold="hypercube", rank=4)

    def word(beginning: str, other: dict[str, Any], *gains: tuple[float, ...]) -> str:
        settings = []
        for rank, own in enumerate(gains, 1):
            one, two = square.replace(rank=rank), square.replace(rank=rank, **other)
            if beginning == "Shuffling":
                one, two = two, one
            settings += [("a", one, 9, tuple(50 + gain for gain in own)), ("b", two, 9, (50.0,) * 3)]
        return verdict(beginning, *settings)

    up, down = (8.0, 8.1, 7.9), (-3.0, -3.1, -2.9)
    stacked, shuffled = {"fold": "stack"}, {"projection": "shuffle"}
    assert word("Reshaping", stacked, up, up) == "confirmed"
    assert word("Reshaping", stacked, up, down) == "mixed"
    assert word("Reshaping", stacked, down, down) == "reversed"
    assert word("Reshaping", stacked, down, down, up) == "mixed"
    assert word("Shuffling", shuffled, up, up) == "no harm"
    assert word("Shuffling", shuffled, up, down) == "mixed"
    assert word("Shuffling", shuffled, down, down) == "harm"


def test_differences_of_pairs_do_not_cancel_by_chance() -> None:
    def pair(*gains: float) -> Any:
        settings = [Setting("x", "", None, 1, values, values) for values in (gains, (0.0,) * len(gains))]
        return compared_studies.ComparedPair(*settings)

    opposite = [pair(1.0, 3.0, 5.0), pair(5.0, 3.0, 1.0)]
    mean, low, high = paired_statistics.pooled(opposite)
    # Seed by seed the means are all 3. Of the pairs' own variances, 4 each, t with four degrees of freedom is 2.7764.
    assert mean == 3.0
    assert high - mean == pytest.approx(mean - low) == pytest.approx(2.7764 * (8 / 3) ** 0.5 / 2, rel=1e-4)
    # What pairs have in common is not averaged out.
    alike = [pair(1.0, 3.0, 5.0)] * 4
    assert paired_statistics.pooled(alike) == paired_statistics.interval([1.0, 3.0, 5.0])
    assert paired_statistics.pooled([pair(1.0)])[1:] == (float("-inf"), float("inf"))


@pytest.mark.parametrize(
    ("shuffled", "word"),
    [
        ((85.1, 84.9, 85.0), "no harm"), ((82.0, 82.1, 81.9), "harm"), ((45.0, 65.0, 85.0), "inconclusive"),
        ((45.0,), "inconclusive"),
    ],
)  # fmt: skip
def test_no_harm_has_to_be_shown(shuffled: tuple[float, ...], word: str) -> None:
    plain = tna.Config(groups=1, fold="stack", rank=4)
    settings = ("a", plain.replace(projection="shuffle"), 9, shuffled), ("b", plain, 9, (85.0,) * len(shuffled))
    assert verdict("Shuffling", *settings) == word


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((89.5, 89.6, 89.4), "confirmed"), ((88.0, 88.1, 87.9), "reversed"), ((80.0, 90.0, 99.0), "inconclusive"),
    ],
)  # fmt: skip
def test_a_third_of_the_parameters_is_as_good(values: tuple[float, ...], word: str) -> None:
    lora = [("LoRA", tna.presets.lora(rank), 1000 * rank, (90.0,) * 3) for rank in (1, 2, 4)]
    others = [("SuperLoRA 2D, reshape", tna.presets.superlora(rank), 350 * rank, values) for rank in (1, 4)]
    found = study(*lora, *others, ("tiny", tna.presets.lorta(1), 40, (30.0,) * 3))
    three, ten = (claim_of(f"SuperLoRA needs {times}") for times in (3, 10))
    assert [(pair.first.parameters, pair.second.parameters) for pair in three.pairs(found)] == [
        (40, 1000), (350, 2000), (350, 4000),
    ]  # fmt: skip
    assert [(pair.first.parameters, pair.second.parameters) for pair in ten.pairs(found)] == [
        (40, 1000), (40, 2000), (350, 4000),
    ]  # fmt: skip
    assert verdict("SuperLoRA needs 3", *lora[1:], *others) == word


def test_what_stands_at_an_edge_is_marked_and_what_diverged_left_out(tmp_path: Path) -> None:
    from tnadapt.finetune import Method, Task

    about = {"problem": "x", "samples": {"training": 10}, "epochs": 2, "batch": 4}
    lines: list[dict[str, Any]] = [
        {"format": "tnadapt finetune 1", "study": about},
        {"session": {"cores": 2, "processor": "x", "versions": {"torch": "2"}}},
    ]
    for rank, seed, rate in itertools.product((1, 2), range(3), (0.1, 0.2, 0.3)):
        method = Method("LoRA", f"r = {rank}", tna.presets.lora(rank))
        task, accuracy = Task(method, seed, rate), 0.9 if rate == rank / 10 else 0.5
        lines.append(
            {
                "key": task.key, "family": "LoRA", "label": method.label, "config": task.settings(), "seed": seed,
                "rate": rate, "parameters": 5, "kept": 0, "validation": accuracy, "test": accuracy,
                "diverged": rank == 2 and seed == 1, "validation_loss": 1.0, "seconds": 1.0,
            }
        )  # fmt: skip
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared_studies.studies(tmp_path)["digits"]
    assert [(one.label, one.edge) for one in found.settings] == [("r = 1", True)]
    assert "left out: 1 setting that diverged at every rate" in found.about
    assert "2 epochs, 6 steps, of AdamW with a cosine, batches of 4" in found.about
    pair = compared_studies.ComparedPair(found.settings[0], found.settings[0])
    assert "90.0 ± 0.0°" in claims._rows([pair], 1)
