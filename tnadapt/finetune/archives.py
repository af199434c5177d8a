"""Arrays in archives of others: before memory is taken, what is claimed is compared with the bytes that are there."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tnadapt.errors import safe_repr

__all__ = ["DEFLATED", "LARGEST", "filled", "read_npz"]

#: Bytes of all arrays of one archive together: 16 GiB.
LARGEST = 1 << 34
#: How many bytes one byte of Deflate may become: 258 of two bits.
DEFLATED = 1032
_PIECE = 1 << 20


def filled(file: io.BufferedIOBase, shape: tuple[int, ...], dtype: DTypeLike, most: int) -> NDArray[np.generic]:
    """An array of the next bytes of a file.

    Parameters
    ----------
    file : io.BufferedIOBase
    shape : tuple of int
    dtype : DTypeLike
        Of numbers or words.
    most : int
        How many bytes the file can have, unpacked.

    Returns
    -------
    numpy.ndarray
        Of that shape, in memory of its own; read in pieces of a mebibyte.

    Raises
    ------
    ValueError
        If more is claimed than :data:`LARGEST`, or than it can have.
    EOFError
        If it ends too early.

    Examples
    --------
    >>> filled(io.BytesIO(bytes([1, 2, 3, 4])), (2, 2), np.uint8, most=4).tolist()
    [[1, 2], [3, 4]]
    >>> filled(io.BytesIO(bytes([1, 2, 3, 4])), (2, 3), np.uint8, most=4)
    Traceback (most recent call last):
        ...
    ValueError: it claims an array of 6 bytes, and can have 4 at the most
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if min(shape, default=0) < 0 or size > LARGEST:
        raise ValueError(f"it claims an array of shape {safe_repr(shape)}; 16 GiB are read at the most")
    if size > most:
        raise ValueError(f"it claims an array of {size:,} bytes, and can have {most:,} at the most")
    array = np.empty(math.prod(shape), dtype)
    if not size:
        return array.reshape(shape)
    rest = array.view(np.uint8).data
    while rest:
        found = file.readinto(rest[:_PIECE])
        if not found:
            raise EOFError(f"it ends {len(rest):,} bytes too early")
        rest = rest[found:]
    return array.reshape(shape)


def read_npz(path: Path, names: Set[str]) -> tuple[dict[str, NDArray[np.generic]], list[str]]:
    """Arrays of an ``.npz``, and the names of all that is in it.

    Parameters
    ----------
    path : Path
    names : set of str
        Which to read, in small letters.

    Returns
    -------
    arrays : dict of numpy.ndarray
        By their names in small letters.
    known : list of str
        The names of all that there are.

    Raises
    ------
    ValueError
        If one is none of numbers or words, is larger or smaller than it claims, or all are larger than :data:`LARGEST`.
    Exception
        Whatever zipfile and NumPy make of a damaged file.

    Notes
    -----
    An array may be as much larger than its file as Deflate makes it, a thousandfold at the most: of images that are
    one colour it is.

    Examples
    --------
    >>> np.savez("two.npz", x=np.arange(3), z=np.arange(2))
    >>> arrays, known = read_npz(Path("two.npz"), {"x", "y"})
    >>> arrays["x"].tolist(), list(arrays), known
    ([0, 1, 2], ['x'], ['x', 'z'])
    """
    arrays = dict[str, NDArray[np.generic]]()
    with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        there = os.fstat(raw.fileno()).st_size
        known = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
        for name, entry in zip(known, archive.infolist(), strict=True):
            if name.lower() not in names:
                continue
            if name.lower() in arrays:
                raise ValueError(f"it has more than one array {name.lower()}")
            left = LARGEST - sum(array.nbytes for array in arrays.values())
            arrays[name.lower()] = _member(archive, entry, there, left)
    return arrays, known


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, there: int, left: int) -> NDArray[np.generic]:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others' unpackers give all that a piece holds at once.
        raise ValueError(f"{entry.filename} is packed by method {entry.compress_type}, and not by NumPy's")
    with archive.open(entry) as opened:
        file = cast(io.BufferedIOBase, opened)
        if np.lib.format.read_magic(file) != (1, 0):  # later ones are for headers of any length
            raise ValueError(f"{entry.filename} is no plain array of NumPy's")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "biufcSU" or not dtype.itemsize:
            raise ValueError(f"{entry.filename} is of type {dtype}; expected numbers or words")
        size = math.prod(shape) * dtype.itemsize
        if size != entry.file_size - file.tell() or size > left:
            raise ValueError(
                f"{entry.filename} claims {size:,} bytes, and has {entry.file_size - file.tell():,}; "
                "all together may have 16 GiB"
            )
        # What the archive says of its own sizes may be wrong, too.
        most = min(entry.compress_size, there) * (DEFLATED if entry.compress_type else 1)
        array = filled(file, shape[::-1] if fortran else shape, dtype, most)
        file.read(1)  # at the end the sum of all bytes is checked
    return array.T if fortran else array
