"""The format of kohya's scripts: LyCORIS's tensors under the names of the component that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from ._diffusion_component import COMPONENTS, PREFIXES, stored_path, written_prefix
from ._lycoris_format import LycorisFormat
from ._unpack import Module

__all__ = ["KohyaFormat"]


class KohyaFormat(LycorisFormat):
    """Files that kohya's scripts, diffusers and ComfyUI load; :class:`LycorisFormat` reads them."""

    library = "kohya"
    parts_written = (*PREFIXES, *COMPONENTS)
    _prefix = "lora_unet"

    def detect(self, path: str) -> None:
        """Leave files to the format of LyCORIS, which has the same tensors."""

    def choose_part(self, modules: Sequence[Module], part: str | None, source: str) -> None:
        """Choose the prefix, such as "lora_te2"."""
        self._prefix = written_prefix(self.name, part, source, [module.path for module in modules])

    def flat_name(self, path: str) -> str:
        """Return the name of a module in a file: the component's prefix, and underscores for dots."""
        return f"{self._prefix}_{stored_path(self._prefix, path).replace('.', '_')}"
