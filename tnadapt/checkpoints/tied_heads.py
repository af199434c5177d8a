"""Which output heads a model on disk does not store because they are tied to its token embedding."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from .checkpoint import Checkpoint
from .container import FOREIGN

__all__ = ["tied_heads", "ties_head"]

# The ends of the names of transformers' classes that have a head with a row for each token.
_WITH_HEAD = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "DoubleHeadsModel",
    "MarianMTModel",
)  # fmt: skip
# Token embeddings of transformers' language models by the ends of their paths, with the modules that
# ``tie_word_embeddings`` ties to them, the head last, and a tensor that a checkpoint has where these are the modules:
# of several rows the first that fits.
_TIED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("shared", ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), "shared.weight"),
    *((embedding, ("lm_head",), f"{embedding}.weight") for embedding in (
        "model.embed_tokens", "model.language_model.embed_tokens", "model.decoder.embed_tokens", "transformer.wte",
    )),
    ("embeddings.word_embeddings", ("cls.predictions.decoder",), "cls.predictions.transform.dense.weight"),
    ("embeddings.word_embeddings", ("lm_head.decoder",), "lm_head.dense.weight"),
    ("embeddings.word_embeddings", ("predictions.decoder",), "predictions.dense.weight"),
    ("embeddings.word_embeddings", ("generator_lm_head",), "generator_predictions.dense.weight"),
    ("embeddings.word_embeddings", ("vocab_projector",), "vocab_transform.weight"),
)  # fmt: skip
# Architectures that have these embeddings, and other heads.
_OTHER_HEADS = re.compile(
    "Whisper|Moonshine|Canary|CohereAsr|TrOCR|T5Gemma|Ultrabert|Blt|Blip|Csm|Udop|Kosmos2|Pop2Piano", re.IGNORECASE
)
# Last parts of the paths of the embeddings, and ends of those of heads.
_EMBEDDINGS = tuple({end.rpartition(".")[2] for end, _, _ in _TIED})
_HEADS = tuple({heads[-1] for _, heads, _ in _TIED} | {"embed_out", "output_projection"})


def ties_head(checkpoint: Checkpoint) -> bool:
    """Return whether the token embedding of a model on disk is its output head as well, as one weight.

    ``config.json`` may say so. Often it lacks ``tie_word_embeddings``, as transformers 4 left out what is the default
    of the model's class. Then a model without a head of its own is tied, and so is one whose head equals the embedding.
    """
    says = (checkpoint.config or {}).get("tie_word_embeddings")
    if says is False:
        return False
    names = _architectures(checkpoint)
    if names is None:
        return bool(_heads(checkpoint)) or (says is True and bool(_embeddings(checkpoint)))
    return any(name.endswith(_WITH_HEAD) for name in names) and (says is True or not _has_own_head(checkpoint))


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the modules that a checkpoint does not store, as they are tied to an embedding, each with it.

    The result is empty also where a head is tied whose name is not known.
    """
    return _heads(checkpoint) if ties_head(checkpoint) else {}


def _architectures(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the model's classes, None if they are not known."""
    names = (checkpoint.config or {}).get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) and names else None


def _heads(checkpoint: Checkpoint) -> dict[str, str]:
    kinds = _architectures(checkpoint) or [re.sub(r"\W|_", "", str((checkpoint.config or {}).get("model_type")))]
    if any(map(_OTHER_HEADS.match, kinds)):
        return {}
    stored = checkpoint.entries
    for end, heads, witness in _TIED:
        found = _ending(stored, [end])
        if len(found) == 1 and witness in stored and not any(f"{head}.weight" in stored for head in heads):
            return dict.fromkeys(heads, found[0].removesuffix(".weight"))
    return {}


def _ending(stored: Iterable[str], ends: Iterable[str]) -> list[str]:
    """Return the names of the weights of modules whose paths end in one of some paths."""
    suffixes = tuple(f".{end}.weight" for end in ends)
    return [name for name in stored if f".{name}".endswith(suffixes)]


def _embeddings(checkpoint: Checkpoint) -> list[str]:
    return _ending(checkpoint.entries, _EMBEDDINGS)


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Return whether a head is stored that differs from every embedding."""
    heads, embeddings = _ending(checkpoint.entries, _HEADS), _embeddings(checkpoint)
    return bool(heads) and not any(_equal(checkpoint, head, one) for head in heads for one in embeddings)


def _equal(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Return whether two matrices are equal, as far as rows from all over them tell."""
    first, second = checkpoint.entries[head], checkpoint.entries[embedding]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or first.dtype in FOREIGN or len(first.shape) != 2:
        return False
    rows = sorted({int(row) for row in np.linspace(0, first.shape[0] - 1, 64)}) if first.shape[0] else []
    return all(np.array_equal(checkpoint.array(head, row), checkpoint.array(embedding, row)) for row in rows)
