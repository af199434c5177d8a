"""The shapes of the weights that the paper adapts, so that parameters can be counted without a model."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["WEIGHTS", "AdaptedWeights"]


class AdaptedWeights(NamedTuple):
    """The adapted weights of a model.

    Attributes
    ----------
    what : str
        Description in words.
    shapes : tuple of (rows, cols)
        In the order of the vector of all updates.
    layers : tuple of str
        The layer of each weight.
    """

    what: str
    shapes: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]


def _query_and_value(what: str, widths: list[int]) -> AdaptedWeights:
    """Return a square query and value projection for each attention module of these widths."""
    shapes = tuple((width, width) for width in widths for _ in "qv")
    return AdaptedWeights(what, shapes, tuple(str(number) for number in range(len(widths)) for _ in "qv"))


#: By their names in recipes. The U-Net's 21 attention modules have 64 or 128 channels (A.2): one after each of the two
#: residual blocks per level, of 1, 2, 2 and 2 times 64 channels, one in the middle, and three per level on the way up.
WEIGHTS = {
    "vit-base": _query_and_value("query and value of ViT-base, 12 layers of 768", [768] * 12),
    "vit-small": _query_and_value("query and value of ViT-S, 12 layers of 384", [384] * 12),
    "minilm": _query_and_value("query and value of MiniLM, 6 layers of 384", [384] * 6),
    "unet": _query_and_value(
        "query and value of the diffusion U-Net, 21 modules of 64 or 128 channels",
        [64] * 2 + [128] * 6 + [128] + [128] * 9 + [64] * 3,
    ),
    "unet-small": _query_and_value(
        "query and value of a diffusion U-Net of half the width, 21 modules of 32 or 64 channels",
        [32] * 2 + [64] * 6 + [64] + [64] * 9 + [32] * 3,
    ),
    "digits": _query_and_value("query and value of the digits' ViT, 4 layers of 64", [64] * 4),
}
