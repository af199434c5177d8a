"""Incremental JSON parser that rejects invalid values before it builds objects from them.

Python's own parser builds objects of up to 25 times the size of the text. Here a document is scanned for the spans of
its values, and each value is converted alone, so that a hostile document needs memory only for its text and one value.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from tnadapt.errors import FileError, safe_repr

from .strict_json import strict_value

__all__ = ["MAX_VALUE", "Document", "Elements", "Later", "Member", "check_utf8", "lazy_object"]

#: Maximum bytes of a value that is converted in one piece, such as a tensor's entry, a target or a name.
MAX_VALUE = 1 << 16
# Legitimate values are only as deep as a tensor's shape, or a group's list of weights in a config.
_MAX_DEPTH = 32
# Maximum strings and brackets of one value: a list of 100,000 targets has a million.
_MAX_TOKENS = 1 << 22
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


class Member(NamedTuple):
    """A member of an object: its key and the span of its value.

    Attributes
    ----------
    key : str
    start, stop : int
        Its span in the document.
    match : re.Match or None
        The match of the pattern for usual values, if it matched.
    """

    key: str
    start: int
    stop: int
    match: re.Match[bytes] | None


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
    >>> [(member.key, document.value(member.start, member.stop)) for member in document.members(document.start())]
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

    def finish(self, at: int) -> None:
        """Raise FileError if anything follows the object."""
        if self._space(at) != self.stop:
            raise self._broken(at, "nothing more")

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
            if (found := _STRING.match(self.content, at, self.stop)) is None:
                raise self._broken(at, "a key in quotes")
            key = self.text(at, found.end())
            at = self._space(found.end())
            if self.content[at : at + 1] != b":":
                raise self._broken(at, "':'")
            at = self._space(at + 1)
            match = usual.match(self.content, at, self.stop) if usual is not None else None
            most = self.stop if key in unlimited else limit
            stop = match.end() if match is not None else self.end_of(at, most, key)
            yield Member(key, at, stop, match)
            at, more = self._next(stop, b"}")
        if whole:
            self.finish(at)

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
            found = _STRING.match(self.content, at, self.stop)
        elif first not in (b"{", b"["):
            found = _SCALAR.match(self.content, at, self.stop)
        else:
            return self._bracketed(at, bound, limit, key)
        if found is None:
            raise self._broken(at, "a value")
        if found.end() > bound:
            raise self._long(limit, key)
        return found.end()

    def _bracketed(self, start: int, bound: int, limit: int, key: str | None) -> int:
        at, depth, tokens = start, 0, 0
        while at < bound:
            tokens += 1
            if tokens > _MAX_TOKENS:
                raise FileError(f"{self.what} has a value with more than {_MAX_TOKENS} strings and brackets")
            letter = self.content[at]
            if letter == 0x22:
                found = _STRING.match(self.content, at, bound)
                if found is None:
                    break
                at = found.end()
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

    def limited(self, start: int, stop: int, limit: int, key: str) -> Any:
        """Convert a value that was found; raise FileError if it has more than ``limit`` bytes."""
        if stop - start > limit:
            raise self._long(limit, key)
        return self.value(start, stop)

    def text(self, start: int, stop: int) -> str:
        """Convert a string that was found; raise FileError if it is too long for a name."""
        if stop - start > MAX_VALUE:
            raise self._long(MAX_VALUE, None)
        text: str = json.loads(self.content[start:stop].decode())
        return text

    def long_text(self, start: int, stop: int) -> bytes:
        """Convert a string of any length that was found to UTF-8, encoding lone surrogates as well."""
        start, stop = start + 1, stop - 1
        if self.content.find(b"\\", start, stop) < 0:
            return self.content[start:stop]
        made = io.BytesIO()
        while start < stop:
            found = _LETTERS.match(self.content, start, stop)
            if found is None:
                raise self._broken(start, "a string")
            made.write(json.loads(f'"{found[0].decode()}"').encode("utf-8", "surrogatepass"))
            start = found.end()
        return made.getvalue()

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
        return self._document.limited(self._start, self._stop, limit, self._key)


def lazy_object(content: bytes, what: str, lazy: Collection[str], most: int = 64) -> dict[str, Elements | Later]:
    """Scan a document's object: arrays under some keys become :class:`Elements`, other values :class:`Later`.

    Parameters
    ----------
    content : bytes
    what : str
        Name of the document in messages.
    lazy : collection of str
        The keys whose arrays may have any length.
    most : int
        Maximum number of keys.

    Raises
    ------
    FileError
        If the document is not such a JSON object. Errors within its values are found when they are converted.

    Examples
    --------
    >>> found = lazy_object(b'{"version": 1, "targets": [[2], [3]]}', "the entry", ["targets"])
    >>> found["version"].value(), list(found["targets"])
    (1, [[2], [3]])
    """
    check_utf8(content, what)
    document, spans = Document(content, what), dict[str, tuple[int, int]]()
    for key, start, stop, _ in document.members(document.start(), limit=len(content)):
        if key in spans:
            raise FileError(f"{what} has the key {safe_repr(key)} twice")
        if len(spans) == most:
            raise FileError(f"{what} has more than {most} keys")
        spans[key] = start, stop
    arrays = {key for key in spans if key in lazy and content[spans[key][0] : spans[key][0] + 1] == b"["}
    return {
        key: Elements(document, start) if key in arrays else Later(document, start, stop, key)
        for key, (start, stop) in spans.items()
    }


def check_utf8(content: bytes, what: str) -> None:
    """Raise FileError unless the content is UTF-8, without decoding it all at once."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), _PIECE):
            decoder.decode(content[start : start + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8: {error}") from error
