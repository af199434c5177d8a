"""Linear layers with updates, factored or added to the weight: outputs and derivatives are the formula's."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.applying import Applying, Hadamard, Magnitude
from tnadapt.algebra.factoring import factoring
from tnadapt.testing.strategies import plans

from .internals import (
    MACHINES,
    Machine,
    Slice,
    StepWork,
    choose,
    costs,
    dequantized,
    forms,
    product_vjp_once,
)
from .small import stir

# Outputs and derivatives with every update, layer and strategy are compared with the formula in test_forward_laws.py.


CONFIGS = {
    "lora": P.lora(2, alpha=8), "lokr": P.lokr(2), "krona": P.krona(alpha=2), "compacter": P.compacter(terms=2),
    "loha": P.loha(2), "weighted": tna.Config(rank=2, format="cp-weighted", terms=2), "gralora": P.gralora(2, 2),
    "a product that subtracts": P.lokr(1, alpha=3, start="random"), "miss": P.miss(4, alpha=3),
    "miss that subtracts": P.miss(4, alpha=3, start="random"),
    "cosines": tna.Config(projection="dct2", on="weight", alpha=3), "slices": P.superlora(8),
}  # fmt: skip
each_config = pytest.mark.parametrize("name", CONFIGS)


def test_both_the_input_and_the_output_count() -> None:
    widest = forms.MOST_ELEMENTS // 4
    assert forms.is_small(torch.empty(4, widest), torch.empty(8, widest))
    assert forms.is_small(torch.empty(2, 2, 8), torch.empty(widest, 8))
    assert not forms.is_small(torch.empty(4, widest + 1), torch.empty(8, widest + 1))
    assert not forms.is_small(torch.empty(4, 8), torch.empty(widest + 1, 8))


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer count as a large one, where low-rank matrices have the autograd function of all others."""
    if request.param:
        monkeypatch.setattr(forms, "MOST_ELEMENTS", -1)


@pytest.mark.parametrize(
    ("config", "strategy"), [(P.lora(2), "weight"), (P.lora(2), "factored"), (P.superlora(8), "auto")]
)
def test_a_layers_output_may_be_written_to_in_place(config: tna.Config, strategy: str, large: None) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 3), nn.Dropout(0.5, inplace=True))
    adapter = tt.attach(model, config, "all-linear", strategy=strategy)
    stir(adapter, 0.5)
    x = torch.randn(2, 3, 8)
    model(x).sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())
    model.eval()
    with torch.no_grad():
        without = model(x)
    assert torch.equal(model(x), without)


@pytest.mark.law("fresh-is-zero")
@each_config
def test_inputs_of_other_strides_and_of_many_lengths(name: str, large: None) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(5, 3, 8).transpose(0, 1)
    jagged = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    with torch.no_grad():
        before = model(x)
    adapter = tt.attach(model, CONFIGS[name], ["0"], strategy="weight" if name == "slices" else "factored")
    assert torch.equal(model(x), before)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    stir(adapter, 0.5)
    torch.testing.assert_close(model(x), model(x.contiguous()))
    empty = model(torch.zeros(0, 8, requires_grad=True))
    assert empty.shape == (0, 8)
    empty.sum().backward()
    assert not any(p.grad.any() for p in adapter.parameters())
    output = model(jagged)
    torch.testing.assert_close(output.values(), model(jagged.values()))
    output.values().sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("trained", ["factor0", "factor1"])
def test_one_factor_of_a_slice_is_trained_alone(trained: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    adapter = tt.attach(model, P.superlora(1), "all-linear", strategy="weight")
    stir(adapter, 0.5)
    arrays, gradients = dict(adapter.named_parameters()), []
    for chosen in (["factor0", "factor1"], trained):
        adapter.set_trainable(arrays=chosen)
        model(torch.linspace(-1, 1, 24).view(3, 8)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in arrays.items() if p.grad is not None})
        model.zero_grad()
    (alone,) = gradients[1]
    assert alone.endswith(trained)
    assert torch.equal(gradients[1][alone], gradients[0][alone])


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
            product = made.product(*given_to)
            if product is not None:
                found, _ = product_vjp_once(product, made.shape, 1.0, [])
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_mixes_elements_or_is_large_is_made_whole() -> None:
    shapes = [(8, 8)] * 4
    assert Slice.of(tna.UpdatePlan(P.superlora(1), shapes), 1) is not None
    assert Slice.of(tna.UpdatePlan(P.superlora(8), shapes), 1) is None  # arrays of 256 elements, four times
    assert Slice.of(tna.UpdatePlan(P.fastfood(0.5), shapes), 1) is None
    assert Slice.of(tna.UpdatePlan(P.superlora(1, projection="shuffle"), shapes), 1) is None
    assert Slice.of(tna.UpdatePlan(P.dense(), shapes), 1) is not None


# -- Modes that intercept single operations, or change how backward runs, with every strategy --------------------------


CASES = [
    (P.lora(3), "weight"), (P.lora(3), "factored"), (P.lora(3), "additive"),
    (P.lokr(2), "weight"), (P.lokr(2), "factored"), (P.superlora(3), "weight"), (P.superlora(3), "additive"),
]  # fmt: skip
each_case = pytest.mark.parametrize(("config", "strategy"), CASES)


def adapted(config: tna.Config, strategy: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    adapter = tt.attach(model, config, "all-linear", strategy=strategy)
    stir(adapter, 0.3)
    return model, list(adapter.parameters())


@pytest.mark.law("functional-transforms")
@each_case
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
# torch's own: forward_ad registers its decompositions by torch.jit.script. From torch 2.15 on it is a FutureWarning.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_batches_of_gradients_forward_mode_and_backward_under_autocast(config: tna.Config, strategy: str) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(5, 24, requires_grad=True)
    y, several = model(x), torch.randn(3, 5, 24)
    batched = torch.autograd.grad(y, [x, *parameters], several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, [x, *parameters], one, retain_graph=True) for one in several]
    for batch, rows in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(rows), rtol=1e-4, atol=1e-4 * float(batch.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = model(x)
        found = torch.autograd.grad(y, [x, *parameters], several[0])
    for one, two in zip(found, each[0], strict=True):
        # Strategies that form the sum take backward's products in the precision of the region that they are in.
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(two.abs().max()))
    x, tangent = torch.randn(2, 24), torch.randn(2, 24)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(pushed, torch.func.jvp(model, (x,), (tangent,))[1], rtol=1e-4, atol=1e-4)


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


def peak_of(call: Callable[[], Any]) -> int:
    """Return the peak of bytes that torch allocated on the CPU, beyond those allocated before."""
    gc.collect()
    gc.disable()  # a model of an earlier test, collected during the call, would count as memory that the call freed
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    finally:
        gc.enable()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


#: Forward and backward, at most, in sizes of the weight. The update and the sum share one array in turn, into which
#: backward also writes the weight's gradient. Columns are few, so that norms are computed in one piece.
LARGEST: dict[tuple[str, str], tuple[int, int]] = {
    ("lora", "weight"): (1, 1), ("lora", "factored"): (0, 0), ("lora", "additive"): (1, 1),
    ("dora", "weight"): (7, 8), ("dora", "factored"): (6, 3), ("dora", "additive"): (7, 3),
    ("dora by columns", "weight"): (7, 8), ("hira", "weight"): (3, 5), ("hira", "additive"): (2, 1),
    **{(name, "weight"): (1, 1) for name in ("lora of alpha", "superlora", "loha", "lorta", "dense")},
}  # fmt: skip
SETTINGS = {
    "dora by columns": P.dora(4, magnitude_axis="cols"), "lora of alpha": P.lora(4, alpha=8.0), "dense": P.dense(),
    "loha": P.loha(2), "lorta": P.lorta(2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "strategy"), LARGEST)
def test_the_memory_of_a_step(name: str, strategy: str) -> None:
    """Between the passes nothing is kept that is as large as the weight, other than what "additive" adds to it."""
    model = nn.Sequential(nn.Linear(512, 256))
    tt.attach(model, SETTINGS.get(name) or getattr(P, name)(4), "all-linear", strategy=strategy)
    x, weight = torch.randn(2, 512, requires_grad=True), 4 * 512 * 256
    known = {one.untyped_storage().data_ptr() for one in [x, *model.parameters()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = [model(x).sum()]
    assert sum(kept.values()) / weight == pytest.approx(float(strategy == "additive"), abs=0.05)
    losses[0].backward()
    forward = peak_of(lambda: losses.append(model(x).sum())) / weight
    backward = peak_of(losses[-1].backward) / weight
    assert (forward, backward) == pytest.approx(LARGEST[name, strategy], abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_several_parts_of_a_weight_share_one_sum(dtype: torch.dtype) -> None:
    stored = torch.randn(3 * 128, 128).to(dtype)
    targets = [tna.Target("a", (384, 128), role, rows=tna.Rows(128 * at, 128, 384)) for at, role in enumerate("qkv")]
    deltas = [torch.randn(128, 128) for _ in targets]
    found: list[torch.Tensor] = []
    peak = peak_of(lambda: found.append(forms.summed(stored, list(zip(targets, deltas, strict=True)))))
    assert torch.equal(found[0], (stored.float() + torch.cat(deltas)).to(dtype))
    wide, narrow = 4 * stored.numel(), dtype.itemsize * stored.numel()
    assert peak < 1.2 * wide + (narrow if dtype is not torch.float32 else 0)


# -- The choice of the strategy at attach, by an estimate of operations and bytes -------------------


MANY = (64, 1024, 8192)


@pytest.mark.parametrize(
    ("config", "widths", "tokens", "expected"),
    [
        # Where factors are narrow they stay, also in small layers.
        (P.lora(4), (384, 768, 4096), MANY, "factored"),
        (P.lora(4), (32, 64, 128, 256), (1, 64, 1024, 2048), "factored"),
        # A Kronecker product of dense matrices goes into the weight of many tokens.
        (P.krona(), (768,), (1, 8, 64), "factored"),
        (P.krona(), (768,), (8192, 65536), "weight"),
        (tna.Config(splits=3, format="dense"), (768,), (1, 8, 64), "factored"),
        (tna.Config(splits=3, format="dense"), (768,), (8192, 65536), "weight"),
        # What does not factor is never factored.
        (P.superlora(8, groups="weight", fold=(1024, 576)), (768,), (1, *MANY), "weight"),
    ],
)
def test_the_choice(config: tna.Config, widths: tuple[int, ...], tokens: tuple[int, ...], expected: str) -> None:
    for width in widths:
        plan = tna.UpdatePlan(config, [(width, width)])
        assert {choose(plan, 0, factoring(plan, 0), number) for number in tokens} == {expected}, width


def test_a_quantized_weight_is_never_added_to() -> None:
    # Three large products are faster than many narrow ones.
    for config, expected in (
        (P.lora(4), "factored"), (P.dora(4), "factored"), (P.lora(400), "additive"), (P.hira(4), "additive"),
        (P.superlora(8, groups="weight", fold=(1024, 576)), "additive"),
    ):  # fmt: skip
        plan = tna.UpdatePlan(config, [(768, 768)])
        how = factoring(plan, 0)
        assert choose(plan.arrays_plan, 0, how, 2048, applying=plan.applying, packed=4.0) == expected
    # Dequantizing counts where numbers are needed.
    for config, additive, factored in ((P.lora(2), 0, 0), (P.hira(2), 1, 0), (P.dora(2), 2, 2)):
        for packed in (1.0, 100.0):
            found = dequantized(tna.UpdatePlan(config, [(4, 8)]).applying, (4, 8), packed)
            assert found["additive"].moved == additive * 32 * packed
            assert found["factored"].moved == factored * 32 * packed


@given(plans(), st.sampled_from([1, 10, 1000]), st.sampled_from(sorted(MACHINES)))
def test_every_plan_has_a_cost(plan: tna.UpdatePlan, tokens: int, machine: str) -> None:
    for index in range(len(plan.shapes)):
        how = factoring(plan, index)
        found = costs(plan, index, how, tokens, plan.applying)
        assert ("factored" in found) == (how is not None and plan.applying.takes_factors)
        more = costs(plan, index, how, 2 * tokens, plan.applying)
        for strategy, work in found.items():
            assert 0 < work.seconds(MACHINES[machine]) < more[strategy].seconds(MACHINES[machine])
            assert plan.applying.additive or work.moved > costs(plan, index, how, tokens)[strategy].moved
        assert choose(plan, index, how, tokens, MACHINES[machine], plan.applying) in found


ROWS, COLS, TOKENS = 24, 12, 100
SIZE = ROWS * COLS
IN_AND_OUT = TOKENS * (ROWS + COLS)
#: What it takes to form an update once: operations in narrow products, elements moved, calls. Then the same of the
#: products with its factors, forward and, twice that, backward.
WORK: dict[str, tuple[tna.Config, tuple[float, float, float], tuple[float, float, float] | None]] = {
    "dense": (P.dense(), (0, 0, 1), None),
    # Small, and its two arrays are the factors.
    "lora": (P.lora(3), (2 * SIZE * 3, SIZE, 4), (6 * IN_AND_OUT * 3, 4 * IN_AND_OUT, 4)),
    "lorta": (P.lorta(3, order=4), (2 * SIZE * 3, SIZE, 4), None),
    "tt": (tna.Config(rank=3, groups=1, fold="balanced", order=4, format="tt"), (2 * SIZE * 3, SIZE, 4), None),
    "core": (tna.Config(rank=(None, None), format="tucker"), (0, 0, 1), None),  # all of it, and no factors
    # Two of LoRA's, and their elementwise product; as one matrix of rank 9.
    "loha": (
        P.loha(3), (2 * (2 * SIZE * 3), 2 * SIZE + 2 * SIZE, 2 * 4 + 3), (6 * IN_AND_OUT * 9, 4 * IN_AND_OUT, 20),
    ),
    # 4x3 and 6x4 matrices as they are, and their Kronecker product; of LoKr the second is one of LoRA's. By the 6x4
    # matrix (3 columns of 4 for each row of x become 3 of 6), and by the 4x3 one.
    "krona": (
        P.krona(), (0, 2 * SIZE, 1 + 1 + 3),
        (
            6 * TOKENS * ROWS * 4 + 8 * 2 * TOKENS * COLS * 4,
            4 * IN_AND_OUT + 8 * TOKENS * (COLS + 4 * COLS // 3),
            8 + 8 + 24,
        ),
    ),
    "lokr": (P.lokr(3), (2 * 24 * 3, 24 + 2 * SIZE, 1 + 4 + 3), None),
    # Two sums of a 2x2 matrix by a 12x6 one of rank 1.
    "compacter": (
        P.compacter(1, terms=2), (2 * (2 * 72), 2 * (72 + 2 * SIZE), 2 * (1 + 4 + 3)),
        (2 * (6 * IN_AND_OUT + 64 * TOKENS), 2 * (4 * IN_AND_OUT + 32 * TOKENS), 8 + 2 * (12 + 24)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_operations_elements_and_calls_of_each_strategy(name: str) -> None:
    config, (narrow, moved, calls), factored = WORK[name]
    plan = tna.UpdatePlan(config, [(ROWS, COLS)])
    found = costs(plan, 0, factoring(plan, 0), TOKENS)
    # Formed in forward and in backward, and a gradient to either factor by as many operations each.
    update = StepWork(0, 4 * narrow, 2 * moved + 2 * SIZE, 4 * calls)
    product = 2 * TOKENS * SIZE
    assert found["weight"] == update + StepWork(product, 0, 5 * SIZE, 14)
    assert found["additive"] == update + StepWork(3 * product, 0, 5 * SIZE + 4 * IN_AND_OUT, 20)
    if factored is not None:
        assert found["factored"] == StepWork(0, *factored)


def test_seconds_are_of_operations_bytes_and_calls() -> None:
    machine = Machine(operations=10.0, narrow=5.0, bytes=8.0, call=0.25)
    assert StepWork(large=20.0).seconds(machine) == 2.0
    assert StepWork(narrow=20.0).seconds(machine) == 4.0
    assert StepWork(moved=20.0).seconds(machine) == 10.0  # four bytes each
    assert StepWork(calls=20.0).seconds(machine) == 5.0
    assert StepWork(20.0, 20.0, 20.0, 20.0).seconds(machine) == 21.0


def test_attach_chooses_and_the_summary_shows_it() -> None:
    def strategy(**settings: object) -> tuple[str, ...]:
        model = nn.Sequential(nn.Linear(768, 768))
        adapter = tt.attach(model, P.krona(), "all-linear", **settings)
        assert {row.strategy for row in adapter.summary().rows} == set(adapter.strategy)
        return adapter.strategy

    assert strategy(tokens=64) == ("factored",)
    assert strategy(tokens=65536) == ("weight",)
    for own in ("weight", "factored", "additive"):
        assert strategy(strategy=own, tokens=64) == (own,)
    with pytest.raises(tna.ConfigError, match="tokens"):
        strategy(tokens=0)


def test_the_choice_counts_what_changes_the_weight() -> None:
    plan, size = tna.UpdatePlan(P.lora(8), [(768, 512)]), 768 * 512
    how = factoring(plan, 0)

    def beyond(applying: Applying, number: str = "moved", unit: int = size) -> dict[str, float]:
        base, found = costs(plan, 0, how, 64), costs(plan, 0, how, 64, applying)
        for strategy, work in found.items():
            assert work.seconds(MACHINES["cpu"]) > base[strategy].seconds(MACHINES["cpu"])
        return {
            strategy: (getattr(work, number) - getattr(base[strategy], number)) / unit
            for strategy, work in found.items()
        }

    # Three norms of 13, three products with q, one sum, the gradients.
    by_rows, by_columns = beyond(Magnitude()), beyond(Magnitude("cols"))
    assert by_rows["weight"] == by_columns["weight"] == 3 * 13 + 3 * 2 + 3 + 9
    assert by_columns.keys() == {"weight"}
    assert beyond(Hadamard()).keys() == {"weight", "additive"}
    # A norm, two sums, the gradient of the sum, ΔW twice and its gradient; y and its gradient, with 64 rows of x.
    assert by_rows["factored"] == by_rows["additive"] == 13 + 2 * 3 + 2 + 2 + 2 + 8 * 64 / 512
    # The calls for these: 16 + 4 log2(512) for a norm, and four to form ΔW, whose gradient takes twice as many.
    norm, rest = 16 + 4 * 9, 4 + 4 + 8 + 2 * 1 + 16
    assert beyond(Magnitude(), "calls", 1) == {
        "weight": 3 * norm + 3 * 2 + 10, "additive": norm + rest, "factored": norm + rest,
    }  # fmt: skip
    # Three products, one sum, three products for the gradients.
    assert beyond(Hadamard())["weight"] == 3 * 3 + 3 + 9
    assert beyond(Hadamard())["additive"] == 2 * 3
    # It forms nothing thrice, but keeps W ∘ ΔW.
    assert choose(plan, 0, None, 1, applying=Hadamard()) == "weight"
    assert choose(plan, 0, how, 8192, applying=Magnitude()) == "factored"
