"""The weights of a model on disk at an adapter's targets, compared with the fingerprint in the adapter's file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tnadapt.algebra.rounding import widened
from tnadapt.errors import TargetError, TnadaptError, safe_repr
from tnadapt.targets.target import Target

from ._resolution import resolve
from .adapter_file import AdapterFile
from .checkpoint import Checkpoint
from .container import DTYPES
from .fingerprint import compare

__all__ = ["BaseWeights", "located"]

_FLOATS = {tag: name for tag, name in DTYPES.items() if name.startswith(("float", "bfloat"))}


def located(file: AdapterFile, checkpoint: Checkpoint) -> Sequence[Target]:
    """Return an adapter's targets under their names in a checkpoint, as :func:`tnadapt.merge` finds them.

    A checkpoint may have other names than the model in memory: without the prefix of a model with a head, or those of
    an earlier release. If the weights are not found, the adapter's own targets are returned.
    """
    if all(target.name in checkpoint.entries for target in file.targets):
        return file.targets
    try:
        found = resolve(checkpoint, file)
    except TnadaptError:
        return file.targets
    return file.targets if found.parts else found.targets


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
        self._targets = located(file, checkpoint)
        for target in self._targets:
            entry = checkpoint.entries.get(target.name)
            if entry is None or entry.dtype not in _FLOATS or tuple(entry.shape) != target.stored:
                what = "is missing" if entry is None else f"is {entry.dtype} of the shape {tuple(entry.shape)}"
                raise TargetError(
                    f"the adapter needs {safe_repr(target.name)} of the shape {target.stored}, and in base it {what}: "
                    "is it the model that the adapter was made for?"
                )

    def of(self, index: int) -> np.ndarray:
        """Return a weight as a matrix, widened to float32 at least."""
        target = self._targets[index]
        array = self._checkpoint.array(target.name)
        kind = _FLOATS[self._checkpoint.entries[target.name].dtype]
        return np.asarray(widened(target.select(array), kind).reshape(target.shape))

    def check_fingerprint(self) -> None:
        """Raise TargetError if the file knows its base, and this is another one."""
        if self._file.base is None:
            return
        kinds = {_FLOATS[self._checkpoint.entries[target.name].dtype] for target in self._targets}
        kind = kinds.pop() if len(kinds) == 1 else "float64" if "float64" in kinds else "float32"
        difference = compare(self._file.base, self._stored(kind), kind)
        if difference is not None:
            raise TargetError(
                f"base is another model than the one that the adapter was trained on: for the adapted weights, "
                f"{difference}. Give that one"
            )

    def _stored(self, kind: str) -> Iterator[np.ndarray]:
        for target in self._targets:
            own = _FLOATS[self._checkpoint.entries[target.name].dtype]
            weight = target.select(self._checkpoint.array(target.name))
            yield weight if own == kind else widened(weight, own).astype(kind)
