"""Equal maps of several plans: their draws exist once, and are digested once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .maps.projection import Projection
from .superlora import SuperLoRA

__all__ = ["share_maps"]


def share_maps(plan: SuperLoRA, others: Iterable[SuperLoRA], digests: bool = False) -> None:
    """Let a plan use the maps F of other plans where they are equal.

    Parameters
    ----------
    plan : SuperLoRA
    others : iterable of SuperLoRA
    digests : bool
        Whether to compute the digests of the others' maps now, unless they are known, so that the plan has them.

    Examples
    --------
    >>> import tnadapt as tna
    >>> one, other = (SuperLoRA(tna.presets.fastfood(0.1), [(10, 10)]) for _ in range(2))
    >>> share_maps(one, [other])
    >>> one.groups[0].projection.map is other.groups[0].projection.map
    True
    """
    there = {one.key: one for other in others for one in _projections(other)}
    for one in _projections(plan):
        same = there.get(one.key)
        if same is not None:
            one.share(same, digests)


def _projections(plan: SuperLoRA) -> Iterator[Projection]:
    for group in plan.arrays_plan.groups:
        yield group.projection
