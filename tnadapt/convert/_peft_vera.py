"""PEFT's VeRA: two frozen random matrices, shared by all weights, and two trained diagonals per weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Given, Scaled, Source, inner_source
from tnadapt.algebra.torch_streams import TorchStream
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import DRAWN, OwnStructure, PeftMethod, rank_of, seed_of
from ._unpack import Module
from ._updates import Float, ModuleUpdate, Pair

__all__ = ["PeftVera"]

_B, _D = "split0.factor0", "split0.factor1"


class PeftVera(PeftMethod):
    """``ΔW = diag(b) B diag(d) A``."""

    title = "VeRA"
    tensors = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    fields = ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the diagonals as trained, A and B as given."""
        content.require_modules()
        rank, targets, diagonals = rank_of(content, 256), [], list[tuple[Float, Float]]()
        for path in content.modules:
            b, d = (content.tensor(path, name, 1) for name in self.tensors)
            if d.size != rank:
                raise content.misfit(path, f"vera_lambda_d must have r = {rank} elements")
            fits = functools.partial(_has_rows, b.size)
            targets.append(content.target_from_base(path, fits, f"it has {b.size} rows"))
            diagonals.append((b, d))
        rows, cols = (max(target.shape[side] for target in targets) for side in (0, 1))
        a, b_matrix, notes = self._projections(content, rank, rows, cols)
        arrays, updates = dict[str, Float](), []
        for number, (target, (b, d)) in enumerate(zip(targets, diagonals, strict=True)):
            arrays |= {f"group{number}.{_B}.size": b, f"group{number}.{_D}.rank": d}
            own_rows, own_cols = target.shape
            pair = Pair(b[:, None] * b_matrix[:own_rows], a[:, :own_cols].T * d)
            updates.append(ModuleUpdate("lora", target.shape, (pair,)))
        sources: dict[str, Source] = {
            "factor0": Scaled(Given(shared=True), start=0.0),
            "factor1": Scaled(Given(shared=True), size=False, rank=True, start=_start(content)),
        }
        given = {f"group0.{_B}": b_matrix, f"group0.{_D}": a.T}
        return OwnStructure(targets, Config(rank=rank, sources=sources), arrays, given, updates, notes=notes)

    def _projections(
        self, content: PeftContent, rank: int, rows: int, cols: int
    ) -> tuple[Float, Float, tuple[str, ...]]:
        """Return A (rank, cols) and B (rows, rank), stored or drawn as PEFT draws them."""
        if content.config.get("save_projection", True) or "vera_A" in content.shared:
            a, b = (
                content.shared_tensor(
                    name, 2, ": save it with save_projection=True, or set that to false in the config"
                )
                for name in self.shared
            )
            if a.shape[0] != rank or b.shape[1] != rank or a.shape[1] < cols or b.shape[0] < rows:
                raise content.misfit(
                    next(iter(content.modules)),
                    f"vera_A must be ({rank}, {cols}) and vera_B ({rows}, {rank}), or larger; they are {a.shape} and "
                    f"{b.shape}",
                )
            return a[:, :cols], b[:rows], ()
        stream = TorchStream(seed_of("projection_prng_key", content.config.get("projection_prng_key"), 0))
        drawn = [stream.uniforms(shape, -_bound(shape[1]), _bound(shape[1])) for shape in ((rank, cols), (rows, rank))]
        content.dtypes.add("float32")
        a, b = (array.astype(np.float64) for array in drawn)
        return a, b, (f"PEFT left A and B to a seed of torch's: {DRAWN}",)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the diagonals, and the leading matrices of which each weight has a part."""
        config, plan = file.config, file.plan
        self.require_one_weight_per_group(file)
        fit = (config.order, config.splits, config.terms, config.format, config.projection, config.fold)
        sources = [config.sources.get("factor0"), config.sources.get("factor1")]
        shaped = [
            isinstance(one, Scaled) and not inner_source(one).trained and inner_source(one).independent_of_group
            and (one.size, one.rank) == sides
            for one, sides in zip(sources, ((True, False), (False, True)), strict=True)
        ]  # fmt: skip
        if fit != (2, 1, 1, "cp", "identity", "stack") or not all(shaped) or len(config.sources) != 2:
            self.refuse(
                "it needs order=2, format='cp', and both factors frozen, shared by all weights and Scaled: factor0 by "
                "size, factor1 by rank, as presets.vera has them"
            )
        backend, like = load_backend("numpy"), np.zeros(1)
        tensors, whole = dict[str, Float](), dict[str, Float]()
        for module in modules:
            group = plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
            own = {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}
            tensors[self.name_of(module, "vera_lambda_b")] = own[f"{_B}.size"] * group.network.scale
            tensors[self.name_of(module, "vera_lambda_d")] = own[f"{_D}.rank"]
            for name in (_B, _D):
                array = group.frozen.on(backend, (name, file.dtype), like, "float64")
                if name not in whole or len(array) > len(whole[name]):
                    whole[name] = array
        tensors |= {"base_model.vera_A": whole[_D].T, "base_model.vera_B": whole[_B]}
        assert isinstance(config.rank, int)
        return EncodedAdapter(tensors, config={"r": config.rank, "projection_prng_key": 0, "save_projection": True})


def _has_rows(own: int, rows: int, _cols: int) -> bool:
    return rows == own


def _start(content: PeftContent) -> float:
    found = content.config.get("d_initial")
    usable = isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < abs(found) <= 1
    return float(found) if usable else 0.1  # type: ignore[arg-type]


def _bound(fan_in: int) -> float:
    """Return the bound of PEFT's uniform numbers, of variance ``2 / fan_in``."""
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))
