"""The registry of PEFT's methods with a structure of their own: a new one is one more file, and one more line here."""

from __future__ import annotations

from ._peft_c3a import PeftC3a
from ._peft_fourierft import PeftFourierFT
from ._peft_method import PeftMethod
from ._peft_miss import PeftMiss
from ._peft_randlora import PeftRandLora
from ._peft_shira import PeftShira
from ._peft_tinylora import PeftTinyLora
from ._peft_trainable_tokens import PeftTrainableTokens
from ._peft_unilora import PeftUniLora
from ._peft_vblora import PeftVbLora
from ._peft_vera import PeftVera
from ._peft_waveft import PeftWaveFT

__all__ = ["METHODS"]

METHODS: dict[str, PeftMethod] = {
    "VERA": PeftVera(),
    "RANDLORA": PeftRandLora(),
    "FOURIERFT": PeftFourierFT(),
    "WAVEFT": PeftWaveFT(),
    "C3A": PeftC3a(),
    "SHIRA": PeftShira(),
    "MISS": PeftMiss(),
    "UNILORA": PeftUniLora(),
    "TINYLORA": PeftTinyLora(),
    "VBLORA": PeftVbLora(),
    "TRAINABLE_TOKENS": PeftTrainableTokens(),
}
