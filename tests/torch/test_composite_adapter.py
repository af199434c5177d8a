"""Several configs in one adapter on a model: it acts as separate adapters do, and is one in all else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.composite import CompositeConfig

from . import life
from .life import bits
from .small import WIDTH, batch, small, stir
from .test_adapter import PATTERNS


def chain() -> nn.Sequential:
    """Five linear layers of different shapes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(*sizes) for sizes in itertools.pairwise([4, 6, 6, 8, 4, 3])))


def run(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return life.run(model, batch() if x is None else x)


CONFIGS = (
    P.lora(1), P.lora(2, seed=3, alpha=5), P.lokr(2), P.superlora(2), P.superlora(2, groups=2, seed=7),
    P.superlora(2, projection="linear", ratio=0.5), P.superlora(1, projection="nonlinear"), P.dense(), P.lora_fa(2),
)  # fmt: skip


@pytest.mark.law("attached-is-update", "merge-exact-undo")
@settings(max_examples=12)
@given(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.lists(st.sampled_from(CONFIGS), min_size=3, max_size=3))
def test_it_acts_as_its_parts_do_alone(of_layer: list[int], configs: list[tna.Config]) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    parts = {
        tuple(str(layer) for layer in range(5) if of_layer[layer] == part): configs[part]
        for part in range(3)
        if part in of_layer
    }
    model, separate = chain(), chain()
    before = bits(model)
    adapter = tt.attach(model, parts)
    alone = [
        tt.attach(separate, config, list(paths), str(number)) for number, (paths, config) in enumerate(parts.items())
    ]
    assert torch.equal(run(model, x), run(chain(), x))
    assert adapter.num_parameters == sum(one.num_parameters for one in alone)
    assert [target for one in alone for target in one.targets] == list(adapter.targets)
    # Every part draws what it draws alone.
    own = [parameter for one in alone for parameter in one.parameters()]
    assert all(map(torch.equal, adapter.parameters(), own))
    stir(adapter)
    with torch.no_grad():
        for mine, theirs in zip(own, adapter.parameters(), strict=True):
            mine.copy_(theirs)
    assert all(map(torch.equal, adapter.deltas(), [delta for one in alone for delta in one.deltas()]))
    assert adapter.strategy == tuple(strategy for one in alone for strategy in one.strategy)
    for one in (model, separate):
        one(x).square().sum().backward()
    torch.testing.assert_close(run(model, x), run(separate, x), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(own, adapter.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    adapter.merge()
    for one in alone:
        one.merge()
    assert bits(model) == bits(separate)
    adapter.unmerge()
    assert bits(model) == before


def test_on_a_model_of_many_forms(tmp_path: Path) -> None:
    model = small()
    adapter = tt.attach(model, PATTERNS, keep_trainable="blocks.1.k_proj")
    assert isinstance(adapter.config, CompositeConfig)
    assert [part.config for part in adapter.config.parts] == [*list(PATTERNS.values())[:3], tna.presets.dense()]
    assert [part.weights for part in adapter.config.parts] == [10, 2, 2, 1]
    assert {row.strategy for row in adapter.summary().rows} == {"factored", "weight"}
    assert "848 parameters in 14 groups for 4,016 elements of 15 weights" in str(adapter.summary())
    adapter.save(tmp_path / "adapter.safetensors")
    other = tt.attach(model, {"v_proj": "lora", "head": P.lora(1)}, name="other")
    with pytest.raises(tna.FileError, match="its config differs from that of adapter 'other'"):
        other.swap(tmp_path / "adapter.safetensors")


def test_training_one_part_and_starting_over() -> None:
    model = small()
    adapter = tt.attach(model, {"q_proj|v_proj": P.lora(2), "linear1": P.lora(3, seed=1), "head": "dense"})
    adapter.set_trainable(groups=[2])
    assert adapter.trained == ("group2.split0.factor0", "group2.split0.factor1")
    assert adapter.num_parameters == 3 * (32 + WIDTH)
    adapter.set_trainable()
    groups = adapter.parameter_groups(1e-3)
    assert [len(group["params"]) for group in groups] == [3, 4]  # B of three weights, and the dense update, from zero
    model(batch()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in groups[1]["params"])
    stir(adapter)
    adapter.reset()
    assert not any(delta.any() for delta in adapter.deltas())
    adapter.set_trainable(arrays="factor1")
    assert not any(delta.any() for delta in adapter.deltas())
    assert all(adapter.arrays()[name].eq(0).all() for name in adapter.trained)


def test_extraction_with_several_configs_and_by_the_name_of_a_preset() -> None:
    base, tuned = small(), small()
    with torch.no_grad():
        tuned.blocks[1].q_proj.weight += torch.outer(torch.ones(WIDTH), torch.arange(WIDTH) / WIDTH)
    adapter = tt.extract(small(), tuned, "lora", ["q_proj"], rank=1, tol=1e-7)
    assert adapter.config == tna.presets.lora(1)
    assert adapter.report.error < 1e-5
    with pytest.raises(TypeError, match="preset 'lora' has no setting 'max_eror'; did you mean 'max_error'"):
        tt.extract(small(), tuned, "lora", ["q_proj"], max_eror=0.1)
    with torch.no_grad():
        tuned.head.weight += 0.1 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    adapter = tt.extract(base, tuned, {"q_proj": P.lora(1), "head": "dense"})
    assert adapter.report.error < 1e-5
    torch.testing.assert_close(run(base), run(tuned), rtol=1e-4, atol=1e-4)
    text = "rank differs between the 2 configs of one adapter"
    with pytest.raises(tna.ConfigError, match=text):
        tt.extract(small(), tuned, {"q_proj": P.lora(1), "head": P.lora(2)}, max_error=0.1)


# -- Patterns ----------------------------------------------------------------------------------------


def found_by(patterns: dict[Any, Any], **words: Any) -> list[str]:
    return [target.module for target in tt.attach(small(), patterns, **words).targets]


def test_patterns_are_roles_words_and_ends_of_paths() -> None:
    assert found_by({"q": "lora"})[:2] == ["blocks.0.qkv", "blocks.1.q_proj"]
    assert found_by({"q_proj|head": "lora"}) == ["blocks.1.q_proj", "head"]
    assert found_by({r"blocks\.1\..*_proj": "lora", "4": "lora"}) == [
        "blocks.1.q_proj", "blocks.1.k_proj", "blocks.1.v_proj", "blocks.1.o_proj",
        "blocks.4.self_attn", "blocks.4.self_attn.out_proj", "blocks.4.linear1", "blocks.4.linear2",
    ]  # fmt: skip
    assert found_by({("linear1", "head"): "lora", lambda path, module: path.endswith("q_proj"): "dense"}) == [
        "blocks.4.linear1", "head", "blocks.1.q_proj",
    ]  # fmt: skip
    target = tna.Target("head", (3, WIDTH))
    assert found_by({target: "lora", "conv": "dense"})[0] == "head"
    assert found_by({"linear[12]": "lora", "q_proj|v_proj": "dense"}, exclude=["v_proj", "linear1"]) == [
        "blocks.4.linear2", "blocks.1.q_proj",
    ]  # fmt: skip
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "out": nn.Linear(4, 4)})
    adapter = tt.attach(model, {"out": "lora", "embeddings": "lora"})
    assert [target.module for target in adapter.targets] == ["out", "words"]
    assert found_by({"linear1": "lora", "q_proj": "dense"}, layers=[1, 4]) == ["blocks.4.linear1", "blocks.1.q_proj"]
    # One pattern is one config.
    assert tt.attach(small(), {"q_proj": P.lora(3)}).config == P.lora(3)
    # A module that has the name of a setting is a pattern.
    settings = nn.ModuleDict({"rank": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert [target.module for target in tt.attach(settings, {"rank": "lora"}).targets] == ["rank"]


def test_a_composite_config_needs_targets_in_its_order_and_peft_takes_none() -> None:
    config = CompositeConfig([(P.lora(1), 1), (P.dense(), 1)])
    with pytest.raises(
        tna.ConfigError, match="a CompositeConfig has its weights in an order: give a mapping of patterns"
    ):
        tt.attach(small(), config, ["head", "q_proj"])
    targets = [tna.Target("head", (3, WIDTH)), tna.Target("blocks.1.q_proj", (WIDTH, WIDTH))]
    adapter = tt.attach(small(), config, targets)
    assert [np.prod(array.shape) for array in adapter.parameters()] == [3, WIDTH, WIDTH * WIDTH]
    pytest.importorskip("peft")
    from tnadapt.torch.peft import TnadaptConfig, register

    register()
    with pytest.raises(
        tna.ConfigError, match="settings of a PEFT config are those of one config, for all of its weights"
    ):
        TnadaptConfig(settings=config)
