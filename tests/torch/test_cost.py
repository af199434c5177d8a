"""Which strategy is chosen: by a count of operations and bytes, at attach."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import tnadapt as tna  # noqa: E402
import tnadapt.torch as tt  # noqa: E402
from tnadapt.factoring import factoring  # noqa: E402
from tnadapt.testing import plans  # noqa: E402
from tnadapt.torch.cost import MACHINES, choose, costs  # noqa: E402

P = tna.presets


def chosen(config: tna.Config, width: int, tokens: int) -> str:
    plan = tna.SuperLoRA(config, [(width, width)])
    return choose(plan, 0, factoring(plan, 0), tokens)


def test_where_factors_are_narrow_they_stay() -> None:
    for width in (384, 768, 4096):
        for tokens in (64, 1024, 8192):
            assert chosen(P.lora(4), width, tokens) == "factored"


def test_a_kronecker_product_of_dense_matrices_goes_into_the_weight_of_many_tokens() -> None:
    for config in (P.krona(), tna.Config(splits=3, format="dense")):
        found = [chosen(config, 768, tokens) for tokens in (1, 8, 64, 8192, 65536)]
        assert found == ["factored"] * 3 + ["weight"] * 2


def test_what_does_not_factor_is_never_factored() -> None:
    for tokens in (1, 1024, 8192):
        assert chosen(P.superlora(8, groups="weight", fold=(3072, 192)), 768, tokens) == "weight"


@given(plans(), st.sampled_from([1, 10, 1000]), st.sampled_from(sorted(MACHINES)))
def test_every_plan_has_a_cost(plan: tna.SuperLoRA, tokens: int, machine: str) -> None:
    for index in range(len(plan.shapes)):
        how = factoring(plan, index)
        found = costs(plan, index, how, tokens)
        assert ("factored" in found) == (how is not None)
        more = costs(plan, index, how, 2 * tokens)
        for strategy, work in found.items():
            assert 0 < work.seconds(MACHINES[machine]) < more[strategy].seconds(MACHINES[machine])
        assert choose(plan, index, how, tokens, MACHINES[machine]) in found


def test_attach_chooses_and_the_summary_shows_it() -> None:
    def strategy(**settings: object) -> tuple[str, ...]:
        model = nn.Sequential(nn.Linear(768, 768))
        adapter = tt.attach(model, P.krona(), "all-linear", **settings)
        assert {row.strategy for row in adapter.summary().rows} == set(adapter.strategy)
        return adapter.strategy

    assert strategy(tokens=64) == ("factored",)
    assert strategy(tokens=65536) == ("weight",)
    for own in ("weight", "factored", "beside"):
        assert strategy(strategy=own, tokens=64) == (own,)
    with pytest.raises(tna.ConfigError, match="tokens"):
        strategy(tokens=0)
