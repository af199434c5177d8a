"""PEFT's Uni-LoRA: each number of all A and B is one of a few trained numbers, scaled.

PEFT's indices become the index of tied elements before the network.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import TiedElements
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.roles import natural

from ._file_format import EncodedAdapter
from ._path_patterns import PathPatterns
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, rank_of
from ._unpack import Module
from ._updates import Float, ModuleUpdate, Pair

__all__ = ["PeftUniLora"]

_TENSORS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
_NOTE = "stored as LoRA of the same rank, as {}: {} trained numbers became {}"
_SAVE = "save it with save_indices=True"
# PEFT rounds 1 / sqrt(count) to the dtype of the model, or to float32. Beyond float32's rounding, and beyond float64's
# for numbers in float64, the scales are others than ours.
_ROUNDING = {True: 1e-12, False: 1e-6}
# The index is stored in float32.
_MOST = 1 << 24


class _Factors(NamedTuple):
    """The indices of A (r, columns) and B (rows, r) of a weight, and the scale of each of their elements."""

    a_index: NDArray[np.int64]
    b_index: NDArray[np.int64]
    a_scale: Float
    b_scale: Float

    def pair(self, theta: Float) -> Pair:
        """Return the factors."""
        return Pair(theta[self.b_index] * self.b_scale, (theta[self.a_index] * self.a_scale).T)

    @property
    def flat(self) -> tuple[NDArray[np.int64], Float]:
        """Indices and scales in the order of this library's arrays: B, then A transposed."""
        return (
            np.concatenate([self.b_index.reshape(-1), self.a_index.T.reshape(-1)]),
            np.concatenate([self.b_scale.reshape(-1), self.a_scale.T.reshape(-1)]),
        )


class PeftUniLora(PeftMethod):
    """``ΔW = B A``, where each element of A and B is an element of θ, divided by the root of how often that is used."""

    title = "Uni-LoRA"
    tensors = _TENSORS
    shared = ("unilora_theta_d",)
    integers = _TENSORS[:2]
    fields = (
        "r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights", "save_indices",
    )  # fmt: skip
    may_transpose = True

    @property
    def kind(self) -> str:
        """The last part of the form's name."""
        return "unilora"

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the indices as given, and the trained numbers as θ."""
        theta, rank = content.shared_tensor("unilora_theta_d", 1), rank_of(content, 4)
        factors = self._stored(content, theta) if content.modules else self._drawn(content, theta, rank)
        targets, updates, flat = [], [], []
        for path in sorted(factors, key=natural):
            pair = factors[path].pair(theta)
            if pair.rank != rank:
                raise content.misfit(path, f"unilora_indices_A must be (r, columns), r = {rank}")
            targets.append(content.target(path, pair.shape))
            updates.append(ModuleUpdate("lora", pair.shape, (pair,)))
            flat.append(factors[path].flat)
        index, scale = (np.concatenate(parts) for parts in zip(*flat, strict=True))
        expected = 1.0 / np.sqrt(np.maximum(np.bincount(index, minlength=theta.size), 1))[index]
        if theta.size > min(index.size, _MOST):
            why = f"it has {theta.size} trained numbers for {index.size} elements"
        elif np.max(np.abs(scale / expected - 1.0)) > _ROUNDING["float64" in content.dtypes]:
            why = "its scales are not 1 / sqrt of the number of elements that share one, in the dtype of the others"
        else:
            config = Config(rank=rank, before=TiedElements(normalized=True), parameters=theta.size, offset=False)
            content.dtypes.add("float32")  # the factors are not rounded to the dtype of the stored θ
            return OwnStructure(targets, config, {"theta": theta}, {"theta.index": index.astype(np.float64)}, updates)
        return OwnStructure(targets, updates=updates, notes=(_NOTE.format(why, theta.size, index.size),))

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode θ, and which of its elements each element of A and B is."""
        theta, plan = file.plan.theta, file.plan
        if theta is None or len(theta.parts) > 1 or not _is_lora(plan):
            self.refuse("it needs one θ for all factors of LoRA, and one weight per group, as presets.unilora has them")
        (part,) = theta.parts
        backend, like = load_backend("numpy"), np.zeros(1)
        if file.config.offset and any(np.any(plan.array_start(backend, full, like)) for full in plan.array_shapes):
            self.refuse("PEFT's factors are P θ alone, and here they start at other numbers: set offset=False")
        vector = file.arrays[part.name].astype(np.float64)
        random = np.random.default_rng(0).normal(size=vector.size)
        scales, places, made = (
            theta.moved(backend, part, probe) for probe in (np.ones(vector.size), np.arange(vector.size) + 1.0, random)
        )
        # Both factors are multiples of θ, so that a scale of their product can be part of it.
        scaled = vector * math.sqrt(plan.groups[0].network.scale)
        tensors, integers = {"base_model.unilora_theta_d": scaled}, dict[str, NDArray[np.int64]]()
        for module in modules:
            group = plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
            for letter, name in (("A", "split0.factor1"), ("B", "split0.factor0")):
                full = group.names[name]
                scale = np.asarray(scales[full])
                if np.any(scale == 0.0):
                    self._refuse_map(file)
                index = np.clip(np.rint(places[full] / scale).astype(np.int64) - 1, 0, vector.size - 1)
                if not np.allclose(random[index] * scale, made[full], rtol=1e-9, atol=1e-12):
                    self._refuse_map(file)
                if letter == "A":
                    scale, index = scale.T, index.T
                tensors[self.name_of(module, f"unilora_scales_{letter}")] = scale
                integers[self.name_of(module, f"unilora_indices_{letter}")] = index
        settings = {"r": file.config.rank, "theta_d_length": vector.size, "save_indices": True}
        return EncodedAdapter(tensors, config=settings, integers=integers)

    def _refuse_map(self, file: AdapterFile) -> NoReturn:
        self.refuse(
            f"before={safe_repr(file.config.before)} adds several elements of θ up, and PEFT has one for each element "
            "of the factors, as 'one-hot' and 'tied' have"
        )

    def _stored(self, content: PeftContent, theta: Float) -> dict[str, _Factors]:
        found = {}
        for path in content.modules:
            a_index, b_index, a_scale, b_scale = (content.tensor(path, name, 2) for name in _TENSORS)
            if a_index.shape != a_scale.shape or b_index.shape != b_scale.shape or len(a_index) != b_index.shape[1]:
                raise content.misfit(path, "indices and scales must be (r, columns) for A and (rows, r) for B")
            for index in (a_index, b_index):
                if (index < 0).any() or (index >= theta.size).any():
                    raise content.misfit(path, f"an index is outside the {theta.size} elements of unilora_theta_d")
            found[path] = _Factors(a_index, b_index, a_scale, b_scale)
        return found

    def _drawn(self, content: PeftContent, theta: Float, rank: int) -> dict[str, _Factors]:
        """Draw the indices as PEFT does, which needs the order of the model's modules."""
        shapes = self._targeted(content)
        seed = content.config.get("proj_seed", 42)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise FileError(f"proj_seed must be an integer of at least 0; got {safe_repr(seed)}")
        sizes = [rank * side for shape in shapes.values() for side in (shape[1], shape[0])]
        index = _balanced(sum(sizes), theta.size, seed)
        counts = np.bincount(index, minlength=theta.size)
        scale = (np.float32(1.0) / np.sqrt(np.maximum(counts, 1).astype(np.float32)))[index].astype(np.float64)
        edges = list(itertools.accumulate(sizes))[:-1]
        indices, scales = iter(np.split(index, edges)), iter(np.split(scale, edges))
        return {
            path: _Factors(
                next(indices).reshape(rank, cols), next(indices).reshape(rows, rank),
                next(scales).reshape(rank, cols), next(scales).reshape(rows, rank),
            )
            for path, (rows, cols) in shapes.items()
        }  # fmt: skip

    def _targeted(self, content: PeftContent) -> Mapping[str, tuple[int, int]]:
        """Return rows and columns of the adapted weights, in the model's order."""
        config, base = content.config, content.base
        if base is None or not base.ordered or None in base.shapes.values():
            raise FileError(
                "it stores neither its indices nor the names of its weights, and PEFT draws the indices in the order "
                f"of the model's modules: {_SAVE}, or give base={{name: tuple(module.weight.shape) for name, module in "
                "model.named_modules() if hasattr(module, 'weight')}"
            )
        unclear = [name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if config.get(name)]
        targets = config.get("target_modules")
        if unclear or not targets or not isinstance(targets, (str, list)) or targets == "all-linear":
            what = f"{unclear[0]} is set" if unclear else f"target_modules is {safe_repr(targets)}"
            raise FileError(f"it stores neither its indices nor the names of its weights, and {what}: {_SAVE}")
        chosen, meant = {}, _patterns_of(targets)
        for path, stored in base.shapes.items():
            assert stored is not None
            if len(stored) == 2 and meant.get(path, False):
                chosen[path] = (stored[1], stored[0]) if content.settings.transposed else (stored[0], stored[1])
        if not chosen:
            raise FileError(f"target_modules={safe_repr(targets)} matches no matrix of base")
        return chosen


def _is_lora(plan: SuperLoRA) -> bool:
    """Return whether every weight has two factors, and nothing follows their product."""
    return all(
        list(group.names) == ["split0.factor0", "split0.factor1"]
        and not group.frozen_names
        and len(group.pieces) == 1
        and group.network.sizes == plan.shapes[group.pieces[0].weight]
        and group.projection.map.identity
        for group in plan.groups
    ) and plan.num_groups == len(plan.shapes)


def _patterns_of(targets: str | Sequence[object]) -> PathPatterns:
    """Return patterns that match the paths that PEFT's ``target_modules`` mean."""
    if isinstance(targets, str):
        return PathPatterns("target_modules", {targets: True}, whole=True)
    return PathPatterns("target_modules", {re.escape(one): True for one in targets if isinstance(one, str)})


def _balanced(count: int, length: int, seed: int) -> NDArray[np.int64]:
    """Return PEFT's indices, each of which occurs equally often but for one."""
    rng = np.random.default_rng(seed)
    found = np.repeat(np.arange(length), count // length)
    if count % length:
        found = np.concatenate([found, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(found)
    return found
