"""The weights of targets in a checkpoint, whether each is a tensor, a part of one, or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tnadapt.algebra.rounding import widened
from tnadapt.errors import TargetError, TnadaptError, safe_repr
from tnadapt.targets.checkpoint_experts import expert_tensors
from tnadapt.targets.prefixes import Prefix, found_prefix, near_names, renamed_targets
from tnadapt.targets.target import Target

from ._resolution import resolve
from .adapter_file import AdapterFile
from .checkpoint import Checkpoint
from .container import DTYPES
from .fingerprint import Fingerprint, compare, fingerprint
from .module_names import ModuleNames

__all__ = ["FLOATS", "BaseWeights", "StoredWeights", "located", "numbers"]


# -- The weights of targets in a checkpoint, whether each is a tensor, a part of one, or several -----------------------


FLOATS = ("F64", "F32", "F16", "BF16")


def numbers(checkpoint: Checkpoint, name: str, index: int | None = None) -> np.ndarray:
    """Read a tensor, or one of the matrices that it stacks, in a dtype that NumPy supports: bfloat16 as float32."""
    array = checkpoint.array(name, index)
    if checkpoint.entries[name].dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class StoredWeights:
    """The weights of targets in one of two checkpoints of a model.

    Parameters
    ----------
    checkpoint : Checkpoint
    targets : sequence of Target
    which : str
        What to call the checkpoint in messages.

    Attributes
    ----------
    parts : list of tuple of Target
        For each target the tensor that has it, or those whose rows are its rows, one after the other.
    prefix : Prefix
        By which names differ from the targets' own.

    Raises
    ------
    TargetError
        If a target is missing, has another shape, or is not floating.
    """

    def __init__(self, checkpoint: Checkpoint, targets: Sequence[Target], which: str) -> None:
        self.checkpoint = checkpoint
        self.parts, self.prefix = _placed(checkpoint, targets, which)
        for part in (part for parts in self.parts for part in parts):
            _check(part, checkpoint, which)

    @property
    def names(self) -> set[str]:
        """The names of all tensors that have a target's rows."""
        return {part.name for parts in self.parts for part in parts}

    def numbers(self, index: int) -> np.ndarray:
        """Read the weight of a target, of shape ``(rows, cols)``, in a dtype that NumPy supports."""
        return _joined([_selected(one, numbers(self.checkpoint, one.name, one.index)) for one in self.parts[index]])

    def fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint of the weights; None if they have several dtypes."""
        kinds = {self.checkpoint.entries[name].dtype for name in self.names}
        return None if len(kinds) > 1 else fingerprint(self._raw(), DTYPES[kinds.pop()])

    def _raw(self) -> Iterator[np.ndarray]:
        for parts in self.parts:
            yield _joined([_selected(part, self.checkpoint.array(part.name, part.index)) for part in parts])


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _selected(part: Target, stored: np.ndarray) -> np.ndarray:
    found: np.ndarray = (part if part.index is None else part.of_matrix()).select(stored)
    return found


def _placed(checkpoint: Checkpoint, targets: Sequence[Target], which: str) -> tuple[list[tuple[Target, ...]], Prefix]:
    stored = {name: entry.shape for name, entry in checkpoint.entries.items()}
    plain: list[tuple[Target, ...]] = [(target,) for target in targets]
    for several in (plain, *expert_tensors(targets)):
        prefix = found_prefix([part for parts in several for part in parts], stored)
        if prefix is not None:
            return [tuple(map(prefix.target, parts)) for parts in several], prefix
    # One of two checkpoints of a model of transformers may have the names of its modules, the other those on disk.
    names = ModuleNames(lambda: checkpoint.config)
    renamed = renamed_targets(targets, stored, names.of)
    if renamed is None:
        of_stored = names.inverse(stored)
        renamed = renamed_targets(targets, stored, lambda name: of_stored.get(name, []))
    if renamed is not None:
        return [(renamed[1].target(target),) for target in renamed[0]], renamed[1]
    missing = [target.name for target in targets if target.name not in stored]
    near = near_names(missing[0], stored)
    raise TargetError(
        f"the {which} checkpoint lacks {len(missing)} of {len(targets)} targets, such as {safe_repr(missing[0])}, "
        f"under any prefix{'; ' + near if near else ''}: give two checkpoints of the same model"
    )


def _check(part: Target, checkpoint: Checkpoint, which: str) -> None:
    entry = checkpoint.entries[part.name]
    if entry.dtype not in FLOATS:
        raise TargetError(
            f"{part.name} of the {which} checkpoint is {entry.dtype}; expected one of {', '.join(FLOATS)}: give an "
            "unquantized checkpoint"
        )
    if entry.shape != part.stored:
        raise TargetError(
            f"{part.name} has shape {entry.shape} in the {which} checkpoint and {part.stored} in the other: give two "
            "checkpoints of the same model"
        )


# -- The weights of a model on disk at an adapter's targets, compared with the fingerprint in the adapter's file -------


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
