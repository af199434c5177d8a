"""A safetensors file like another one, with some tensors changed: the rest is copied by the kernel."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from .checkpoint import Checkpoint
from .container import Entry, raw_bytes
from .copying import Stopped, copy_range, write_at

__all__ = ["Writer", "extended"]

Change = Callable[[np.ndarray], np.ndarray]


class Writer:
    """Writes files of a checkpoint anew, two things at once: untouched bytes are copied while tensors are computed.

    Parameters
    ----------
    checkpoint : Checkpoint
        What is read.
    told : callable
        Called with the number of bytes of each piece that is written; by one thread at a time.

    Notes
    -----
    A context manager. Memory: one tensor that is changed, and what changing it takes.
    """

    def __init__(self, checkpoint: Checkpoint, told: Callable[[int], None]) -> None:
        self.checkpoint, self._told = checkpoint, told
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._copier = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._stop.set()
        self._copier.shutdown(cancel_futures=kind is not None)

    def write(
        self,
        file: str,
        out: str,
        changes: Mapping[str, Change],
        added: Mapping[str, tuple[str, np.ndarray]],
        finished: Callable[[], None],
    ) -> None:
        """Write one file.

        Parameters
        ----------
        file : str
            Which file of the checkpoint.
        out : str
            Where to.
        changes : mapping of str to callable
            Of each tensor to be changed: what it becomes, in the same dtype and shape; in this order.
        added : mapping of str to (str, ndarray)
            Tensors to come after the others, with their dtypes.
        finished : callable
            Called when the file is whole and synchronised, at :meth:`wait` or the next :meth:`write` at the latest.
        """
        entries = {
            name: entry for name, entry in self.checkpoint.entries.items() if self.checkpoint.shard[name] == file
        }
        old, size = self.checkpoint.data[file], max((entry.stop for entry in entries.values()), default=0)
        head = extended(entries, self.checkpoint.metadata[file], added) if added else b""
        new = len(head) if added else old
        # Untouched runs of bytes; with the header itself, where that stays.
        spots = sorted(entries[name][2:] for name in changes)
        edges = [-old if not added else 0, *(edge for spot in spots for edge in spot), size]
        runs = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        with open(out, "xb", buffering=0) as target:
            target.truncate(new + size + sum(array.nbytes for _, array in added.values()))
            copied = self._copier.submit(self._copy, file, out, [(old + a, new + a, b - a) for a, b in runs])
            if added:
                self._put(target, 0, head)
                at = new + size
                for _, array in added.values():
                    self._put(target, at, raw_bytes(array))
                    at += array.nbytes
            for name, change in changes.items():
                if copied.done() and copied.exception() is not None:
                    break
                made = change(self.checkpoint.array(name))
                self._put(target, new + entries[name].start, raw_bytes(made))
                del made
            copied.result()
        self.wait()
        self._last = self._copier.submit(_synchronise, out, finished)

    def wait(self) -> None:
        """Until the last file is synchronised."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def _copy(self, file: str, out: str, runs: Sequence[tuple[int, int, int]]) -> None:
        with open(file, "rb", buffering=0) as source, open(out, "r+b", buffering=0) as target:
            for start, at, count in runs:
                copy_range(source, start, target, at, count, self._copied)

    def _copied(self, count: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._told(count)

    def _put(self, target: BinaryIO, at: int, content: bytes | memoryview) -> None:
        write_at(target, at, content)
        with self._lock:
            self._told(len(content))


def _synchronise(path: str, finished: Callable[[], None]) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    finished()


def extended(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], added: Mapping[str, tuple[str, np.ndarray]]
) -> bytes:
    """A file's head (the length and the header) with tensors after those that are there.

    Examples
    --------
    >>> extended({"a": Entry("U8", (2,), 0, 2)}, {}, {"b": ("U8", np.zeros(3, np.uint8))})[8:].rstrip()
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[3],"data_offsets":[2,5]}}'
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    listed = list(entries.items())
    at = max((entry.stop for entry in entries.values()), default=0)
    for name, (dtype, array) in added.items():
        listed.append((name, Entry(dtype, array.shape, at, at + array.nbytes)))
        at += array.nbytes
    for name, entry in listed:
        header[name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
