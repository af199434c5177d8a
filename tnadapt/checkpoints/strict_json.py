"""Strict reading of untrusted JSON: an object without duplicate keys, finite numbers only, files of limited size."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from tnadapt.errors import FileError, safe_repr

__all__ = ["MAX_CONFIG", "json_file", "strict_json", "strict_value"]

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
    found = strict_value(text, what)
    if not isinstance(found, dict):
        raise FileError(f"{what} must be a JSON object; got {safe_repr(found)}")
    return found


def strict_value(text: str, what: str) -> Any:
    """Return the JSON value in a text, under the rules of :func:`strict_json`.

    Examples
    --------
    >>> strict_value("[1, 2.5, null]", "the text")
    [1, 2.5, None]
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set[str]()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FileError(f"{what} has the key {safe_repr(twice)} twice")
        return found

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
