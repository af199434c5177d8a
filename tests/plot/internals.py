"""What is tested here and has no public name: the arrays and words of a diagram, and the counts of parameters.

And how a picture's words are read.
"""

from __future__ import annotations

from pathlib import Path

from tnadapt.plot._accuracy import counted
from tnadapt.plot._network_diagram import _SplitDrawing as SplitDrawing
from tnadapt.plot._network_diagram import _steps as steps
from tnadapt.plot._network_diagram import _words as words

__all__ = ["SplitDrawing", "counted", "steps", "texts", "words"]


def texts(path: Path) -> list[str]:
    """Return the text in a vector graphic."""
    lines = path.read_text().splitlines()
    return [line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")]
