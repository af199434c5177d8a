"""``tnadapt.merge``: an adapter's updates added to a checkpoint on disk, one tensor at a time, without a framework."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

from tnadapt.errors import ConfigError, FileError, escaped, pluralize

from ..adapter_file import AdapterFile
from ..adapter_format import content_of, load
from ..checkpoint import file_state, open_checkpoint
from ..container import file_error_context, path_of
from ._comparison import open_regular
from ._destination import destination
from ._job import Job, Unfit
from ._journal import partial
from ._resolution import resolve

__all__ = ["MergeReport", "merge"]


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
        Other files of the folder: those that were copied, and those that were not: weights without the update, hidden
        folders, links to folders or out of the checkpoint, and what is no regular file (pipes, devices, sockets).
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

    def __repr__(self) -> str:
        return escaped(f"MergeReport({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})")

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
        A ``.safetensors`` file, an index, or a folder (:func:`~tnadapt.checkpoints.checkpoint.open_checkpoint`). It is
        not changed.
    adapter : path-like or AdapterFile
        What :func:`tnadapt.save` or :meth:`tnadapt.torch.Adapter.save` wrote.
    out : path-like
        A file where the base is one, else a folder: files of the same names, with the same tensors in the same places.
        Other files of the folder, such as ``config.json`` and a tokenizer, are copied; weights in other formats
        are left out, as they would be the base's, and so are links that lead out of the base's folder (a Hugging
        Face cache's blobs belong to it) and whatever is no regular file.
    overwrite : bool
        Whether a checkpoint that is there may be replaced, once the new one is whole. A folder is replaced as a whole:
        all other files in it go, too.
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
        quantised, an update or a sum leaves the range of the weight's dtype, something is there, another process is
        merging to the same place, or nothing can be written. There is nothing at ``out`` then, or what was there
        before.
    ConfigError
        If the adapter acts on activations (LoDA): that is no update of weights.

    Notes
    -----
    The arithmetic is that of :mod:`tnadapt.algebra.rounding`: the bytes are those of ``adapter.merge()`` and
    ``save_pretrained`` in memory. Memory: the largest tensor that is changed, some megabytes, and what F takes
    (:class:`~tnadapt.algebra.rounding.Float64Deltas`). Tensors that are not changed are copied by the kernel.

    Files are made in ``OUT.tnadapt-partial`` and take their place in one step when all is there
    (:mod:`tnadapt.checkpoints.merge._journal` says how). After a kill, or on a full disk, the same call continues with
    the files that were finished; if base or adapter have changed since, it starts over. A kill between publishing and
    the last clean-up means that the next call makes all files again, and, without ``overwrite``, compares what is there
    with them.

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
    checkpoint = open_checkpoint(base)
    file, digest, name = _adapter(adapter)
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
            # After a kill, what is there may be this very result: then it is compared with it at the end.
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
                    f"{pluralize(len(checkpoint.files), 'file')}. Run the same again to go on from there, or remove it"
                ) from error
            except Unfit:
                work.remove()
                raise
    except Unfit as error:
        raise FileError(f"{checkpoint.path}: {error}") from None
    return _report(job, check_base)


def _adapter(given: str | os.PathLike[str] | AdapterFile) -> tuple[AdapterFile, str, str | None]:
    """The adapter, the SHA-256 of its file, and its path if it has one."""
    if isinstance(given, AdapterFile):
        return given, hashlib.sha256(content_of(given)).hexdigest(), None
    path = path_of(given)
    with file_error_context(path):
        before = file_state(path)
    file = load(path)
    with file_error_context(path), open(open_regular(os.path.realpath(path)), "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        if file_state(path) != before:
            # Unfinished work of one adapter would be continued with another.
            raise FileError("was changed while it was read: run it again")
    return file, digest, path


def _report(job: Job, check_base: bool) -> MergeReport:
    where, placed, checkpoint = job.where, job.placed, job.checkpoint
    return MergeReport(
        out=where.path, files=len(checkpoint.files), tensors=len(checkpoint.entries) + len(placed.added),
        bytes=job.bytes, targets=len(placed.targets), changed=len(job.of),
        names=placed.how, base_checked=check_base and job.file.base is not None,
        replaced=tuple(sorted(placed.kept.values())), added=tuple(sorted(placed.added.values())),
        copied=where.others, left_out=where.left_out, resumed=job.resumed,
    )  # fmt: skip
