"""A start that the caller brings: of all arrays, or of some."""

from __future__ import annotations

from typing import ClassVar

from ._start import Start

__all__ = ["BroughtStart"]


class BroughtStart(Start):
    """Arrays that the caller brings; those that are not brought start as usual (:mod:`tnadapt.algebra.init`).

    They are brought to a plan by ``SuperLoRA(config, shapes, start_from=arrays)``, and to an adapter on a torch model
    by ``adapter.start_from(arrays)``. Files store them, in float32.
    """

    brought: ClassVar[bool] = True
