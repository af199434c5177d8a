"""Models adapted by arrays from the base, given, tied or scaled, and by θ: training, files, merging, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth
from tnadapt.sources import FromBase, Given, Scaled, Seeded, Tied

from . import life
from .distributed_jobs import Block
from .life import assert_near, by_formula, passes, run
from .loops import batch
from .small import stir

GIVEN = {"group0.split0.factor0": np.random.default_rng(0).normal(size=(16, 2))}
CONFIGS: dict[str, tna.Config] = {
    "vera": P.vera(3),
    "randlora": P.randlora(6, rows=16, cols=16),
    "share_lora": P.share_lora(2),
    "tied_lora": P.tied_lora(2),
    "lora_xs": P.lora_xs(2),
    "svft": P.svft(4),
    "craft": P.craft(3),
    "quanta": P.quanta((4, 2)),
    "tinylora": P.tinylora(3),
    "unilora": P.unilora(16, 2),
    "nola": P.nola(3, 2),
    "θ of each group, through F": P.superlora(
        2, groups=2, projection="linear", ratio=0.5, before="signed-one-hot", parameters=16, scope="group"
    ),
    "θ and a nonlinear F": P.superlora(2, projection="nonlinear", ratio=0.5, before="linear", parameters=9),
    "θ of tied arrays": P.share_lora(2, before="one-hot", parameters=7),
    "θ of diagonals": P.vera(3, before="normal", parameters=5),
    "θ by index": P.lora(2, before=tna.maps.TiedElements(normalized=True), parameters=11),
    "θ by matrix": P.lora(2, before="given", parameters=4, scope="group"),
    "pissa": P.lora(2, start="pissa"),
    "given": P.lora(2, sources={"factor0": Given(shared=True)}),
    "hadamard": P.loha(2, sources={"split0.factor1": Seeded("signs")}),
    "kronecker": P.lokr(2, sources={"dense": Tied("group0.split0.dense")}),
}


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(Block(fused=False), Block(fused=False))


def attached(name: str, base: Any, **settings: Any) -> Any:
    # Four weights of 16 × 16.
    theta = tna.UpdatePlan(CONFIGS[name], [(16, 16)] * 4, [0, 0, 1, 1], "qvqv").theta
    brought = {} if theta is None else theta.stand_ins(np.random.default_rng(7))
    return tt.attach(base, CONFIGS[name], given=GIVEN if name == "given" else brought or None, **settings)


def moved(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model and its adapter with other arrays than at the start."""
    base = model()
    adapter = attached(name, base, **settings)
    stir(adapter, size=0.2)
    return base, adapter


# -- Training -----------------------------------------------------------------------------------------


@pytest.mark.law("theta", "sources")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    life.check_life(model, functools.partial(attached, name), batch(), tmp_path)


@pytest.mark.law("theta", "sources")
@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, how) for name in CONFIGS for how in ("auto", "weight", "additive")), ("unilora", "factored")],
)
def test_gradients_are_those_of_the_updates(name: str, strategy: str) -> None:
    base, x = model(), batch()
    adapter = attached(name, base, strategy=strategy)
    assert torch.equal(base(x), model()(x))
    stir(adapter, size=0.2)
    assert not torch.allclose(base(x), model()(x))
    # Accumulated over passes, and recomputed in backward.
    for run_again in (base, functools.partial(checkpoint, base, use_reentrant=False)):
        assert_near(passes(run_again, adapter, *x.split(2)), by_formula(adapter, model(), x), 1e-4)


def test_arrays_are_made_from_theta_once_for_all_layers_and_passes() -> None:
    base, adapter = moved("unilora")
    calls, projection = list[int](), adapter.plan.theta.parts[0].projection
    forward = projection.map.forward
    projection.map.forward = lambda backend, x: calls.append(1) or forward(backend, x)
    passes(base, adapter, *batch().split(1))
    assert len(calls) == 1
    for _ in range(2):
        run(base, batch())
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    in_depth(["tinylora", "unilora", "tied_lora", "lora_xs", "θ by index", "θ by matrix"], ["tinylora", "tied_lora"]),
)
def test_compiled(name: str) -> None:
    life.check_compiled(*moved(name), batch())


def test_choosing_what_is_trained() -> None:
    adapter = attached("tied_lora", model())
    adapter.set_trainable(arrays="size")
    assert adapter.num_parameters == 4 * 16
    assert all(key.endswith(".size") == p.requires_grad for key, p in adapter.named_parameters())
    adapter.set_trainable(arrays="factor1")
    assert adapter.num_parameters == 32 + 4 * 2
    one = attached("nola", model())
    one.set_trainable(groups=0)
    assert one.num_parameters == 6
    whole = attached("tinylora", model())
    whole.set_trainable()
    assert whole.num_parameters == 3
    with pytest.raises(tna.ConfigError, match=r"no arrays 'factor0' in groups None; .* arrays theta"):
        whole.set_trainable(arrays="factor0")


# -- Files and merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_xs", "pissa"])
def test_another_base_is_refused(name: str, tmp_path: Path) -> None:
    base, adapter = moved(name)
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    assert not tna.load(path).complete
    with pytest.raises(tna.FileError, match="trained on another base model"):
        tt.load(model(1), path)
    with pytest.raises(tna.FileError, match=r"computed from the base weights.*store_bases=True"):
        tt.load(model(1), path, check_base=False)
    with pytest.raises(tna.ConfigError, match=r"computed from the base weights"):
        tna.load(path).deltas()
    save_file(model(1).state_dict(), tmp_path / "model.safetensors")
    for check, message in ((True, "another base model"), (False, "has to be the base that the adapter was trained on")):
        with pytest.raises(tna.FileError, match=message):
            tna.merge(tmp_path / "model.safetensors", path, tmp_path / "out.safetensors", check_base=check)
    assert not (tmp_path / "out.safetensors").exists()
    adapter.save(tmp_path / "stored.safetensors", store_bases=True)
    stored = tna.load(tmp_path / "stored.safetensors")
    assert stored.complete
    for from_file, delta in zip(stored.deltas(), adapter.deltas(), strict=True):
        assert np.allclose(from_file, delta.detach().numpy(), atol=1e-7)
    tt.load(model(1), tmp_path / "stored.safetensors", check_base=False)
    # A merged base is not the base either.
    adapter.merge()
    with pytest.raises(
        tna.TargetError, match=r"adapter 'default' is merged into the base: unmerge it before adapter 'b'"
    ):
        tt.attach(base, CONFIGS[name], name="b")
    with pytest.raises(tna.FileError, match="trained on another base model"):
        tt.load(adapter.bake(), path)


def test_given_arrays_are_stored_and_must_be_there(tmp_path: Path) -> None:
    name = "group0.split0.factor0"
    with pytest.raises(tna.ConfigError, match=r"given names 'group0.split0.factor1'"):
        tt.attach(model(), CONFIGS["given"], given={"group0.split0.factor1": np.ones((16, 2))})
    _, adapter = moved("given")
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    file = tna.load(path)
    np.testing.assert_array_equal(file.given[name], np.float32(GIVEN[name]))
    with pytest.raises(tna.ShapeError, match=rf"missing: '{name}'"):
        tna.AdapterFile(file.config, file.targets, file.arrays)
    other = tt.attach(model(), CONFIGS["given"], given={name: np.ones((16, 2))})
    with pytest.raises(tna.FileError, match=rf"frozen array '{name}' differs"):
        other.swap(path)


# -- Other bases --------------------------------------------------------------------------------------


def test_progress_of_the_bases() -> None:
    seen: list[tuple[int, int]] = []
    tt.attach(model(), CONFIGS["lora_xs"], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_an_adapter_without_an_offset_is_only_loaded(tmp_path: Path) -> None:
    config = P.unilora(9, 2, offset=False)
    with pytest.raises(tna.ConfigError, match=r"offset=False starts split0.factor0 and split0.factor1 at zero"):
        tt.attach(model(), config)
    theta = np.random.default_rng(0).normal(size=9).astype(np.float32)
    file = tna.AdapterFile(config, list(tt.find_targets(model(), "qv")), {"theta": theta})
    tna.save(tmp_path / "adapter.safetensors", file)
    base = model()
    adapter = tt.load(base, tmp_path / "adapter.safetensors")
    assert_near(passes(base, adapter, batch()), by_formula(adapter, model(), batch()), 1e-4)


def test_two_groups_scaled_from_one_base() -> None:
    config = P.lora(2, sources={"factor0": Scaled(FromBase("rows")), "factor1": Scaled(FromBase("cols"), rank=True)})
    adapter = tt.attach(model(), config)
    assert adapter.num_parameters == 4 * (16 + 16 + 2)
    assert tna.verify(config, [(12, 8)] * 3, backends=["numpy", "torch"]).holds
