"""The update with autograd: a single node that saves only the arrays."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.backends import load_backend
from tnadapt.testing.strategies import plans

from .internals import pieces, vector

P = tna.presets


def moved(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    arrays = plan.init("torch", "float64")
    return {n: (a + 0.3 * torch.randn(a.shape, generator=made).double()).requires_grad_() for n, a in arrays.items()}


def scattered(projection: str, *groups: list[int]) -> tna.UpdatePlan:
    """Groups of weights that do not follow each other."""
    shapes = [(5, 4), (3, 4), (2, 4), (6, 4), (4, 4), (1, 4)]
    return tna.UpdatePlan(P.superlora(2, groups=groups, projection=projection), shapes)


@given(plans(), st.integers(0, 100))
@example(scattered("shuffle", [0, 2, 3, 5], [1, 4]), 0)
@example(scattered("linear", [0, 2, 3, 5], [1, 4]), 0)
@example(scattered("linear_v2", [5, 1, 2], [0, 4, 3]), 0)
@example(scattered("nonlinear", [5, 1, 2], [0, 4, 3]), 0)
def test_the_node_is_its_reference_implementation(plan: tna.UpdatePlan, seed: int) -> None:
    plan = plan.arrays_plan  # the node is that of the updates, of which magnitudes are no part
    arrays = moved(plan, seed)
    weights = torch.randn(plan.size, generator=torch.Generator().manual_seed(seed)).double()
    duplicate = {name: array.detach().clone().requires_grad_() for name, array in arrays.items()}
    found, plain = vector(plan, arrays), torch.cat([d.reshape(-1) for d in plan.deltas(duplicate)])
    assert torch.allclose(found, plain, rtol=1e-12, atol=1e-12)
    for _ in range(2):  # the same node twice, without retain_graph
        (found * weights).sum().backward()
    (plain * weights).sum().backward()
    for name, array in arrays.items():
        scale = float(duplicate[name].grad.abs().max()) + 1.0
        assert float((array.grad - 2 * duplicate[name].grad).abs().max()) <= 1e-12 * scale


@given(plans(projections=("linear", "linear_v2", "nonlinear", "shuffle")), st.integers(0, 100))
def test_groups_in_one_call_have_the_same_bits(plan: tna.UpdatePlan, seed: int) -> None:
    plan, made = plan.arrays_plan, dict[int, list[torch.Tensor]]()
    weights = torch.randn(plan.size, generator=torch.Generator().manual_seed(seed)).double()
    for limit in (0, 1 << 20):
        arrays = moved(plan, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load_backend("torch"), "at_once", lambda x, limit=limit: limit)
            update = vector(plan, arrays)
            made[limit] = [update, *torch.autograd.grad((update * weights).sum(), list(arrays.values()))]
    assert all(map(torch.equal, *made.values()))


def test_a_checkpointed_region_saves_nothing_for_the_update() -> None:
    plan = tna.UpdatePlan(P.superlora(2), [(8, 8)])
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = pieces(plan, vector(plan, moved(plan)))
    assert saved == []
    assert found[0].requires_grad


@pytest.mark.parametrize("form", ["cp", "dense", "tt", "tucker"])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_terms_that_are_their_array_accumulate(form: str, order: int) -> None:
    """Found by Hypothesis: torch took a view of one gradient for those of two arrays, and added to both three times."""
    plan = tna.UpdatePlan(tna.Config(rank=1, order=order, terms=2, format=form), [(3, 2)])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    for made in (lambda arrays: vector(plan, arrays), lambda arrays: plan.deltas(arrays)[0].reshape(-1)):
        arrays = moved(plan, 0)
        once = torch.autograd.grad((made(arrays) * weights).sum(), list(arrays.values()))
        for _ in range(3):
            (made(arrays) * weights).sum().backward()
        for array, gradient in zip(arrays.values(), once, strict=True):
            torch.testing.assert_close(array.grad, 3.0 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", ["weight", [[0, 2], [3, 1]]])
def test_a_compiler_traces_groups_in_one_call(groups: object) -> None:
    plan = tna.UpdatePlan(P.superlora(2, groups=groups, projection="linear", ratio=0.3), [(4, 3)] * 4)
    arrays = moved(plan)
    torch._dynamo.reset()
    found = torch.compile(lambda given: vector(plan, given), backend="eager", fullgraph=True)(arrays)
    assert torch.allclose(found, vector(plan, arrays), rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()
