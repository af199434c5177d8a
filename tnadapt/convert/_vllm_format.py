"""The format that vLLM serves: PEFT's LoRA with one rank that vLLM takes, and a scale of 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.checkpoints.lora_export import SERVED_EMBEDDING, SERVED_RANKS, served_rank
from tnadapt.errors import ConfigError, safe_repr, summarize

from ._application import not_additive
from ._file_format import EncodedAdapter, ExportChoice
from ._peft_embeddings import is_embedding
from ._peft_format import PeftFormat, saved_whole
from ._uniform import uniform
from ._unpack import Module

__all__ = ["VllmFormat"]

# The only whole modules that vLLM loads next to LoRA, of classification models.
_HEADS = ("classifier", "score")


class VllmFormat(PeftFormat):
    """PEFT folders that vLLM serves; :class:`PeftFormat` reads them.

    vLLM sets aside ``max_lora_rank`` columns for each adapter, one of a short list. Releases before ``rank_pattern``
    took one α / r for all modules, so that here all factors have one rank, and α equals it.
    """

    library = "vLLM"
    kinds = ("lora",)
    structures = ()
    ties = False

    def detect(self, path: str) -> None:
        """Leave folders to the format of PEFT."""

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for convolutions, and for embeddings that vLLM does not look up in an adapter.

        Weights stored as (in, out) are the same for LoRA's factors.
        """
        if len(module.stored) != 2:
            raise ConfigError(
                f"{safe_repr(module.path)} is a convolution, and vLLM has no LoRA of convolutions: merge the adapter "
                "into the base with tnadapt.merge (tnadapt merge)"
            )
        if is_embedding(module) and module.path.rpartition(".")[2] != SERVED_EMBEDDING:
            raise ConfigError(
                f"{safe_repr(module.path)} is an embedding, and vLLM has LoRA only of those named {SERVED_EMBEDDING}: "
                "merge the adapter into the base with tnadapt.merge (tnadapt merge)"
            )

    def check_applied(self, kind: str, apply: str, magnitude_axis: str) -> None:
        """Refuse DoRA and HiRA, which vLLM does not serve."""
        raise not_additive(apply, f"{self.name}-{kind}")

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for kept parameters other than those of a classification head."""
        super().check_adapter(modules, kept)
        whole = saved_whole(modules, kept)
        other = [name for name in kept if name not in whole or name.rpartition(".")[0] not in _HEADS]
        if other:
            raise ConfigError(
                f"besides LoRA, vLLM loads only trained modules named {' or '.join(_HEADS)}, and this adapter has "
                f"{summarize(other)}: convert without them by without_kept=True (--without-kept)"
            )

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors and ``adapter_config.json``, padded to the next rank that vLLM takes."""
        most = max(choice.ranks)
        rank = served_rank(most)
        if rank is None:
            raise ConfigError(
                f"the LoRA of this adapter has rank {most}, and vLLM takes ranks up to {SERVED_RANKS[-1]}: give rank= "
                "(--rank) and max_error= (--max-error) for an approximation of lower rank, or merge the adapter into "
                "the base with tnadapt.merge (tnadapt merge)"
            )
        padded = choice._replace(updates=uniform(choice.updates, rank), ranks=[rank] * len(modules))
        return super().encode(kind, modules, padded, kept)
