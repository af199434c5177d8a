"""Unpack an adapter file into one update per module, in the forms of other libraries.

PEFT and LyCORIS adapt whole modules, each with LoRA, LoKr or LoHa. In a file of this library, a target may consist of
some rows of a fused weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._slices import low_rank_slice
from ._updates import Float, ModuleUpdate, Pair, as_matrix

__all__ = ["Module", "TargetUpdate", "Unpacked", "modules_of", "place_of"]


# -- Unpacking: the update of one target ---------------------------------------------------------


class Unpacked:
    """An adapter file with its arrays in float64, which represents all of their values.

    Parameters
    ----------
    file : AdapterFile
    updates : sequence of ModuleUpdate
        The update of each target as stored in another library's file. If given, they are used instead of the file's
        arrays, which may have another form and be rounded.
    """

    def __init__(self, file: AdapterFile, updates: Sequence[ModuleUpdate] = ()) -> None:
        self.file, self.updates = file, updates
        self.arrays: dict[str, Float] = {name: array.astype(np.float64) for name, array in file.arrays.items()}

    def delta(self, weight: int) -> Float:
        """Return ΔW of one target in float64.

        It is computed in float64 if F is linear. With a nonlinear F, the value of F at the start of training is
        subtracted in the dtype of that start.
        """
        if self.updates:
            return self.updates[weight].delta()
        plan = self.file.plan
        linear = all(plan.groups[piece.group].projection.linear for piece in plan.layout.of_weight(weight))
        found: Float = (
            plan.arrays_plan.delta(self._made, weight, self.file.dtype)
            if linear
            else self._nonlinear[weight].astype(np.float64)
        )
        return found

    @functools.cached_property
    def _made(self) -> dict[str, Float]:
        """The arrays of the network that are not frozen: those of the file, or those that θ makes."""
        return self.file.plan.arrays(self.arrays, self.file.dtype)

    @functools.cached_property
    def _nonlinear(self) -> list[np.ndarray]:
        return self.file.deltas()

    def form(self, weight: int) -> ModuleUpdate | None:
        """Return the exact factors of one target's update; None if its arrays do not have such a form.

        The form requires a group of one weight with two modes (or one, dense) and the identity for F, or a tensor of
        which the weight is a slice of low rank (LoTR, FacT, CP across layers), and an F that keeps rows and columns
        separate (MiSS).
        """
        if self.updates:
            return self.updates[weight]
        plan = self.file.plan.arrays_plan
        return self._of_one_group(weight) or low_rank_slice(plan, weight, self._made, self.file.dtype)

    def _of_one_group(self, weight: int) -> ModuleUpdate | None:
        plan, shape = self.file.plan, self.file.targets[weight].shape
        pieces = plan.layout.of_weight(weight)
        group = plan.groups[pieces[0].group]
        if len(group.pieces) > 1 or len(pieces) > 1 or not group.projection.map.identity or group.subtracts:
            return None
        network = group.network
        if len(network.sizes) == 1:
            if network.shapes.keys() != {"split0.dense"} or network.sizes != (shape[0] * shape[1],):
                return None
            vec = self._made[group.names["split0.dense"]]  # a group's only array is trained
            return ModuleUpdate("dense", shape, (vec.reshape(shape),), network.scale)
        if len(network.sizes) != 2 or network.sizes[1] != shape[1]:
            return None
        own = {name: self._made[full] for name, full in group.names.items()}
        arrays = group.with_frozen(load_backend("numpy"), own, self.file.dtype)
        terms = [_parts(network, arrays, term) for term in range(network.terms)]
        unpack = _one_split if len(network.splits) == 1 else _kronecker if network.kronecker else _hadamard
        return unpack([term for term in terms if term is not None], network.terms, shape, network.scale)


Parts = Sequence[Pair | Float]


def _parts(network: Network, arrays: Mapping[str, Float], term: int) -> Parts | None:
    """Return the splits of a term, each as two factors or a matrix; None if one has another form."""
    found = list[Pair | Float]()
    for number in range(len(network.splits)):
        prefix = f"term{term}." * (network.terms > 1) + f"split{number}."
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        part = _matrix(own)
        if part is None:
            return None
        found.append(part)
    return found


def _matrix(own: Mapping[str, Float]) -> Pair | Float | None:
    """Return the arrays of a split of order 2 as two factors or a matrix; None for unknown arrays."""
    names = set(own)
    if names == {"dense"}:
        return own["dense"]
    if names == {"factor0", "factor1"}:
        return Pair(own["factor0"], own["factor1"])
    if names == {"weights", "factor0", "factor1"}:
        return Pair(own["factor0"] * own["weights"], own["factor1"])
    if names == {"core0", "core1"}:
        return Pair(own["core0"][0], own["core1"][:, :, 0].T)
    if "core" not in names or not names <= {"core", "factor0", "factor1"}:
        return None
    core, b, a = own["core"], own.get("factor0"), own.get("factor1")
    if b is None:
        return core if a is None else Pair(core, a)
    return Pair(b, core.T) if a is None else Pair(b @ core, a)


def _one_split(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    parts = [part for (part,) in terms]
    if len(parts) < count:
        return None
    pairs = [Pair(part.b[: shape[0]], part.a) for part in parts if isinstance(part, Pair)]
    if len(pairs) == count:
        # A sum of low-rank matrices is low-rank: concatenate the factors.
        pair = Pair(np.concatenate([p.b for p in pairs], axis=1), np.concatenate([p.a for p in pairs], axis=1))
        return ModuleUpdate("lora", shape, (pair,), scale)
    if count > 1:
        return None
    return ModuleUpdate("dense", shape, (as_matrix(parts[0])[: shape[0]],), scale)


def _kronecker(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    if count > 1 or not terms:
        return None
    *leading, last = terms[0]
    # Multiply all splits but the last, as other libraries have two factors only.
    first = leading[0]
    for part in leading[1:]:
        first = np.asarray(np.kron(as_matrix(first), as_matrix(part)), np.float64)
    if tuple(one * other for one, other in zip(first.shape, last.shape, strict=True)) != shape:
        return None  # the product is larger than the weight and truncated, which no other library supports
    return ModuleUpdate("lokr", shape, (first, last), scale)


def _hadamard(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    if count > 1 or not terms or len(terms[0]) != 2:
        return None
    one, two = terms[0]
    if not isinstance(one, Pair) or not isinstance(two, Pair):
        return None
    cut = (Pair(pair.b[: shape[0]], pair.a) for pair in (one, two))
    return ModuleUpdate("loha", shape, tuple(cut), scale)


# -- Modules: all targets in one weight ----------------------------------------------------------


class Module(NamedTuple):
    """A module of the base, with the targets in its weight.

    Attributes
    ----------
    path : str
        Path of the module whose ``weight`` is updated.
    stored : tuple of int
        Shape of the weight as the model stores it; of an expert that of its matrix.
    transposed : bool
        Whether that shape is ``(in, out)``.
    targets : tuple of (int, Target)
        The targets with their positions in the file.
    """

    path: str
    stored: tuple[int, ...]
    transposed: bool
    targets: tuple[tuple[int, Target], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the whole update."""
        first = self.targets[0][1]
        return Target(self.path, self.stored, first.role, transposed=self.transposed).shape

    @property
    def name(self) -> str:
        """Name of the weight in a state dict, with the index of an expert."""
        first = self.targets[0][1]
        return first.name if first.index is None else place_of(first)

    @property
    def place(self) -> str:
        """The path; of an expert also which one it is."""
        return place_of(self.targets[0][1])

    def delta(self, unpacked: Unpacked) -> Float:
        """Return ΔW of the whole weight, which is zero in rows without a target."""
        total = np.zeros(self.shape)
        for number, target in self.targets:
            # Rows of the (out, in) matrix, regardless of how the weight is stored.
            total[_rows(target)] += unpacked.delta(number)
        return total

    def form(self, unpacked: Unpacked) -> ModuleUpdate | None:
        """Return the exact factors of ΔW, or None if there are none."""
        if any(target.index is not None for _, target in self.targets):
            return None  # several matrices instead of one, as of experts
        forms = [unpacked.form(number) for number, _ in self.targets]
        found = [form for form in forms if form is not None]
        if len(self.targets) == 1 and self.targets[0][1].rows is None:
            return forms[0]
        if len(found) < len(forms) or any(form.kind != "lora" for form in found):
            return None
        return self._stacked(found)

    def _stacked(self, forms: Sequence[ModuleUpdate]) -> ModuleUpdate:
        """Combine low-rank updates of disjoint rows into one of the whole weight, whose rank is the sum of theirs."""
        scales = {form.scale for form in forms}
        scale = scales.pop() if len(scales) == 1 else 1.0
        whole = [form if scale == form.scale else form.absorb_scale() for form in forms]
        tall, wide = [], []
        for form, (_, target) in zip(whole, self.targets, strict=True):
            b = np.zeros((self.shape[0], form.pair.rank))
            b[_rows(target)] = form.pair.b
            tall.append(b)
            wide.append(form.pair.a)
        return ModuleUpdate("lora", self.shape, (Pair(np.concatenate(tall, 1), np.concatenate(wide, 1)),), scale)


def _rows(target: Target) -> slice | list[int]:
    return slice(None) if target.rows is None else target.rows.indices()


def modules_of(file: AdapterFile) -> list[Module]:
    """Return the modules of an adapter file, layer by layer; each expert is one of its own."""
    places: dict[str, list[tuple[int, Target]]] = {}
    for number, target in enumerate(file.targets):
        places.setdefault(place_of(target), []).append((number, target))
    found = []
    for place in sorted(places, key=natural):
        first = places[place][0][1]  # all targets of a weight agree on how it is stored
        found.append(Module(first.module, first.matrix_sizes, first.transposed, tuple(places[place])))
    return found


def place_of(target: Target) -> str:
    """Return what all targets of one matrix have in common: the module's path; of an expert also which it is."""
    return target.module if target.index is None else f"{target.name}[{target.index}]"


# -- Updates of another library ------------------------------------------------------------------


class TargetUpdate(NamedTuple):
    """The update of one weight as stored in another library's file.

    Attributes
    ----------
    target : Target
    update : ModuleUpdate
    """

    target: Target
    update: ModuleUpdate
