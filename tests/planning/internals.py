"""What is tested here and has no public name: published results of any content, sketches, and how a front is made."""

from __future__ import annotations

from collections.abc import Sequence

import tnadapt as tna
from tnadapt.planning import _measured as measured
from tnadapt.planning import _plan_search as plan_search
from tnadapt.planning._matrix_rank import sketched
from tnadapt.planning._plan_table import CRITERIA, rung

__all__ = ["CRITERIA", "chosen_config", "measured", "plan_search", "rung", "sketched"]


def chosen_config(preset: str, settings: Sequence[str]) -> tna.Config:
    """The config of a preset and settings on the command line, which needs typer."""
    from tnadapt.cli import _options

    return _options.chosen_config(preset, settings, None)
