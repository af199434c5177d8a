"""Plots. matplotlib is imported inside the functions and draws only into files: no window, no global state.

Texts and ground have the colors of matplotlib's current style, so that ``with
matplotlib.style.context("dark_background"):`` gives dark pictures. Methods differ in color, also without full color
vision, and in shape.
"""

from ._accuracy import Axis, Mark, parameters, pareto
from ._group_map import layout
from ._network_diagram import network
from .canvas import STYLES, styles

__all__ = ["STYLES", "Axis", "Mark", "layout", "network", "parameters", "pareto", "styles"]
