"""The weights of a model on disk at an adapter's targets, compared with the fingerprint in the adapter's file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tnadapt.algebra.rounding import widened
from tnadapt.errors import TargetError, safe_repr

from .adapter_file import AdapterFile
from .checkpoint import Checkpoint
from .container import DTYPES
from .fingerprint import compare

__all__ = ["BaseWeights"]

_FLOATS = {tag: name for tag, name in DTYPES.items() if name.startswith(("float", "bfloat"))}


class BaseWeights:
    """The weights of a model on disk at an adapter's targets.

    Parameters
    ----------
    file : AdapterFile
    checkpoint : Checkpoint

    Raises
    ------
    TargetError
        If the model lacks a weight, or it has another shape.
    """

    def __init__(self, file: AdapterFile, checkpoint: Checkpoint) -> None:
        self._file, self._checkpoint = file, checkpoint
        for target in file.targets:
            entry = checkpoint.entries.get(target.name)
            if entry is None or entry.dtype not in _FLOATS or tuple(entry.shape) != target.stored:
                what = "is missing" if entry is None else f"is {entry.dtype} of the shape {tuple(entry.shape)}"
                raise TargetError(
                    f"the adapter needs {safe_repr(target.name)} of the shape {target.stored}, and in base it {what}: "
                    "is it the model that the adapter was made for?"
                )

    def of(self, index: int) -> np.ndarray:
        """Return a weight as a matrix, widened to float32 at least."""
        target = self._file.targets[index]
        array = self._checkpoint.array(target.name)
        kind = _FLOATS[self._checkpoint.entries[target.name].dtype]
        return np.asarray(widened(target.select(array), kind).reshape(target.shape))

    def check_fingerprint(self) -> None:
        """Raise TargetError if the file knows its base, and this is another one."""
        if self._file.base is None:
            return
        kinds = {_FLOATS[self._checkpoint.entries[target.name].dtype] for target in self._file.targets}
        kind = kinds.pop() if len(kinds) == 1 else "float64" if "float64" in kinds else "float32"
        difference = compare(self._file.base, self._stored(kind), kind)
        if difference is not None:
            raise TargetError(
                f"base is another model than the one that the adapter was trained on: for the adapted weights, "
                f"{difference}. Give that one"
            )

    def _stored(self, kind: str) -> Iterator[np.ndarray]:
        for target in self._file.targets:
            own = _FLOATS[self._checkpoint.entries[target.name].dtype]
            weight = target.select(self._checkpoint.array(target.name))
            yield weight if own == kind else widened(weight, own).astype(kind)
