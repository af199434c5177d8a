"""A plot of generated images, one row per setting, to compare with the measures."""

from __future__ import annotations

import os
from collections.abc import Sequence

from numpy.typing import ArrayLike

from tnadapt.plot.canvas import ink, pale, saved

__all__ = ["generated"]


def generated(
    rows: Sequence[tuple[str, ArrayLike]], path: str | os.PathLike[str], title: str = "", note: str = ""
) -> None:
    """Draw rows of images, each with a caption on the left, into a file.

    Parameters
    ----------
    rows : sequence of (str, array_like)
        A caption of up to two lines, and bytes of shape (n, height, width, 1 or 3).
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    title, note : str
        Text above the plot, and small text below.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    Ten grey images::

        generated([("LoRA, r = 1", np.zeros((10, 16, 16, 1), np.uint8))], "generated.png")
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = [(words, np.asarray(pixels, np.uint8)) for words, pixels in rows]
    most = max(len(pixels) for _, pixels in images)
    # A letter of the caption takes about 0.06 inches; a row is as high as an image is wide.
    margin = 0.2 + 0.06 * max(len(line) for words, _ in images for line in words.split("\n"))
    width, height = margin + 0.52 * most, 0.54 * len(rows) + 0.7
    drawn = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(drawn)
    drawn.subplots_adjust(margin / width, 0.35 / height, 0.995, 1.0 - 0.35 / height, hspace=0.06)
    grid = drawn.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (words, pixels) in zip(grid, images, strict=True):
        shown = pixels if pixels.shape[-1] == 3 else pixels.repeat(3, -1)
        # A white gap between images: a tile is a twelfth wider than its image.
        gap = max(1, shown.shape[2] // 12)
        tiles = np.pad(shown, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(list(tiles), 1), interpolation="nearest")
        axes.set_axis_off()
        axes.text(-0.01, 0.5, words, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=ink())
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, color=ink(), parse_math=False)
    if note:
        drawn.supxlabel(note, x=0.01, ha="left", fontsize=7, color=pale(), parse_math=False)
    saved(drawn, path)
