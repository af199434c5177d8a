"""What is tested here and has no public name: where everything in a diagram is, and the counts of parameters.

And how a picture's words are read.
"""

from __future__ import annotations

from pathlib import Path

from tnadapt.plot._accuracy import counted
from tnadapt.plot._diagram import Diagram, Node, SplitDrawing, diagram, wide

__all__ = ["Diagram", "Node", "SplitDrawing", "counted", "diagram", "texts", "wide"]


def texts(path: Path) -> list[str]:
    """Return the text in a vector graphic."""
    lines = path.read_text().splitlines()
    return [line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")]
