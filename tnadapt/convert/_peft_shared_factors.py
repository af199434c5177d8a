"""PEFT's VeRA, RandLoRA, TinyLoRA, Uni-LoRA and VB-LoRA: factors that are frozen, or made of shared values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import TiedElements
from tnadapt.algebra.sources import Given, Scaled, Source, Tied
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.algebra.torch_streams import TorchStream, bfloat16_of
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import DRAWN, SHAPES_OF_MODEL, OwnStructure, PeftContent, PeftMethod, group_of
from ._peft_settings import PathPatterns, integer_of, number_of
from ._updates import Float, Module, ModuleUpdate, Pair

Ints = NDArray[np.int64]


# -- A and B of the whole adapter: stored, or drawn from a seed --------------------------------------------------------


class PeftProjections(PeftMethod):
    """Base class of methods with two frozen factors of the whole adapter, which PEFT stores or draws from a seed."""

    may_transpose = True

    def projections(self, content: PeftContent, axes: int) -> tuple[Float, Float] | None:
        """Return A and B if they are stored."""
        if not content.config.get("save_projection", True) and self.shared[0] not in content.shared:
            return None
        way_out = ": save it with save_projection=True, or set that to false in the config"
        a, b = (content.shared_tensor(name, axes, way_out) for name in self.shared)
        return a, b

    def stream(self, content: PeftContent) -> TorchStream:
        """Return the stream of random numbers from which PEFT draws A and B, in float32."""
        content.dtypes.add("float32")
        return TorchStream(content.seed("projection_prng_key", 0))


_DRAWN = (f"PEFT left A and B to a seed of torch's: {DRAWN}",)


def _frozen(file: AdapterFile, group: Group, name: str) -> Float:
    """Return an array of a group that is not trained."""
    array: Float = group.frozen.on(load_backend("numpy"), (name, file.dtype), np.zeros(1), "float64")
    return array


def _longer(one: Float | None, other: Float) -> Float:
    """Return the factor with more rows: the other one is its beginning."""
    return other if one is None or len(other) > len(one) else one


def _is_shared(group: Group, multipliers: Mapping[str, tuple[str, ...]], others: Sequence[str] = ()) -> bool:
    """Return whether factors are frozen and the same in all groups, and have these diagonals alone."""
    frozen = group.frozen.entries
    return {name: factor.multipliers for name, factor in group.multiplied.items()} == multipliers and all(
        name in frozen and frozen[name].source.independent_of_group for name in (*multipliers, *others)
    )


def _trained(file: AdapterFile, group: Group) -> dict[str, Float]:
    return {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}


# -- VeRA: two frozen matrices, shared by all weights, and two trained diagonals per weight ----------------------------


_B, _D = "split0.factor0", "split0.factor1"


class PeftVera(PeftProjections):
    """``ΔW = diag(b) B diag(d) A``."""

    preset = "vera"
    tensors = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    fields = ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the diagonals as trained, A and B as given."""
        rank, targets, diagonals = content.rank(256), [], list[tuple[Float, Float]]()
        for path in content.modules:
            b, d = (content.tensor(path, name, 1) for name in self.tensors)
            if d.size != rank:
                raise content.misfit(path, f"vera_lambda_d must have r = {rank} elements")
            why = f"it has {b.size} rows"
            targets.append(content.target_from_base(path, b.size, lambda rows, _, size: rows == size, why))
            diagonals.append((b, d))
        rows, cols = (max(target.shape[side] for target in targets) for side in (0, 1))
        stored = self.projections(content, 2)
        a, b_matrix = stored or _drawn_for_vera(self.stream(content), rank, rows, cols)
        if a.shape[0] != rank or b_matrix.shape[1] != rank or a.shape[1] < cols or b_matrix.shape[0] < rows:
            raise content.misfit(
                targets[0].module,
                f"vera_A must be ({rank}, {cols}) and vera_B ({rows}, {rank}), or larger; they are {a.shape} and "
                f"{b_matrix.shape}",
            )
        a, b_matrix = a[:, :cols], b_matrix[:rows]
        arrays, updates = dict[str, Float](), []
        for number, (target, (b, d)) in enumerate(zip(targets, diagonals, strict=True)):
            arrays |= {f"group{number}.{_B}.size": b, f"group{number}.{_D}.rank": d}
            pair = Pair(b[:, None] * b_matrix[: target.shape[0]], a[:, : target.shape[1]].T * d)
            updates.append(ModuleUpdate("lora", target.shape, (pair,)))
        start = content.config.get("d_initial")
        if not isinstance(start, (int, float)) or isinstance(start, bool) or not 0 < abs(start) <= 1:
            start = 0.1
        sources: dict[str, Source] = {
            "factor0": Scaled(Given(shared=True), start=0.0),
            "factor1": Scaled(Given(shared=True), size=False, rank=True, start=float(start)),
        }
        config, given_arrays = Config(rank=rank, sources=sources), {f"group0.{_B}": b_matrix, f"group0.{_D}": a.T}
        return OwnStructure(targets, config, arrays, given_arrays, updates, notes=() if stored else _DRAWN)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the diagonals, and the leading matrices of which each weight has a part."""
        config = file.config
        self.require_one_weight_per_group(file)
        fit = (config.order, config.splits, config.terms, config.format, config.projection, config.fold)
        diagonals = {_B: ("size",), _D: ("rank",)}
        groups = file.plan.groups
        if fit != (2, 1, 1, "cp", "identity", "stack") or not all(_is_shared(group, diagonals) for group in groups):
            self.refuse(
                "it needs order=2, format='cp', and both factors frozen, shared by all weights and Scaled: factor0 by "
                "size, factor1 by rank, as presets.vera has them"
            )
        tensors, whole = dict[str, Float](), dict[str, Float]()
        for module in modules:
            group = group_of(file.plan, module)
            arrays = _trained(file, group)
            tensors[self.name_of(module, "vera_lambda_b")] = arrays[f"{_B}.size"] * group.network.scale
            tensors[self.name_of(module, "vera_lambda_d")] = arrays[f"{_D}.rank"]
            whole |= {name: _longer(whole.get(name), _frozen(file, group, name)) for name in (_B, _D)}
        tensors |= {"base_model.vera_A": whole[_D].T, "base_model.vera_B": whole[_B]}
        return EncodedAdapter(tensors, config={"r": config.rank, "projection_prng_key": 0, "save_projection": True})


def _drawn_for_vera(stream: TorchStream, rank: int, rows: int, cols: int) -> tuple[Float, Float]:
    """Return uniform numbers of variance ``2 / fan_in``."""
    bounds = (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in)) for fan_in in (cols, rank))
    a, b = (
        stream.uniforms(shape, -bound, bound).astype(np.float64)
        for shape, bound in zip(((rank, cols), (rows, rank)), bounds, strict=True)
    )
    return a, b


# -- RandLoRA: products of frozen matrices with trained diagonals, whose sum has full rank -----------------------------

# PEFT flattens its two stacks of N matrices in different orders, so that it pairs column ``k = r N + n`` of the bases B
# with row r of A, and not the columns of base n (``test_fault_randlora_pairs_columns_of_different_bases``). As N
# differs with the smaller side of a weight, so does the pairing, and weights share B only if N is the same.


_STRUCTURE = (
    "it needs ⌈smaller side / rank⌉ terms for every weight, with frozen factors that all weights share; those on the "
    "smaller side tied to one, with both diagonals, as presets.randlora has them"
)


class _Weight(NamedTuple):
    """One weight: λ (rank, N) and γ (N, smaller side), the diagonals of each of its N bases."""

    target: Target
    lambdas: Float
    gammas: Float

    @property
    def sides(self) -> tuple[int, int]:
        """The smaller and the larger side."""
        return min(self.target.shape), max(self.target.shape)

    @property
    def tall(self) -> bool:
        """Whether A is on the side of the columns."""
        return self.target.shape[1] <= self.target.shape[0]


def _factor_names(tall: bool) -> tuple[str, str]:
    """Return the names of the factors on the smaller and on the larger side."""
    return ("factor1", "factor0") if tall else ("factor0", "factor1")


class PeftRandLora(PeftProjections):
    """``ΔW = (alpha / r) sum_n B_n diag(λ_n) A diag(γ_n)``, transposed if there are more columns than rows."""

    preset = "randlora"
    tensors = ("randlora_lambda", "randlora_gamma")
    shared = ("randlora_A", "randlora_B")
    copies = shared
    fields = (
        "r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
        "init_weights",
    )  # fmt: skip

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the diagonals as trained, A and B as given."""
        rank = content.rank(32)
        weights = [self._weight(content, path, rank) for path in content.modules]
        stored = self.projections(content, 3)
        if stored:
            _check_bases(content, rank, weights, *stored)
        a, b = stored or _drawn_for_randlora(content.config, self.stream(content), rank, weights)
        plan = _Plan(weights, rank, a[:, 0], b)
        alpha = number_of("randlora_alpha", content.config.get("randlora_alpha", 640))
        scale = alpha / rank
        # A scale that cannot be alpha is multiplied into λ.
        is_alpha = MIN_ALPHA <= alpha <= MAX_ALPHA
        arrays, given_arrays, trained = dict[str, Float](), dict[str, Float](), list[str]()
        for number in range(len(weights)):
            names, ones, frozen = plan.arrays_of(number, 1.0 if is_alpha else scale)
            arrays |= names | ones
            given_arrays |= frozen
            trained += names
        updates = [plan.update(weight, scale) for weight in weights]
        notes: tuple[str, ...] = () if stored else _DRAWN
        if plan.mixed:
            notes += ("weights with more rows than columns and others: each stores its own bases, with diagonals of "
                      "ones, which are not trained",)  # fmt: skip
        elif not plan.alike:
            notes += ("weights whose smaller sides differ: PEFT pairs the bases differently, and each stores its own",)
        return OwnStructure(
            [weight.target for weight in weights], plan.config(alpha if is_alpha else None), arrays, given_arrays,
            updates, trained if plan.mixed else None, notes,
        )  # fmt: skip

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the diagonals, A, and the bases in the order in which PEFT pairs them."""
        self.require_one_weight_per_group(file)
        config, rank = file.config, file.config.rank
        fit = (config.order, config.splits, config.format, config.projection, config.fold)
        if fit != (2, 1, "cp", "identity", "stack") or not isinstance(rank, int):
            self.refuse(_STRUCTURE)
        tensors, whole = dict[str, Float](), dict[str, Float]()
        tall = modules[0].shape[1] <= modules[0].shape[0]
        prefixes = [prefix for (prefix,) in file.plan.groups[0].network.prefixes]
        short, long = ([prefix + name for prefix in prefixes] for name in _factor_names(tall))
        for module in modules:
            if tall != (module.shape[1] <= module.shape[0]):
                self.refuse(
                    "some weights have more rows than columns and others have not, and A would be on both sides"
                )
            group = group_of(file.plan, module)
            shared = _is_shared(group, dict.fromkeys(short, ("size", "rank")), long)
            tied = shared and len({group.frozen.entries[name].full for name in short}) == 1
            if not tied or len(short) != -(-min(module.shape) // rank):
                self.refuse(_STRUCTURE)
            arrays = _trained(file, group)
            lambdas = np.stack([arrays[f"{name}.rank"] for name in short], axis=1)
            tensors[self.name_of(module, "randlora_lambda")] = lambdas
            tensors[self.name_of(module, "randlora_gamma")] = np.stack([arrays[f"{name}.size"] for name in short])
            whole |= {name: _longer(whole.get(name), _frozen(file, group, name)) for name in (short[0], *long)}
        # Column k = r N + n of PEFT's bases, flattened, is column r of base n.
        bases = np.stack([whole[name] for name in long], axis=2)
        tensors["base_model.randlora_A"] = whole[short[0]].T[:, None]
        tensors["base_model.randlora_B"] = bases.reshape(len(bases), config.terms, rank)
        alpha = rank if config.alpha is None else config.alpha
        return EncodedAdapter(tensors, config={"r": rank, "randlora_alpha": alpha, "save_projection": True})

    def _weight(self, content: PeftContent, path: str, rank: int) -> _Weight:
        lambdas, gammas = (content.tensor(path, name, 2) for name in self.tensors)
        count, least = gammas.shape
        if lambdas.shape != (rank, count) or count != -(-least // rank):
            raise content.misfit(
                path, f"with r = {rank}, randlora_lambda must be (r, N) and randlora_gamma (N, side), N = ⌈side / r⌉"
            )
        why = f"its smaller side is {least}"
        target = content.target_from_base(path, least, lambda rows, cols, size: min(rows, cols) == size, why)
        return _Weight(target, lambdas, gammas)


def _check_bases(content: PeftContent, rank: int, weights: Sequence[_Weight], a: Float, b: Float) -> None:
    """Raise FileError unless A is (rank, 1, least) or larger, and B (most, N, rank) or larger."""
    short, long = (max(weight.sides[place] for weight in weights) for place in (0, 1))
    path = weights[0].target.module
    if a.shape[:2] != (rank, 1) or a.shape[2] < short or b.shape[2] != rank or b.shape[0] < long:
        raise content.misfit(
            path,
            f"randlora_A must be ({rank}, 1, {short}) and randlora_B ({long}, {-(-short // rank)}, {rank}), or "
            f"larger; they are {a.shape} and {b.shape}",
        )
    if b.shape[1] < max(len(weight.gammas) for weight in weights):
        raise content.misfit(path, f"randlora_B has {b.shape[1]} bases, and that is too few")


def _drawn_for_randlora(
    config: Mapping[str, object], stream: TorchStream, rank: int, weights: Sequence[_Weight]
) -> tuple[Float, Float]:
    """Return A (rank, 1, least) and B (most, N, rank) as PEFT draws them."""
    least, most = sorted(max(weight.target.shape[side] for weight in weights) for side in (0, 1))
    count = -(-least // rank)
    if config.get("very_sparse") or config.get("sparse"):
        sparsity = math.sqrt(least) if config.get("very_sparse") else 3.0
        a, b = (_sparse(stream, shape, sparsity) for shape in ((rank, 1, least), (most, count, rank)))
        return a, b
    first = _kaiming(stream, (rank, 1, least))
    bases = np.concatenate([_kaiming(stream, (most, 1, rank)) for _ in range(count)], axis=1)
    return _normalized(first, half=True), _normalized(bases, half=True)


class _Plan:
    """The config of all weights, and their arrays."""

    def __init__(self, weights: Sequence[_Weight], rank: int, a: Float, b: Float) -> None:
        self.weights, self.rank, self.a, self.b = weights, rank, a, b
        counts = {len(weight.gammas) for weight in weights}
        self.terms, self.alike = max(counts), len(counts) == 1
        self.mixed = len({weight.tall for weight in weights}) > 1
        self.least, self.most = (max(weight.sides[place] for weight in weights) for place in (0, 1))

    def config(self, alpha: float | None) -> Config:
        """Return the settings."""
        sources: dict[str, Source]
        if self.mixed:
            sources = dict.fromkeys(("factor0", "factor1"), Scaled(Given(), size=True, rank=True))
        else:
            short, long = _factor_names(self.weights[0].tall)
            start = (1.0 / self.most, 0.0)
            first = f"term0.split0.{short}" if self.terms > 1 else f"split0.{short}"
            sources = {
                long: Given(shared=self.alike),
                first: Scaled(Given(shared=True), size=True, rank=True, start=start),
            }
            if self.terms > 1:
                sources[short] = Scaled(Tied(first), size=True, rank=True, start=start)
        return Config(rank=self.rank, terms=self.terms, sources=sources, alpha=alpha)

    def _bases(self, weight: _Weight, size: int) -> Float:
        """Return the beginning of a weight's bases, whose columns are flattened as PEFT flattens them."""
        return self.b[:size, : len(weight.gammas)].reshape(size, -1)

    def arrays_of(self, number: int, scale: float) -> tuple[dict[str, Float], dict[str, Float], dict[str, Float]]:
        """Return the diagonals of a weight, λ times a scale; those of ones; and its given arrays."""
        weight, diagonals, ones, given_arrays = self.weights[number], dict[str, Float](), dict[str, Float](), {}
        (least, most), (short, long), count = weight.sides, _factor_names(weight.tall), len(weight.gammas)
        for term in range(self.terms):
            prefix = f"group{number}." + f"term{term}." * (self.terms > 1) + "split0."
            real = term < count
            diagonals[f"{prefix}{short}.size"] = weight.gammas[term] if real else np.zeros(least)
            diagonals[f"{prefix}{short}.rank"] = weight.lambdas[:, term] * scale if real else np.zeros(self.rank)
            if self.mixed:
                ones |= {f"{prefix}{long}.size": np.ones(most), f"{prefix}{long}.rank": np.ones(self.rank)}
                given_arrays[f"{prefix}{short}"] = self.a[:, :least].T
            elif number == 0 and term == 0:
                given_arrays[f"{prefix}{short}"] = self.a[:, : self.least].T
            # Bases that all weights share are as long as the longest one.
            shared = self.alike and not self.mixed
            if number == 0 or not shared:
                bases = self._bases(weight, self.most if shared else most)
                given_arrays[f"{prefix}{long}"] = bases[:, term % count :: count]
        return diagonals, ones, given_arrays

    def update(self, weight: _Weight, scale: float) -> ModuleUpdate:
        """Return the update, as PEFT multiplies it out."""
        least, most = weight.sides
        scaled = weight.lambdas[:, :, None] * self.a[:, None, :least] * weight.gammas[None]
        narrow, wide = scaled.reshape(-1, least).T, self._bases(weight, most)
        pair = Pair(wide, narrow) if weight.tall else Pair(narrow, wide)
        return ModuleUpdate("lora", weight.target.shape, (pair,), scale)


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
    normalized = bfloat16_of(single / bfloat16_of(deviation)) if half else single / deviation
    return np.asarray(normalized, np.float64)


# -- TinyLoRA: the r × r matrices of LoRA-XS combine fixed random ones with few trained numbers ------------------------

# PEFT's random matrices become the matrix of a given map before the network.


_TINYLORA_NOTE = (
    "the r × r matrix of each weight is stored as trained, as it has fewer elements than its v: {} trained numbers "
    "became {}"
)
_WIDE = "stored as LoRA of the same rank, as a config holds PEFT's factors and P in float32, and these are in float64"


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
        vectors = [content.shared_tensor(f"tinylora_v.{number}", 1) for number in range(max(1, len(content.shared)))]
        theta, firsts = np.concatenate(vectors), np.cumsum([0, *(v.size for v in vectors)])
        order = self._order(content, len(vectors))
        targets, parts = [], list[tuple[Float, Float, Float]]()
        owners = list[int]()  # which v is that of each weight
        for path in content.modules:
            a, b = content.tensor(path, "tinylora_A", 2), content.tensor(path, "tinylora_B", 2)
            if len(a) != b.shape[1]:
                raise content.misfit(path, "tinylora_A must be (r, columns), and tinylora_B (rows, r)")
            # PEFT's groups of layers: all of one size, and the rest in the last one.
            owner = min(order[path] // max(1, len(order) // len(vectors)), len(vectors) - 1)
            p = np.zeros((theta.size, len(a), len(a)))
            block = p[firsts[owner] : firsts[owner + 1]]
            block[:] = self._projection(content, path, order[path], len(block), len(a))
            owners.append(owner)
            targets.append(content.target(path, (len(b), a.shape[1])))
            parts.append((b, p, a))
        # P and θ are not rounded to the dtype of the stored v: PEFT multiplies them in that of the model.
        content.dtypes.add("float32")
        drawn = "tinylora_P" not in next(iter(content.modules.values()))
        notes = (f"PEFT left P to a seed of torch's: {DRAWN}",) if drawn else ()
        rank = max(p.shape[1] for _, p, _ in parts)
        matrices, given_arrays, updates = dict[str, Float](), dict[str, Float](), []
        for number, ((b, p, a), target) in enumerate(zip(parts, targets, strict=True)):
            # A Tucker factor has no more columns than rows.
            left, right = ((0, min(rank, side) - p.shape[1]) for side in target.shape)
            name = f"group{number}.split0"
            matrices[f"{name}.core"] = np.pad(p, ((0, 0), left, right))
            given_arrays[f"{name}.factor0"] = np.pad(b, ((0, 0), left))
            given_arrays[f"{name}.factor1"] = np.pad(a, (right, (0, 0))).T
            updates.append(ModuleUpdate("lora", target.shape, (Pair(b @ np.einsum("i,ijk->jk", theta, p), a.T),)))
        if "float64" in content.dtypes:
            return OwnStructure(targets, updates=updates, notes=(_WIDE, *notes))
        config = Config(rank=rank, format="tucker", sources={"factor0": Given(), "factor1": Given()})
        size, elements = theta.size, sum(p[0].size for p in matrices.values())
        one_each = sorted(owners) == list(range(len(vectors))) and len({v.size for v in vectors}) == 1
        if one_each and all(vectors[0].size <= p[0].size for p in matrices.values()):
            size = vectors[0].size
            config = config.replace(before="given", parameters=size, scope="group", offset=False)
            arrays = {f"group{group}.theta": vectors[owner] for group, owner in enumerate(owners)}
            for group, (owner, p) in enumerate(zip(owners, matrices.values(), strict=True)):
                block = p[firsts[owner] : firsts[owner + 1]]
                given_arrays[f"group{group}.theta.matrix"] = block.reshape(size, -1).T
        elif size <= elements:
            config = config.replace(before="given", parameters=size, offset=False)
            arrays = {"theta": theta}
            given_arrays["theta.matrix"] = np.concatenate([p.reshape(size, -1) for p in matrices.values()], axis=1).T
        else:
            arrays = {name: np.einsum("i,ijk->jk", theta, p) for name, p in matrices.items()}
            notes = (_TINYLORA_NOTE.format(size, elements), *notes)
        return OwnStructure(targets, config, arrays, given_arrays, updates, notes=notes)

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
            group = group_of(plan, module)
            alone = list(group.names) == ["split0.core"] and len(group.pieces) == 1
            if not alone or group.network.sizes != module.shape:
                self.refuse("it needs format='tucker', order=2 and one weight per group, as presets.tinylora has them")
            full, sides = group.names["split0.core"], group.network.shapes["split0.core"]
            start = plan.array_start(backend, full, like)
            if sides[0] != sides[1] or (file.config.offset and np.any(start)) or not group.projection.map.identity:
                self.refuse("PEFT's matrices between the factors are square and start at zero, and no map follows")
            p = np.stack([arrays[full] for arrays in matrices])
            tensors[self.name_of(module, "tinylora_A")] = _frozen(file, group, "split0.factor1").T
            tensors[self.name_of(module, "tinylora_B")] = _frozen(file, group, "split0.factor0")
            tensors[self.name_of(module, "tinylora_P")] = group.network.scale * p
        settings = {"r": max(sides), "u": vector.size, "weight_tying": 1.0, "save_projection": True}
        return EncodedAdapter(tensors, config=settings)

    def _order(self, content: PeftContent, vectors: int) -> dict[str, int]:
        """Return the place of each weight in the model: it says which v is the weight's, and seeds P."""
        stored = all("tinylora_P" in tensors for tensors in content.modules.values())
        if len(content.modules) == 1 or (vectors == 1 and stored):
            return dict.fromkeys(content.modules, 0)
        if content.base is None or not content.base.ordered:
            why = "which of its vectors v is a weight's" if stored else "the matrices P"
            raise FileError(
                f"the order of the modules in the model decides {why}, and the file does not have it: give "
                f"base={SHAPES_OF_MODEL}"
            )
        for path in content.modules:
            content.base.check_module(path)
        paths = [path for path in content.base.shapes if path in content.modules]
        return {path: place for place, path in enumerate(paths)}

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
        seed = content.seed("projection_seed", 42) + place
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


# B (rows, r) and A transposed (columns, r) of a weight: the index of each element, and its scale.
_Factors = tuple[tuple[Ints, Ints], tuple[Float, Float]]


class PeftUniLora(PeftMethod):
    """``ΔW = B A``, where each element of A and B is an element of θ, divided by the root of how often that is used."""

    preset = "unilora"
    tensors = _TENSORS
    shared = ("unilora_theta_d",)
    integers = _TENSORS[:2]
    names_modules = False
    fields = (
        "r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights", "save_indices",
    )  # fmt: skip
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the indices as given, and the trained numbers as θ."""
        theta, rank = content.shared_tensor("unilora_theta_d", 1), content.rank(4)
        factors = self._stored(content, theta) if content.modules else self._drawn(content, theta, rank)
        targets, updates, indices, scales = [], [], list[Ints](), list[Float]()
        for path in sorted(factors, key=natural):
            (b_index, a_index), (b_scale, a_scale) = factors[path]
            pair = Pair(theta[b_index] * b_scale, theta[a_index] * a_scale)
            if pair.rank != rank:
                raise content.misfit(path, f"unilora_indices_A must be (r, columns), r = {rank}")
            targets.append(content.target(path, pair.shape))
            updates.append(ModuleUpdate("lora", pair.shape, (pair,)))
            indices += [b_index.reshape(-1), a_index.reshape(-1)]
            scales += [b_scale.reshape(-1), a_scale.reshape(-1)]
        index, scale = np.concatenate(indices), np.concatenate(scales)
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
        tensors, integers = {"base_model.unilora_theta_d": scaled}, dict[str, Ints]()
        for module in modules:
            for letter, name in (("A", "split0.factor1"), ("B", "split0.factor0")):
                full = group_of(plan, module).names[name]
                scale = np.asarray(scales[full])
                nonzero = np.where(scale == 0.0, 1.0, scale)
                index = np.clip(np.rint(places[full] / nonzero).astype(np.int64) - 1, 0, vector.size - 1)
                same = np.allclose(random[index] * scale, values[full], rtol=1e-9, atol=1e-12)
                if not same or np.any(scale == 0.0):
                    self.refuse(
                        f"before={safe_repr(file.config.before)} adds several elements of θ up, and PEFT has one for "
                        "each element of the factors, as 'one-hot' and 'tied' have"
                    )
                tensors[self.name_of(module, f"unilora_scales_{letter}")] = scale.T if letter == "A" else scale
                integers[self.name_of(module, f"unilora_indices_{letter}")] = index.T if letter == "A" else index
        settings = {"r": file.config.rank, "theta_d_length": vector.size, "save_indices": True}
        return EncodedAdapter(tensors, config=settings, integers=integers)

    def _stored(self, content: PeftContent, theta: Float) -> dict[str, _Factors]:
        factors = {}
        for path in content.modules:
            a_index, b_index, a_scale, b_scale = (content.tensor(path, name, 2) for name in _TENSORS)
            if a_index.shape != a_scale.shape or b_index.shape != b_scale.shape or len(a_index) != b_index.shape[1]:
                raise content.misfit(path, "indices and scales must be (r, columns) for A and (rows, r) for B")
            for index in (a_index, b_index):
                if (index < 0).any() or (index >= theta.size).any():
                    raise content.misfit(path, f"an index is outside the {theta.size} elements of unilora_theta_d")
            factors[path] = (b_index, a_index.T), (b_scale, a_scale.T)
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
        edges, factors = np.cumsum(sizes)[:-1], {}
        halves = zip(np.split(index, edges), np.split(scale, edges), strict=True)
        for path, (rows, cols) in shapes.items():
            (a_index, a_scale), (b_index, b_scale) = next(halves), next(halves)
            indices = b_index.reshape(rows, rank), a_index.reshape(rank, cols).T
            factors[path] = indices, (b_scale.reshape(rows, rank), a_scale.reshape(rank, cols).T)
        return factors

    def _targeted(self, content: PeftContent) -> Mapping[str, tuple[int, int]]:
        """Return rows and columns of the adapted weights, in the model's order."""
        config, base = content.config, content.base
        if base is None or not base.ordered or None in base.shapes.values():
            raise FileError(
                "it stores neither its indices nor the names of its weights, and PEFT draws the indices in the order "
                f"of the model's modules: {_SAVE}, or give base={SHAPES_OF_MODEL}"
            )
        unclear = [name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if config.get(name)]
        targets = config.get("target_modules")
        if unclear or not targets or not isinstance(targets, (str, list)) or targets == "all-linear":
            what = f"{unclear[0]} is set" if unclear else f"target_modules is {safe_repr(targets)}"
            raise FileError(f"it stores neither its indices nor the names of its weights, and {what}: {_SAVE}")
        # A string is an expression for whole paths, a list has the ends of paths.
        names = [targets] if isinstance(targets, str) else [re.escape(end) for end in targets if isinstance(end, str)]
        chosen, patterns = {}, PathPatterns("target_modules", dict.fromkeys(names, True), isinstance(targets, str))
        for path, stored in base.shapes.items():
            assert stored is not None
            if len(stored) == 2 and patterns.get(path, False):
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


def _balanced(count: int, length: int, seed: int) -> Ints:
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
