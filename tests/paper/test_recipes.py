"""Recipes: parsed strictly, with settings that can all be built, and as the paper says, section by section."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paper
import tnadapt as tna
from paper import names
from paper.adapted_weights import WEIGHTS
from paper.recipe import SCALES, at_scale, parse
from paper.sweep import configs, numbers
from tests.support.depth import LONG, in_depth
from tests.support.references import reference

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))

HEAD = 'title = "t"\npaper = "p"\nkind = "counts"\n'
BODY = '[full]\nweights = "digits"\n[[arms]]\nname = "a"\nsettings = {}\nfull = { rank = [1] }\n'


def scales(name: str) -> list[str]:
    return [scale for scale in SCALES if name in at_scale(scale)]


open_recipe = functools.cache(paper.open_recipe)


@functools.cache
def points_of(name: str, scale: str = "full") -> list[paper.RecipePoint]:
    return open_recipe(name, scale).points()


#: All but the recipes of hundreds of settings.
SMALL = ["cifar100", "digits", "geometry", "groups", "projections", "reviews", "splits", "svhn-mnist"]


@pytest.mark.parametrize("name", in_depth(names(), SMALL))
def test_every_setting_of_every_recipe_is_counted_as_the_reference_does(name: str) -> None:
    assert scales(name)
    for scale in scales(name):
        weights, points = open_recipe(name, scale).weights, points_of(name, scale)
        assert points
        assert all(point.parameters > 0 for point in points)
        assert len({(point.arm, point.config) for point in points}) == len(points)
        # No two of one arm share a label: a table would not tell them apart.
        assert len({(point.arm, point.setting) for point in points}) == len(points)
        # The reference looks at every element: of large weights, a few settings from all over the recipe.
        few = min(len(points), 40 if LONG else 4, 2 + 2_000_000 // sum(rows * cols for rows, cols in weights.shapes))
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
    for point in points_of("svhn-mnist"):
        plan = tna.UpdatePlan(point.config, WEIGHTS["unet"].shapes)
        for name, shape in plan.param_shapes.items():
            if ".factor" in name:
                assert shape[1] < shape[0], (point, name)


def test_the_documentation_says_which_have_a_miniature_and_which_were_run() -> None:
    root = Path(__file__).parents[2]
    page = " ".join((root / "docs" / "paper.rst").read_text(encoding="utf-8").split())
    found = re.search(r"At reduced scale, (.*?) have been run, and (.*?) has not; (.*?) have no reduced", page)
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


# -- The paper on its experiments: its numbers, by section ------------------------------------------

#: "1, 2, 4, 6, 8, ..." as A.7 lists ranks; 4.1 says "every two ranks are evaluated from 1 to 32".
EVERY_TWO = [1, *range(2, 65, 2)]
TO_32 = EVERY_TWO[:17]

VIT = ["cifar100", "groups-dense", "geometry", "cifar10"]
DIFFUSION = ["svhn-mnist", "mnist-svhn", "projections", "groups", "splits"]


def configs_of(name: str, arm: str) -> Sequence[tna.Config]:
    """Return the configs of an arm; where arms are split by the number of groups, of all of its arms."""
    return [config for one in open_recipe(name).arms if one.name.split(", G =")[0] == arm for config in one.configs]


def swept(name: str, arm: str, *fields: str) -> list[list[Any]]:
    """Return the values of fields, in the order of the recipe."""
    return [list(dict.fromkeys(getattr(config, field) for config in configs_of(name, arm))) for field in fields]


def ranks(name: str, arm: str) -> dict[Any, list[Any]]:
    """Return the ranks for each number of groups."""
    (groups,) = swept(name, arm, "groups")
    return {count: [config.rank for config in configs_of(name, arm) if config.groups == count] for count in groups}


def each(groups: Sequence[int], ranks: Sequence[int]) -> dict[int, list[int]]:
    """Return the same ranks for each number of groups."""
    return {count: list(ranks) for count in groups}


@pytest.mark.parametrize("name", VIT)
def test_vits_are_trained_as_section_4_1_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.1: "trained for 5,000 steps with the stochastic gradient descent (SGD) optimizer, with a batch size of 128 and
    a learning rate of 0.05. The OneCycleLR [38] scheduler is used.", "LoRA α is set to be the same as rank".
    A.7: "3000 steps at most", else "same"."""
    torch = pytest.importorskip("torch")
    from paper import classification

    asked: list[Any] = []
    monkeypatch.setattr(classification, "Study", lambda *given: asked.extend(given))
    classification.study_of(open_recipe(name), tmp_path)
    spec, _, training, rates = asked[:4]
    steps, model, data = {
        "cifar10": (3000, "google/vit-base-patch16-224", "cifar10"),  # A.7's footnote 8
    }.get(name, (5000, "google/vit-base-patch16-224-in21k", "cifar100"))  # 4.1's footnote 4
    assert (spec.model, spec.data) == (model, data)
    assert (training.steps, training.batch, list(rates)) == (steps, 128, [0.05])
    weights = [torch.nn.Parameter(torch.zeros(3))]
    optimiser, scheduler = training.schedule(rates[0]).begin(weights, training.steps)
    assert type(optimiser) is torch.optim.SGD
    assert type(scheduler) is torch.optim.lr_scheduler.OneCycleLR
    assert (scheduler.total_steps, optimiser.param_groups[0]["max_lr"]) == (steps, 0.05)
    assert {config.scale for arm in open_recipe(name).arms for config in arm.configs} == {1.0}


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_diffusion_model_is_trained_as_section_4_2_says(name: str) -> None:
    """4.2: "α of LoRA is fixed to 2.0 for all variants", "40 epochs with a batch size of 32 are carried out and results
    plotted are mainly from epoch 20", "maximum rank is set to 32", "a constraint r < min(d_in, d_out) is imposed"."""
    recipe = open_recipe(name)
    settings = recipe.settings
    assert (settings["from"], settings["to"]) == (("mnist", "svhn") if name == "mnist-svhn" else ("svhn", "mnist"))
    assert (settings["epochs"], settings["batch"], settings["features"]) == (20, 32, "inception")
    assert (settings["base"], settings["image_size"], settings["channels"]) == (64, 32, 3)  # A.2, figure 12
    assert recipe.rank_below_sizes
    found = [config for arm in recipe.arms for config in arm.configs]
    ranked = [config for config in found if config.format != "dense"]
    assert len(ranked) >= len(found) - 1
    assert all(config.alpha == 2.0 and 1 <= config.rank <= 32 for config in ranked)  # type: ignore[operator]


#: The classes of CIFAR-10 in their order, rows of A.7's list, and what A.7 calls them. One of each list is missing.
CLASSES = [
    ("airplane", 404, "airliner"), ("automobile", 436, None), ("bird", 94, "humming bird"), ("cat", 284, "siamese cat"),
    ("deer", 345, "ox"), ("dog", None, "golden retriever"), ("frog", 32, "tailed frog"), ("horse", 340, "zebra"),
    ("ship", 510, "container ship"), ("truck", 867, "trailer truck"),
]  # fmt: skip


def test_the_head_of_cifar10_is_the_rows_of_appendix_a_7() -> None:
    """A.7: "[404, 436, 94, 284, 345, 32, 340, 510, 867], corresponding to [airliner, humming bird, siamese cat, ox,
    golden retriever, tailed frog, zebra, container ship, trailer truck]"."""
    rows = open_recipe("cifar10").settings["head_rows"]
    assert len(rows) == 10
    assert [row for row, (_, stated, _) in zip(rows, CLASSES, strict=True) if stated] == [
        404, 436, 94, 284, 345, 32, 340, 510, 867,
    ]  # fmt: skip
    assert [name for name, _, _ in CLASSES] == sorted(name for name, _, _ in CLASSES), "folders have the hub's order"


def test_the_rows_of_the_head_are_the_classes_of_imagenet_that_are_meant() -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo()
    for row, (name, _, stated) in zip(open_recipe("cifar10").settings["head_rows"], CLASSES, strict=True):
        words = info.index_to_description(row).lower().replace("hummingbird", "humming bird")
        assert (stated or {"automobile": "beach wagon"}[name]) in words, name


def test_cifar100_sweeps_what_section_4_1_says() -> None:
    """4.1: "G ∈ {1,4,8,12,24}, every two ranks are evaluated from 1 to 32 for most methods", "larger ranks from 34 to
    128"; "the order M is set to be 3, 4 and 5"; "{1,0.5,0.25,0.1,0.01}" of 1D, "{0.5,0.25,0.1}" and G = 1 of 2D."""
    assert ranks("cifar100", "LoRA") == {"weight": [*TO_32, 64, 128]}
    assert ranks("cifar100", "SuperLoRA 2D") == each((1, 4, 8, 12, 24), TO_32)
    assert ranks("cifar100", "SuperLoRA 2D, reshape") == each((1, 4, 8, 12, 24), [*TO_32, 64, 128])
    for order in (3, 4, 5):
        fields = ("order", "fold", "format")
        assert swept("cifar100", f"LoRTA {order}D", *fields) == [[order], ["hypercube"], ["tucker"]]
    dense, square = ("SuperLoRA 1D, dense, with projection", "SuperLoRA 2D, reshape, with projection")
    assert swept("cifar100", dense, "ratio", "order") == [[1.0, 0.5, 0.25, 0.1, 0.01], [1]]
    assert swept("cifar100", square, "ratio", "groups") == [[0.5, 0.25, 0.1], [1]]


def test_groups_dense_sweeps_what_appendix_a_5_says() -> None:
    """A.5: "dense FT with projection is tested for different splitting, from 1 to 12 groups"; "1", "4 or 8", "12"."""
    fields = ("groups", "ratio", "format", "projection")
    assert swept("groups-dense", "SuperLoRA 1D, dense, with projection", *fields) == [
        [1, 4, 8, 12], [1.0, 0.5, 0.25, 0.1, 0.01], ["dense"], ["linear"],
    ]  # fmt: skip


def test_cifar10_sweeps_what_appendix_a_7_lists() -> None:
    small = [1, 2, 3, 4, 5, 6, 8]
    assert ranks("cifar10", "LoRA") == {"weight": [*EVERY_TWO, 128]}
    assert ranks("cifar10", "SuperLoRA 2D") == each((1, 4, 8, 12), [*EVERY_TWO, 128])
    assert ranks("cifar10", "SuperLoRA 2D, reshape") == {
        **each((1, 4, 12), [*EVERY_TWO, 128]),
        8: [*EVERY_TWO[:13], *range(28, 65, 4)],
    }
    for name in ("cifar10", "cifar100"):  # 4.1 lists no ranks of LoRTA, and A.7's are taken
        assert ranks(name, "LoRTA 3D") == each((1, 4, 8, 12), [*small, *range(10, 25, 2)])
        assert ranks(name, "LoRTA 4D") == {
            1: [*small, *range(10, 23, 2)], 4: [*small, *range(10, 17, 2)], 8: [*small, *range(10, 19, 2)],
            12: [*small, 10, 12],
        }  # fmt: skip
        assert ranks(name, "LoRTA 5D") == {1: small, 4: small, 8: small, 12: small[:6]}


def test_the_geometry_is_of_the_four_methods_of_appendix_a_4() -> None:
    """A.4: "#param 147,456", "115,200", "165,572", "138,372"; "top k=5 principal singular vectors"."""
    from paper.similarity import VECTORS

    assert VECTORS == 5
    points = {point.arm: point for point in points_of("geometry")}
    # A rank of one costs two vectors of 768 for each of 24; one of 768 and one of 24 * 768; two sides of the square
    # that holds all 24, and of the one that holds half as many numbers.
    everything = 24 * 768**2

    def sides(numbers: int) -> int:
        return 2 * (math.isqrt(numbers - 1) + 1)

    costs = {
        "LoRA": 24 * 2 * 768, "SuperLoRA 2D": 768 + 24 * 768, "SuperLoRA 2D, reshape": sides(everything),
        "SuperLoRA 2D, reshape, with projection": sides(everything // 2),
    }  # fmt: skip
    stated = dict(zip(costs, (147_456, 115_200, 165_572, 138_372), strict=True))
    for arm, cost in costs.items():
        assert points[arm].config.rank == stated[arm] // cost
        assert points[arm].parameters == stated[arm] == cost * (stated[arm] // cost)
    assert points.pop("dense").parameters == everything
    assert list(points) == list(costs)
    assert sorted(number for _, number, _ in open_recipe("geometry").checked()) == sorted(stated.values())


SVHN_MNIST = [
    "dense", "LoRA", "SuperLoRA 2D", "SuperLoRA 2D, reshape", "LoNKr, weight by weight", "LoNKr, groups",
    "LoNKr, groups, stacked", "LoRTA, weight by weight", "LoRTA, groups", "SuperLoRA 2D, reshape, with projection",
    "LoRTA, with projection", "SuperLoRA 2D, shuffled", "SuperLoRA 2D, reshape, shuffled",
]  # fmt: skip


@pytest.mark.parametrize("name", ["svhn-mnist", "mnist-svhn"])
def test_the_diffusion_model_sweeps_what_section_4_2_says(name: str) -> None:
    """4.2: "K ∈ {2,3,4}", "dimension is fixed to 6, 8 or 10"; "3D, 4D and 5D"; "G ∈ {1,4}, rank r ∈ {1,4,8} and
    projection ratio ρ ∈ {0.01,0.1,0.5}"; shuffling of "G ∈ {1,4,8,16} and ranks r ∈ {1,4,8}". A.9: the reverse."""
    recipe = open_recipe(name)
    assert [arm.name for arm in recipe.arms] == SVHN_MNIST
    assert len(points_of(name)) == 1407
    for arm in SVHN_MNIST[4:7]:
        assert swept(name, arm, "splits", "split_size") == [[2, 3, 4], [6, 8, 10]]
    assert swept(name, "LoNKr, groups", "groups") == [[1, 4, 8]]
    assert swept(name, "LoRTA, groups", "groups", "order") == [[1, 4, 8], [3, 4, 5]]
    assert swept(name, "LoRTA, weight by weight", "order") == [[3, 4, 5]]
    for arm in SVHN_MNIST[9:11]:
        assert swept(name, arm, "projection", "groups", "ratio", "rank") == [
            ["linear", "linear_v2", "nonlinear", "nonlinear_v2"], [1, 4], [0.01, 0.1, 0.5], [1, 4, 8],
        ]  # fmt: skip
    for arm in SVHN_MNIST[11:]:
        assert swept(name, arm, "projection", "groups", "rank") == [["shuffle"], [1, 4, 8, 16], [1, 4, 8]]


@pytest.mark.parametrize(
    ("name", "arms"),
    [
        (
            "projections",
            [
                *(f"SuperLoRA 2D, reshape, {one}" for one in ("linear", "linear_v2", "nonlinear", "nonlinear_v2")),
                *(f"LoRTA, {one}" for one in ("linear", "linear_v2", "nonlinear", "nonlinear_v2")),
            ],
        ),
        ("groups", [f"{method}, G = {groups}" for method in ("LoNKr", "LoRTA") for groups in (1, 4, 8, 16)]),
        ("splits", ["LoNKr, K = 2", "LoNKr, K = 3", "LoNKr, K = 4"]),
    ],
)
def test_figures_17_and_27_to_29_have_a_curve_for_each_value(name: str, arms: list[str]) -> None:
    """A.6: "linear", "linear_v2", "nonlinear", "nonlinear_v2"; A.10: groups; A.11: K."""
    found = open_recipe(name).arms
    assert [arm.name for arm in found] == arms
    if name == "splits":
        assert [{config.splits for config in arm.configs} for arm in found] == [{2}, {3}, {4}]
