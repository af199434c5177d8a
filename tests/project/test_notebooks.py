"""What notebooks show: results as tables of well-formed HTML, and a progress bar, with nothing from files unescaped.

Terminals show the bar on one line, and nothing else at all.
"""

from __future__ import annotations

import html
import re
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import report
from tnadapt.report import TextTable

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
        lambda: tna.UpdatePlan(tna.presets.lora(2), SHAPES),
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


@pytest.mark.parametrize("head", [(), ("<script>&'\"\x1b[31m",)])
def test_tables_escape_what_they_show(head: tuple[str, ...]) -> None:
    hostile = "<script>&'\"\x1b[31m"
    text = TextTable([[hostile]], head, caption=hostile, notes=[hostile]).html()
    assert "<script>" not in text
    assert "\x1b" not in text
    assert html.unescape(re.sub(r"<[^>]+>", "\n", text)).count("<script>&'\"\\x1b[31m") == 3 + len(head)


def test_of_many_groups_the_first_are_shown() -> None:
    ones = [np.ones((3, 2))] * 30
    shown = tna.decompose(ones, tna.presets.lora(1))[1]._repr_html_()
    assert shown.count("<tr>") == 1 + 20
    assert "10 more groups in .groups" in shown


def test_a_config_shows_what_was_chosen() -> None:
    config = tna.presets.superlora(3, projection="linear", ratio=0.5)
    assert repr(config) == ("Config(rank=3, groups=1, fold='hypercube', projection='linear', ratio=0.5, rate='adam')")
    assert eval(repr(config), {"Config": tna.Config}) == config
    assert repr(tna.Config()) == "Config(rank=4)"


# -- Progress -------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


class Output:
    """What a cell shows: each state of it, in turn."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.displays = 0

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.displays += 1
        self.pages.append(data["text/html"])
        return types.SimpleNamespace(update=lambda data, raw: self.pages.append(data["text/html"]))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Output:
    """A stand-in for IPython in a kernel, and no limit on the number of updates."""
    output = Output()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=output.display))
    monkeypatch.setattr(report, "_PERIOD", 0.0)
    return output


def test_decompositions_and_fits_show_their_steps(notebook: Output) -> None:
    with tna.ProgressBar("<CP>") as bar:
        tna.cp(RNG.normal(size=(6, 7, 8)), rank=2, callback=bar.iterations)
    assert notebook.displays == 1
    assert notebook.pages[0] == "&lt;CP&gt; <progress></progress> "
    assert any("iteration 1, error 0." in page for page in notebook.pages)
    assert 'value="1.0000"' in notebook.pages[-1]
    notebook.pages.clear()
    with tna.ProgressBar() as bar:
        tna.decompose([RNG.normal(size=(12, 8))] * 4, tna.presets.lora(2), progress=bar.steps)
    assert [f"group {group} of 4" for group in range(1, 5)] == list(
        dict.fromkeys(page.rpartition("% ")[2].partition(",")[0] for page in notebook.pages if "group" in page)
    )
    notebook.pages.clear()
    with tna.ProgressBar() as bar:
        tna.plan([(64, 64)] * 4, 100, progress=bar.counts)
    last = notebook.pages[-1]
    assert 'value="1.0000"' in last
    number = last.rpartition(" of ")[2]
    assert f"{number} of {number}" in last
    with tna.ProgressBar() as bar:
        tna.verify(tna.presets.lora(1), [(2, 2)], backends=["numpy"], progress=bar.lines)
    assert any(html.escape("config") in page for page in notebook.pages)


def test_an_error_leaves_the_bar_where_it_was_and_few_updates_are_drawn(
    notebook: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = tna.ProgressBar()
    bar.counts(1, 4)
    bar.__exit__(ValueError, ValueError("wrong"), None)
    assert 'value="0.2500"' in notebook.pages[-1]
    with tna.ProgressBar() as bar:
        bar.lines("<b>\x1b[1m")  # names from files are escaped
    assert r"&lt;b&gt;\x1b[1m" in notebook.pages[-1]
    notebook.pages.clear()
    monkeypatch.setattr(report, "_PERIOD", 60.0)
    with tna.ProgressBar() as bar:
        for done in range(1000):
            bar.counts(done, 1000)
    assert len(notebook.pages) == 2
    assert "999 of 1,000" in notebook.pages[-1]


def test_elsewhere_there_is_nothing_and_on_a_terminal_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tna.ProgressBar("a") as bar:
        bar.counts(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(report, "_PERIOD", 0.0)
    with tna.ProgressBar("a") as bar:
        bar.counts(1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "\r\x1b[Ka\r\x1b[Ka [##########          ] 50% 1 of 2\r\x1b[Ka [####################] 100% 1 of 2\n"


def test_trainings_of_a_study(notebook: Output) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune import BarReporter, Method, Task

    first, second = (Task(Method("LoRA", f"r = {rank}", tna.presets.lora(rank)), 0, 0.01) for rank in (1, 2))
    with tna.ProgressBar("digits") as bar:
        reporter = BarReporter(bar)
        reporter.preparing("pretraining", 0.5)
        reporter.begins(4, 1)
        reporter.estimated(300.0)
        reporter.training(first, 0.15)
        reporter.training(first, 0.5)
        reporter.training(second, 0.25)
        reporter.finished(first, {})
    shown = [page.partition("digits ")[2] for page in notebook.pages]
    assert shown[1:8] == [
        '<progress value="0.5000"></progress> 50% pretraining',
        '<progress value="0.2500"></progress> 25% 1 of 4 trainings',
        '<progress value="0.2500"></progress> 25% 1 of 4 trainings, about 5 minutes',
        f'<progress value="0.2875"></progress> 29% 1 of 4 trainings, about 4.8 minutes: {first.name}',
        f'<progress value="0.3750"></progress> 38% 1 of 4 trainings: {first.name}',
        f'<progress value="0.4375"></progress> 44% 1 of 4 trainings: {second.name}',
        f'<progress value="0.5625"></progress> 56% 2 of 4 trainings: {first.name}',
    ]
