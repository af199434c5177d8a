"""Arrays from untrusted archives: claimed sizes are checked against the bytes present before memory is allocated."""

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

#: Limit on the total bytes of an archive's arrays: 16 GiB.
LARGEST = 1 << 34
#: The largest expansion of Deflate: two bits become at most 258 bytes.
DEFLATED = 1032
_PIECE = 1 << 20


def filled(file: io.BufferedIOBase, shape: tuple[int, ...], dtype: DTypeLike, most: int) -> NDArray[np.generic]:
    """Read an array from the next bytes of a file.

    Parameters
    ----------
    file : io.BufferedIOBase
    shape : tuple of int
    dtype : DTypeLike
        A dtype of numbers or words.
    most : int
        The largest number of bytes that the file can have, decompressed.

    Returns
    -------
    numpy.ndarray
        A new array of that shape, read in pieces of one mebibyte.

    Raises
    ------
    ValueError
        If the array would be larger than :data:`LARGEST` or ``most``.
    EOFError
        If the file ends too early.

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
    """Read arrays from an ``.npz``; also return the names of everything in it.

    Parameters
    ----------
    path : Path
    names : set of str
        The arrays to read, in lower case.

    Returns
    -------
    arrays : dict of numpy.ndarray
        By their names in lower case.
    known : list of str
        The names of all entries.

    Raises
    ------
    ValueError
        If an array does not hold numbers or words, is larger or smaller than it claims, or the total exceeds
        :data:`LARGEST`.
    Exception
        Any error of zipfile or NumPy for a damaged file.

    Notes
    -----
    An array may be up to a thousand times larger than its file, as Deflate compresses images of a single color so.

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
        # Other decompressors return everything that a piece expands to at once, without a limit.
        raise ValueError(
            f"{entry.filename} is compressed with method {entry.compress_type}; expected one that NumPy writes"
        )
    with archive.open(entry) as opened:
        file = cast(io.BufferedIOBase, opened)
        if np.lib.format.read_magic(file) != (1, 0):  # later versions allow headers of any length
            raise ValueError(f"{entry.filename} is not a plain NumPy array (.npy version 1.0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "biufcSU" or not dtype.itemsize:
            raise ValueError(f"{entry.filename} is of type {dtype}; expected numbers or words")
        size = math.prod(shape) * dtype.itemsize
        if size != entry.file_size - file.tell() or size > left:
            raise ValueError(
                f"{entry.filename} claims {size:,} bytes, and has {entry.file_size - file.tell():,}; "
                "all arrays together may have at most 16 GiB"
            )
        # The archive's own record of sizes may be wrong, too, so the size of the file is the limit.
        most = min(entry.compress_size, there) * (DEFLATED if entry.compress_type else 1)
        array = filled(file, shape[::-1] if fortran else shape, dtype, most)
        file.read(1)  # reading to the end makes zipfile check the CRC
    return array.T if fortran else array
