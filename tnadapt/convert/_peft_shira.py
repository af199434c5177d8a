"""PEFT's SHiRA: some elements of each weight, at positions that are stored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import Scatter, TorchScatter
from tnadapt.algebra.torch_streams import DEFAULT_SEED, permutation_head
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, rank_of, seed_of
from ._peft_positions import dense_updates, few_values, padded
from ._unpack import Module
from ._updates import Float

__all__ = ["PeftShira"]


class PeftShira(PeftMethod):
    """``r (rows + cols)`` trained elements per weight."""

    title = "SHiRA"
    tensors = ("shira_weight", "shira_indices")
    integers = ("shira_indices",)
    fields = ("r", "mask_type", "random_seed", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the values, with their positions as the seed that gives them, or a list."""
        content.require_modules()
        rank, targets, places, values = rank_of(content, 32), list[Target](), list[NDArray[np.int64]](), list[Float]()
        for path in content.modules:
            own, indices = content.tensor(path, "shira_weight", 1), content.tensor(path, "shira_indices", 2)
            sides, rest = divmod(own.size, rank)
            if indices.shape != (2, own.size) or rest:
                raise content.misfit(path, f"shira_weight must have r (rows + cols) elements, r = {rank}, and "
                                     "shira_indices a row and a column for each")  # fmt: skip
            target = content.target_from_base(
                path, functools.partial(_have_sum, sides), f"rows and columns must sum to {sides}"
            )
            if (indices < 0).any() or (indices >= np.array(target.shape)[:, None]).any():
                raise content.misfit(path, f"shira_indices has a position outside the {target.shape} elements")
            flat = indices[0] * target.shape[1] + indices[1]
            if len(np.unique(flat)) < len(flat):
                raise content.misfit(path, "shira_indices has a position twice")
            targets.append(target)
            places.append(flat)
            values.append(own)
        seed = seed_of("random_seed", content.config.get("random_seed"), DEFAULT_SEED)
        return _seeded(targets, places, values, seed) or _listed(targets, places, values)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the values with their positions, and zeros at further ones up to ``r (rows + cols)``."""
        found = [self._elements(module, file) for module in modules]
        rank = max(-(-len(places) // sum(module.shape)) for module, (places, _) in zip(modules, found, strict=True))
        tensors, indices = dict[str, Float](), dict[str, NDArray[np.int32]]()
        for module, (places, values) in zip(modules, found, strict=True):
            rows, cols = module.shape
            size = rank * (rows + cols)
            if size > rows * cols:
                self.refuse(
                    f"PEFT trains r (rows + cols) elements of each weight, r = {rank} here, and {module.path} has fewer"
                )
            free = np.setdiff1d(np.arange(rows * cols), places)[: size - len(places)]
            whole = np.concatenate([places, free])
            order = np.argsort(whole)  # as PEFT lists them
            tensors[self.name_of(module, "shira_weight")] = padded(values, size)[order]
            indices[self.name_of(module, "shira_indices")] = np.stack(np.divmod(whole[order], cols)).astype(np.int32)
        return EncodedAdapter(tensors, config={"r": rank, "mask_type": "random"}, integers=indices)

    def _elements(self, module: Module, file: AdapterFile) -> tuple[NDArray[np.int64], Float]:
        """Return the positions in a weight, and the scaled values there."""
        config, plan = file.config, file.plan
        if not isinstance(config.projection, (Scatter, TorchScatter)) or config.before is not None or config.terms > 1:
            self.refuse("it needs projection=maps.Scatter(…) alone, as presets.shira has it")
        (piece, *more) = plan.layout.of_weight(module.targets[0][0])
        group = plan.groups[piece.group]
        if more or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
            self.refuse("it needs one trained vector, order=1 and format='dense', as presets.shira has it")
        # F of the numbers 1, 2, … tells which of the values is where.
        numbers = np.arange(1.0, group.projection.n_in + 1)
        which = np.asarray(group.projection.map.slice(
            load_backend("numpy"), numbers, piece.group_start, piece.group_start + piece.length
        )).astype(np.int64)  # fmt: skip
        places = np.flatnonzero(which)
        vector = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1) * group.network.scale
        return places, vector[which[places] - 1]


def _have_sum(total: int, rows: int, cols: int) -> bool:
    return rows + cols == total


def _seeded(
    targets: Sequence[Target], places: Sequence[NDArray[np.int64]], values: Sequence[Float], seed: int
) -> OwnStructure | None:
    """Return the values in the order in which torch draws their positions; None if it does not draw these."""
    most, arrays = max(own.size for own in values), []
    for target, flat, own in zip(targets, places, values, strict=True):
        length = target.shape[0] * target.shape[1]
        if most > length:
            return None
        drawn = permutation_head(length, own.size, seed)
        order = np.argsort(flat)
        if not np.array_equal(flat[order], np.sort(drawn)):
            return None
        arrays.append(padded(own[order][np.argsort(np.argsort(drawn))], most))
    return few_values(targets, arrays, TorchScatter(most, seed), 1.0)


def _listed(targets: Sequence[Target], places: Sequence[NDArray[np.int64]], values: Sequence[Float]) -> OwnStructure:
    """Return the values with a list of their positions; the updates if it is too long.

    The positions are those in each weight if they are the same in all, otherwise those in the long vector.
    """
    if all(np.array_equal(own, places[0]) for own in places) and len({target.shape for target in targets}) == 1:
        with contextlib.suppress(ConfigError):
            return few_values(targets, values, Scatter(positions=tuple(places[0].tolist())), 1.0)
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    starts = np.cumsum([0, *sizes])
    flat = np.concatenate([own + start for own, start in zip(places, starts, strict=False)])
    try:
        config = Config(
            groups=1,
            order=1,
            fold="hypercube",
            format="dense",
            rank=1,
            projection=Scatter(positions=tuple(flat.tolist())),
        )
    except ConfigError:
        deltas = []
        for target, own, here in zip(targets, values, places, strict=True):
            delta = np.zeros(target.shape)
            delta.reshape(-1)[here] = own
            deltas.append(delta)
        return dense_updates(targets, deltas, f"no seed gives its {flat.size} positions, and a config cannot list them")
    return OwnStructure(targets, config, {"group0.split0.dense": np.concatenate(values)})
