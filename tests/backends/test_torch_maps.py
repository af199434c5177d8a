"""A kernel is called directly where nothing records the call, and as an autograd function where something does."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
from tnadapt.backends._torch_maps import LinearMap, recorded


def test_what_is_recorded() -> None:
    plain, leaf = torch.randn(8), torch.randn(8, requires_grad=True)
    assert not recorded(plain)
    assert recorded(leaf)
    with torch.no_grad():
        assert not recorded(leaf)
    with torch.inference_mode():
        assert not recorded(torch.randn(8))
    with torch.autograd.forward_ad.dual_level():
        assert recorded(plain)
    seen = []
    torch.func.vmap(lambda x: (seen.append(recorded(x)), x)[1])(torch.randn(2, 8))
    torch.func.grad(lambda x: (seen.append(recorded(x)), x.sum())[1])(plain)
    assert seen == [True, True]


# torch.func's forward mode scripts its decompositions.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives_and_batches_of_small_transforms() -> None:
    matrix = tna.fwht(torch.eye(8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(tna.fwht(x), x @ matrix)
    torch.testing.assert_close(torch.func.vmap(tna.fwht)(x), x @ matrix)
    torch.testing.assert_close(torch.func.jacrev(tna.fwht)(x[0]), matrix)
    torch.testing.assert_close(torch.func.jacfwd(tna.fwht)(x[0]), matrix)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
        tangent = torch.autograd.forward_ad.unpack_dual(tna.fwht(dual)).tangent
    torch.testing.assert_close(tangent, x[1] @ matrix)
    with torch.autocast("cpu"):
        assert tna.fwht(x).dtype is torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_tracer_is_given_no_constant() -> None:
    try:
        traced = torch.jit.trace(tna.fwht, torch.randn(8))
    except RuntimeError:
        return  # refused, as a function in Python may be
    x = torch.randn(8)
    torch.testing.assert_close(traced(x), tna.fwht(x))


def test_the_signature_that_torch_binds_is_the_functions() -> None:
    assert list(inspect.signature(LinearMap.forward).parameters) == ["x", "pair"]
