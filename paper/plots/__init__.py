"""The paper's figures. As in :mod:`tnadapt.plot`, matplotlib is imported inside functions and draws only into files."""

from .fronts import Curve, Dot, Panel, fronts, fronts_grid
from .generated import generated
from .geometry_scatter import similarity

__all__ = ["Curve", "Dot", "Panel", "fronts", "fronts_grid", "generated", "similarity"]
