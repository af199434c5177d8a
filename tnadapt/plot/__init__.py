"""Pictures. matplotlib is imported inside the functions, and draws into files: no window, no global state."""

from .accuracy import Mark, pareto
from .canvas import STYLES
from .counts import parameters
from .fronts import Curve, Dot, fronts
from .places import layout
from .similarity import similarity

__all__ = ["STYLES", "Curve", "Dot", "Mark", "fronts", "layout", "parameters", "pareto", "similarity"]
