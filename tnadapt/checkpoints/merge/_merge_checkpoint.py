"""``tnadapt.merge``: add an adapter's updates to a checkpoint on disk, one tensor at a time, without a framework."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.rounding import Float64Deltas, change_in_place
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import one_blas_thread
from tnadapt.backends.stored_floats import rounded, widened
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.adapter_format import chosen_member, content_of, load_single
from tnadapt.checkpoints.atomic_files import sync_file
from tnadapt.checkpoints.checkpoint import Checkpoint, file_state, open_checkpoint
from tnadapt.checkpoints.container import TAG_OF, file_error_context, path_of
from tnadapt.checkpoints.population_file import PopulationFile
from tnadapt.checkpoints.stored_weights import FLOATS, ResolvedTargets, StoredWeights, resolve
from tnadapt.errors import ConfigError, FileError, TnadaptError, escaped, pluralize, safe_repr
from tnadapt.targets.target import Target

from ._destination import Belonging, Destination, destination
from ._journal import MergeJournal, partial
from ._shards import Change, Shard, Writer, open_regular

# -- One merge: each tensor is computed, and the list of files to write ------------------------------------------------


# Part of a merge's identity. Increase it if a release would compute different bits, so that it does not resume the work
# of an earlier one.
_ARITHMETIC = 1


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
        self.base = StoredWeights(checkpoint, placed.tensors)
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
        difference = self.base.difference(self.file.base)
        if difference is not None:
            raise Unfit(
                f"is another base model than the one that the adapter was trained on: for the adapted weights, "
                f"{difference}. Give that one, or check_base=False (--no-check-base)"
            )

    def _compute_from_base(self, check_base: bool) -> None:
        """Compute the arrays that come from the base weights, if this is the base the adapter was trained on."""
        if self.updates is not None:
            return
        if not check_base or self.file.base is None:
            raise Unfit(
                "has to be the base that the adapter was trained on, as arrays of the adapter are computed from its "
                "weights: leave check_base=False (--no-check-base) out, or save the adapter with store_bases=True"
            )
        self._check_base()
        try:
            plan = self.file.plan.with_base(self.base.of)
        except TnadaptError as error:
            raise Unfit(f"does not give the arrays of the adapter that come from its weights: {error}") from error
        self.updates = Float64Deltas(plan, self.file.arrays, self.file.dtype)

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
        """Return the changed tensors of a file, in the order of the long vector, as F is computed in that order."""
        shard = self.checkpoint.shard
        changes: dict[str, Change] = {
            name: functools.partial(self._updated, name) for name in self.of if shard[name] == file
        }
        for name, stored in self.placed.kept.items():
            if shard[stored] == file:
                changes[stored] = functools.partial(self._kept, name, self.checkpoint.entries[stored].dtype)
        return changes

    def _updated(self, name: str, stored: np.ndarray) -> np.ndarray:
        dtype = FLOATS[self.checkpoint.entries[name].dtype]
        for index, target in self.of[name]:
            assert self.updates is not None  # computed before anything is written
            parts = self.placed.tensors[index]
            whole = self._with_others(parts, name, stored) if len(parts) > 1 else target.select(stored)
            flat = np.ascontiguousarray(whole).reshape(-1)
            plan, arrays = self.file.plan, self.file.arrays
            weight_params = [arrays[name] for name in plan.weight_param_names[index]]
            problem = change_in_place(
                plan.applying, flat, whole.shape, dtype, self.updates.of(index), weight_params, self.file.dtype
            )
            if problem == "update":
                raise Unfit(f"the update of {safe_repr(name)} is not finite; nothing was merged")
            if problem is not None:
                raise Unfit(
                    f"{safe_repr(name)} with its update leaves the range of {dtype}; nothing was merged: merge into "
                    "the checkpoint in a wider dtype"
                )
            if len(parts) > 1:
                place = [part.name for part in parts].index(name)
                start = sum(part.out for part in parts[:place])
                flat = flat.reshape(whole.shape)[start : start + len(stored)]
            if not np.may_share_memory(flat, stored):
                target.write(stored, flat.reshape(target.shape))
        return stored

    def _with_others(self, parts: Sequence[Target], name: str, stored: np.ndarray) -> np.ndarray:
        """Complete a tensor that is a part of a weight with the other parts, from the checkpoint."""
        entries = self.checkpoint.entries
        other = next((part.name for part in parts if entries[part.name].dtype != entries[name].dtype), None)
        if other is not None:
            raise Unfit(f"has {safe_repr(name)} and {safe_repr(other)}, parts of one weight, in different dtypes")
        return np.concatenate([stored if part.name == name else self.checkpoint.array(part.name) for part in parts])

    def _kept(self, name: str, tag: str, stored: np.ndarray | None = None) -> np.ndarray:
        """Return a kept parameter in the dtype of the checkpoint, whatever the stored one is."""
        array = self.file.kept[name]
        if tag not in FLOATS:
            return array.astype(array.dtype.newbyteorder("<"), copy=False)
        with np.errstate(over="ignore"):
            values = rounded(array.astype(np.float64), FLOATS[tag])
        if not np.isfinite(widened(values, FLOATS[tag])).all():
            raise Unfit(f"what the adapter keeps as {safe_repr(name)} leaves the range of {FLOATS[tag]}")
        return np.asarray(values.astype(values.dtype.newbyteorder("<"), copy=False), order="C")

    @functools.cached_property
    def _added(self) -> dict[str, tuple[str, np.ndarray]]:
        tensors = {}
        for name, new in self.placed.added.items():
            tag = TAG_OF[self.file.dtypes.get(KEPT + name, self.file.kept[name].dtype.name)]
            tensors[new] = tag, self._kept(name, tag)
        return tensors

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


# -- The function ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes
    ----------
    out : str
        The file or folder that was written.
    files, tensors, bytes : int
        Numbers of its safetensors files, of the tensors in them, and of the bytes of these files.
    targets, changed : int
        Numbers of the adapter's weights, and of the tensors that hold them.
    names : str
        How the adapter's weights were found if they have other names in the checkpoint; otherwise empty.
    base_checked : bool
        Whether the base was verified to be the one that the adapter was trained on.
    replaced, added : tuple of str
        Parameters kept by the adapter, such as a trained head: tensors of the checkpoint that they replaced, and
        tensors that the checkpoint lacked.
    copied, left_out : tuple of str
        Other files of the folder that were copied, and that were not: weights without the update, hidden folders, links
        to folders or out of the checkpoint, and everything that is not a regular file (pipes, devices, sockets).
    resumed : int
        Number of files that an earlier run had finished.
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

    def __repr__(self) -> str:
        return escaped(f"MergeReport({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dictionary."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@checks_arguments
def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterFile | PopulationFile,
    out: str | os.PathLike[str],
    *,
    member: int | str | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Add an adapter's updates to a checkpoint on disk, and write the result as another checkpoint.

    Parameters
    ----------
    base : path-like
        A ``.safetensors`` file, an index, or a folder (:func:`~tnadapt.checkpoints.checkpoint.open_checkpoint`). It is
        not changed.
    adapter : path-like, AdapterFile or PopulationFile
        An adapter written by :func:`tnadapt.save` or :meth:`tnadapt.torch.Adapter.save`.
    out : path-like
        A file if the base is one, otherwise a folder with files of the same names and the same tensors at the same
        places. Other files of the folder, such as ``config.json`` and a tokenizer, are copied. Weights in other formats
        are left out, as they lack the update; so are links that lead out of the base's folder (a Hugging Face cache's
        blobs belong to it) and everything that is not a regular file.
    member : int or str, optional
        Of a population, the number or name of the member to merge.
    overwrite : bool
        Whether an existing checkpoint may be replaced, once the new one is complete. A folder is replaced as a whole,
        including all other files in it.
    check_base : bool
        Whether the base's weights must be those that the adapter was trained on.
    progress : callable, optional
        Called repeatedly with the number of bytes written and the total; by one thread at a time.

    Returns
    -------
    MergeReport

    Raises
    ------
    FileError
        If base or adapter is damaged; they do not belong together (names, shapes, fingerprint); a weight is quantized;
        an update or a sum leaves the range of the weight's dtype; ``out`` exists; another process is merging to the
        same path; or the result cannot be written. ``out`` is unchanged then.
    ConfigError
        If the adapter acts on activations (LoDA) and so does not update weights.

    Notes
    -----
    The arithmetic is that of :mod:`tnadapt.algebra.rounding`: the bytes equal those of ``adapter.merge()`` and
    ``save_pretrained`` in memory. Memory is needed for the largest changed tensor, a few megabytes, and the computation
    of F (:class:`~tnadapt.algebra.rounding.Float64Deltas`). The kernel copies unchanged tensors.

    Files are written to ``OUT.tnadapt-partial`` and moved to their final path in one step when all are complete, as
    described in :mod:`tnadapt.checkpoints.merge._journal`. After a kill or a full disk, the same call resumes with the
    finished files; if base or adapter have changed since, it starts over. After a kill between publishing and the final
    clean-up, the next call recomputes all files and, without ``overwrite``, compares them with the existing ones.

    Examples
    --------
    >>> import tempfile, tnadapt as tna
    >>> import numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> config, targets = tna.presets.dense(), [tna.Target("layer.q", (2, 2), "q")]
    >>> file = tna.AdapterFile(config, targets, {"group0.split0.dense": np.array([1.0, 0.0, 0.0, 0.5], np.float32)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layer.q.weight": np.ones((2, 2), np.float16)}, folder + "/base.safetensors")
    ...     report = tna.merge(folder + "/base.safetensors", file, folder + "/merged.safetensors")
    ...     load_file(folder + "/merged.safetensors")["layer.q.weight"].tolist(), report.changed
    ([[2.0, 1.0], [1.0, 1.5]], 1)
    """
    if isinstance(base, (AdapterFile, PopulationFile)):
        raise FileError(f"base is an adapter; {_ORDER}")
    if hasattr(base, "named_modules"):
        raise FileError(
            "base is a model in memory, and tnadapt.merge merges files: call adapter.merge(), or give a folder's path"
        )
    checkpoint = open_checkpoint(base)
    if checkpoint.is_adapter:
        raise FileError(f"{checkpoint.path}: is an adapter; {_ORDER}")
    file, digest, name = _adapter(adapter, member)
    if file.activation is not None:
        raise ConfigError(
            f"{name or 'the adapter'} has {file.activation!r} between its factors (LoDA), so that its update depends "
            "on the input: it cannot be merged; attach it to the model"
        )
    where = destination(out, checkpoint, name)
    with file_error_context(checkpoint.path):
        job = Job(checkpoint, file, digest, resolve(checkpoint, file), where)
        identity = job.identity
    try:
        with file_error_context(where.path), partial(where.path, identity, where.refusal, overwrite) as work:
            # After a kill, existing content may be this very result: publishing compares it then.
            if overwrite or not work.maybe_published:
                where.need_free(overwrite)
            try:
                job.run(work, progress or (lambda done, total: None), check_base)
                work.publish(where.name)
            except OSError as error:
                if not work.done:
                    raise
                raise FileError(
                    f"{error.strerror or error}. Finished, and kept in {work.root}: {len(work.done)} of "
                    f"{pluralize(len(checkpoint.files), 'file')}. Run the same again to resume, or remove it"
                ) from error
            except Unfit:
                work.remove()
                raise
    except Unfit as error:
        raise FileError(f"{checkpoint.path}: {error}") from None
    return _report(job, check_base)


_ORDER = "BASE comes first, ADAPTER second"


def _adapter(
    adapter: str | os.PathLike[str] | AdapterFile | PopulationFile, member: int | str | None
) -> tuple[AdapterFile, str, str | None]:
    """Return the adapter, the SHA-256 of its file, and its path if it has one."""
    if isinstance(adapter, (AdapterFile, PopulationFile)):
        file = chosen_member(adapter, member, "adapter ")
        return file, hashlib.sha256(content_of(file)).hexdigest(), None
    path = path_of(adapter)
    if member is not None:
        # Not the digest of the file, to which other members may be appended before the merge is resumed.
        file = load_single(path, member=member)
        return file, hashlib.sha256(content_of(file)).hexdigest(), path
    with file_error_context(path):
        before = file_state(path)
    file = load_single(path)
    with file_error_context(path), open(open_regular(os.path.realpath(path)), "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        if file_state(path) != before:
            # Otherwise, unfinished work could be resumed with another adapter.
            raise FileError("was changed while it was read: run it again")
    return file, digest, path


def _report(job: Job, check_base: bool) -> MergeReport:
    where, placed, checkpoint = job.where, job.placed, job.checkpoint
    return MergeReport(
        out=where.path, files=len(checkpoint.files), tensors=len(checkpoint.entries) + len(placed.added),
        bytes=job.bytes, targets=len(placed.tensors), changed=len(job.of),
        names=placed.how, base_checked=check_base and job.file.base is not None,
        replaced=tuple(sorted(placed.kept.values())), added=tuple(sorted(placed.added.values())),
        copied=where.others, left_out=where.left_out, resumed=job.resumed,
    )  # fmt: skip
