"""What became of an adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.adapter_format import content_of
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.container import about, path_of
from tnadapt.errors import FileError, escaped

from ._peft_reading import CONFIG, WEIGHTS
from ._writing import json_text, replace_folder

__all__ = ["Conversion", "check_free"]


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """What an adapter became in another form, and by how much it differs.

    Attributes
    ----------
    kind : str
        What it is now: "tnadapt", "peft-lora", "lycoris-full" and so on.
    origin : str
        What it was; "lycoris" where a file mixed methods.
    exact : bool
        Whether the error is that of rounding.
    error : float
        ``|new - old| / |old|``, the Frobenius norms of all updates together, measured on what is written; 0 where all
        are zero.
    errors : dict of str to float
        The same of each weight, by its name in a state dict; infinite where only the new one is not zero.
    parameters : (int, int)
        Elements of the adapter's tensors before and after.
    notes : tuple of str
        What else is to be known.
    file : AdapterFile or None
        Of kind "tnadapt".
    tensors : dict of str to ndarray
        Of the other kinds, as they are written; bfloat16 as float32, by ``dtypes``.
    dtypes : dict of str to str
        Which tensors are written as "bfloat16".
    config : dict or None
        PEFT's ``adapter_config.json``.
    content : bytes
        The safetensors file, but of kind "tnadapt".
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
    content: bytes = dataclasses.field(default=b"", repr=False)

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
        """As JSON keeps it, without the tensors."""
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

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write it: a folder for PEFT, else a safetensors file.

        Parameters
        ----------
        path : str or PathLike
            In a folder that exists.
        overwrite : bool
            Whether to take the place of what is there; in a folder, of the two files of the adapter alone.

        Raises
        ------
        FileError
            If there is something and ``overwrite`` is not given, or it cannot be written. Nothing has changed then. (If
            a disk fails between the two files of a folder, and again as the old ones are put back, it says where
            they are.)

        Notes
        -----
        Killed at any point, what is there is the old adapter, the new one, or a folder without ``adapter_config.json``,
        which PEFT and this library refuse; the old files are in it then, in a folder ``.tnadapt-….tmp/old``.
        """
        where = path_of(path)
        check_free(where, self.kind, overwrite)
        if self.file is not None:
            with about(where):
                replace_file(where, content_of(self.file), overwrite)
            return
        with about(where):
            if self.config is None:
                replace_file(where, self.content, overwrite)
            else:
                replace_folder(
                    where,
                    {WEIGHTS: self.content, CONFIG: (json_text(self.config, indent=2) + "\n").encode()},
                    overwrite,
                )


def check_free(path: str, kind: str, overwrite: bool) -> None:
    """A FileError unless a conversion may be written there."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileError(f"{path}: the folder {folder} does not exist; make it first")
    taken = os.path.lexists(path)
    if kind.startswith("peft") and os.path.isdir(path):
        taken = any(os.path.lexists(os.path.join(path, name)) for name in (WEIGHTS, CONFIG))
    if taken and not overwrite:
        raise FileError(f"{path}: exists; give another path, or overwrite=True (--force)")
