"""A model's inputs: texts as its tokens and images as its pixels, and the libraries that prepare both."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tnadapt.checkpoints.checkpoint import gguf_place, need_gguf
from tnadapt.errors import FileError, TnadaptError, safe_repr
from tnadapt.report import silent

from .data import Samples, first_line

# -- Texts as tokens ---------------------------------------------------------------------------------------------------


#: The target of tokens that do not contribute to the loss.
IGNORED = -100

# Tokens to which texts are cut unless the user or the model says otherwise.
LONGEST = 256


class Texts:
    """Texts as tokens, padded batch by batch: a part of a :class:`~tnadapt.finetune.Problem`.

    Parameters
    ----------
    tokens : sequence of sequence of int
    labels : Tensor
        The targets, one row for each text; see :func:`token_targets` for a target for each token.
    pad : int
        The token of padding.
    words : sequence of sequence of int
        The place of each word that has a target, in its text, where the texts are lists of words.
    """

    def __init__(
        self, tokens: Sequence[Sequence[int]], labels: Tensor, pad: int, words: Sequence[Sequence[int]] = ()
    ) -> None:
        self.tokens = [torch.tensor(row, dtype=torch.int64) for row in tokens]
        self.lengths: Tensor | None = torch.tensor([len(row) for row in tokens])
        self.labels, self.pad, self.words = labels, pad, words

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, both of shape (n, longest)."""
        chosen = [self.tokens[int(i)] for i in indices]
        padded = pad_sequence(chosen, batch_first=True, padding_value=self.pad)
        mask = pad_sequence([torch.ones_like(tokens) for tokens in chosen], batch_first=True)
        return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


def token_targets(targets: Sequence[Sequence[int]]) -> Tensor:
    """Return a target for each token; :data:`IGNORED` for that of padding."""
    rows = [torch.tensor(row, dtype=torch.int64) for row in targets]
    return pad_sequence(rows, batch_first=True, padding_value=IGNORED)


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
            # Byte-level tokenizers accept pre-split words only with this setting. It adds a space to other texts.
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True, **settings)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        # Some classes, such as RAG's, hold tokenizers but are not tokenizers.
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


# -- Images as pixels --------------------------------------------------------------------------------------------------


# Images of more bytes than this are not kept in memory but read again for each batch.
KEPT_BYTES = 2 << 30


class Images:
    """Square images of one size, normalized batch by batch: a part of a :class:`~tnadapt.finetune.Problem`.

    The shorter side is scaled to the size, and the center cropped.

    Parameters
    ----------
    samples : Samples
    size : int
        Pixels per side.
    channels : int
        3, or 1 for grey.
    statistics : (mean, std), optional
        Per channel; computed from these images if None.
    """

    lengths: Tensor | None = None

    def __init__(
        self, samples: Samples, size: int, channels: int, statistics: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.inputs, self.size, self.channels = samples.inputs, size, channels
        self.labels = torch.from_numpy(samples.labels)
        kept = len(samples) * channels * size**2 <= KEPT_BYTES
        self.pixels: Tensor | None = None
        if kept:
            self.pixels = self._pixels_of(torch.arange(len(samples)))
            del self.inputs
        self.statistics = statistics or self._statistics()

    def batch(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return images ``(n, channels, size, size)``, float32."""
        mean, std = (numbers.to(device) for numbers in self.statistics)
        return (self._pixels_of(indices).to(device).float() / 255 - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        some = torch.arange(min(2000, len(self.labels)))
        images = (self._pixels_of(index)[0].double() / 255 for index in torch.split(some, 1))
        moments = torch.stack([torch.stack([x.mean((1, 2)), x.square().mean((1, 2))]) for x in images]).mean(0)
        mean, std = moments[0], (moments[1] - moments[0].square()).clamp_min(1e-6).sqrt()
        return mean.float()[:, None, None], std.float()[:, None, None]

    def _pixels_of(self, indices: Tensor) -> Tensor:
        if self.pixels is not None:
            return self.pixels[indices]
        pixels = np.empty((len(indices), self.channels, self.size, self.size), np.uint8)
        for place, index in enumerate(indices.tolist()):
            pixels[place] = _pixels(self.inputs[index], self.size, self.channels)
        return torch.from_numpy(pixels)


def _pixels(image: Any, size: int, channels: int) -> NDArray[np.uint8]:
    """Crop, scale and convert one image of any kind to ``(channels, size, size)``."""
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if isinstance(image, np.ndarray) and image.shape == (size, size, channels):  # nothing to convert or scale
        return np.moveaxis(image, 2, 0)
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise TnadaptError("images are read with Pillow, which is not installed: pip install 'tnadapt[hub]'") from None
    mode = "RGB" if channels == 3 else "L"
    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    if isinstance(image, Path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(image) as opened:
                    picture = _eight_bits(opened).convert(mode)
        except (OSError, ValueError, SyntaxError, *bombs) as error:
            raise FileError(f"cannot read the image {image}: {error}") from None
    elif isinstance(image, np.ndarray):
        picture = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert(mode)
    else:
        picture = _eight_bits(image).convert(mode)
    array = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC), np.uint8)
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _eight_bits(picture: Any) -> Any:
    """Convert a picture of 16 bits per pixel to 8 bits without clipping at 255, as Pillow would."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    from PIL import Image

    numbers = np.asarray(picture, np.float64)
    low, high = numbers.min(), numbers.max()
    if picture.mode == "F" or low < 0 or high > 65535:
        raise FileError(f"the pixels of an image go from {low:g} to {high:g}; expected integers of 8 or 16 bits")
    wide = picture.mode != "I" or high > 255
    return Image.fromarray(np.rint(numbers / 257 if wide else numbers).astype(np.uint8))


def image_settings(name: str, transformers: Any, config: Any, given: int | None) -> tuple[int, int, Any]:
    """Return size, channels, and mean and deviation of the pixels that a model was trained with; None if unknown."""
    processor: dict[str, Any] = {}  # the image settings that come with a model, if there are any
    with contextlib.suppress(Exception), silent(transformers):
        processor = dict(transformers.AutoImageProcessor.from_pretrained(name).to_dict())
    size = given or _side(processor.get("crop_size")) or _side(processor.get("size"))
    size = size or _side(getattr(config, "image_size", None)) or 224
    if given is not None:
        require_whole_patches(given, getattr(config, "patch_size", None))
    statistics = processor.get("image_mean"), processor.get("image_std")
    return size, int(getattr(config, "num_channels", 3)), None if None in statistics else statistics


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


# -- Errors and messages of the libraries that load models -------------------------------------------------------------


@contextlib.contextmanager
def refused(what: str, way: str = "") -> Iterator[None]:
    """Turn any error of a hub, proxy or loader into a one-line TnadaptError with a way out."""
    try:
        yield
    except TnadaptError:
        raise
    except Exception as error:
        raise TnadaptError(f"{what}: {first_line(error).rstrip('.') if way else first_line(error)}{way}") from None


def transformers_library() -> Any:
    """Return transformers.

    Raises
    ------
    TnadaptError
        If it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise TnadaptError(
            "models are loaded with transformers, which is not installed: pip install 'tnadapt[hub]'"
        ) from None
    return transformers
