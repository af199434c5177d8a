"""The sum of stacked matrices and their updates: one copy of the stack, equal to the operations on the whole stack."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.torch._forward_pass import ColumnDropout, delta
from tnadapt.torch._forward_patch import stacked_sum, summed_matrices

from .small import stir

P = tna.presets
CONFIGS = [P.lora(1), P.superlora(2), P.dense(), P.lokr(1)]


class Experts(nn.Module):
    """Every row of x goes through every expert."""

    def __init__(self, count: int, out: int, cols: int, transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        sizes = (count, cols, out) if transposed else (count, out, cols)
        self.down_proj = nn.Parameter(torch.randn(sizes, generator=made).to(dtype))
        self.is_transposed, self.is_concatenated = transposed, True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.down_proj if self.is_transposed else self.down_proj.mT
        return torch.matmul(x, weight).sum(0)


@st.composite
def adapted(draw: st.DrawFn) -> tuple[Experts, list[tt.Adapter]]:
    count, out, cols = draw(st.integers(1, 5)), draw(st.integers(2, 6)), draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    module = Experts(count, out, cols, draw(st.booleans()), dtype)
    every = tt.find_targets(module, "all-linear")
    assert len(every) == count
    adapters = []
    for number in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        if draw(st.booleans()):
            half = tna.Rows(0, 1, out)
            chosen = [tna.Target(**{**_fields(target), "rows": half}) for target in chosen]
        adapters.append(tt.attach(module, draw(st.sampled_from(CONFIGS)), chosen, f"a{number}"))
        stir(adapters[-1], 0.3, number)
        adapters[-1].set_weight(draw(st.sampled_from([1.0, 0.5])))
    return module, adapters


def _fields(target: tna.Target) -> dict[str, object]:
    return {name: getattr(target, name) for name in ("module", "stored", "role", "parameter", "transposed", "index")}


@given(adapted())
def test_it_is_the_sum_of_the_whole_stack(given: tuple[Experts, list[tt.Adapter]]) -> None:
    module, adapters = given
    slots = [slot for adapter in adapters for slot in adapter._state.slots]
    found = summed_matrices(module.down_proj, slots, ColumnDropout(module))
    plain = stacked_sum(module.down_proj, [(slot.target, delta(slot)) for slot in slots])
    assert found.dtype == plain.dtype == module.down_proj.dtype
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(summed_matrices(module.down_proj, slots, ColumnDropout(module)), found)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    arrays = [parameter for adapter in adapters for parameter in adapter.parameters()]
    ours = torch.autograd.grad(found, arrays, gradient)
    for one, other in zip(ours, torch.autograd.grad(plain, arrays, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_other_matrices_keep_their_bits_and_the_parameter_too() -> None:
    module = Experts(4, 6, 3, False)
    before = module.down_proj.detach().clone()
    targets = tt.find_targets(module, "all-linear")
    adapter = tt.attach(module, P.dense(), [targets[2]])
    stir(adapter, 0.3)
    found = summed_matrices(module.down_proj, adapter._state.slots, ColumnDropout(module))
    assert torch.equal(found[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(found[2], before[2])
    assert torch.equal(module.down_proj, before)
    assert set(module.__dict__).isdisjoint({"down_proj"})


def test_one_copy_of_the_stack_is_made_however_many_experts_there_are() -> None:
    module = Experts(32, 64, 64, False)
    adapter = tt.attach(module, P.lora(1), "all-linear")
    stir(adapter)
    x = torch.randn(2, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(x).sum().backward()
    size = module.down_proj.numel() * 4
    large = [event for event in profile.events() if event.self_cpu_memory_usage >= size]
    # The copy, and in backward the gradients of the product and of the sum; none of them once for each expert.
    assert 1 <= len(large) <= 6


def test_a_compiled_module_computes_the_same() -> None:
    module = Experts(3, 4, 5, True)
    adapter = tt.attach(module, P.lora(1), "all-linear")
    stir(adapter, 0.3)
    x = torch.randn(2, 5)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_and_dropout() -> None:
    module = Experts(3, 4, 3, True)
    adapter = tt.attach(module, P.lora(1), "all-linear", dropout=0.5)
    stir(adapter, 0.3)
    x = torch.randn(2, 3)
    module.eval()
    arrays = list(adapter.parameters())
    first = torch.autograd.grad(module(x).square().sum(), arrays, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), arrays)
    assert all(torch.isfinite(one).all() and one.abs().sum() > 0 for one in second)
    torch.manual_seed(0)
    module.train()
    outputs = torch.stack([module(x).detach() for _ in range(400)])
    expected = module.eval()(x).detach()
    torch.testing.assert_close(outputs.mean(0), expected, rtol=0, atol=6 * float(outputs.std(0).max()) / 400**0.5)
    assert outputs.std(0).min() > 0
