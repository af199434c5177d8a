"""Starts on torch models: every strategy begins at the base's bits, learns, and is PEFT's own PiSSA and OLoRA."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from . import life
from .interrupts import PACKAGE, interrupted, moments
from .life import asks_for_grad, assert_near, by_formula, passes
from .loops import snapshot
from .small import compiles_whole, stir

LEFT, RIGHT = "group0.split0.factor0", "group0.split0.factor1"


def model(dtype: Any = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)).eval()
    return made.to(dtype or torch.float32)


def batch(seed: int = 1) -> Any:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))


def arrays_of(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: 0.3 * rng.normal(size=shape) for name, shape in plan.array_shapes.items()}


def attached(config: tna.Config, base: Any = None, **settings: Any) -> tuple[Any, tt.Adapter]:
    base = model() if base is None else base
    adapter = tt.attach(base, config, "all-linear", **settings)
    if adapter.plan.point.brought:
        adapter.start_from(arrays_of(adapter.plan))
    return base, adapter


def train(base: Any, adapter: tt.Adapter, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        base(batch()).square().sum().backward()
        optimizer.step()


TORCH = PACKAGE + "torch"

CONFIGS = {
    "lora": P.lora(3, alpha=5, start="given"),
    "pissa": P.lora(3, alpha=5, start="pissa"),
    "milora": P.lora(3, alpha=5, start="milora"),
    "olora": P.lora(3, alpha=5, start="olora"),
    "loha": P.loha(2, start="given"),
    "lokr": P.lokr(2, start="given"),
    "superlora": P.superlora(2, start="given"),
    "linear": P.superlora(2, projection="linear", ratio=0.5, start="given"),
    "nonlinear": P.superlora(2, projection="nonlinear", start="given"),
    "θ": P.unilora(9, rank=2, start="given"),
    "θ, pissa": P.unilora(9, rank=2, start="pissa"),
    "vera": P.vera(3, start="given"),
}
FACTORED = ("lora", "pissa", "milora", "olora", "loha", "lokr", "θ", "θ, pissa", "vera")
CASES = [
    (name, how)
    for name in CONFIGS
    for how in ("weight", "additive", "factored")
    if how != "factored" or name in FACTORED
]


# -- The start ---------------------------------------------------------------------------------------------


@pytest.mark.law(
    "fresh-is-zero", "first-gradients", "array-changes", "copies", "file-round-trip", "merge-disk-is-memory"
)
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_life_of_an_adapter(name: str, strategy: str, tmp_path: Path) -> None:
    life.check_life(model, lambda base: attached(CONFIGS[name], base, strategy=strategy)[1], batch(), tmp_path)


@pytest.mark.law("fresh-is-zero", "first-gradients", "attached-is-update", "derivatives-of-presets")
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_every_strategy_begins_at_the_base_in_other_dtypes_and_is_the_sum(name: str, strategy: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        base, adapter = attached(CONFIGS[name], strategy=strategy, dtype=dtype)
        plain, x = model()(batch()), batch()
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(base(x), plain)
        assert not any(bool(delta.any()) for delta in adapter.deltas())
        train(base, adapter)
        assert not torch.allclose(base(x), plain, atol=1e-4)
    base, adapter = attached(CONFIGS[name], model(torch.float64), strategy=strategy, dtype=torch.float64)
    stir(adapter, 0.1)
    x = batch().double()
    assert_near(passes(base, adapter, x), by_formula(adapter, model(torch.float64), x), 1e-10)


@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@asks_for_grad
@pytest.mark.parametrize(
    ("name", "strategy"), [("lora", "weight"), ("lora", "factored"), ("pissa", "auto"), ("linear", "weight")]
)
def test_compiled(name: str, strategy: str) -> None:
    base, adapter = attached(CONFIGS[name], strategy=strategy)
    torch._dynamo.reset()
    program = torch.compile(base, fullgraph=True, backend="aot_eager")
    assert torch.equal(program(batch()), model()(batch()))
    if adapter.plan.point.brought:  # another start takes effect
        adapter.start_from(arrays_of(adapter.plan, 5))
        assert torch.equal(program(batch()), model()(batch()))
    train(base, adapter)
    assert_near(passes(program, adapter, batch()), passes(base, adapter, batch()), 1e-5)


# -- start_from --------------------------------------------------------------------------------------------


@pytest.mark.law("array-changes")
def test_a_fresh_adapter_can_start_elsewhere_and_no_other() -> None:
    base, adapter = attached(CONFIGS["lora"])
    other = copy.deepcopy(base)
    adapter.start_from(arrays_of(adapter.plan, 3))
    adapter.start_from({RIGHT: torch.full((12, 3), 0.5, dtype=torch.bfloat16, requires_grad=True)})
    assert not adapter.arrays()[LEFT].any()
    assert bool((adapter.arrays()[RIGHT] == 0.5).all())
    assert torch.equal(base(batch()), model()(batch()))
    # The copy has its own start.
    (copied,) = tt.adapters(other).values()
    assert copied.plan.given.keys() == {f"start.{name}" for name in copied.plan.param_shapes}
    assert torch.equal(other(batch()), model()(batch()))
    train(base, adapter, 1)
    before, y = snapshot(adapter), base(batch())
    with pytest.raises(
        tna.ConfigError, match=r"'default' has been trained or loaded, and another start .* call reset\(\)"
    ):
        adapter.start_from(arrays_of(adapter.plan, 3))
    assert all(torch.equal(before[name], array) for name, array in adapter.arrays().items())
    assert torch.equal(base(batch()), y)
    adapter.reset()
    adapter.start_from({RIGHT: torch.ones(12, 3)})
    assert torch.equal(base(batch()), model()(batch()))
    # LoRA+ finds the array that is zero; where there is none, all are slow.
    assert [group["lr"] for group in adapter.parameter_groups(1e-3)] == [1e-3, 16e-3]
    subset = attached(CONFIGS["pissa"])[1]
    subset.set_trainable(arrays="factor0")
    assert [group["lr"] for group in subset.parameter_groups(1e-3)] == [1e-3]


def test_what_start_from_refuses() -> None:
    base, adapter = attached(CONFIGS["lora"])
    arrays, usual = arrays_of(adapter.plan), tt.attach(model(), P.lora(2), "all-linear")
    with torch.device("meta"):
        empty = tt.attach(model(), CONFIGS["lora"], "all-linear")
    refused: list[tuple[tt.Adapter, Any, str]] = [
        (usual, arrays, r"need Config\(start='given'\); the config has start='zero'"),
        (adapter, {"factor0": arrays[LEFT]}, "start_from names 'factor0'"),
        (adapter, [arrays], "arrays must be a mapping of strings; got "),
        (
            adapter,
            {name: 0.0 * array for name, array in arrays.items()},
            r"more than one array .* in groups 0, 1: nothing would learn. Start",
        ),
        (empty, arrays, r"is on the meta device: .* call reset\(\) before start_from"),
    ]
    for refusing, given, message in refused:
        with pytest.raises(tna.ConfigError, match=message):
            refusing.start_from(given)
    with pytest.warns(
        UserWarning, match=r"the gradient of every trained array is zero.* in groups 0\. Start one of them"
    ):
        adapter.start_from({LEFT: 0.0 * arrays[LEFT], RIGHT: 0.0 * arrays[RIGHT]})
    adapter.merge()
    with pytest.raises(tna.TargetError, match=r"is merged, and start_from\(\) needs it unmerged"):
        adapter.start_from(arrays)
    adapter.unmerge()
    adapter.detach()
    with pytest.raises(tna.TargetError, match="no longer attached"):
        adapter.start_from(arrays)
    assert torch.equal(base(batch()), model()(batch()))


@pytest.mark.law("interrupted-change")
@pytest.mark.parametrize("name", ["lora", "loha"])
def test_an_interrupted_start_changes_nothing_or_all(name: str) -> None:
    adapter = attached(CONFIGS[name])[1]
    start = arrays_of(adapter.plan, 3)
    for stop in moments(lambda: adapter.start_from(start), TORCH):  # noqa: B023
        base, adapter = attached(CONFIGS[name], strategy="factored" if name == "lora" else "auto")
        before, plan = snapshot(adapter), adapter.plan
        interrupted(lambda adapter=adapter: adapter.start_from(start), stop, TORCH)
        after = before if adapter.plan is plan else {key: torch.tensor(array).float() for key, array in start.items()}
        assert all(torch.equal(after[key], array) for key, array in adapter.arrays().items())
        assert torch.equal(base(batch()), model()(batch()))


def test_a_file_of_another_start_is_not_swapped_in(tmp_path: Path) -> None:
    base, adapter = attached(CONFIGS["lora"])
    train(base, adapter)
    other = tt.attach(model(), CONFIGS["lora"], "all-linear")
    other.save(tmp_path / "other.safetensors")  # nothing is brought
    adapter.save(tmp_path / "adapter.safetensors")
    for swapped, path in ((adapter, "other"), (other, "adapter")):
        with pytest.raises(tna.FileError, match=r"its frozen array 'start\..*' differs from that of adapter 'default'"):
            swapped.swap(tmp_path / f"{path}.safetensors")
    with pytest.raises(tna.ConfigError, match="has been trained or loaded"):
        tt.load(model(), tmp_path / "adapter.safetensors").start_from(arrays_of(adapter.plan))


# -- PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.law("peft-agrees")
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
@pytest.mark.parametrize(("start", "alpha"), [("pissa", 4), ("pissa", 10), ("olora", 4)])
def test_pissa_and_olora_are_pefts(start: str, alpha: float, strategy: str, steps: int) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model(), config)
    base, adapter = attached(P.lora(4, alpha=alpha, start=start), strategy=strategy)
    outputs = []
    for whole in (theirs, base):
        optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
        for step in range(steps + 1):
            optimizer.zero_grad()
            output = whole(batch())
            output.square().sum().backward()
            if step < steps:
                optimizer.step()
        outputs.append(output.detach())
    assert torch.allclose(*outputs, atol=1e-5)
    arrays = dict(adapter.named_parameters())
    for group, layer in enumerate((theirs.base_model.model[0], theirs.base_model.model[2])):
        pairs = [
            (layer.lora_B["default"].weight, f"group{group}.split0.factor0", False),
            (layer.lora_A["default"].weight, f"group{group}.split0.factor1", True),
        ]
        for weight, name, turned in pairs:
            value, gradient = (t.T if turned else t for t in (weight.detach(), weight.grad))
            # The sign of a pair of vectors is LAPACK's choice there.
            signs = torch.sign((value * arrays[name]).sum(0).detach())
            assert torch.allclose(value * signs, arrays[name], atol=2e-5)
            assert torch.allclose(gradient * signs, arrays[name].grad, atol=1e-4 * gradient.abs().max().item())


def test_the_plugin_of_peft_takes_no_given_start() -> None:
    pytest.importorskip("peft")
    import tnadapt.torch.peft as plugin

    plugin.register()
    with pytest.raises(
        tna.ConfigError, match="start='given' stores its start, and PEFT's files hold the trained arrays"
    ):
        plugin.TnadaptConfig(preset="lora", settings={"rank": 3, "start": "given"}, target_modules=["0", "2"])


@pytest.mark.law("peft-agrees", "foreign-files")
def test_peft_loads_the_export(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Tanh(), torch.nn.Linear(20, 16)).eval()
    plain = copy.deepcopy(base)
    adapter = tt.attach(base, P.lora(2, alpha=4, start="pissa"), "all-linear")
    adapter.load_arrays({n: p.detach() + 0.1 * torch.ones_like(p) for n, p in adapter.named_parameters()})
    adapter.save(tmp_path / "a.safetensors", store_bases=True)
    conversion = tna.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft-lora")
    assert conversion.exact
    assert conversion.config is not None
    assert conversion.config["r"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    x = torch.randn(3, 24)
    assert torch.allclose(theirs(x), base(x), atol=1e-5)
