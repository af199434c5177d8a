"""Populations: every member is the adapter that is attached alone with the member's arrays."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import LONG, in_depth
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import examples

from .internals import batch_rows, delta
from .small import batch, compiles_whole, small, stir
from .test_requantizing import Packed
from .test_requantizing import model as packed
from .test_threads import beside

Index = Sequence[int | None]
STRATEGIES = ("auto", "weight", "factored", "additive")


class SideBySide(nn.Module):
    """Linear layers of given shapes; each gets the first features of the input."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(cols, rows, dtype=torch.float64) for rows, cols in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[..., : layer.in_features]) for layer in self.layers], -1)


class Pair(NamedTuple):
    """A population on a model, and on a copy of the model a single adapter, which takes the arrays of members."""

    model: nn.Module
    population: tt.Population
    reference: nn.Module
    adapter: tt.Adapter

    def copy_member(self, number: int) -> None:
        stacked = dict(self.population.named_parameters())
        with torch.no_grad():
            for name, parameter in self.adapter.named_parameters():
                parameter.copy_(stacked[name][number])


def pair_of(model: nn.Module, count: int, *args: Any, **options: Any) -> Pair:
    """Attach both; the members have random arrays."""
    options = {"dtype": torch.float64, **options}
    reference = copy.deepcopy(model)
    adapter = tt.attach(reference, *args, **options)
    population = tt.attach(model, *args, population=count, **options)
    assert isinstance(population, tt.Population)
    stir(population, 0.3)
    return Pair(model, population, reference, adapter)


class Pass(NamedTuple):
    """The output of a pass, and the gradients of the sum of its squares: of x and of all arrays."""

    y: Tensor
    x: Tensor
    arrays: list[Tensor]


def by_members(pair: Pair, index: Any, x: Tensor) -> Pass:
    x, parameters = x.detach().requires_grad_(), [parameter for _, parameter in pair.population.named_parameters()]
    with pair.population.members(index):
        y = pair.model(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *parameters], materialize_grads=True)
    return Pass(y.detach(), gradients[0], list(gradients[1:]))


def alone(pair: Pair, index: Index, x: Tensor) -> Pass:
    """Run each row of the batch by itself, with the single adapter that has the arrays of the row's member."""
    outputs, of_x = [], []
    sums = [torch.zeros_like(parameter) for _, parameter in pair.population.named_parameters()]
    parameters = [parameter for _, parameter in pair.adapter.named_parameters()]
    for member, part in zip(index, x.chunk(len(index)), strict=True):
        row = part.detach().requires_grad_()
        if member is None:
            with pair.adapter.disabled():
                y = pair.reference(row)
        else:
            pair.copy_member(member)
            y = pair.reference(row)
        gradients = torch.autograd.grad(y.square().sum(), [row, *parameters], materialize_grads=True)
        outputs.append(y.detach())
        of_x.append(gradients[0])
        if member is not None:
            for total, gradient in zip(sums, gradients[1:], strict=True):
                total[member] += gradient
    return Pass(torch.cat(outputs), torch.cat(of_x), sums)


def assert_same(found: Pass, expected: Pass, index: Index, rtol: float = 1e-10) -> None:
    for one, other in zip([found.y, found.x, *found.arrays], [expected.y, expected.x, *expected.arrays], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(1.0, *other.abs().flatten().tolist()))
    for gradient in found.arrays:
        outside = [number for number in range(len(gradient)) if number not in index]
        assert not gradient[outside].any()


class Batch(NamedTuple):
    """Members for rows, and how many rows of how many tokens each entry stands for; None is no axis of tokens."""

    count: int
    index: list[int | None]
    repeats: int = 1
    tokens: int | None = 7

    def x(self, width: int) -> Tensor:
        shape = [len(self.index) * self.repeats, *([] if self.tokens is None else [self.tokens]), width]
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    count = draw(st.integers(1, 4))
    index = draw(st.lists(st.none() | st.integers(0, count - 1), min_size=1, max_size=5))
    return Batch(count, index, draw(st.integers(1, 2)), draw(st.sampled_from([None, 1, 7, 64])))


def attached_or_refused(shapes: Sequence[tuple[int, int]], batch: Batch, config: Any, strategy: str) -> Pair | None:
    """Attach both; what a single adapter refuses, a population refuses with the same words."""
    try:
        return pair_of(SideBySide(shapes), batch.count, config, "all-linear", strategy=strategy)
    except (tna.ConfigError, tna.ShapeError) as refusal:
        text = f"^{re.escape(str(refusal))}$"
        with pytest.raises(type(refusal), match=text):
            tt.attach(SideBySide(shapes), config, "all-linear", strategy=strategy, population=batch.count)
        return None


def check_batch(pair: Pair, batch: Batch) -> None:
    x = batch.x(max(layer.in_features for layer in pair.model.layers))
    expected = alone(pair, batch.index, x)
    assert_same(by_members(pair, batch.index, x), expected, batch.index)
    # One member after the other, the plain form.
    with mock.patch.object(batch_rows, "_of_members", return_value=None):
        assert_same(by_members(pair, batch.index, x), expected, batch.index)


@pytest.mark.law("members-alone")
@pytest.mark.parametrize("preset", tna.presets.__all__)
@given(batch=batches(), strategy=st.sampled_from(STRATEGIES))
@example(batch=Batch(5, [2, 0, 4]), strategy="auto")
@example(batch=Batch(3, [2, 2, None, 0]), strategy="auto")
@settings(max_examples=120 if LONG else 5)
def test_a_member_of_every_preset_is_the_adapter_alone(preset: str, batch: Batch, strategy: str) -> None:
    config, shapes = examples()[preset]
    pair = attached_or_refused(shapes, batch, config, strategy)
    assume(pair is not None)
    check_batch(pair, batch)


@pytest.mark.law("members-alone")
@pytest.mark.filterwarnings("ignore:rank=.* is beyond:UserWarning")
@given(plan=plans(), batch=batches(), strategy=st.sampled_from(STRATEGIES))
def test_a_member_of_any_config_is_the_adapter_alone(plan: tna.UpdatePlan, batch: Batch, strategy: str) -> None:
    pair = attached_or_refused(plan.shapes, batch, plan.config, strategy)
    assume(pair is not None)
    check_batch(pair, batch)


# -- Models of many kinds of layers --------------------------------------------------------------

#: Configs with the settings of ``attach``.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (P.lora(2, alpha=3), {}),
    "weight": (P.lora(2), {"strategy": "weight"}),
    "superlora": (P.superlora(2), {}),
    "lokr": (P.lokr(2), {}),
    "behind F": (P.superlora(2, projection="linear", ratio=0.5), {}),
    "theta": (P.unilora(9, 2), {}),
    "dora": (P.dora(2), {}),
    "dora, weight": (P.dora(2), {"strategy": "weight"}),
    "columns": (P.dora(2, magnitude_axis="cols"), {}),
    "hira": (P.hira(2), {}),
    "pissa": (P.lora(2, start="pissa"), {}),
    "lora_xs": (P.lora_xs(2), {}),
    "vera": (P.vera(2), {}),
}
INDEX: list[int | None] = [2, None, 0, 2]
configs = pytest.mark.parametrize("config", CONFIGS)


def small_pair(config: str = "lora", targets: Any = "qv", **more: Any) -> Pair:
    cfg, options = CONFIGS[config]
    return pair_of(small().double(), 4, cfg, targets, **{**options, **more})


def x_of(pair: Pair, size: int = 4) -> Tensor:
    return batch(size=size).to(next(pair.model.parameters()))


@pytest.mark.law("members-alone")
@configs
def test_rows_in_a_model_of_many_kinds_of_layers(config: str) -> None:
    """Fused and separate projections, convolutions, and modules that read their child's weight."""
    pair = small_pair(config)
    x = x_of(pair)
    expected = alone(pair, INDEX, x)
    assert_same(by_members(pair, INDEX, x), expected, INDEX)
    with torch.no_grad(), pair.population.members(INDEX):
        torch.testing.assert_close(pair.model(x), expected.y, rtol=1e-10, atol=1e-10)
    with torch.inference_mode(), pair.population.members(INDEX):
        torch.testing.assert_close(pair.model(x), expected.y, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected.y[0], expected.y[2])


@pytest.mark.law("members-alone")
@pytest.mark.parametrize("config", [P.lora(2), P.superlora(2), P.unilora(200)], ids=["lora", "superlora", "theta"])
def test_a_large_population_and_more_members_than_are_formed_at_a_time(config: tna.Config) -> None:
    pair = pair_of(SideBySide([(300, 200), (150, 310)]), 200, config, "all-linear")
    check_batch(pair, Batch(200, [None, *range(199, 3, -11)], tokens=2))


@pytest.mark.law("members-alone")
@configs
def test_batches_without_rows_or_tokens(config: str) -> None:
    cfg, options = CONFIGS[config]
    pair = pair_of(SideBySide([(6, 9), (4, 9)]), 4, cfg, "all-linear", **options)
    for shape in [(0, 9), (4, 0, 9), (0, 3, 9)]:
        for index in (INDEX, [0, 1, 2, 3], [1] * 4):
            found = by_members(pair, index, torch.zeros(shape, dtype=torch.float64))
            assert (found.y.shape, found.x.shape) == ((*shape[:-1], 10), shape)
            assert not any(gradient.any() for gradient in found.arrays)


@pytest.mark.law("members-alone")
def test_the_batches_before_do_not_matter() -> None:
    """To the bit, though the cheapest form of an update depends on the number of tokens."""

    def outputs(numbers: Sequence[int]) -> dict[int, Tensor]:
        pair = pair_of(SideBySide([(64, 64)]), 3, P.krona(), "all-linear", strategy="additive")
        with torch.no_grad(), pair.population.members([0, 2]):
            return {number: pair.model(Batch(3, [0, 2], tokens=number).x(64)) for number in numbers}

    first, second = outputs([1, 2048]), outputs([2048, 1])
    assert all(torch.equal(y, second[number]) for number, y in first.items())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_activation_between_the_factors(activation: str) -> None:
    pair = pair_of(SideBySide([(6, 9), (4, 9)]), 4, P.lora(2), "all-linear", activation=activation)
    check_batch(pair, Batch(4, INDEX))


def test_several_configs_in_one_population() -> None:
    configs = {"q": P.lora(2), "v": P.superlora(2), "head": P.lokr(2)}
    pair = pair_of(small().double(), 4, configs)
    x = x_of(pair)
    assert_same(by_members(pair, INDEX, x), alone(pair, INDEX, x), INDEX)


def test_some_rows_of_a_weight_and_a_weight_that_is_tied() -> None:
    some = [tna.Target("layers.0", (6, 9), rows=tna.RowIndices((1, 3, 5)))]
    for strategy in ("factored", "additive", "weight"):
        check_batch(pair_of(SideBySide([(6, 9)]), 4, P.lora(2), some, strategy=strategy), Batch(4, INDEX))
    model = SideBySide([(6, 6), (6, 6)])
    model.layers[1].weight = model.layers[0].weight
    check_batch(pair_of(model, 4, P.lora(2), ["layers.0"], keep_tied=True), Batch(4, INDEX))


@pytest.mark.law("members-alone")
@pytest.mark.parametrize("options", [{}, {"detach_norm": True}, {"strategy": "additive"}], ids=str)
@pytest.mark.parametrize("rows", [None, tna.RowIndices((1, 3, 5)), tna.Rows(1, 2, 3, 2)], ids=["all", "some", "block"])
@given(batch=batches(), weight=st.floats(0.25, 2.0))
@settings(max_examples=40 if LONG else 5)
def test_magnitudes_of_all_members_in_a_batch(rows: Any, options: Any, batch: Batch, weight: float) -> None:
    """The norms are computed without a member's ΔW; a row of zeros has none at the start."""
    model = SideBySide([(6, 9), (6, 9)])
    with torch.no_grad():
        model.layers[0].weight[3] = 0.0
    targets = [tna.Target(f"layers.{layer}", (6, 9), rows=rows) for layer in (0, 1)]
    pair = pair_of(model, batch.count, P.dora(2), targets, **options)
    with torch.no_grad():
        for name, parameter in pair.population.named_parameters():
            if name.endswith("factor0"):
                parameter[0] = 0.0
    pair.population.set_weight(weight)
    pair.adapter.set_weight(weight)
    check_batch(pair, batch)


@pytest.mark.parametrize("detach", [False, True])
def test_a_base_that_is_trained_beside_magnitudes(detach: bool) -> None:
    pair = pair_of(SideBySide([(6, 9)]), 4, P.dora(2), "all-linear", detach_norm=detach)
    x, gradients = Batch(4, INDEX).x(9), []
    for model in (pair.model, pair.reference):
        model.layers[0].weight.requires_grad_()
    with pair.population.members(INDEX):
        pair.model(x).square().sum().backward()
    for member, row in zip(INDEX, x.chunk(len(INDEX)), strict=True):
        with contextlib.nullcontext() if member is not None else pair.adapter.disabled():
            pair.copy_member(member or 0)
            y = pair.reference(row)
        gradients += torch.autograd.grad(y.square().sum(), pair.reference.layers[0].weight)
    torch.testing.assert_close(pair.model.layers[0].weight.grad, torch.stack(gradients).sum(0))


@pytest.mark.law("fresh-is-zero")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_members_with_magnitudes_change_no_bit(dtype: Any) -> None:
    model = SideBySide([(16, 12), (16, 12)]).to(dtype)
    x = Batch(4, INDEX).x(12).to(dtype)
    base = model(x)
    population = tt.attach(model, P.dora(2), "all-linear", population=4, dtype=torch.float32)
    with population.members(INDEX):
        assert torch.equal(model(x), base)


class Tokens(nn.Module):
    """An embedding of tokens, and a convolution over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 8), nn.Conv1d(8, 6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.embed(ids).mT).mT


@pytest.mark.parametrize("config", ["lora", "superlora", "behind F", "theta"])
@pytest.mark.parametrize("targets", ["embeddings", "conv"])
def test_embeddings_and_convolutions(config: str, targets: str) -> None:
    torch.manual_seed(0)
    pair = pair_of(Tokens().double(), 4, CONFIGS[config][0], targets)
    ids = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(1))
    expected = []
    for row, member in enumerate(INDEX):
        if member is not None:
            pair.copy_member(member)
        with contextlib.nullcontext() if member is not None else pair.adapter.disabled():
            expected.append(pair.reference(ids[row : row + 1]))
    with pair.population.members(INDEX):
        y = pair.model(ids)
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for parameter in pair.population.parameters():
        assert [bool(gradient.any()) for gradient in parameter.grad] == [True, False, True, False]


@pytest.mark.parametrize("config", [P.lora(2), P.superlora(2), P.dora(2)], ids=["lora", "superlora", "dora"])
def test_quantized_layers(config: tna.Config) -> None:
    tt.register_quantized("packed", Packed)
    pair, x = pair_of(packed(), 4, config, "all-linear", dtype=torch.float32), torch.randn(4, 3, 8)
    assert_same(by_members(pair, INDEX, x), alone(pair, INDEX, x), INDEX, 1e-4)


@pytest.mark.law("autocast")
@pytest.mark.parametrize("config", ["lora", "superlora", "dora", "theta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(config: str, dtype: Any) -> None:
    pair = pair_of(SideBySide([(12, 16), (4, 16)]).to(dtype), 4, CONFIGS[config][0], "all-linear", dtype=torch.float32)
    x = Batch(4, INDEX).x(16).to(dtype)
    # Not around both: autocast caches what it has converted of a parameter that changes.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = by_members(pair, INDEX, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32, cache_enabled=False):
        expected = alone(pair, INDEX, x)
    assert found.y.dtype == expected.y.dtype == torch.bfloat16
    for one, other in zip([found.y, found.x, *found.arrays], [expected.y, expected.x, *expected.arrays], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_a_model_that_masks_attention() -> None:
    """nn.MultiheadAttention with masks: rows cannot be told from its arguments, so each member has a whole pass."""
    torch.manual_seed(0)
    pair = pair_of(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).double(), 4, P.superlora(2))
    x, hidden = torch.randn(4, 4, 8).double(), torch.ones(4, 4).triu(1).bool()
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 3] = True

    def call(model: Any, x: Any, rows: slice = slice(None)) -> Any:
        return model["attn"](x, x, x, key_padding_mask=padding[rows], attn_mask=hidden)

    with pair.population.members(INDEX):
        y, weights = call(pair.model, x)
    for row, member in enumerate(INDEX):
        if member is not None:
            pair.copy_member(member)
        with contextlib.nullcontext() if member is not None else pair.adapter.disabled():
            expected = call(pair.reference, x[row : row + 1], slice(row, row + 1))
        torch.testing.assert_close((y[row : row + 1], weights[row : row + 1]), expected)


def test_dropout_is_that_of_adapters_for_each_row() -> None:
    """With the same random numbers; and in evaluation there is none."""
    for config in ("lora", "superlora", "behind F", "theta", "dora"):
        pair = small_pair(config, ["head"], dropout=0.5)
        x = x_of(pair)
        single = small().double()
        for number in range(4):
            adapter = tt.attach(single, CONFIGS[config][0], ["head"], str(number), dropout=0.5, dtype=torch.float64)
            adapter.load_arrays(pair.population[number].arrays())
        assert_same(by_members(pair, INDEX, x), alone(pair, INDEX, x), INDEX)
        evaluated = by_members(pair, INDEX, x).y
        pair.model.train(), single.train()
        torch.manual_seed(1)
        with tt.rows(single, [None if number is None else str(number) for number in INDEX]):
            expected = single(x)
        torch.manual_seed(1)
        dropped = by_members(pair, INDEX, x).y
        torch.testing.assert_close(dropped, expected.detach(), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(dropped, evaluated)


def test_other_adapters_act_on_every_row() -> None:
    pair = small_pair()
    x = x_of(pair)
    for model in (pair.model, pair.reference):
        stir(tt.attach(model, P.superlora(2), "qv", "other", dtype=torch.float64), 0.3)
    pair.population.set_weight(0.5)
    pair.adapter.set_weight(0.5)
    assert_same(by_members(pair, INDEX, x), alone(pair, INDEX, x), INDEX)
    # A weight of 0 is that of an inactive adapter: rows that name it have it with weight 1.
    for handle in (pair.population, pair.adapter):
        handle.set_weight(0.0)
    found = by_members(pair, INDEX, x)
    pair.adapter.set_weight(1.0)
    assert_same(found, alone(pair, INDEX, x), INDEX)


@pytest.mark.law("copies")
def test_nested_in_a_part_and_in_copies() -> None:
    """Nested, the inner one counts; a copy that is made inside has no rows."""
    pair = small_pair()
    x, inner = x_of(pair), [None, 1, 1, 3]
    expected, of_inner = alone(pair, INDEX, x).y, alone(pair, inner, x).y
    pair.population[1].activate()
    with pair.population.members(INDEX), torch.no_grad():
        torch.testing.assert_close(nn.Sequential(pair.model)(x), expected)
        with pair.population.members(inner):
            torch.testing.assert_close(pair.model(x), of_inner)
        torch.testing.assert_close(pair.model(x), expected)
        duplicates = [copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))]
        outputs = [duplicate(x) for duplicate in duplicates]
    for duplicate, y in zip(duplicates, outputs, strict=True):
        torch.testing.assert_close(y, alone(pair, [1] * 4, x).y)
        population = tt.adapters(duplicate)["default"]
        assert isinstance(population, tt.Population)
        found = by_members(pair._replace(model=duplicate, population=population), INDEX, x)
        assert_same(found, alone(pair, INDEX, x), INDEX)
        with torch.no_grad():
            for parameter in population.parameters():
                parameter.zero_()
    torch.testing.assert_close(by_members(pair, INDEX, x).y, expected)


@pytest.mark.law("threads")
def test_threads_with_different_members() -> None:
    """Members hold for the thread that enters them, also where another thread has none."""
    pair = small_pair("superlora")
    x, other = x_of(pair), [1, 1, None, 2]
    expected = [alone(pair, index, x).y for index in (INDEX, other, [3] * 4)]
    pair.population[3].activate()

    @torch.no_grad()
    def check(index: Any, right: Tensor) -> None:
        with contextlib.nullcontext() if index is None else pair.population.members(index):
            torch.testing.assert_close(pair.model(x), right, rtol=1e-10, atol=1e-10)

    def several() -> None:
        for _ in range(10):
            check(INDEX, expected[0])

    beside(several, [lambda: check(None, expected[2]), lambda: check(other, expected[1])])


# -- Parts of the model --------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose body is called alone, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Linear(8, 8, dtype=torch.float64) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.law("members-alone", "array-changes")
@pytest.mark.parametrize("config", ["lora", "superlora", "theta", "dora"])
def test_a_part_of_the_model_that_is_called_alone(config: str) -> None:
    """With what the arrays are in each call, however they are written to; and what θ makes serves all layers."""
    pair = pair_of(Wrapped(), 4, CONFIGS[config][0], "all-linear")
    x, body = Batch(4, INDEX).x(8), pair._replace(model=pair.model.body)
    arrays = delta.ThetaArrays
    with mock.patch.object(arrays, "computed", autospec=True, side_effect=arrays.computed) as computed:
        found = by_members(body, INDEX, x)
    assert computed.call_count == (config == "theta")
    assert_same(found, alone(pair, INDEX, x), INDEX)
    with pair.population.members(INDEX):
        for grad in (True, False, False, True):
            for parameter in pair.population.parameters():
                parameter.data[2:] *= 0.5
            expected = alone(pair, INDEX, x)
            with torch.set_grad_enabled(grad):
                y = body.model(x)
            torch.testing.assert_close(y, expected.y)
            if grad:
                y.square().sum().backward()
                found = [parameter.grad for parameter in pair.population.parameters()]
                assert_same(expected._replace(arrays=found), expected, INDEX)
                pair.model.zero_grad()


@pytest.mark.parametrize("config", ["lora", "theta", "dora"])
@pytest.mark.parametrize("part", [False, True], ids=["model", "part"])
def test_a_model_that_is_converted_between_passes(config: str, part: bool) -> None:
    """To a wider dtype: the numbers are the same."""
    pair = pair_of(Wrapped(), 4, CONFIGS[config][0], "all-linear")
    x = Batch(4, INDEX).x(8)
    pair.model.float()
    with pair.population.members(INDEX):
        run = pair.model.body if part else pair.model
        run(x.float())
        pair.model.double()
        pair.reference.double()
        y = run(x)
        torch.testing.assert_close(y, alone(pair, INDEX, x).y)
        y.square().sum().backward()
    for parameter in pair.population.parameters():
        assert parameter.grad.dtype == torch.float64


@pytest.mark.law("interrupted-pass")
def test_a_part_of_the_model_after_a_pass_that_was_interrupted() -> None:
    """By a KeyboardInterrupt, for which torch runs no hook."""
    pair = pair_of(Wrapped(), 4, P.lora(2), "all-linear")
    x = Batch(4, INDEX).x(8)
    hook = pair.model.body[2].register_forward_pre_hook(mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), pair.population.members(INDEX):
        pair.model(x)
    hook.remove()
    with pair.population.members(INDEX):
        for _ in range(2):
            torch.testing.assert_close(pair.model.body(x), alone(pair, INDEX, x).y)
            for parameter in pair.population.parameters():
                parameter.data *= 0.5


# -- Training ------------------------------------------------------------------------------------


@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize("config", ["lora", "superlora", "theta", "dora", "behind F"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(config: str, reentrant: bool) -> None:
    pair = small_pair(config)
    x, parameters = x_of(pair).requires_grad_(), list(pair.population.parameters())
    gradients = []
    for run in (pair.model, lambda x: checkpoint(pair.model, x, use_reentrant=reentrant)):
        pair.model.zero_grad()
        with pair.population.members(INDEX):
            run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
    expected = alone(pair, INDEX, x)
    for found in gradients:
        assert_same(expected._replace(arrays=found), expected, INDEX)


@pytest.mark.law("between-passes")
def test_backward_outside_recomputes_nothing_else() -> None:
    """Nor with other rows, nor with another active member."""

    class Checkpointed(SideBySide):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    pair = pair_of(Checkpointed([(6, 9)]), 4, P.lora(2), "all-linear")
    x = Batch(4, INDEX).x(9).requires_grad_()
    text = r"or rows\(\) left, between a forward pass with activation checkpointing"
    with pair.population.members(INDEX):
        output = pair.model(x)
    for context in (contextlib.nullcontext(), pair.population.members([1, None, 0, 2])):
        with context, pytest.raises(RuntimeError, match=text):
            output.sum().backward(retain_graph=True)
    pair.population[1].activate()
    output = pair.model(x)
    pair.population[2].activate()
    with pytest.raises(RuntimeError, match=text):
        output.sum().backward(retain_graph=True)
    pair.population[1].activate()
    output.sum().backward()


def test_kept_parameters_train_with_the_members_of_the_batch() -> None:
    pair = small_pair("superlora", keep_trainable="head")
    parameters = [pair.model.head.weight, *pair.population.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD([parameter for parameter in pair.model.parameters() if parameter.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with pair.population.members(INDEX):
            pair.model(x_of(pair)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(parameters[0], before[0])
    for parameter, old in zip(parameters[1:], before[1:], strict=True):
        assert [torch.equal(*pair) for pair in zip(parameter, old, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("config", ["lora", "superlora", "theta", "dora"])
def test_second_derivatives(config: str) -> None:
    pair = pair_of(SideBySide([(3, 4)]), 2, CONFIGS[config][0], "all-linear")
    parameters = dict(pair.model.named_parameters())
    names = [name for name in parameters if "tnadapt_" in name]
    x = torch.randn(2, 2, 4, dtype=torch.float64)

    def output(x: Tensor, *arrays: Tensor) -> Tensor:
        with pair.population.members([1, 0]):
            return torch.func.functional_call(pair.model, dict(zip(names, arrays, strict=True)), (x,))

    inputs = [x.requires_grad_(), *(parameters[name].detach().clone().requires_grad_() for name in names)]
    torch.autograd.gradcheck(output, inputs)
    torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.law("functional-transforms")
@pytest.mark.parametrize("config", ["lora", "weight", "superlora", "theta", "behind F", "dora"])
def test_gradients_by_torch_func(config: str) -> None:
    pair = small_pair(config, ["head"])
    x, arrays = x_of(pair), {name: p.detach() for name, p in pair.model.named_parameters() if "tnadapt_" in name}

    def loss(arrays: Any) -> Tensor:
        with pair.population.members(INDEX):
            return torch.func.functional_call(pair.model, arrays, (x,)).square().sum()

    gradients = torch.func.grad(loss)(arrays)
    expected = dict(zip(arrays, by_members(pair, INDEX, x).arrays, strict=True))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)
    several = {name: torch.stack([array, 2.0 * array]) for name, array in arrays.items()}
    losses = torch.vmap(loss)(several)
    torch.testing.assert_close(losses[1], loss({name: 2.0 * array for name, array in arrays.items()}))


@pytest.mark.law("functional-transforms")
def test_gradients_reach_the_arrays_of_each_functional_call() -> None:
    """Though the arrays of a later one may have the address and the numbers of those of an earlier one."""
    pair = small_pair("theta", ["head"])
    (name,) = [name for name, _ in pair.model.named_parameters() if "tnadapt_" in name]
    x = x_of(pair)
    with pair.population.members(INDEX):
        for _ in range(10):
            arrays = {name: pair.model.get_parameter(name).detach().clone().requires_grad_()}
            torch.func.functional_call(pair.model, arrays, (x,)).square().sum().backward()
            assert arrays[name].grad[INDEX[0]].any()


# -- Compiled programs ---------------------------------------------------------------------------


@pytest.mark.slow
@compiles_whole
# Of torch's compiler, about the inputs of the parts of a program.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("config", ["lora", "superlora", "theta"])
def test_a_compiled_model_runs_adapted_layers_outside_of_its_program(config: str) -> None:
    """Correct with any members and gradients, without recompiling for other members."""
    torch._dynamo.reset()
    pair = pair_of(SideBySide([(12, 16), (4, 16)]), 4, CONFIGS[config][0], "all-linear")
    x = Batch(4, INDEX).x(16)
    program = torch.compile(pair.model, backend="aot_eager")
    compiled = pair._replace(model=program)
    counts = []
    for index in (INDEX, [3, 3, None, None], [1] * 4):
        assert_same(by_members(compiled, index, x), alone(pair, index, x), index)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[-1]
    pair.population[1].activate()
    torch.testing.assert_close(program(x), alone(pair, [1] * 4, x).y)


@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@pytest.mark.parametrize("config", in_depth(CONFIGS, ["lora", "behind F", "theta", "dora, weight", "pissa"]))
def test_a_model_is_compiled_once_for_whichever_member_is_active(config: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pair = pair_of(SideBySide([(12, 16), (4, 16)]), 12, CONFIGS[config][0], "all-linear", **CONFIGS[config][1])
    x, parameters = Batch(4, INDEX).x(16), list(pair.population.parameters())
    program = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    for number in range(12):
        pair.population[number].activate()
        y = program(x)
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        expected = alone(pair, [number] * 4, x)
        assert_same(Pass(y, expected.x, list(gradients)), expected, [number])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    duplicate = copy.deepcopy(pair.model)
    y = torch.compile(duplicate, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected.y)


# -- Language models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("config", ["lora", "superlora", "theta"])
def test_generate(config: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from .tiny_language_model import WORDS, llama

    pair = pair_of(llama().eval(), 4, CONFIGS[config][0], dtype=torch.float32)
    stir(pair.population, 2.0, 5)
    ids = torch.randint(3, len(WORDS), (4, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    with pair.population.members(INDEX):
        found = pair.model.generate(input_ids=ids, attention_mask=mask, **settings).unflatten(0, (4, -1))
    texts = set()
    for row, member in enumerate(INDEX):
        if member is not None:
            pair.copy_member(member)
        with contextlib.nullcontext() if member is not None else pair.adapter.disabled():
            texts.add(str(pair.reference.generate(input_ids=ids[:1], attention_mask=mask[:1], **settings).tolist()))
            part = slice(row, row + 1)
            expected = pair.reference.generate(input_ids=ids[part], attention_mask=mask[part], **settings)
        assert torch.equal(found[row], expected)
    assert len(texts) == 3


def test_trainer(tmp_path: Path) -> None:
    """Two steps, in which a column of the data has the member of each row."""
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    from . import hugging_face as hf

    class PerMember(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hf.bert()
            self.population = tt.attach(self.inner, "lora", rank=2, population=4, keep_trainable="classifier")

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any, member: Any) -> Any:
            with self.population.members(member):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model = PerMember()
    before = [parameter.detach().clone() for parameter in model.population.parameters()]
    data = [{**row, "member": (0, 2)[number % 2]} for number, row in enumerate(hf.sentences())]
    hf.trainer_of(model, tmp_path, data, max_steps=2, weight_decay=0.0).train()
    changed = [
        [not torch.equal(*both) for both in zip(parameter, old, strict=True)]
        for parameter, old in zip(model.population.parameters(), before, strict=True)
    ]
    assert all(members == [True, False, True, False] for members in changed)
