"""A diagram describes its plan exactly, and nothing in it overlaps."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.plot.internals import Diagram, Node, SplitDrawing, diagram, texts, wide
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


@st.composite
def large(draw: st.DrawFn) -> tna.SuperLoRA:
    """Plans of any order and number of splits, far beyond what fits in a picture."""
    order, splits = (draw(st.integers(1, 12) | st.integers(1, 32)) for _ in range(2))
    name = draw(st.sampled_from(list(FORMATS)))
    order = min(order, largest_order(name))
    rank: Any = draw(st.sampled_from([1, 3, 1000, 1 << 40]))
    if name == "tucker" and draw(st.booleans()):
        rank = draw(st.tuples(*[st.none() | st.integers(1, 3)] * order))
    combine = draw(st.sampled_from(["kronecker", "hadamard"]))
    config = tna.Config(
        rank=rank, order=order, splits=splits, format=name, combine=combine, groups=1,
        fold=draw(st.sampled_from(["hypercube", "balanced", (1 << 62,) * order])),
        leading=draw(st.sampled_from(["dense", "same"])), terms=draw(st.sampled_from([1, 4, 100])),
        alpha=draw(st.none() | st.just(8.0)), split_size=2 if combine == "kronecker" else "balanced",
    )  # fmt: skip
    return tna.SuperLoRA(config, draw(st.sampled_from([[(4, 4)], [(768, 512)] * 2])))


def nodes(found: Diagram) -> list[Node]:
    return [node for part in found.parts for node in part.nodes if node.kind != "dot"]


@given(plans(), st.data())
def test_every_array_is_a_node_and_every_axis_a_line(plan: tna.SuperLoRA, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, plan.num_groups - 1))
    group, found = plan.groups[index], diagram(plan, index)
    drawn = nodes(found)
    # One term is drawn, and the others have arrays of the same shapes.
    shapes = {name: plan.param_shapes[name] for name in group.names.values()}
    assert [node.name in shapes for node in drawn] == [True] * len(drawn)
    assert len({node.name for node in drawn}) == len(drawn)
    assert len(drawn) * plan.config.terms == len(shapes)
    assert sum(node.size for node in drawn) * plan.config.terms == found.parameters == group.network.num_parameters
    for part, split in zip(found.parts, group.network.splits, strict=True):
        assert tuple(leg.size for leg in sorted(part.legs, key=lambda leg: leg.mode)) == split.sizes == part.sizes
        at = collections.defaultdict(list)
        for bond in part.bonds:
            for end in bond.ends:
                at[end].append(bond.size)
        for node in part.nodes:
            lines = at[node.name] + [leg.size for leg in part.legs if leg.node == node.name]
            if node.kind != "dot":
                # A train's two outer axes of size 1 are not drawn.
                assert sorted(lines) == sorted(shapes[node.name])[len(shapes[node.name]) - len(lines) :]
                assert math.prod(lines) == node.size == math.prod(shapes[node.name])
            else:
                assert len(set(lines)) == 1  # a dot has one index
        assert set(at) <= {node.name for node in part.nodes}


@given(plans())
def test_the_groups_make_up_the_parameters(plan: tna.SuperLoRA) -> None:
    found = [diagram(plan, group) for group in range(plan.num_groups)]
    magnitudes = sum(map(math.prod, plan.weight_param_shapes.values()))
    total = sum(one.parameters for one in found)
    assert total + magnitudes == plan.num_parameters
    for one in found:
        told = [f"{one.parameters:,} trainable"] + ([f"{total:,} in all"] if len(found) > 1 else [])
        told += [f"{magnitudes:,} magnitude"] if magnitudes else []
        assert all(words in one.words for words in told)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (tna.SuperLoRA(P.unilora(), VIT),
         "6,144 elements in this group's arrays, computed from 256 trainable parameters"),
        (tna.SuperLoRA(P.share_lora(4), VIT),
         "6,144 trainable parameters in this group, some shared, 76,800 in all 24 groups"),
        (tna.SuperLoRA(P.dora(1, groups=1), [(2, 3)]),
         "5 trainable parameters, all in this group, and 2 magnitudes of weights"),
        (tna.SuperLoRA(P.dora(1, magnitude_axis="cols"), [(2, 1), (2, 3)]),
         "3 trainable parameters in this group, 8 in all 2 groups, and 4 magnitudes of weights"),
        (tna.SuperLoRA(CHAIN, VIT), "23,452 trainable parameters in this group, 117,260 in all 5 groups"),
    ],
)  # fmt: skip
def test_shared_parameters_and_magnitudes_are_counted_once(plan: tna.SuperLoRA, words: str) -> None:
    assert diagram(plan).words == words


@given(large())
@settings(max_examples=60)
def test_what_is_not_drawn_is_told(plan: tna.SuperLoRA) -> None:
    found = diagram(plan)
    splits = plan.groups[0].network.splits
    assert len(found.parts) + found.splits_left_out == len(splits)
    words = [label.text for label in found.signs]
    assert bool(found.splits_left_out) == any(text.startswith(f"{found.splits_left_out} more") for text in words)
    assert len(found.parts) <= 5
    for part in found.parts:
        assert len(part.legs) + part.left_out == len(part.sizes)
        assert len(part.legs) <= 10
        assert (f"{part.left_out} more" in [label.text for label in part.labels]) == bool(part.left_out)
        assert [part.sizes[leg.mode] for leg in part.legs] == [leg.size for leg in part.legs]


Named = tuple[str, tuple[float, float, float, float]]


def moved(box: tuple[float, float, float, float], part: SplitDrawing) -> tuple[float, float, float, float]:
    return box[0] + part.x, box[1] + part.y, box[2] + part.x, box[3] + part.y


def things(found: Diagram) -> list[Named]:
    """Return everything that must not overlap."""
    made: list[Named] = [(sign.text, sign.box) for sign in found.signs]
    for part in found.parts:
        made += [(label.text, moved(label.box, part)) for label in part.labels]
        for node in part.nodes:
            half, high = node.width / 2, node.height / 2
            made.append((node.name, moved((node.x - half, node.y - high, node.x + half, node.y + high), part)))
        made += [("leg", moved((leg.x, leg.bottom, leg.x, leg.top - 0.01), part)) for leg in part.legs]
    for step in found.steps:
        half, high = step.width / 2, step.height / 2
        made.append((step.lines[0], (found.width / 2 - half, step.y - high, found.width / 2 + half, step.y + high)))
    return made


@given(plans() | large())
def test_nothing_lies_on_anything(plan: tna.SuperLoRA) -> None:
    check_apart(plan)


@pytest.mark.parametrize("form", list(FORMATS))
def test_nothing_lies_on_anything_at_ends(form: str) -> None:
    orders = [order for order in in_depth((1, 2, 3, 8, 10, 11, 32), (1, 3, 11, 32)) if order <= largest_order(form)]
    for order, splits, rank, leading in itertools.product(orders, [1, 2, 5, 6], [1, 1 << 40], ["same", "dense"]):
        usual = {"format": form, "leading": leading, "groups": 1, "split_size": 2}
        for fold in ("hypercube", (1 << 62,) * order):
            check_apart(tna.SuperLoRA(tna.Config(rank, order, splits, fold=fold, **usual), VIT))


def check_apart(plan: tna.SuperLoRA) -> None:
    found = diagram(plan)
    made = things(found)
    for (one, a), (other, b) in itertools.combinations(made, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, a, other, b)
    for name, (left, bottom, right, top) in made:
        assert left >= 0, name
        assert right <= found.width, name
        assert -found.height - 1e-9 <= bottom <= top <= 0, name
    # Each of several splits is within its frame, and the frames are apart.
    for frame, part in zip(found.frames, found.parts, strict=False):
        assert frame[0] <= part.x
        assert frame[1] <= part.y - part.below
        assert part.x + part.width <= frame[2]
        assert part.y + part.above <= frame[3]
    assert len(found.frames) == (len(found.parts) if len(plan.groups[0].network.splits) > 1 else 0)


def test_the_steps_are_the_plan_s() -> None:
    def of(config: tna.Config, group: int = 0) -> Diagram:
        return diagram(tna.SuperLoRA(config, VIT), group)

    assert [(step.lines, step.note, step.fixed) for step in of(CHAIN, 1).steps] == [
        (("tensor 533 × 533",), "", False),
        (
            ("F: nonlinear, fixed, not trained", "ρ = 0.1:  283,116 → 2,831,156"),
            "unfold, keep the first 283,116 of 284,089",
            True,
        ),
        (("group 1: 2,831,156 elements",), "minus F at the start", False),
        (("6 weights: 4–9 (4, 9 in part)", "768 × 768"), "row by row", False),
    ]
    assert of(P.lora(4, alpha=8)).steps[0].note == "times 2, the scale α / r"
    lonkr = of(P.lonkr(4))
    assert lonkr.steps[0].note == "cut from 3,776 × 3,776"
    assert [sign.text for sign in lonkr.signs] == ["split0", "⊗", "split1", "⊗", "split2"]
    # Axes in another order are a step.
    assert [(step.lines, step.note) for step in of(P.metatt(4)).steps[:2]] == [
        (("tensor 768 × 12 × 2 × 768",), ""), (("tensor 12 × 2 × 768 × 768",), "reorder axes"),
    ]  # fmt: skip
    compacter = of(P.compacter())
    assert {"Σ", "4 terms"} <= {sign.text for sign in compacter.signs}
    assert compacter.brackets is not None
    assert of(P.lokr(4)).brackets is None


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
    words = {"title": "a title with $x_$ in it", "note": "a note with $ in it"}
    network(config, shapes, tmp_path / "a.svg", layers=layers, **words)
    found, written = diagram(tna.SuperLoRA(config, shapes, layers)), texts(tmp_path / "a.svg")
    expected = [label.text for part in found.parts for label in part.labels] + [sign.text for sign in found.signs]
    expected += [node.symbol for node in nodes(found)] + [entry.text for entry in found.key]
    assert not collections.Counter([*expected, found.words, *words.values()]) - collections.Counter(written)


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (P.lora(4), []), (P.lora_xs(8), ["factor0", "factor1"]), (P.vera(64), []), (P.craft(16, groups=1), ["core"]),
        (P.lora_fa(4), ["factor1"]),
    ],
)  # fmt: skip
def test_what_is_frozen_is_drawn_so(config: tna.Config, frozen: list[str]) -> None:
    plan = tna.SuperLoRA(config, VIT)
    found = diagram(plan)
    assert [node.name.rpartition(".")[2] for node in nodes(found) if node.frozen] == frozen
    trained = [math.prod(shape) for array, shape in plan.param_shapes.items() if array.startswith("group0.")]
    assert found.parameters == sum(trained)
    assert [entry.text for entry in found.key].count("frozen, not trained") == bool(frozen)


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("order", in_depth([1, 2, 3, 8, 32], [3, 32]))
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


@pytest.mark.parametrize(
    "text", ["14,155,776", "r = 1,024", "768 × 768 × 768", "2 × ⋯ × 2, of 32 modes", "unfold, keep the first 7 of 8",
             "F: nonlinear_v2, fixed, not trained", "⊗", "Σ", "mmm"],
)  # fmt: skip
def test_words_take_the_width_reserved_for_them(text: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.textpath import TextPath

    inches = TextPath((0, 0), text, size=8).get_extents().width / 72
    assert 0.7 * wide(text, 8) - 0.02 <= inches <= 1.08 * wide(text, 8)
