"""The page of the paper's claims matches its results, and its verdicts follow from the differences."""

from __future__ import annotations

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
    summary = (RESULTS / "summary.rst").read_text(encoding="utf-8")
    assert (tmp_path / "summary.rst").read_text(encoding="utf-8") == summary
    for claim in claims.CLAIMS:
        assert f"   * - {claim.title}\n" in summary
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


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("", ""), ("seed", "left out: 1 setting without all seeds"),
        ("rates", "left out: 1 setting that diverged at every rate"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(lost: str, said: str, tmp_path: Path) -> None:
    text = (RESULTS / "cifar10" / "results.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    broken = next(line for line in lines if line.get("family") == "LoRA" and line["seed"] == 2)
    if lost == "seed":
        lines.remove(broken)
    for line in lines:
        if lost == "rates" and all(line.get(name) == broken[name] for name in ("family", "label", "seed")):
            line["diverged"] = True
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = compared_studies.studies(tmp_path)["cifar10"].about
    assert said in about
    assert ("left out" in about) == bool(lost)


def study(*settings: tuple[str, tna.Config | None, int, tuple[float, ...]]) -> Any:
    made = tuple(Setting(arm, "", config, count, values, values) for arm, config, count, values in settings)
    return compared_studies.ComparedStudy("x", "x", "x", "x", settings=made)


def claim_of(beginning: str) -> Any:
    (found,) = (claim for claim in claims.CLAIMS if claim.title.startswith(beginning))
    return found


def verdict(beginning: str, *settings: Any) -> str:
    return str(claims._verdict(claim_of(beginning), study(*settings)).rpartition(" ")[0])


UP, DOWN, WIDE = (8.0, 8.1, 7.9), (-3.0, -3.1, -2.9), (14.0, -5.0, -4.0)


@pytest.mark.parametrize(
    ("beginning", "gains", "word"),
    [
        ("Reshaping", [UP], "confirmed"), ("Reshaping", [DOWN], "reversed"), ("Reshaping", [WIDE], "inconclusive"),
        ("Reshaping", [UP, UP], "confirmed"), ("Reshaping", [UP, DOWN], "mixed"),
        ("Reshaping", [DOWN, DOWN], "reversed"), ("Reshaping", [DOWN, DOWN, UP], "mixed"),
        ("Shuffling", [(0.1, -0.1, 0.0)], "no harm"), ("Shuffling", [DOWN], "harm"),
        ("Shuffling", [(-40.0, -20.0, 0.0)], "inconclusive"), ("Shuffling", [(-40.0,)], "inconclusive"),
        ("Shuffling", [UP, UP], "no harm"), ("Shuffling", [UP, DOWN], "mixed"), ("Shuffling", [DOWN, DOWN], "harm"),
    ],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies_unless_a_pair_says_the_contrary(
    beginning: str, gains: list[tuple[float, ...]], word: str
) -> None:
    square, settings = tna.Config(groups=1, fold="hypercube", rank=4), []
    for rank, own in enumerate(gains, 1):
        first, second = square.replace(rank=rank), square.replace(rank=rank, fold="stack")
        if beginning == "Shuffling":
            first, second = first.replace(projection="shuffle"), first
        settings += [("a", first, 9, tuple(85 + gain for gain in own)), ("b", second, 9, (85.0,) * len(own))]
    assert verdict(beginning, *settings) == word


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
