"""Notebooks show results as tables: well-formed HTML with the content of the text, and nothing from files unescaped."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.report import fact_table, html_table

SHAPES = [(12, 8)] * 3


def fitted() -> Any:
    updates = [np.random.default_rng(number).normal(size=shape) for number, shape in enumerate(SHAPES)]
    return tna.decompose(updates, tna.presets.lora(2))[1]


def on_a_model() -> Any:
    torch = pytest.importorskip("torch")
    return tna.torch.attach(torch.nn.Sequential(torch.nn.Linear(8, 12)), "lora", "all-linear", rank=2)


# What a notebook shows, and words of the text that its table has, too.
SHOWN: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "config": (lambda: tna.presets.superlora(3), ["rank", "3", "fold", "'hypercube'"]),
    "composite": (
        lambda: tna.CompositeConfig([(tna.presets.lora(2), 1), (tna.presets.lokr(1), 2)]),
        ["weights", "Config(rank=2", "splits=2"],
    ),
    "plan of one adapter": (
        lambda: tna.SuperLoRA(tna.presets.lora(2), SHAPES),
        ["weights", "3", "120 (41.7 % of the elements)", "288", "Config(rank=2"],
    ),
    "plan of a budget": (lambda: tna.plan(SHAPES, 100), ["method", "LoKr", "freedom"]),
    "fit": (fitted, ["error", "SVD", "yes"]),
    "laws": (lambda: tna.verify(tna.presets.lora(2), SHAPES, backends=["numpy"]), ["holds", "all laws hold"]),
    "decomposition": (lambda: tna.cp(np.ones((3, 4, 5)), rank=1), ["rank", "1"]),
    "adapter": (on_a_model, ["0.weight", "12×8", "40 parameters"]),
    "summary": (lambda: on_a_model().summary(), ["0.weight", "12×8", "40 parameters"]),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_results_are_tables_in_notebooks(kind: str) -> None:
    make, words = SHOWN[kind]
    text = make()._repr_html_()
    root = ET.fromstring(f"<div>{text}</div>")  # well-formed
    content = " ".join(root.itertext())
    assert all(word in content for word in words), content
    for table in root.iter("table"):
        widths = {len(row) for row in table.iter("tr")}
        assert len(widths) == 1


@pytest.mark.parametrize("make", [
    lambda text: html_table(text, [text], [[text]], [text]), lambda text: fact_table(text, [(text, text)]),
])  # fmt: skip
def test_tables_escape_what_they_show(make: Callable[[str], str]) -> None:
    text = make("<script>&'\"\x1b[31m")
    assert "<script>" not in text
    assert "\x1b" not in text
    assert html.unescape(re.sub(r"<[^>]+>", "\n", text)).count("<script>&'\"\\x1b[31m") in (3, 4)


def test_of_many_groups_the_first_are_shown() -> None:
    ones = [np.ones((3, 2))] * 30
    shown = tna.decompose(ones, tna.presets.lora(1))[1]._repr_html_()
    assert shown.count("<tr>") == 1 + 20
    assert "10 more groups in .groups" in shown


def test_names_in_a_model_are_escaped() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"<b>": torch.nn.Linear(8, 12)})
    shown = tna.torch.attach(model, "lora", "all-linear", rank=2)._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;.weight" in shown


def test_a_config_shows_what_was_chosen() -> None:
    config = tna.presets.superlora(3, projection="linear", ratio=0.5)
    assert repr(config) == ("Config(rank=3, groups=1, fold='hypercube', projection='linear', ratio=0.5, rate='adam')")
    assert eval(repr(config), {"Config": tna.Config}) == config
    assert repr(tna.Config()) == "Config(rank=4)"
