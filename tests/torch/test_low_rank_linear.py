"""Low-rank updates by torch's own operations: the same outputs and gradients as by the autograd function."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.torch import _linear as _low_rank_linear
from tnadapt.torch._linear import (
    MOST_ELEMENTS,
    LowRank,
    factored_linear,
    is_small,
    low_rank_linear,
    low_rank_updates,
)


def test_both_the_input_and_the_output_count() -> None:
    widest = MOST_ELEMENTS // 4
    assert is_small(torch.empty(4, widest), torch.empty(8, widest))
    assert is_small(torch.empty(2, 2, 8), torch.empty(widest, 8))
    assert not is_small(torch.empty(4, widest + 1), torch.empty(8, widest + 1))
    assert not is_small(torch.empty(4, 8), torch.empty(widest + 1, 8))


def test_only_low_rank_matrices_of_whole_weights_are_meant() -> None:
    left, right = torch.ones(6, 2), torch.ones(4, 2)
    whole, rows = tna.Target("a", (6, 4)), tna.Target("a", (12, 4), rows=tna.Rows(0, 6, 12))
    one = Factored([[Matrix(left, right)]], 0.5)
    assert low_rank_updates([(whole, one)] * 2) == [LowRank(left, right, 0.5)] * 2
    others = [
        (rows, one),
        (whole, one._replace(terms=one.terms * 2)),
        (whole, Factored([[Matrix(left, None), Matrix(left, right)]], 1.0)),
        (whole, Factored([[Matrix(torch.ones(6, 4), None)]], 1.0)),
    ]
    for other in others:
        assert low_rank_updates([(whole, one), other]) is None


@pytest.mark.law("attached-is-update")
@given(
    shape=st.sampled_from([(5,), (3, 5), (2, 3, 5), (0, 5)]),
    number=st.integers(0, 3),
    bias=st.booleans(),
    frozen=st.booleans(),
    scale=st.sampled_from([1.0, -0.5, 3.0]),
)
def test_gradients_are_those_of_the_autograd_function(
    shape: tuple[int, ...], number: int, bias: bool, frozen: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, trained: bool = True) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(trained)

    x, weight, offset = draw(*shape), draw(7, 5, trained=not frozen), draw(7) if bias else None
    updates = [LowRank(draw(7, 2), draw(5, 2), scale + k) for k in range(number)]
    leaves = [
        leaf for leaf in (x, weight, offset, *(t for update in updates for t in update[:2]))
        if leaf is not None and leaf.requires_grad
    ]  # fmt: skip
    target = tna.Target("w", (7, 5))
    found = low_rank_linear(x, weight, offset, updates)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_low_rank_linear, "MOST_ELEMENTS", -1)
        changes = [(target, Factored([[Matrix(one.left, one.right)]], one.scale)) for one in updates]
        expected = factored_linear(x, weight, offset, changes)
    assert torch.equal(found, expected)
    pulled = draw(*found.shape, trained=False)
    both = (torch.autograd.grad(y, leaves, pulled) for y in (found, expected))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
