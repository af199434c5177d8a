"""Strict parser for a safetensors header: entry by entry, in less than four times the memory of its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tnadapt.errors import FileError, safe_repr

from ._header_entries import DTYPES, FOREIGN, Entries
from ._json_scan import Document, check_utf8

__all__ = ["MAX_METADATA", "MAX_TENSORS", "Metadata", "raw_dtype", "read_header"]

#: The largest published models have 150,000 tensors over all of their files.
MAX_TENSORS = 1 << 19
#: Metadata strings of a file. Trainers of diffusion adapters write about a hundred.
MAX_METADATA = 1 << 12

_MAX_AXES = 64  # NumPy's own limit
_MAX_BYTES = 1 << 62
_PIECE = 1 << 12

# JSON white space, which safetensors accepts as padding. Adapter files are padded with spaces only: anything else means
# that the file is damaged.
_PADDING = b" \t\n\r"

_NATURAL = rb"(?:0|[1-9][0-9]{0,18}+)"
# An entry with its keys in the usual order, matched by one regular expression. Other orders are read, too, but slower.
_USUAL = re.compile(
    rb'\{ *"dtype" *: *"([A-Z0-9_]{1,16})" *, *"shape" *: *\[ *((?:N(?: *, *N){0,63}+)?) *\] *, '
    rb'*"data_offsets" *: *\[ *(N) *, *(N) *\] *\}'.replace(b"N", _NATURAL).replace(b" *", rb"[ \t\n\r]*+")
)


class Metadata(Mapping[str, str]):
    """The metadata strings of a file, kept as UTF-8, so that they take no more memory than the file."""

    def __init__(self, raw: Mapping[str, bytes]) -> None:
        self.raw = raw

    def __getitem__(self, key: str) -> str:
        return self.raw[key].decode("utf-8", "surrogatepass")

    def __contains__(self, key: object) -> bool:
        return key in self.raw  # Mapping's own implementation would decode the value

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


def raw_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype for the bytes of a dtype in ``DTYPES``: uint16 for bfloat16, which NumPy lacks."""
    return np.dtype("uint16" if name == "BF16" else DTYPES[name]).newbyteorder("<")


def read_header(content: bytes, foreign: bool) -> tuple[Entries, Metadata]:
    """Parse a header and check everything that can be checked without the size of the file.

    Parameters
    ----------
    content : bytes
        The header, which begins with a brace; white space may follow it.
    foreign : bool
        Whether tensors may have the dtypes of ``FOREIGN``.

    Raises
    ------
    FileError
        At the first invalid entry, which the message names. Later entries are not examined.

    Notes
    -----
    The result takes at most as much memory as the text. :mod:`json` would need up to 25 times as much.

    Examples
    --------
    >>> entries, metadata = read_header(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', False)
    >>> dict(entries), dict(metadata)
    ({'a': Entry(dtype='U8', shape=(2,), start=0, stop=2)}, {})
    """
    stop = _end(content, _PADDING if foreign else b" ")
    if content[stop - 1 : stop] != b"}":
        raise FileError("the header does not end with '}'")
    check_utf8(content, "the header")
    document = Document(content, "the header", stop)
    entries, metadata = Entries(), None
    for key, start, end, usual in document.members(0, _USUAL, unlimited=["__metadata__"]):
        if key == "__metadata__":
            if metadata is not None:
                raise FileError("the header has the key '__metadata__' twice")
            # Like safetensors, accept null for no metadata.
            metadata = Metadata({}) if content[start:end] == b"null" else _metadata(document, start)
            continue
        if len(entries) == MAX_TENSORS:
            raise FileError(f"the header has more than {MAX_TENSORS} tensors, and no model has as many")
        raw = _raw(key)
        if usual is None:
            dtype, shape, offsets = _unusual(document, key, start, end)
        else:
            tag, sizes, first, last = usual.groups()
            dtype, offsets = tag.decode(), [int(first), int(last)]
            shape = [int(size) for size in sizes.split(b",")] if sizes else []
        _check(key, dtype, shape, offsets, foreign)
        entries.add(raw, dtype, ",".join(map(str, shape)).encode(), *offsets)
    if (twice := entries.index()) is not None:
        raise FileError(f"the header has the key {safe_repr(twice)} twice")
    return entries, metadata or Metadata({})


def _end(content: bytes, padding: bytes) -> int:
    """Return the position where the padding begins."""
    stop = len(content)
    while stop:
        kept = len(content[max(0, stop - _PIECE) : stop].rstrip(padding))
        stop = max(0, stop - _PIECE) + kept
        if kept:
            break
    return stop


def _metadata(document: Document, start: int) -> Metadata:
    def wrong(at: int) -> FileError:
        return FileError(
            f"the header's __metadata__ must be an object of strings; got {safe_repr(document.peek(at, 40))}"
        )

    if document.content[start : start + 1] != b"{":
        raise wrong(start)
    found = dict[str, bytes]()
    for key, begin, end, _ in document.members(start, limit=document.stop, whole=False):
        if document.content[begin : begin + 1] != b'"':
            raise wrong(begin)
        if key in found:
            raise FileError(f"the header has the key {safe_repr(key)} twice in __metadata__")
        if len(found) == MAX_METADATA:
            raise FileError(f"the header has more than {MAX_METADATA} entries of __metadata__")
        found[key] = document.long_text(begin, end)
    return Metadata(found)


def _unusual(document: Document, name: str, start: int, end: int) -> tuple[Any, Any, Any]:
    value = document.value(start, end)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(
            f"the header's {safe_repr(name)} must be an object of dtype, shape and data_offsets; got {safe_repr(value)}"
        )
    return value["dtype"], value["shape"], value["data_offsets"]


def _raw(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise FileError(f"the header's {safe_repr(name)} has half a surrogate pair, and is not a valid name") from None


def _check(name: str, dtype: Any, shape: Any, offsets: Any, foreign: bool) -> None:
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


_BITS = FOREIGN | {name: 8 * raw_dtype(name).itemsize for name in DTYPES}


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)
