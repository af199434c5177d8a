"""PEFT's Uni-LoRA: each number of all A and B is one of a few trained numbers, scaled.

No config has PEFT's draws yet, or a list of them, so A and B are read as those of LoRA.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.roles import natural

from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, rank_of
from ._updates import Float, ModuleUpdate, Pair

__all__ = ["PeftUniLora"]

_TENSORS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
_NOTE = "stored as LoRA of the same rank, as no config says which of the {} trained numbers each of its numbers is"
_SAVE = "save it with save_indices=True"


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
    writable = False

    @property
    def kind(self) -> str:
        """The last part of the form's name."""
        return "unilora"

    def read(self, content: PeftContent) -> OwnStructure:
        """Gather A and B."""
        theta, rank = content.shared_tensor("unilora_theta_d", 1), rank_of(content, 4)
        pairs = self._stored(content, theta) if content.modules else self._drawn(content, theta, rank)
        targets, updates = [], []
        for path in sorted(pairs, key=natural):
            pair = pairs[path]
            if pair.rank != rank:
                raise content.misfit(path, f"unilora_indices_A must be (r, columns), r = {rank}")
            targets.append(content.target(path, pair.shape))
            updates.append(ModuleUpdate("lora", pair.shape, (pair,)))
        return OwnStructure(targets, updates=updates, notes=(_NOTE.format(theta.size),))

    def _stored(self, content: PeftContent, theta: Float) -> dict[str, Pair]:
        found = {}
        for path in content.modules:
            a_index, b_index, a_scale, b_scale = (content.tensor(path, name, 2) for name in _TENSORS)
            if a_index.shape != a_scale.shape or b_index.shape != b_scale.shape or len(a_index) != b_index.shape[1]:
                raise content.misfit(path, "indices and scales must be (r, columns) for A and (rows, r) for B")
            for index in (a_index, b_index):
                if (index < 0).any() or (index >= theta.size).any():
                    raise content.misfit(path, f"an index is outside the {theta.size} elements of unilora_theta_d")
            found[path] = Pair(theta[b_index] * b_scale, (theta[a_index] * a_scale).T)
        return found

    def _drawn(self, content: PeftContent, theta: Float, rank: int) -> dict[str, Pair]:
        """Draw the indices as PEFT does, which needs the order of the model's modules."""
        shapes = self._targeted(content)
        seed = content.config.get("proj_seed", 42)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise FileError(f"proj_seed must be an integer of at least 0; got {safe_repr(seed)}")
        sizes = [rank * side for shape in shapes.values() for side in (shape[1], shape[0])]
        index = _balanced(sum(sizes), theta.size, seed)
        counts = np.bincount(index, minlength=theta.size)
        scale = np.float32(1.0) / np.sqrt(np.maximum(counts, 1).astype(np.float32))
        pieces = iter(np.split(theta[index] * scale[index], list(itertools.accumulate(sizes))[:-1]))
        return {
            path: Pair(b.reshape(rows, rank), a.reshape(rank, cols).T)
            for (path, (rows, cols)), a, b in zip(shapes.items(), pieces, pieces, strict=True)
        }

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
        chosen = {}
        for path, stored in base.shapes.items():
            assert stored is not None
            if len(stored) == 2 and _matches(targets, path):
                chosen[path] = (stored[1], stored[0]) if content.settings.transposed else (stored[0], stored[1])
        if not chosen:
            raise FileError(f"target_modules={safe_repr(targets)} matches no matrix of base")
        return chosen


def _matches(targets: str | Sequence[object], path: str) -> bool:
    """Return whether PEFT's ``target_modules`` mean a module."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, path) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise FileError(f"target_modules={safe_repr(targets)} is no regular expression: {error}") from None
    return any(path == one or path.endswith(f".{one}") for one in targets)


def _balanced(count: int, length: int, seed: int) -> NDArray[np.int64]:
    """Return PEFT's indices, each of which occurs equally often but for one."""
    rng = np.random.default_rng(seed)
    found = np.repeat(np.arange(length), count // length)
    if count % length:
        found = np.concatenate([found, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(found)
    return found
