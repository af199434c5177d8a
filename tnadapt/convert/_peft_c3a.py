"""PEFT's C3A: circulant blocks, with one kernel for each block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.maps import Circulant
from tnadapt.checkpoints.adapter_file import AdapterFile

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod
from ._peft_positions import dense_updates, few_values, values_of
from ._unpack import Module
from ._updates import Float

__all__ = ["PeftC3a"]


class PeftC3a(PeftMethod):
    """``ΔW[m b + s, n b + t] = w[m, n, (t - s) mod b] / cols``."""

    title = "C3A"
    tensors = ("c3a_kernel",)
    fields = ("block_size", "block_size_pattern", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the kernels as one vector per weight."""
        content.require_modules()
        kernels = [content.tensor(path, "c3a_kernel", 3) for path in content.modules]
        targets = [
            content.target(path, (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]))
            for path, kernel in zip(content.modules, kernels, strict=True)
        ]
        blocks = {kernel.shape[2] for kernel in kernels}
        if len(blocks) == 1:
            return few_values(targets, kernels, Circulant(blocks.pop(), average=True), 1.0)
        deltas = [_delta(kernel) for kernel in kernels]
        return dense_updates(targets, deltas, f"a config has one size of block, and there are {sorted(blocks)}")

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the kernels."""
        tensors, size = dict[str, Float](), 0
        for module in modules:
            values, scale, projection = values_of(self, module, file)
            if not isinstance(projection, Circulant):
                self.refuse("it needs projection=maps.Circulant(…) alone, as presets.c3a has it")
            size, (rows, cols) = projection.block, module.shape
            kernel = scale * values.reshape(rows // size, cols // size, size)
            tensors[self.name_of(module, "c3a_kernel")] = kernel if projection.average else kernel * cols
        return EncodedAdapter(tensors, config={"block_size": size})


def _delta(kernel: Float) -> Float:
    down, across, size = kernel.shape
    place = np.arange(size)
    blocks = kernel[:, :, (place[None, :] - place[:, None]) % size]
    found: Float = blocks.transpose(0, 2, 1, 3).reshape(down * size, across * size) / (across * size)
    return found
