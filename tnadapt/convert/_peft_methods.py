"""The registry of PEFT's methods with a structure of their own, by PEFT's names. A new one is a file and a line here."""

from __future__ import annotations

from ._peft_method import PeftMethod
from ._peft_randlora import PeftRandLora
from ._peft_vera import PeftVera

__all__ = ["METHODS"]

METHODS: dict[str, PeftMethod] = {
    "RANDLORA": PeftRandLora(),
    "VERA": PeftVera(),
}
