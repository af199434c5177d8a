"""Arrays that an adapter file leaves to the base model, as LoRA-XS does, computed for a conversion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tnadapt.algebra.rounding import widened
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tnadapt.checkpoints.container import DTYPES
from tnadapt.checkpoints.fingerprint import compare
from tnadapt.errors import ConfigError, TargetError, safe_repr, summarize

__all__ = ["with_base_arrays"]

_FLOATS = {tag: name for tag, name in DTYPES.items() if name.startswith(("float", "bfloat"))}


def with_base_arrays(file: AdapterFile, base: Any) -> AdapterFile:
    """Return a file with all of its arrays, those of the base weights computed from the model on disk.

    Parameters
    ----------
    file : AdapterFile
    base : optional
        The argument of :func:`tnadapt.convert`.

    Raises
    ------
    ConfigError
        If arrays are missing, and base is not the path of a model.
    TargetError
        If the model lacks a weight, or is not the one that the adapter was trained on.
    """
    if file.complete:
        return file
    if not isinstance(base, (str, os.PathLike)):
        missing = summarize([name for name in file.plan.base_shapes if name not in file.given])
        raise ConfigError(
            f"the adapter does not store the arrays that are computed from the base weights, {missing}: give base=, a "
            "safetensors file, an index or a folder of the base model; or convert file.with_base(weights)"
        )
    weights = _Weights(file, open_checkpoint(base))
    weights.check_fingerprint()
    return file.with_base(weights.of)


class _Weights:
    """The weights of a model on disk at an adapter's targets."""

    def __init__(self, file: AdapterFile, checkpoint: Checkpoint) -> None:
        self._file, self._checkpoint = file, checkpoint
        for target in file.targets:
            entry = checkpoint.entries.get(target.name)
            if entry is None or entry.dtype not in _FLOATS or tuple(entry.shape) != target.stored:
                what = "is missing" if entry is None else f"is {entry.dtype} of the shape {tuple(entry.shape)}"
                raise TargetError(
                    f"arrays of the adapter are computed from {safe_repr(target.name)} of the shape {target.stored}, "
                    f"and in base it {what}: is it the model that the adapter was made for?"
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
