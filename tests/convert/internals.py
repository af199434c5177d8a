"""What tests of conversions use of the private modules: measurements and the writing of folders, one step at a time."""

from __future__ import annotations

from tnadapt.checkpoints.stored_weights import _OTHER_HEADS as OTHER_HEADS
from tnadapt.checkpoints.stored_weights import _TIED as TIED
from tnadapt.convert import _pipeline as pipeline_module
from tnadapt.convert._files import replace_folder
from tnadapt.convert._gguf_format import GgufBase
from tnadapt.convert._peft_settings import PathPatterns
from tnadapt.convert._updates import norms_of

__all__ = [
    "OTHER_HEADS",
    "TIED",
    "GgufBase",
    "PathPatterns",
    "norms_of",
    "pipeline_module",
    "replace_folder",
]
