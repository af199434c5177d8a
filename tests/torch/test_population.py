"""Populations: every member is the adapter that is attached alone with the member's arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import examples

from .internals import batch_rows
from .small import stir

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
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(1.0, float(other.abs().max())))
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
        with pytest.raises(type(refusal)) as refused:
            tt.attach(SideBySide(shapes), config, "all-linear", strategy=strategy, population=batch.count)
        assert str(refused.value) == str(refusal)
        return None


def check_batch(pair: Pair, batch: Batch) -> None:
    x = batch.x(max(layer.in_features for layer in pair.model.layers))
    expected = alone(pair, batch.index, x)
    assert_same(by_members(pair, batch.index, x), expected, batch.index)
    # One member after the other, the plain form.
    with mock.patch.object(batch_rows, "_of_members", lambda *args: None):
        assert_same(by_members(pair, batch.index, x), expected, batch.index)


@pytest.mark.parametrize("preset", tna.presets.__all__)
@given(batch=batches(), strategy=st.sampled_from(STRATEGIES))
@example(batch=Batch(5, [2, 0, 4]), strategy="auto")
@example(batch=Batch(3, [2, 2, None, 0]), strategy="auto")
@settings(max_examples=5)
def test_a_member_of_every_preset_is_the_adapter_alone(preset: str, batch: Batch, strategy: str) -> None:
    config, shapes = examples()[preset]
    pair = attached_or_refused(shapes, batch, config, strategy)
    assume(pair is not None)
    check_batch(pair, batch)


@pytest.mark.filterwarnings("ignore:rank=.* is beyond:UserWarning")
@given(plan=plans(), batch=batches(), strategy=st.sampled_from(STRATEGIES))
def test_a_member_of_any_config_is_the_adapter_alone(plan: tna.SuperLoRA, batch: Batch, strategy: str) -> None:
    pair = attached_or_refused(plan.shapes, batch, plan.config, strategy)
    assume(pair is not None)
    check_batch(pair, batch)
