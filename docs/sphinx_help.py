"""Helpers for conf.py and the templates, which Sphinx can import."""

import functools
import importlib
from pathlib import Path

GALLERY = ("plot_sft_smollm2", "plot_serve_reviews", "plot_own_photos")


class Order:
    """Sorts the gallery, beginning with the models; Sphinx-Gallery calls it with the folder of the examples."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, filename):
        name = Path(filename).stem
        return (GALLERY.index(name), "") if name in GALLERY else (len(GALLERY), name)


class IsProperty:
    """Tests whether an attribute of a class is a property; a class, because Sphinx cannot pickle functions."""

    def __call__(self, module, owner, name):
        cls = getattr(importlib.import_module(module), owner)
        if name in getattr(cls, "__dataclass_fields__", ()):
            return False  # described in the section Attributes
        return isinstance(getattr(cls, name, None), (property, functools.cached_property))
