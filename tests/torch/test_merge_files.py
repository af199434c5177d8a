"""RELIABILITY's law 20: a checkpoint merged on disk equals, byte for byte, the model merged in memory and saved."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.rounding import add_in_place
from tnadapt.checkpoints import stored_weights as module_names
from tnadapt.checkpoints.checkpoint import open_checkpoint

from .architectures import build
from .hugging_face import bert, vit
from .internals import merging
from .small import stir

FUSED = ("gpt2", "llama", "gpt_neox")
MODELS = {"bert": bert, "vit": vit, **{name: lambda name=name: build(name)[0] for name in FUSED}}
SIZES = {
    "rank": 2, "weights": 4, "rows": 32, "cols": 32, "heads": 2, "layers": 2, "n": 20, "block": 8, "r": 3,
    "parameters": 13, "digits": (4,),
}  # fmt: skip


def preset(name: str) -> tna.Config:
    takes = inspect.signature(getattr(tna.presets, name)).parameters
    return getattr(P, name)(**{size: value for size, value in SIZES.items() if size in takes})


CONFIGS = {
    **{name: preset(name) for name in tna.presets.__all__},
    "lora with alpha": P.lora(2, alpha=4),
    "lonkr": P.lonkr(1, groups=3),
    "lorta of five axes": P.lorta(2, order=5),
    "unilora of two": P.unilora(20, 2),
    "nola of two": P.nola(5, 2),
    "dora, by columns": P.dora(2, magnitude_axis="cols"),
    "dora, linear": P.superlora(3, projection="linear", ratio=0.3, apply="magnitude"),
    "superlora, groups": P.superlora(3, groups=3),
    "linear": P.superlora(3, projection="linear", ratio=0.3),
    "linear_v2": P.superlora(3, projection="linear_v2", ratio=0.3, groups=2, shared=False),
    "nonlinear": P.superlora(3, projection="nonlinear", ratio=0.3, groups=2),
    "nonlinear_v2": P.superlora(3, projection="nonlinear_v2", ratio=0.3),
    "shuffle": P.superlora(3, projection="shuffle"),
    "layer": P.superlora(3, groups="layer", seed=7),
    "role": P.lotr(2, groups="role"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def both_ways(model: Any, adapter: tt.Adapter, folder: Path, **settings: Any) -> tuple[Path, Path, tna.MergeReport]:
    """Return two folders: the model merged in memory and saved, and its checkpoint merged on disk."""
    adapter.save(folder / "adapter.safetensors")
    adapter.bake()
    model.save_pretrained(folder / "memory", max_shard_size="30KB")
    report = tna.merge(folder / "base", folder / "adapter.safetensors", folder / "disk", **settings)
    return folder / "memory", folder / "disk", report


def made(name: str, config: tna.Config | None, kind: Any, folder: Path, **settings: Any) -> tuple[Any, tt.Adapter]:
    model = MODELS[name]().to(kind)
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    adapter = tt.attach(model, config, **settings)
    stir(adapter)
    return model, adapter


@pytest.mark.slow
@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_is_merged_to_the_byte(config: str, dtype: Any, tmp_path: Path) -> None:
    model, adapter = made("bert", CONFIGS[config], dtype, tmp_path)
    memory, disk, report = both_ways(model, adapter, tmp_path)
    assert contents(memory) == contents(disk)
    assert report.files > 1
    assert contents(disk) != contents(tmp_path / "base")


@pytest.mark.law("fused-keys")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("targets", ["qv", "qkvo"])
def test_fused_interleaved_and_transposed_weights(name: str, targets: str, dtype: Any, tmp_path: Path) -> None:
    model, adapter = made(name, P.superlora(3, groups=3), dtype, tmp_path, targets=targets)
    memory, disk, _ = both_ways(model, adapter, tmp_path)
    assert contents(memory) == contents(disk)


@pytest.mark.parametrize("longer", [True, False])
def test_names_with_another_prefix(longer: bool, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model.bert.save_pretrained(tmp_path / "headless", max_shard_size="30KB")
    settings: dict[str, Any] = {} if longer else {"keep_trainable": "classifier"}
    adapter = tt.attach(model.bert if longer else model, P.lora(2), **settings)
    stir(adapter)
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.bake()
    base = tmp_path / ("base" if longer else "headless")
    report = tna.merge(base, tmp_path / "adapter.safetensors", tmp_path / "out", check_base=True)
    assert report.names == ("names with 'bert.' before them" if longer else "names without 'bert.'")
    # A base without its head gets one.
    assert report.added == (() if longer else ("classifier.bias", "classifier.weight"))
    found = type(model).from_pretrained(tmp_path / "out", num_labels=3).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.law("renamed-modules")
@pytest.mark.parametrize("table", [True, False])
def test_modules_that_were_renamed_are_found(table: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On disk encoder.layer.0.attention.attention.query, in memory layers.0.attention.q_proj, since transformers 5.
    monkeypatch.setattr(module_names, "_installed", lambda: table)
    model, adapter = made("vit", P.lora(2), torch.float32, tmp_path)
    memory, disk, report = both_ways(model, adapter, tmp_path)
    assert contents(memory) == contents(disk)
    on_disk = open_checkpoint(tmp_path / "base").entries
    if any(target.name not in on_disk for target in adapter.targets):
        by_role = "weights of the same roles and shapes under other names"
        assert report.names == ("weights under the names that transformers gives them on disk" if table else by_role)
    again = type(model).from_pretrained(disk)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("projection", ["identity", "nonlinear"])
@pytest.mark.parametrize(
    ("trained", "dtype"),
    [
        *((trained, torch.float32) for trained in (*DTYPES, torch.float64)),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_adapters_of_every_dtype_and_a_head_beside_them(
    trained: Any, dtype: Any, projection: str, tmp_path: Path
) -> None:
    config = P.superlora(3, groups=2, projection=projection, ratio=1.0 if projection == "identity" else 0.3)
    model, adapter = made("bert", config, dtype, tmp_path, dtype=trained, keep_trainable="classifier")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    memory, disk, report = both_ways(model, adapter, tmp_path)
    assert contents(memory) == contents(disk)
    assert report.replaced == ("classifier.bias", "classifier.weight")


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("config", [P.lora_xs(3), P.lora(2, start="pissa")], ids=["lora_xs", "pissa"])
def test_what_comes_from_a_base_of_numbers_that_float32_lacks(
    config: tna.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thirds() -> Any:
        model = bert().double()
        for parameter in model.parameters():
            parameter.data.div_(3.0)
        return model

    monkeypatch.setitem(MODELS, "thirds", thirds)
    model, adapter = made("thirds", config, torch.float64, tmp_path)
    memory, disk, _ = both_ways(model, adapter, tmp_path)
    assert contents(memory) == contents(disk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([0, -20, 12, 60, 1000]), bad=st.sampled_from([0, 1, 2]))
def test_the_sum_on_a_device_is_that_of_the_host(dtype: torch.dtype, seed: int, exponent: int, bad: int) -> None:
    """A weight on a device is summed there; the code for devices is compared with the host's, on the host."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=12)).to(dtype)
    update = np.ldexp(rng.normal(size=9), exponent)
    if bad:
        update[rng.integers(9)] = np.inf
        weight[rng.integers(12) if bad == 2 else slice(0, 0)] = torch.inf
    ours, plain = weight.clone(), weight.clone()
    cut = int(rng.integers(1, 9))
    pieces = [(2, update[:cut]), (2 + cut, update[cut:])]
    found = merging._write_in_place(ours, ((start, torch.from_numpy(piece)) for start, piece in pieces), True)
    bits = merging._bits(plain)
    expected = add_in_place(bits, str(dtype).removeprefix("torch."), pieces)
    assert found == expected
    if found is None:
        assert torch.equal(ours, plain)
