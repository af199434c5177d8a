"""Texts as the tokens of a model: its tokenizer, its limits, and the checks that the two fit together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tnadapt.checkpoints.checkpoint import gguf_place, need_gguf
from tnadapt.errors import TnadaptError, safe_repr

from ._encode import Images, Texts, refused, silent
from ._learning_task import LearningTask
from ._specification import Part
from .data import Samples

__all__ = [
    "divided_images",
    "encoded",
    "image_settings",
    "lengths",
    "longest_text",
    "require_whole_patches",
    "tokenizer_of",
]


# -- Texts as the tokens of a model: its tokenizer, its limits, and the checks that the two fit together ---------------


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


# -- Images as the pixels of a model: their size and normalization -----------------------------------------------------


def image_settings(name: str, transformers: Any, config: Any, given: int | None) -> tuple[int, int, Any]:
    """Return size, channels, and mean and deviation of the pixels that a model was trained with; None if unknown."""
    processor = _processor(name, transformers)
    size = given or _side(processor.get("crop_size")) or _side(processor.get("size"))
    size = size or _side(getattr(config, "image_size", None)) or 224
    if given is not None:
        require_whole_patches(given, getattr(config, "patch_size", None))
    statistics = processor.get("image_mean"), processor.get("image_std")
    return size, int(getattr(config, "num_channels", 3)), None if None in statistics else statistics


def _processor(name: str, transformers: Any) -> dict[str, Any]:
    """Return the image settings that come with a model; empty if there are none."""
    with contextlib.suppress(Exception), silent(transformers):
        return dict(transformers.AutoImageProcessor.from_pretrained(name).to_dict())
    return {}


def divided_images(
    samples: Mapping[str, Samples], size: int, channels: int, given: Any
) -> Iterator[tuple[str, Images]]:
    """Yield the parts as images with the same normalization: the model's, or that of the training images."""
    if channels not in (1, 3):
        raise TnadaptError(f"the model takes images of {channels} channels; only 1 and 3 are supported")
    statistics = None
    if given is not None:
        mean, std = (torch.tensor(numbers, dtype=torch.float32).expand(channels)[:, None, None] for numbers in given)
        statistics = mean, std
    for part, some in samples.items():
        images = Images(some, size, channels, statistics)
        statistics = images.statistics
        yield part, images


def require_whole_patches(size: int, patch: Any) -> None:
    """Raise a TnadaptError unless images of a size are whole patches: most models would cut off the rest silently.

    Parameters
    ----------
    size : int
        Pixels per side.
    patch : int or sequence or mapping of int, optional
        Pixels per side of a patch; None if the model has no patches.
    """
    side = _side(patch)
    if side and size % side:
        below, above = size // side * side, -(-size // side) * side
        near = f"{below} or {above}" if below else above
        raise TnadaptError(
            f"--image-size {size} is not a multiple of the model's patches of {side} pixels; give {near}"
        )


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, (list, tuple)):
        size = size[0]
    return int(size) if size else None
