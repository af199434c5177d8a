"""PEFT's MiSS: one narrow matrix, repeated over the columns of a weight (and with "mini" over its rows)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tnadapt.algebra.maps import Tile
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, rank_of
from ._peft_positions import few_values, values_of
from ._peft_settings import integer_of
from ._unpack import Module
from ._updates import Float

__all__ = ["PeftMiss"]


class PeftMiss(PeftMethod):
    """``ΔW[i, j] = D[j mod r, i]``."""

    title = "MiSS"
    tensors = ("miss_block",)
    fields = ("r", "mini_r", "miss_dropout", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the matrix, transposed."""
        content.require_modules()
        start = content.config.get("init_weights", True)
        if start == "bat":
            raise FileError(
                "init_weights='bat' cannot be converted: its update depends on the weight, W D + D; merge the adapter "
                "with PEFT, and extract one from the merged weights"
            )
        rank, mini = rank_of(content, 64), None
        if start == "mini":
            mini = integer_of("mini_r", content.config.get("mini_r", 1))
        values, targets = [], []
        for path in content.modules:
            block = content.tensor(path, "miss_block", 2)
            height = block.shape[1]
            if block.shape[0] != rank or mini not in (None, height):
                raise content.misfit(path, f"miss_block must be ({rank}, {'rows' if mini is None else mini})")
            fits = functools.partial(_fits, rank, height, mini is not None)
            what = f"it must have {height} rows{' or a multiple' * (mini is not None)}, and {rank} columns or more"
            targets.append(content.target_from_base(path, fits, what))
            values.append(block.T)
        return few_values(targets, values, Tile(mini, rank), 1.0)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the matrix, transposed."""
        tensors, config = dict[str, Float](), dict[str, object]()
        for module in modules:
            values, scale, tile = values_of(self, module, file)
            if not isinstance(tile, Tile) or tile.cols is None:
                self.refuse("it needs projection=maps.Tile(cols=…) alone, as presets.miss has it")
            if tile.rows is not None and module.shape[0] % tile.rows:
                self.refuse(f"mini_r={tile.rows} must divide the {module.shape[0]} rows of {module.path} there")
            tensors[self.name_of(module, "miss_block")] = scale * values.reshape(-1, tile.cols).T
            config = {"r": tile.cols}
            if tile.rows is not None:
                config |= {"init_weights": "mini", "mini_r": tile.rows}
        return EncodedAdapter(tensors, config=config)


def _fits(rank: int, height: int, repeated: bool, rows: int, cols: int) -> bool:
    return rank <= cols and (rows % height == 0 if repeated else rows == height)
