"""Row-sparse gradients of populations: the same numbers as dense ones, with rows of the members in use alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tnadapt as tna
import tnadapt.torch as tt

from .small import batch, compiles_whole, small, stir

COUNT = 6
CONFIGS: dict[str, Any] = {
    "lora": tna.presets.lora(2),
    "superlora": tna.presets.superlora(2),
    "behind F": tna.presets.superlora(2, projection="linear", ratio=0.5),
    "theta": tna.presets.unilora(9, 2),
    "dora": tna.presets.dora(2),
    "hira": tna.presets.hira(2),
    "tinylora": tna.presets.tinylora(),
}
configs = pytest.mark.parametrize("config", CONFIGS)


def population(sparse: bool, config: str = "lora", **options: Any) -> tuple[nn.Module, tt.Population]:
    dtype = options.setdefault("dtype", torch.float64)
    model = small().to(dtype)
    adapters = tt.attach(model, CONFIGS[config], population=COUNT, sparse=sparse, **options)
    assert isinstance(adapters, tt.Population)
    stir(adapters, 0.3)
    return model, adapters


def x_of(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return batch(size=4, seed=number).to(dtype)


def parameters(adapters: Any) -> list[Tensor]:
    return [parameter for _, parameter in adapters.named_parameters()]


def assert_of(sparse: tt.Population, dense: tt.Population, members: set[int]) -> None:
    """Assert that sparse gradients are the dense ones, and have rows of these members, each once."""
    for parameter, other in zip(parameters(sparse), parameters(dense), strict=True):
        gradient = parameter.grad
        assert gradient.layout == torch.sparse_coo
        assert gradient._nnz() == len(members)
        assert gradient.coalesce().indices().tolist() == [sorted(members)]
        assert torch.equal(gradient.to_dense(), other.grad)


#: The members of a batch of four rows, or the active one; None drops gradients, and False sets them to zero.
Passes = list[Any]
passes = st.lists(
    st.lists(st.none() | st.integers(0, COUNT - 1), min_size=3, max_size=3).map(lambda rows: [*rows, 1])
    | st.integers(0, COUNT - 1)
    | st.sampled_from([None, False]),
    min_size=1,
    max_size=6,
)


@given(st.sampled_from(list(CONFIGS)), passes, st.sampled_from([torch.float64, torch.bfloat16]))
@example("lora", [[5, 0, 5, 2], [2, None, 5, 1], 3, [3, 0, 0, 0], False, [4, 3, 2, 1]], torch.float64)
@example("superlora", [[5, 0, 5, 2], [2, None, 5, 1], None, 3, 3, [3, 0, 0, 0]], torch.bfloat16)
def test_they_are_the_dense_ones(config: str, passes: Passes, dtype: torch.dtype) -> None:
    both, members = [population(sparse, config, dtype=dtype) for sparse in (True, False)], set[int]()
    for number, rows in enumerate(passes):
        for model, adapters in both:
            if isinstance(rows, list):
                with adapters.members(rows):
                    model(x_of(number, dtype)).square().sum().backward()
            elif rows is None or rows is False:
                torch.optim.SGD(adapters.parameters()).zero_grad(set_to_none=rows is None)
            else:
                adapters[rows].activate()
                model(x_of(number, dtype)).square().sum().backward()
        if isinstance(rows, list):
            members |= {member for member in rows if member is not None}
        elif rows is None or rows is False:
            members.clear()
        else:
            members.add(rows)
        if rows is not None and all(parameter.grad is not None for parameter in parameters(both[0][1])):
            assert_of(both[0][1], both[1][1], members)


@configs
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(config: str, reentrant: bool) -> None:
    both = [population(sparse, config) for sparse in (True, False)]
    for model, adapters in both:
        with adapters.members([2, 5, None, 2]):
            checkpoint(model, x_of(0).requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert_of(both[0][1], both[1][1], {2, 5})


def test_several_passes_in_one_backward() -> None:
    both = [population(sparse) for sparse in (True, False)]
    for model, adapters in both:
        losses = []
        for number, rows in enumerate(([2, 5, None, 2], [1, 2, 2, 2])):
            with adapters.members(rows):
                losses.append(model(x_of(number)).square().sum())
        sum(losses).backward()
    assert_of(both[0][1], both[1][1], {1, 2, 5})


def test_the_active_member_is_seen_as_it_is() -> None:
    """Its array is a view, also of numbers that are written without torch's notice."""
    model, adapters = population(True)
    adapters[2].activate()
    before = model(x_of(0)).detach()
    for parameter in parameters(adapters):
        parameter.data.mul_(0.5)
    output = model(x_of(0))
    assert not torch.allclose(output, before)
    with torch.no_grad():
        torch.testing.assert_close(output.detach(), model(x_of(0)))


def test_a_gradient_shares_no_memory_with_another() -> None:
    """Scaling it in place, as GradScaler does, leaves those of other parameters as they are."""
    model, adapters = population(True, "theta", keep_trainable="head")
    with adapters.members([2, 5, 0, 1]):
        model(x_of(0)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    storages = {(g._values() if g.is_sparse else g).untyped_storage().data_ptr() for g in gradients}
    assert len(storages) == len(gradients) > 1


@configs
def test_where_they_would_be_used_again_they_are_dense(config: str) -> None:
    model = nn.Sequential(*(nn.Linear(rows, 6) for rows in (16, 6, 6)), nn.Tanh(), nn.Linear(6, 4)).double()
    adapters = tt.attach(model, CONFIGS[config], "all-linear", population=COUNT, sparse=True, dtype=torch.float64)
    stir(adapters, 0.3)
    arrays = {name: parameter.detach() for name, parameter in model.named_parameters() if "tnadapt_" in name}

    def loss(arrays: dict[str, Tensor]) -> Tensor:
        with adapters.members([2, 5, None, 2]):
            return torch.func.functional_call(model, arrays, (x_of(0),)).square().sum()

    with adapters.members([2, 5, None, 2]):
        several = [model(x_of(0)).square().sum() for _ in range(2)]
    once = torch.autograd.grad(several[0], parameters(adapters))
    again = torch.autograd.grad(several[1], parameters(adapters), create_graph=True)
    of_function = torch.func.grad(loss)(arrays).values()
    for gradient, graph, other in zip(once, again, of_function, strict=True):
        assert gradient.is_sparse
        for dense in (graph, other):
            torch.testing.assert_close(dense, gradient.to_dense(), rtol=1e-10, atol=1e-10)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in again), parameters(adapters))
    adapters.sparse = False
    with adapters.members([2, 5, None, 2]):
        again = torch.autograd.grad(model(x_of(0)).square().sum(), parameters(adapters), create_graph=True)
    expected = torch.autograd.grad(sum(gradient.square().sum() for gradient in again), parameters(adapters))
    for gradient, other in zip(second, expected, strict=True):
        assert gradient.is_sparse
        torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-10, atol=1e-10)


def test_batched_ones_are_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 4)).double()
    adapters = tt.attach(model, "lora", "all-linear", rank=2, population=COUNT, sparse=True, dtype=torch.float64)
    stir(adapters, 0.3)
    with adapters.members([2, 5, None, 2]):
        y = model(x_of(0))
    factors = torch.stack([y, 2.0 * y]).detach()
    batched = torch.autograd.grad(y, parameters(adapters), factors, retain_graph=True, is_grads_batched=True)
    for both, gradient in zip(batched, torch.autograd.grad(y, parameters(adapters), y.detach()), strict=True):
        torch.testing.assert_close(both, torch.stack([gradient, 2.0 * gradient]).to_dense())


def test_arrays_that_are_computed_have_dense_ones() -> None:
    model, adapters = population(True)
    arrays = {name: parameter for name, parameter in model.named_parameters() if "tnadapt_" in name}
    with adapters.members([2, 5, None, 2]):
        doubled = {name: 2.0 * array for name, array in arrays.items()}
        torch.func.functional_call(model, doubled, (x_of(0),)).square().sum().backward()
    assert {parameter.grad.layout for parameter in parameters(adapters)} == {torch.strided}


def test_dispatch_modes_leave_them_sparse() -> None:
    model, adapters = population(True)
    with FlopCounterMode(display=False), adapters.members([2, 5, None, 2]):
        model(x_of(0)).square().sum().backward()
    assert {parameter.grad.layout for parameter in parameters(adapters)} == {torch.sparse_coo}


@pytest.mark.slow
@compiles_whole
def test_programs_have_dense_ones() -> None:
    torch._dynamo.reset()
    both = [population(sparse) for sparse in (True, False)]
    gradients = []
    for model, adapters in both:
        adapters[2].activate()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x_of(0)).square().sum().backward()
        assert {parameter.grad.layout for parameter in parameters(adapters)} == {torch.strided}
        with adapters.members([2, 5, None, 2]):
            model(x_of(1)).square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters(adapters)])
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


# -- Optimizers --------------------------------------------------------------------------------------------------------


#: Of torch's optimizers, about the sparse tensors that they make.
sparse_checks = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
SCHEDULE = [[5, 0, 5, 2], [2, None, 1, 1], [4, 4, 4, 4], [5, 1, 0, None]]


def trained(model: nn.Module, adapters: tt.Population, optimizer: Any) -> list[Tensor]:
    for number, rows in enumerate(SCHEDULE):
        with adapters.members(rows):
            model(x_of(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in parameters(adapters)]


OPTIMIZERS: dict[str, Callable[[tt.Population], Any]] = {
    "MemberAdamW": lambda adapters: tt.MemberAdamW(adapters, lr=0.1, weight_decay=0.1, max_norm=0.5),
    "SGD": lambda adapters: torch.optim.SGD(adapters.parameters(), 0.1),
    "Adagrad": lambda adapters: torch.optim.Adagrad(adapters.parameters(), 0.1),
}


@configs
@sparse_checks
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_take_the_steps_of_dense_ones(config: str, optimizer: str) -> None:
    both = [population(sparse, config) for sparse in (True, False)]
    found, expected = (trained(model, adapters, OPTIMIZERS[optimizer](adapters)) for model, adapters in both)
    for array, other in zip(found, expected, strict=True):
        torch.testing.assert_close(array, other, rtol=1e-9, atol=1e-12)


@configs
@sparse_checks
def test_sparse_adam(config: str) -> None:
    """The rows of members in the batch take Adam's step, of which there is one count."""
    model, adapters = population(True, config)
    found = trained(model, adapters, torch.optim.SparseAdam(list(adapters.parameters()), lr=0.1))
    model, adapters = population(False, config)
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters(adapters)]
    for number, rows in enumerate(SCHEDULE):
        with adapters.members(rows):
            gradients = torch.autograd.grad(model(x_of(number)).square().mean(), parameters(adapters))
        for parameter, gradient, (first, second) in zip(parameters(adapters), gradients, moments, strict=True):
            for member in {member for member in rows if member is not None}:
                first[member] = 0.9 * first[member] + 0.1 * gradient[member]
                second[member] = 0.999 * second[member] + 0.001 * gradient[member] ** 2
                rate = 0.1 * (1 - 0.999 ** (number + 1)) ** 0.5 / (1 - 0.9 ** (number + 1))
                with torch.no_grad():
                    parameter[member] -= rate * first[member] / (second[member].sqrt() + 1e-8)
    for array, parameter in zip(found, parameters(adapters), strict=True):
        torch.testing.assert_close(array, parameter.detach(), rtol=1e-9, atol=1e-12)


def test_the_gradient_scaler_unscales_them() -> None:
    both = [population(sparse, dtype=torch.float32) for sparse in (True, False)]
    for model, adapters in both:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with adapters.members([2, 5, None, 2]):
            scaler.scale(model(x_of(0, torch.float32)).square().sum()).backward()
        scaler.unscale_(torch.optim.SGD(adapters.parameters()))
    assert_of(both[0][1], both[1][1], {2, 5})


# -- The setting -------------------------------------------------------------------------------------------------------


def test_the_setting_is_that_of_attach_and_load_and_can_be_changed(tmp_path: Path) -> None:
    _, adapters = population(True)
    adapters.save(tmp_path / "population")
    assert not tt.load(small().double(), tmp_path / "population").sparse
    loaded = tt.load(small().double(), tmp_path / "population", members=[4, 1], sparse=True)
    for several in (adapters, loaded, copy.deepcopy(adapters), pickle.loads(pickle.dumps(adapters))):
        assert several.sparse is True
        several[1].activate()
        for sparse in (True, False, True):
            several.sparse = sparse
            for act in (contextlib.nullcontext(), several.members([1])):
                several.model.zero_grad()
                with act:
                    several.model(x_of(0)).square().sum().backward()
                layouts = {parameter.grad.layout for parameter in parameters(several)}
                assert layouts == {torch.sparse_coo if sparse else torch.strided}
    with pytest.raises(tna.ConfigError, match=r"^sparse must be True or False; got 2$"):
        adapters.sparse = 2
    adapters[1].save(tmp_path / "member")
    text = r"^names, seeds and sparse are those of a population's members: give population=, too$"
    with pytest.raises(tna.ConfigError, match=text):
        tt.attach(small(), "lora", sparse=True)
    with pytest.raises(tna.ConfigError, match=text):
        tt.load(small().double(), tmp_path / "member", sparse=True)
