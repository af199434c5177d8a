"""The experiments of the SuperLoRA paper as recipes: a settings file each, and what trains, counts and draws them.

``python -m paper`` lists the recipes and ``python -m paper NAME`` runs one; from a program, :func:`names`,
:func:`open_recipe` and :func:`run` do. It runs from a clone of the repository and is not part of the installed package.
Whatever trains is imported where it is needed, so that counts and figure 2 need no torch.
"""

from .recipe import Recipe, RecipePoint, names, open_recipe
from .run import RecipeOutcome, redraw, run

__all__ = ["Recipe", "RecipeOutcome", "RecipePoint", "names", "open_recipe", "redraw", "run"]
