"""The experiments of the SuperLoRA paper as recipes: a settings file each, and what trains, counts and draws them.

:func:`names` lists them, :func:`open_recipe` reads one; ``tnadapt reproduce NAME`` runs it. What trains is imported
where it is needed, so that counts and figure 2 need no torch.
"""

from .recipe import Point, Recipe, names, open_recipe
from .run import Outcome, redraw, run

__all__ = ["Outcome", "Point", "Recipe", "names", "open_recipe", "redraw", "run"]
