"""The safetensors container, read strictly. It knows nothing of adapters.

A file is the length of the header in 8 bytes, little-endian; the header, JSON of one object, padded with spaces;
and the tensors' bytes, little-endian, in C order, one after another. Under each tensor's name the header has
``{"dtype": …, "shape": […], "data_offsets": [begin, end]}``, counted from the end of the header, and under
``__metadata__`` an object of strings. Whatever is in a file, reading it gives arrays or a FileError, and
nothing is allocated before it is known that its bytes are there.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .errors import FileError, TnadaptError, shown
from .strict_json import strict_json

__all__ = [
    "DTYPES",
    "FOREIGN",
    "Container",
    "Entry",
    "about",
    "opened",
    "path_of",
    "raw_bytes",
    "raw_dtype",
    "serialized",
]

# A dtype's name in a file -> its name everywhere else.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# Others that safetensors knows and NumPy does not, and their bits: a checkpoint may have them, an adapter not.
FOREIGN = {
    "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip

MAX_HEADER = 1 << 26
_MAX_AXES = 64  # NumPy's own limit
_MAX_BYTES = 1 << 62


def raw_dtype(name: str) -> np.dtype[Any]:
    """What NumPy reads the bytes of a dtype of ``DTYPES`` as: it has no bfloat16, and its bits are a uint16."""
    return np.dtype("uint16" if name == "BF16" else DTYPES[name]).newbyteorder("<")


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


class Entry(NamedTuple):
    """Where a tensor lies.

    Attributes
    ----------
    dtype : str
        One of ``DTYPES``, or of ``FOREIGN`` where those were let in.
    shape : tuple of int
    start, stop : int
        Its first byte, and the one after its last, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container:
    """An open safetensors file whose header has been read and holds together.

    Attributes
    ----------
    entries : dict of str to Entry
        By the tensors' names.
    metadata : dict of str to str
    data : int
        Where in the file the tensors begin.
    """

    def __init__(self, file: io.BufferedReader, size: int, foreign: bool = False) -> None:
        head = file.read(16)
        length = _header_length(head, size)
        file.seek(8)
        self._file, self.data = file, 8 + length
        header = strict_json(_decoded(file.read(length)), "the header")
        self.metadata = _checked_metadata(header.pop("__metadata__", {}))
        self.entries = {name: _entry(name, value, foreign) for name, value in header.items()}
        _check_cover(self.entries, size - self.data)

    def array(self, name: str) -> np.ndarray:
        """A tensor of the file; little-endian, and of bfloat16 its bits as uint16."""
        entry = self.entries[name]
        if entry.dtype in FOREIGN:
            raise FileError(
                f"{shown(name)} is {entry.dtype}, which NumPy does not have: its bytes can be copied, no more"
            )
        made = np.empty(entry.shape, raw_dtype(entry.dtype))
        self._file.seek(self.data + entry.start)
        # A tensor without elements has no bytes to read.
        if made.size and self._file.readinto(raw_bytes(made)) != made.nbytes:
            raise FileError(f"the file ended within {shown(name)}, while it was read")
        if entry.dtype == "BOOL" and made.size and made.view(np.uint8).max() > 1:
            raise FileError(f"{shown(name)} is BOOL and has bytes other than 0 and 1")
        return made


def path_of(value: Any) -> str:
    """A path that can name a file, as a string.

    Raises
    ------
    FileError
        If it cannot.

    Examples
    --------
    >>> path_of(3)
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: 3: a path must be a string or PathLike that can name a file
    """
    try:
        found = os.fsdecode(value)
        usable = bool(found) and b"\0" not in os.fsencode(found)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise FileError(f"{shown(value)}: a path must be a string or PathLike that can name a file")
    return found


@contextlib.contextmanager
def about(path: str) -> Iterator[None]:
    """Whatever goes wrong within is a FileError that begins with the path."""
    try:
        yield
    except TnadaptError as error:
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise FileError(f"{path}: there is not enough memory for it") from error
    except ArithmeticError as error:
        raise FileError(f"{path}: its settings lead to numbers beyond all bounds: {error}") from error


@contextlib.contextmanager
def opened(path: str, foreign: bool = False) -> Iterator[Container]:
    """The container at a path.

    Parameters
    ----------
    path : str
    foreign : bool
        Whether its tensors may have the dtypes of ``FOREIGN``, too.

    Raises
    ------
    FileError
        If there is no file, or it is none that holds together: the message says what it is instead.
    OSError
        If it cannot be read.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise FileError("is a folder; give the path of a file in it")
    if not stat.S_ISREG(mode):
        # Opening a pipe would wait for somebody to write.
        raise FileError("is neither a file nor a folder")
    with open(path, "rb") as file:
        yield Container(file, os.fstat(file.fileno()).st_size, foreign)


def _header_length(head: bytes, size: int) -> int:
    # The first bytes of a pickle can be those of a length, too; then the header's brace follows.
    pickled = head[:1] == b"\x80" and head[1:2] <= b"\x10"
    if head[8:9] != b"{" and (pickled or head[:4] == b"PK\x03\x04"):
        what = "a pickle" if pickled else "a zip archive, as torch.save makes it of a pickle"
        raise FileError(
            f"is {what}, which can run any program when it is opened: it was not. "
            "Save it as a safetensors file: an adapter by tnadapt.save, a model by save_pretrained"
        )
    if size < 8:
        raise FileError(f"is no safetensors file: it has {size} bytes, and the header's length alone takes 8")
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise FileError(f"is cut off, or no safetensors file: the header is said to have {length} bytes of {size - 8}")
    if length > MAX_HEADER:
        raise FileError(f"has a header of {length} bytes; at most {MAX_HEADER} are read")
    if head[8:9] != b"{":
        raise FileError("is no safetensors file: its header does not begin with '{'")
    return length


def _decoded(header: bytes) -> str:
    text = header.rstrip(b" ")  # the padding; no other is allowed
    if not text.endswith(b"}"):
        raise FileError("the header does not end with '}'")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"the header is not UTF-8: {error}") from error


def _checked_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FileError(f"the header's __metadata__ must be an object of strings; got {shown(value)}")
    return value


def _entry(name: str, value: Any, foreign: bool) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileError(f"the header's {shown(name)} has half a surrogate pair, and is no name") from None
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(
            f"the header's {shown(name)} must be an object of dtype, shape and data_offsets; got {shown(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    known = [*DTYPES, *FOREIGN] if foreign else list(DTYPES)
    if not isinstance(dtype, str) or dtype not in known:
        raise FileError(f"{shown(name)} has the dtype {shown(dtype)}; expected one of {', '.join(known)}")
    if not _naturals(shape) or len(shape) > _MAX_AXES:
        raise FileError(f"{shown(name)} has the shape {shown(shape)}; expected up to {_MAX_AXES} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise FileError(f"{shown(name)} has the data_offsets {shown(offsets)}; expected two natural numbers")
    bits = FOREIGN[dtype] if dtype in FOREIGN else 8 * raw_dtype(dtype).itemsize
    # Sizes beside a 0 count, too: NumPy multiplies them before it sees the 0.
    if math.prod(max(size, 1) for size in shape) * bits > 8 * _MAX_BYTES:
        raise FileError(f"{shown(name)} has the shape {shown(shape)}, of more than 2**62 bytes")
    if math.prod(shape) * bits % 8:
        raise FileError(f"{shown(name)} has the shape {shown(shape)} of {dtype}, which is no whole number of bytes")
    needed, (start, stop) = math.prod(shape) * bits // 8, offsets
    if stop - start != needed:
        raise FileError(f"{shown(name)} needs {needed} bytes; its data_offsets {start} and {stop} do not hold that")
    return Entry(dtype, tuple(shape), start, stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


def _check_cover(entries: Mapping[str, Entry], size: int) -> None:
    """The tensors follow each other from the first byte to the last."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise FileError(f"{shown(name)} begins at byte {entry.start} and {problem}, which ends at {position}")
        position = entry.stop
    if position != size:
        raise FileError(f"is cut off or too long: the tensors have {position} bytes, and {size} follow the header")


def serialized(tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to (str, ndarray)
        Dtype, one of ``DTYPES``, and the array in the form of :meth:`Container.array`.
    metadata : mapping of str to str
        Of several keys the order is not fixed: use one.
    """
    import safetensors

    # Up to 0.7 it takes bytes, from 0.8 on addresses; a C order array stays where it is while ``tensors`` lives.
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
