"""The module whose forward reads a weight: the owner, or a parent that reads it without calling the owner."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt.torch
from tnadapt.targets.target import Target
from tnadapt.torch._target_selection import find_targets
from tnadapt.torch._weights import host_of, reads_outside

from .architectures import MODELS, build, output

# Models with weights that a parent reads, and how far above it is.
READ_BY_PARENT = {"timm_swinv2": 1, "timm_beit": 1, "timm_eva": 1, "torch_encoder": 1, "torchvision_swin": 1}


def up(path: str, steps: int) -> str:
    return ".".join(path.split(".")[: -steps or None])


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torchvision_resnet"}))
def test_hosts_of_queries_and_values(name: str) -> None:
    model, _ = build(name)
    steps = READ_BY_PARENT.get(name, 0)
    for target in find_targets(model):
        assert host_of(model, target) == up(target.module, steps)
        assert reads_outside(model, target) == ([up(target.module, steps)] if steps else [])


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torchvision_resnet"}))
def test_a_weight_that_is_not_called_is_read_elsewhere(name: str) -> None:
    """With the owner's forward forbidden, the model still runs if and only if a parent is the host."""
    model, inputs = build(name)
    target = find_targets(model)[0]

    def forbidden(*_: Any, **__: Any) -> None:
        raise RuntimeError("called")

    model.get_submodule(target.module).forward = forbidden
    with torch.no_grad():
        if host_of(model, target) == target.module:
            with pytest.raises(RuntimeError, match="called"):
                output(model, inputs)
        else:
            output(model, inputs)


def test_the_fast_path_reads_all_weights_of_a_layer() -> None:
    model, _ = build("torch_encoder")
    hosts = [host_of(model, target) for target in find_targets(model, "all-linear")]
    assert hosts == ["layers.0"] * 4 + ["layers.1"] * 4
    assert host_of(model, find_targets(model, ["layers.0.self_attn:o"])[0]) == "layers.0"
    assert reads_outside(model, find_targets(model, "o")[0]) == ["layers.0", "layers.0.self_attn"]
    decoder, _ = build("torch_decoder")
    assert {host_of(decoder, target) for target in find_targets(decoder, "qkv")} == {
        *("layers.0.self_attn", "layers.0.multihead_attn")
    }


class Reader(nn.Module):
    """Base class of modules that read a weight instead of calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        nn.init.zeros_(self.inner.weight)

    def merged(self) -> Tensor:
        return self.inner.weight + 0


class Direct(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T


class ByMethod(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.merged()


class ByProperty(Reader):
    @property
    def own(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.own


class ByName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        return x @ inner.weight


class Inherits(Direct):
    pass


class Looks(Reader):
    """Reads only dtype and shape, or reads the weight without computing with it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.inner.weight.dtype)) * self.inner.weight.shape[0] * self.inner.weight.size(0)

    def reset(self) -> Tensor:
        return self.inner.weight


class Loops(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x @ layer.weight
        return x


class Indexes(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layers[0].weight


class ByGetattr(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self, "inner").weight  # noqa: B009


class ByGetattrWithDefault(Reader):
    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.inner, "weight", None)
        return self.inner(x) if weight is None else x @ weight


class ByComputedName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self, "in" + "ner").weight


class ByComputedIndex(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layers[len(self.layers) - 1].weight


class ByWalrus(Reader):
    def forward(self, x: Tensor) -> Tensor:
        if (inner := self.inner) is not None:
            x = x @ inner.weight
        return x @ (first := self.layers[0]).weight + first.bias


class ByAnnotatedName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        inner: nn.Linear = self.inner
        return x @ inner.weight


class ByPair(Reader):
    def forward(self, x: Tensor) -> Tensor:
        inner, first = self.inner, self.layers[0]
        return first(x) @ inner.weight


class ByLoopOverChildren(Reader):
    """Children of the same depth are not distinguished."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[1]):
            x = x @ layer.weight
        return x


class ByComprehension(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.stack([layer.weight for layer in self.layers]).sum(0)


def child(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


class ByAFunction(Reader):
    """The results of functions are not tracked."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ child(self, "inner").weight


class ByAnotherObject(Reader):
    """A weight of the same name that is not this module's."""

    def forward(self, x: Tensor, other: Reader | None = None) -> Tensor:
        return x if other is None else x @ other.inner.weight @ other.layers[0].weight


class Outer(nn.Module):
    def __init__(self, below: nn.Module) -> None:
        super().__init__()
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        return self.below(x)


class Reaches(Outer):
    """Two levels down."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.below.inner.weight


@pytest.mark.parametrize(
    ("model", "readers"),
    [
        (Direct(), {"inner": [""]}),
        (ByMethod(), {"inner": [""]}),
        (ByProperty(), {"inner": [""]}),
        (ByName(), {"inner": [""]}),
        (Inherits(), {"inner": [""]}),
        (Looks(), {}),
        (Loops(), {"layers.0": [""], "layers.1": [""]}),
        (Indexes(), {"layers.0": [""]}),
        (ByGetattr(), {"inner": [""]}),
        (ByGetattrWithDefault(), {"inner": [""]}),
        (ByComputedName(), {"inner": [""], "other": [""]}),  # whose name it is, is not known
        (ByComputedIndex(), {"layers.0": [""], "layers.1": [""]}),
        (ByWalrus(), {"inner": [""], "layers.0": [""]}),
        (ByAnnotatedName(), {"inner": [""]}),
        (ByPair(), {"inner": [""]}),
        (ByLoopOverChildren(), {"layers.0": [""], "layers.1": [""]}),
        (ByComprehension(), {"layers.0": [""], "layers.1": [""]}),
        (ByAFunction(), {}),
        (ByAnotherObject(), {}),
        (Outer(Looks()), {}),
        (Outer(Direct()), {"below.inner": ["below"]}),
        (Reaches(Looks()), {"below.inner": [""]}),
        (Reaches(Direct()), {"below.inner": ["", "below"]}),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_ways_to_read_a_childs_weight(model: nn.Module, readers: dict[str, list[str]]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            target = Target(path, (2, 2))
            assert reads_outside(model, target) == readers.get(path, [])
            # The outermost encloses the others.
            assert host_of(model, target) == readers.get(path, [path])[0]


def test_a_module_under_two_paths_has_the_readers_of_both() -> None:
    model = nn.ModuleDict({"alias": nn.Linear(2, 2), "below": Direct()})
    model["below"].inner = model["alias"]
    assert host_of(model, Target("alias", (2, 2))) == "below"


def test_a_class_without_source() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.inner.weight", space)
    model = space["Made"]()
    model.inner = nn.Linear(2, 2)
    assert host_of(model, Target("inner", (2, 2))) == "inner"


def test_a_wrapper_of_peft_hands_the_weight_out() -> None:
    peft = pytest.importorskip("peft")
    model, _ = build("timm_beit")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), model)
    (target, *_) = find_targets(wrapped)
    assert target.module == "blocks.0.attn.qkv.base_layer"
    assert host_of(wrapped, target) == "blocks.0.attn"


def test_attaching_walks_the_model_no_more_often_the_more_targets_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    true = nn.Module.named_modules

    def counted(self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        walks.append(memo is None)
        return true(self, memo, prefix, remove_duplicate)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(2, 2), nn.Linear(2, 2)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    counts = []
    for layers in (2, 40):
        model = nn.Sequential(*(Attention() for _ in range(layers)))
        walks.clear()
        tnadapt.torch.attach(model, targets=r".*\.(query|value)")
        # Each walk calls itself for every module below.
        counts.append(sum(walks))
    assert counts[0] == counts[1]
