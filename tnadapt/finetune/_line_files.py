"""Files of JSON lines that grow by whole lines, each on disk before the next step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = ["append_line", "undamaged_lines"]


def append_line(file: IO[bytes], line: Mapping[str, Any]) -> None:
    """Append a line to an unbuffered file, and synchronize it; if that fails, the file is as it was.

    Raises
    ------
    OSError
        If it cannot be written, such as on a full disk.
    """
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(json.dumps(line).encode() + b"\n")
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def undamaged_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that are JSON objects; skip others, such as the last one of a process that was killed."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found
