"""What conf.py and the templates need, where Sphinx can import it."""

import functools
import importlib
from pathlib import Path

GALLERY = (
    "plot_first_steps",
    "plot_attach_vit",
    "plot_trainer_minilm",
    "plot_read_with_numpy",
    "plot_parameters",
    "plot_plan_budget",
    "plot_layout",
    "plot_network",
    "plot_projection",
    "plot_geometry",
)


class Order:
    """Sorts the gallery, from the first steps on; Sphinx-Gallery makes it with the folder the examples are in."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, filename):
        name = Path(filename).stem
        return (GALLERY.index(name), "") if name in GALLERY else (len(GALLERY), name)


class IsProperty:
    """Whether an attribute of a class is one that is computed; an object, as Sphinx pickles no functions."""

    def __call__(self, module, owner, name):
        found = getattr(getattr(importlib.import_module(module), owner), name, None)
        return isinstance(found, (property, functools.cached_property))
