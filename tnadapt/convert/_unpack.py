"""Unpack an adapter file into one update per module, in the forms of other libraries.

PEFT and LyCORIS adapt whole modules, each with LoRA, LoKr or LoHa. In a file of this library, a target may consist of
some rows of a fused weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import kronecker_sizes
from tnadapt.algebra.network import Network
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._updates import Float, ModuleUpdate, Pair, alpha_of, as_matrix, check_size, low_rank_slice, narrow

__all__ = [
    "Module",
    "TargetUpdate",
    "Unpacked",
    "join",
    "modules_of",
    "place_of",
]


# -- Unpack an adapter file into one update per module, in the forms of other libraries --------------------------------


# Elements of an update up to which all of them are compared with the plan's, and the largest difference that summing
# in another order explains, relative to the sum of magnitudes.
_COMPARED, _AGREEMENT = 1 << 12, 1e-6


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
        self._forms: dict[int, ModuleUpdate | None] = {}
        self.arrays: dict[str, Float] = {name: array.astype(np.float64) for name, array in file.arrays.items()}

    def delta(self, weight: int) -> Float:
        """Return ΔW of one target in float64; raise FileError if it is not finite.

        It is computed in float64 if F is linear. With a nonlinear F, the value of F at the start of training is
        subtracted in the dtype of that start.
        """
        if self.updates:
            return self.updates[weight].delta()
        plan = self.file.plan
        linear = all(plan.groups[piece.group].projection.linear for piece in plan.layout.of_weight(weight))
        with np.errstate(over="ignore", invalid="ignore"):  # check_size reports infinite results
            found: Float = (
                plan.arrays_plan.delta(self._made, weight, self.file.dtype)
                if linear
                else self._nonlinear[weight].astype(np.float64)
            )
        self._check_size(ModuleUpdate("dense", self.file.targets[weight].shape, (found,)), weight)
        return found

    def _check_size(self, update: ModuleUpdate, weight: int) -> None:
        check_size(self.file.targets[weight].label, update, self.file.dtype)

    @functools.cached_property
    def _made(self) -> dict[str, Float]:
        """The arrays of the network that are not frozen: those of the file, or those that θ makes."""
        return self.file.plan.arrays(self.arrays, self.file.dtype)

    @functools.cached_property
    def _nonlinear(self) -> list[np.ndarray]:
        return self.file.deltas()

    def form(self, weight: int) -> ModuleUpdate | None:
        """Return the exact factors of one target's update; None if its arrays do not have such a form.

        The form requires a group of one weight with two modes and the identity for F, or a tensor of which the weight
        is a slice of low rank (LoTR, FacT, CP across layers), and an F that keeps rows and columns separate (MiSS).
        """
        if self.updates:
            return self.updates[weight]
        if weight not in self._forms:
            plan = self.file.plan.arrays_plan
            form = self._of_one_group(weight) or low_rank_slice(plan, weight, self._made, self.file.dtype)
            self._forms[weight] = form = form if form is not None and self._is_update(form, weight) else None
            if form is not None:
                self._check_size(form, weight)
        return self._forms[weight]

    def update(self, weight: int) -> ModuleUpdate:
        """Return one target's update as its factors, or else dense."""
        return self.form(weight) or ModuleUpdate("dense", self.file.targets[weight].shape, (self.delta(weight),))

    def _is_update(self, form: ModuleUpdate, weight: int) -> bool:
        """Return whether a form has the rows that the plan computes: all of a small update, and some of a large one.

        What a conversion reports as its error is measured against the form.
        """
        plan, (rows, cols) = self.file.plan.arrays_plan, form.shape
        (piece,) = plan.layout.of_weight(weight)
        bounds = form._replace(
            parts=tuple(Pair(*map(np.abs, part)) if isinstance(part, Pair) else np.abs(part) for part in form.parts)
        )
        runs = [(0, rows)]
        if rows * cols > _COMPARED:
            chosen = np.random.default_rng(0).integers(rows, size=2)
            runs = [(row, row + 1) for row in sorted({0, *map(int, chosen), rows - 1})]
        for start, stop in runs:
            first = piece.group_start + start * cols
            last = first + (stop - start) * cols
            with np.errstate(over="ignore", invalid="ignore"):
                expected = plan.groups[piece.group].update(
                    load_backend("numpy"), self._made, first, last, self.file.dtype
                )
                off = np.abs(form.rows(start, stop) - expected.reshape(-1, cols))
                if not (off <= _AGREEMENT * np.abs(bounds.rows(start, stop))).all():
                    return False
        return True

    def _of_one_group(self, weight: int) -> ModuleUpdate | None:
        plan, shape = self.file.plan, self.file.targets[weight].shape
        pieces = plan.layout.of_weight(weight)
        group = plan.groups[pieces[0].group]
        if len(group.pieces) > 1 or len(pieces) > 1 or not group.projection.map.identity or group.subtracts:
            return None
        network = group.network
        if len(network.sizes) != 2 or network.sizes[1] != shape[1]:
            return None
        own = {name: self._made[full] for name, full in group.names.items()}
        arrays = group.with_frozen(load_backend("numpy"), own, self.file.dtype)
        terms = [_parts(network, network.of_term(prefixes, arrays)) for prefixes in network.prefixes]
        if len(network.splits) == 1:
            return _low_rank(terms, shape, network.scale)
        if network.terms > 1:
            return None
        return (_kronecker if network.kronecker else _hadamard)(terms[0], shape, network.scale)


Part = Pair | Float


def _parts(network: Network, arrays: Sequence[Mapping[str, Float]]) -> list[Part]:
    """Return the matrix of each split of a term, as two factors where its format has them."""
    backend, found = load_backend("numpy"), list[Part]()
    for split, own in zip(network.splits, arrays, strict=True):
        halves = split.factors(backend, own)
        whole = [(0, size) for size in split.sizes]
        found.append(split.tensor(backend, own, whole) if halves is None else Pair(halves[0], halves[1].T))
    return found


def _low_rank(terms: Sequence[Sequence[Part]], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    pairs = [Pair(part.b[: shape[0]], part.a) for (part,) in terms if isinstance(part, Pair)]
    if len(pairs) < len(terms):
        return None
    # A sum of low-rank matrices is low-rank: concatenate the factors.
    pair = Pair(np.concatenate([p.b for p in pairs], axis=1), np.concatenate([p.a for p in pairs], axis=1))
    return ModuleUpdate("lora", shape, (pair,), scale)


def _kronecker(parts: Sequence[Part], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    first, *between, last = parts
    # Multiply all splits but the last, as other libraries have two factors only.
    for part in between:
        first = np.asarray(np.kron(as_matrix(first), as_matrix(part)), np.float64)
    if tuple(one * other for one, other in zip(first.shape, last.shape, strict=True)) != shape:
        return None  # the product is larger than the weight and truncated, which no other library supports
    return ModuleUpdate("lokr", shape, (first, last), scale)


def _hadamard(parts: Sequence[Part], shape: tuple[int, int], scale: float) -> ModuleUpdate | None:
    pairs = [Pair(part.b[: shape[0]], part.a) for part in parts if isinstance(part, Pair)]
    return ModuleUpdate("loha", shape, tuple(pairs), scale) if len(pairs) == len(parts) == 2 else None


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
        return Target(self.path, self.stored, transposed=self.transposed).shape

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

    def update(self, unpacked: Unpacked) -> ModuleUpdate:
        """Return ΔW as its exact factors, or else dense."""
        return self.form(unpacked) or ModuleUpdate("dense", self.shape, (self.delta(unpacked),))

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


# -- Join the updates of many weights, as other libraries store them, into one adapter file ----------------------------

# Each weight keeps its own form, rank and scale: where they differ, the file has several configs.


# Divisions up to which factoring the sides evenly is worth a shorter config; readers of the file refuse twice as many.
_MAX_BALANCED = 1 << 17


def join(
    found: Sequence[TargetUpdate],
    dtype: str,
    kept: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    model: str = "",
    ties: Mapping[str, Sequence[str]] | None = None,
) -> tuple[AdapterFile, tuple[ModuleUpdate, ...]]:
    """Join the updates of many weights into one adapter file, exactly.

    Parameters
    ----------
    found : sequence of TargetUpdate
        At least one.
    dtype : str
        The dtype of the stored arrays if it represents all of their values; otherwise they are float32.
    kept, dtypes, model, ties
        As in :class:`~tnadapt.AdapterFile`; ``dtypes`` are those of ``kept``.

    Returns
    -------
    AdapterFile
        With a :class:`tnadapt.CompositeConfig` if the weights differ in form, rank or scale.
    tuple of ModuleUpdate
        The updates in the order of its targets.

    Raises
    ------
    FileError
        If an array overflows when its scale is multiplied in.

    Notes
    -----
    In LoKr, a W1 or W2 that is full in one weight and low-rank in another gets a form that fits both. A scale that is
    not ``alpha / rank`` for any alpha is multiplied into a factor.
    """
    parts = [
        own
        for part in _alike(found, _key)
        for own in ([part] if _common([one.update for one in part]) is not None else _alike(part, _sizes))
    ]
    configs, arrays, number = list[tuple[Config, int]](), dict[str, Float](), 0
    for part in parts:
        config, updates = _conformed([one.update for one in part])
        configs.append((config, len(part)))
        for update in updates:
            arrays |= {f"group{number}.{name}": array for name, array in update.arrays().items()}
            number += 1
    config = configs[0][0] if len(configs) == 1 else CompositeConfig(configs)
    ordered = [one for part in parts for one in part]
    stored, kinds_of = narrow(arrays, dtype)
    for name, array in stored.items():
        if not np.isfinite(array).all():
            target = ordered[int(name.partition(".")[0].removeprefix("group"))].target
            raise FileError(f"the scale of {safe_repr(target.label)} makes numbers that are too large for float32")
    file = AdapterFile(
        config, [one.target for one in ordered], stored, kept=kept, dtypes={**dtypes, **kinds_of}, model=model,
        ties=ties or {},
    )  # fmt: skip
    return file, tuple(one.update for one in ordered)


def _alike(found: Iterable[TargetUpdate], key: Callable[[ModuleUpdate], Hashable]) -> Iterable[list[TargetUpdate]]:
    """Return the updates of each key, in the order of its first one."""
    parts: dict[Hashable, list[TargetUpdate]] = {}
    for one in found:
        parts.setdefault(key(one.update), []).append(one)
    return parts.values()


def _key(update: ModuleUpdate) -> Hashable:
    """Return what updates of one config have in common, apart from the sizes of LoKr."""
    # The rank of LoKr is that of the factors that it has; those without any are padded.
    return update.kind, update.scale, None if update.kind == "lokr" else update.rank


def _sizes(update: ModuleUpdate) -> Hashable:
    return update.parts[0].shape if update.kind == "lokr" else None


def _conformed(updates: Sequence[ModuleUpdate]) -> tuple[Config, list[ModuleUpdate]]:
    """Return the config of updates that have one, and the updates in its form."""
    config = _common(updates)
    assert config is not None  # of updates of one key and size
    assert isinstance(config.rank, int)
    scale = updates[0].scale
    alpha = None if scale == 1.0 else alpha_of([scale], config.rank)
    if alpha is None:
        updates = [update.absorb_scale() for update in updates]
    return config.replace(alpha=alpha), [_conform(update, config) for update in updates]


def _common(updates: Sequence[ModuleUpdate]) -> Config | None:
    """Return the common config of updates of one key, or None for LoKr of sizes that no one config gives."""
    config = updates[0].config()
    if updates[0].kind != "lokr":
        return config
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
    small = sum(math.isqrt(size) for size in {math.prod(update.shape) for update in updates}) <= _MAX_BALANCED
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
