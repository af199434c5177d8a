"""RELIABILITY's laws 7 to 12 of an attached adapter, for all variants and all forms of stored weights."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.depth import in_depth

from . import life
from .distributed_jobs import Model
from .life import asks_for_grad, assert_near, bits, by_formula, passes
from .small import Separate, batch, compiles_whole, small, stir

P = tna.presets
# Small.blocks has ten targets: q and v of five blocks, v of the second smaller than q.
PATTERNS: dict[Any, Any] = {
    "qv": P.lora(2),
    "o_proj|proj": P.superlora(3, projection="linear", ratio=0.5, seed=4),
    "linear[12]": P.lokr(2, seed=5),
    "head": "dense",
}
VARIANTS: dict[str, Any] = {
    "default": None,
    "dense": P.dense(),
    "lora": P.lora(2),
    "lora alpha": P.lora(2, alpha=8.0),
    "lokr": P.lokr(2),
    "loha": P.loha(2),
    "lonkr": P.lonkr(1),
    "lorta": P.lorta(2),
    "fastfood": P.fastfood(0.1),
    "compacter": P.compacter(1, terms=2),
    "superlora groups": P.superlora(3, groups=4),
    "superlora layer": P.superlora(3, groups="layer"),
    "superlora role": P.superlora(3, groups="role"),
    "superlora shuffle": P.superlora(3, projection="shuffle"),
    "superlora linear": P.superlora(3, projection="linear", ratio=0.3),
    "superlora linear_v2": P.superlora(3, projection="linear_v2", ratio=0.3, groups=3, shared=False),
    "superlora nonlinear": P.superlora(3, projection="nonlinear", ratio=0.3),
    "superlora nonlinear_v2": P.superlora(3, projection="nonlinear_v2", ratio=0.3),
    "fourierft": P.fourierft(5),
    "c3a layer": P.c3a(8, groups="layer"),
    "chain": P.superlora(3, projection=["sign-gather", "nonlinear"], ratio=0.5),
    "tt": tna.Config(rank=3, groups=1, fold="balanced", order=4, format="tt"),
    "cp-weighted": tna.Config(rank=3, groups=1, fold="hypercube", order=3, format="cp-weighted"),
    "pissa": P.lora(2, start="pissa"),
    "given start": P.lora(2, start="given"),
    "svft": P.svft(4),
    "tinylora": P.tinylora(3),
    "dora": P.dora(2),
    "dora of columns": P.dora(2, magnitude_axis="cols"),
    "dora of θ": P.unilora(9, 2, apply="magnitude"),
    "dora behind F": P.superlora(2, projection="linear", ratio=0.5, apply="magnitude"),
    "dora from the base": P.lora_xs(2, apply="magnitude"),
    "hira": P.hira(2),
    "hira behind a nonlinear F": P.superlora(2, projection="nonlinear", ratio=0.5, apply="hadamard"),
}
# Several configs in one adapter, and what all of them share.
SEVERAL: dict[str, dict[Any, Any]] = {
    "many forms": PATTERNS,
    **{
        f"two of {value}": {"q_proj|v_proj": P.lora(2, **{field: value}), "linear1": P.lora(3, **{field: value})}
        for field, value in (("apply", "magnitude"), ("apply", "hadamard"), ("start", "pissa"), ("start", "given"))
    },
}
variants = pytest.mark.parametrize("variant", list(VARIANTS))
VARIANTS |= SEVERAL
of_several_too = pytest.mark.parametrize("variant", VARIANTS)


def attached(variant: str = "default", **settings: object) -> tuple[nn.Module, tt.Adapter]:
    model = small()
    return model, tt.attach(model, VARIANTS[variant], **settings)


def run(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    return life.run(model, batch() if x is None else x)


# -- 7: a fresh adapter, and training --------------------------------------------------------------------------


@pytest.mark.law(
    "fresh-is-zero", "first-gradients", "base-is-constant", "merge-is-attached", "merge-exact-undo", "disabled",
    "detach", "copies", "file-round-trip", "merge-disk-is-memory",
)  # fmt: skip
@of_several_too
def test_the_life_of_an_adapter(variant: str, tmp_path: Path) -> None:
    life.check_life(small, lambda model: tt.attach(model, VARIANTS[variant]), batch(), tmp_path)


@pytest.mark.law("attached-is-update", "accumulation")
@of_several_too
def test_outputs_and_gradients_are_those_of_the_plain_formula(variant: str) -> None:
    model, adapter = attached(variant)
    model.double()
    stir(adapter, 0.1)
    x = batch(size=4).double()
    expected = by_formula(adapter, small().double(), x)
    # One part of a batch after another, too: the gradients add up.
    for batches in ([x], x.split(2)):
        assert_near(passes(model, adapter, *batches), expected, 1e-10)
    assert (expected["output"] - run(small().double(), x)).abs().max() > 1e-3
    parameters = list(adapter.parameters())
    for frozen in (parameters[1::2], parameters[::2] if len(parameters) > 1 else []):
        for parameter in parameters:
            parameter.requires_grad_(all(parameter is not other for other in frozen))
        found = passes(model, adapter, x)
        assert_near(found, {name: expected[name] for name in found}, 1e-10)
    for _ in range(2):  # a part called by itself
        model.blocks[1](batch().double()).sum().backward()


def test_what_is_kept_trainable_is_in_the_state_dict_and_no_adapter_s() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4), "c": nn.Linear(4, 4)})
    model["b"].running_mean = model["a"].running_mean
    model["b"].register_buffer("scratch", torch.zeros(1), persistent=False)
    # A buffer that two modules share has two names, and is kept under the first.
    adapter = tt.attach(model, P.lora(1), ["c"], name="first", keep_trainable="b")
    own = ["b.weight", "b.bias", "a.running_mean", "b.running_var", "b.num_batches_tracked"]
    assert sorted(adapter.kept) == sorted(own)
    array = next(name for name, _ in model.named_parameters() if "tnadapt" in name)
    for name in ("b.scratch", "scratch", array):
        with pytest.raises(tna.TargetError, match=r"no parameter is at or below .*; the model's parts are: a, b, c"):
            tt.attach(model, P.lora(1), ["c"], name="second", keep_trainable=name)


# -- 10: merging ---------------------------------------------------------------------------------------------


@pytest.mark.law("merge-exact-undo", "merge-disk-is-memory", "fresh-is-zero", "half-precision-base")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant",
    [
        "default", "lora", "superlora nonlinear", "dense", "pissa", "given start", "dora", "dora of columns",
        "dora behind F", "dora from the base", "hira",
    ],
)  # fmt: skip
def test_ten_merges_and_unmerges_give_the_very_bits_back(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = small().to(dtype)
        with torch.no_grad():  # numbers that arithmetic would not bring back
            model.blocks[1].q_proj.weight[0, :3] = torch.tensor([-0.0, 1e-7, 300.0])
        return model

    model = make()
    before, x = bits(model), batch().to(dtype)
    adapter = tt.attach(model, VARIANTS[variant])
    assert torch.equal(run(model, x), run(make(), x))
    stir(adapter)
    for _ in range(10):
        adapter.merge()
        assert bits(model) != before
        adapter.unmerge()
    assert bits(model) == before
    life.check_merged(make, model, adapter, tmp_path)


@pytest.mark.law("merge-twice")
def test_a_second_merge_and_other_misuse_are_refused() -> None:
    model, adapter = attached()
    stir(adapter)
    with pytest.raises(tna.TargetError, match="not merged"):
        adapter.unmerge()
    adapter.merge()
    merged = bits(model)
    for call, words in [
        (adapter.merge, "merged already"),
        (adapter.detach, r"call unmerge\(\) first"),
        (adapter.reset, r"call unmerge\(\) first"),
        (lambda: adapter.load_arrays(adapter.plan.init()), r"call unmerge\(\) first"),
        (lambda: adapter.set_weight(0.5), r"call unmerge\(\) first"),
    ]:
        with pytest.raises(tna.TargetError, match=words):
            call()
        assert bits(model) == merged
    adapter.unmerge()
    adapter.detach()
    for call in (adapter.detach, adapter.merge, adapter.bake):
        with pytest.raises(tna.TargetError, match="no longer attached"):
            call()
    # Also where there is another reason, which the caller could do nothing about any more.
    _, adapter = attached()
    adapter.set_weight(0.0)
    adapter.detach()
    with pytest.raises(tna.TargetError, match="no longer attached"):
        adapter.merge()


def test_a_weight_beside_a_parametrized_bias_is_merged() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = nn.Sequential(nn.Linear(8, 8))
    nn.utils.parametrize.register_parametrization(model[0], "bias", Twice())
    adapter = tt.attach(model, P.lora(2), "all-linear")
    stir(adapter)
    x = torch.randn(3, 8)
    expected = run(model, x)
    adapter.merge()
    torch.testing.assert_close(run(model, x), expected)


def test_merging_takes_the_memory_of_one_update_and_no_more() -> None:
    """Merging drops the updates cached before."""
    model = nn.Sequential(nn.Linear(37, 41))
    adapter = tt.attach(model, P.superlora(2), "all-linear")

    def alive() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        return sum(tuple(one.shape) == (41, 37) for one in tensors)

    stir(adapter)
    adapter.merge()
    expected = alive()
    adapter.unmerge()
    run(model, torch.randn(2, 37))
    adapter.merge()
    assert alive() == expected


@pytest.mark.law("merge-not-finite")
@pytest.mark.parametrize(
    ("config", "dtype", "bad", "message"),
    [
        # In the last group or weight: the others are good.
        (VARIANTS["superlora groups"], torch.float32, float("nan"), "not finite.*no weight was changed"),
        (VARIANTS["superlora groups"], torch.float32, float("inf"), "not finite.*no weight was changed"),
        (P.dense(), torch.float16, 1e6, r"exceeds the range of torch\.float16"),
        (P.dora(2), torch.float16, 1e6, r"v_proj.weight plus its update exceeds the range of torch\.float16"),
        (P.dora(2), torch.float16, float("nan"), r"the update of blocks.1.v_proj.weight is not finite"),
    ],
)
def test_a_merge_that_is_not_finite_touches_no_weight(
    config: tna.Config, dtype: torch.dtype, bad: float, message: str
) -> None:
    model = small().to(dtype)
    adapter = tt.attach(model, config, "qv" if config.apply == "add" else ["q_proj", "v_proj"])
    stir(adapter)
    before = bits(model)
    with torch.no_grad():
        list(adapter.parameters())[-1].view(-1)[0] = bad
    with pytest.raises(tna.BackendError, match=message):
        adapter.merge()
    assert bits(model) == before
    assert not adapter.merged


@pytest.mark.law("between-passes")
def test_what_was_changed_since_is_not_thrown_away() -> None:
    model, adapter = attached()
    stir(adapter)
    adapter.merge()
    with torch.no_grad():
        model.blocks[1].v_proj.weight[0, 0] += 1
    changed = bits(model)
    with pytest.raises(tna.TargetError, match="was changed after"):
        adapter.unmerge()
    assert bits(model) == changed
    model.half()
    with pytest.raises(tna.TargetError, match=r"float32 when it was merged and is torch\.float16"):
        adapter.unmerge()


@pytest.mark.law("detach")
def test_baking_and_detaching_leave_nothing_of_the_adapter() -> None:
    model, adapter = attached()
    stir(adapter)
    on = run(model)
    assert adapter.bake() is model
    assert (run(model) - on).abs().max() < 1e-5
    assert set(model.state_dict()) == set(small().state_dict())
    assert vars(model).keys() == vars(small()).keys()
    assert not model._forward_hooks | model._forward_pre_hooks
    tt.attach(model)  # its name is free again
    model = small()
    model.head.bias.requires_grad_(False)
    first = tt.attach(model, keep_trainable="blocks.0.proj")
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("tnadapt_")] == [
        "blocks.0.proj.weight", "blocks.0.proj.bias",
    ]  # fmt: skip
    second = tt.attach(model, name="second", keep_trainable="head")
    for adapter in (first, second):
        stir(adapter)
        adapter.detach()
    assert torch.equal(run(model), run(small()))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"head.bias"}
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.law("autocast")
@pytest.mark.parametrize(
    "variant",
    [
        "default", "lora", "pissa", "given start", "superlora linear", "superlora nonlinear", "dense", "dora",
        "dora of columns", "hira",
    ],
)  # fmt: skip
def test_autocast(variant: str) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)
    base = small()
    with autocast:
        free = base(batch())
    model, adapter = attached(variant)
    with autocast:
        assert torch.equal(model(batch()), free)
    stir(adapter)  # outside: autocast remembers what it has cast
    with autocast:
        y = model(batch())
        assert {d.dtype for d in adapter.deltas()} == {torch.float32}
    assert y.dtype == free.dtype
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    # As near to float32's gradients as those of the plain formula under autocast are.
    exact, fine = attached(variant)
    stir(fine)
    expected = passes(exact, fine, batch())
    with autocast:
        plain = by_formula(fine, small(), batch())
    error, error_of_plain = (
        sum(float((gradients[name] - expected[name]).square().sum()) for name in gradients) ** 0.5
        for gradients in (
            {name: p.grad for name, p in adapter.named_parameters()},
            {name: plain[name] for name, _ in adapter.named_parameters()},
        )
    )
    assert error <= 1.5 * error_of_plain


# -- 12: copies, meta, accumulation, checkpointing, compilation ------------------------------------------------


@pytest.mark.law("meta-device")
@pytest.mark.parametrize(
    "variant", ["superlora linear", "pissa", "given start", "svft", "tinylora", "dora", "dora from the base"]
)
def test_on_the_meta_device_nothing_is_allocated(variant: str, tmp_path: Path) -> None:
    life.check_from_meta(small, lambda model: tt.attach(model, VARIANTS[variant]), batch(), tmp_path)


@pytest.mark.slow
@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
@variants
def test_checkpointing_gives_the_same_gradients(variant: str, reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        torch.manual_seed(0)
        model = Model(mode)
        adapter = tt.attach(model, VARIANTS[variant])
        stir(adapter)
        found.append(passes(model, adapter, torch.ones(2, 5, 6), -torch.ones(1, 4, 6)))
    assert_near(found[1], found[0], 1e-5)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Set up torch.distributed with a single process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_with_distributed_data_parallel_is_refused() -> None:
    """In training and without a static graph: what DDP would give then is wrong."""

    def spread(reentrant: bool | None, **settings: bool) -> tuple[nn.Module, tt.Adapter]:
        torch.manual_seed(0)
        model = Model(reentrant)
        adapter = tt.attach(model, P.superlora(3), strategy="weight")
        stir(adapter)
        return nn.parallel.DistributedDataParallel(model, **settings), adapter

    x = torch.randn(2, 5, 6)
    with pytest.raises(RuntimeError, match=r"adapter 'default' is shared by several.*use_reentrant=False, or Distrib"):
        spread(True)[0](x)
    found = []
    for model, adapter in (spread(None), spread(False), spread(True, static_graph=True)):
        run(model, x)  # no training
        found.append(passes(model, adapter, x))
    for other in found[1:]:
        assert_near(other, found[0], 1e-5)
    evaluated, _ = spread(True)
    assert torch.equal(run(evaluated, x), run(evaluated.module, x))


@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@asks_for_grad
@pytest.mark.parametrize(
    ("variant", "strategy"),
    in_depth(
        [
            *((name, "") for name in ("default", "lora", "lorta", "superlora linear", "dense", "many forms")),
            ("superlora nonlinear", ""), ("dora", "weight"), ("dora", "factored"), ("dora", "additive"),
            ("dora of columns", "weight"), ("hira", "weight"), ("hira", "additive"),
        ],
        [("superlora nonlinear", ""), ("dora", "factored")],
    ),
)  # fmt: skip
def test_compiled_whole_is_eager(variant: str, strategy: str) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "targets": ["q_proj", "v_proj"]} if strategy else {}
    model, adapter = attached(variant, **settings)
    stir(adapter)
    for weight in (1.0, 0.5) if strategy else (1.0,):
        adapter.set_weight(weight)
        life.check_compiled(model, adapter, batch())


@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@asks_for_grad
@pytest.mark.parametrize("variant", in_depth(["default", "lora", "superlora linear"], ["default", "superlora linear"]))
def test_a_swap_of_adapters_recompiles_nothing(variant: str) -> None:
    model, a = attached(variant, name="a")
    b = tt.attach(model, VARIANTS[variant], name="b")
    stir(a, seed=1)
    stir(b, seed=2)
    mixes = [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 0.7}]
    eager = []
    for weights in mixes:
        tt.mix(model, weights)
        eager.append(run(model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    program = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = set()
    for weights, want in zip(mixes, eager, strict=True):
        tt.mix(model, weights)
        assert (run(program) - want).abs().max() < 1e-5
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    a.load_arrays({name: array.detach() for name, array in b.arrays().items()})
    a.activate()
    assert (run(program) - eager[1]).abs().max() < 1e-5
    with torch.no_grad():
        next(b.parameters())[0, 0] = float("nan")  # inactive: adds nothing, whatever is in it
    assert (run(program) - eager[1]).abs().max() < 1e-5
    graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1


# -- Several adapters ----------------------------------------------------------------------------------------


def test_mixed_and_merged_adapters() -> None:
    model, a = attached("default", name="a")
    b = tt.attach(model, P.lora(2), name="b", targets="q")
    stir(a, seed=1)
    stir(b, seed=2)
    with pytest.raises(tna.TargetError, match="no adapter 'c' on this model; there are: 'a', 'b'"):
        tt.mix(model, {"c": 1.0})
    with pytest.raises(tna.ConfigError, match="finite"):
        b.set_weight(float("nan"))
    a.activate()
    a.merge()
    with pytest.raises(tna.TargetError, match="merged"):
        b.activate()
    assert (a.weight, b.weight) == (1.0, 0.0)
    with pytest.raises(tna.TargetError, match=r"not active.*activate\(\)"):
        b.merge()
    a.unmerge()
    # Merged one after another, they are unmerged in the other order.
    tt.mix(model, {"a": 1.0, "b": 1.0})
    on, before = run(model), bits(model)
    a.merge()
    b.merge()
    assert (run(model) - on).abs().max() < 1e-5
    with pytest.raises(tna.TargetError, match="by another adapter"):
        a.unmerge()
    b.unmerge()
    a.unmerge()
    assert bits(model) == before


@pytest.mark.parametrize("strategy", ["weight", "factored"])
def test_an_adapter_may_be_changed_after_a_pass_with_gradients(strategy: str) -> None:
    """Only a region that runs again in a backward pass must find it as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = tt.attach(model, P.lora(2), "all-linear", strategy=strategy)
    stir(adapter)
    x = torch.randn(3, 8)
    whole, part = run(model, x), run(model[0], x)
    loss = model(x).sum()
    adapter.set_weight(0.5)
    halved, halved_part = run(model, x), run(model[0], x)
    with adapter.disabled():
        base, base_part = run(model, x), run(model[0], x)
    adapter.set_weight(1.0)
    assert torch.allclose(halved_part, (part + base_part) / 2, atol=1e-6)
    assert not torch.equal(halved, whole)
    assert not torch.equal(halved, base)
    loss.backward()
    assert torch.equal(run(model, x), whole)


# -- Strategies ----------------------------------------------------------------------------------------------


def test_loda_is_a_nonlinearity_between_the_factors() -> None:
    model, adapter = attached("lora", targets=["blocks.1.q_proj"], activation="relu")
    assert torch.equal(run(model), run(small()))
    stir(adapter)
    b, a = (array.detach() for array in adapter.arrays().values())
    expected = small().blocks[1].q_proj(batch()) + torch.relu(batch() @ a) @ b.T
    assert (run(model.blocks[1].q_proj) - expected).abs().max() < 1e-6
    model(batch()).sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())
    for call in (adapter.merge, adapter.deltas, adapter.bake):
        with pytest.raises(tna.ConfigError, match=r"LoDA.*depends on the input"):
            call()


class Rounded(nn.Module):
    """A linear layer of 8-bit integers, as quantization libraries make them, under any name."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        codes = (linear.weight.detach() * 64).round().to(torch.int8)
        if name == "weight":
            self.weight = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer(name, codes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (getattr(self, self.name).to(x.dtype) / 64).T


def test_a_linear_layer_of_another_forward_is_adapted_in_its_weight() -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model = small()
    model.blocks[1].q_proj.__class__ = Halved
    adapter = tt.attach(model, P.lora(2), ["blocks.1.q_proj"])
    assert adapter.strategy == ("weight",)
    stir(adapter)
    on = run(model)
    adapter.merge()
    assert (run(model) - on).abs().max() < 1e-6
    with pytest.raises(tna.ConfigError, match="needs a linear layer, and an update"):
        tt.attach(model, P.lora(2), ["blocks.1.q_proj"], "b", strategy="factored")


@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_a_quantized_weight_is_adapted_beside(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Rounded(nn.Linear(16, 8, bias=False), name)), torch.randn(3, 16)
    base = run(model, x)
    adapter = tt.attach(model, targets="all-linear")
    assert adapter.strategy == ("additive",)
    assert torch.equal(run(model, x), base)
    model(x).sum().backward()
    assert any(p.grad.any() for p in adapter.parameters())
    stir(adapter)
    with pytest.raises(tna.TargetError, match="quantized"):
        adapter.merge()
    with pytest.raises(tna.ConfigError, match="quantized: use 'additive'"):
        tt.attach(model, targets="all-linear", strategy="weight", name="second")
    on = run(model, x)
    adapter.save(tmp_path / "a.safetensors")
    assert tna.load(tmp_path / "a.safetensors").base is None
    adapter.detach()
    assert tt.load(model, tmp_path / "a.safetensors").strategy == ("additive",)
    assert torch.equal(run(model, x), on)


def test_what_accelerate_has_hooked_and_not_offloaded_is_adapted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._hf_hook = object()
    assert tt.attach(model, P.lora(1), "all-linear").num_parameters == 8


def test_arrays_lie_beside_what_a_quantized_layer_has() -> None:
    for parameter in (False, True):
        layer = nn.Linear(4, 4, bias=False)
        del layer.weight
        packed = torch.zeros(2, 4, dtype=torch.int32, device="meta")
        if parameter:
            layer.packed = nn.Parameter(packed, requires_grad=False)
        else:
            layer.register_buffer("packed", packed)
        layer.register_buffer("qweight", packed)
        adapter = tt.attach(nn.Sequential(layer), P.lora(1), "all-linear")
        assert {array.device.type for array in adapter.parameters()} == {"meta"}


@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
def test_a_forward_that_was_put_on_a_layer_before_is_called(strategy: str) -> None:
    """As accelerate puts its own in front of that of the class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    plain, x = model[0].forward, torch.randn(3, 8)
    calls: list[torch.Tensor] = []

    def before(y: torch.Tensor) -> torch.Tensor:
        calls.append(y)
        return plain(2 * y)

    model[0].forward = before
    adapter = tt.attach(model, P.lora(2), "all-linear", strategy=strategy)
    base = run(model, x)
    assert torch.equal(base, plain(2 * x))
    stir(adapter)
    assert not any(torch.equal(changed, base) for changed in (run(model, x), model(x)))
    assert len(calls) == 3
    adapter.detach()
    assert model[0].forward is before


def test_the_summary_has_every_slice_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter = attached("superlora groups", keep_trainable="head")
    assert ", attached, weight 1>" in repr(adapter)
    with adapter.disabled():
        assert ", disabled, weight 1>" in repr(adapter)
    summary = adapter.summary()
    assert capsys.readouterr() == ("", "")
    assert len(summary.rows) == 10
    total = sum(stop - start for row in summary.rows for _, start, stop in row.slices)
    assert total == summary.adapted == adapter.plan.size
    assert summary.kept == 16 * 3 + 3
    assert summary.base == sum(p.numel() for p in small().parameters())
    assert re.search(r"^blocks\.1\.v_proj\.weight +v +8×16 +\d\[\d+:\d+\]", str(summary), flags=re.MULTILINE)
    assert " + " in str(summary)  # a weight that straddles groups
    assert f"{adapter.num_parameters:,} parameters in 4 groups" in str(summary)
    assert "51 of the model kept trainable" in str(summary)


def test_a_summary_of_many_layers_has_a_line_for_those_that_are_alike() -> None:
    model = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4)}) for _ in range(12)])
    summary = tt.attach(model, "lora", rank=2).summary()
    assert len(summary.rows) == 24
    assert [line.split() for line in str(summary).splitlines()[2:4]] == [
        ["12", "×", "{0-11}.q_proj.weight", "q", "8×8", "0[0:64]", "…", "22[0:64]", "factored"],
        ["12", "×", "{0-11}.v_proj.weight", "v", "4×8", "1[0:32]", "…", "23[0:32]", "factored"],
    ]


@pytest.mark.law("no-target")
def test_shapes_of_other_arrays_are_refused_and_change_nothing() -> None:
    _, adapter = attached()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for arrays in ({}, {"a": np.zeros(3)}, {name: np.zeros((1, 1)) for name in before}):
        with pytest.raises(tna.ShapeError, match="needs arrays named and shaped"):
            adapter.load_arrays(arrays)
    with pytest.raises(tna.ConfigError, match=r"arrays must be a mapping of strings; got \[1\]"):
        adapter.load_arrays([1])  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_a_fold_that_would_cut_through_grouped_queries_is_refused() -> None:
    model = nn.Sequential(Separate(), Separate())
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(tna.ConfigError, match=r'2 of 16×16, 2 of 8×16.*Use groups="role", one group of all queries'):
        tt.attach(model, tna.presets.lotr(2, weights=4, rows=16, cols=16))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
    for role, rows in (("q", 16), ("v", 8)):
        adapter = tt.attach(model, tna.presets.lotr(2, weights=2, rows=rows, cols=16), role, name=role)
        assert [target.shape for target in adapter.targets] == [(rows, 16)] * 2
