"""The choice of the strategy at attach, by an estimate of operations and bytes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.algebra.applying import Applying, Hadamard, Magnitude
from tnadapt.algebra.factoring import factoring
from tnadapt.testing.strategies import plans

from .internals_c import MACHINES, Machine, StepWork, choose, costs, dequantized
from .test_linear import peak_of

P = tna.presets


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
        plan = tna.SuperLoRA(config, [(width, width)])
        assert {choose(plan, 0, factoring(plan, 0), number) for number in tokens} == {expected}, width


def test_a_quantized_weight_is_never_added_to() -> None:
    # Three large products are faster than many narrow ones.
    for config, expected in (
        (P.lora(4), "factored"), (P.dora(4), "factored"), (P.lora(400), "additive"), (P.hira(4), "additive"),
        (P.superlora(8, groups="weight", fold=(1024, 576)), "additive"),
    ):  # fmt: skip
        plan = tna.SuperLoRA(config, [(768, 768)])
        how = factoring(plan, 0)
        assert choose(plan.arrays_plan, 0, how, 2048, applying=plan.applying, packed=4.0) == expected
    # Dequantizing counts where numbers are needed.
    for config, additive, factored in ((P.lora(2), 0, 0), (P.hira(2), 1, 0), (P.dora(2), 2, 2)):
        for packed in (1.0, 100.0):
            found = dequantized(tna.SuperLoRA(config, [(4, 8)]).applying, (4, 8), packed)
            assert found["additive"].moved == additive * 32 * packed
            assert found["factored"].moved == factored * 32 * packed


@given(plans(), st.sampled_from([1, 10, 1000]), st.sampled_from(sorted(MACHINES)))
def test_every_plan_has_a_cost(plan: tna.SuperLoRA, tokens: int, machine: str) -> None:
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
# What it takes to form an update once: operations in narrow products, elements moved, calls.
FORMED: dict[str, tuple[tna.Config, float, float, float]] = {
    "dense": (P.dense(), 0, 0, 1),
    "lora": (P.lora(3), 2 * SIZE * 3, SIZE, 4),
    "lorta": (P.lorta(3, order=4), 2 * SIZE * 3, SIZE, 4),
    "tt": (tna.Config(rank=3, groups=1, fold="balanced", order=4, format="tt"), 2 * SIZE * 3, SIZE, 4),
    "core": (tna.Config(rank=(None, None), format="tucker"), 0, 0, 1),  # all of it, and no factors
    # Two of LoRA's, and their elementwise product.
    "loha": (P.loha(3), 2 * (2 * SIZE * 3), 2 * SIZE + 2 * SIZE, 2 * 4 + 3),
    # 4x3 and 6x4 matrices as they are, and their Kronecker product; of LoKr the second is one of LoRA's.
    "krona": (P.krona(), 0, 2 * SIZE, 1 + 1 + 3),
    "lokr": (P.lokr(3), 2 * 24 * 3, 24 + 2 * SIZE, 1 + 4 + 3),
    # Two sums of a 2x2 matrix by a 12x6 one of rank 1.
    "compacter": (P.compacter(1, terms=2), 2 * (2 * 72), 2 * (72 + 2 * SIZE), 2 * (1 + 4 + 3)),
}
# Forward and, twice that, backward: the same of the products with the factors.
FACTORED: dict[str, tuple[float, float, float]] = {
    "lora": (
        6 * TOKENS * (ROWS + COLS) * 3,
        4 * TOKENS * (ROWS + COLS),
        4,
    ),  # small, and its two arrays are the factors
    "loha": (6 * TOKENS * (ROWS + COLS) * 9, 4 * TOKENS * (ROWS + COLS), 20),  # as one matrix of rank 9
    # By the 6x4 matrix (3 columns of 4 for each row of x become 3 of 6), and by the 4x3 one.
    "krona": (
        6 * TOKENS * ROWS * 4 + 8 * 2 * TOKENS * COLS * 4,
        4 * TOKENS * (ROWS + COLS) + 8 * TOKENS * (COLS + 4 * COLS // 3),
        8 + 8 + 24,
    ),
    "compacter": (
        2 * (6 * TOKENS * (ROWS + COLS) + 8 * 2 * TOKENS * 2 * 2),
        2 * (4 * TOKENS * (ROWS + COLS) + 8 * TOKENS * (2 + 2)),
        8 + 2 * (12 + 24),
    ),
}


@pytest.mark.parametrize("name", FORMED)
def test_operations_elements_and_calls_of_each_strategy(name: str) -> None:
    config, narrow, moved, calls = FORMED[name]
    plan = tna.SuperLoRA(config, [(ROWS, COLS)])
    found = costs(plan, 0, factoring(plan, 0), TOKENS)
    # Formed in forward and in backward, and a gradient to either factor by as many operations each.
    update = StepWork(0, 4 * narrow, 2 * moved + 2 * SIZE, 4 * calls)
    product = 2 * TOKENS * SIZE
    assert found["weight"] == update + StepWork(product, 0, 5 * SIZE, 14)
    assert found["additive"] == update + StepWork(3 * product, 0, 5 * SIZE + 4 * TOKENS * (ROWS + COLS), 20)
    if name in FACTORED:
        assert found["factored"] == StepWork(0, *FACTORED[name])


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


# -- Time and memory of a training step where W' is not a sum ----------------------------------------------------------


def test_the_choice_counts_what_changes_the_weight() -> None:
    plan, size = tna.SuperLoRA(P.lora(8), [(768, 512)]), 768 * 512
    how = factoring(plan, 0)

    def beyond(applying: Applying, number: str = "moved", unit: int = size) -> dict[str, float]:
        base, found = costs(plan, 0, how, 64), costs(plan, 0, how, 64, applying)
        for strategy, work in found.items():
            assert work.seconds(MACHINES["cpu"]) > base[strategy].seconds(MACHINES["cpu"])
        return {
            strategy: (getattr(work, number) - getattr(base[strategy], number)) / unit
            for strategy, work in found.items()
        }

    # Three norms of 13, three products with q, one sum, the gradients; and ΔW twice more.
    by_rows, by_columns = beyond(Magnitude()), beyond(Magnitude("cols"))
    assert by_rows["weight"] == by_columns["weight"] == 3 * 13 + 3 * 2 + 3 + 9 + 2
    assert by_columns.keys() == {"weight"}
    assert beyond(Hadamard()).keys() == {"weight", "additive"}
    # Two norms, two sums, the gradient of the sum, ΔW thrice and its gradient; y and its gradient, with 64 rows of x.
    assert by_rows["factored"] == by_rows["additive"] == 2 * 13 + 2 * 3 + 2 + 3 + 2 + 8 * 64 / 512
    # The calls for these: 16 + 4 log2(512) for a norm, and four to form ΔW, whose gradient takes twice as many.
    norm, rest = 16 + 4 * 9, 4 + 4 + 4 + 8 + 2 * 1 + 16
    assert beyond(Magnitude(), "calls", 1) == {
        "weight": 3 * norm + 3 * 2 + 4 + 4 + 10, "additive": 2 * norm + rest, "factored": 2 * norm + rest,
    }  # fmt: skip
    # Three products, one sum, three products for the gradients; and ΔW twice more.
    assert beyond(Hadamard())["weight"] == 3 * 3 + 3 + 9 + 2
    assert beyond(Hadamard())["additive"] == 2 * 3
    # It forms nothing thrice, but keeps W ∘ ΔW.
    assert choose(plan, 0, None, 1, applying=Hadamard()) == "weight"
    assert choose(plan, 0, how, 8192, applying=Magnitude()) == "factored"


@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
@pytest.mark.parametrize("name", ["lora", "dora", "dora by columns", "hira"])
def test_the_memory_of_a_step(name: str, strategy: str) -> None:
    """Between the passes nothing is kept that is as large as the weight, other than what "additive" adds to it."""
    config = {"dora by columns": P.dora(4, magnitude_axis="cols")}.get(name) or getattr(P, name)(4)
    # Forward and backward, at most, in sizes of the weight. Columns are few, so that norms are computed in one piece.
    most = {
        ("lora", "weight"): (1, 1), ("lora", "factored"): (0, 0), ("lora", "additive"): (1, 1),
        ("dora", "weight"): (7, 8), ("dora", "factored"): (6, 6), ("dora", "additive"): (7, 6),
        ("dora by columns", "weight"): (7, 8),
        ("hira", "weight"): (3, 5), ("hira", "additive"): (2, 1),
    }  # fmt: skip
    if (name, strategy) not in most:
        with pytest.raises(tna.ConfigError, match="strategy"):
            tt.attach(nn.Sequential(nn.Linear(512, 256)), config, "all-linear", strategy=strategy)
        return
    model = nn.Sequential(nn.Linear(512, 256))
    tt.attach(model, config, "all-linear", strategy=strategy)
    x, weight = torch.randn(2, 512, requires_grad=True), 4 * 512 * 256
    known = {one.untyped_storage().data_ptr() for one in [x, *model.parameters()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = [model(x).sum()]
    assert sum(kept.values()) / weight == pytest.approx(float(strategy == "additive"), abs=0.05)
    found[0].backward()
    forward = peak_of(lambda: found.append(model(x).sum())) / weight
    backward = peak_of(found[-1].backward) / weight
    assert (forward, backward) == pytest.approx(most[name, strategy], abs=0.3)
