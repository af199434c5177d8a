"""Pictures. matplotlib is imported inside the functions, and draws into files: no window, no global state."""

from .accuracy import Mark, pareto
from .canvas import STYLES
from .counts import parameters
from .fronts import Curve, Dot, Panel, fronts, fronts_grid
from .generated import generated
from .network import network
from .places import layout
from .similarity import similarity

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
