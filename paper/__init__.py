"""The experiments of the SuperLoRA paper as recipes: one settings file each, and code to train, count and draw them.

``python -m paper`` lists the recipes and ``python -m paper NAME`` runs one; programs use :func:`names`,
:func:`open_recipe` and :func:`run`. It runs from a clone of the repository and is not part of the installed package.
Code that trains is imported where it is needed, so that counts and figure 2 work without torch.
"""

from .recipe import Recipe, RecipePoint, names, open_recipe
from .run import RecipeOutcome, redraw, run

__all__ = ["Recipe", "RecipeOutcome", "RecipePoint", "names", "open_recipe", "redraw", "run"]
