"""The rules find what they are to find, in sentences and not in code, and at the right line."""

from __future__ import annotations

import pytest

pytest.importorskip("proselint")

from proselint.checks import __register__
from proselint.registry import CheckRegistry

from .__main__ import READ, find, sources
from .text import of_markdown, of_python, of_rst

RST = """\
Title
=====

Prose with ``anew`` and :doc:`anew <anew>`, and no more::

    print("anew")

>>> print("anew")
anew

.. code-block:: console

   $ anew

.. list-table::
   :widths: 1 2

   * - drawn anew
     - made
       again
"""
MARKDOWN = """\
# Title

`anew` and [this](anew.md).

```sh
anew
```

| anew |
<!-- anew
-->
It is is drawn anew.
"""
PYTHON = '''\
def f():
    """Draw anew.

    >>> print("anew")
    anew
    """
    return "anew"
'''


@pytest.fixture(scope="module", autouse=True)
def _checks() -> None:
    CheckRegistry().register_many(__register__)


@pytest.mark.parametrize(
    ("sentences", "lines"),
    [(of_rst(RST), {18, 19}), (of_markdown(MARKDOWN), {12}), (of_python(PYTHON), {2})],
    ids=["rst", "markdown", "python"],
)
def test_only_sentences_are_read_and_lines_are_kept(sentences: str, lines: set[int]) -> None:
    assert {line for line, _ in find(sentences)} == lines


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("The files are drawn anew.", "again"),
        ("It is made\nagain.", "recomputed"),
        ("All of of them.", "repeated"),
        ("A seed is absolutely essential.", "essential"),
        ("This is a very small file.", "leave it out"),
        ("The file has the arrays and the recipe. It had had none.", None),
    ],
)
def test_each_kind_of_rule_finds_something(text: str, says: str | None) -> None:
    assert says is None or any(says in finding for _, finding in find(text)), find(text)
    assert says is not None or find(text) == []


def test_every_kind_of_source_is_read() -> None:
    paths = [path for path, _ in sources()]
    assert {path.suffix for path in paths} == set(READ)
    assert {path.name for path in paths} >= {
        "README.md",
        "CHANGELOG.md",
        "peft.rst",
        "speed.md",
        "presets.py",
        "plot_sft_smollm2.py",
    }
