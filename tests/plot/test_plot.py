"""Plots are written to files, without other effects."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import tnadapt as tna
from tests.plot.internals import counted, texts
from tnadapt import plot
from tnadapt.errors import ShapeError
from tnadapt.plot import STYLES, Mark, canvas, layout, parameters, pareto

MARKS = [
    Mark("head alone", "", 0, (0.7, 0.71)),
    Mark("dense", "", 32768, (0.95, 0.96)),
    *(Mark(family, "r = 1", 100 * place, (0.8 + place / 100,), place < 3) for place, family in enumerate(STYLES, 1)),
    Mark("a method of one's own", "r = 2", 50, (0.75, 0.8, 0.7), True),
]


PICTURES = {
    "layout": lambda path: layout(tna.UpdatePlan(tna.presets.lora(1), [(4, 3)]), path),
    "network": lambda path: plot.network(tna.presets.lora(1), [(4, 3)], path),
    "parameters": lambda path: parameters([(4, 3)], path),
    "pareto": lambda path: pareto(MARKS[:1], path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_replaces_the_old_one_at_once_and_follows_matplotlibs_style(name: str, tmp_path: Path) -> None:
    """The old file is not written to: open handles and hard links keep its content."""
    import matplotlib.style
    from matplotlib.image import imread

    path, kept = tmp_path / "a.png", tmp_path / "kept.png"
    path.write_bytes(b"an old picture")
    os.link(path, kept)
    PICTURES[name](path)
    light = imread(path)[..., :3]
    assert kept.read_bytes() == b"an old picture"
    with matplotlib.style.context("dark_background"):
        PICTURES[name](path)
    dark = imread(path)[..., :3]
    assert {found.name for found in tmp_path.iterdir()} == {"a.png", "kept.png"}
    assert light.shape == dark.shape
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert (light[corner].tolist(), dark[corner].tolist()) == ([1.0] * 3, [0.0] * 3)
    # What is dark on white is light on black, and as much of it.
    written = [(light.max(axis=2) < 0.3).mean(), (dark.min(axis=2) > 0.7).mean()]
    assert min(written) > 0.3 * max(written) > 0


def test_every_kind_of_picture_is_tried() -> None:
    kinds = {name for name in plot.__all__ if inspect.isfunction(getattr(plot, name))}
    assert PICTURES.keys() == kinds - {"styles"}


def test_pictures_of_any_marks_have_matplotlibs_names(tmp_path: Path) -> None:
    for number, marks in enumerate((MARKS, MARKS[:1], MARKS[1:2], MARKS[2:3], [])):
        pareto(marks, tmp_path / f"{number}", "a title with $x_$ in it", "a note")
        content = (tmp_path / f"{number}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    (tmp_path / "b.png").mkdir()
    with pytest.raises(tna.FileError, match=r"b\.png: is a folder; give the path of a file in it"):
        pareto(MARKS, tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"(?i)format 'xyz' is not supported"):
        pareto(MARKS, tmp_path / "c.xyz")
    pareto(MARKS, tmp_path / "a.svg")
    assert all(f"<!-- {mark.family}" in (tmp_path / "a.svg").read_text() for mark in MARKS)
    for counts, ticks in (((700, 900), {"400", "1,000", "2,000"}), ((31, 4096), {"100", "1,000"})):
        pareto([Mark("LoRA", "", count, (0.5,)) for count in counts], tmp_path / "a.svg")
        written = set(texts(tmp_path / "a.svg"))
        assert ticks <= written
        assert not [text for text in written if "times" in text or "^" in text]


def test_no_window_and_no_import_before(tmp_path: Path) -> None:
    code = f"""
import sys, tnadapt.plot
assert "matplotlib" not in sys.modules
tnadapt.plot.pareto([tnadapt.plot.Mark("LoRA", "r = 1", 4, (0.5,))], {str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_families_are_told_apart_however_many_there_are_and_keep_their_styles() -> None:
    names = [*STYLES, *(f"method {number}" for number in range(36))]
    found = plot.styles([*names, *names])
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert {name: found[name] for name in STYLES} == STYLES
    assert len(plot.styles(f"method {number}" for number in range(100))) == 100
    few, many = plot.styles(["a", "LoRA"]), plot.styles(["a", "LoRA", "b"])
    assert many == {**few, "b": many["b"]}


def drawn(marks: list[Mark]) -> Any:
    """Return the figure that would be saved."""
    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnadapt.plot._accuracy.saved", lambda figure, path: figures.append(figure))
        pareto(marks, "not written")
    (figure,) = figures
    figure.canvas.draw()
    return figure


FEW = {
    "one": [Mark("LoRA", "r = 1", 13, (0.0,), True)],
    "one count": [Mark(family, "r = 1", 1024, (place / 10,), place == 8) for place, family in enumerate(STYLES, 2)],
    "one score": [Mark(family, "r = 1", 9**place, (1.0,), True) for place, family in enumerate(STYLES, 2)],
    "far apart": [Mark("LoRA", "u = 13, a long label of many settings", 13, (0.5,), True),
                  Mark("LoKr", "r = 1", 10**7, (0.9,), True)],
}  # fmt: skip


@pytest.mark.parametrize("marks", FEW.values(), ids=FEW)
def test_axes_fit_few_points(marks: list[Mark]) -> None:
    figure = drawn([*marks, Mark("head alone", "", 0, marks[0].accuracies)])
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert right / left >= 10
    low, high = axes.get_ylim()
    assert all(left < mark.parameters < right and low <= mark.mean < high for mark in marks)
    ticks = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))]
    shown = [text for text in ticks if text]
    assert len(shown) == len(set(shown)) >= 2
    # No text leaves the picture, and none lies on another.
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(box.x0 >= axes.get_window_extent().x0 - 1 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_label_has_the_color_of_its_method_and_a_line_if_it_moved_up() -> None:
    families, counts, scores = ("LoRTA", "SuperLoRA", "LoRA"), (110, 120, 5000), (0.85, 0.851, 0.95)
    marks = [
        Mark(family, family.lower(), count, (score,), front=True)
        for family, count, score in zip(families, counts, scores, strict=True)
    ]
    (axes,) = drawn(marks).axes
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours == {mark.label: canvas.legible(STYLES[mark.family][0], text=True) for mark in marks}
    leaders = [line for line in axes.lines if list(line.get_xdata()) in [[mark.parameters] * 2 for mark in marks]]
    assert [line.get_color() for line in leaders] == [STYLES["SuperLoRA"][0]]


#: Linear RGB as dichromats see it (Viénot, Brettel & Mollon 1999).
SEEN = {
    "as it is": np.eye(3),
    "protanopia": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
    "deuteranopia": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
    "tritanopia": np.array([[1.0, 0.14461, -0.14461], [0.0, 0.85924, 0.14076], [0.0, 0.85924, 0.14076]]),
}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """Return a colour in CIE L*a*b*, as somebody sees it."""
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(seen @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_families_are_told_apart_without_full_colour_vision(seen: np.ndarray) -> None:
    colours, shapes = zip(*STYLES.values(), strict=True)
    assert len(set(shapes)) == len(STYLES)  # and in grey
    for one, other in itertools.combinations(colours, 2):
        # About 2 is just noticeable.
        assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 10, (one, other)


def test_colours_stand_out_from_a_dark_ground() -> None:
    import matplotlib.style

    colours = [colour for colour, _ in (*STYLES.values(), *canvas.OTHERS)]
    assert [canvas.legible(colour) for colour in colours] == colours
    with matplotlib.style.context("dark_background"):
        assert all(lab(canvas.legible(colour), SEEN["as it is"])[0] > 37 for colour in colours)


VIT = [(768, 768)] * 24
UNET = [(c, c) for c in [64] * 2 + [128] * 6 + [128] + [128] * 9 + [64] * 3 for _ in "qv"]


def test_the_counts_of_the_paper() -> None:
    oracle = json.loads((Path(__file__).parents[1] / "oracles.json").read_text())
    known = {row["what"]: row["parameters"] for group in ("vit_base_qv", "unet_qv") for row in oracle[group]["counts"]}
    assert list(counted(VIT, 2, 22))[-1] == (22, known["SuperLoRA 2D, reshape (hypercube), G=1, r=22"])
    assert list(counted(UNET, 2, 1)) == [(1, known["2D, hypercube, G=1, r=1 ('beyond 1000')"])]
    # LoRTA of rank 1 is CP of rank 1 and the one number of its core.
    lorta = {order: next(counted(UNET, order, 1))[1] + 1 for order in (3, 5)}
    assert lorta[3] == known["LoRTA 3D, hypercube, G=1, r=1 ('beyond 200')"]
    assert lorta[5] == known["LoRTA 5D, hypercube, G=1, r=1 ('less than 80'; '120-fold')"]
    assert (MARKS[0].mean, round(MARKS[0].spread, 4)) == (70.5, 0.7071)
    assert Mark("LoRA", "", 1, (0.5,)).spread == 0


def test_parameters_against_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    parameters(VIT, path, budget=10_000, title="a title with $x_$ in it")
    found = texts(path)
    for text in ("M = 2", "M = 5", "LoRA, one group per weight", "budget, 10,000", "all 14,155,776 elements"):
        assert text in found
    # The largest rank of each order that stays within the budget.
    for order in (2, 3, 4, 5):
        rank = max(rank for rank, count in counted(VIT, order, 128) if count <= 10_000)
        assert f"r = {rank}" in found
    for shapes in ([(1, 1)], [(3, 3)], [(12, 8)] * 3, [(4096, 4096)] * 64):
        for budget in (None, 1, 10**12):
            parameters(shapes, tmp_path / "b.svg", budget=budget, ranks=16)
            assert "M = 2" in texts(tmp_path / "b.svg")


@pytest.mark.parametrize(
    "config",
    [
        tna.presets.lora(1), tna.presets.superlora(1), tna.presets.superlora(1, groups=5),
        tna.presets.superlora(1, groups=2, projection="linear", ratio=0.1), tna.presets.lonkr(1, splits=2),
        tna.presets.dense(), tna.Config(groups=[[1, 0], [*range(2, 42)]], fold="balanced", order=3, rank=1),
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_is_drawn(tmp_path: Path, config: tna.Config) -> None:
    plan, path = tna.UpdatePlan(config, UNET), tmp_path / "a.svg"
    layout(plan, path, roles=["q", "v"] * 21, title="a title with $x_$ in it")
    found = texts(path)
    is_padded = any(math.prod(group.network.sizes) > group.size for group in plan.groups)
    assert ("padding" in found) == (config.projection == "identity" and is_padded)
    straddled = any(len(plan.layout.of_weight(weight)) > 1 for weight in range(42))
    assert ("continues in another group" in found) == straddled
    assert any(text.endswith("18 more groups") for text in found) == (plan.num_groups == 42)
    assert {"q", "v"} <= set(found)


def test_hundreds_of_weights_and_of_groups(tmp_path: Path) -> None:
    many, path = [(64, 64), (16, 64)] * 200, tmp_path / "a.svg"
    layout(tna.UpdatePlan(tna.presets.superlora(1), many), path)
    assert sum(text.isdigit() for text in texts(path)) < 60
    layout(tna.UpdatePlan(tna.presets.lora(1), many), path)
    assert any(text.endswith("376 more groups") for text in texts(path))


PLAN = tna.UpdatePlan(tna.presets.lora(1), [(4, 4)] * 3)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda path: layout(PLAN, path, names=["a", "b"]), ShapeError, "names has 2 entries for 3 weights"),
        (lambda path: layout(PLAN, path, roles=["q"]), ShapeError, "roles has 1 entries for 3 weights"),
        *((lambda path, settings=settings: parameters([(8, 8)], path, **settings), tna.ConfigError, message)
          for settings, message in (
            ({"title": "x" * 1001}, "title must have at most 1,000 characters; got 1,001"),
            ({"title": "a\ud800b"}, r"title has half a surrogate pair, which no font can draw; got 'a\\ud800b'"),
            ({"budget": 0}, "budget must be at least 1; got 0"),
            ({"orders": ()}, "orders is empty; give at least one order"),
        )),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(draw: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        draw(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
