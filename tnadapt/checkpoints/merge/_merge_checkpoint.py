"""``tnadapt.merge``: add an adapter's updates to a checkpoint on disk, one tensor at a time, without a framework."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, FileError, escaped, pluralize

from .._resolution import resolve
from ..adapter_file import AdapterFile
from ..adapter_format import content_of, load
from ..checkpoint import file_state, open_checkpoint
from ..container import file_error_context, path_of
from ._comparison import open_regular
from ._destination import destination
from ._job import Job, Unfit
from ._journal import partial

__all__ = ["MergeReport", "merge"]


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
        An adapter written by :func:`tnadapt.save` or :meth:`tnadapt.torch.Adapter.save`.
    out : path-like
        A file if the base is one, otherwise a folder with files of the same names and the same tensors at the same
        places. Other files of the folder, such as ``config.json`` and a tokenizer, are copied. Weights in other formats
        are left out, as they lack the update; so are links that lead out of the base's folder (a Hugging Face cache's
        blobs belong to it) and everything that is not a regular file.
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


def _adapter(given: str | os.PathLike[str] | AdapterFile) -> tuple[AdapterFile, str, str | None]:
    """Return the adapter, the SHA-256 of its file, and its path if it has one."""
    if isinstance(given, AdapterFile):
        return given, hashlib.sha256(content_of(given)).hexdigest(), None
    path = path_of(given)
    with file_error_context(path):
        before = file_state(path)
    file = load(path)
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
        bytes=job.bytes, targets=len(placed.targets), changed=len(job.of),
        names=placed.how, base_checked=check_base and job.file.base is not None,
        replaced=tuple(sorted(placed.kept.values())), added=tuple(sorted(placed.added.values())),
        copied=where.others, left_out=where.left_out, resumed=job.resumed,
    )  # fmt: skip
