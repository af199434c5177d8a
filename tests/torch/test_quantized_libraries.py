"""Layers of bitsandbytes, torchao, quanto and HQQ: found, adapted, trained, saved, loaded, merged into and restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .quantized_models import KINDS, OUT, SIZE, equal, model, numbers, plain, values
from .small import stir

pytestmark = [
    pytest.mark.slow,
    # The libraries' own calls of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Outputs of HQQ's layers have gradients even where nothing is trained.
    pytest.mark.filterwarnings("ignore:adapter .* is merged, so training:UserWarning"),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def batch() -> Any:
    return torch.randn(16, SIZE, generator=torch.Generator().manual_seed(3))


def moved(adapter: Any, size: float = 0.05) -> Any:
    """Return the adapter as if it had been trained."""
    stir(adapter, size, 5)
    return adapter


def of_numbers(made: Any) -> Any:
    """Return the model of the numbers that the quantized weights stand for."""
    found = plain()
    with torch.no_grad():
        for place in (0, 2):
            found[place].weight.copy_(numbers(made[place]))
    return found


@kinds
@pytest.mark.parametrize(
    "config",
    [P.lora(4), P.superlora(2), P.hira(4), P.dora(4), P.lora_xs(4), P.tinylora(4), P.lora(4, start="pissa")],
    ids=["lora", "all", "hira", "dora", "xs", "tiny", "pissa"],
)
def test_outputs_and_gradients_are_those_of_the_numbers(kind: str, config: tna.Config) -> None:
    made = model(kind)
    adapter, like = tt.attach(made, config, "all-linear"), of_numbers(made)
    assert set(adapter.strategy) <= {"factored", "additive"}
    reference = tt.attach(like, config, "all-linear")
    # Also what is computed from the base is computed from its numbers.
    assert all(torch.equal(array, reference.arrays()[name]) for name, array in adapter.arrays().items())
    reference.load_arrays(moved(adapter).arrays())
    x, grad = batch(), torch.randn(16, OUT, generator=torch.Generator().manual_seed(4))
    tolerance = 1e-5 if KINDS[kind].exact else 0.03
    found, expected = (
        [m(x), *torch.autograd.grad(m(x), list(a.parameters()), grad)] for m, a in ((made, adapter), (like, reference))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.norm(one - other) <= tolerance * torch.linalg.norm(other)


@kinds
def test_merged_saved_loaded_and_baked(kind: str, tmp_path: Path) -> None:
    made, x = model(kind), batch()
    names = set(made.state_dict())
    first = made(x).detach()
    with pytest.raises(tna.ConfigError, match=r"strategy='weight' cannot add to 0\.weight, which is quantized"):
        tt.attach(made, P.lora(4), "all-linear", strategy="weight")
    adapter = moved(tt.attach(made, P.lora(4), "all-linear"), 0.1)
    before, base = values(made), [numbers(made[place]).clone() for place in (0, 2)]
    attached = made(x).detach()
    updates = [update.detach() for update in adapter.deltas()]
    adapter.save(tmp_path / "a.safetensors")
    assert adapter.merge_report is None
    adapter.merge()
    report = adapter.merge_report
    assert report is not None
    assert [row.name for row in report] == ["0.weight", "2.weight"]
    for row, place, old, update in zip(report, (0, 2), base, updates, strict=True):
        off = torch.linalg.norm(numbers(made[place]) - (old + update))
        assert row.update_error == pytest.approx(float(off / torch.linalg.norm(update)), rel=1e-3)
        assert 0.5 < row.kept < 1.5
    merged = made(x).detach()
    assert torch.linalg.norm(merged - attached) < torch.linalg.norm(first - attached)
    assert not equal(values(made), before)
    with adapter.disabled():
        assert equal(values(made), before)
        assert torch.equal(made(x), first)
    assert torch.equal(made(x), merged)
    adapter.save(tmp_path / "merged.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "merged.safetensors").read_bytes()
    adapter.unmerge()
    assert equal(values(made), before)
    assert torch.equal(made(x).detach(), attached)
    # The file knows its base.
    again = model(kind)
    loaded = tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), attached)
    loaded.swap(tmp_path / "a.safetensors")
    # Baked, it leaves no trace.
    assert adapter.bake() is made
    assert torch.equal(made(x).detach(), merged)
    assert set(made.state_dict()) == names
    assert not any(hasattr(module, "_tnadapt_adapters") for module in made.modules())
    assert adapter.merge_report is not None
    loaded.detach()
    other = tt.attach(again, P.dense(), "all-linear")
    other.load_arrays({name: torch.full(shape, 0.1) for name, shape in other.plan.param_shapes.items()})
    other.bake()
    with pytest.raises(tna.FileError, match="another base"):
        tt.load(again, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("kind", "config", "dtype"),
    [
        # Changes that are no sums, and a base in bfloat16.
        *((kind, config, torch.float32) for kind in KINDS for config in (P.hira(4), P.dora(4))),
        *((kind, P.lora(4), torch.bfloat16) for kind in ("bitsandbytes nf4", "torchao int8", "quanto int8")),
    ],
)
def test_changes_that_are_no_sums_and_half_precision_are_merged(kind: str, config: tna.Config, dtype: Any) -> None:
    made, x = model(kind, dtype), batch().to(dtype)
    first, before = made(x).detach(), values(made)
    adapter = moved(tt.attach(made, config, "all-linear"), 0.4 if dtype is torch.float32 else 0.05)
    attached = made(x).detach()
    adapter.merge()
    off = torch.linalg.norm(made(x) - attached)
    assert off < (torch.linalg.norm(first - attached) if dtype is torch.float32 else 0.2 * torch.linalg.norm(attached))
    adapter.unmerge()
    assert equal(values(made), before)
    assert torch.equal(made(x).detach(), attached)


@pytest.mark.parametrize("kind", [kind for kind, one in KINDS.items() if one.copies])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_work_on_their_own(kind: str, merged: bool) -> None:
    made, x = model(kind), batch()
    adapter = moved(tt.attach(made, P.lora(4), "all-linear"))
    before, attached = values(made), made(x).detach()
    if merged:
        adapter.merge()
    other = copy.deepcopy(made)
    again = tt.adapters(other)["default"]
    if merged:
        assert torch.equal(other(x), made(x))
        again.unmerge()
        assert equal(values(other), before)
        assert not equal(values(made), before)
        adapter.unmerge()
    assert torch.equal(other(x).detach(), attached)
    again.merge()
    assert torch.equal(made(x).detach(), attached)


def test_an_update_that_nf4_cannot_show_vanishes() -> None:
    made = model("bitsandbytes nf4")
    adapter = moved(tt.attach(made, P.lora(4), "all-linear"), 1e-3)
    adapter.merge()
    report = adapter.merge_report
    assert report is not None
    assert max(row.kept for row in report) < 0.1
    assert max(row.error for row in report) < 0.01  # relative to W, the merge looks good
    adapter.unmerge()
    with pytest.raises(tna.TargetError, match=r"off by .* of the update's norm, more than max_error=0\.5; no weight"):
        adapter.merge(max_error=0.5)
    assert not adapter.merged


def test_the_input_of_a_layer_that_rounds_it_has_a_gradient() -> None:
    made = model("torchao int8 dynamic")
    with pytest.warns(UserWarning, match=r"1 layers pass no gradient to their input.* \(2, …\)"):
        adapter = tt.attach(made, P.lora(4), ["0.weight"])
    adapter.detach()
    adapter = moved(tt.attach(made, P.lora(4), "all-linear"))
    x = batch().requires_grad_()
    (found,) = torch.autograd.grad(made(x).sum(), x)
    like = of_numbers(made)
    tt.attach(like, P.lora(4), "all-linear").load_arrays(adapter.arrays())
    (expected,) = torch.autograd.grad(like(x).sum(), x)
    assert torch.linalg.norm(found - expected) < 0.03 * torch.linalg.norm(expected)


def test_nf4_layers_that_an_evaluation_repacks() -> None:
    """On a CPU with AVX-512 BF16 bitsandbytes repacks them for good, for a kernel without a backward."""
    made, x = model("bitsandbytes nf4, double"), batch()
    flags = [getattr(made[place], "support_avx512bf16_for_cpu", None) for place in (0, 2)]
    adapter = moved(tt.attach(made, P.lora(4), ["2.weight"]))
    base = numbers(made[0]).clone()
    with torch.no_grad():
        made.eval()(x)
    assert torch.equal(numbers(made[0]), base)
    made.train()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    adapter.detach()
    assert [getattr(made[place], "support_avx512bf16_for_cpu", None) for place in (0, 2)] == flags
    # Those that were repacked are read.
    made = model("bitsandbytes nf4")
    base = numbers(made[0]).clone()
    with torch.no_grad():
        made.eval()(batch())
    # The scales are rounded to bfloat16 where the CPU has the kernel, and nothing has happened elsewhere.
    assert torch.allclose(numbers(made[0]), base, rtol=0.01)
    adapter = moved(tt.attach(made, P.lora(4), "all-linear"))
    before = values(made)
    adapter.merge()
    adapter.unmerge()
    assert equal(values(made), before)


@pytest.mark.filterwarnings("ignore:1 layers pass no gradient:UserWarning")
@kinds
def test_rows_that_no_update_changes_keep_their_numbers(kind: str) -> None:
    made = model(kind)
    before = numbers(made[2])
    target = tna.Target("2", (OUT, SIZE), rows=tna.RowIndices((3, 40)))
    adapter = moved(tt.attach(made, P.dense(), [target]), 0.5)
    adapter.merge()
    after = numbers(made[2])
    others = [row for row in range(OUT) if row not in (3, 40)]
    assert (after[[3, 40]] != before[[3, 40]]).any()
    off = float((after - before)[others].norm() / before[others].norm())
    # Rows share scales, or scales of scales, or HQQ fits them; elsewhere they are kept, or rounded to the same.
    assert off < (0.1 if any(word in kind for word in ("one scale", "double", "hqq")) else 1e-6)
