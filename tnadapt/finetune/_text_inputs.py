"""Texts as the tokens of a model: its tokenizer, its limits, and the checks that the two fit together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tnadapt.checkpoints.gguf_place import gguf_place, need_gguf
from tnadapt.errors import TnadaptError, safe_repr

from ._data import Samples
from ._encode import Texts
from ._foreign_messages import refused, silent
from ._learning_task import LearningTask
from ._specification import Part

__all__ = ["encoded", "lengths", "longest_text", "tokenizer_of"]

LONGEST = 256


def tokenizer_of(name: str, transformers: Any, *, split_words: bool = False, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder, GGUF file or hub name, with a padding token.

    With ``split_words``, it takes lists of words. No code that comes with a tokenizer is run.

    Raises
    ------
    TnadaptError
        If there is none, or it has no token that can serve as padding.
    """
    way = "; give a folder or hub name that has one with --tokenizer"
    folder, file = gguf_place(name)
    if file:
        need_gguf(name)
    what = f"no tokenizer in {safe_repr(name)} that transformers can open"
    if Path(folder).is_dir() and not file and not Path(folder, "tokenizer.json").exists():
        what += " (the folder has no tokenizer.json)"
    with refused(what, way), silent(transformers):
        settings: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
        settings |= {"gguf_file": file} if file else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **settings)
        if split_words and getattr(tokenizer, "add_prefix_space", None) is False:
            # Byte-level tokenizers take words that are split already only with this. It adds a space to other texts.
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True, **settings)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        # Some classes, such as RAG's, hold tokenizers and are none.
        raise TnadaptError(
            f"the tokenizer of {safe_repr(name)} is a {type(tokenizer).__name__}, not one for texts{way}"
        )
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise TnadaptError(
            f"model_max_length of the tokenizer of {safe_repr(name)} must be a number from 1; got {safe_repr(longest)}"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TnadaptError(f"the tokenizer of {name} has neither a padding token nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lengths(tokenizer: Any, model: Any) -> tuple[int, int]:
    """Return the least and the most tokens that texts can be cut to."""
    most = min(getattr(model.config, "max_position_embeddings", None) or 1 << 30, tokenizer.model_max_length)
    return tokenizer.num_special_tokens_to_add() + 1, most


def longest_text(given: int | None, name: str, tokenizer: Any, model: Any) -> int:
    """Return the tokens to which texts are cut.

    Raises
    ------
    TnadaptError
        If the length that the user gave is not possible.
    """
    least, most = lengths(tokenizer, model)
    longest = given or min(LONGEST, most)
    if not least <= longest <= most:
        raise TnadaptError(f"--max-length must be from {least} to {most} for {safe_repr(name)}; got {longest}")
    return int(longest)


def encoded(
    task: LearningTask, samples: Mapping[str, Samples], tokenizer: Any, longest: int, model: Any, name: str
) -> dict[str, Part]:
    """Return the parts as tokens, after checking them.

    Raises
    ------
    TnadaptError
        If a text has no token, none has a known word, or the model does not know a token.
    """
    known = model.get_input_embeddings().num_embeddings
    special = torch.tensor(tokenizer.all_special_ids)
    parts: dict[str, Part] = {}
    for part, some in samples.items():
        texts = task.encode(some, tokenizer, longest)
        assert isinstance(texts, Texts)
        # If the folder has no tokenizer, transformers returns one without a vocabulary.
        if all(bool(torch.isin(tokens, special).all()) for tokens in texts.tokens):
            raise TnadaptError(
                f"{safe_repr(name)} has no tokenizer, or one that knows no word of the texts; give a folder or hub "
                "name with one as --tokenizer"
            )
        if texts.lengths is not None and not bool(texts.lengths.all()):
            empty = some.inputs[int(texts.lengths.argmin())]
            raise TnadaptError(f"the tokenizer of {safe_repr(name)} finds no token in {safe_repr(empty)}")
        top = max((int(tokens.max()) for tokens in texts.tokens if len(tokens)), default=0)
        if top >= known:
            raise TnadaptError(
                f"the tokenizer returned token {top}, but the model has only {known} tokens: they do not fit together"
            )
        parts[part] = texts
    return parts
