"""Image data sets of ten classes in their original files: MNIST, Fashion-MNIST, SVHN."""

from __future__ import annotations

import dataclasses
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io.matlab import MatReadError
from torch import Tensor

from tnadapt.errors import FileError, TnadaptError

__all__ = ["CLASSES", "DATASETS", "ImageSet", "balanced", "missing_files", "read_images"]

CLASSES = 10

_IDX = ("mnist", "fashion-mnist")
# Bytes of an array, and the largest expansion of Deflate: two bits become at most 258 bytes.
_LARGEST, _DEFLATED = 1 << 34, 1032
DATASETS = (*_IDX, "svhn")
#: The files of each set's folder; the IDX files may be gzipped.
FILES = {
    **dict.fromkeys(
        _IDX, ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    ),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Attributes
    ----------
    pixels : Tensor of float32, shape (n, channels, size, size)
        From -1 to 1.
    labels : Tensor of int64, shape (n,)
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, some: slice | Tensor) -> ImageSet:
        return ImageSet(self.pixels[some], self.labels[some])


def balanced(images: ImageSet, count: int, seed: int = 0) -> ImageSet:
    """Return ``count`` images, or all: cycling through the classes, in a random order within each class.

    Images are also generated cycling through the classes, so any two prefixes of equal length have the same classes, as
    long as no class runs out.

    Parameters
    ----------
    images : ImageSet
        With labels from 0 to 9.
    count : int
    seed : int
        Seed of torch's generator on the CPU.

    Returns
    -------
    ImageSet
        The first ``count``, copied.

    Examples
    --------
    >>> some = ImageSet(torch.zeros(50, 1, 2, 2), torch.arange(50) // 5)
    >>> balanced(some, 20).labels.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    turn = torch.zeros_like(labels)
    for label in range(CLASSES):
        own = labels == label
        turn[own] = torch.arange(int(own.sum()))
    return images[order[(turn * CLASSES + labels).argsort(stable=True)][:count]]


def missing_files(name: str, folder: Path) -> list[str]:
    """Return which of the original files of a set are not in its folder.

    Examples
    --------
    >>> missing_files("mnist", Path("nowhere"))[0]
    'train-images-idx3-ubyte'
    """
    return [file for file in FILES[name] if not _there(folder / name / file)]


def read_images(name: str, folder: Path, size: int, channels: int, test: bool = False) -> ImageSet:
    """Read a set of images, resized to squares, in grey or color.

    Parameters
    ----------
    name : {"mnist", "fashion-mnist", "svhn"}
    folder : Path
        Must contain a folder of this name with the original files.
    size : int
        Pixels per side; images of another size are scaled with antialiasing.
    channels : {1, 3}
        Grey images are repeated for three channels; colors are averaged for one.
    test : bool
        Read the test images instead of the training images.

    Returns
    -------
    ImageSet
        In the order of the files.

    Raises
    ------
    TnadaptError
        If the set is unknown, or its folder or a file does not exist.
    FileError
        If a file is damaged.

    Examples
    --------
    MNIST at the size of the miniature, from ``data/mnist/train-images-idx3-ubyte`` and its labels::

        read_images("mnist", Path("data"), size=16, channels=1).pixels.shape
    """
    if name not in DATASETS:
        raise TnadaptError(f"images must be one of {', '.join(DATASETS)}; got {name!r}")
    place = folder / name
    if missing := missing_files(name, folder):
        raise TnadaptError(
            f"no {missing[0]} in {place}; give --data a folder with a folder {name!r} that holds "
            f"{', '.join(FILES[name])}"
        )
    try:
        pixels, labels = _svhn(place, test) if name == "svhn" else _idx_pair(place, test)
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        struct.error,
        zlib.error,
        NotImplementedError,
        TypeError,
        MatReadError,
    ) as error:
        raise FileError(f"cannot read the images in {place}: {error}; fetch them again") from None
    return ImageSet(_square(pixels, size, channels), torch.from_numpy(labels.astype(np.int64)))


def _there(path: Path) -> bool:
    return path.is_file() or path.with_name(path.name + ".gz").is_file()


def _idx_pair(place: Path, test: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = (_idx(place / file) for file in FILES["mnist"][2 * test :][:2])
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise ValueError(f"images of shape {images.shape} with labels of shape {labels.shape}")
    return images[..., None], labels


def _filled(file: Any, shape: tuple[int, ...], most: int) -> NDArray[np.uint8]:
    """Read an array of bytes from a file that can have ``most`` bytes, decompressed; it is read in pieces."""
    size = math.prod(shape)
    if size > _LARGEST:
        raise ValueError(f"it claims an array of shape {shape}; 16 GiB are read at the most")
    if size > most:
        raise ValueError(f"it claims an array of {size:,} bytes, and can have {most:,} at the most")
    array = np.empty(size, np.uint8)
    rest = array.data
    while rest:
        count = file.readinto(rest[: 1 << 20])
        if not count:
            raise EOFError(f"it ends {len(rest):,} bytes too early")
        rest = rest[count:]
    return array.reshape(shape)


def _idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file: two zero bytes, the type 8, the number of axes, their sizes (big-endian), then the elements."""
    plain = path.is_file()
    path = path if plain else path.with_name(path.name + ".gz")
    with open(path, "rb") if plain else gzip.open(path) as file:
        zeros, kind, axes = struct.unpack(">HBB", file.read(4))
        if zeros or kind != 8:
            raise ValueError(f"{path.name} is not an IDX file of bytes")
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        array = _filled(file, shape, path.stat().st_size * (1 if plain else _DEFLATED))
        if file.read(1):
            raise ValueError(f"{path.name} is longer than an array of shape {shape}")
    return array


def _svhn(place: Path, test: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read SVHN's MATLAB file, which has pixels as (rows, columns, colors, n), and the label 10 for the digit 0."""
    from scipy.io import loadmat

    found = loadmat(place / FILES["svhn"][test], variable_names=("X", "y"))
    pixels, labels = found["X"].transpose(3, 0, 1, 2), found["y"].reshape(-1)
    if not (np.equal(labels, np.floor(labels)) & (labels >= 1) & (labels <= 10)).all():
        raise ValueError("labels that are not 1 to 10")
    labels = labels % 10
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
        raise ValueError(f"pixels of {pixels.dtype} and shape {pixels.shape} with labels of shape {labels.shape}")
    return pixels, labels


def _square(pixels: NDArray[np.uint8], size: int, channels: int) -> Tensor:
    """Convert bytes ``(n, height, width, colours)`` to float32 ``(n, channels, size, size)``, in chunks."""
    found = []
    for some in torch.split(torch.from_numpy(np.ascontiguousarray(pixels)), 4096):
        part = some.permute(0, 3, 1, 2).float()
        if part.shape[-2:] != (size, size):
            part = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
        if part.shape[1] != channels:
            part = part.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        found.append((part / 127.5 - 1.0).clamp(-1.0, 1.0).contiguous())
    return torch.cat(found)
