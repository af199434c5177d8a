"""Strict reader and writer of the safetensors container, independent of adapters.

A file consists of the length of the header in 8 bytes, little-endian; the header, a JSON object padded with white
space; and the tensors' bytes, little-endian, in C order, one after another. The header maps each tensor's name to
``{"dtype": …, "shape": […], "data_offsets": [begin, end]}``, with offsets counted from the end of the header, and
``__metadata__`` to an object of strings. Reading a file, whatever its content, yields arrays or raises a FileError, and
memory for a tensor is allocated only once its bytes are known to be present.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tnadapt.errors import FileError, TnadaptError, escaped, safe_repr

from ._header import raw_dtype, read_header
from ._header_entries import DTYPES, FOREIGN, Entries, Entry

__all__ = [
    "DTYPES",
    "FOREIGN",
    "Container",
    "Entry",
    "check_held",
    "file_error_context",
    "held_bytes",
    "opened",
    "path_of",
    "raw_bytes",
    "raw_dtype",
    "serialized",
]

#: Half of what safetensors itself allows. The header of 100,000 tensors, as in the largest models, takes about 15 MB.
MAX_HEADER = 1 << 26
# A file may claim up to _HOLES bytes more than _PACKED times the bytes allocated on disk, to allow for file systems
# that compress or omit zeros.
_HOLES, _PACKED = 1 << 26, 8


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


class Container:
    """An open safetensors file with a valid header.

    Attributes
    ----------
    entries : mapping of str to Entry
        By the tensors' names, in the order of their bytes.
    metadata : mapping of str to str
    data : int
        Position in the file where the tensors begin.
    held : int
        Bytes of the file that are allocated on disk.
    """

    def __init__(self, file: io.BufferedReader, size: int, foreign: bool = False, held: int | None = None) -> None:
        head = file.read(16)
        length = _header_length(head, size)
        file.seek(8)
        self._file, self.data = file, 8 + length
        self.entries, self.metadata = read_header(file.read(length), foreign)
        _check_cover(self.entries, size - self.data)
        self._size, self.held = size, size if held is None else held

    def array(self, name: str) -> np.ndarray:
        """Read a tensor as a little-endian array; bfloat16 as uint16 bit patterns."""
        entry = self.entries[name]
        if entry.dtype in FOREIGN:
            raise FileError(
                f"{safe_repr(name)} is {entry.dtype}, which NumPy does not have: its bytes can be copied, no more"
            )
        # Check the whole file, as a caller that reads one tensor reads the others as well.
        check_held(self._size, self.held, "the file", self._file)
        made = np.empty(entry.shape, raw_dtype(entry.dtype))
        self._file.seek(self.data + entry.start)
        # A tensor without elements has no bytes to read.
        if made.size and self._file.readinto(raw_bytes(made)) != made.nbytes:
            raise FileError(f"the file ended within {safe_repr(name)}, while it was read")
        if entry.dtype == "BOOL" and made.size and made.view(np.uint8).max() > 1:
            raise FileError(f"{safe_repr(name)} is BOOL and has bytes other than 0 and 1")
        return made


def held_bytes(state: os.stat_result) -> int:
    """Return how many bytes of a file are allocated on disk; its size if the system does not tell."""
    return 512 * state.st_blocks if hasattr(state, "st_blocks") else state.st_size


def check_held(claimed: int, held: int, what: str, file: io.BufferedReader | io.FileIO | None = None) -> None:
    """Raise FileError for a file that consists of holes, which take no space on disk but their full size in memory.

    Parameters
    ----------
    claimed : int
        The size that the file claims.
    held : int
        The result of :func:`held_bytes`, which is too low for a file that ZFS has not committed yet, that is highly
        compressible, or that lies on a server.
    what : str
        Name of the file in messages.
    file : file, optional
        If ``held`` is too low, the data of this file are counted instead. Its position is unchanged.

    Examples
    --------
    >>> check_held(1 << 30, 1 << 29, "the file")
    >>> check_held(1 << 40, 4096, "the file")
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: the file has a size of 1,099,511,627,776 bytes, and the disk holds 4,096 of it: the rest \
is holes, and was not read
    """
    if claimed > _HOLES + _PACKED * held and file is not None:
        held = max(held, _data_bytes(file.fileno(), claimed // _PACKED + 1))
    if claimed > _HOLES + _PACKED * held:
        raise FileError(
            f"{what} has a size of {claimed:,} bytes, and the disk holds {held:,} of it: the rest is holes, and was "
            "not read"
        )


def _data_bytes(handle: int, enough: int) -> int:
    """Count the bytes of a file outside of holes, up to ``enough``; return its size if the system cannot tell."""
    size = os.fstat(handle).st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    before = os.lseek(handle, 0, os.SEEK_CUR)
    found = at = 0
    try:
        while found < enough:
            start = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, start, os.SEEK_HOLE)
            found += at - start
    except OSError as error:
        return found if error.errno == errno.ENXIO else size  # ENXIO: nothing but a hole from there on
    finally:
        os.lseek(handle, before, os.SEEK_SET)
    return found


# The longest path of any system, that of Windows, is one of as many letters; others are texts in the place of a path.
_LONGEST_PATH = 32_767


def path_of(value: Any) -> str:
    """Return a path as a string.

    Raises
    ------
    FileError
        If the value cannot name a file.

    Examples
    --------
    >>> path_of(3)
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: 3: a path must be a string or PathLike that can name a file
    """
    try:
        found = os.fsdecode(value)
        usable = 0 < len(found) <= _LONGEST_PATH and b"\0" not in os.fsencode(found)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise FileError(f"{safe_repr(value)}: a path must be a string or PathLike that can name a file")
    return found


@contextlib.contextmanager
def file_error_context(path: str) -> Iterator[None]:
    """Convert errors raised in the block to a FileError whose message begins with the path."""
    try:
        yield
    except TnadaptError as error:
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise FileError(f"{path}: there is not enough memory for it") from error
    except ArithmeticError as error:
        raise FileError(f"{path}: its settings lead to numbers that are too large: {error}") from error


@contextlib.contextmanager
def opened(path: str, foreign: bool = False) -> Iterator[Container]:
    """Open the container at a path.

    Parameters
    ----------
    path : str
    foreign : bool
        Whether its tensors may also have the dtypes of ``FOREIGN``.

    Raises
    ------
    FileError
        If the path is not a valid safetensors file; the message says what it is instead.
    OSError
        If the file does not exist or cannot be read.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise FileError(
                "is an adapter folder of PEFT; convert it: tnadapt convert FOLDER -o adapter.safetensors, or in Python "
                "tnadapt.convert(FOLDER, 'adapter.safetensors')"
            )
        names = sorted(name for name in map(os.fsdecode, os.listdir(path)) if name.endswith(".safetensors"))
        found = f", such as {escaped(names[0])}" if names else ""
        raise FileError(f"is a folder; give the path of a file in it{found}")
    if not stat.S_ISREG(mode):
        # Opening a pipe would block until somebody writes to it.
        raise FileError("is neither a file nor a folder")
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
        yield Container(file, state.st_size, foreign, held_bytes(state))


def _header_length(head: bytes, size: int) -> int:
    # The first bytes of a pickle may also be a valid length; in a safetensors file, the header's brace follows.
    pickled = head[:1] == b"\x80" and head[1:2] <= b"\x10"
    if head[8:9] != b"{" and (pickled or head[:4] == b"PK\x03\x04"):
        what = "a pickle" if pickled else "a zip archive, as torch.save makes it of a pickle"
        raise FileError(
            f"is {what}, which can run arbitrary code when opened, so it was not opened. "
            "Save it as a safetensors file: an adapter by tnadapt.save, a model by save_pretrained"
        )
    if head[:4] == b"GGUF":
        raise FileError("is a GGUF file, where a safetensors file is expected")
    if size < 8:
        raise FileError(f"is not a safetensors file: it has {size} bytes, and the header's length alone takes 8")
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise FileError(
            f"is not a safetensors file, or is cut off: the header would have {length} bytes, and {size - 8} are there"
        )
    if length > MAX_HEADER:
        raise FileError(f"has a header of {length} bytes; at most {MAX_HEADER} are read")
    if head[8:9] != b"{":
        raise FileError("is not a safetensors file: its header does not begin with '{'")
    return length


def _check_cover(entries: Entries, size: int) -> None:
    """Raise FileError unless the tensors follow each other without holes or overlaps and fill the file."""
    starts, stops = entries.spans()
    expected = np.concatenate([np.zeros(1, stops.dtype), stops[:-1]])
    wrong = np.flatnonzero(starts != expected[: len(starts)])
    if len(wrong):
        start, position = int(starts[wrong[0]]), int(expected[wrong[0]])
        problem = "overlaps the tensor before it" if start < position else "leaves a hole before it"
        name = safe_repr(entries.name_at(int(wrong[0])))
        raise FileError(f"{name} begins at byte {start} and {problem}, which ends at {position}")
    position = int(stops[-1]) if len(stops) else 0
    if position != size:
        raise FileError(f"is cut off or too long: the tensors have {position} bytes, and {size} follow the header")


def serialized(tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to (str, ndarray)
        The dtype, one of ``DTYPES``, and the array in the form that :meth:`Container.array` returns.
    metadata : mapping of str to str
        Use a single key for reproducible bytes: the order of several keys is not fixed.
    """
    import safetensors

    # safetensors takes bytes up to release 0.7 and addresses from 0.8 on. ``tensors`` keeps the arrays alive meanwhile.
    spec = getattr(safetensors, "TensorSpec", None)
    given: dict[str, Any] = {}
    for name, (dtype, array) in tensors.items():
        common = {"dtype": DTYPES[dtype], "shape": list(array.shape)}
        if spec is None:
            given[name] = {**common, "data": array.tobytes()}
        else:
            assert array.flags.c_contiguous
            given[name] = spec(**common, data_ptr=array.ctypes.data, data_len=array.nbytes)
    return bytes(safetensors.serialize(given, dict(metadata)))
