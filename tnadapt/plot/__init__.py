"""Plots of plans, networks and results. matplotlib is imported on use and only draws files: no window, no global state.

Text and background have the colors of matplotlib's current style, so ``with
matplotlib.style.context("dark_background"):`` gives dark pictures. Methods differ in shape and in color, also for the
color-blind.
"""

from ._accuracy import Axis, Mark, parameters, pareto
from ._group_map import layout
from ._network_diagram import network
from .canvas import STYLES, styles

__all__ = ["STYLES", "Axis", "Mark", "layout", "network", "parameters", "pareto", "styles"]
