"""The result of a conversion: the adapter in its new form, its error, and how to save it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.adapter_format import content_of
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.container import file_error_context, path_of
from tnadapt.errors import FileError, escaped

from ._files import replace_folder

__all__ = ["Conversion", "check_free"]


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """An adapter in another form, with its error relative to the original.

    Attributes
    ----------
    kind : str
        The new form: "tnadapt", "peft-lora", "lycoris-full" and so on.
    origin : str
        The form of the source; "lycoris" if a file mixes methods.
    exact : bool
        Whether the only error is that of rounding.
    error : float
        ``|new - old| / |old|``, in the Frobenius norm of all updates together, measured on the written bytes; 0 if all
        updates are zero.
    errors : dict of str to float
        The relative error of each weight, by its name in a state dict; infinite if only the new update is nonzero.
    parameters : (int, int)
        Elements of the adapter's tensors before and after.
    notes : tuple of str
        Remarks, such as that all updates are stored dense.
    file : AdapterFile or None
        The adapter, if its kind is "tnadapt".
    tensors : dict of str to ndarray
        The tensors of all other kinds, as they are written; bfloat16 values as float32, see ``dtypes``.
    dtypes : dict of str to str
        Tensors that are written as "bfloat16".
    config : dict or None
        PEFT's ``adapter_config.json``.
    files : dict of str to bytes
        The files of all kinds but "tnadapt"; ``""`` is the name of an adapter's only file.
    """

    kind: str
    origin: str
    exact: bool
    error: float
    errors: Mapping[str, float]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()
    file: AdapterFile | None = None
    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def content(self) -> bytes:
        """Content of the file with the tensors; empty for kind "tnadapt"."""
        return next(iter(self.files.values()), b"")

    def __repr__(self) -> str:
        return f"Conversion({self.origin!r} -> {self.kind!r}, {self._quality()})"

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.origin} -> {self.kind}, {len(self.errors)} weight{'s' * (len(self.errors) != 1)}",
            f"parameters {before:,} -> {after:,}",
            self._quality(),
        ]
        if not self.exact:
            worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
            lines += [f"  {error:9.3g}  {escaped(name)}" for name, error in worst]
        return "\n".join([*lines, *map(escaped, self.notes)])

    def _quality(self) -> str:
        what = "exact but for rounding" if self.exact else "NOT exact"
        return f"{what}: relative error {self.error:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dictionary, without the tensors."""
        before, after = self.parameters
        return {
            "from": self.origin,
            "to": self.kind,
            "exact": self.exact,
            "error": self.error,
            "errors": {name: error if error < float("inf") else None for name, error in self.errors.items()},
            "parameters": {"before": before, "after": after},
            "notes": list(self.notes),
        }

    @checks_arguments
    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the adapter: a folder for PEFT, otherwise a file.

        Parameters
        ----------
        path : str or PathLike
            Path in an existing folder.
        overwrite : bool
            Whether to replace an existing adapter; in a folder, only the files of the adapter are replaced.

        Raises
        ------
        FileError
            If the path exists and ``overwrite`` is not given, or the adapter cannot be written. Nothing has changed
            then. (If a disk fails between the two files of a folder, and again while the old ones are restored, the
            message says where they are.)

        Notes
        -----
        A kill at any point leaves the old adapter, the new one, or a folder without ``adapter_config.json``, which PEFT
        and this library reject. In that case, the old files are in a subfolder ``.tnadapt-….tmp/old``.
        """
        where = path_of(path)
        check_free(where, [name for name in self.files if name], overwrite)
        with file_error_context(where):
            if self.file is not None:
                replace_file(where, content_of(self.file), overwrite)
            elif "" in self.files:
                replace_file(where, self.files[""], overwrite)
            else:
                replace_folder(where, self.files, overwrite)


def check_free(path: str, names: Sequence[str], overwrite: bool) -> None:
    """Raise FileError unless a file, or a folder with the given files, may be written at a path."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileError(f"{path}: the folder {folder} does not exist; make it first")
    taken = os.path.lexists(path)
    if names and os.path.isdir(path):
        taken = any(os.path.lexists(os.path.join(path, name)) for name in names)
    if taken and not overwrite:
        raise FileError(f"{path}: exists; give another path, or overwrite=True (--overwrite)")
