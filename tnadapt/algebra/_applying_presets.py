"""Presets that say how the update meets the weight: DoRA and HiRA.

Users find them in :mod:`tnadapt.presets`.
"""

from __future__ import annotations

from typing import Any

from ._preset_config import preset_config
from .config import Config

__all__ = ["dora", "hira"]


def dora(rank: int = 8, **changes: Any) -> Config:
    """DoRA: ``W' = m ∘ (W + ΔW) / ‖W + ΔW‖`` by row, with LoRA's ΔW and a trained m (Liu et al., arXiv 2402.09353).

    Settings: LoRA with ``apply="magnitude"``. m starts at ‖W‖, so that a fresh adapter changes nothing. As in PEFT, a
    row is an output feature; ``magnitude_axis="cols"`` is LyCORIS's ``wd_on_out=False``. Parameters: r (rows + cols) +
    rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(dora(rank=8), [(768, 768)] * 24)
    313344
    """
    return _lora(rank, "magnitude", changes)


def hira(rank: int = 32, **changes: Any) -> Config:
    """HiRA: ``W' = W + W ∘ ΔW`` with LoRA's ΔW, a change of full rank (Huang et al., ICLR 2025).

    Settings: LoRA with ``apply="hadamard"``. The paper's A and B are LoRA's. Parameters: r (rows + cols) per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(hira(rank=32), [(768, 768)] * 24) == 2 * 768 * 32 * 24
    True
    """
    return _lora(rank, "hadamard", changes)


def _lora(rank: int, apply: str, changes: dict[str, Any]) -> Config:
    base = {"groups": "weight", "fold": "stack", "order": 2, "format": "cp", "rank": rank, "apply": apply}
    return preset_config(base, changes)
