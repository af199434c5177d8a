"""Pictures. matplotlib is imported inside the functions, and draws into files: no window, no global state."""

from .accuracy import Mark, pareto
from .canvas import STYLES
from .counts import parameters
from .fronts import Curve, Dot, fronts
from .network import network
from .places import layout
from .similarity import similarity

__all__ = ["STYLES", "Curve", "Dot", "Mark", "fronts", "layout", "network", "parameters", "pareto", "similarity"]
