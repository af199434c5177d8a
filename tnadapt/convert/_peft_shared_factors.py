"""PEFT's VeRA, RandLoRA, TinyLoRA, Uni-LoRA and VB-LoRA: factors that are frozen, or made of shared values."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import TiedElements
from tnadapt.algebra.norms import rounded_to
from tnadapt.algebra.sources import Given, Scaled, Source, Tied, inner_source
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.algebra.torch_streams import TorchStream
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import DRAWN, OwnStructure, PeftContent, PeftMethod, rank_of, seed_of
from ._peft_settings import PathPatterns, integer_of, number_of
from ._updates import Float, Module, ModuleUpdate, Pair

__all__ = [
    "PeftRandLora",
    "PeftTinyLora",
    "PeftUniLora",
    "PeftVbLora",
    "PeftVera",
]


# -- VeRA: two frozen matrices, shared by all weights, and two trained diagonals per weight ----------------------------


_B, _D = "split0.factor0", "split0.factor1"


class PeftVera(PeftMethod):
    """``ΔW = diag(b) B diag(d) A``."""

    preset = "vera"
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
        given_arrays = {f"group0.{_B}": b_matrix, f"group0.{_D}": a.T}
        return OwnStructure(targets, Config(rank=rank, sources=sources), arrays, given_arrays, updates, notes=notes)

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
            isinstance(source, Scaled) and not inner_source(source).trained
            and inner_source(source).independent_of_group and (source.size, source.rank) == sides
            for source, sides in zip(sources, ((True, False), (False, True)), strict=True)
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
            arrays = {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}
            tensors[self.name_of(module, "vera_lambda_b")] = arrays[f"{_B}.size"] * group.network.scale
            tensors[self.name_of(module, "vera_lambda_d")] = arrays[f"{_D}.rank"]
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
    start = content.config.get("d_initial")
    usable = isinstance(start, (int, float)) and not isinstance(start, bool) and 0 < abs(start) <= 1
    return float(start) if usable else 0.1  # type: ignore[arg-type]


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

    preset = "randlora"
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
        arrays, given_arrays, updates = dict[str, Float](), dict[str, Float](), []
        scale = alpha / rank
        config, moved = plan.config(), 1.0
        try:
            config = config.replace(alpha=alpha)
        except ConfigError:
            moved = scale
        trained = list[str]()
        for number, weight in enumerate(weights):
            diagonals, frozen = plan.of(number)
            for name in diagonals:
                if name.endswith(f"{plan.short(weight)}.rank"):
                    diagonals[name] = diagonals[name] * moved
            trained += [name for name in diagonals if plan.short(weight) in name]
            arrays |= diagonals
            given_arrays |= frozen
            updates.append(plan.update(weight, scale))
        if plan.mixed:
            notes += ("weights with more rows than columns and others: each stores its own bases, with diagonals of "
                      "ones, which are not trained",)  # fmt: skip
        elif not plan.alike:
            notes += ("weights whose smaller sides differ: PEFT pairs the bases differently, and each stores its own",)
        return OwnStructure(
            [weight.target for weight in weights], config, arrays, given_arrays, updates,
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
            arrays = {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}
            tensors[self.name_of(module, "randlora_lambda")] = np.stack(
                [arrays[f"{name}.rank"] for name in short], axis=1
            )
            tensors[self.name_of(module, "randlora_gamma")] = np.stack([arrays[f"{name}.size"] for name in short])
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
        multipliers = {name: factor.multipliers for name, factor in group.multiplied.items()}
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
            short = max(min(weight.target.shape) for weight in weights)
            long = max(max(weight.target.shape) for weight in weights)
            if a.shape[:2] != (rank, 1) or a.shape[2] < short or b.shape[2] != rank or b.shape[0] < long:
                raise content.misfit(
                    weights[0].target.module,
                    f"randlora_A must be ({rank}, 1, {short}) and randlora_B ({long}, {-(-short // rank)}, {rank}), or "
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
        weight, trained, given_arrays = self.weights[number], dict[str, Float](), dict[str, Float]()
        least, most = min(weight.target.shape), max(weight.target.shape)
        short, long = self.short(weight), self.long(weight)
        largest_least, largest = (max(side(other.target.shape) for other in self.weights) for side in (min, max))
        for term in range(self.terms):
            prefix = f"group{number}." + f"term{term}." * (self.terms > 1)
            real = term < len(weight.gammas)
            trained[f"{prefix}{short}.size"] = weight.gammas[term] if real else np.zeros(least)
            trained[f"{prefix}{short}.rank"] = weight.lambdas[:, term] if real else np.zeros(self.rank)
            if self.mixed:
                trained |= {f"{prefix}{long}.size": np.ones(most), f"{prefix}{long}.rank": np.ones(self.rank)}
                given_arrays[f"{prefix}{short}"] = self.a[:, :least].T
            elif number == 0 and term == 0:
                given_arrays[f"{prefix}{short}"] = self.a[:, :largest_least].T
            if self.mixed or not self.alike:
                given_arrays[f"{prefix}{long}"] = self._long_factor(weight, term, most)
            elif number == 0:
                given_arrays[f"{prefix}{long}"] = self._long_factor(weight, term, largest)
        return trained, given_arrays

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
    normalized = rounded_to(single / rounded_to(deviation, "bfloat16"), "bfloat16") if half else single / deviation
    return np.asarray(normalized, np.float64)


# -- TinyLoRA: the r × r matrices of LoRA-XS combine fixed random ones with few trained numbers ------------------------

# PEFT's random matrices become the matrix of a given map before the network.


_TINYLORA_NOTE = (
    "the r × r matrix of each weight is stored as trained, as it has fewer elements than its v: {} trained numbers "
    "became {}"
)
_WIDE = "stored as LoRA of the same rank, as a config holds PEFT's factors and P in float32, and these are in float64"
_ORDER = (
    "give base={name: tuple(module.weight.shape) for name, module in model.named_modules() "
    "if hasattr(module, 'weight')}"
)


class PeftTinyLora(PeftMethod):
    """``ΔW = B (sum_i v_i P_i) A``, A and B from the singular vectors of the base weight."""

    preset = "tinylora"
    tensors = ("tinylora_A", "tinylora_B", "tinylora_P")
    shared = ("tinylora_v",)
    fields = (
        "r", "u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "tinylora_dropout",
        "init_weights",
    )  # fmt: skip
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read A, B and P as given, and all v together as θ."""
        content.require_modules()
        vectors = self._vectors(content)
        firsts = np.cumsum([0, *(v.size for v in vectors)])
        order = self._order(content, len(vectors))
        targets, parts, notes = [], list[tuple[Float, Float, Float]](), tuple[str, ...]()
        owners = list[int]()  # which v is that of each weight
        for path in content.modules:
            a, b = content.tensor(path, "tinylora_A", 2), content.tensor(path, "tinylora_B", 2)
            if len(a) != b.shape[1]:
                raise content.misfit(path, "tinylora_A must be (r, columns), and tinylora_B (rows, r)")
            place = order.get(path, 0)
            # PEFT's groups of layers: all of one size, and the rest in the last one.
            number = min(place // max(1, len(order) // len(vectors)), len(vectors) - 1)
            owners.append(number)
            p = np.zeros((firsts[-1], len(a), len(a)))
            p[firsts[number] : firsts[number + 1]] = self._projection(
                content, path, place, vectors[number].size, len(a)
            )
            targets.append(content.target(path, (len(b), a.shape[1])))
            parts.append((b, p, a))
        theta = np.concatenate(vectors)
        # P and θ are not rounded to the dtype of the stored v: PEFT multiplies them in that of the model.
        content.dtypes.add("float32")
        if "tinylora_P" not in next(iter(content.modules.values())):
            notes = (f"PEFT left P to a seed of torch's: {DRAWN}",)
        rank = max(p.shape[1] for _, p, _ in parts)
        matrices, given_arrays, updates = dict[str, Float](), dict[str, Float](), []
        for number, ((b, p, a), target) in enumerate(zip(parts, targets, strict=True)):
            # A Tucker factor has no more columns than rows.
            left, right = ((0, min(rank, side) - p.shape[1]) for side in target.shape)
            name = f"group{number}.split0"
            matrices[f"{name}.core"] = np.pad(p, ((0, 0), left, right))
            given_arrays |= {
                f"{name}.factor0": np.pad(b, ((0, 0), left)),
                f"{name}.factor1": np.pad(a, (right, (0, 0))).T,
            }
            updates.append(ModuleUpdate("lora", target.shape, (Pair(b @ np.einsum("i,ijk->jk", theta, p), a.T),)))
        if "float64" in content.dtypes:
            return OwnStructure(targets, updates=updates, notes=(_WIDE, *notes))
        config = Config(rank=rank, format="tucker", sources={"factor0": Given(), "factor1": Given()})
        if sorted(owners) == list(range(len(vectors))) and len({v.size for v in vectors}) == 1:
            # One θ of one size for each weight.
            size = vectors[0].size
            if all(size <= p[0].size for p in matrices.values()):
                config = config.replace(before="given", parameters=size, scope="group", offset=False)
                arrays = dict[str, Float]()
                for group, (owner, p) in enumerate(zip(owners, matrices.values(), strict=True)):
                    arrays[f"group{group}.theta"] = vectors[owner]
                    block = p[firsts[owner] : firsts[owner + 1]]
                    given_arrays[f"group{group}.theta.matrix"] = block.reshape(size, -1).T
                return OwnStructure(targets, config, arrays, given_arrays, updates, notes=notes)
        matrix = np.concatenate([p.reshape(theta.size, -1) for p in matrices.values()], axis=1).T
        if theta.size <= len(matrix):
            config = config.replace(before="given", parameters=theta.size, offset=False)
            return OwnStructure(
                targets, config, {"theta": theta}, {**given_arrays, "theta.matrix": matrix}, updates, notes=notes
            )
        cores = {name: np.einsum("i,ijk->jk", theta, p) for name, p in matrices.items()}
        notes = (_TINYLORA_NOTE.format(theta.size, sum(core.size for core in cores.values())), *notes)
        return OwnStructure(targets, config, cores, given_arrays, updates, notes=notes)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the factors, θ, and P as the map before the network has it."""
        theta, plan = file.plan.theta, file.plan.arrays_plan
        if theta is None or len(theta.parts) > 1 or set(file.config.sources) != {"factor0", "factor1"}:
            self.refuse("it needs one θ for all weights, and both factors frozen, as presets.tinylora has them")
        (part,) = theta.parts
        backend, like = load_backend("numpy"), np.zeros(1)
        vector = file.arrays[part.name].astype(np.float64)
        # P of unit vectors: a matrix for each element of θ.
        matrices = [theta.moved(backend, part, unit) for unit in np.eye(vector.size)]
        tensors: dict[str, Float] = {"base_model.tinylora_v.0": vector}
        for module in modules:
            group = plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
            own_names = list(group.names) == ["split0.core"] and len(group.pieces) == 1
            if not own_names or group.network.sizes != module.shape:
                self.refuse("it needs format='tucker', order=2 and one weight per group, as presets.tinylora has them")
            full, sides = group.names["split0.core"], group.network.shapes["split0.core"]
            start = plan.array_start(backend, full, like)
            if sides[0] != sides[1] or (file.config.offset and np.any(start)) or not group.projection.map.identity:
                self.refuse("PEFT's matrices between the factors are square and start at zero, and no map follows")
            b, a = (group.frozen.on(backend, (f"split0.factor{n}", file.dtype), like, "float64") for n in (0, 1))
            tensors[self.name_of(module, "tinylora_A")] = a.T
            tensors[self.name_of(module, "tinylora_B")] = b
            tensors[self.name_of(module, "tinylora_P")] = group.network.scale * np.stack(
                [arrays[full] for arrays in matrices]
            )
        settings = {"r": max(sides), "u": vector.size, "weight_tying": 1.0, "save_projection": True}
        return EncodedAdapter(tensors, config=settings)

    def _vectors(self, content: PeftContent) -> list[Float]:
        names = [f"tinylora_v.{number}" for number in range(len(content.shared))]
        if not names:
            raise FileError("lacks base_model.tinylora_v.0, which a TinyLoRA adapter needs")
        return [content.shared_tensor(name, 1) for name in names]

    def _order(self, content: PeftContent, vectors: int) -> dict[str, int]:
        """Return the place of each weight in the model: it says which v is the weight's, and seeds P."""
        stored = all("tinylora_P" in tensors for tensors in content.modules.values())
        if len(content.modules) == 1 or (vectors == 1 and stored):
            return dict.fromkeys(content.modules, 0)
        if content.base is None or not content.base.ordered:
            why = "which of its vectors v is a weight's" if stored else "the matrices P"
            raise FileError(
                f"the order of the modules in the model decides {why}, and the file does not have it: {_ORDER}"
            )
        for path in content.modules:
            content.base.check_module(path)
        return {
            path: place for place, path in enumerate(path for path in content.base.shapes if path in content.modules)
        }

    def _projection(self, content: PeftContent, path: str, place: int, count: int, rank: int) -> Float:
        """Return P, (u, r, r), stored or drawn as PEFT draws it."""
        if "tinylora_P" in content.modules[path] or content.config.get("save_projection", True):
            stored: Float = content.tensor(path, "tinylora_P", 3)
            if stored.shape != (count, rank, rank):
                raise content.misfit(path, f"tinylora_P must be ({count}, {rank}, {rank})")
            return stored
        size = count * rank * rank
        if size < 16:
            raise FileError(
                f"the {size} elements of P are too few to draw as torch does: save it with save_projection=True"
            )
        seed = seed_of("projection_seed", content.config.get("projection_seed"), 42) + place
        drawn = (TorchStream(seed).normals(size) / rank**0.5).astype(np.float32)
        return np.asarray(drawn.reshape(count, rank, rank), np.float64)


# -- Uni-LoRA: each number of all A and B is one of a few trained numbers, scaled --------------------------------------

# PEFT's indices become the index of tied elements before the network.


_TENSORS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
_UNILORA_NOTE = "stored as LoRA of the same rank, as {}: {} trained numbers became {}"
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

    preset = "unilora"
    tensors = _TENSORS
    shared = ("unilora_theta_d",)
    integers = _TENSORS[:2]
    fields = (
        "r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights", "save_indices",
    )  # fmt: skip
    may_transpose = True

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
        return OwnStructure(targets, updates=updates, notes=(_UNILORA_NOTE.format(why, theta.size, index.size),))

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
        scales, places, values = (
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
                if not np.allclose(random[index] * scale, values[full], rtol=1e-9, atol=1e-12):
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
        factors = {}
        for path in content.modules:
            a_index, b_index, a_scale, b_scale = (content.tensor(path, name, 2) for name in _TENSORS)
            if a_index.shape != a_scale.shape or b_index.shape != b_scale.shape or len(a_index) != b_index.shape[1]:
                raise content.misfit(path, "indices and scales must be (r, columns) for A and (rows, r) for B")
            for index in (a_index, b_index):
                if (index < 0).any() or (index >= theta.size).any():
                    raise content.misfit(path, f"an index is outside the {theta.size} elements of unilora_theta_d")
            factors[path] = _Factors(a_index, b_index, a_scale, b_scale)
        return factors

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
    return PathPatterns("target_modules", {re.escape(name): True for name in targets if isinstance(name, str)})


def _balanced(count: int, length: int, seed: int) -> NDArray[np.int64]:
    """Return PEFT's indices, each of which occurs equally often but for one."""
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if count % length:
        indices = np.concatenate([indices, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(indices)
    return indices


# -- VB-LoRA: parts of A and B mix a few vectors of a bank, which no config has: read as LoRA --------------------------


_VBLORA_NOTE = "stored as LoRA of the same rank, as no config has mixtures of the vectors of a bank"


class PeftVbLora(PeftMethod):
    """``ΔW = B A``, whose parts are means of the k vectors with the largest logits, weighted by their softmax."""

    title = "VB-LoRA"
    peft_type = "VBLORA"
    tensors = tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights"))
    shared = ("vblora_vector_bank",)
    integers = ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices")
    fields = (
        "r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout",
        "init_vector_bank_bound", "init_logits_std",
    )  # fmt: skip
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Compute A and B."""
        content.require_modules()
        bank = content.shared_tensor("vblora_vector_bank", 2)
        count = integer_of("topk", content.config.get("topk", 2))
        targets, updates = [], []
        for path in content.modules:
            a, b = (self._mixed(content, path, side, bank, count) for side in "AB")
            # A is (rank, parts, length), B (parts, rank, length).
            if len(a) != b.shape[1]:
                raise content.misfit(path, "A must have (r, parts) mixtures, and B (parts, r)")
            pair = Pair(b.transpose(0, 2, 1).reshape(-1, b.shape[1]), a.reshape(len(a), -1).T)
            targets.append(content.target(path, pair.shape))
            updates.append(ModuleUpdate("lora", pair.shape, (pair,)))
        return OwnStructure(targets, updates=updates, notes=(_VBLORA_NOTE,))

    @staticmethod
    def _mixed(content: PeftContent, path: str, side: str, bank: Float, count: int) -> Float:
        name = f"vblora_logits_{side}"
        if f"{name}_topk_indices" in content.modules[path]:
            index = content.tensor(path, f"{name}_topk_indices", 3)
            first = (
                content.tensor(path, f"{name}_topk_weights", 3)
                if index.shape[2] > 1
                else np.zeros((*index.shape[:2], 0))
            )
            if first.shape != (*index.shape[:2], index.shape[2] - 1) or (index < 0).any() or (index >= len(bank)).any():
                raise content.misfit(
                    path, f"{name}_topk_indices must name {len(bank)} vectors, with one weight less each"
                )
            weights = np.concatenate([first, 1.0 - first.sum(axis=2, keepdims=True)], axis=2)
        else:
            logits = content.tensor(path, name, 3)
            if logits.shape[2] != len(bank) or count > len(bank):
                raise content.misfit(
                    path, f"{name} must have a logit for each of the {len(bank)} vectors, topk of them"
                )
            order = np.argsort(-logits, axis=2, kind="stable")
            ranked = np.take_along_axis(logits, order, axis=2)
            if count < len(bank) and (ranked[:, :, count - 1] == ranked[:, :, count]).any():
                raise FileError(
                    f"{name} of {safe_repr(path)} has equal logits, of which topk={count} takes one and leaves the "
                    "other, as torch decides: save the adapter with save_only_topk_weights=True, or in float32"
                )
            index = order[:, :, :count]
            top = np.take_along_axis(logits, index, axis=2)
            weights = np.exp(top - top.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
        mixed: Float = np.einsum("abk,abkl->abl", weights, bank[index])
        return mixed
