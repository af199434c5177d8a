"""PEFT's VeRA, RandLoRA, TinyLoRA, Uni-LoRA and VB-LoRA: factors that are frozen, or made of shared values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import TiedElements
from tnadapt.algebra.sources import Given, Scaled, Source, Tied
from tnadapt.algebra.torch_streams import TorchStream
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import SHAPES_OF_MODEL, OwnStructure, PeftContent, PeftMethod, dense_updates, group_of
from ._peft_settings import integer_of, number_of
from ._updates import Float, Module, ModuleUpdate, Pair

Ints = NDArray[np.int64]


# -- Factors of the whole adapter, and frozen arrays -------------------------------------------------------------------


def _projections(content: PeftContent, axes: int) -> tuple[Float, Float]:
    """Return A and B, the two frozen factors of the whole adapter."""
    way_out = ": save it with save_projection=True, or, of VeRA, set that to false in the config"
    a, b = (content.shared_tensor(name, axes, way_out) for name in content.method.shared)
    return a, b


_DRAWN = (
    "PEFT left A and B to a seed of torch's: regenerated as torch draws on a CPU, which PEFT does not promise for "
    "every system, and stored here",
)


def _frozen(file: AdapterFile, group: Group, name: str) -> Float:
    """Return an array of a group that is not trained."""
    array: Float = group.frozen.on(load_backend("numpy"), (name, file.dtype), np.zeros(1), "float64")
    return array


def _longer(one: Float | None, other: Float) -> Float:
    """Return the factor with more rows, which begins with the rows of the other."""
    return other if one is None or len(other) > len(one) else one


def _is_shared(group: Group, multipliers: Mapping[str, tuple[str, ...]], others: Sequence[str] = ()) -> bool:
    """Return whether factors are frozen, the same in all groups, and multiplied by these diagonals alone."""
    frozen = group.frozen.entries
    return {name: factor.multipliers for name, factor in group.multiplied.items()} == multipliers and all(
        name in frozen and frozen[name].source.independent_of_group for name in (*multipliers, *others)
    )


def _trained(file: AdapterFile, group: Group) -> dict[str, Float]:
    return {name: file.arrays[full].astype(np.float64) for name, full in group.names.items()}


# -- VeRA: two frozen matrices, shared by all weights, and two trained diagonals per weight ----------------------------


_B, _D = "split0.factor0", "split0.factor1"


class PeftVera(PeftMethod):
    """``ΔW = diag(b) B diag(d) A``."""

    preset = "vera"
    tensors = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    may_transpose = True
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
        is_stored = content.config.get("save_projection", True) or bool(content.shared)
        a, b_matrix = _projections(content, 2) if is_stored else _drawn_for_vera(content, rank, rows, cols)
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
        return OwnStructure(targets, config, arrays, given_arrays, updates, notes=() if is_stored else _DRAWN)

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


def _drawn_for_vera(content: PeftContent, rank: int, rows: int, cols: int) -> tuple[Float, Float]:
    """Return A and B as PEFT draws them in float32: uniform numbers of variance ``2 / fan_in``."""
    content.dtypes.add("float32")
    stream = TorchStream(content.seed("projection_prng_key", 0))
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
_UNLIKE = "PEFT pairs the bases differently for weights that differ in the smaller side, or in which side that is"


class _Weight(NamedTuple):
    """One weight: λ (rank, N) and γ (N, smaller side), the diagonals of each of its N bases."""

    target: Target
    lambdas: Float
    gammas: Float

    @property
    def sides(self) -> tuple[int, int]:
        """The smaller and the larger side."""
        return min(self.target.shape), max(self.target.shape)


def _is_tall(shape: tuple[int, int]) -> bool:
    """Return whether A is on the side of the columns, as for tall weights."""
    return shape[1] <= shape[0]


def _factor_names(terms: int, tall: bool) -> tuple[list[str], list[str]]:
    """Return the names of the factors on the smaller and on the larger side in a group, one for each term."""
    prefixes = [f"term{term}.split0." for term in range(terms)] if terms > 1 else ["split0."]
    short, long = ("factor1", "factor0") if tall else ("factor0", "factor1")
    return [prefix + short for prefix in prefixes], [prefix + long for prefix in prefixes]


class PeftRandLora(PeftMethod):
    """``ΔW = (alpha / r) sum_n B_n diag(λ_n) A diag(γ_n)``, transposed if there are more columns than rows."""

    preset = "randlora"
    tensors = ("randlora_lambda", "randlora_gamma")
    shared = copies = ("randlora_A", "randlora_B")
    may_transpose = True
    fields = (
        "r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
        "init_weights",
    )  # fmt: skip

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the diagonals as trained, A and B as given; the updates alone if the weights pair them differently."""
        rank = content.rank(32)
        weights = [self._weight(content, path, rank) for path in content.modules]
        a, b = _projections(content, 3)
        _check_bases(content, rank, weights, a, b)
        alpha = number_of("randlora_alpha", content.config.get("randlora_alpha", 640))
        targets = [weight.target for weight in weights]
        updates = [_multiplied_out(weight, a[:, 0], b, alpha / rank) for weight in weights]
        if len({(len(weight.gammas), _is_tall(weight.target.shape)) for weight in weights}) > 1:
            return dense_updates(targets, [update.delta() for update in updates], _UNLIKE)
        terms, tall = len(weights[0].gammas), _is_tall(targets[0].shape)
        least, most = (max(weight.sides[place] for weight in weights) for place in (0, 1))
        short, long = _factor_names(terms, tall)
        bases = b[:most, :terms].reshape(most, -1)
        given_arrays = {f"group0.{short[0]}": a[:, 0, :least].T}
        given_arrays |= {f"group0.{name}": bases[:, term::terms] for term, name in enumerate(long)}
        # A scale that cannot be alpha is multiplied into λ.
        is_alpha = MIN_ALPHA <= alpha <= MAX_ALPHA
        factor, arrays = 1.0 if is_alpha else alpha / rank, dict[str, Float]()
        for number, weight in enumerate(weights):
            for term, name in enumerate(short):
                arrays[f"group{number}.{name}.size"] = weight.gammas[term]
                arrays[f"group{number}.{name}.rank"] = weight.lambdas[:, term] * factor
        start = (1.0 / most, 0.0)
        sources: dict[str, Source] = {
            long[0].rpartition(".")[2]: Given(shared=True),
            short[0]: Scaled(Given(shared=True), size=True, rank=True, start=start),
        }
        if terms > 1:
            sources[short[0].rpartition(".")[2]] = Scaled(Tied(short[0]), size=True, rank=True, start=start)
        config = Config(rank=rank, terms=terms, sources=sources, alpha=alpha if is_alpha else None)
        return OwnStructure(targets, config, arrays, given_arrays, updates)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the diagonals, A, and the bases in the order in which PEFT pairs them."""
        self.require_one_weight_per_group(file)
        config, rank = file.config, file.config.rank
        fit = (config.order, config.splits, config.format, config.projection, config.fold)
        if fit != (2, 1, "cp", "identity", "stack") or not isinstance(rank, int):
            self.refuse(_STRUCTURE)
        tensors, whole = dict[str, Float](), dict[str, Float]()
        tall = _is_tall(modules[0].shape)
        short, long = _factor_names(config.terms, tall)
        for module in modules:
            if tall != _is_tall(module.shape):
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


def _multiplied_out(weight: _Weight, a: Float, b: Float, scale: float) -> ModuleUpdate:
    """Return the update as PEFT computes it, with the columns of the bases in PEFT's flattened order."""
    least, most = weight.sides
    scaled = weight.lambdas[:, :, None] * a[:, None, :least] * weight.gammas[None]
    narrow, wide = scaled.reshape(-1, least).T, b[:most, : len(weight.gammas)].reshape(most, -1)
    pair = Pair(wide, narrow) if _is_tall(weight.target.shape) else Pair(narrow, wide)
    return ModuleUpdate("lora", weight.target.shape, (pair,), scale)


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


# -- TinyLoRA: the r × r matrices of LoRA-XS combine fixed random ones with few trained numbers ------------------------

# PEFT's random matrices become the matrix of a given map before the network.


_TINYLORA_NOTE = (
    "stored as LoRA of the same rank, as a config holds PEFT's factors and P in float32, and no more trained numbers "
    "than the r × r matrices have elements"
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
        vectors = [content.shared_tensor(f"tinylora_v.{number}", 1) for number in range(max(1, len(content.shared)))]
        theta, firsts = np.concatenate(vectors), np.cumsum([0, *(v.size for v in vectors)])
        order = self._order(content, len(vectors))
        targets, parts = [], list[tuple[Float, Float, Float]]()
        owners = list[int]()  # the v of each weight
        for path in content.modules:
            a, b = content.tensor(path, "tinylora_A", 2), content.tensor(path, "tinylora_B", 2)
            if len(a) != b.shape[1]:
                raise content.misfit(path, "tinylora_A must be (r, columns), and tinylora_B (rows, r)")
            # PEFT's groups of layers: all of one size, and the rest in the last one.
            owner = min(order[path] // max(1, len(order) // len(vectors)), len(vectors) - 1)
            p = np.zeros((theta.size, len(a), len(a)))
            stored, block = content.tensor(path, "tinylora_P", 3), p[firsts[owner] : firsts[owner + 1]]
            if stored.shape != block.shape:
                raise content.misfit(path, f"tinylora_P must be {block.shape}; save it with save_projection=True")
            block[:] = stored
            owners.append(owner)
            targets.append(content.target(path, (len(b), a.shape[1])))
            parts.append((b, p, a))
        # P and θ are not rounded to the dtype of the stored v: PEFT multiplies them in that of the model.
        content.dtypes.add("float32")
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
        one_each = sorted(owners) == list(range(len(vectors))) and len({v.size for v in vectors}) == 1
        one_each = one_each and all(vectors[0].size <= p[0].size for p in matrices.values())
        size = vectors[0].size if one_each else theta.size
        if "float64" in content.dtypes or (not one_each and size > sum(p[0].size for p in matrices.values())):
            return OwnStructure(targets, updates=updates, notes=(_TINYLORA_NOTE,))
        config = Config(
            rank=rank, format="tucker", sources={"factor0": Given(), "factor1": Given()}, before="given",
            parameters=size, scope="group" if one_each else "plan", offset=False,
        )  # fmt: skip
        if one_each:
            arrays = {f"group{group}.theta": vectors[owner] for group, owner in enumerate(owners)}
            for group, (owner, p) in enumerate(zip(owners, matrices.values(), strict=True)):
                block = p[firsts[owner] : firsts[owner + 1]]
                given_arrays[f"group{group}.theta.matrix"] = block.reshape(size, -1).T
        else:
            arrays = {"theta": theta}
            given_arrays["theta.matrix"] = np.concatenate([p.reshape(size, -1) for p in matrices.values()], axis=1).T
        return OwnStructure(targets, config, arrays, given_arrays, updates)

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
        """Return the position of each weight in the model, which decides which v belongs to it."""
        if len(content.modules) == 1 or vectors == 1:
            return dict.fromkeys(content.modules, 0)
        if content.base is None or not content.base.ordered:
            raise FileError(
                "the order of the modules in the model decides which of its vectors v is a weight's, and the file does "
                f"not have it: give base={SHAPES_OF_MODEL}"
            )
        for path in content.modules:
            content.base.check_module(path)
        paths = [path for path in content.base.shapes if path in content.modules]
        return {path: place for place, path in enumerate(paths)}


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
        # Both factors are multiples of θ, so θ can include a scale of their product.
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
        """Draw the indices like PEFT, which needs the order of the model's modules."""
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
        """Return the rows and columns of the adapted weights, in the model's order."""
        config, base = content.config, content.base
        if base is None or not base.ordered or None in base.shapes.values():
            raise FileError(
                "it stores neither its indices nor the names of its weights, and PEFT draws the indices in the order "
                f"of the model's modules: {_SAVE}, or give base={SHAPES_OF_MODEL}"
            )
        unclear = [name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if config.get(name)]
        ends = config.get("target_modules")
        if unclear or not isinstance(ends, list):
            what = f"{unclear[0]} is set" if unclear else f"target_modules={safe_repr(ends)} is no list"
            raise FileError(f"it stores neither its indices nor the names of its weights, and {what}: {_SAVE}")
        chosen = {}
        for path, stored in base.shapes.items():
            assert stored is not None
            if len(stored) == 2 and any(f".{path}".endswith(f".{end}") for end in ends):
                chosen[path] = (stored[1], stored[0]) if content.settings.transposed else (stored[0], stored[1])
        if not chosen:
            raise FileError(f"target_modules={safe_repr(ends)} matches no matrix of base")
        return chosen


def _is_lora(plan: UpdatePlan) -> bool:
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
    """Return PEFT's indices, whose counts differ by at most one."""
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if count % length:
        indices = np.concatenate([indices, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(indices)
    return indices


# -- VB-LoRA: parts of A and B mix a few vectors of a bank, which no config can express: read as LoRA ------------------


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
