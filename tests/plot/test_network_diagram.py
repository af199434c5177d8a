"""A diagram describes its plan exactly, and no array in it lies on another."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

import tnadapt as tna
from tests.plot.internals import SplitDrawing, steps, texts, words
from tests.support.depth import in_depth
from tnadapt.algebra.formats import FORMATS
from tnadapt.errors import ConfigError, ShapeError
from tnadapt.plot import network
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import examples

P = tna.presets
VIT = [(768, 768)] * 24
CHAIN = P.superlora(22, groups=5, projection="nonlinear", ratio=0.1)


def largest_order(form: str) -> int:
    """Return the most modes that a format takes, as far as these tests go."""
    return 16 if form == "circuit" else 32


@given(plans())
def test_every_array_is_a_node_and_every_index_a_line(plan: tna.UpdatePlan) -> None:
    group = plan.groups[0]
    parts = [SplitDrawing(group, k) for k in range(len(group.network.splits))]
    nodes = [node for part in parts for node in part.nodes.values()]
    # One term is drawn, and the others have arrays of the same shapes.
    assert len({node.name for node in nodes}) == len(nodes)
    assert {node.name for node in nodes} <= group.names.keys() | set(group.names.values())
    assert len(nodes) * plan.config.terms == len(group.names)
    for part, split in zip(parts, group.network.splits, strict=True):
        drawn = collections.Counter(line.size for line in part.lines if line.size)
        # A train's two outer indices, which one array has, are not drawn.
        told = [size for i, size in part.sizes.items() if i in part.modes or len(part.holders[i]) > 1]
        assert drawn == collections.Counter(told)
        assert math.prod(part.sizes[mode] for mode in part.modes) == math.prod(split.sizes)
        assert_apart(part)


def assert_apart(part: SplitDrawing) -> None:
    """Check that no node lies on another one, or beyond the split."""
    for node in part.nodes.values():
        assert 0.2 < node.left <= node.right < part.width - 0.2
        assert node.y < part.above
    for one, other in itertools.combinations(part.nodes.values(), 2):
        sideways = max(one.left, other.left) - min(one.right, other.right)
        assert sideways > 0.42 or abs(one.y - other.y) > 0.42, (one, other)


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("rank", [1, 1 << 40])
def test_what_is_not_drawn_is_told(form: str, rank: int) -> None:
    for order in (1, 2, 3, 8, 10, 11, largest_order(form)):
        plan = tna.UpdatePlan(tna.Config(rank, order, format=form, groups=1, fold="hypercube"), VIT)
        part = SplitDrawing(plan.groups[0], 0)
        assert_apart(part)
        legs = [line for line in part.lines if line.strokes[0][1][1] < 0]
        alone = [mode for mode in part.modes if len(part.holders[mode]) == 1]
        assert len(legs) <= 10
        assert form == "circuit" or len(legs) + part.omitted == len(alone)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (tna.UpdatePlan(P.unilora(), VIT),
         "6,144 elements in this group's arrays, computed from 256 trainable parameters"),
        (tna.UpdatePlan(P.share_lora(4), VIT),
         "6,144 trainable parameters in this group, some shared, 76,800 in all 24 groups"),
        (tna.UpdatePlan(P.dora(1, groups=1), [(2, 3)]),
         "5 trainable parameters, all in this group, and 2 magnitudes of weights"),
        (tna.UpdatePlan(P.dora(1, magnitude_axis="cols"), [(2, 1), (2, 3)]),
         "3 trainable parameters in this group, 8 in all 2 groups, and 4 magnitudes of weights"),
        (tna.UpdatePlan(CHAIN, VIT), "23,452 trainable parameters in this group, 117,260 in all 5 groups"),
    ],
)  # fmt: skip
def test_shared_parameters_and_magnitudes_are_counted_once(plan: tna.UpdatePlan, expected: str) -> None:
    assert words(plan, plan.groups[0]) == expected


def test_the_steps_are_the_plan_s() -> None:
    def of(config: tna.Config, group: int = 0) -> Any:
        plan = tna.UpdatePlan(config, VIT)
        return steps(plan, plan.groups[group], group)

    assert of(CHAIN, 1) == [
        (("tensor 533 × 533",), "", False),
        (
            ("F: nonlinear, fixed, not trained", "ρ = 0.1:  283,116 → 2,831,156"),
            "unfold, keep the first 283,116 of 284,089",
            True,
        ),
        (("group 1: 2,831,156 elements",), "minus F at the start", False),
        (("6 weights: 4–9 (4, 9 in part)", "768 × 768"), "row by row", False),
    ]
    assert of(P.lora(4, alpha=8))[0].note == "times 2, the scale α / r"
    assert of(P.lonkr(4))[0].note == "cut from 3,776 × 3,776"
    assert of(P.compacter())[0].note == "sum of 4 terms"
    # Axes in another order are a step.
    assert [(step.lines, step.note) for step in of(P.metatt(4))[:2]] == [
        (("tensor 768 × 12 × 2 × 768",), ""), (("tensor 12 × 2 × 768 × 768",), "reorder axes"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "group", "message"),
    [
        *((P.lora(1), group, r"group must be from 0 to 23; got (-1|24)$") for group in (-1, 24)),
        *((P.lora(1), group, r"group must be an integer; got .*$") for group in (1.0, True, "0", None)),
        (P.lora(1, groups="layer"), 0, "layers"),
    ],
)
def test_no_such_group_or_plan(tmp_path: Path, config: tna.Config, group: Any, message: str) -> None:
    with pytest.raises((ShapeError, ConfigError), match=message):
        network(config, VIT, tmp_path / "a.png", group=group)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", examples())
def test_every_preset_is_drawn(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    config, shapes = examples()[name]
    layers = [number // 2 for number in range(len(shapes))]
    about = {"title": "a title with $x_$ in it", "note": "a note with $ in it"}
    network(config, shapes, tmp_path / "a.svg", layers=layers, **about)
    plan = tna.UpdatePlan(config, shapes, layers)
    parts = [SplitDrawing(plan.groups[0], k) for k in range(len(plan.groups[0].network.splits))]
    expected = [f"{line.size:,}" for part in parts for line in part.lines if line.size]
    expected += [node.symbol for part in parts for node in part.nodes.values()]
    expected += [f"split{k}" for k in range(len(parts))] if len(parts) > 1 else []
    written = collections.Counter(texts(tmp_path / "a.svg"))
    assert not collections.Counter([*expected, words(plan, plan.groups[0]), *about.values()]) - written


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (P.lora(4), []), (P.lora_xs(8), ["factor0", "factor1"]), (P.vera(64), []), (P.craft(16, groups=1), ["core"]),
        (P.lora_fa(4), ["factor1"]),
    ],
)  # fmt: skip
def test_what_is_frozen_is_drawn_so(tmp_path: Path, config: tna.Config, frozen: list[str]) -> None:
    pytest.importorskip("matplotlib")
    plan = tna.UpdatePlan(config, VIT)
    part = SplitDrawing(plan.groups[0], 0)
    assert [node.name.rpartition(".")[2] for node in part.nodes.values() if node.frozen] == frozen
    network(config, VIT, tmp_path / "a.svg")
    assert texts(tmp_path / "a.svg").count("frozen, not trained") == bool(frozen)


@pytest.mark.parametrize(
    ("form", "order"),
    in_depth(itertools.product(FORMATS, [1, 2, 3, 8, 32]), [*((form, 3) for form in FORMATS), ("cp", 32), ("tt", 32)]),
)
def test_every_format_is_drawn(tmp_path: Path, form: str, order: int) -> None:
    pytest.importorskip("matplotlib")
    order = min(order, largest_order(form))
    config = tna.Config(rank=2, order=order, groups=1, fold="hypercube", format=form, splits=order, leading="same")
    network(config, VIT, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_groups_of_layers_and_roles(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    network(P.lora(1, groups="layer"), VIT, tmp_path / "a.svg", group=11, layers=[weight // 2 for weight in range(24)])
    assert {"group 11: 1,179,648 elements", "2 weights: 22, 23"} <= set(texts(tmp_path / "a.svg"))
    network(P.lora(1, groups="role"), VIT, tmp_path / "a.svg", group=1, roles=["q", "v"] * 12)
    assert "12 weights: 1, 3, 5" in (tmp_path / "a.svg").read_text()
