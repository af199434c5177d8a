"""Registries, and the packages that add to them: formats, maps, attention layouts and file formats by name.

Every choice that a setting names is a class in a :class:`Registry`. Another package adds its own by the functions
``register_…`` of :mod:`tnadapt`, or without being imported by an entry point in the group ``tnadapt.plugins``
(:mod:`~tnadapt.plugins.entry_points`).
"""

from .class_registry import Registry, checked_name, forget_registered
from .entry_points import load_plugins

__all__ = ["Registry", "checked_name", "forget_registered", "load_plugins"]
