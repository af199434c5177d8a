"""One weight of an adapter file in the form of another library, where its arrays are that already."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.algebra.superlora import Group
from tnadapt.checkpoints.adapter_file import AdapterFile

from ._updates import Float, Pair, Update, product

__all__ = ["Wide"]


class Wide:
    """An adapter file whose arrays are taken in float64, which holds all of their numbers.

    Parameters
    ----------
    file : AdapterFile
    updates : sequence of Update
        Of each target, as another library's file had them: what is asked for then is these, which the file may hold
        in another form, and rounded.
    """

    def __init__(self, file: AdapterFile, updates: Sequence[Update] = ()) -> None:
        self.file, self.updates = file, updates
        self.arrays: dict[str, Float] = {name: array.astype(np.float64) for name, array in file.arrays.items()}

    def delta(self, weight: int) -> Float:
        """The update of one target in float64, and computed in it where F is linear.

        A nonlinear F subtracts where training began, in the dtype in which it began.
        """
        if self.updates:
            return self.updates[weight].delta()
        plan = self.file.plan
        linear = plan.groups[0].projection.linear
        found: Float = plan.delta(self.arrays, weight) if linear else self._nonlinear[weight].astype(np.float64)
        return found

    @functools.cached_property
    def _nonlinear(self) -> list[np.ndarray]:
        return self.file.deltas()

    def form(self, weight: int) -> Update | None:
        """The update of one target as matrices that multiply to it exactly; None where its arrays are not like that."""
        if self.updates:
            return self.updates[weight]
        plan, shape = self.file.plan, self.file.targets[weight].shape
        pieces = plan.layout.of_weight(weight)
        group = plan.groups[pieces[0].group]
        if len(group.pieces) > 1 or len(pieces) > 1 or group.projection.kind != "identity":
            return None
        network = group.network
        if len(network.sizes) == 1:
            if network.shapes.keys() != {"split0.dense"} or network.sizes != (shape[0] * shape[1],):
                return None
            vec = self.arrays[group.names["split0.dense"]]
            return Update("dense", shape, (vec.reshape(shape),), network.scale)
        if len(network.sizes) != 2 or network.sizes[1] != shape[1]:
            return None
        terms = [_parts(group, self.arrays, term) for term in range(network.terms)]
        made = _one_split if len(network.splits) == 1 else _kronecker if network.kronecker else _hadamard
        return made([term for term in terms if term is not None], network.terms, shape, network.scale)


Parts = Sequence[Pair | Float]


def _parts(group: Group, arrays: Mapping[str, Float], term: int) -> Parts | None:
    """The splits of a term, each as two factors or one matrix."""
    network, found = group.network, list[Pair | Float]()
    for number in range(len(network.splits)):
        prefix = f"term{term}." * (network.terms > 1) + f"split{number}."
        own = {name.removeprefix(prefix): arrays[full] for name, full in group.names.items() if name.startswith(prefix)}
        part = _matrix(own)
        if part is None:
            return None
        found.append(part)
    return found


def _matrix(own: Mapping[str, Float]) -> Pair | Float | None:
    """Two factors, or a matrix, of a split of order 2."""
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


def _one_split(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> Update | None:
    parts = [part for (part,) in terms]
    if len(parts) < count:
        return None
    pairs = [Pair(part.b[: shape[0]], part.a) for part in parts if isinstance(part, Pair)]
    if len(pairs) == count:
        pair = Pair(np.concatenate([p.b for p in pairs], axis=1), np.concatenate([p.a for p in pairs], axis=1))
        return Update("lora", shape, (pair,), scale)
    if count > 1:
        return None
    return Update("dense", shape, (product(parts[0])[: shape[0]],), scale)


def _kronecker(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> Update | None:
    if count > 1 or not terms:
        return None
    *leading, last = terms[0]
    # All splits but the last are one: a product of more than two is one of two.
    first = leading[0]
    for part in leading[1:]:
        first = np.asarray(np.kron(product(first), product(part)), np.float64)
    if tuple(one * other for one, other in zip(first.shape, last.shape, strict=True)) != shape:
        return None  # the product is longer than the weight and cut, which others do not
    return Update("lokr", shape, (first, last), scale)


def _hadamard(terms: Sequence[Parts], count: int, shape: tuple[int, int], scale: float) -> Update | None:
    if count > 1 or not terms or len(terms[0]) != 2:
        return None
    one, two = terms[0]
    if not isinstance(one, Pair) or not isinstance(two, Pair):
        return None
    cut = (Pair(pair.b[: shape[0]], pair.a) for pair in (one, two))
    return Update("loha", shape, tuple(cut), scale)
