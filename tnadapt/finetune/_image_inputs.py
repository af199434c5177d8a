"""Images as the pixels of a model: their size and normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tnadapt.errors import TnadaptError

from ._data import Samples
from ._encode import Images
from ._foreign_messages import silent

__all__ = ["divided_images", "image_settings", "require_whole_patches"]


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
