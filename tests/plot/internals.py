"""What is tested here and has no public name: where everything in a diagram is, and the counts of parameters."""

from __future__ import annotations

from tnadapt.plot._accuracy import counted
from tnadapt.plot._diagram import Diagram, Node, SplitDrawing, diagram, wide

__all__ = ["Diagram", "Node", "SplitDrawing", "counted", "diagram", "wide"]
