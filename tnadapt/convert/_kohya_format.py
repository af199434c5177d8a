"""The format of kohya's scripts: LyCORIS's tensors under the names of the component that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._diffusion_component import checked_component, component_of
from ._lycoris_format import LycorisFormat
from ._unpack import Module

__all__ = ["KohyaFormat"]

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "transformer": "lora_transformer"}
_KNOWN = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer")


class KohyaFormat(LycorisFormat):
    """Files that kohya's scripts, diffusers and ComfyUI load; :class:`LycorisFormat` reads them."""

    library = "kohya"
    _part: str | None = None
    _prefix = "lora_unet"

    def detect(self, path: str) -> None:
        """Leave files to the format of LyCORIS, which has the same tensors."""

    def configure(self, base: Any, part: str | None) -> Any:
        """Take the prefix, such as "lora_te2"; by default it follows from the names of the modules."""
        self._part = checked_component(part, _KNOWN, self.name)
        return base

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Choose the prefix of the component, and check as LyCORIS does."""
        self._prefix = self._part or _PREFIXES[component_of([module.path for module in modules])]
        super().check_adapter(modules, kept)

    def flat_name(self, path: str) -> str:
        """Return the name of a module in a file: the component's prefix, and underscores for dots."""
        return f"{self._prefix}_{path.replace('.', '_')}"
