"""The rank of LoRA that holds a setting's updates exactly."""

from __future__ import annotations

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.checkpoints.lora_export import lora_export

from .comparison import Outcome
from .facts import Facts

__all__ = ["lora_rank"]


def lora_rank(one: Outcome, facts: Facts) -> int | None:
    """Return the rank of LoRA that holds a setting's updates exactly; None if none does, or if it is not known."""
    if one.library == "PEFT":
        return one.config.get("r") if one.method == "peft-lora" and one.config is not None else None
    assert one.config is not None  # controls alone have none
    return lora_export(SuperLoRA(Config.from_dict(one.config), facts.shapes, facts.layers, facts.roles)).rank
