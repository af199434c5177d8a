"""PEFT's TinyLoRA: LoRA-XS whose r × r matrices are combinations of fixed random ones with few trained numbers.

PEFT's random matrices become the matrix of a given map before the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Given
from tnadapt.algebra.torch_streams import TorchStream
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import DRAWN, OwnStructure, PeftMethod, seed_of
from ._unpack import Module
from ._updates import Float, ModuleUpdate, Pair

__all__ = ["PeftTinyLora"]

_NOTE = (
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

    title = "TinyLoRA"
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
            own = self._projection(content, path, place, vectors[number].size, len(a))
            owners.append(number)
            p = np.zeros((firsts[-1], len(a), len(a)))
            p[firsts[number] : firsts[number + 1]] = own
            targets.append(content.target(path, (len(b), a.shape[1])))
            parts.append((b, p, a))
        theta = np.concatenate(vectors)
        # P and θ are not rounded to the dtype of the stored v: PEFT multiplies them in that of the model.
        content.dtypes.add("float32")
        if "tinylora_P" not in next(iter(content.modules.values())):
            notes = (f"PEFT left P to a seed of torch's: {DRAWN}",)
        rank = max(p.shape[1] for _, p, _ in parts)
        matrices, given, updates = dict[str, Float](), dict[str, Float](), []
        for number, ((b, p, a), target) in enumerate(zip(parts, targets, strict=True)):
            # A Tucker factor has no more columns than rows.
            left, right = ((0, min(rank, side) - p.shape[1]) for side in target.shape)
            name = f"group{number}.split0"
            matrices[f"{name}.core"] = np.pad(p, ((0, 0), left, right))
            given |= {f"{name}.factor0": np.pad(b, ((0, 0), left)), f"{name}.factor1": np.pad(a, (right, (0, 0))).T}
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
                    own = p[firsts[owner] : firsts[owner + 1]]
                    given[f"group{group}.theta.matrix"] = own.reshape(size, -1).T
                return OwnStructure(targets, config, arrays, given, updates, notes=notes)
        matrix = np.concatenate([p.reshape(theta.size, -1) for p in matrices.values()], axis=1).T
        if theta.size <= len(matrix):
            config = config.replace(before="given", parameters=theta.size, offset=False)
            return OwnStructure(
                targets, config, {"theta": theta}, {**given, "theta.matrix": matrix}, updates, notes=notes
            )
        cores = {name: np.einsum("i,ijk->jk", theta, p) for name, p in matrices.items()}
        notes = (_NOTE.format(theta.size, sum(core.size for core in cores.values())), *notes)
        return OwnStructure(targets, config, cores, given, updates, notes=notes)

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
                [one[full] for one in matrices]
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
        stored = all("tinylora_P" in own for own in content.modules.values())
        if len(content.modules) == 1 or (vectors == 1 and stored):
            return dict.fromkeys(content.modules, 0)
        if content.base is None or not content.base.ordered:
            why = "which of its vectors v is a weight's" if stored else "the matrices P"
            raise FileError(
                f"the order of the modules in the model decides {why}, and the file does not have it: {_ORDER}"
            )
        for path in content.modules:
            content.base.check_module(path)
        return {path: place for place, path in enumerate(one for one in content.base.shapes if one in content.modules)}

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
