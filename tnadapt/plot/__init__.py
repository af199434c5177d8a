"""Pictures. matplotlib is imported inside the functions, and draws into files: no window, no global state."""

from ._accuracy import Mark, pareto
from ._canvas import STYLES
from ._counts import parameters
from ._group_map import layout
from ._network_diagram import network
from .fronts import Curve, Dot, Panel, fronts, fronts_grid
from .generated import generated
from .geometry_scatter import similarity

__all__ = [
    "STYLES",
    "Curve",
    "Dot",
    "Mark",
    "Panel",
    "fronts",
    "fronts_grid",
    "generated",
    "layout",
    "network",
    "parameters",
    "pareto",
    "similarity",
]
