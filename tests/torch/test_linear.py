"""Linear layers with updates, factored or added to the weight: outputs and derivatives are the formula's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tnadapt as tna
import tnadapt.torch
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.testing.strategies import plans
from tnadapt.torch import _linear as _low_rank_linear
from tnadapt.torch._delta import Slice
from tnadapt.torch._linear import (
    MOST_ELEMENTS,
    DeltaSource,
    LowRank,
    MergedWeightLinear,
    can_fuse,
    factored_linear,
    is_small,
    low_rank_linear,
    low_rank_updates,
    product,
    summed,
)

from .small import stir

# -- Low-rank updates by torch's own operations: the same outputs and gradients as by the autograd function ------------


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


# -- Factored updates, and sums computed layer by layer, equal the reference implementation, including gradients -------


CONFIGS = {
    "lora": P.lora(2, alpha=8),
    "lokr": P.lokr(2),
    "lokr low rank": P.lokr(1, leading="same"),
    "krona": P.krona(alpha=2),
    "three": tna.Config(rank=1, splits=3, format="cp"),
    "three dense": tna.Config(splits=3, format="dense"),
    "compacter": P.compacter(terms=2),
    "loha": P.loha(2),
    "tucker": tna.Config(rank=2, format="tucker"),
    "train": tna.Config(rank=2, format="tt"),
    "weighted": tna.Config(rank=2, format="cp-weighted", terms=2),
    "gralora": P.gralora(2, 2),
    "a cut product": P.lokr(1, leading="same", split_size=5),
    "a product that subtracts": P.lokr(1, alpha=3, start="random"),
    "miss": P.miss(4, alpha=3),
    "miss that is cut": P.miss(3),
    "miss of rows": P.miss(5, 3),
    "miss that subtracts": P.miss(4, alpha=3, start="random"),
    "cosines": tna.Config(projection="dct2", on="weight", alpha=3),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def layers() -> nn.Module:
    """A model of two layers of 12 by 8, and a fused one that is adapted in part."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False), nn.Linear(8, 24)).double()


TARGETS = (
    tna.Target("0", (12, 8)),
    tna.Target("2", (8, 12)),
    tna.Target("3", (24, 8), rows=tna.Rows(0, 8, 24)),
    tna.Target("3", (24, 8), rows=tna.Rows(12, 12, 24)),
)
INTERLEAVED = (tna.Target("3", (24, 8), rows=tna.Rows(4, 4, 8, 3)),)
HALVES = (tna.Target("3", (24, 8), rows=tna.Rows(2, 4, 12, 2)),)


def passed(
    config: tna.Config, strategy: str, targets: Sequence[tna.Target] = TARGETS, weight: float = 1.0
) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input and of all arrays."""
    model = layers()
    adapter = tt.attach(model, config, list(targets), strategy=strategy, dtype=torch.float64)
    stir(adapter, 0.5)
    adapter.set_weight(weight)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    return [y.detach(), x.grad, *(p.grad for p in adapter.parameters())]


@pytest.mark.law("attached-is-update")
@each_config
@pytest.mark.parametrize("targets", [TARGETS, INTERLEAVED, HALVES], ids=["plain", "interleaved", "halves"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_all_strategies_are_one_function(name: str, targets: tuple[tna.Target, ...], weight: float) -> None:
    want = passed(CONFIGS[name], "additive", targets, weight)
    for strategy in ("weight", "factored", "auto"):
        for found, expected in zip(passed(CONFIGS[name], strategy, targets, weight), want, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.fixture
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer count as a large one, where low-rank matrices have the autograd function of all others."""
    if getattr(request, "param", True):
        monkeypatch.setattr(_low_rank_linear, "MOST_ELEMENTS", -1)


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize("name", ["lora", "loha", "gralora"])
def test_large_layers_are_the_same_function(name: str, request: pytest.FixtureRequest) -> None:
    want = passed(CONFIGS[name], "factored", weight=-0.5)
    request.getfixturevalue("large")
    for found, expected in zip(passed(CONFIGS[name], "factored", weight=-0.5), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.law("fresh-is-zero")
@each_config
def test_a_fresh_one_changes_no_bit_and_learns(name: str) -> None:
    base, model = layers().requires_grad_(False), layers()
    x = torch.randn(5, 8, dtype=torch.float64)
    adapter = tt.attach(model, CONFIGS[name], list(TARGETS), strategy="factored", dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    y = model(x)
    assert torch.equal(y, base(x))
    y.square().sum().backward()
    # A start that is subtracted has gradients everywhere, the usual one in the arrays that are zero.
    everywhere = CONFIGS[name].start != "zero"
    started = {n for n, p in adapter.named_parameters() if everywhere or not p.any()}
    assert {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()} == started


@each_config
def test_inputs_of_other_strides_and_of_many_lengths(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(5, 3, 8).transpose(0, 1)
    jagged = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    with torch.no_grad():
        before = model(x)
    adapter = tt.attach(model, CONFIGS[name], ["0"], strategy="factored")
    assert torch.equal(model(x), before)
    stir(adapter, 0.5)
    torch.testing.assert_close(model(x), model(x.contiguous()))
    found = model(jagged)
    torch.testing.assert_close(found.values(), model(jagged.values()))
    found.values().sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())


def factors(name: str) -> Factored:
    made = torch.Generator().manual_seed(2)

    def matrix(rows: int, cols: int, width: int | None = None) -> Matrix:
        sizes = [(rows, cols)] if width is None else [(rows, width), (cols, width)]
        found = [torch.randn(s, generator=made, dtype=torch.float64).requires_grad_() for s in sizes]
        return Matrix(found[0], None if width is None else found[1])

    terms = {
        "one": [[matrix(6, 4, 2)]],
        "two": [[matrix(2, 2), matrix(3, 2, 1)]],
        "dense last": [[matrix(2, 2, 1), matrix(3, 2)]],
        "three": [[matrix(1, 2), matrix(3, 1, 1), matrix(2, 2, 1)]],
        "terms": [[matrix(2, 2), matrix(3, 2, 1)], [matrix(2, 2, 1), matrix(3, 2)]],
    }
    return Factored(terms[name], 0.5)


@pytest.mark.slow
@pytest.mark.law("derivatives-of-presets")
@pytest.mark.parametrize(
    ("name", "large"),
    [("one", False), ("one", True), ("two", True), ("dense last", True), ("three", True), ("terms", True)],
    indirect=["large"],
)
@pytest.mark.parametrize("rows", [None, tna.Rows(1, 6, 9), tna.Rows(0, 2, 3, 3)], ids=["all", "some", "blocks"])
def test_derivatives(name: str, large: None, rows: tna.Rows | None) -> None:
    made = torch.Generator().manual_seed(0)
    out = 6 if rows is None else rows.stride * rows.count
    x, weight, bias = (torch.randn(s, generator=made).double().requires_grad_() for s in ((2, 3, 4), (out, 4), (out,)))
    factored, target = factors(name), tna.Target("a", (out, 4), rows=rows)
    flat = [tensor for term in factored.terms for matrix in term for tensor in matrix if tensor is not None]

    def again(tensors: Sequence[torch.Tensor]) -> Factored:
        rest = iter(tensors)
        terms = [[Matrix(next(rest), None if m.right is None else next(rest)) for m in term] for term in factored.terms]
        return factored._replace(terms=terms)

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return factored_linear(x, w, b, [(target, again(tensors))])

    assert can_fuse(x, weight, [(target, factored)])
    assert torch.autograd.gradcheck(function, (x, weight, bias, *flat), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, *flat))
    plain = torch.nn.functional.linear(x, weight, bias)
    added = product(x, factored).detach()
    index = list(range(out)) if rows is None else rows.indices()
    plain = plain.index_add(-1, torch.tensor(index), added)
    torch.testing.assert_close(function(x, weight, bias, *flat), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "large"), [("one", False), ("one", True), ("three", True)], indirect=["large"])
def test_no_rows_at_all(name: str, large: None) -> None:
    target, factored = tna.Target("a", (6, 4)), factors(name)
    factored = factored._replace(terms=[[Matrix(*(None if t is None else t.detach().requires_grad_() for t in m))
                                         for m in term] for term in factored.terms])  # fmt: skip
    x = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    y = factored_linear(x, torch.randn(6, 4, dtype=torch.float64), None, [(target, factored)])
    assert y.shape == (0, 6)
    y.sum().backward()
    assert all(not t.grad.any() for term in factored.terms for m in term for t in m if t is not None)


@pytest.mark.parametrize("strategy", ["weight", "factored"])
def test_two_adapters_on_one_layer(strategy: str) -> None:
    outputs = []
    for other in (strategy, "additive"):
        model = layers()
        one = tt.attach(model, P.lora(2), list(TARGETS), "one", strategy=strategy, dtype=torch.float64)
        two = tt.attach(model, P.lokr(2), list(TARGETS), "two", strategy=other, dtype=torch.float64)
        for adapter in (one, two):
            stir(adapter, 0.5)
        tt.mix(model, {"one": 0.7, "two": -2.0})
        y = model(torch.linspace(-1, 1, 8, dtype=torch.float64))
        y.sum().backward()
        outputs.append([y.detach(), *(p.grad for p in [*one.parameters(), *two.parameters()])])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("strategy", "large"), [("weight", True), ("factored", True), ("factored", False)], indirect=["large"]
)
def test_what_is_written_to_in_place_after_the_layer(strategy: str, large: None) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True))
    adapter = tt.attach(model, P.lora(2), ["0"], strategy=strategy)
    stir(adapter, 0.5)
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())


@pytest.mark.law("half-precision-base")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "krona"])
def test_a_half_precision_base_has_float32_factors(dtype: torch.dtype, name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12)).to(dtype)
    x = torch.randn(5, 8).to(dtype)
    base = model(x).detach()
    adapter = tt.attach(model, CONFIGS[name], ["0"], strategy="factored")
    assert torch.equal(model(x), base)
    stir(adapter, 0.5)
    y = model(x)
    assert y.dtype is dtype
    adapter.merge()
    assert (model(x) - y).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(x.float()).sum()


@pytest.mark.parametrize("trained", ["factor0", "factor1"])
def test_one_factor_of_a_slice_is_trained_alone(trained: str) -> None:
    grads = []
    for strategy in ("weight", "additive"):
        model = layers()
        adapter = tt.attach(model, P.superlora(1), list(TARGETS), strategy=strategy, dtype=torch.float64)
        stir(adapter, 0.5)
        adapter.set_trainable(arrays=trained)
        model(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)).square().sum().backward()
        assert [p.grad is not None for _, p in adapter.named_parameters()] == [
            trained == "factor0",
            trained == "factor1",
        ]
        grads.append(next(adapter.parameters()).grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


@pytest.mark.law("update-slice")
@given(st.data())
def test_a_slice_is_the_update(data: st.DataObject) -> None:
    plan = data.draw(plans(("identity",)))
    params = {name: torch.from_numpy(array).double() for name, array in plan.init(dtype="float64").items()}
    params = {name: array + 1.0 for name, array in params.items()}
    for index in range(len(plan.shapes)):
        made = Slice.of(plan, index)
        if made is not None:
            given_to = [params[name] for name in made.names]
            expected = plan.delta(params, index)
            torch.testing.assert_close(made(*given_to), expected, rtol=1e-12, atol=1e-12)
            factors = made.factors(*given_to)
            if factors is not None:
                left, right, first = factors
                found = (left @ right).reshape(-1)[first : first + made.size].view(made.shape)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_mixes_elements_or_is_large_is_made_whole() -> None:
    shapes = [(8, 8)] * 4
    assert Slice.of(tna.SuperLoRA(P.superlora(1), shapes), 1) is not None
    assert Slice.of(tna.SuperLoRA(P.superlora(8), shapes), 1) is None  # arrays of 256 elements, four times
    assert Slice.of(tna.SuperLoRA(P.fastfood(0.5), shapes), 1) is None
    assert Slice.of(tna.SuperLoRA(P.superlora(1, projection="shuffle"), shapes), 1) is None
    assert Slice.of(tna.SuperLoRA(P.dense(), shapes), 1) is not None


@pytest.mark.parametrize(
    "config",
    [P.superlora(1, alpha=3), P.dense(), P.lorta(1), P.superlora(1, groups=3), P.loha(1, groups=1), P.lonkr(1)],
)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_slices_train_as_the_whole_does(config: tna.Config, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = passed(config, "weight", weight=weight)
    monkeypatch.setattr(Slice, "of", classmethod(lambda cls, plan, index: None))
    for found, expected in zip(sliced, passed(config, "weight", weight=weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@given(
    shape=st.sampled_from([(5,), (1, 5), (3, 5), (2, 3, 5), (0, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    number=st.integers(1, 3),
    bias=st.booleans(),
)
def test_without_gradients_the_bits_are_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, number: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x, weight, offset = draw(*shape), draw(7, 5), draw(7) if bias else None
    changes = [(tna.Target("w", (7, 5)), Factored([[Matrix(draw(7, 2), draw(5, 2))]], 1.0 + k)) for k in range(number)]
    with torch.no_grad():
        found = factored_linear(x, weight, offset, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_low_rank_linear, "MOST_ELEMENTS", -1)
        assert torch.equal(found, factored_linear(x, weight, offset, changes))
    assert torch.equal(found, factored_linear(x, weight, offset, changes))
    assert found.shape == (*shape[:-1], 7)


# -- A linear layer on the sum of its weight and updates, and the modes in which it must not be used -------------------

# Modes that intercept single operations, or change how backward runs, are tested with every strategy.


CASES = [
    (P.lora(3), "weight"), (P.lora(3), "factored"), (P.lora(3), "additive"),
    (P.lokr(2), "weight"), (P.lokr(2), "factored"), (P.superlora(3), "weight"), (P.superlora(3), "additive"),
]  # fmt: skip
each_case = pytest.mark.parametrize(("config", "strategy"), CASES)


def adapted(config: tna.Config, strategy: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    adapter = tnadapt.torch.attach(model, config, "all-linear", strategy=strategy)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model, list(adapter.parameters())


@each_case
def test_backward_under_autocast_of_a_pass_without(config: tna.Config, strategy: str) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(5, 24, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *parameters])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = model(x)
        found = torch.autograd.grad(y.sum(), [x, *parameters])
    for one, two in zip(found, expected, strict=True):
        # Strategies that form the sum take backward's products in the precision of the region that they are in.
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(two.abs().max()))


@pytest.mark.law("activation-checkpointing")
@each_case
@pytest.mark.parametrize("mutable", [False, True])
def test_selective_checkpointing(config: tna.Config, strategy: str, mutable: bool) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(4, 24, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(
        create_selective_checkpoint_contexts, kept, **({"allow_cache_entry_mutation": True} if mutable else {})
    )
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@each_case
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_batch_of_gradients_at_once(config: tna.Config, strategy: str) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(5, 24, requires_grad=True)
    y, several = model(x), torch.randn(3, 5, 24)
    found = torch.autograd.grad(y, [x, *parameters], several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, [x, *parameters], one, retain_graph=True) for one in several]
    for batch, rows in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(rows), rtol=1e-4, atol=1e-4 * float(batch.abs().max()))


@pytest.mark.law("functional-transforms")
@each_case
# torch's own: forward_ad registers its decompositions by torch.jit.script. From torch 2.15 on it is a FutureWarning.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_forward_mode(config: tna.Config, strategy: str) -> None:
    model, _ = adapted(config, strategy)
    x, tangent = torch.randn(2, 24), torch.randn(2, 24)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    expected = torch.func.jvp(model, (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- The layer itself ---------------------------------------------------------------------------


FORMS = {
    "lora": P.lora(2), "lora alpha": P.lora(2, alpha=8.0), "loha": P.loha(2), "lokr": P.lokr(2), "lorta": P.lorta(2),
    "superlora": P.superlora(3), "groups": P.superlora(2, groups=3), "dense": P.dense(),
    "linear": P.superlora(2, projection="linear", ratio=0.5), "compacter": P.compacter(1, terms=2),
}  # fmt: skip


def test_derivatives_of_a_linear_layer_on_the_sum() -> None:
    made = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=made).double().requires_grad_() for s in ((2, 3, 4), (6, 4), (6,)))
    targets = (
        tna.Target("a", (6, 4), "q", rows=tna.Rows(0, 1, 3, 2)),
        tna.Target("a", (6, 4), "v", rows=tna.Rows(2, 1, 3, 2)),
    )
    q, v = (torch.randn(2, 4, generator=made).double().requires_grad_() for _ in range(2))

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *deltas: torch.Tensor) -> torch.Tensor:
        return MergedWeightLinear.apply(x, w, b, tuple(map(DeltaSource, targets)), *deltas)

    assert torch.autograd.gradcheck(function, (x, weight, bias, q, v))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, q, v))
    plain = torch.nn.functional.linear(x, summed(weight, list(zip(targets, (q, v), strict=True))), bias)
    assert torch.equal(function(x, weight, bias, q, v), plain)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_plain_sum(config: tna.Config, weight: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6)).double()
    adapter = tnadapt.torch.attach(model, config, "all-linear", strategy="weight", dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    adapter.set_weight(weight)
    x = torch.randn(2, 5, 12).double().requires_grad_()
    of = [x, *adapter.parameters()]
    first, second = (weight * delta for delta in adapter.deltas())
    hidden = torch.tanh(x @ (model[0].weight + first).T + model[0].bias)
    plain = hidden @ (model[2].weight + second).T + model[2].bias
    y = model(x)
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad(plain.square().sum(), of, retain_graph=True)
    for found, one in zip(torch.autograd.grad(y.square().sum(), of, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(found, one)
    seconds = []
    for made in (y, plain):
        first_order = torch.autograd.grad(made.square().sum(), of, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in first_order), of))
    for found, one in zip(*seconds, strict=True):
        torch.testing.assert_close(found, one)


def peak_of(call: Callable[[], Any]) -> int:
    """Return the peak of bytes that torch allocated on the CPU, beyond those allocated before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("name", ["lora", "lora alpha", "superlora", "loha", "lorta", "dense"])
def test_a_linear_layer_needs_the_memory_of_one_weight(name: str) -> None:
    """The update and the sum share one array in turn; backward also writes the weight's gradient into it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    tnadapt.torch.attach(model, FORMS[name], "all-linear", strategy="weight")
    x = torch.randn(2, 256, requires_grad=True)
    kept = [model(x).sum()]
    kept[0].backward()
    weight = 4 * 256 * 256
    assert peak_of(lambda: kept.append(model(x).sum())) < 1.5 * weight
    assert peak_of(kept[-1].backward) < 1.5 * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_several_parts_of_a_weight_share_one_sum(dtype: torch.dtype) -> None:
    stored = torch.randn(3 * 128, 128).to(dtype)
    targets = [tna.Target("a", (384, 128), role, rows=tna.Rows(128 * at, 128, 384)) for at, role in enumerate("qkv")]
    deltas = [torch.randn(128, 128) for _ in targets]
    found: list[torch.Tensor] = []
    peak = peak_of(lambda: found.append(summed(stored, list(zip(targets, deltas, strict=True)))))
    assert torch.equal(found[0], (stored.float() + torch.cat(deltas)).to(dtype))
    wide, narrow = 4 * stored.numel(), dtype.itemsize * stored.numel()
    assert peak < 1.2 * wide + (narrow if dtype is not torch.float32 else 0)
