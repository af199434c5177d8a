"""Tiny image data sets in the file formats of the real ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def drawn(count: int, size: int, seed: int) -> tuple[Pixels, NDArray[np.uint8]]:
    """Noise with a bright square whose position determines the class."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    pixels = random.integers(0, 60, (count, size, size), dtype=np.uint8)
    third = size // 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[row * third : (row + 1) * third, column * third : (column + 1) * third] = 250
    return pixels, labels


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(
    folder: Path, training: int = 60, test: int = 40, size: int = 28, seed: int = 0, pack: bool = False
) -> None:
    """Write MNIST's four files."""
    folder.mkdir(parents=True)
    for name, count, place in (("train", training, seed), ("t10k", test, seed + 1)):
        pixels, labels = drawn(count, size, place)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{name}-{kind}-ubyte"
            if pack:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


def write_svhn(folder: Path, training: int = 40, test: int = 40) -> None:
    """Write SVHN's two files, in which label 10 is the digit 0."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    for name, count, seed in (("train", training, 5), ("test", test, 6)):
        pixels, labels = drawn(count, 32, seed)
        colours = np.stack([pixels, pixels // 2, pixels // 4], -1).transpose(1, 2, 3, 0)
        savemat(folder / f"{name}_32x32.mat", {"X": colours, "y": np.where(labels == 0, 10, labels)[:, None]})
