"""The law of the start: the first SGD step moves ΔW alike, whatever rank, order, splits and ρ."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import draws
from tnadapt.network import Network
from tnadapt.start import STEP, Start

SHAPES = [(96, 96)] * 8
FOUR = {"weights": 8, "rows": 96, "cols": 96}
P = tna.presets

CONFIGS = {
    "lora 1": P.lora(1),
    "lora 64": P.lora(64),
    "lokr": P.lokr(4),
    "lokr, both low rank": P.lokr(4, leading="same"),
    "krona": P.krona(),
    "loha": P.loha(4),
    "lonkr 3": P.lonkr(4, splits=3),
    "lonkr 4": P.lonkr(4, splits=4, split_size=4),
    "lotr": P.lotr(4, **FOUR),
    "lotr, train": P.lotr(4, train=True, **FOUR),
    "lorta 3": P.lorta(4, order=3),
    "lorta 5, rank 1": P.lorta(1, order=5),
    "lorta 5": P.lorta(4, order=5),
    "cara": P.cara(4, heads=4, **FOUR),
    "fact_tk": P.fact_tk(4, **FOUR),
    "superlora": P.superlora(4),
    "linear, 0.1": P.superlora(4, projection="linear", ratio=0.1),
    "linear_v2, 0.01": P.superlora(4, projection="linear_v2", ratio=0.01),
    "nonlinear": P.superlora(4, projection="nonlinear"),
    "nonlinear, 0.1": P.superlora(4, projection="nonlinear", ratio=0.1),
    "nonlinear_v2, lorta 5": P.lorta(4, order=5, projection="nonlinear_v2", ratio=0.1),
    "compacter": P.compacter(2, terms=4),
}


def first_step(config: tna.Config) -> float:
    """Root mean square of ΔW after one SGD step of rate 1 on a white gradient, over dense fine-tuning's."""
    torch = pytest.importorskip("torch")
    plan = tna.SuperLoRA(config, SHAPES)
    gradient = torch.tensor(np.random.default_rng(0).normal(size=plan.size))
    params = {name: array.requires_grad_() for name, array in plan.init("torch", "float64").items()}
    (plan.vector(params) * gradient).sum().backward()
    rate = 1e-3  # small: of the step's first order
    moved = {name: (array - rate * array.grad).detach() for name, array in params.items()}
    return float(plan.vector(moved).square().mean().sqrt() / gradient.square().mean().sqrt()) / rate


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_step_does_not_depend_on_the_method(name: str) -> None:
    # One draw of few and heavy-tailed products: within a factor of ten of the law, either way.
    assert STEP / 10 < first_step(CONFIGS[name]) < STEP * 10


@pytest.mark.parametrize("rank", [1, 2, 8, 32, 96])
def test_for_lora_the_law_is_exact(rank: int) -> None:
    assert abs(first_step(P.lora(rank)) / STEP - 1) < 0.05


def test_lora_of_rank_8_starts_like_pefts() -> None:
    plan = tna.SuperLoRA(P.lora(8), [(768, 768)])
    params = plan.init()
    # Kaiming's uniform distribution with a = sqrt(5), PEFT's choice, has this standard deviation.
    assert abs(params["group0.split0.factor1"].std() * np.sqrt(3 * 768) - 1) < 0.1
    assert not params["group0.split0.factor0"].any()


def test_what_is_drawn_is_the_specs_stream() -> None:
    config = P.loha(2, seed=2**40 + 7)
    plan = tna.SuperLoRA(config, [(5, 4), (3, 2)])
    params = plan.init()
    for group in range(2):
        names = [name for name in plan.param_shapes if name.startswith(f"group{group}.")]
        std = plan.groups[group].start.std
        for j, name in enumerate(names):
            if name.endswith("split1.factor0"):
                assert not params[name].any()
                continue
            shape = plan.param_shapes[name]
            drawn = draws.normals(2**40 + 7, group, 16 + j, 0, shape[0] * shape[1])
            assert np.array_equal(params[name], (drawn * np.float32(std)).reshape(shape))


def test_cp_weights_start_at_one_and_every_term_has_its_zero() -> None:
    plan = tna.SuperLoRA(tna.Config(rank=3, format="cp-weighted", terms=2), [(5, 4)])
    params = plan.init()
    for term in range(2):
        assert (params[f"group0.term{term}.split0.weights"] == 1).all()
        assert not params[f"group0.term{term}.split0.factor0"].any()
        assert params[f"group0.term{term}.split0.factor1"].all()
    one, two = (params[f"group0.term{term}.split0.factor1"] for term in range(2))
    assert not np.array_equal(one, two)


def test_a_nonlinear_start_is_alive_and_small() -> None:
    config = P.superlora(4, projection="nonlinear", ratio=0.1)
    plan = tna.SuperLoRA(config, SHAPES)
    params = plan.init(dtype="float64")
    network = Network(config, plan.groups[0].network.size)
    linear = tna.Projection("linear", network.size, plan.size)
    begun = {name.removeprefix("group0."): array for name, array in params.items()}
    from tnadapt.backends import load_backend

    t = linear(network.whole(load_backend("numpy"), begun))
    # The derivative tanh(t)² is far from zero, and t - tanh(t) is far from t.
    assert 0.05 < np.sqrt(np.mean(t**2)) < 0.6


def test_a_start_of_one_group_is_not_another_groups() -> None:
    params = tna.SuperLoRA(P.lora(2), [(6, 6)] * 2).init()
    assert not np.array_equal(params["group0.split0.factor1"], params["group1.split0.factor1"])


def test_nothing_random_gives_no_scale() -> None:
    config = P.dense()
    assert Start(Network(config, 12), tna.Projection("identity", 12, 12), 0, 0).std == 0.0
