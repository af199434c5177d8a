"""Layout facts of a torch attention module, for the table in ``tnadapt.targets.attention_layouts``."""

from __future__ import annotations

from typing import Any

from tnadapt.targets.attention_layouts import AttentionLayout, of_class
from tnadapt.targets.fused_rows import Facts

__all__ = ["facts_of", "is_known", "layout_of"]


def facts_of(parent: Any) -> Facts:
    """Return the sizes that an attention module has as attributes, or else in its config."""
    config = getattr(parent, "config", None)
    lookups = [lambda name: getattr(parent, name, None), lambda name: getattr(config, name, None)]
    return Facts(lookups, "its attributes are not those that were expected: there is no")


def layout_of(parent: Any, weight: str = "") -> AttentionLayout | None:
    """Return the table's entry for an attention of this class with a fused weight of this name, or None."""
    names = [name for cls in type(parent).__mro__ for name in (f"{cls.__module__}.{cls.__name__}", cls.__name__)]
    return of_class(names, lambda name: hasattr(parent, name), weight)


def is_known(parent: Any) -> bool:
    """Return whether the class is in the table, which makes it an attention whatever its name."""
    return layout_of(parent) is not None
