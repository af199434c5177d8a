"""A valid call of every public function, class and method: what a test changes one argument of at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers
from torch import nn

import tnadapt as tna
import tnadapt.torch as tnt
import tnadapt.torch.peft
from tests.frozen.settings import CALLS as PRESET_CALLS
from tnadapt import checkpoints, decomposition, finetune, maps, planning, presets, sources, tensors
from tnadapt.algebra import starting_points
from tnadapt.algebra.formats import Format
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.convert import FileFormat
from tnadapt.targets import attention_layouts as layouts

__all__ = ["CALLS", "OWNERS", "Workbench"]

SHAPES = [(4, 6), (4, 6)]
MODULES = ["attn.q_proj", "attn.v_proj"]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


class _Block(nn.Module):
    """A model of one attention, with an embedding in front of it; always with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.attn = _Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.embedding(x))


class Workbench:
    """What the calls are made with: small arrays, plans, models, and files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self.config = presets.lora(2)
        self.plan = tna.UpdatePlan(self.config, SHAPES)
        self.dora = tna.UpdatePlan(presets.dora(1), SHAPES).with_base(list(self.weights.values()))
        self.targets = [
            tna.Target(module, shape, role) for module, shape, role in zip(MODULES, SHAPES, "qv", strict=True)
        ]
        safetensors.numpy.save_file(self.weights, self.path("base.safetensors"))
        tuned = {name: array + np.outer(array[:, 0], array[0]) for name, array in self.weights.items()}
        safetensors.numpy.save_file(tuned, self.path("tuned.safetensors"))
        self.file = tna.AdapterFile(self.config, self.targets, self.plan.init())
        tna.save(self.path("adapter.safetensors"), self.file)
        tna.cp(_tensor(), 2).save(self.path("tensor.safetensors"))
        tna.convert(self.file, to="peft-lora").save(self.path("peft"))

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return {f"{module}.weight": self.matrix(4, 6) for module in MODULES}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def new(self, suffix: str = "") -> str:
        """Return the path of a file or folder that is not there."""
        return self.path(f"new{next(self._numbers)}{suffix}")

    def matrix(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def params(self) -> dict[str, np.ndarray]:
        return {name: np.ones(shape, np.float32) for name, shape in self.plan.param_shapes.items()}

    def stacked(self) -> dict[str, np.ndarray]:
        return {name: np.ones((2, *shape), np.float32) for name, shape in self.plan.param_shapes.items()}

    def population(self) -> tna.PopulationFile:
        return tna.PopulationFile(self.file, self.stacked(), ["ann", "bob"])

    def population_file(self) -> str:
        path = self.new(".safetensors")
        tna.save(path, self.population())
        return path

    @staticmethod
    def model() -> nn.Module:
        return _Block()

    @staticmethod
    def tuned() -> nn.Module:
        """Return the model after a change of one weight."""
        model = _Block()
        with torch.no_grad():
            model.attn.q_proj.weight.add_(0.1)
        return model

    def adapted(self) -> nn.Module:
        model = _Block()
        tnt.attach(model, "lora", rank=2)
        return model

    def adapter(self, **settings: Any) -> Any:
        return tnt.attach(_Block(), "lora", rank=2, **settings)

    def trainer(self) -> Any:
        """Return the least of transformers' Trainer."""
        methods = {name: lambda: None for name in vars(transformers.Trainer) if not name.startswith("__")}
        return types.SimpleNamespace(model=self.adapted(), args=None, **methods)

    @staticmethod
    def given_start() -> Any:
        return tnt.attach(_Block(), presets.lora(2, start="given"), "qv")

    @staticmethod
    def batches() -> list[torch.Tensor]:
        return [torch.tensor([[0, 1, 2], [3, 4, 0]])]

    def processor(self) -> str:
        """Return a folder with a processor of images."""
        folder = self.path("processor")
        if not Path(folder).exists():
            about = tna.Pretrained("org/model", task="image-classification", library="transformers")
            file = dataclasses.replace(self.file, pretrained=about)
            transformers.ViTImageProcessor().save_pretrained(folder)
            tna.save(str(Path(folder, "adapter.safetensors")), file)
        return folder

    @functools.cached_property
    def planned(self) -> Any:
        return tna.plan([(16, 16)] * 2, 200)

    @functools.cached_property
    def fit(self) -> Any:
        return tna.decompose([self.matrix(4, 6)] * 2, self.config)

    @functools.cached_property
    def conversion(self) -> Any:
        return tna.convert(self.file, to="peft-lora")

    @functools.cached_property
    def results(self) -> Any:
        method = finetune.Method("LoRA", "r = 1", presets.lora(1))
        return finetune.Point(method, 10, 0, 0.01, (0.5,), (0.5,), 1.0, ())


@dataclasses.dataclass(frozen=True)
class _Number:
    """A task for an engine."""

    base: int

    @property
    def key(self) -> str:
        return f"base-{self.base}"


class _Squares:
    """Work for an engine."""

    @staticmethod
    def open() -> Any:
        return lambda task, report: {"result": task.base**2}


def _registered() -> dict[str, Any]:
    """Register the method with PEFT, once."""
    tnadapt.torch.peft.register()
    return {}


def _composite() -> tna.CompositeConfig:
    return tna.CompositeConfig([(presets.lora(2), 1), (presets.lora(1), 1)])


def _tensor(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape or (3, 4, 5))


TENSORS: dict[str, Callable[[], Any]] = {
    "CPTensor": lambda: tna.cp(_tensor(), 2),
    "TuckerTensor": lambda: tna.tucker(_tensor(), 2),
    "TTTensor": lambda: tna.tensor_train(_tensor(), 2),
    "TRTensor": lambda: tensors.random_tr((3, 4, 5), 2, random_state=0),
    "TTMatrix": lambda: tensors.random_tt_matrix((2, 3), (3, 2), 2, random_state=0),
    "KroneckerTensor": lambda: tna.kronecker_decomposition(_tensor(4, 6), [(2, 3), (2, 2)], 2),
    "HadamardTensor": lambda: tensors.HadamardTensor([tna.cp(_tensor(), 2), tna.cp(_tensor(), 2)]),
}


class PlainFormat(FileFormat):
    """A file format that can be registered."""

    def detect(self, path: str) -> str | None:
        return None

    def read(self, files: Any, base: Any, part: str | None) -> Any:
        raise NotImplementedError


def _mine(base: type) -> type:
    """Return a new class to register."""
    return dataclasses.dataclass(frozen=True)(type("Mine", (base,), {"kind": "mine"}))


Arguments = Callable[[Workbench], Mapping[str, Any]]

_FIT = {"random_state": 0, "tol": 1e-3, "max_iterations": 3}

#: The keyword arguments of a valid call, without those that are the default of their parameter.
CALLS: dict[str, Arguments] = {
    # -- tnadapt ---------------------------------------------------------------------------------
    "AdapterFile": lambda b: {"config": b.config, "targets": b.targets, "arrays": b.plan.init()},
    "AdapterFile.with_base": lambda b: {"weights": list(b.weights.values())},
    "AdapterFile.draws_without": lambda b: {"left_out": []},
    "PopulationFile": lambda b: {"member": b.file, "arrays": b.stacked(), "names": ["ann", None]},
    "PopulationFile.from_members": lambda b: {"members": [b.file, b.file], "names": ["ann", "bob"]},
    "PopulationFile.select": lambda b: {"members": ["bob", 0]},
    "CompositeConfig": lambda b: {"parts": [(presets.lora(2), 1), (presets.lora(1), 1)]},
    "CompositeConfig.from_dict": lambda b: {"settings": _composite().to_dict()},
    "CompositeConfig.replace": lambda b: {"seed": 1},
    "CompositeConfig.split": lambda b: {"items": ["a", "b"]},
    "Config": lambda b: {},
    "Config.from_dict": lambda b: {"settings": b.config.to_dict()},
    "Config.replace": lambda b: {"rank": 3},
    "Config.split": lambda b: {"items": ["a", "b"]},
    "Pretrained": lambda b: {"name": "org/model"},
    "Pretrained.from_dict": lambda b: {"values": tna.Pretrained("org/model").to_dict()},
    "ProgressBar": lambda b: {},
    "ProgressBar.update": lambda b: {"done": 0.5},
    "ProgressBar.counts": lambda b: {"done": 1, "total": 2},
    "ProgressBar.steps": lambda b: {"step": decomposition.Step(0, 1, 1, 0.5)},
    "ProgressBar.iterations": lambda b: {"number": 1, "error": 0.5},
    "ProgressBar.lines": lambda b: {"line": "x"},
    "Projection": lambda b: {"kind": "linear", "n_in": 4, "n_out": 8},
    "Projection.__call__": lambda b: {"x": b.matrix(4)},
    "Projection.on_weights": lambda b: {"kind": "linear", "shapes": SHAPES, "ratio": 0.5},
    "Projection.share": lambda b: {"other": tna.Projection("linear", 4, 8)},
    "Projection.slice": lambda b: {"x": b.matrix(4), "start": 0, "stop": 8},
    "Projection.adjoint": lambda b: {"y": b.matrix(8)},
    "RowIndices": lambda b: {"numbers": (0, 2)},
    "Rows": lambda b: {"start": 0, "length": 2, "stride": 3, "count": 1},
    "UpdatePlan": lambda b: {"config": b.config, "shapes": SHAPES},
    "UpdatePlan.arrays": lambda b: {"params": b.params()},
    "UpdatePlan.delta": lambda b: {"params": b.params(), "i": 0},
    "UpdatePlan.deltas": lambda b: {"params": b.params()},
    "UpdatePlan.from_arrays": lambda b: {"arrays": b.params()},
    "UpdatePlan.init": lambda b: {},
    "UpdatePlan.largest_rank": lambda b: {"i": 0},
    "UpdatePlan.merged": lambda b: {"params": b.params(), "weights": list(b.weights.values())},
    "UpdatePlan.part_of": lambda b: {"i": 0},
    "UpdatePlan.starts": lambda b: {},
    "UpdatePlan.to_arrays": lambda b: {"params": b.params()},
    "UpdatePlan.units_for": lambda b: {"rate": "adam"},
    "UpdatePlan.vector": lambda b: {"params": b.params(), "stop": 8},
    "UpdatePlan.with_base": lambda b: {"weights": list(b.weights.values())},
    "UpdatePlan.with_start": lambda b: {"arrays": b.params()},
    "UpdatePlan.with_units": lambda b: {"units": dict.fromkeys(b.plan.param_shapes, 1.0)},
    "Target": lambda b: {"module": "attn.q", "stored": (4, 6), "role": "q"},
    "Target.from_list": lambda b: {"value": b.targets[0].to_list()},
    "Target.block": lambda b: {"stored": b.matrix(4, 6)},
    "Target.select": lambda b: {"stored": b.matrix(4, 6)},
    "Target.like_block": lambda b: {"matrix": b.matrix(4, 6)},
    "Target.write": lambda b: {"stored": b.matrix(4, 6), "matrix": b.matrix(4, 6)},
    "convert": lambda b: {"source": b.file, "to": "peft-lora", "progress": lambda done, total: None},
    "cp_to_tensor": lambda b: {"cp": (None, [np.ones((3, 2)), np.ones((4, 2))])},
    "tucker_to_tensor": lambda b: {"tucker": (np.ones((2, 2)), [np.ones((3, 2)), np.ones((4, 2))])},
    "tt_to_tensor": lambda b: {"cores": [np.ones((1, 3, 2)), np.ones((2, 4, 1))]},
    "kronecker": lambda b: {"*arrays": [b.matrix(2, 3), b.matrix(3, 2)]},
    "kron_matvec": lambda b: {"matrices": [b.matrix(2, 3), b.matrix(3, 2)], "x": b.matrix(6)},
    "hypercube_shape": lambda b: {"size": 100, "order": 3},
    "to_hypercube": lambda b: {"x": b.matrix(100), "order": 3},
    "from_hypercube": lambda b: {"tensor": tna.to_hypercube(b.matrix(100), 3), "size": 100},
    "split_groups": lambda b: {"matrices": [b.matrix(2, 3)] * 2, "groups": 3},
    "join_groups": lambda b: {"vectors": [b.matrix(6)] * 2, "shapes": [(2, 3)] * 2, "groups": 2},
    "fwht": lambda b: {"x": b.matrix(8, 4), "axis": 0},
    "fastfood": lambda b: {"x": b.matrix(3), "size": 5},
    "geometry": lambda b: {"dense": b.matrix(8, 6), "variant": b.matrix(8, 6), "k": 3},
    "decompose": lambda b: {"deltas": [b.matrix(4, 6)] * 2, "cfg": b.config, "tol": 1e-3, "max_iterations": 3},
    "search_rank": lambda b: {"deltas": [b.matrix(4, 6)] * 2, "cfg": b.config, "max_error": 0.9, "max_rank": 4},
    "extract": lambda b: {"base": b.path("base.safetensors"), "tuned": b.path("tuned.safetensors"), "cfg": b.config},
    "append": lambda b: {"path": b.population_file(), "member": b.file, "name": "cid"},
    "replace": lambda b: {"path": b.population_file(), "which": "bob", "member": b.file},
    "info": lambda b: {"path": b.path("adapter.safetensors")},
    "load": lambda b: {"path": b.path("adapter.safetensors"), "like": b.plan},
    "merge": lambda b: {
        "base": b.path("base.safetensors"), "adapter": b.file, "out": b.new(".safetensors"), "check_base": False,
    },
    "learning_rate": lambda b: {"weights": list(b.weights.values())},
    "parameter_count": lambda b: {"config": b.config, "shapes": SHAPES},
    "plan": lambda b: {"shapes": [(8, 8)], "budget": 40, "by": ("parameters",)},
    "save": lambda b: {"path": b.new(".safetensors"), "adapter_file": b.file},
    "verify": lambda b: {"config": presets.lora(1), "shapes": [(3, 2)], "backends": ["numpy"]},
    "register_backend": lambda b: {"name": "mine", "factory": lambda: None},
    "register_format": lambda b: {"name": "mine", "cls": _mine(Format)},
    "register_layout": lambda b: {
        "name": "mine",
        "layout": layouts.AttentionLayout(layouts.rules.by_head, ("qkv_proj",), ("MineAttention",), ("mine",)),
    },
    "register_map": lambda b: {"name": "mine", "cls": _mine(maps.Map)},
    "register_preset": lambda b: {"preset": presets.Preset("mine", presets.lora, "Mine", "a paper")},
    "register_source": lambda b: {"name": "mine", "cls": _mine(sources.Source)},
    "register_start": lambda b: {"name": "mine", "cls": _mine(starting_points.Start)},
    # -- presets ---------------------------------------------------------------------------------
    **{
        f"presets.{name}": functools.partial(lambda settings, b: dict(settings), calls[0])
        for name, calls in PRESET_CALLS.items()
        if name not in ("dense", "krona")  # all their arguments are those of Config
    },
    # -- maps ------------------------------------------------------------------------------------
    "maps.CenteredWavelet": lambda b: {},
    "maps.Chain": lambda b: {"parts": [maps.make_map("linear", 4, 8)]},
    "maps.Circulant": lambda b: {"block": 2},
    "maps.Gather": lambda b: {"size": 3},
    "maps.PerWeight": lambda b: {"parts": [maps.make_map("linear", 4, 8)]},
    "maps.Scatter": lambda b: {"positions": (0, 1)},
    "maps.SignGather": lambda b: {"size": 3},
    "maps.TiedElements": lambda b: {},
    "maps.Tile": lambda b: {"rows": 2, "cols": 2},
    "maps.TorchScatter": lambda b: {"size": 3, "seed": 1},
    "maps.Wavelet": lambda b: {},
    "maps.checked_projection": lambda b: {"given": "linear"},
    "maps.input_length": lambda b: {"projection": "linear", "size": 8, "ratio": 0.5},
    "maps.make_map": lambda b: {"kind": "linear", "n_in": 4, "n_out": 8},
    "maps.make_map_on_weights": lambda b: {"kind": "linear", "shapes": SHAPES, "ratio": 0.5},
    # -- sources ---------------------------------------------------------------------------------
    "sources.FromBase": lambda b: {"side": "rows"},
    "sources.Given": lambda b: {},
    "sources.Mixed": lambda b: {"of": sources.Seeded("normal")},
    "sources.Scaled": lambda b: {"of": sources.Seeded("normal")},
    "sources.Seeded": lambda b: {"distribution": "normal"},
    "sources.SourceMap": lambda b: {"sources": {"factor0": sources.Trained()}},
    "sources.Tied": lambda b: {"to": "group0.split0.factor0"},
    "sources.source_from_dict": lambda b: {"settings": sources.source_to_dict(sources.Trained())},
    "sources.source_to_dict": lambda b: {"source": sources.Trained()},
    # -- tensors ---------------------------------------------------------------------------------
    "cp": lambda b: {"tensor": _tensor(), "rank": 2, **_FIT, "memory": 1 << 20},
    "tucker": lambda b: {"tensor": _tensor(), "rank": 2, **_FIT, "memory": 1 << 20},
    "tensor_train": lambda b: {"tensor": _tensor(), "rank": 2, **_FIT, "memory": 1 << 20},
    "tensor_ring": lambda b: {"tensor": _tensor(), "rank": 2, **_FIT},
    "tt_matrix": lambda b: {
        "matrix": b.matrix(4, 6), "rank": 2, "rows": (2, 2), "cols": (2, 3), **_FIT,
    },
    "tt_cross": lambda b: {"function": lambda i: 1.0 / (1.0 + i.sum(1)), "shape": (3, 4, 5), "rank": 2},
    "kronecker_decomposition": lambda b: {
        "tensor": b.matrix(4, 6), "shapes": [(2, 3), (2, 2)], "terms": 1, **_FIT,
    },
    "hadamard_decomposition": lambda b: {"tensor": b.matrix(4, 6), "rank": 1, **_FIT},
    "parafac2": lambda b: {"slices": [b.matrix(4, 3), b.matrix(5, 3)], "rank": 2, **_FIT},
    "tensors.CPTensor": lambda b: {"weights": None, "factors": [np.ones((3, 2)), np.ones((4, 2))]},
    "tensors.TuckerTensor": lambda b: {"core": np.ones((2, 2)), "factors": [np.ones((3, 2)), np.ones((4, 2))]},
    "tensors.TTTensor": lambda b: {"cores": [np.ones((1, 3, 2)), np.ones((2, 4, 1))]},
    "tensors.TRTensor": lambda b: {"cores": [np.ones((2, 3, 2)), np.ones((2, 4, 2))]},
    "tensors.TTMatrix": lambda b: {"cores": [np.ones((1, 2, 3, 2)), np.ones((2, 4, 2, 1))]},
    "tensors.KroneckerTensor": lambda b: {"weights": None, "terms": [[np.ones((2, 3)), np.ones((2, 2))]]},
    "tensors.HadamardTensor": lambda b: {"parts": [tna.cp(_tensor(), 2)] * 2},
    "tensors.Parafac2Tensor": lambda b: {
        "weights": None, "factors": [np.ones((1, 2)), np.eye(2), np.ones((3, 2))], "projections": [np.eye(4, 2)],
    },
    "tensors.Parafac2Tensor.slice": lambda b: {"number": 0},
    "tensors.unfold": lambda b: {"tensor": _tensor(), "mode": 1},
    "tensors.fold": lambda b: {"unfolded": b.matrix(4, 15), "mode": 1, "shape": (3, 4, 5)},
    "tensors.mode_dot": lambda b: {"tensor": _tensor(), "matrix_or_vector": np.ones((2, 4)), "mode": 1},
    "tensors.multi_mode_dot": lambda b: {
        "tensor": _tensor(), "matrices_or_vectors": [np.ones((2, 3)), np.ones((2, 4))], "modes": [0, 1],
    },
    "tensors.khatri_rao": lambda b: {"matrices": [np.ones((3, 2)), np.ones((4, 2))]},
    "tensors.row_khatri_rao": lambda b: {"matrices": [np.ones((3, 2)), np.ones((3, 4))]},
    "tensors.outer": lambda b: {"tensors": [np.ones(3), np.ones((4, 2))]},
    "tensors.inner": lambda b: {"tensor1": _tensor(), "tensor2": _tensor()},
    "tensors.load": lambda b: {"path": b.path("tensor.safetensors")},
    **{
        f"tensors.random_{name}": lambda b: {"shape": (3, 4), "rank": 2, "random_state": 0}
        for name in ("cp", "tucker", "tt", "tr")
    },
    "tensors.random_tt_matrix": lambda b: {"rows": (2, 3), "cols": (3, 2), "rank": 2, "random_state": 0},
    **{
        f"tensors.{name}.{method}": arguments
        for name in TENSORS
        for method, arguments in {
            "entries": lambda b: {"indices": [[0, 0, 0]]},
            "entry": lambda b: {"*index": [0, 0, 0]},
            "part": lambda b: {"*index": [slice(0, 2)]},
            "to_unfolded": lambda b: {"mode": 0},
        }.items()
        if method != "part" or name not in ("TTMatrix", "KroneckerTensor")
    },
    "tensors.TTMatrix.part": lambda b: {"*index": []},
    "tensors.KroneckerTensor.part": lambda b: {"*index": []},
    "tensors.TTMatrix.entries": lambda b: {"indices": [[0, 0]]},
    "tensors.TTMatrix.entry": lambda b: {"*index": [0, 0]},
    **{
        f"tensors.{name}.inner": functools.partial(lambda make, b: {"other": make()}, make)
        for name, make in TENSORS.items()
    },
    **{
        f"tensors.{name}.{method}": arguments
        for name in (*TENSORS, "Parafac2Tensor")
        for method, arguments in {
            "save": lambda b: {"path": b.new(".safetensors")},
            "to": lambda b: {"backend": "numpy", "dtype": "float64", "device": "cpu"},
        }.items()
    },
    "tensors.KroneckerTensor.entries": lambda b: {"indices": [[0, 0]]},
    "tensors.KroneckerTensor.entry": lambda b: {"*index": [0, 0]},
    "tensors.CPTensor.truncated": lambda b: {"rank": 1},
    "tensors.CPTensor.mode_dot": lambda b: {"matrix_or_vector": np.ones((2, 4)), "mode": 1, "keep_dim": False},
    "tensors.TuckerTensor.mode_dot": lambda b: {"matrix_or_vector": np.ones((2, 4)), "mode": 1, "keep_dim": False},
    "tensors.TTTensor.mode_dot": lambda b: {"matrix_or_vector": np.ones((2, 4)), "mode": 1, "keep_dim": False},
    "tensors.TRTensor.mode_dot": lambda b: {"matrix_or_vector": np.ones((2, 4)), "mode": 1, "keep_dim": False},
    "tensors.TTTensor.round": lambda b: {"rank": 1},
    "tensors.TTMatrix.round": lambda b: {"rank": 1},
    # -- decomposition ---------------------------------------------------------------------------
    "decomposition.Settings": lambda b: {},
    "decomposition.smallest_rank": lambda b: {
        "fit": lambda config: tna.decompose([b.matrix(4, 6)] * 2, config), "cfg": b.config, "max_error": 0.9,
        "max_rank": 4,
    },
    # -- planning --------------------------------------------------------------------------------
    "planning.degrees_of_freedom": lambda b: {"plan": b.plan},
    "planning.largest_rank": lambda b: {"plan": b.plan, "weight": 0, "limit": 64},
    "planning.step_cost": lambda b: {"plan": b.plan},
    "planning.padding_waste": lambda b: {"plan": b.plan},
    "planning.parameters_of": lambda b: {"budget": "1k", "dtype": "float32"},
    "planning.known_as": lambda b: {"config": b.config},
    "planning.preset_call": lambda b: {"config": b.config},
    "planning.model_targets": lambda b: {"model": b.path("base.safetensors")},
    "planning.PresetCall.attach": lambda b: {"targets": "qv"},
    "planning.PresetCall.options": lambda b: {"targets": "qv"},
    "planning.Row.of": lambda b: {"adapter": b.plan},
    # -- plot ------------------------------------------------------------------------------------
    "plot.Axis": lambda b: {"label": "accuracy"},
    "plot.Axis.shown": lambda b: {"number": 81.25},
    "plot.Mark": lambda b: {"family": "LoRA", "label": "r = 1", "parameters": 10, "accuracies": (0.5, 0.6)},
    "plot.layout": lambda b: {"plan": b.plan, "path": b.new(".svg")},
    "plot.network": lambda b: {"config": b.config, "shapes": SHAPES, "path": b.new(".svg")},
    "plot.parameters": lambda b: {"shapes": [(8, 8)], "path": b.new(".svg"), "orders": (2,), "ranks": 4},
    "plot.pareto": lambda b: {"marks": [tna.plot.Mark("LoRA", "r = 1", 10, (0.5, 0.6))], "path": b.new(".svg")},
    "plot.styles": lambda b: {"families": ["LoRA"]},
    # -- targets ---------------------------------------------------------------------------------
    "targets.attention_layouts.AttentionLayout": lambda b: {
        "rule": layouts.rules.by_head, "weights": ("mine_proj",), "classes": ("Mine",), "model_types": ("mine",),
    },
    "targets.checkpoint_targets.find_stored": lambda b: {
        "shapes": {"attn.q_proj.weight": (8, 8), "attn.v_proj.weight": (8, 8)},
    },
    # -- checkpoints -----------------------------------------------------------------------------
    "checkpoints.checkpoint.open_checkpoint": lambda b: {"path": b.path("base.safetensors")},
    "checkpoints.checkpoint.Checkpoint.array": lambda b: {"name": "attn.q_proj.weight"},
    "checkpoints.fingerprint.Fingerprint": lambda b: {
        name: getattr(fingerprint(b.weights.values(), "float32"), name) for name in ("sha256", "dtype", "sketch")
    },
    "checkpoints.fingerprint.Fingerprint.matches": lambda b: {"other": fingerprint(b.weights.values(), "float32")},
    "checkpoints.fingerprint.Fingerprint.difference": lambda b: {"other": fingerprint(b.weights.values(), "float32")},
    "checkpoints.fingerprint.Fingerprint.apart": lambda b: {"other": fingerprint(b.weights.values(), "float32")},
    # -- convert ---------------------------------------------------------------------------------
    "convert.Conversion.save": lambda b: {"path": b.new(), "overwrite": False},
    "convert.register_file_format": lambda b: {"name": "mine", "cls": _mine(PlainFormat)},
    # -- serving ---------------------------------------------------------------------------------
    "serving.ServedFolder": lambda b: {"folder": b.path(""), "cache": b.new()},
    "serving.ServedFolder.file_of": lambda b: {"name": "adapter"},
    "serving.ServedFolder.find": lambda b: {"name": "adapter", "model": "org/model"},
    # -- torch -----------------------------------------------------------------------------------
    "torch.attach": lambda b: {"model": b.model(), "cfg": b.config, "tokens": 8},
    "torch.find_targets": lambda b: {"model": b.model()},
    "torch.token_targets": lambda b: {"model": b.model(), "tokens": [0, 2]},
    "torch.load": lambda b: {"model": b.model(), "path": b.path("adapter.safetensors")},
    "torch.from_pretrained": lambda b: {"model": b.model(), "folder": b.path("")},
    "torch.load_pretrained": lambda b: {"where": b.path("adapter.safetensors"), "base": b.model()},
    "torch.extract": lambda b: {"base": b.model(), "tuned": b.tuned(), "cfg": b.config},
    "torch.adapters": lambda b: {"model": b.adapted()},
    "torch.mix": lambda b: {"model": b.adapted(), "weights": {"default": 0.5}},
    "torch.rows": lambda b: {"model": b.adapted(), "names": ["default", None]},
    "torch.set_cache_limit": lambda b: {"model": b.adapted(), "limit": 1 << 20},
    "torch.adapter_checkpoints": lambda b: {"trainer": b.trainer()},
    "torch.reference_model": lambda b: {"model": b.adapted()},
    "torch.register_quantized": lambda b: {"name": "mine", "cls": _mine(tnt.QuantizedLayer)},
    "torch.MemberAdamW": lambda b: {"population": b.adapter(population=3), "lr": 0.1, "max_norm": 1.0},
    "torch.Adapter.bake": lambda b: {},
    "torch.Adapter.merge": lambda b: {},
    "torch.Adapter.set_weight": lambda b: {"weight": 0.5},
    "torch.Adapter.set_trainable": lambda b: {},
    "torch.Adapter.parameter_groups": lambda b: {"lr": 1e-3},
    "torch.Adapter.adam_groups": lambda b: {"lr": 1e-3},
    "torch.Adapter.learning_rate": lambda b: {},
    "torch.Adapter.start_from": lambda b: {"arrays": b.params()},
    "torch.Adapter.load_arrays": lambda b: {"arrays": b.params()},
    "torch.Adapter.save": lambda b: {"path": b.new(".safetensors")},
    "torch.Adapter.save_pretrained": lambda b: {"folder": b.new()},
    "torch.Adapter.swap": lambda b: {"path": b.path("adapter.safetensors")},
    "torch.starts.eva": lambda b: {
        "adapter": b.given_start(), "batches": b.batches(), "forward": lambda model, batch: model(batch),
    },
    "torch.starts.lora_ga": lambda b: {
        "adapter": b.given_start(), "batches": b.batches(), "loss": lambda model, batch: model(batch).square().mean(),
    },
    "torch.peft.TnadaptConfig": lambda b: {
        **_registered(), "preset": "lora", "settings": {"rank": 2}, "target_modules": "qv", "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None, "strategy": "auto",
        "activation": None, "init_weights": True, "detach_norm": False, "dropout": 0.0, "base": None,
        "computed_from": None, "trained": None,
    },
    "torch.load_processor": lambda b: {"where": b.processor()},
    # -- testing ---------------------------------------------------------------------------------
    "testing.shapes": lambda b: {},
    "testing.configs": lambda b: {"weights": SHAPES, "projections": ("identity",), "formats": ("cp",)},
    "testing.plans": lambda b: {"projections": ("identity",)},
    "testing.base_weights": lambda b: {"weights": SHAPES},
    "testing.parameters": lambda b: {"plan": b.plan},
    # -- finetune --------------------------------------------------------------------------------
    "finetune.Spec": lambda b: {"cache": Path(b.path("cache")), "pretrain_epochs": 1},
    "finetune.open_problem": lambda b: {"spec": finetune.Spec(), "progress": lambda what, done: None},
    "finetune.run_tasks": lambda b: {
        "work": _Squares(), "tasks": [_Number(2)], "folder": b.new(), "progress": lambda task, done: None,
    },
    "finetune.Choice": lambda b: {"presets": ("lora",), "ranks": (1,)},
    "finetune.Training": lambda b: {"epochs": 1, "batch": 2},
    "finetune.default_methods": lambda b: {},
    "finetune.within": lambda b: {"budget": 200, "shapes": [(16, 16)]},
    "finetune.open_engine": lambda b: {"name": "local", "jobs": 1},
    "finetune.register_engine": lambda b: {"cls": type("Mine", (finetune.Engine,), {"name": "mine"})},
    "finetune.usable_device": lambda b: {"name": "cpu"},
    "finetune.check_out": lambda b: {"out": Path(b.new())},
    "finetune.require_data": lambda b: {"source": "digits"},
    "finetune.pareto_front": lambda b: {"points": [(1, 0.5), (2, 0.6)]},
    "finetune.Study": lambda b: {
        "spec": finetune.Spec(), "choice": finetune.Choice(("lora",), (1,)), "training": finetune.Training(1, 2),
        "rates": (0.01,),
    },
}  # fmt: skip

#: The objects that methods are called on.
OWNERS: dict[str, Callable[[Workbench], Any]] = {
    "AdapterFile": lambda b: b.file,
    "PopulationFile": lambda b: b.population(),
    "CompositeConfig": lambda b: _composite(),
    "Config": lambda b: b.config,
    "Pretrained": lambda b: tna.Pretrained("org/model"),
    "ProgressBar": lambda b: tna.ProgressBar(),
    "Projection": lambda b: tna.Projection("linear", 4, 8),
    "UpdatePlan": lambda b: b.plan,
    "Target": lambda b: b.targets[0],
    **{f"tensors.{name}": functools.partial(lambda make, b: make(), make) for name, make in TENSORS.items()},
    "tensors.Parafac2Tensor": lambda b: tna.parafac2([b.matrix(4, 3), b.matrix(5, 3)], 2),
    "planning.PresetCall": lambda b: planning.preset_call(b.config),
    "planning.Row": lambda b: b.planned.rows[0],
    "plot.Axis": lambda b: tna.plot.Axis(),
    "checkpoints.checkpoint.Checkpoint": lambda b: checkpoints.checkpoint.open_checkpoint(b.path("base.safetensors")),
    "checkpoints.fingerprint.Fingerprint": lambda b: fingerprint(b.weights.values(), "float32"),
    "convert.Conversion": lambda b: b.conversion,
    "serving.ServedFolder": lambda b: tna.serving.ServedFolder(b.path(""), b.path("cache")),
    "torch.Adapter": lambda b: b.adapter(),
    # Methods that need an object of another kind than their class's.
    "UpdatePlan.with_start": lambda b: tna.UpdatePlan(presets.lora(2, start="given"), SHAPES),
    "torch.Adapter.start_from": lambda b: b.given_start(),
}
