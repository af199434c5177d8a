"""``tnadapt.merge``: an adapter's updates added to a checkpoint on disk, one tensor at a time, without a framework."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .adapter_file import KEPT, AdapterFile, counted
from .checkpoint import Checkpoint, open_checkpoint
from .container import DTYPES, about
from .destination import Destination, destination
from .errors import ConfigError, FileError, shown
from .files import content_of, load
from .fingerprint import compare
from .partial import SUFFIX, Partial, partial
from .placing import FLOATS, Placed, place
from .shards import Change, Shard, Writer
from .summing import ExactUpdates, add_in_place, rounded, widened
from .target import Target

__all__ = ["MergeReport", "merge"]

# In the identity of what is half made: another number where a release would compute other bits.
_ARITHMETIC = 1

_TAGS = {name: tag for tag, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes
    ----------
    out : str
        The file or folder that was made.
    files, tensors, bytes : int
        Safetensors files of it, tensors in them, and bytes of these files.
    targets, changed : int
        Weights of the adapter, and tensors that they are in.
    names : str
        How the adapter's weights were found where they have other names in the checkpoint; else empty.
    base_checked : bool
        Whether the base is known to be the one that the adapter was trained on.
    replaced, added : tuple of str
        Tensors that the adapter keeps (a trained head): those of the checkpoint that they replaced, and those that it
        lacked.
    copied, left_out : tuple of str
        Other files of the folder: those that were copied, and those that were not, as they are weights without the
        update, or hidden folders.
    resumed : int
        Files that an earlier run had finished.
    """

    out: str
    files: int
    tensors: int
    bytes: int
    targets: int
    changed: int
    names: str
    base_checked: bool
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON knows them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    check_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Add an adapter's updates to a checkpoint on disk, and write the result as another checkpoint.

    Parameters
    ----------
    base : path-like
        A ``.safetensors`` file, an index, or a folder (:func:`~tnadapt.checkpoint.open_checkpoint`). It is not changed.
    adapter : path-like or AdapterFile
        What :func:`tnadapt.save` or :meth:`tnadapt.torch.Adapter.save` wrote.
    out : path-like
        A file where the base is one, else a folder: files of the same names, with the same tensors in the same places.
        Other files of the folder, such as ``config.json`` and a tokenizer, are copied; weights in other formats
        are left out, as they would be the base's.
    overwrite : bool
        Whether a checkpoint that is there may be replaced, once the new one is whole.
    check_base : bool
        Whether the base's weights must be those that the adapter was trained on.
    progress : callable, optional
        Called with the bytes that are written and all there are to write, many times; by one thread at a time.

    Returns
    -------
    MergeReport

    Raises
    ------
    FileError
        If base or adapter is damaged, they do not belong together (names, shapes, fingerprint), a weight is
        quantised, an update or a sum leaves the range of the weight's dtype, something is there, or nothing can be
        written. There is nothing at ``out`` then, or what was there before.
    ConfigError
        If the adapter acts on activations (LoDA): that is no update of weights.

    Notes
    -----
    The arithmetic is that of :mod:`tnadapt.summing`: the bytes are those of ``adapter.merge()`` and
    ``save_pretrained`` in memory. Memory: the largest tensor that is changed, some megabytes, and what F takes
    (:class:`~tnadapt.summing.ExactUpdates`). Tensors that are not changed are copied by the kernel.

    Files are made in ``OUT.tnadapt-partial`` and renamed when all is there. Killed, or out of disk space, the same call
    goes on with the files that were finished; where base or adapter have changed since, it starts anew.

    Examples
    --------
    >>> import tempfile, tnadapt as tna
    >>> from safetensors.numpy import load_file, save_file
    >>> config, targets = tna.presets.dense(), [tna.Target("layer.q", (2, 2), "q")]
    >>> file = tna.AdapterFile(config, targets, {"group0.split0.dense": np.array([1.0, 0.0, 0.0, 0.5], np.float32)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layer.q.weight": np.ones((2, 2), np.float16)}, folder + "/base.safetensors")
    ...     report = tna.merge(folder + "/base.safetensors", file, folder + "/merged.safetensors")
    ...     load_file(folder + "/merged.safetensors")["layer.q.weight"].tolist(), report.changed
    ([[2.0, 1.0], [1.0, 1.5]], 1)
    """
    checkpoint = open_checkpoint(base)
    file, digest, name = _adapter(adapter)
    if file.activation is not None:
        raise ConfigError(
            f"{name or 'the adapter'} has {file.activation!r} between its factors (LoDA), so that its update depends "
            "on the input: it cannot be merged; attach it to the model"
        )
    where = destination(out, checkpoint, name)
    with about(checkpoint.path):
        job = _Job(checkpoint, file, digest, place(checkpoint, file), where)
        identity = job.identity
    with about(where.path):
        if not os.path.lexists(where.path + SUFFIX):  # else an earlier run may have moved what is there
            where.need_free(overwrite)
    try:
        with about(where.path), partial(where.path, identity) as work:
            if work.complete:
                job.resumed = len(checkpoint.files)
                return job.report(check_base)
            where.need_free(overwrite)
            try:
                job.run(work, progress or (lambda done, total: None), job.check_base if check_base else None)
                work.publish(where.name, overwrite)
            except OSError as error:
                if not work.done:
                    raise
                raise FileError(
                    f"{error.strerror or error}. {counted(len(work.done), 'finished file')} of {len(checkpoint.files)} "
                    f"are kept in {work.root}: run the same again to go on from there, or remove it"
                ) from error
            except _Unfit:
                work.remove()
                raise
    except _Unfit as error:
        raise FileError(f"{checkpoint.path}: {error}") from None
    return job.report(check_base)


def _adapter(given: str | os.PathLike[str] | AdapterFile) -> tuple[AdapterFile, str, str | None]:
    """The adapter, the SHA-256 of its file, and its path if it has one."""
    if isinstance(given, AdapterFile):
        return given, hashlib.sha256(content_of(given)).hexdigest(), None
    file, path = load(given), os.fsdecode(given)
    with about(path), open(path, "rb") as content:
        return file, hashlib.file_digest(content, "sha256").hexdigest(), path


class _Unfit(Exception):  # noqa: N818  # what does not fit is the message
    """The base does not fit the adapter: no other run would do better, and nothing is kept for one."""


class _Job:
    """One merge: what becomes of each tensor."""

    def __init__(
        self, checkpoint: Checkpoint, file: AdapterFile, digest: str, placed: Placed, where: Destination
    ) -> None:
        self.checkpoint, self.file, self.placed, self.where = checkpoint, file, placed, where
        self.digest = digest
        self.updates = ExactUpdates(file.plan, file.arrays, file.dtype)
        self.of: dict[str, list[tuple[int, Target]]] = {}
        for index, target in enumerate(placed.targets):
            self.of.setdefault(target.name, []).append((index, target))
        self.resumed = 0

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this merge from another: where an unfinished one has it, it is gone on with."""
        return {
            "arithmetic": _ARITHMETIC,
            "base": self._state_of_base(),
            "adapter": self.digest,
        }

    def _state_of_base(self) -> dict[str, list[int]]:
        found = {}
        for path in self.checkpoint.files:
            state = os.stat(path)
            found[os.path.realpath(path)] = [state.st_size, state.st_mtime_ns]
        return found

    # -- Looking before writing --------------------------------------------------------------

    def check_base(self) -> None:
        """An error where the base is not the one that the adapter was trained on."""
        known, entries = self.file.base, self.checkpoint.entries
        if known is None:
            return
        kinds = {FLOATS[entries[name].dtype] for name in self.of}
        # Of several dtypes, the one that has all their numbers, as when it was taken.
        kind = kinds.pop() if len(kinds) == 1 else "float64" if "float64" in kinds else "float32"
        difference = compare(known, self._weights(kind), kind)
        if difference is not None:
            raise _Unfit(
                f"is another base model than the one that the adapter was trained on: of the adapted weights, "
                f"{difference}. Give that one, or check_base=False (--any-base)"
            )

    def _weights(self, kind: str) -> Iterator[np.ndarray]:
        last: tuple[str, np.ndarray] | None = None
        for target in self.placed.targets:
            if last is None or last[0] != target.name:
                last = None
                last = target.name, self.checkpoint.array(target.name)
            weight, own = target.select(last[1]), FLOATS[self.checkpoint.entries[target.name].dtype]
            yield weight if own == kind else widened(weight, own).astype(kind)

    # -- Writing -----------------------------------------------------------------------------

    def run(self, work: Partial, progress: Callable[[int, int], None], meanwhile: Callable[[], None] | None) -> None:
        """Make all files; ``meanwhile`` is called once, when that has begun, and may end it."""
        checkpoint = self.checkpoint
        self.resumed = len(work.done)
        left = [file for file in checkpoint.files if os.path.basename(file) not in work.done]
        sizes = [os.path.getsize(file) for file in left]
        added = {} if checkpoint.files[-1] not in left else self._added
        total, done = sum(sizes) + sum(array.nbytes for _, array in added.values()), 0

        def told(count: int) -> None:
            nonlocal done
            done += count
            progress(done, max(total, done))

        for name in self.where.others:
            path = work.path(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _copy_small(os.path.join(checkpoint.folder, name), path)
        if checkpoint.index is not None:
            self._write_index(work.path(os.path.basename(checkpoint.index)))
        shards = [
            Shard(
                file, work.path(name), self._changes(file), added if file == checkpoint.files[-1] else {},
                functools.partial(work.finished, name),
            )
            for file in left
            for name in [os.path.basename(file)]
        ]  # fmt: skip
        Writer(checkpoint, told).write(shards, meanwhile)
        if self._state_of_base() != self.identity["base"]:
            raise _Unfit("was changed while it was merged: run it again")

    def _changes(self, file: str) -> dict[str, Change]:
        """In the order of the long vector, which F is made in."""
        shard = self.checkpoint.shard
        found: dict[str, Change] = {
            name: functools.partial(self._updated, name) for name in self.of if shard[name] == file
        }
        for name, stored in self.placed.kept.items():
            if shard[stored] == file:
                found[stored] = functools.partial(self._replaced, name, stored)
        return found

    def _updated(self, name: str, stored: np.ndarray) -> np.ndarray:
        dtype = FLOATS[self.checkpoint.entries[name].dtype]
        for index, target in self.of[name]:
            flat = np.ascontiguousarray(target.select(stored)).reshape(-1)
            problem = add_in_place(flat, dtype, self.updates.of(index))
            if problem == "update":
                raise _Unfit(f"the update of {shown(name)} is not finite; nothing was merged")
            if problem is not None:
                raise _Unfit(
                    f"{shown(name)} with its update leaves the range of {dtype}; nothing was merged: merge into the "
                    "checkpoint in a wider dtype"
                )
            if not np.may_share_memory(flat, stored):
                target.block(stored)[...] = target.like_block(flat.reshape(target.shape))
        return stored

    def _replaced(self, name: str, stored_name: str, stored: np.ndarray) -> np.ndarray:
        tag = self.checkpoint.entries[stored_name].dtype
        return self._cast(name, tag)

    def _cast(self, name: str, tag: str) -> np.ndarray:
        """A kept parameter as a checkpoint has it."""
        array = self.file.kept[name]
        if tag not in FLOATS:
            return array.astype(array.dtype.newbyteorder("<"), copy=False)
        with np.errstate(over="ignore"):
            found = rounded(array.astype(np.float64), FLOATS[tag])
        if not np.isfinite(widened(found, FLOATS[tag])).all():
            raise _Unfit(f"what the adapter keeps as {shown(name)} leaves the range of {FLOATS[tag]}")
        return np.asarray(found.astype(found.dtype.newbyteorder("<"), copy=False), order="C")

    @functools.cached_property
    def _added(self) -> dict[str, tuple[str, np.ndarray]]:
        found = {}
        for name, new in self.placed.added.items():
            tag = _TAGS[self.file.dtypes.get(KEPT + name, self.file.kept[name].dtype.name)]
            found[new] = tag, self._cast(name, tag)
        return found

    def _write_index(self, path: str) -> None:
        assert self.checkpoint.index is not None
        if not self._added:
            _copy_small(self.checkpoint.index, path)
            return
        with open(self.checkpoint.index, encoding="utf-8") as file:
            index = json.load(file)
        last = os.path.basename(self.checkpoint.files[-1])
        index["weight_map"].update(dict.fromkeys(self._added, last))
        size = sum(array.nbytes for _, array in self._added.values())
        if isinstance(index.get("metadata"), dict) and isinstance(index["metadata"].get("total_size"), int):
            index["metadata"]["total_size"] += size
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def report(self, check_base: bool) -> MergeReport:
        """What came of it."""
        files = (
            [self.where.path]
            if self.where.name
            else [os.path.join(self.where.path, os.path.basename(file)) for file in self.checkpoint.files]
        )
        return MergeReport(
            out=self.where.path, files=len(files), tensors=len(self.checkpoint.entries) + len(self.placed.added),
            bytes=sum(os.path.getsize(file) for file in files), targets=len(self.placed.targets), changed=len(self.of),
            names=self.placed.how, base_checked=check_base and self.file.base is not None,
            replaced=tuple(sorted(self.placed.kept.values())), added=tuple(sorted(self.placed.added.values())),
            copied=self.where.others, left_out=self.where.left_out, resumed=self.resumed,
        )  # fmt: skip


def _copy_small(source: str, target: str) -> None:
    import shutil

    shutil.copyfile(source, target)
    handle = os.open(target, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
