"""Laws of an attached adapter, over every way to make a group, fold and projection."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.torch.small import batch, small, stir

from .grid import config_of, every_group, everything_in_depth

pytestmark = pytest.mark.slow

HALVES = ["bfloat16", "float16"]


def attached(kind: str, fold: str, projection: str, dtype: str = "float32") -> tuple[nn.Module, tt.Adapter]:
    model = small().to(getattr(torch, dtype))
    return model, tt.attach(model, config_of(kind, fold, projection))


def run(model: nn.Module, dtype: str = "float32") -> Tensor:
    with torch.no_grad():
        return model(batch().to(getattr(torch, dtype)))


def base(dtype: str = "float32") -> nn.Module:
    return small().to(getattr(torch, dtype))


def same_bits(model: nn.Module, other: nn.Module) -> bool:
    """Of the base's own parameters and buffers."""
    one, two = (
        {name: tensor for name, tensor in some.state_dict().items() if not name.startswith("tnadapt_")}
        for some in (model, other)
    )
    return one.keys() == two.keys() and all(
        torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)) for name, tensor in one.items()
    )


@pytest.mark.law("fresh-is-zero", "half-precision-base")
@every_group
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_fresh_adapter_changes_no_bit_and_is_float32(kind: str, fold: str, projection: str, dtype: str) -> None:
    model, adapter = attached(kind, fold, projection, dtype)
    assert torch.equal(run(model, dtype), run(base(dtype), dtype))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.law("first-gradients", "base-is-constant")
@every_group
def test_every_group_learns_at_once_and_the_base_never(kind: str, fold: str, projection: str) -> None:
    """What starts from zero at the first step, or where nothing does all; what waited for it at the second."""
    model, adapter = attached(kind, fold, projection)
    zero = {name for name, parameter in adapter.named_parameters() if not parameter.any()}
    assert bool(zero) != projection.startswith("nonlinear")
    learnt: list[set[str]] = []
    for _ in range(2):
        model.zero_grad()
        model(batch()).square().sum().backward()
        learnt += [{name for name, parameter in adapter.named_parameters() if parameter.grad.any()}]
        torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    every = {name for name, _ in adapter.named_parameters()}
    assert learnt[0] >= (zero or every)
    for group in range(adapter.plan.num_groups):
        assert any(f"group{group}." in f"{name}." for name in learnt[0])
    assert learnt[1] == every
    assert same_bits(model, small())
    assert not torch.equal(run(model), run(small()))


@pytest.mark.law("merge-is-attached", "merge-exact-undo")
@every_group
def test_merged_is_attached_and_unmerged_is_the_base(kind: str, fold: str, projection: str) -> None:
    model, adapter = attached(kind, fold, projection)
    stir(adapter)
    on = run(model)
    for _ in range(3):
        adapter.merge()
        assert not same_bits(model, small())
        assert (run(model) - on).abs().max() < 1e-5 * max(1.0, float(on.abs().max()))
        adapter.unmerge()
        assert same_bits(model, small())
    assert torch.equal(run(model), on)


@pytest.mark.law("members-alone")
@every_group
def test_members_are_the_adapter_alone(kind: str, fold: str, projection: str) -> None:
    model, config = base("float64"), config_of(kind, fold, projection)
    population = tt.attach(model, config, population=3, dtype="float64")
    stir(population)
    reference = base("float64")
    alone = tt.attach(reference, config, dtype="float64")
    x, index = batch().double(), [2, 0, 2]
    with population.members(index):
        y = model(x)
    y.square().sum().backward()
    expected = [torch.zeros_like(parameter) for parameter in population.parameters()]
    for row, number in enumerate(index):
        alone.load_arrays(population[number].arrays())
        reference.zero_grad()
        own = reference(x[row : row + 1])
        own.square().sum().backward()
        torch.testing.assert_close(y[row : row + 1], own, rtol=1e-10, atol=1e-10)
        for total, parameter in zip(expected, alone.parameters(), strict=True):
            total[number] += parameter.grad
    for parameter, total in zip(population.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-10 * float(total.abs().max()))


@pytest.mark.law("disabled", "detach")
@every_group
def test_disabled_and_detached_are_the_base(kind: str, fold: str, projection: str) -> None:
    model, adapter = attached(kind, fold, projection)
    stir(adapter)
    on, off = run(model), run(small())
    assert not torch.equal(on, off)
    with contextlib.suppress(ZeroDivisionError), adapter.disabled():
        assert torch.equal(run(model), off)
        raise ZeroDivisionError
    assert torch.equal(run(model), on)
    adapter.detach()
    assert torch.equal(run(model), off)
    assert list(model.state_dict()) == list(small().state_dict())


@pytest.mark.law("copies")
@every_group
def test_copies_are_equal_and_independent(kind: str, fold: str, projection: str) -> None:
    model, adapter = attached(kind, fold, projection)
    stir(adapter)
    on = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), on)
    stir(adapter, seed=5)
    assert not torch.equal(run(model), on)
    assert torch.equal(run(twin), on)


@pytest.mark.law("file-round-trip", "file-bytes")
@every_group
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, kind: str, fold: str, projection: str) -> None:
    model, adapter = attached(kind, fold, projection)
    stir(adapter)
    adapter.save(tmp_path / "adapter")
    other = small()
    tt.load(other, tmp_path / "adapter").save(tmp_path / "again")
    assert torch.equal(run(other), run(model))
    assert (tmp_path / "adapter").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.law("meta-device")
@every_group
def test_on_the_meta_device_nothing_is_allocated(kind: str, fold: str, projection: str) -> None:
    with torch.device("meta"):
        model = small()
    adapter = tt.attach(model, config_of(kind, fold, projection))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert adapter.num_parameters == sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.law("derivatives-of-presets", "derivatives-of-projections")
@everything_in_depth
def test_first_and_second_derivatives_are_finite_differences(kind: str, fold: str, projection: str) -> None:
    plan = tna.UpdatePlan(config_of(kind, fold, projection), [(4, 3), (2, 6)])
    made = torch.Generator().manual_seed(3)
    arrays = tuple(
        torch.randn(shape, dtype=torch.float64, generator=made).requires_grad_() for shape in plan.param_shapes.values()
    )

    def update(*some: Tensor) -> Tensor:
        return plan.vector(dict(zip(plan.param_shapes, some, strict=True)))

    assert torch.autograd.gradcheck(update, arrays, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *some: update(*some).square(), arrays, atol=1e-4, fast_mode=True)
