"""The base model of a conversion: its module paths and weight shapes, and arrays that are computed from it."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tnadapt.checkpoints.container import DTYPES, Entry
from tnadapt.checkpoints.stored_weights import FLOATS, ModuleNames, base_weights, located, tied_heads, ties_head
from tnadapt.checkpoints.stored_weights import numbers as tensor_of
from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import experts_of
from tnadapt.targets.checkpoint_targets import is_transposed
from tnadapt.targets.prefixes import renamed_targets
from tnadapt.targets.roles import layer_of, parse_projection_name
from tnadapt.targets.target import Target

from ._updates import round_to, widen

# -- The base model ----------------------------------------------------------------------------------------------------


class Base:
    """Modules of a base model.

    Attributes
    ----------
    shapes : dict of str to (tuple of int or None)
        Shapes of the modules' ``weight``, by module path; None if only the path is known.
    ordered : bool
        Whether the modules are in the order of the model's ``named_modules()``, as far as is known.
    tensors : mapping of str to sequence of int
        Shapes of all tensors that are known, by name.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...] | None],
        ordered: bool = True,
        tensors: Mapping[str, Sequence[int]] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.shapes, self.ordered = dict(shapes), ordered
        self.tensors, self._checkpoint = tensors or {}, checkpoint
        self._places: dict[str, str] = {}
        self._flat: dict[str, list[str]] = {}
        for path in self.shapes:
            self._flat.setdefault(path.replace(".", "_"), []).append(path)

    @functools.cached_property
    def _names(self) -> ModuleNames:
        """Other names of the modules, by the model's ``config.json``."""
        checkpoint = self._checkpoint
        return ModuleNames(None if checkpoint is None else lambda: checkpoint.config)

    @functools.cached_property
    def heads(self) -> dict[str, str]:
        """Modules that are not stored, as they are tied to an embedding, each with that embedding."""
        return {} if self._checkpoint is None else tied_heads(self._checkpoint)

    @property
    def unknown_heads(self) -> bool:
        """Whether an embedding is tied to a head of which the name is not known."""
        return self._checkpoint is not None and ties_head(self._checkpoint) and not self.heads

    @functools.cached_property
    def _weights(self) -> dict[str, tuple[int, ...]]:
        """The names of the modules' weights; their shapes are compared later."""
        return dict.fromkeys((f"{path}.weight" for path in self.shapes), (1, 1))

    @functools.cached_property
    def experts(self) -> list[Target]:
        """The parameters that stack the matrices of experts, each as the target of its first matrix.

        Raises
        ------
        TargetError
            If it is unclear how the matrices are stored.
        """
        config = None if self._checkpoint is None else self._checkpoint.config
        return [expert.target for expert in experts_of(self.tensors, config) if expert.target.index == 0]

    def rows(self, path: str, numbers: Sequence[int]) -> np.ndarray:
        """Read rows of a module's weight, in float64.

        Raises
        ------
        TargetError
            If there is no such module or row, or the base is not the path of a model.
        """
        self.check_module(path)
        if self._checkpoint is None:
            raise TargetError(
                f"the values of {safe_repr(path)} are needed, and base has shapes: give a folder or safetensors file"
            )
        name = self._name(f"{path}.weight")
        shape = self._checkpoint.entries[name].shape
        if len(shape) != 2 or max(numbers) >= shape[0] or self._checkpoint.entries[name].dtype not in FLOATS:
            raise TargetError(
                f"{name} in base has shape {shape} and dtype {self._checkpoint.entries[name].dtype}, and row "
                f"{max(numbers)} of a floating-point matrix is wanted: this is another model"
            )
        return np.stack([tensor_of(self._checkpoint, name, number).astype(np.float64) for number in numbers])

    def check_stored(self, name: str, entry: Entry, stored: np.ndarray) -> None:
        """Raise TargetError if a parameter that another library stored differs from the one here.

        A parameter that is not here, whose numbers are not known, or that is quantized is not compared.
        """
        key = self._name(name)
        if self._checkpoint is None or key not in self._checkpoint.entries or entry.dtype not in FLOATS:
            return
        theirs = self._checkpoint.entries[key]
        if theirs.dtype not in FLOATS:
            return
        both = {
            "here": widen(key, theirs.dtype, self._checkpoint.array(key)),
            "there": widen(name, entry.dtype, stored),
        }
        rounded, _ = round_to(both, DTYPES[entry.dtype])  # it was cast when it was loaded
        if not np.array_equal(rounded["here"], rounded["there"]):
            raise TargetError(
                f"the adapter was saved next to a {safe_repr(name)} that differs from that of base: PEFT would load it "
                "into the model. Give the model that the adapter was made for; or, if the weight was changed before "
                "training, save that model and give it"
            )

    def _name(self, name: str) -> str:
        """Return the name under which a parameter is stored, which for a tied head is that of the embedding."""
        module, _, parameter = name.rpartition(".")
        if module in self._places:
            return f"{self._places[module]}.{parameter}"
        checkpoint = self._checkpoint
        known = checkpoint is None or name in checkpoint.entries or parameter != "weight" or module not in self.heads
        return name if known else f"{self.heads[module]}.weight"

    def is_transposed(self, path: str) -> bool:
        """Return whether the model's ``config.json`` tells that a module's weight is stored as (in, out)."""
        self.check_module(path)
        if self._checkpoint is None:
            return False
        return is_transposed(f"{path}.weight", self.shapes[path] or (), self._checkpoint.config)

    def named(self, flat: str, other: str = "") -> str:
        """Return the path whose dots are underscores in ``flat``, or else in ``other``.

        Raises
        ------
        TargetError
            Unless there is exactly one.
        """
        paths = self._flat.get(flat) or self._flat.get(other, [])
        if len(paths) > 1:
            raise TargetError(
                f"the name {safe_repr(flat)} may be {' or '.join(map(safe_repr, paths))}, as LyCORIS writes dots as "
                "underscores; leave all but one of them out of base"
            )
        if not paths:
            raise TargetError(f"base has no module for the name {safe_repr(flat)}{self._close(flat, self._flat)}")
        return paths[0]

    def check_module(self, path: str) -> None:
        """Raise TargetError unless the module exists; if a checkpoint has it under another name, add its own."""
        if path in self.shapes:
            return
        if path in self.heads:
            self.shapes[path] = self.shapes[self.heads[path]]
            return
        if self._checkpoint is not None:
            renamed = renamed_targets([Target(path, (1, 1))], self._weights, self._names.of)
            if renamed is not None:
                place = renamed[1].target(renamed[0][0]).module
                self._places[path], self.shapes[path] = place, self.shapes[place]
                return
        raise TargetError(f"base has no module {safe_repr(path)}{self._close(path, self.shapes)}{self._names.way_out}")

    def check_targets(self, targets: Iterable[Target]) -> None:
        """Raise TargetError unless every target that is a module's weight exists and has the target's shape."""
        for target in targets:
            if target.parameter == "weight":
                self.check_module(target.module)
                shape = self.shapes[target.module]
                if shape is not None and shape != target.stored:
                    raise _misfit(target.module, target.stored, shape)

    def _close(self, name: str, names: Iterable[str]) -> str:
        listed = list(names)
        close = difflib.get_close_matches(name, listed, n=2) or listed[:2]
        hint = f"; it has {', '.join(map(safe_repr, close))}" if close else "; it is empty"
        return f"{hint}, {len(listed)} in all. Is it the model that the adapter was made for?"


def as_base(base: Any) -> Base | None:
    """Convert the argument ``base`` of a caller.

    Parameters
    ----------
    base : None, str, PathLike, torch.nn.Module, mapping or iterable
        A safetensors file, an index, or a folder with either; a model in memory; a mapping from module paths to the
        shapes of their weights; or the paths alone. Names may end in ``.weight``.

    Raises
    ------
    FileError, TargetError
        If it is none of these.
    """
    if base is None:
        return None
    if isinstance(base, (str, os.PathLike)):
        return _of_file(os.fspath(base))
    try:
        if hasattr(base, "named_parameters"):
            weights = {name: weight for name, weight in base.named_parameters() if not name.endswith("bias")}
            # The tensor of a quantized weight has another shape than the weight.
            base = {name: weight.shape if weight.is_floating_point() else None for name, weight in weights.items()}
        if isinstance(base, Mapping):
            shapes = {_module(name): None if shape is None else tuple(map(int, shape)) for name, shape in base.items()}
        else:
            shapes = dict.fromkeys(map(_module, base))
    except (TypeError, ValueError, AttributeError):
        raise TargetError(
            "base must be the path of a safetensors file, a model, a list of modules' paths, or a mapping of paths to "
            f"shapes; "
            f"got {safe_repr(base)}"
        ) from None
    tensors = base if isinstance(base, Mapping) else {}
    return Base(shapes, tensors={name: shape for name, shape in tensors.items() if shape is not None})


def _of_file(path: str) -> Base:
    checkpoint = open_checkpoint(path)
    entries = checkpoint.entries
    shapes = {_module(name): entry.shape for name, entry in entries.items() if name.endswith(".weight")}
    if not shapes:
        raise FileError(f"{path} has no tensor whose name ends in .weight, and is not a base model")
    tensors = {name: entry.shape for name, entry in entries.items()}
    return Base(shapes, ordered=False, tensors=tensors, checkpoint=checkpoint)  # safetensors sorts its tensors


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def target_of(
    path: str, stored: tuple[int, ...], base: Base | None, transposed: bool = False, may_transpose: bool = False
) -> Target:
    """Return the target of a module, checked against the base if that is given.

    Parameters
    ----------
    path : str
    stored : tuple of int
        ``(out, in, …)``, as implied by the adapter's factors; for a convolution, the sizes after ``out`` may be given
        as one product.
    base : Base, optional
    transposed : bool
        Whether the adapter says that the weight is stored as ``(in, out)``.
    may_transpose : bool
        Whether the base may store it as ``(in, out)`` even if the adapter does not say so.

    Raises
    ------
    TargetError
        If the base has no such module, or its weight has another shape.
    """
    shape = None
    if base is not None:
        base.check_module(path)
        shape = base.shapes[path]
    if shape is None:
        shape = stored[::-1] if transposed else stored
    elif len(shape) == 2:
        as_it_is, turned = shape == stored, shape == stored[::-1] and may_transpose
        if not as_it_is and not turned:
            raise _misfit(path, stored, shape)
        # For a square weight, only the adapter tells how it is stored.
        transposed = turned and (transposed or not as_it_is)
    elif shape[:1] != stored[:1] or math.prod(shape) != math.prod(stored) or len(shape) < 2:
        raise _misfit(path, stored, shape)
    last = parse_projection_name(path.rpartition(".")[2])
    role = last.letters if last is not None and last.letters in ("q", "k", "v") else "linear"
    role = "conv" if role == "linear" and len(shape) > 2 else role
    return Target(path, shape, role, transposed=transposed and len(shape) == 2, layer=layer_of(path.rpartition(".")[0]))


def _misfit(path: str, stored: tuple[int, ...], own: tuple[int, ...]) -> TargetError:
    return TargetError(
        f"the adapter's update of {safe_repr(path)} has the shape {stored}, and the weight in base has {own}: this is "
        "another model"
    )


def missing_base(flat: str) -> FileError:
    """Return the error for a name that cannot be read without the base."""
    return FileError(
        f"the name {safe_repr(flat)} has underscores for the dots of a module's path, so the base model is needed to "
        "find the module: give base= (--base), a safetensors file, an index or a folder; or, in Python, the model "
        "itself"
    )


# -- Arrays that adapter files omit because the base model determines them, as in LoRA-XS ------------------------------


def check_base(file: AdapterFile, known: Base, base: Any) -> None:
    """Raise TargetError unless a base has the modules of a file of this library, with the shapes of its targets.

    Parameters
    ----------
    file : AdapterFile
    known : Base
    base : object
        The argument of :func:`tnadapt.convert`. If it is a path, weights may have other names there.
    """
    try:
        known.check_targets(file.targets)
    except TargetError:
        targets = located(file, open_checkpoint(base)) if isinstance(base, (str, os.PathLike)) else file.targets
        if targets is file.targets:
            raise
        known.check_targets(targets)


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
            f"the adapter does not store the arrays that are computed from the base weights, {missing}: give base= "
            "(--base), a safetensors file, an index or a folder of the base model; or, in Python, convert "
            "file.with_base(weights)"
        )
    return file.with_base(base_weights(file, open_checkpoint(base)).of)
