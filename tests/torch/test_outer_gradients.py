"""Updates whose rows are outer products, in one buffer: they and their gradients are the plain ones."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import tnadapt as tna
from tnadapt.torch._delta import Slice, outer_vjp_once

P = tna.presets


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3), cols=st.integers(1, 9), splits=st.integers(2, 4),
    size=st.sampled_from([2, 3, "balanced"]), format=st.sampled_from(["cp", "dense"]),
    alpha=st.sampled_from([None, 3.0]), weight=st.sampled_from([1.0, -0.5]), in_place=st.booleans(),
    trained=st.integers(1, 7),
)  # fmt: skip
@example(
    rows=[9, 9], cols=9, splits=3, size=2, format="cp", alpha=3.0, weight=-0.5, in_place=True, trained=7
)  # rows of the network that are cut, and begin within the weight
def test_they_are_the_plain_ones(
    rows: list[int], cols: int, splits: int, size: int | str, format: str, alpha: float | None, weight: float,
    in_place: bool, trained: int,
) -> None:  # fmt: skip
    config = tna.Config(
        1, groups=1, fold="hypercube", splits=splits, split_size=size, format=format, leading="dense", alpha=alpha
    )
    try:
        plan = tna.SuperLoRA(config, [(each, cols) for each in rows])
    except tna.TnadaptError:
        return  # splits that are larger than the fold
    made = Slice(plan, len(rows) - 1)
    generator = torch.Generator().manual_seed(0)
    arrays = [
        torch.randn(plan.param_shapes[name], generator=generator, dtype=torch.float64).requires_grad_(
            bool(trained >> k & 1)
        )
        for k, name in enumerate(made.names)
    ]
    outer = made.outer(*arrays)
    assert outer is not None
    leaves = [array for array in arrays if array.requires_grad]
    expected = made(*arrays) * weight
    delta, pull = outer_vjp_once(outer, made.shape, weight, leaves)
    torch.testing.assert_close(delta, expected.detach(), rtol=1e-12, atol=1e-12)
    moved = torch.randn(made.shape, generator=generator, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, leaves, moved) if leaves else []
    if leaves:
        mine = pull(delta.copy_(moved) if in_place else moved)
        for found, reference in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "config",
    [
        P.superlora(1),
        P.dense(),
        P.lonkr(1, terms=2),
        P.lonkr(1, start="random"),
        P.lonkr(1, order=3, split_size=2),
        P.loha(1, groups=1),
    ],
)
def test_others_have_no_such_rows(config: tna.Config) -> None:
    plan = tna.SuperLoRA(config, [(24, 24)] * 2)
    made = Slice(plan, 0)
    arrays = [torch.from_numpy(plan.init()[name]) for name in made.names]
    assert made.outer(*arrays) is None


def test_half_precision_takes_the_plain_way() -> None:
    plan = tna.SuperLoRA(P.lonkr(1), [(24, 24)] * 2)
    made = Slice(plan, 0)
    arrays = [torch.from_numpy(plan.init()[name]) for name in made.names]
    assert made.outer(*arrays) is not None
    assert made.outer(*[array.bfloat16() for array in arrays]) is None
