"""Recipes: parsed strictly, with the paper's counts, and with settings that can all be built."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from paper import names, open_recipe
from paper.adapted_weights import WEIGHTS
from paper.recipe import SCALES, RecipePoint, parse
from paper.sweep import configs, numbers
from tests.support.depth import LONG
from tests.support.references import reference

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))

HEAD = 'title = "t"\npaper = "p"\nkind = "counts"\n'
BODY = '[full]\nweights = "digits"\n[[arms]]\nname = "a"\nsettings = {}\nfull = { rank = [1] }\n'


def scales(name: str) -> list[str]:
    found = []
    for scale in SCALES:
        try:
            open_recipe(name, scale)
        except tna.TnadaptError:
            continue
        found.append(scale)
    return found


@functools.cache
def points_of(name: str, scale: str) -> list[RecipePoint]:
    """Of large weights they take seconds to count."""
    return open_recipe(name, scale).points()


@pytest.mark.parametrize("name", names())
def test_every_setting_of_every_recipe_can_be_counted(name: str) -> None:
    assert scales(name)
    for scale in scales(name):
        points = points_of(name, scale)
        assert points
        assert all(point.parameters > 0 for point in points)
        assert len({(point.arm, point.config) for point in points}) == len(points)
        # No two of one arm share a label: a table would not tell them apart.
        assert len({(point.arm, point.setting) for point in points}) == len(points)


@pytest.mark.parametrize("name", names())
def test_settings_have_as_many_parameters_as_the_reference_counts(name: str) -> None:
    for scale in scales(name):
        weights, points = open_recipe(name, scale).weights, points_of(name, scale)
        # The reference looks at every element: of large weights, a few settings from all over the recipe.
        few = min(len(points), 40 if LONG else 10, 2 + 8_000_000 // sum(rows * cols for rows, cols in weights.shapes))
        for point in points[len(points) // (2 * few) :: len(points) // few]:
            assert point.parameters == reference.count(point.config, weights.shapes, weights.layers), point


@pytest.mark.law("parameter-count")
@pytest.mark.parametrize("name", [name for name in names() if "full" in scales(name)])
def test_the_papers_counts_come_out(name: str) -> None:
    checked = open_recipe(name).checked()
    assert [ours for _, _, ours in checked] == [stated for _, stated, _ in checked]


def test_what_the_paper_states_is_in_the_recipes() -> None:
    stated = {number for name in ("cifar100", "svhn-mnist") for _, number, _ in open_recipe(name).checked()}
    for model in ("vit_base_qv", "unet_qv"):
        assert {count["parameters"] for count in ORACLES[model]["counts"]} <= stated


def test_the_weights_are_the_papers() -> None:
    assert sum(rows * cols for rows, cols in WEIGHTS["vit-base"].shapes) == 14_155_776
    assert sum(rows * cols for rows, cols in WEIGHTS["unet"].shapes) == 565_248
    assert len(WEIGHTS["unet"].shapes) == 2 * 21


def test_a_rank_is_below_the_sizes_where_the_recipe_says_so() -> None:
    for point in open_recipe("svhn-mnist").points():
        plan = tna.SuperLoRA(point.config, WEIGHTS["unet"].shapes)
        for name, shape in plan.param_shapes.items():
            if ".factor" in name:
                assert shape[1] < shape[0], (point, name)


def test_the_documentation_says_which_have_a_miniature_and_which_were_run() -> None:
    root = Path(__file__).parents[2]
    page = " ".join((root / "docs" / "paper.rst").read_text(encoding="utf-8").split())
    found = re.search(r"At reduced scale, (.*?) have been run, and (.*?) has not; (.*?) have no reduced", page)
    assert found is not None
    run, other, none = (re.findall(r"``([\w-]+)``", part) for part in found.groups())
    assert sorted([*run, *other]) == [name for name in names() if "mini" in scales(name)]
    assert sorted([*run, *other, *none]) == names()
    results = {path.parent.name for path in (root / "paper" / "results").glob("*/results.jsonl")}
    assert set(run) == {*results, "params"}, "counts are made in no time, and not kept"


# -- The settings file ---------------------------------------------------------------------------


GOOD = HEAD + BODY


def test_a_recipe_is_read() -> None:
    assert [(point.arm, point.parameters) for point in parse("mine", GOOD).points()] == [("a", 8 * 128)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("title = 3 3", "recipe mine"),
        (HEAD + 'colour = "red"\n' + BODY, "colour"),
        ('title = "t"\n', "paper"),
        *((GOOD.replace(old, new), word) for old, new, word in (
            ("counts", "cooking", "cooking"),
            ("digits", "elephant", "elephant"),
            ('weights = "digits"', "", "weights"),
            ("rank = [1]", "rang = [1]", "rang"),
            ("rank = [1]", "rank = 1", "rank"),
            ("rank = [1]", "rank = []", "rank"),
            ("rank = [1]", 'rank = "1, two"', "two"),
            ("settings = {}", "settings = {}\nmore = 1", "more"),
            ("settings = {}", "settings = 3", "settings"),
            ('name = "a"\n', "", "name"),
            ('"a"', '"a"\nby = "rank"', "by must be one of groups, splits, order, projection; got 'rank'"),
            ("[full]", "[mini]", "mini"),
            ('"digits"', '"digits"\nrank_below_sizes = "false"', "rank_below_sizes true or false"),
            ('title = "t"', "title = 3", "must be strings"),
            ('title = "t"', 'title = "t"\nnotes = "abc"', "must be strings"),
            ('title = "t"', 'title = "t"\nnotes = [3]', "must be strings"),
        )),
        (HEAD + 'arms_of = "cifar100"\n' + BODY, "arms_of"),
        (HEAD + '[full]\nweights = "digits"\n', "arms"),
        (HEAD + 'arms = 3\n[full]\nweights = "digits"\n', "arms"),
        (HEAD + "full = 3\n" + BODY[BODY.index("[[arms]]") :], "full"),
        (HEAD.replace("counts", "diffusion") + 'arms = []\n[full]\nlike = "nowhere"\n', "no recipe 'nowhere'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_the_word(text: str, word: str) -> None:
    with pytest.raises(tna.TnadaptError, match=word):
        parse("mine", text)


# -- Sweeps --------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 20))
def test_a_progression_is_all_of_its_numbers(first: int, step: int, more: int) -> None:
    last = first + step + more * step
    assert numbers(f"{first}, {first + step}..{last}") == list(range(first, last + 1, step))


@pytest.mark.parametrize("text", ["", "1,", "a", "1..", "4..1", "1, 3..8", "2, 1..3", "1 2", "-1", "1..999999999"])
def test_what_is_no_progression_is_refused(text: str) -> None:
    with pytest.raises(tna.ConfigError):
        numbers(text)


def test_a_sweep_is_every_combination() -> None:
    found = list(configs({"fold": "hypercube"}, {"groups": [1, 2], "rank": "1..3", "alpha": [2.0]}))
    assert [(one.groups, one.rank, one.alpha) for one in found] == [
        (1, 1, 2.0), (1, 2, 2.0), (1, 3, 2.0), (2, 1, 2.0), (2, 2, 2.0), (2, 3, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [("cifar10", "mini", "ViT-S"), ("svhn-mnist", "mini", "Fashion-MNIST to MNIST"),
     ("mnist-svhn", "mini", "MNIST to Fashion-MNIST"), ("groups", "full", "Groups of LoNKr and LoRTA")],
)  # fmt: skip
def test_a_recipe_says_what_it_is_of_and_not_what_it_is_like(name: str, scale: str, words: str) -> None:
    assert words in open_recipe(name, scale).title
