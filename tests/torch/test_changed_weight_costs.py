"""Time and memory of a training step where W' is not a sum."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.algebra.applying import Applying, Hadamard, Magnitude
from tnadapt.algebra.factoring import factoring
from tnadapt.torch._strategy_choice import MACHINES, choose, costs

from .test_merged_linear import peak_of

P = tna.presets


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
