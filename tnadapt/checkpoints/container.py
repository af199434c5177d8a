"""Strict reader and writer of the safetensors container, independent of adapters.

A file consists of the length of the header in 8 bytes, little-endian; the header, a JSON object padded with white
space; and the tensors' bytes, little-endian, in C order, one after another. The header maps each tensor's name to
``{"dtype": …, "shape": […], "data_offsets": [begin, end]}``, with offsets counted from the end of the header, and
``__metadata__`` to an object of strings. Reading a file, whatever its content, yields arrays or raises a FileError, and
memory for a tensor is allocated only once its bytes are known to be present.

The untrusted JSON of headers and other files is parsed here, too: strictly (:func:`json_file`), and value by value
(:class:`JsonText`).
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import difflib
import errno
import io
import itertools
import json
import math
import mmap
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tnadapt.backends.stored_floats import widened
from tnadapt.errors import FileError, TnadaptError, escaped, safe_repr

# -- The tensors that headers list -------------------------------------------------------------------------------------


# Names of dtypes in a file, and everywhere else.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
TAG_OF = {name: tag for tag, name in DTYPES.items()}

# dtypes of safetensors that NumPy lacks, and their bits: allowed in a checkpoint, but not in an adapter.
FOREIGN = {
    "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip


class Entry(NamedTuple):
    """The dtype, shape and position of a tensor in a file.

    Attributes
    ----------
    dtype : str
        One of ``DTYPES``, or of ``FOREIGN`` if those were allowed.
    shape : tuple of int
    start, stop : int
        The positions of its first byte and after its last byte, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


# -- Strict reading of untrusted JSON: no duplicate keys, finite numbers, limited size ---------------------------------


#: Maximum bytes of the settings of a model or an adapter; only a wrong or hostile file is larger.
MAX_CONFIG = 1 << 24


def json_file(path: str, limit: int, what: str = "") -> dict[str, Any]:
    """Return the JSON object in a file of at most ``limit`` bytes.

    Memory is proportional to the actual size of the file.

    Parameters
    ----------
    path : str
    limit : int
        Maximum size in bytes.
    what : str
        Name of the file in messages, if the path alone is not enough.

    Returns
    -------
    dict

    Raises
    ------
    FileError
        If it is not a regular file, is longer than ``limit``, or is not such a JSON object.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> Path("long.json").write_bytes(b" " * 11) and json_file("long.json", 10)
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: is longer than 10 bytes, and was not read
    """
    named = f"{what} " if what else ""
    # Opening a pipe would block until somebody writes to it.
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileError(f"{named}is not a file")
    with open(path, "rb") as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(content) > limit:
        raise FileError(f"{named}is longer than {limit} bytes, and was not read")
    try:
        return strict_json(content.decode(), what or "the file")
    except UnicodeDecodeError as error:
        raise FileError(f"{named}is not UTF-8: {error}") from error


def strict_json(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in a text, without duplicate keys, NaN, infinity or excessive nesting.

    Parameters
    ----------
    text : str
    what : str
        Name of the text in messages.

    Returns
    -------
    dict

    Raises
    ------
    FileError
        If the text is not such a JSON object.

    Examples
    --------
    >>> strict_json('{"a": 1, "a": 2}', "the header")
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: the header has the key 'a' twice
    """
    value = strict_value(text, what)
    if not isinstance(value, dict):
        raise FileError(f"{what} must be a JSON object; got {safe_repr(value)}")
    return value


def strict_value(text: str, what: str) -> Any:
    """Return the JSON value in a text, under the rules of :func:`strict_json`.

    Examples
    --------
    >>> strict_value("[1, 2.5, null]", "the text")
    [1, 2.5, None]
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            seen = set[str]()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FileError(f"{what} has the key {safe_repr(twice)} twice")
        return members

    def number(text: str) -> float:
        value = float(text)  # 1e999 is infinity; NaN and Infinity, which JSON lacks, are parsed here, too
        if not math.isfinite(value):
            raise FileError(f"{what} has the number {safe_repr(text)}, which is not finite")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{what} is not JSON: {error}") from error
    except RecursionError as error:
        raise FileError(f"{what} is nested too deep") from error


# -- The incremental JSON parser, which rejects invalid values before it builds objects --------------------------------

# Python's own parser builds objects of up to 25 times the size of the text. Here a text is read once, front to back,
# and each value is converted on its own, so that a hostile text takes memory only for itself and one value.


#: Maximum bytes of a value that is converted in one piece, such as a tensor's entry, a target or a name.
MAX_VALUE = 1 << 16
# Legitimate values are no deeper than a tensor's shape, or a group's list of weights in a config.
_MAX_DEPTH = 32
# Maximum strings and brackets of one value: a list of 100,000 targets has a million.
_MAX_TOKENS = 1 << 22
# Maximum keys of an object with values that are converted on demand.
_MAX_KEYS = 64
_PIECE = 1 << 16

_SPACE = re.compile(rb"[ \t\n\r]*+")
_TEXT = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_STRING = re.compile(_TEXT)
_KEY = re.compile(rb"(" + _TEXT + rb")[ \t\n\r]*+:[ \t\n\r]*+")
_COMMA = re.compile(rb"[ \t\n\r]*+,[ \t\n\r]*+")
_SCALAR = re.compile(rb'[^ \t\n\r"\[\]{},:]++')
# The next string or bracket of a value.
_TOKEN = re.compile(rb'[^"\[\]{}]*+(' + _TEXT + rb"|[\[\]{}])")
# A piece of a string that does not split any escape, surrogate pair or multi-byte character.
_LETTERS = re.compile(
    rb"(?:[^\\\x80-\xff]{1,4096}+|[\xc0-\xff][\x80-\xbf]*+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\.){1,256}+",
    re.DOTALL,
)


class JsonText:
    """A JSON text that is read from a position on, one value at a time.

    Parameters
    ----------
    content : bytes
        Valid UTF-8, as checked by :func:`check_utf8`.
    what : str
        Name of the text in messages.
    at : int
        The position.
    stop : int, optional
        End of the text; the end of ``content`` if not given.

    Examples
    --------
    >>> text = JsonText(b'{"a": [1, 2], "b": 3}', "the text")
    >>> [(key, text.value()) for key in text.members()]
    [('a', [1, 2]), ('b', 3)]
    """

    def __init__(self, content: bytes, what: str, at: int = 0, stop: int | None = None) -> None:
        self.content, self.what, self.at = content, what, at
        self.stop = len(content) if stop is None else stop

    def next(self) -> bytes:
        """Go to the next byte that is no white space, and return it; nothing at the end of the text."""
        self.at = _SPACE.match(self.content, self.at, self.stop).end()  # type: ignore[union-attr]  # matches anything
        return self.content[self.at : min(self.at + 1, self.stop)]

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Go behind what matches here, if it does."""
        match = pattern.match(self.content, self.at, self.stop)
        self.at = self.at if match is None else match.end()
        return match

    def members(self) -> Iterator[str]:
        """Yield each key of the object that begins here; the caller reads its value."""
        for _ in self._items(b"{", b"}"):
            match = self.take(_KEY)
            if match is None:
                raise self._broken("a key in quotes and ':'")
            if match.end() - match.start() > MAX_VALUE:
                raise self._long(MAX_VALUE)
            yield str(json.loads(match[1].decode()))

    def elements(self) -> Iterator[Any]:
        """Yield each value of the array that begins here."""
        for _ in self._items(b"[", b"]"):
            yield self.value()

    def _items(self, first: bytes, last: bytes) -> Iterator[None]:
        self._need(first)
        more = self.next() != last
        while more:
            yield
            more = self.take(_COMMA) is not None
        self._need(last)

    def end(self) -> None:
        """Raise FileError if more than white space follows."""
        if self.next():
            raise self._broken("nothing more")

    def _need(self, letter: bytes) -> None:
        if self.next() != letter:
            raise self._broken(f"'{letter.decode()}'")
        self.at += 1

    def pass_value(self, limit: int = MAX_VALUE) -> tuple[int, int]:
        """Go behind the value that begins here, looking only at its strings and brackets; return its span."""
        start, bound, depth = self.at, min(self.stop, self.at + limit), 0
        match = self.take(_SCALAR)
        if match is not None:
            if self.at > bound:
                raise self._long(limit)
            return start, self.at
        for _ in range(_MAX_TOKENS):
            match = _TOKEN.match(self.content, self.at, bound)
            if match is None or (depth == 0 and match.start(1) > start):
                if bound < self.stop:
                    raise self._long(limit)
                raise self._broken("a whole value")
            self.at, letter = match.end(), self.content[match.start(1)]
            depth += (letter in b"[{") - (letter in b"]}")
            if depth > _MAX_DEPTH:
                raise FileError(f"{self.what} is nested too deep")
            if depth <= 0:
                return start, self.at
        raise FileError(f"{self.what} has a value with more than {_MAX_TOKENS} strings and brackets")

    def value(self, limit: int = MAX_VALUE) -> Any:
        """Convert the value that begins here; raise FileError if it has more than ``limit`` bytes."""
        start, stop = self.pass_value(limit)
        return strict_value(self.content[start:stop].decode(), self.what)

    def long_text(self) -> bytes | None:
        """Convert the string that begins here, of any length, to UTF-8 with lone surrogates; None if it is none."""
        if self.next() != b'"':
            return None
        string, buffer = self.take(_STRING), io.BytesIO()
        if string is None:
            raise self._broken("a string")
        start, stop = string.start() + 1, string.end() - 1
        while (match := _LETTERS.match(self.content, start, stop)) is not None:
            buffer.write(json.loads(f'"{match[0].decode()}"').encode("utf-8", "surrogatepass"))
            start = match.end()
        return buffer.getvalue()

    def peek(self, count: int) -> str:
        """Return the text that follows, for a message."""
        return safe_repr(self.content[self.at : min(self.at + count, self.stop)].decode(errors="replace"))

    def _broken(self, expected: str) -> FileError:
        got = self.peek(20) if self.at < self.stop else "its end"
        return FileError(f"{self.what} is not JSON: expected {expected} at byte {self.at}; got {got}")

    def _long(self, limit: int) -> FileError:
        return FileError(f"{self.what} has a value or name of more than {limit} bytes")


class Later:
    """A value of an object, converted on demand, and the values of an array one by one."""

    def __init__(self, content: bytes, what: str, span: tuple[int, int]) -> None:
        self._content, self._what, self._span = content, what, span

    @property
    def is_list(self) -> bool:
        """Whether it is an array."""
        return self._content.startswith(b"[", self._span[0])

    def value(self, limit: int = MAX_VALUE) -> Any:
        """Return the value; raise FileError if it has more than ``limit`` bytes."""
        return self._again().value(limit)

    def __iter__(self) -> Iterator[Any]:
        return self._again().elements()

    def _again(self) -> JsonText:
        return JsonText(self._content, self._what, *self._span)


def lazy_object(content: bytes, what: str) -> dict[str, Later]:
    """Read an object whose values are converted on demand, and may have any length until then.

    Parameters
    ----------
    content : bytes
    what : str
        Name of the text in messages.

    Raises
    ------
    FileError
        If it is not a JSON object. Errors within its values are found when they are converted.

    Examples
    --------
    >>> entry = lazy_object(b'{"version": 1, "targets": [[2], [3]]}', "the entry")
    >>> entry["version"].value(), list(entry["targets"])
    (1, [[2], [3]])
    """
    check_utf8(content, what)
    text, values = JsonText(content, what), dict[str, Later]()
    if text.next() not in (b"{", b""):
        raise FileError(f"{what} must be a JSON object; got {text.peek(200)}")
    for key in text.members():
        if key in values:
            raise FileError(f"{what} has the key {safe_repr(key)} twice")
        if len(values) == _MAX_KEYS:
            raise FileError(f"{what} has more than {_MAX_KEYS} keys")
        values[key] = Later(content, f"{what}'s {safe_repr(key)}", text.pass_value(len(content)))
    text.end()
    return values


def encodes(text: str) -> bool:
    """Return whether a text has a UTF-8 form, as one with half a surrogate pair has not, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(content: bytes, what: str) -> None:
    """Raise FileError unless the content is UTF-8, without decoding it all at once."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), _PIECE):
            decoder.decode(content[start : start + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8: {error}") from error


# -- The header, parsed entry by entry ---------------------------------------------------------------------------------


#: The largest published models have 150,000 tensors over all of their files.
MAX_TENSORS = 1 << 19
#: Metadata strings of a file. Trainers of diffusion adapters write about a hundred.
MAX_METADATA = 1 << 12

_MAX_AXES = 64  # NumPy's own limit
_MAX_BYTES = 1 << 62

# JSON white space, which safetensors accepts as padding. Adapter files are padded with spaces only: anything else means
# that the file is damaged.
_PADDING = b" \t\n\r"

_NULL = re.compile(rb"null")
_NATURAL = rb"(?:0|[1-9][0-9]{0,18}+)"
# An entry with its keys in the usual order, matched by one regular expression. Other orders are read, too, but slower.
_USUAL = re.compile(
    rb'\{ *"dtype" *: *"([A-Z0-9_]{1,16})" *, *"shape" *: *\[ *((?:N(?: *, *N){0,63}+)?) *\] *, '
    rb'*"data_offsets" *: *\[ *(N) *, *(N) *\] *\}'.replace(b"N", _NATURAL).replace(b" *", rb"[ \t\n\r]*+")
)


class Metadata(collections.UserDict[str, Any]):
    """The metadata strings of a file, kept as UTF-8, so that they take no more memory than the file."""

    def __getitem__(self, key: str) -> str:
        return str(self.data[key].decode("utf-8", "surrogatepass"))


def raw_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype for the bytes of a dtype in ``DTYPES``: uint16 for bfloat16, which NumPy lacks."""
    return np.dtype("uint16" if name == "BF16" else DTYPES[name]).newbyteorder("<")


def read_header(content: bytes, foreign: bool) -> tuple[dict[str, Entry], Metadata]:
    """Parse a header and check everything that can be checked without the size of the file.

    Parameters
    ----------
    content : bytes
        The header, which begins with a brace; white space may follow it.
    foreign : bool
        Whether tensors may have the dtypes of ``FOREIGN``.

    Returns
    -------
    entries : dict of str to Entry
        In the order of their bytes.
    metadata : Metadata

    Raises
    ------
    FileError
        At the first invalid entry, which the message names. Later entries are not examined.

    Notes
    -----
    The entries take a few hundred bytes each, and the rest a small multiple of the memory of the text. :mod:`json`
    would need up to 25 times as much.

    Examples
    --------
    >>> read_header(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', False)[0]
    {'a': Entry(dtype='U8', shape=(2,), start=0, stop=2)}
    """
    stop = len(content.rstrip(_PADDING if foreign else b" "))
    if content[stop - 1 : stop] != b"}":
        raise FileError("the header does not end with '}'")
    check_utf8(content, "the header")
    text, entries, metadata = JsonText(content, "the header", stop=stop), dict[str, Entry](), None
    for key in text.members():
        if key in entries or (key == "__metadata__" and metadata is not None):
            raise FileError(f"the header has the key {safe_repr(key)} twice")
        if key == "__metadata__":
            metadata = _metadata(text)
            continue
        if len(entries) == MAX_TENSORS:
            raise FileError(f"the header has more than {MAX_TENSORS} tensors, and no model has as many")
        if not encodes(key):
            raise FileError(f"the header's {safe_repr(key)} has half a surrogate pair, and is not a valid name")
        entries[key] = _entry(text, key, foreign)
    text.end()
    # Most writers list the tensors in the order of their bytes.
    if any(later[2:] < entry[2:] for entry, later in itertools.pairwise(entries.values())):
        entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    return entries, metadata or Metadata({})


def _metadata(text: JsonText) -> Metadata:
    # Like safetensors, accept null for no metadata.
    if text.take(_NULL):
        return Metadata({})

    def wrong() -> FileError:
        return FileError(f"the header's __metadata__ must be an object of strings; got {text.peek(40)}")

    if text.next() != b"{":
        raise wrong()
    values = dict[str, bytes]()
    for key in text.members():
        if key in values:
            raise FileError(f"the header has the key {safe_repr(key)} twice in __metadata__")
        if len(values) == MAX_METADATA:
            raise FileError(f"the header has more than {MAX_METADATA} entries of __metadata__")
        value = text.long_text()
        if value is None:
            raise wrong()
        values[key] = value
    return Metadata(values)


def _entry(text: JsonText, name: str, foreign: bool) -> Entry:
    usual = text.take(_USUAL)
    if usual is not None:
        dtype, sizes, start, stop = usual.groups()
        shape = [int(size) for size in sizes.split(b",")] if sizes else []
        return _checked(name, dtype.decode(), shape, [int(start), int(stop)], foreign)
    value = text.value()
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(
            f"the header's {safe_repr(name)} must be an object of dtype, shape and data_offsets; got {safe_repr(value)}"
        )
    return _checked(name, value["dtype"], value["shape"], value["data_offsets"], foreign)


def _checked(name: str, dtype: Any, shape: Any, offsets: Any, foreign: bool) -> Entry:
    if not isinstance(dtype, str) or (dtype not in DTYPES and not (foreign and dtype in FOREIGN)):
        known = [*DTYPES, *FOREIGN] if foreign else list(DTYPES)
        raise FileError(f"{safe_repr(name)} has the dtype {safe_repr(dtype)}; expected one of {', '.join(known)}")
    if not _naturals(shape) or len(shape) > _MAX_AXES:
        raise FileError(
            f"{safe_repr(name)} has the shape {safe_repr(shape)}; expected up to {_MAX_AXES} natural numbers"
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise FileError(f"{safe_repr(name)} has the data_offsets {safe_repr(offsets)}; expected two natural numbers")
    bits = _BITS[dtype]
    # A size of 0 does not excuse the others: NumPy multiplies the sizes before it sees the 0.
    if math.prod(max(size, 1) for size in shape) * bits > 8 * _MAX_BYTES:
        raise FileError(f"{safe_repr(name)} has the shape {safe_repr(shape)}, of more than 2**62 bytes")
    if math.prod(shape) * bits % 8:
        raise FileError(
            f"{safe_repr(name)} has the shape {safe_repr(shape)} of {dtype}, which is not a whole number of bytes"
        )
    needed, (start, stop) = math.prod(shape) * bits // 8, offsets
    if stop - start != needed:
        raise FileError(f"{safe_repr(name)} needs {needed} bytes; its data_offsets {start} and {stop} do not hold that")
    return Entry(sys.intern(dtype), tuple(shape), start, stop)


_BITS = FOREIGN | {name: 8 * raw_dtype(name).itemsize for name in DTYPES}


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


# -- The container -----------------------------------------------------------------------------------------------------


#: The entry of metadata that an adapter file has, and the tensor in one at whose end rows are appended.
ADAPTER, GROWING = "tnadapt", "members"
#: The first bytes of a growing file, among which its header has the numbers that change.
FIRST_BYTES = 512
#: Half of what safetensors itself allows. The header of 100,000 tensors, as in the largest models, takes about 15 MB.
MAX_HEADER = 1 << 26
# A file may claim up to _HOLES bytes more than _PACKED times the bytes allocated on disk, to allow for file systems
# that compress or omit zeros.
_HOLES, _PACKED = 1 << 26, 8


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def native(tag: str, array: np.ndarray) -> np.ndarray:
    """Return an array of a file in a dtype that NumPy can compute with: bfloat16 as float32."""
    if tag == "BF16":
        return widened(array, "bfloat16")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class Container:
    """An open safetensors file with a valid header.

    Attributes
    ----------
    entries : dict of str to Entry
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
        _check_cover(self.entries, size - self.data, GROWING in self.entries and ADAPTER in self.metadata)
        self._size, self.held = size, size if held is None else held

    def array(self, name: str) -> np.ndarray:
        """Read a tensor as a little-endian array; bfloat16 as uint16 bit patterns."""
        entry = self.entries[name]
        # Check the whole file, as a caller that reads one tensor reads the others as well.
        self.check_held()
        array = read_array(self._file, name, entry, self.data)
        if entry.dtype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
            raise FileError(f"{safe_repr(name)} is BOOL and has bytes other than 0 and 1")
        return array

    def mapped(self, name: str, sparsely: bool = False) -> np.ndarray:
        """Return a tensor as an array that reads the file when it is used, read-only; see :meth:`array`.

        If it is to be used sparsely, the system is asked not to read ahead.
        """
        entry = self.entries[name]
        self.check_held()
        mapping = mmap.mmap(self._file.fileno(), self.data + entry.stop, access=mmap.ACCESS_READ)
        if sparsely and hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM)
        dtype, count = raw_dtype(entry.dtype), math.prod(entry.shape)
        return np.frombuffer(mapping, dtype, count, self.data + entry.start).reshape(entry.shape)

    def check_held(self) -> None:
        """Raise FileError if the file consists of holes; see :func:`check_held`."""
        check_held(self._size, self.held, "the file", self._file)

    @property
    def identity(self) -> tuple[int, int]:
        """The device and inode of the file."""
        state = os.fstat(self._file.fileno())
        return state.st_dev, state.st_ino


def read_array(file: io.BufferedReader, name: str, entry: Entry, data: int, index: int | None = None) -> np.ndarray:
    """Read a tensor, or one of the matrices that it stacks, of a file whose tensors begin at ``data``."""
    if entry.dtype in FOREIGN:
        raise FileError(f"{safe_repr(name)} is {entry.dtype}, which NumPy does not have: only its bytes can be copied")
    array = np.empty(entry.shape if index is None else entry.shape[1:], raw_dtype(entry.dtype))
    file.seek(data + entry.start + (index or 0) * array.nbytes)
    # A tensor without elements has no bytes to read.
    if array.size and file.readinto(raw_bytes(array)) != array.nbytes:
        raise FileError(f"the file ended within {safe_repr(name)}, while it was read")
    return array


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
    """Count the bytes of a file outside of holes up to ``enough``, or return its size if the system cannot tell."""
    size = os.fstat(handle).st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    before = os.lseek(handle, 0, os.SEEK_CUR)
    num_bytes = at = 0
    try:
        while num_bytes < enough:
            start = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, start, os.SEEK_HOLE)
            num_bytes += at - start
    except OSError as error:
        return num_bytes if error.errno == errno.ENXIO else size  # ENXIO: the rest is a hole
    finally:
        os.lseek(handle, before, os.SEEK_SET)
    return num_bytes


# The longest path on any system (Windows); a longer text is no path.
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
    tnadapt.errors.FileError: a path must be a string or PathLike that can name a file; got int
    """
    try:
        path = os.fsdecode(value)
        usable = 0 < len(path) <= _LONGEST_PATH and b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        # Not the representation of a model.
        got = safe_repr(value) if isinstance(value, (str, bytes, os.PathLike)) else type(value).__name__
        raise FileError(f"a path must be a string or PathLike that can name a file; got {got}")
    return path


def missing_file(path: str) -> FileError:
    """Return the error for a path where nothing is, with the file in its folder whose name is similar, if any."""
    folder, name = os.path.split(path)
    near: list[str] = []
    with contextlib.suppress(OSError):
        # The names alone are compared: most files have the same suffix.
        stems = {os.path.splitext(other)[0]: other for other in sorted(os.listdir(folder or ".")) if other != name}
        near = difflib.get_close_matches(os.path.splitext(name)[0], stems, n=1, cutoff=0.8)
    meant = f"; did you mean {safe_repr(os.path.join(folder, stems[near[0]]))}?" if near else ""
    return FileError(f"{path}: No such file or directory{meant}")


@contextlib.contextmanager
def file_error_context(path: str) -> Iterator[None]:
    """Convert errors raised in the block to a FileError whose message begins with the path, once."""
    try:
        yield
    except TnadaptError as error:
        raise FileError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except FileNotFoundError as error:
        raise missing_file(path) from error
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
                "tnadapt.convert(FOLDER, 'adapter.safetensors'); for VeRA and some others, with --base MODEL or base="
            )
        names = sorted(name for name in map(os.fsdecode, os.listdir(path)) if name.endswith(".safetensors"))
        if "model.safetensors" in names or (
            "adapter.safetensors" not in names and os.path.exists(os.path.join(path, "config.json"))
        ):
            raise FileError("is the folder of a model and not an adapter; give the path of the adapter's file")
        example = f", such as {escaped(names[0])}" if names else ""
        raise FileError(f"is a folder; give the path of a file in it{example}")
    if not stat.S_ISREG(mode):
        # Opening a pipe would block until somebody writes to it.
        raise FileError("is neither a file nor a folder")
    with contextlib.ExitStack() as stack:
        yield _container(path, foreign, stack)


def _container(path: str, foreign: bool, stack: contextlib.ExitStack) -> Container:
    failure = before = None
    while True:
        file = stack.enter_context(open(path, "rb"))  # noqa: SIM115  # the stack closes it
        state = os.fstat(file.fileno())
        first = file.peek(FIRST_BYTES)[:FIRST_BYTES], state.st_size
        if failure is not None and first == before:
            raise failure
        try:
            return Container(file, state.st_size, foreign, held_bytes(state))
        except FileError as error:
            if not first[0].startswith(b'{"' + GROWING.encode(), 8):
                raise
            # A row may have been appended meanwhile: the size and the header are then of different times.
            failure, before = error, first
            time.sleep(0.001)


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
    if head[8:9] != b"{":
        raise FileError(f"is not a safetensors file: its ninth byte must be '{{'; it begins with {head!r}")
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise FileError(
            f"is not a safetensors file, or is cut off: the header would have {length} bytes, and {size - 8} are there"
        )
    if length > MAX_HEADER:
        raise FileError(f"has a header of {length} bytes; at most {MAX_HEADER} are read")
    return length


def _check_cover(entries: Mapping[str, Entry], size: int, growing: bool) -> None:
    """Raise FileError unless the tensors follow each other without holes or overlaps and fill the file.

    A growing file may be longer: rows that are not yet in its header, or never will be, as their writer was killed.
    """
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise FileError(f"{safe_repr(name)} begins at byte {entry.start} and {problem}, which ends at {position}")
        position = entry.stop
    if position > size or (position < size and not growing):
        raise FileError(f"is cut off or too long: the tensors have {position} bytes, and {size} follow the header")


def to_stored(array: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """Return an array's dtype in a file, and the array in the form that :meth:`Container.array` returns."""
    tag = TAG_OF[dtype]
    if tag == "BF16":
        array = (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    # Not ascontiguousarray, which turns a scalar into a vector.
    return tag, np.asarray(array, raw_dtype(tag), order="C")


def appended(entries: Mapping[str, Entry], tensors: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, Entry]:
    """Return the entries of a file to which tensors are appended."""
    result, at = dict(entries), max((entry.stop for entry in entries.values()), default=0)
    for name, (dtype, array) in tensors.items():
        result[name] = Entry(dtype, array.shape, at, at + array.nbytes)
        at += array.nbytes
    return result


def file_head(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file: the length of the header, and the header.

    Examples
    --------
    >>> head = file_head({"a": Entry("U8", (2,), 0, 2)}, {})
    >>> len(head) % 8, head[8:].rstrip()
    (0, b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}')
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]
        }  # fmt: skip
    # Metadata may contain a lone surrogate, which has no UTF-8 form: backslashreplace writes it as a JSON escape.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def serialized(tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file, with the tensors in the order given, which should begin with the widest dtypes.

    Parameters
    ----------
    tensors : mapping of str to (str, ndarray)
        The dtype, one of ``DTYPES``, and the array, as from :func:`to_stored`.
    metadata : mapping of str to str
    """
    head = file_head(appended({}, tensors), metadata)
    return b"".join([head, *(raw_bytes(array) for _, array in tensors.values() if array.size)])


def growing_head(entries: Mapping[str, Entry], metadata: Mapping[str, str], rows: int, row_bytes: int) -> bytes:
    """Return the first bytes of a file that ends with a tensor of rows, to which rows can be appended.

    Its header begins with the entry of this tensor, whose numbers are padded so that larger ones fit: see
    :func:`growing_entry`.

    Examples
    --------
    >>> growing_head({}, {}, 3, 16)[8:].rstrip()
    b'{"members":{"dtype":"U8","shape":[3                   ,16],"data_offsets":[0,48                  ]}}'
    """
    start = max((entry.stop for entry in entries.values()), default=0)
    rest = file_head(entries, metadata)[8:].rstrip(b" ").removeprefix(b"{")
    text = b"{" + growing_entry(start, rows, row_bytes) + (b"," if rest != b"}" else b"") + rest
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def growing_entry(start: int, rows: int, row_bytes: int) -> bytes:
    """Return a growing tensor's part of a header, of the same length for every number of rows."""
    stop = start + rows * row_bytes
    return (
        f'"{GROWING}":{{"dtype":"U8","shape":[{rows:<20},{row_bytes}],"data_offsets":[{start},{stop:<20}]}}'
    ).encode()
