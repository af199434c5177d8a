"""A single merge of an adapter into a checkpoint: computes each tensor and the list of files to write."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tnadapt.algebra.changed_weights import change_in_place
from tnadapt.algebra.rounding import Float64Deltas, rounded, widened
from tnadapt.backends.blas_threads import one_blas_thread
from tnadapt.errors import FileError, TnadaptError, safe_repr
from tnadapt.targets.target import Target

from .._resolution import FLOATS, ResolvedTargets
from ..adapter_file import KEPT, AdapterFile
from ..atomic_files import sync_file
from ..checkpoint import Checkpoint, file_state
from ..container import DTYPES
from ..fingerprint import compare
from ._comparison import open_regular
from ._destination import Destination
from ._journal import MergeJournal
from ._shards import Change, Shard, Writer
from ._symlinks import Belonging

__all__ = ["Job", "Unfit"]

# Part of a merge's identity. Increase it if a release would compute different bits, so that it does not resume the work
# of an earlier one.
_ARITHMETIC = 1

_TAGS = {name: tag for tag, name in DTYPES.items()}


class Unfit(Exception):  # noqa: N818  # the message says what does not fit
    """The base does not fit the adapter. A retry would fail as well, so unfinished files are deleted."""


class Job:
    """A merge of an adapter into a checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, file: AdapterFile, digest: str, placed: ResolvedTargets, where: Destination
    ) -> None:
        self.checkpoint, self.file, self.placed, self.where = checkpoint, file, placed, where
        self.digest = digest
        #: The updates; None until the arrays that come from the base weights are computed.
        self.updates = Float64Deltas(file.plan, file.arrays, file.dtype) if file.complete else None
        self.of: dict[str, list[tuple[int, Target]]] = {}
        for index, target in placed.places:
            self.of.setdefault(target.name, []).append((index, target))
        self.resumed = self.bytes = 0

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Identity of this merge: an unfinished merge with the same one is resumed."""
        return {
            "arithmetic": _ARITHMETIC,
            "base": {os.path.realpath(file): state for file, state in self.checkpoint.states.items()},
            "adapter": self.digest,
        }

    # -- Checking before writing -------------------------------------------------------------

    def _check_base(self) -> None:
        """Raise Unfit if the base is not the one that the adapter was trained on."""
        known, entries = self.file.base, self.checkpoint.entries
        if known is None:
            return
        kinds = {FLOATS[entries[name].dtype] for name in self.of}
        # For several dtypes, use one that represents all their values, as when the fingerprint was taken.
        kind = kinds.pop() if len(kinds) == 1 else "float64" if "float64" in kinds else "float32"
        difference = compare(known, self._weights(kind), kind)
        if difference is not None:
            raise Unfit(
                f"is another base model than the one that the adapter was trained on: for the adapted weights, "
                f"{difference}. Give that one, or check_base=False (--no-check-base)"
            )

    def _weights(self, kind: str) -> Iterator[np.ndarray]:
        last: tuple[str, np.ndarray] | None = None
        for index, target in enumerate(self.placed.targets):
            if index in self.placed.parts:
                yield self._joined(index, kind)
                continue
            if last is None or last[0] != target.name:
                last = None
                last = target.name, self.checkpoint.array(target.name)
            weight, own = target.select(last[1]), FLOATS[self.checkpoint.entries[target.name].dtype]
            yield weight if own == kind else widened(weight, own).astype(kind)

    def _joined(self, index: int, kind: str) -> np.ndarray:
        """Return a weight that is stored as several tensors, in a dtype that represents its values."""
        found = []
        for part in self.placed.parts[index]:
            array, own = self.checkpoint.array(part.name), FLOATS[self.checkpoint.entries[part.name].dtype]
            found.append(array if own == kind else widened(array, own).astype(kind))
        return np.concatenate(found)

    def _compute_from_base(self, check_base: bool) -> None:
        """Compute the arrays that come from the base weights, of the base that the adapter was trained on."""
        if self.updates is not None:
            return
        if not check_base or self.file.base is None:
            raise Unfit(
                "has to be the base that the adapter was trained on, as arrays of the adapter are computed from its "
                "weights: leave check_base=False (--no-check-base) out, or save the adapter with store_bases=True"
            )
        self._check_base()
        try:
            plan = self.file.plan.with_base(self._base_weight)
        except TnadaptError as error:
            raise Unfit(f"does not give the arrays of the adapter that come from its weights: {error}") from error
        self.updates = Float64Deltas(plan, self.file.arrays, self.file.dtype)

    def _base_weight(self, index: int) -> np.ndarray:
        if index in self.placed.parts:
            return self._joined(index, "float64")
        target = self.placed.targets[index]
        own = FLOATS[self.checkpoint.entries[target.name].dtype]
        return np.asarray(widened(target.select(self.checkpoint.array(target.name)), own).reshape(target.shape))

    # -- Writing -----------------------------------------------------------------------------

    def run(self, work: MergeJournal, progress: Callable[[int, int], None], check_base: bool) -> None:
        """Write all files."""
        checkpoint = self.checkpoint
        self.resumed = len(work.done)
        self._compute_from_base(check_base)
        left = [file for file in checkpoint.files if os.path.basename(file) not in work.done]
        sizes = [os.path.getsize(file) for file in left]
        added = {} if checkpoint.files[-1] not in left else self._added
        total, done = sum(sizes) + sum(array.nbytes for _, array in added.values()), 0

        free = shutil.disk_usage(work.root).free
        if free < total:
            raise FileError(
                f"{total:,} bytes are to be written, and the disk has {free:,} left: free some space, or choose "
                "another place"
            )

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(done, max(total, done))

        shards = [
            Shard(
                file, work.path(name), self._changes(file), added if file == checkpoint.files[-1] else {},
                functools.partial(work.finished, name),
            )
            for file in left
            for name in [os.path.basename(file)]
        ]  # fmt: skip

        def beside() -> None:
            if check_base:
                self._check_base()
            self._copy_others(work)

        with one_blas_thread():
            Writer(checkpoint, on_bytes).write(shards, beside)
        try:
            changed = any(file_state(file) != state for file, state in checkpoint.states.items())
        except OSError:
            changed = True
        if changed:
            raise Unfit("was changed while it was merged: run it again")
        self.bytes = sum(os.path.getsize(work.path(os.path.basename(file))) for file in checkpoint.files)

    def _copy_others(self, work: MergeJournal) -> None:
        belonging = Belonging(self.checkpoint.folder)
        for name in self.where.others:
            path = work.path(name)
            work.make_folder(os.path.dirname(name))
            source = belonging.file(name)
            if source is None:
                raise Unfit(f"was changed while it was merged ({name}): run it again")
            _copy_small(source, path)
        if self.checkpoint.index is not None:
            self._write_index(work.path(os.path.basename(self.checkpoint.index)))

    def _changes(self, file: str) -> dict[str, Change]:
        """Return the changed tensors of a file, in the order of the long vector, in which F is computed."""
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
            assert self.updates is not None  # computed before anything is written
            whole = self._with_others(index, name, stored) if index in self.placed.parts else target.select(stored)
            flat = np.ascontiguousarray(whole).reshape(-1)
            plan, arrays = self.file.plan, self.file.arrays
            own = [arrays[name] for name in plan.weight_param_names[index]]
            problem = change_in_place(
                plan.applying, flat, whole.shape, dtype, self.updates.of(index), own, self.file.dtype
            )
            if problem == "update":
                raise Unfit(f"the update of {safe_repr(name)} is not finite; nothing was merged")
            if problem is not None:
                raise Unfit(
                    f"{safe_repr(name)} with its update leaves the range of {dtype}; nothing was merged: merge "
                    "into the "
                    "checkpoint in a wider dtype"
                )
            if index in self.placed.parts:
                flat = flat.reshape(whole.shape)[self._rows_of(index, name)]
            if not np.may_share_memory(flat, stored):
                target.write(stored, flat.reshape(target.shape))
        return stored

    def _with_others(self, index: int, name: str, stored: np.ndarray) -> np.ndarray:
        """Return a weight of which a tensor is a part, with the other parts from the checkpoint."""
        entries, parts = self.checkpoint.entries, self.placed.parts[index]
        other = next((part.name for part in parts if entries[part.name].dtype != entries[name].dtype), None)
        if other is not None:
            raise Unfit(f"has {safe_repr(name)} and {safe_repr(other)}, parts of one weight, in different dtypes")
        return np.concatenate([stored if part.name == name else self.checkpoint.array(part.name) for part in parts])

    def _rows_of(self, index: int, name: str) -> slice:
        start = 0
        for part in self.placed.parts[index]:
            if part.name == name:
                return slice(start, start + part.out)
            start += part.out
        raise AssertionError(name)

    def _replaced(self, name: str, stored_name: str, stored: np.ndarray) -> np.ndarray:
        tag = self.checkpoint.entries[stored_name].dtype
        return self._cast(name, tag)

    def _cast(self, name: str, tag: str) -> np.ndarray:
        """Convert a kept parameter to the dtype of the checkpoint."""
        array = self.file.kept[name]
        if tag not in FLOATS:
            return array.astype(array.dtype.newbyteorder("<"), copy=False)
        with np.errstate(over="ignore"):
            found = rounded(array.astype(np.float64), FLOATS[tag])
        if not np.isfinite(widened(found, FLOATS[tag])).all():
            raise Unfit(f"what the adapter keeps as {safe_repr(name)} leaves the range of {FLOATS[tag]}")
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
            _copy_small(os.path.realpath(self.checkpoint.index), path)
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
        sync_file(path)


def _copy_small(source: str, target: str) -> None:
    with open(open_regular(source), "rb") as file, open(target, "xb") as copy:
        shutil.copyfileobj(file, copy)
    sync_file(target)
