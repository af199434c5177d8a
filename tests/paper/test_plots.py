"""The paper's figures are written atomically, by every kind of plot."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from paper import plots

CURVES = (plots.Curve("LoRA", (plots.Dot(9, (0.5,)), plots.Dot(20, (0.6,)))),)
PICTURES = {
    "fronts": lambda path: plots.fronts(CURVES, path),
    "fronts_grid": lambda path: plots.fronts_grid([plots.Panel(CURVES, "accuracy")], path),
    "generated": lambda path: plots.generated([("a", np.zeros((2, 4, 4, 1), np.uint8))], path),
    "similarity": lambda path: plots.similarity(
        [{"arm": "LoRA", "role": role, "d_left": 0.1, "d_right": 0.2, "d_euclid": 0.3} for role in "qv"], path
    ),
}


def test_every_kind_of_picture_is_tried() -> None:
    assert PICTURES.keys() == {name for name in plots.__all__ if inspect.isfunction(getattr(plots, name))}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_replaces_the_old_one_at_once(name: str, tmp_path: Path) -> None:
    """The old file is not written to: open handles and hard links keep its content."""
    path, kept = tmp_path / "a.png", tmp_path / "kept.png"
    path.write_bytes(b"an old picture")
    os.link(path, kept)
    PICTURES[name](path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert kept.read_bytes() == b"an old picture"
    assert {found.name for found in tmp_path.iterdir()} == {"a.png", "kept.png"}
