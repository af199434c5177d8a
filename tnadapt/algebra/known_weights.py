"""Shapes of weights that are checked once, for the plans of many configs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from tnadapt.argument_checks import is_sequence, wrong_argument

from .layout import Groups, Layout, checked_shapes, make_layout

__all__ = ["KnownWeights", "layout_of", "require_keys"]


class KnownWeights(tuple[tuple[int, int], ...]):
    """Shapes of weights that are checked once, for the plans of many configs, which share their layouts.

    Parameters
    ----------
    shapes, layers, roles
        As for :func:`~tnadapt.algebra.layout.make_layout`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> weights = KnownWeights([(2, 3), (2, 2)])
    >>> one, other = (tna.SuperLoRA(tna.presets.superlora(rank, groups=2), weights) for rank in (1, 2))
    >>> one.layout is other.layout, one.shapes
    (True, ((2, 3), (2, 2)))
    """

    layers: Sequence[Hashable] | None
    roles: Sequence[Hashable] | None
    _layouts: dict[Groups, Layout]

    def __new__(
        cls,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
    ) -> KnownWeights:
        made = super().__new__(cls, checked_shapes(shapes))
        made.layers, made.roles, made._layouts = layers, roles, {}
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)

    def layout(self, groups: Groups) -> Layout:
        """Return :func:`~tnadapt.algebra.layout.make_layout` of these weights, which is made once."""
        if groups not in self._layouts:
            self._layouts[groups] = make_layout(groups, list(self), self.layers, self.roles)
        return self._layouts[groups]


def layout_of(
    groups: Groups,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> Layout:
    """Return :func:`~tnadapt.algebra.layout.make_layout`, of known weights the one that they have already."""
    if isinstance(shapes, KnownWeights) and shapes.layers is layers and shapes.roles is roles:
        return shapes.layout(groups)
    return make_layout(groups, shapes, layers, roles)


def require_keys(layers: Sequence[Hashable] | None, roles: Sequence[Hashable] | None) -> None:
    """Raise a ConfigError for layers or roles that are no sequences; text is one of letters."""
    for name, keys in (("layers", layers), ("roles", roles)):
        if keys is not None and not is_sequence(keys) and not isinstance(keys, str):
            raise wrong_argument(name, "a sequence of one key per weight or None", keys)
