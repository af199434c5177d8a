"""PEFT's VeRA and RandLoRA: frozen random matrices, shared by weights, and trained diagonals."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.group import Group
from tnadapt.algebra.sources import Given, Scaled, Source, Tied, inner_source
from tnadapt.algebra.torch_streams import TorchStream, bfloat16_of
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import (
    DRAWN,
    OwnStructure,
    PeftContent,
    PeftMethod,
    rank_of,
    seed_of,
)
from ._peft_settings import number_of
from ._updates import Float, Module, ModuleUpdate, Pair

__all__ = [
    "PeftRandLora",
    "PeftVera",
]


# -- VeRA: two frozen matrices, shared by all weights, and two trained diagonals per weight ----------------------------


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


# -- RandLoRA: products of frozen matrices with trained diagonals, whose sum has full rank -----------------------------

# PEFT flattens its two stacks of N matrices in different orders, so that it pairs column ``k = r N + n`` of the bases B
# with row r of A, and not the columns of base n (``test_fault_randlora_pairs_columns_of_different_bases``). As N
# differs with the smaller side of a weight, so does the pairing, and weights share B only if N is the same.


_STRUCTURE = (
    "it needs ⌈smaller side / rank⌉ terms for every weight, with frozen factors that all weights share; those on the "
    "smaller side tied to one, with both diagonals, as presets.randlora has them"
)


class _Weight(NamedTuple):
    """One weight: λ (rank, N), γ (N, smaller side), and whether A is on the side of the columns."""

    target: Target
    lambdas: Float
    gammas: Float
    tall: bool


class PeftRandLora(PeftMethod):
    """``ΔW = (alpha / r) sum_n B_n diag(λ_n) A diag(γ_n)``, transposed if there are more columns than rows."""

    title = "RandLoRA"
    tensors = ("randlora_lambda", "randlora_gamma")
    shared = ("randlora_A", "randlora_B")
    copies = shared
    fields = (
        "r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
        "init_weights",
    )  # fmt: skip
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the diagonals as trained, A and B as given."""
        content.require_modules()
        rank = rank_of(content, 32)
        weights = [self._weight(content, path, rank) for path in content.modules]
        a, b, notes = self._bases(content, rank, weights)
        alpha = number_of("randlora_alpha", content.config.get("randlora_alpha", 640))
        plan = _Plan(weights, rank, a, b)
        arrays, given, updates = dict[str, Float](), dict[str, Float](), []
        scale = alpha / rank
        config, moved = plan.config(), 1.0
        try:
            config = config.replace(alpha=alpha)
        except ConfigError:
            moved = scale
        trained = list[str]()
        for number, weight in enumerate(weights):
            own, frozen = plan.of(number)
            for name in own:
                own[name] = own[name] * moved if name.endswith(f"{plan.short(weight)}.rank") else own[name]
            trained += [name for name in own if plan.short(weight) in name]
            arrays |= own
            given |= frozen
            updates.append(plan.update(weight, scale))
        if plan.mixed:
            notes += ("weights with more rows than columns and others: each stores its own bases, with diagonals of "
                      "ones, which are not trained",)  # fmt: skip
        elif not plan.alike:
            notes += ("weights whose smaller sides differ: PEFT pairs the bases differently, and each stores its own",)
        return OwnStructure(
            [weight.target for weight in weights], config, arrays, given, updates,
            trained if plan.mixed else None, notes,
        )  # fmt: skip

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the diagonals, A, and the bases in the order in which PEFT pairs them."""
        self.require_one_weight_per_group(file)
        config, rank = file.config, file.config.rank
        fit = (config.order, config.splits, config.format, config.projection, config.fold)
        if fit != (2, 1, "cp", "identity", "stack") or not isinstance(rank, int):
            self.refuse(_STRUCTURE)
        tensors, whole = dict[str, Float](), dict[str, Float]()
        names: tuple[list[str], list[str]] = [], []
        for module in modules:
            group = file.plan.groups[file.plan.layout.of_weight(module.targets[0][0])[0].group]
            tall = module.shape[1] <= module.shape[0]
            factors = ["factor1", "factor0"] if tall else ["factor0", "factor1"]
            own_names = [[prefix + name for (prefix,) in group.network.prefixes] for name in factors]
            short, long = own_names
            if names[0] and names[0] != short:
                self.refuse(
                    "some weights have more rows than columns and others have not, and A would be on both sides"
                )
            names = short, long
            self._check(group, short, long, -(-min(module.shape) // rank))
            own = {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}
            tensors[self.name_of(module, "randlora_lambda")] = np.stack([own[f"{name}.rank"] for name in short], axis=1)
            tensors[self.name_of(module, "randlora_gamma")] = np.stack([own[f"{name}.size"] for name in short])
            for name in (short[0], *long):
                array = group.frozen.on(load_backend("numpy"), (name, file.dtype), np.zeros(1), "float64")
                if name not in whole or len(array) > len(whole[name]):
                    whole[name] = array
        short, long = names
        # Column k = r N + n of PEFT's bases, flattened, is column r of base n.
        bases = np.stack([whole[name] for name in long], axis=2)
        tensors["base_model.randlora_A"] = whole[short[0]].T[:, None]
        tensors["base_model.randlora_B"] = bases.reshape(len(bases), config.terms, rank)
        alpha = rank if config.alpha is None else config.alpha
        return EncodedAdapter(tensors, config={"r": rank, "randlora_alpha": alpha, "save_projection": True})

    def _check(self, group: Group, short: Sequence[str], long: Sequence[str], count: int) -> None:
        """Raise ConfigError unless a weight is the sum of as many terms as PEFT has, with one A and shared bases."""
        entries = group.frozen.entries
        multipliers = {name: one.multipliers for name, one in group.multiplied.items()}
        if (
            not all(name in entries and entries[name].source.independent_of_group for name in (*short, *long))
            or multipliers != dict.fromkeys(short, ("size", "rank"))
            or len({entries[name].full for name in short}) > 1
            or len(short) != count
        ):
            self.refuse(_STRUCTURE)

    def _weight(self, content: PeftContent, path: str, rank: int) -> _Weight:
        lambdas, gammas = (content.tensor(path, name, 2) for name in self.tensors)
        count, least = gammas.shape
        if lambdas.shape != (rank, count) or count != -(-least // rank):
            raise content.misfit(
                path, f"with r = {rank}, randlora_lambda must be (r, N) and randlora_gamma (N, side), N = ⌈side / r⌉"
            )
        fits = functools.partial(_has_smaller_side, least)
        target = content.target_from_base(path, fits, f"its smaller side is {least}")
        rows, cols = target.shape
        return _Weight(target, lambdas, gammas, cols <= rows)

    def _bases(
        self, content: PeftContent, rank: int, weights: Sequence[_Weight]
    ) -> tuple[Float, Float, tuple[str, ...]]:
        """Return A (rank, least) and B (most, N rank), whose columns are flattened as PEFT flattens them."""
        rows, cols = (max(weight.target.shape[side] for weight in weights) for side in (0, 1))
        least, most = min(rows, cols), max(rows, cols)
        count = -(-least // rank)
        if content.config.get("save_projection", True) or "randlora_A" in content.shared:
            a, b = (
                content.shared_tensor(
                    name, 3, ": save it with save_projection=True, or set that to false in the config"
                )
                for name in self.shared
            )
            own = max(min(weight.target.shape) for weight in weights)
            long = max(max(weight.target.shape) for weight in weights)
            if a.shape[:2] != (rank, 1) or a.shape[2] < own or b.shape[2] != rank or b.shape[0] < long:
                raise content.misfit(
                    weights[0].target.module,
                    f"randlora_A must be ({rank}, 1, {own}) and randlora_B ({long}, {-(-own // rank)}, {rank}), or "
                    f"larger; they are {a.shape} and {b.shape}",
                )
            if b.shape[1] < max(len(weight.gammas) for weight in weights):
                raise content.misfit(
                    weights[0].target.module, f"randlora_B has {b.shape[1]} bases, and that is too few"
                )
            return a[:, 0], b, ()
        stream = TorchStream(seed_of("projection_prng_key", content.config.get("projection_prng_key"), 0))
        if content.config.get("very_sparse") or content.config.get("sparse"):
            sparsity = math.sqrt(least) if content.config.get("very_sparse") else 3.0
            a, b = (_sparse(stream, shape, sparsity) for shape in ((rank, 1, least), (most, count, rank)))
        else:
            first = _kaiming(stream, (rank, 1, least))
            bases = np.concatenate([_kaiming(stream, (most, 1, rank)) for _ in range(count)], axis=1)
            a, b = _normalized(first, half=True), _normalized(bases, half=True)
        content.dtypes.add("float32")
        return a[:, 0], b, (f"PEFT left A and B to a seed of torch's: {DRAWN}",)


class _Plan:
    """The config of all weights, and the names of their arrays."""

    def __init__(self, weights: Sequence[_Weight], rank: int, a: Float, b: Float) -> None:
        self.weights, self.rank, self.a, self.b = weights, rank, a, b
        self.terms = max(len(weight.gammas) for weight in weights)
        self.alike = len({len(weight.gammas) for weight in weights}) == 1
        self.mixed = len({weight.tall for weight in weights}) > 1

    @staticmethod
    def short(weight: _Weight) -> str:
        """Name of the factor on the smaller side."""
        return "split0.factor1" if weight.tall else "split0.factor0"

    @staticmethod
    def long(weight: _Weight) -> str:
        """Name of the factor on the larger side."""
        return "split0.factor0" if weight.tall else "split0.factor1"

    def config(self) -> Config:
        """Return the settings, without alpha."""
        both: dict[str, Source]
        if self.mixed:
            each = Scaled(Given(), size=True, rank=True)
            both = {"factor0": each, "factor1": each}
        else:
            short, long = self.short(self.weights[0]), self.long(self.weights[0]).removeprefix("split0.")
            first = f"term0.{short}" if self.terms > 1 else short
            both = {
                long: Given(shared=self.alike),
                first: Scaled(Given(shared=True), size=True, rank=True, start=self._start),
            }
            if self.terms > 1:
                both[short.removeprefix("split0.")] = Scaled(Tied(first), size=True, rank=True, start=self._start)
        return Config(rank=self.rank, terms=self.terms, sources=both)

    @property
    def _start(self) -> tuple[float, float]:
        return 1.0 / max(max(weight.target.shape) for weight in self.weights), 0.0

    def _long_factor(self, weight: _Weight, term: int, size: int) -> Float:
        count = len(weight.gammas)
        flat = self.b[:size, :count].reshape(size, -1)
        return flat[:, term % count :: count]

    def of(self, number: int) -> tuple[dict[str, Float], dict[str, Float]]:
        """Return the trained and the given arrays of a weight."""
        weight, own, given = self.weights[number], dict[str, Float](), dict[str, Float]()
        least, most = min(weight.target.shape), max(weight.target.shape)
        short, long = self.short(weight), self.long(weight)
        largest_least, largest = (max(side(other.target.shape) for other in self.weights) for side in (min, max))
        for term in range(self.terms):
            prefix = f"group{number}." + f"term{term}." * (self.terms > 1)
            real = term < len(weight.gammas)
            own[f"{prefix}{short}.size"] = weight.gammas[term] if real else np.zeros(least)
            own[f"{prefix}{short}.rank"] = weight.lambdas[:, term] if real else np.zeros(self.rank)
            if self.mixed:
                own |= {f"{prefix}{long}.size": np.ones(most), f"{prefix}{long}.rank": np.ones(self.rank)}
                given[f"{prefix}{short}"] = self.a[:, :least].T
            elif number == 0 and term == 0:
                given[f"{prefix}{short}"] = self.a[:, :largest_least].T
            if self.mixed or not self.alike:
                given[f"{prefix}{long}"] = self._long_factor(weight, term, most)
            elif number == 0:
                given[f"{prefix}{long}"] = self._long_factor(weight, term, largest)
        return own, given

    def update(self, weight: _Weight, scale: float) -> ModuleUpdate:
        """Return the update, as PEFT multiplies it out."""
        least, most = min(weight.target.shape), max(weight.target.shape)
        count = len(weight.gammas)
        scaled = weight.lambdas[:, :, None] * self.a[:, None, :least] * weight.gammas[None]
        narrow = scaled.reshape(-1, least).T
        wide = self.b[:most, :count].reshape(most, -1)
        pair = Pair(wide, narrow) if weight.tall else Pair(narrow, wide)
        return ModuleUpdate("lora", weight.target.shape, (pair,), scale)


def _has_smaller_side(least: int, rows: int, cols: int) -> bool:
    return min(rows, cols) == least


def _kaiming(stream: TorchStream, shape: tuple[int, int, int]) -> Float:
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(shape[1] * shape[2]))
    # PEFT draws in bfloat16 where the machine has it, and in float16 elsewhere.
    return stream.uniforms(shape, -bound, bound, "bfloat16").astype(np.float64)


def _sparse(stream: TorchStream, shape: tuple[int, int, int], sparsity: float) -> Float:
    unit = stream.uniforms(shape, 0.0, 1.0)
    edge = 1 / (2 * sparsity)
    return _normalized((unit > np.float32(1 - edge)) * 1.0 - (unit < np.float32(edge)) * 1.0, half=False)


def _normalized(array: Float, half: bool) -> Float:
    deviation = np.array(array.std(ddof=1), np.float32)
    single = array.astype(np.float32)
    found = bfloat16_of(single / bfloat16_of(deviation)) if half else single / deviation
    return np.asarray(found, np.float64)
