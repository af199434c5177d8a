"""Pictures. matplotlib is imported inside the functions, and draws into files: no window, no global state."""

from .accuracy import Mark, pareto
from .canvas import STYLES
from .counts import parameters
from .places import layout

__all__ = ["STYLES", "Mark", "layout", "parameters", "pareto"]
