"""Unpack an adapter file into one update per module, in the forms of other libraries, and join updates into a file.

PEFT and LyCORIS adapt whole modules, each with LoRA, LoKr or LoHa. A file of this library has one config for all of its
targets, and a target may consist of some rows of a fused weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import kronecker_sizes
from tnadapt.algebra.network import Network
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._slices import low_rank_slice
from ._updates import Float, ModuleUpdate, Pair, alpha_of, as_matrix, narrow

__all__ = ["Module", "TargetUpdate", "Unpacked", "join", "modules_of"]

# Above this, factoring a side evenly takes too long to be worth a shorter config.
_MAX_BALANCED = 1 << 20


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

        The form requires the identity for F, and either a group of one weight with two modes (or one, dense), or a
        tensor of which the weight is a slice of low rank (LoTR, FacT, CP across layers).
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
        Shape of the weight as the model stores it.
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
        """Name of the weight in a state dict."""
        return self.targets[0][1].name

    def delta(self, unpacked: Unpacked) -> Float:
        """Return ΔW of the whole weight, which is zero in rows without a target."""
        total = np.zeros(self.shape)
        for number, target in self.targets:
            # Rows of the (out, in) matrix, regardless of how the weight is stored.
            total[_rows(target)] += unpacked.delta(number)
        return total

    def form(self, unpacked: Unpacked) -> ModuleUpdate | None:
        """Return the exact factors of ΔW, or None if there are none."""
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
    """Return the modules of an adapter file, layer by layer."""
    places: dict[str, list[tuple[int, Target]]] = {}
    for number, target in enumerate(file.targets):
        places.setdefault(target.module, []).append((number, target))
    found = []
    for path in sorted(places, key=natural):
        first = places[path][0][1]  # all targets of a weight agree on how it is stored
        found.append(Module(path, first.stored, first.transposed, tuple(places[path])))
    return found


# -- Joining: one file from many updates ---------------------------------------------------------


class TargetUpdate(NamedTuple):
    """The update of one weight as stored in another library's file.

    Attributes
    ----------
    target : Target
    update : ModuleUpdate
    """

    target: Target
    update: ModuleUpdate


def join(
    found: Sequence[TargetUpdate],
    dtype: str,
    kept: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    model: str = "",
) -> tuple[AdapterFile, list[str]]:
    """Join the updates of many weights into one adapter file, exactly; also return notes about it.

    Parameters
    ----------
    found : sequence of TargetUpdate
        At least one.
    dtype : str
        The dtype of the stored arrays if it represents all of their values; otherwise they are float32.
    kept, dtypes, model
        As in :class:`~tnadapt.AdapterFile`; ``dtypes`` are those of ``kept``.

    Notes
    -----
    One config describes all weights. Factors are padded with zero columns to a common rank, differing scales are
    multiplied into a factor, and a W1 or W2 of LoKr that is full in one weight and low-rank in another gets a form that
    fits both. If forms or Kronecker sizes differ otherwise, every update is stored dense.
    """
    updates = [one.update for one in found]
    config, notes = _common(updates), list[str]()
    if config is None:
        kinds = sorted({_described(update) for update in updates})
        notes.append(f"stored dense, as one config cannot say {' and '.join(kinds[:4])}{' …' * (len(kinds) > 4)}")
        updates = [ModuleUpdate("dense", update.shape, (update.delta(),)) for update in updates]
        config = updates[0].config()
    scales = [update.scale for update in updates]
    assert isinstance(config.rank, int)
    alpha = None if set(scales) == {1.0} else alpha_of(scales, config.rank)
    if alpha is None:
        updates = [update.absorb_scale() for update in updates]
    config = config.replace(alpha=alpha)
    arrays: dict[str, Float] = {}
    for number, update in enumerate(updates):
        own = _conform(update, config).arrays()
        arrays |= {f"group{number}.{name}": array for name, array in own.items()}
    stored, kinds_of = narrow(arrays, dtype)
    file = AdapterFile(
        config, [one.target for one in found], stored, kept=kept, dtypes={**dtypes, **kinds_of}, model=model
    )
    return file, notes


def _described(update: ModuleUpdate) -> str:
    if update.kind == "lokr":
        return f"LoKr of W1 {update.parts[0].shape}"
    return {"lora": "LoRA", "loha": "LoHa", "dense": "dense updates"}[update.kind]


def _common(updates: Sequence[ModuleUpdate]) -> Config | None:
    """Return the common config of all updates after padding, or None."""
    if len({update.kind for update in updates}) > 1:
        return None
    rank = max(update.rank for update in updates)
    config = updates[0].config()
    if updates[0].kind != "lokr":
        return config.replace(rank=rank)
    size = _split_size(updates)
    if size is None:
        return None
    firsts, lasts = ([update.parts[place] for update in updates] for place in (0, 1))
    if not any(isinstance(last, Pair) for last in lasts):
        return config.replace(rank=1, split_size=size, leading="dense", format="dense")
    same = all(isinstance(first, Pair) for first in firsts)
    rank = max(_factored(last).rank for last in lasts)
    if same:
        rank = max(rank, *(first.rank for first in firsts if isinstance(first, Pair)))
    return config.replace(rank=rank, split_size=size, leading="same" if same else "dense", format="cp")


def _split_size(updates: Sequence[ModuleUpdate]) -> str | int | tuple[int, ...] | None:
    """Return the shortest ``split_size`` that gives every update its sizes, or None."""
    first = updates[0].parts[0].shape
    small = max(side for update in updates for side in update.shape) <= _MAX_BALANCED
    candidates: list[str | int | tuple[int, ...]] = ["balanced"] if small else []
    candidates += [first[0]] if len(set(first)) == 1 else []
    candidates.append(first)
    for size in candidates:
        if all(kronecker_sizes(update.shape, 2, size) == [part.shape for part in update.parts] for update in updates):
            return size
    return None


def _factored(part: Pair | Float) -> Pair:
    """Return a full matrix as an exact Pair: the matrix and an identity."""
    if isinstance(part, Pair):
        return part
    rows, cols = part.shape
    return Pair(part, np.eye(cols)) if cols <= rows else Pair(np.eye(rows), part.T)


def _conform(update: ModuleUpdate, config: Config) -> ModuleUpdate:
    """Return an update with its parts in the form that a common config requires."""
    if update.kind == "dense":
        return update
    parts = list(update.parts)
    if update.kind == "lokr":
        parts[0] = as_matrix(parts[0]) if config.leading == "dense" else parts[0]
        parts[1] = _factored(parts[1]) if config.format == "cp" else as_matrix(parts[1])
    assert isinstance(config.rank, int)
    rank = config.rank
    return update._replace(parts=tuple(part.padded(rank) if isinstance(part, Pair) else part for part in parts))
