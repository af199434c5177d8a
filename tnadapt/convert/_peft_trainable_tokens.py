"""PEFT's TrainableTokens: rows of an embedding that were trained for single tokens, and nothing else."""

from __future__ import annotations

from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod
from ._peft_tokens import decoded, separate_rows

__all__ = ["PeftTrainableTokens"]

_TENSOR = "trainable_tokens_delta"


class PeftTrainableTokens(PeftMethod):
    """New rows, which replace those of the base; written as LoRA."""

    title = "Trainable_Tokens"
    tensors = (_TENSOR,)
    fields = ("token_indices", "init_weights", "ensure_weight_tying")
    writable = False

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the rows; an update is their difference from the base's."""
        content.require_modules()
        rows = {path: content.tensor(path, _TENSOR, 2) for path in content.modules}
        found = decoded(rows, content.config.get("token_indices"), content.base)
        return OwnStructure(
            [one.target for one in found], updates=[one.update for one in found],
            alone=separate_rows(found, content.base),
        )  # fmt: skip
