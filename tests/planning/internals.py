"""The private parts of ``tnadapt.planning`` that its tests reach inside for, in one place: each name is a debt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.checkpoints.lora_export import lora_export
from tnadapt.planning._flops import applied_cost, forward_cost, of_map
from tnadapt.planning._matrix_rank import by_formula, of_network, sketched
from tnadapt.planning._measured import Gain, Measurements, kind_of, measurements, read
from tnadapt.planning._measured import _measured as published_results
from tnadapt.planning._plan_table import CRITERIA, rung

__all__ = [
    "CRITERIA",
    "Gain",
    "Measurements",
    "applied_cost",
    "by_formula",
    "chosen_config",
    "forward_cost",
    "kind_of",
    "lora_export",
    "measurements",
    "of_map",
    "of_network",
    "published_results",
    "read",
    "rung",
    "sketched",
]


def chosen_config(preset: str, settings: Sequence[str]) -> Any:
    """Return the config that the options of a command line choose; this needs typer."""
    from tnadapt.cli import _options

    return _options.chosen_config(preset, settings, None)
