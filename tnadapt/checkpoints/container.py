"""Strict reader and writer of the safetensors container, independent of adapters.

A file consists of the length of the header in 8 bytes, little-endian; the header, a JSON object padded with white
space; and the tensors' bytes, little-endian, in C order, one after another. The header maps each tensor's name to
``{"dtype": …, "shape": […], "data_offsets": [begin, end]}``, with offsets counted from the end of the header, and
``__metadata__`` to an object of strings. Reading a file, whatever its content, yields arrays or raises a FileError, and
memory for a tensor is allocated only once its bytes are known to be present.

The JSON of headers and of other files from strangers is parsed here, too: strictly (:func:`json_file`), and value by
value (:class:`Document`).
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import errno
import io
import json
import math
import os
import re
import stat
from array import array
from collections.abc import Collection, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, NamedTuple

import numpy as np

from tnadapt.errors import FileError, TnadaptError, escaped, safe_repr

# -- The tensors that headers list, in less memory than their text -----------------------------------------------------


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

_TAGS = (*DTYPES, *FOREIGN)
_CODES = {tag: code for code, tag in enumerate(_TAGS)}


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


class Entries(Mapping[str, Entry]):
    """The tensors of one or several files by name, in the order of their bytes.

    Entries are stored as columns of numbers and two byte strings, and are found by binary search in the sorted hashes
    of their names. A dictionary of a million entries would take five times the memory of their text.

    Examples
    --------
    >>> entries = Entries()
    >>> entries.add(b"b", "F32", b"2", 4, 12), entries.add(b"a", "U8", b"2,2", 0, 4)
    (None, None)
    >>> entries.index() is None, list(entries), entries["b"]
    (True, ['a', 'b'], Entry(dtype='F32', shape=(2,), start=4, stop=12))
    """

    def __init__(self) -> None:
        self._names, self._shapes = bytearray(), bytearray()
        self._name_ends, self._shape_ends = array("Q", [0]), array("Q", [0])
        self._codes, self._starts, self._stops = array("B"), array("Q"), array("Q")
        # Rows of the columns in the order of their bytes; the sorted hashes of all names, and the row of each hash.
        self._order, self._hashes, self._rows = array("I"), array("q"), array("I")
        self._firsts = [0]  # first place of each file in the order, and of the next file to be added

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._hashes:
            self.index()  # another process salts hashes differently

    def add(self, name: bytes, dtype: str, shape: bytes, start: int, stop: int) -> None:
        """Add an entry, its shape as comma-separated decimals. Lookups need a call to :meth:`index` first."""
        self._names += name
        self._shapes += shape
        self._name_ends.append(len(self._names))
        self._shape_ends.append(len(self._shapes))
        self._codes.append(_CODES[dtype])
        self._starts.append(start)
        self._stops.append(stop)

    def extend(self, other: Entries) -> None:
        """Append the entries of another file."""
        for ends, theirs, base in (
            (self._name_ends, other._name_ends, len(self._names)),
            (self._shape_ends, other._shape_ends, len(self._shapes)),
        ):
            ends.frombytes((np.asarray(theirs)[1:] + np.uint64(base)).tobytes())
        self._order.frombytes((np.asarray(other._order) + np.uint32(len(self._codes))).tobytes())
        self._names += other._names
        self._shapes += other._shapes
        for mine, its in ((self._codes, other._codes), (self._starts, other._starts), (self._stops, other._stops)):
            mine.extend(its)
        self._firsts.append(len(self._codes))

    def index(self) -> str | None:
        """Prepare for lookups by name, and return a name that occurs twice, or None."""
        count = len(self._codes)
        if len(self._firsts) == 1:
            order = np.lexsort((np.asarray(self._stops), np.asarray(self._starts))).astype(np.uint32)
            self._order = array("I", order.tobytes())
        hashes = np.fromiter((hash(self._name(row)) for row in range(count)), np.int64, count)
        rows = np.argsort(hashes, kind="stable").astype(np.uint32)
        hashes = hashes[rows]
        self._hashes, self._rows = array("q", hashes.tobytes()), array("I", rows.tobytes())
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            row, later = (self._name(self._rows[int(at)]) for at in (place, place + 1))
            if row == later:
                return row.decode()
        return None

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and stop positions of all tensors, in the order of their bytes."""
        order = np.asarray(self._order)
        return np.asarray(self._starts)[order], np.asarray(self._stops)[order]

    def name_at(self, place: int) -> str:
        """Return the name of the entry at a place in the order of the bytes."""
        return self._name(self._order[place]).decode()

    def of_file(self, number: int) -> Iterator[tuple[str, Entry]]:
        """Yield the names and entries of one of the added files, in the order of their bytes."""
        for row in self._order[self._firsts[number] : self._firsts[number + 1]]:
            yield self._name(row).decode(), self._entry(row)

    def file_of(self, name: str) -> int:
        """Return the number of the file that holds a tensor; raise KeyError if none does."""
        return bisect.bisect_right(self._firsts, self._row(name)) - 1

    def _name(self, row: int) -> bytes:
        return bytes(self._names[self._name_ends[row] : self._name_ends[row + 1]])

    def _entry(self, row: int) -> Entry:
        text = self._shapes[self._shape_ends[row] : self._shape_ends[row + 1]]
        shape = tuple(map(int, text.split(b","))) if text else ()
        return Entry(_TAGS[self._codes[row]], shape, self._starts[row], self._stops[row])

    def _row(self, name: str) -> int:
        if isinstance(name, str):
            raw = name.encode("utf-8", "surrogatepass")
            known = hash(raw)
            place = bisect.bisect_left(self._hashes, known)
            while place < len(self._hashes) and self._hashes[place] == known:
                if self._name(self._rows[place]) == raw:
                    return self._rows[place]
                place += 1
        raise KeyError(name)

    def __getitem__(self, name: str) -> Entry:
        return self._entry(self._row(name))

    def __contains__(self, name: object) -> bool:
        try:
            self._row(name)  # type: ignore[arg-type]  # another type is a KeyError
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (self._name(row).decode() for row in self._order)

    def __len__(self) -> int:
        return len(self._codes)

    def items(self) -> ItemsView[str, Entry]:
        return _Items(self)

    def values(self) -> ValuesView[Entry]:
        return _Values(self)


class _Items(ItemsView[str, Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return zip(self._mapping, self._mapping.values(), strict=True)


class _Values(ValuesView[Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[Entry]:
        return map(self._mapping._entry, self._mapping._order)


# -- Strict reading of untrusted JSON: no duplicate keys, finite numbers, limited size ---------------------------------


#: Maximum bytes of the settings of a model or an adapter; only a mistaken or hostile file is larger.
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

# Python's own parser builds objects of up to 25 times the size of the text. Here a document is scanned for the spans of
# its values, and each value is converted alone, so that a hostile document needs memory only for its text and one
# value.


#: Maximum bytes of a value that is converted in one piece, such as a tensor's entry, a target or a name.
MAX_VALUE = 1 << 16
# Legitimate values are only as deep as a tensor's shape, or a group's list of weights in a config.
_MAX_DEPTH = 32
# Maximum strings and brackets of one value: a list of 100,000 targets has a million.
_MAX_TOKENS = 1 << 22
# Maximum keys of an object with lazy values.
_MAX_KEYS = 64
_PIECE = 1 << 16

_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"')
_SCALAR = re.compile(rb'[^ \t\n\r"\[\]{},:]++')
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+')
# A piece of a string that does not split any escape, surrogate pair or multi-byte character.
_LETTERS = re.compile(
    rb"(?:[^\\\x80-\xff]{1,4096}+|[\xc0-\xff][\x80-\xbf]*+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\.){1,256}+",
    re.DOTALL,
)


# A member of an object: its key, the span of its value, and the match of the value if it is in the usual form.
Member = tuple[str, int, int, re.Match[bytes] | None]


class Document:
    """A JSON document whose parts are parsed on demand.

    Parameters
    ----------
    content : bytes
        Valid UTF-8, as checked by :func:`check_utf8`.
    what : str
        Name of the document in messages.
    stop : int, optional
        End of the text; the end of ``content`` if not given.

    Examples
    --------
    >>> document = Document(b'{"a": [1, 2], "b": 3}', "the text")
    >>> [(key, document.value(start, stop)) for key, start, stop, _ in document.members(document.start())]
    [('a', [1, 2]), ('b', 3)]
    """

    def __init__(self, content: bytes, what: str, stop: int | None = None) -> None:
        self.content, self.what = content, what
        self.stop = len(content) if stop is None else stop

    def start(self) -> int:
        """Return the position where the document's object begins; raise FileError if it is another value."""
        at = self._space(0)
        if at == self.stop:
            raise self._broken(at, "an object")
        if self.content[at : at + 1] != b"{":
            raise FileError(f"{self.what} must be a JSON object; got {safe_repr(self.peek(at))}")
        return at

    def members(
        self,
        at: int,
        usual: re.Pattern[bytes] | None = None,
        limit: int = MAX_VALUE,
        unlimited: Collection[str] = (),
        whole: bool = True,
    ) -> Iterator[Member]:
        """Yield the members of the object that begins at a position.

        Parameters
        ----------
        at : int
        usual : pattern, optional
            Pattern that most values match. Values that do not are scanned bracket by bracket, which is slower.
        limit : int
            Maximum bytes of a value.
        unlimited : collection of str
            Keys whose values may have any number of bytes.
        whole : bool
            Whether this is the document's own object, which nothing may follow.
        """
        at = self._space(at + 1)
        more = self.content[at : at + 1] != b"}"
        at += not more
        while more:
            if (key_match := _STRING.match(self.content, at, self.stop)) is None:
                raise self._broken(at, "a key in quotes")
            key = self.text(at, key_match.end())
            at = self._space(key_match.end())
            if self.content[at : at + 1] != b":":
                raise self._broken(at, "':'")
            at = self._space(at + 1)
            match = usual.match(self.content, at, self.stop) if usual is not None else None
            most = self.stop if key in unlimited else limit
            stop = match.end() if match is not None else self.end_of(at, most, key)
            yield key, at, stop, match
            at, more = self._next(stop, b"}")
        if whole and self._space(at) != self.stop:
            raise self._broken(at, "nothing more")

    def elements(self, at: int, limit: int = MAX_VALUE) -> Iterator[tuple[int, int]]:
        """Yield the spans of the values in the array that begins at a position."""
        at = self._space(at + 1)
        more = self.content[at : at + 1] != b"]"
        while more:
            stop = self.end_of(at, limit)
            yield at, stop
            at, more = self._next(stop, b"]")

    def _next(self, at: int, close: bytes) -> tuple[int, bool]:
        """Return the position of the next value or after the closing bracket, and whether there is a next value."""
        at = self._space(at)
        letter = self.content[at : min(at + 1, self.stop)]
        if letter == b",":
            return self._space(at + 1), True
        if letter != close:
            raise self._broken(at, f"',' or '{close.decode()}'")
        return at + 1, False

    def end_of(self, at: int, limit: int = MAX_VALUE, key: str | None = None) -> int:
        """Return where the value that begins at a position ends, examining only its strings and brackets."""
        first, bound = self.content[at : min(at + 1, self.stop)], min(self.stop, at + limit)
        if first == b'"':
            match = _STRING.match(self.content, at, self.stop)
        elif first not in (b"{", b"["):
            match = _SCALAR.match(self.content, at, self.stop)
        else:
            return self._bracketed(at, bound, limit, key)
        if match is None:
            raise self._broken(at, "a value")
        if match.end() > bound:
            raise self._long(limit, key)
        return match.end()

    def _bracketed(self, start: int, bound: int, limit: int, key: str | None) -> int:
        at, depth, tokens = start, 0, 0
        while at < bound:
            tokens += 1
            if tokens > _MAX_TOKENS:
                raise FileError(f"{self.what} has a value with more than {_MAX_TOKENS} strings and brackets")
            letter = self.content[at]
            if letter == 0x22:
                match = _STRING.match(self.content, at, bound)
                if match is None:
                    break
                at = match.end()
            elif letter in b"[{":
                depth, at = depth + 1, at + 1
                if depth > _MAX_DEPTH:
                    raise FileError(f"{self.what} is nested too deep")
            else:
                depth, at = depth - 1, at + 1
                if not depth:
                    return at
            at = _TO_BRACKET.match(self.content, at, bound).end()  # type: ignore[union-attr]  # matches anything
        if bound < self.stop:
            raise self._long(limit, key)
        raise self._broken(start, "a whole value")

    def value(self, start: int, stop: int) -> Any:
        """Convert a value that was found."""
        return strict_value(self.content[start:stop].decode(), self.what)

    def text(self, start: int, stop: int) -> str:
        """Convert a string that was found; raise FileError if it is too long for a name."""
        if stop - start > MAX_VALUE:
            raise self._long(MAX_VALUE, None)
        return str(json.loads(self.content[start:stop].decode()))

    def long_text(self, start: int, stop: int) -> bytes:
        """Convert a string of any length that was found to UTF-8, encoding lone surrogates as well."""
        start, stop, buffer = start + 1, stop - 1, io.BytesIO()
        while start < stop:
            match = _LETTERS.match(self.content, start, stop)
            if match is None:
                raise self._broken(start, "a string")
            buffer.write(json.loads(f'"{match[0].decode()}"').encode("utf-8", "surrogatepass"))
            start = match.end()
        return buffer.getvalue()

    def peek(self, at: int, count: int = 200) -> str:
        """Return the text at a position, for a message."""
        return self.content[at : min(at + count, self.stop)].decode(errors="replace")

    def _space(self, at: int) -> int:
        return _SPACE.match(self.content, at, self.stop).end()  # type: ignore[union-attr]  # matches anything

    def _broken(self, at: int, expected: str) -> FileError:
        got = safe_repr(self.peek(at, 20)) if at < self.stop else "its end"
        return FileError(f"{self.what} is not JSON: expected {expected} at byte {at}; got {got}")

    def _long(self, limit: int, key: str | None) -> FileError:
        under = "" if key is None else f" for {safe_repr(key)}"
        return FileError(f"{self.what} has a value or name of more than {limit} bytes{under}")


class Elements:
    """The values of an array, each converted on demand."""

    def __init__(self, document: Document, start: int) -> None:
        self._document, self._start = document, start

    def __iter__(self) -> Iterator[Any]:
        for start, stop in self._document.elements(self._start):
            yield self._document.value(start, stop)


class Later:
    """A value of an object, converted on demand."""

    def __init__(self, document: Document, start: int, stop: int, key: str) -> None:
        self._document, self._start, self._stop, self._key = document, start, stop, key

    def value(self, limit: int = MAX_VALUE) -> Any:
        """Return the value; raise FileError if it has more than ``limit`` bytes."""
        if self._stop - self._start > limit:
            raise self._document._long(limit, self._key)
        return self._document.value(self._start, self._stop)


def lazy_object(content: bytes, what: str, lazy: Collection[str]) -> dict[str, Elements | Later]:
    """Scan a document's object: arrays under some keys become :class:`Elements`, other values :class:`Later`.

    Parameters
    ----------
    content : bytes
    what : str
        Name of the document in messages.
    lazy : collection of str
        The keys whose arrays may have any length.

    Raises
    ------
    FileError
        If the document is not such a JSON object. Errors within its values are found when they are converted.

    Examples
    --------
    >>> entry = lazy_object(b'{"version": 1, "targets": [[2], [3]]}', "the entry", ["targets"])
    >>> entry["version"].value(), list(entry["targets"])
    (1, [[2], [3]])
    """
    check_utf8(content, what)
    document, spans = Document(content, what), dict[str, tuple[int, int]]()
    for key, start, stop, _ in document.members(document.start(), limit=len(content)):
        if key in spans:
            raise FileError(f"{what} has the key {safe_repr(key)} twice")
        if len(spans) == _MAX_KEYS:
            raise FileError(f"{what} has more than {_MAX_KEYS} keys")
        spans[key] = start, stop
    arrays = {key for key in spans if key in lazy and content[spans[key][0] : spans[key][0] + 1] == b"["}
    return {
        key: Elements(document, start) if key in arrays else Later(document, start, stop, key)
        for key, (start, stop) in spans.items()
    }


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


# -- The header, parsed entry by entry in less than four times the memory of its text ----------------------------------


#: The largest published models have 150,000 tensors over all of their files.
MAX_TENSORS = 1 << 19
#: Metadata strings of a file. Trainers of diffusion adapters write about a hundred.
MAX_METADATA = 1 << 12

_MAX_AXES = 64  # NumPy's own limit
_MAX_BYTES = 1 << 62

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
    stop = len(content.rstrip(_PADDING if foreign else b" "))
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
        if not encodes(key):
            raise FileError(f"the header's {safe_repr(key)} has half a surrogate pair, and is not a valid name")
        if usual is None:
            dtype, shape, offsets = _unusual(document, key, start, end)
        else:
            tag, sizes, first, last = usual.groups()
            dtype, offsets = tag.decode(), [int(first), int(last)]
            shape = [int(size) for size in sizes.split(b",")] if sizes else []
        _check(key, dtype, shape, offsets, foreign)
        entries.add(key.encode(), dtype, ",".join(map(str, shape)).encode(), *offsets)
    if (twice := entries.index()) is not None:
        raise FileError(f"the header has the key {safe_repr(twice)} twice")
    return entries, metadata or Metadata({})


def _metadata(document: Document, start: int) -> Metadata:
    def wrong(at: int) -> FileError:
        return FileError(
            f"the header's __metadata__ must be an object of strings; got {safe_repr(document.peek(at, 40))}"
        )

    if document.content[start : start + 1] != b"{":
        raise wrong(start)
    entries = dict[str, bytes]()
    for key, begin, end, _ in document.members(start, limit=document.stop, whole=False):
        if document.content[begin : begin + 1] != b'"':
            raise wrong(begin)
        if key in entries:
            raise FileError(f"the header has the key {safe_repr(key)} twice in __metadata__")
        if len(entries) == MAX_METADATA:
            raise FileError(f"the header has more than {MAX_METADATA} entries of __metadata__")
        entries[key] = document.long_text(begin, end)
    return Metadata(entries)


def _unusual(document: Document, name: str, start: int, end: int) -> tuple[Any, Any, Any]:
    value = document.value(start, end)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(
            f"the header's {safe_repr(name)} must be an object of dtype, shape and data_offsets; got {safe_repr(value)}"
        )
    return value["dtype"], value["shape"], value["data_offsets"]


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


# -- The container -----------------------------------------------------------------------------------------------------


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
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
        # Check the whole file, as a caller that reads one tensor reads the others as well.
        check_held(self._size, self.held, "the file", self._file)
        array = read_array(self._file, name, entry, self.data)
        if entry.dtype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
            raise FileError(f"{safe_repr(name)} is BOOL and has bytes other than 0 and 1")
        return array


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
    """Count the bytes of a file outside of holes, up to ``enough``; return its size if the system cannot tell."""
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
        return num_bytes if error.errno == errno.ENXIO else size  # ENXIO: nothing but a hole from there on
    finally:
        os.lseek(handle, before, os.SEEK_SET)
    return num_bytes


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
        path = os.fsdecode(value)
        usable = 0 < len(path) <= _LONGEST_PATH and b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise FileError(f"{safe_repr(value)}: a path must be a string or PathLike that can name a file")
    return path


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
        example = f", such as {escaped(names[0])}" if names else ""
        raise FileError(f"is a folder; give the path of a file in it{example}")
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
    specs: dict[str, Any] = {}
    for name, (dtype, elements) in tensors.items():
        common = {"dtype": DTYPES[dtype], "shape": list(elements.shape)}
        if spec is None:
            specs[name] = {**common, "data": elements.tobytes()}
        else:
            assert elements.flags.c_contiguous
            specs[name] = spec(**common, data_ptr=elements.ctypes.data, data_len=elements.nbytes)
    return bytes(safetensors.serialize(specs, dict(metadata)))
