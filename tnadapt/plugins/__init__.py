"""Registries of named formats, maps, attention layouts and file formats, and the plug-ins that extend them.

Every choice that a setting names is a class in a :class:`Registry`. Another package adds its own classes through the
``register_…`` functions of :mod:`tnadapt`, or, without having to be imported, through an entry point in the group
``tnadapt.plugins`` (:mod:`~tnadapt.plugins.entry_points`).
"""

from .class_registry import Registry, checked_name, forget_registered
from .entry_points import load_plugins

__all__ = ["Registry", "checked_name", "forget_registered", "load_plugins"]
