"""Experts' products with updates added to them: equal to products with the changed weight, which is not formed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.torch import _forward_patch
from tnadapt.torch._forward_patch import LazyStack
from tnadapt.torch._linear import overlap

from .small import stir

CONFIGS = [
    (P.lora(1), "factored"), (P.lokr(2), "factored"), (P.superlora(2), "additive"), (P.dora(1), "factored"),
    (P.dora(2), "additive"), (P.hira(1), "additive"), (P.lora(1), "weight"), (P.dora(1), "weight"),
]  # fmt: skip
COUNT, OUT, COLS = 3, 8, 4


def _eager(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    parts = x.new_zeros(len(x), OUT)
    for number in ids.unique():
        chosen = ids == number
        one = x[chosen] @ weight[number] if transposed else functional.linear(x[chosen], weight[number])
        parts = parts.index_add(0, chosen.nonzero()[:, 0], one)
    return parts


def _grouped(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    order = torch.argsort(ids)
    ends = torch.bincount(ids, minlength=COUNT).cumsum(0).to(torch.int32)
    y = functional.grouped_mm(x[order], weight if transposed else weight.transpose(-2, -1), offs=ends)
    return y[torch.argsort(order)]


def _batched(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return torch.bmm(x[:, None], weight[ids])[:, 0]
    return torch.bmm(weight[ids], x[:, :, None])[:, :, 0]


def _of_all(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    """Every expert on all rows, as Llama 4 does with sorted ones."""
    every = x.expand(COUNT, *x.shape)
    y = torch.bmm(every, weight if transposed else weight.mT)
    return y[ids, torch.arange(len(x))]


def _unknown(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    matrix = weight if transposed else weight.permute(0, 2, 1)
    return torch.einsum("ni,nio->no", x, matrix[ids] * 1.0)


PRODUCTS: list[Callable[..., Tensor]] = [_eager, _grouped, _batched, _of_all, _unknown]


class Experts(nn.Module):
    def __init__(self, product: Callable[..., Tensor], transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        sizes = (COUNT, COLS, OUT) if transposed else (COUNT, OUT, COLS)
        self.up_proj = nn.Parameter(torch.randn(sizes, generator=made).to(dtype))
        self.is_transposed, self.is_concatenated, self.product = transposed, True, product

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.product(x, self.up_proj, ids, self.is_transposed)


def changed(module: Experts, adapters: list[tt.Adapter]) -> Tensor:
    """W' by the plan's own formula, with gradients to the adapters' parameters."""
    total = module.up_proj.detach().clone()
    for adapter in adapters:
        weights = [target.select(module.up_proj.detach()) for target in adapter.targets]
        arrays = dict(adapter.arrays())
        for target, weight, new in zip(adapter.targets, weights, adapter.plan.merged(arrays, weights), strict=True):
            place = torch.zeros_like(total)
            target.write(place, torch.ones(target.shape))
            whole = torch.zeros_like(total)
            target.write(whole, (new - weight) * adapter.weight)
            total = total + place * whole
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[Experts, list[tt.Adapter], Tensor, Tensor]:
    module = Experts(draw(st.sampled_from(PRODUCTS)), draw(st.booleans()))
    every, adapters = tt.find_targets(module, "all-linear"), list[tt.Adapter]()
    for number in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        if draw(st.booleans()):
            fields = ("module", "stored", "parameter", "transposed", "index")
            chosen = [
                tna.Target(**{name: getattr(one, name) for name in fields}, rows=tna.Rows(1, 2, 4, 2)) for one in chosen
            ]
        cfg, strategy = draw(st.sampled_from(CONFIGS))
        sums = cfg.apply == "add" and all(adapter.config.apply == "add" for adapter in adapters)
        if not sums and any(overlap(a, b) for one in adapters for a in one.targets for b in chosen):
            break
        adapters.append(tt.attach(module, cfg, chosen, f"a{number}", strategy=strategy))
        stir(adapters[-1], 0.3, number)
        if cfg.apply == "add":
            adapters[-1].set_weight(draw(st.sampled_from([1.0, 0.5])))
    rows = draw(st.integers(1, 5))
    x = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids = torch.tensor(draw(st.lists(st.integers(0, COUNT - 1), min_size=rows, max_size=rows)))
    return module, adapters, x, ids


@given(cases())
def test_products_are_those_with_the_changed_weight(given: tuple[Experts, list[tt.Adapter], Tensor, Tensor]) -> None:
    module, adapters, x, ids = given
    found = module(x, ids)
    expected = module.product(x, changed(module, adapters), ids, module.is_transposed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x, ids), found, rtol=1e-5, atol=1e-5)
    arrays = [x, *(parameter for adapter in adapters for parameter in adapter.parameters())]
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(found, arrays, gradient, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, arrays, gradient, allow_unused=True, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


X, IDS = torch.randn(5, COLS, generator=torch.Generator().manual_seed(3)), torch.tensor([2, 0, 0, 2, 2])


def adapted(
    product: Callable[..., Tensor], cfg: tna.Config | str = "lora", **settings: Any
) -> tuple[Experts, tt.Adapter]:
    module = Experts(product, False)
    adapter = tt.attach(module, cfg, "all-linear", **({"rank": 1} if cfg == "lora" else {}), **settings)
    stir(adapter, 0.3)
    return module, adapter


@pytest.mark.parametrize("strategy", ["factored", "additive"])
@pytest.mark.parametrize("product", PRODUCTS[:4])
def test_the_changed_weight_is_not_formed(
    product: Callable[..., Tensor], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = adapted(product, strategy=strategy)
    monkeypatch.setattr(_forward_patch, "parameter_sum", None)
    module(X, IDS).sum().backward()


def test_of_what_is_no_product_it_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = adapted(_unknown, strategy="factored")
    sums, plain = [], _forward_patch.parameter_sum
    monkeypatch.setattr(_forward_patch, "parameter_sum", lambda *args: sums.append(args) or plain(*args))
    module(X, IDS)
    assert len(sums) == 1


@pytest.mark.parametrize("product", PRODUCTS[:3])
def test_experts_without_tokens_compute_nothing(
    product: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = adapted(product, strategy="factored")
    called, patch = set(), module.forward
    output = patch.output
    monkeypatch.setattr(patch, "output", lambda slot, x: called.add(slot.target.index) or output(slot, x))
    module(X, IDS)
    assert called == {0, 2}


def test_the_best_strategy_is_chosen_by_the_tokens_of_one_expert() -> None:
    assert set(adapted(_grouped)[1].strategy) == {"factored"}
    assert set(adapted(_grouped, P.superlora(1))[1].strategy) == {"weight"}
    module = Experts(_grouped, False)
    assert set(tt.attach(module, P.dora(1, magnitude_axis="cols"), "all-linear").strategy) == {"weight"}


def test_strategies_that_cannot_be_are_refused() -> None:
    module = Experts(_grouped, False)
    with pytest.raises(tna.ConfigError, match=r"strategy='factored' needs .*; up_proj has .*: use strategy='auto'"):
        tt.attach(module, P.superlora(1), "all-linear", strategy="factored")
    with pytest.raises(tna.ConfigError, match=r"magnitude_axis='cols' scales the input of up_proj: use 'weight'"):
        tt.attach(module, P.dora(1, magnitude_axis="cols"), "all-linear", strategy="additive")
    with pytest.raises(tna.ConfigError, match=r"activation='relu' acts between the two factors"):
        tt.attach(module, P.lora(1), "all-linear", activation="relu")


@pytest.mark.parametrize("cfg", [P.lora(1), P.dora(1)], ids=["lora", "dora"])
def test_dropout_acts_on_the_input_of_each_expert(cfg: tna.Config) -> None:
    module, _ = adapted(_grouped, cfg, strategy="factored", dropout=0.5)
    x, ids = X[:1].expand(4000, COLS), torch.arange(4000) % 2
    with torch.no_grad():
        base = _grouped(x, module.up_proj, ids, False)
        whole, found = module.eval()(x, ids) - base, module.train()(x, ids) - base
    for number in (0, 1):
        of_one, expected = found[number::2], whole[number]
        torch.testing.assert_close(of_one.mean(0), expected, rtol=0.05, atol=0.05)
        # Each row has its own mask: there are 2^COLS.
        assert len(torch.unique(of_one.mul(1e3).round(), dim=0)) == 2**COLS


def test_a_compiled_module_multiplies_by_the_sum() -> None:
    module, _ = adapted(_of_all, strategy="factored")
    found = torch.compile(module, backend="eager", fullgraph=True)(X, IDS)
    torch.testing.assert_close(found, module(X, IDS), rtol=1e-5, atol=1e-6)


def test_a_copy_and_a_switched_off_adapter() -> None:
    module, adapter = adapted(_grouped, strategy="factored")
    y = module(X, IDS)
    assert torch.equal(copy.deepcopy(module)(X, IDS), y)
    with adapter.disabled():
        assert torch.equal(module(X, IDS), _grouped(X, module.up_proj.detach(), IDS, False))
    assert type(module.up_proj) is nn.Parameter


def test_it_tells_its_shape_and_hides_its_numbers() -> None:
    def looks(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
        assert isinstance(weight, LazyStack)
        assert weight.shape == (COUNT, OUT, COLS)
        assert (weight.dtype, weight.device, weight.ndim, len(weight)) == (x.dtype, x.device, 3, COUNT)
        with (
            torch._C.DisableTorchFunctionSubclass(),
            pytest.raises(RuntimeError, match=r"add.* reached the matrices of experts past .* strategy='weight'"),
        ):
            torch.add(weight, 1.0)
        return _grouped(x, weight, ids, transposed)

    module, _ = adapted(looks, strategy="factored")
    module(X, IDS)


def test_half_precision_is_rounded_like_a_linear_layer() -> None:
    module = Experts(_eager, False, torch.bfloat16)
    layer = nn.Linear(COLS, OUT, bias=False)
    layer.weight = nn.Parameter(module.up_proj[1].detach().clone())
    x, ids = X.bfloat16(), torch.ones(len(X), dtype=torch.int64)
    found = []
    for one, args in ((module, (x, ids)), (layer, (x,))):
        targets = tt.find_targets(one, "all-linear")
        adapter = tt.attach(one, P.lora(2), targets[1:2] or targets, strategy="factored")
        stir(adapter, 0.3)
        found.append(one(*args))
    assert torch.equal(*found)
