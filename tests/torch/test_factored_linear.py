"""Factored updates, and sums computed layer by layer, equal the reference implementation, including gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.testing.strategies import plans
from tnadapt.torch import _linear as _low_rank_linear
from tnadapt.torch._delta import Slice
from tnadapt.torch._linear import can_fuse, factored_linear, product

from .small import stir

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
each = pytest.mark.parametrize("name", CONFIGS)


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
@each
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
@each
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


@each
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
