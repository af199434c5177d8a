"""Adapters with frozen, tied and shared arrays are LoRA exactly; those of the base weights need the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import presets
from tnadapt.checkpoints.fingerprint import fingerprint

from .conversions import TOLERANCE, error, model, updates

SHAPES: dict[str, tuple[int, ...]] = {f"layers.{layer}.{name}_proj": (24, 20) for layer in range(2) for name in "qv"}
LOW_RANK = {
    "lora_fa": (presets.lora_fa(3, alpha=2), 3),
    "share_lora": (presets.share_lora(3), 3),
    "tied_lora": (presets.tied_lora(3, alpha=5), 3),
    "vera": (presets.vera(5), 5),
    "unilora": (presets.unilora(50, 3), 3),
    "nola": (presets.nola(20, 2), 2),
    "lora_xs": (presets.lora_xs(4, alpha=2), 4),
    "svft": (presets.svft(6), 6),
    "tinylora": (presets.tinylora(7, 2), 2),
}
OF_BASE = ("lora_xs", "svft", "tinylora")


def made(config: tna.Config) -> tna.AdapterFile:
    rng = np.random.default_rng(0)
    targets = [tna.Target(path, shape, path[-6]) for path, shape in SHAPES.items()]
    plan = tna.SuperLoRA(config, [target.shape for target in targets])
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, targets, arrays)


def weights(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{path}.weight": rng.normal(size=shape).astype("f4") for path, shape in SHAPES.items()}


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_methods_are_lora_exactly(name: str, tmp_path: Path) -> None:
    config, rank = LOW_RANK[name]
    file, base = made(config), weights()
    save_file(base, tmp_path / "model.safetensors")
    whole = file.with_base(list(base.values())) if name in OF_BASE else file
    for source, given in ((whole, None), (file, tmp_path / "model.safetensors"), (file, tmp_path)):
        found = tna.convert(source, to="peft-lora", base=given, dtype="float64")
        assert (found.exact, found.error) == (True, 0.0)
        assert found.config is not None
        assert found.config["r"] == rank
        assert not found.config["rank_pattern"]
    peft = pytest.importorskip("peft")
    tna.convert(whole, tmp_path / "lora", to="peft-lora")
    wrapped = peft.PeftModel.from_pretrained(model(SHAPES), tmp_path / "lora")
    for path, delta in updates(whole).items():
        assert error(wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default"), delta) <= TOLERANCE


@pytest.mark.parametrize("name", OF_BASE)
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    file = made(LOW_RANK[name][0])
    for base in (None, SHAPES):
        with pytest.raises(tna.ConfigError) as caught:
            tna.convert(file, to="peft-lora", base=base)
        told = str(caught.value)
        assert "does not store the arrays that are computed from the base weights, 'group0.split0.factor0'" in told
        assert "give base= (--base), a safetensors file, an index or a folder of the base model" in told
        assert "or, in Python, convert file.with_base(weights)" in told


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("changes", [{}, {"offset": False, "seed": 3}, {"before": "linear"}])
def test_tinylora_is_written_for_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    file = made(presets.tinylora(13, 2, alpha=3, **changes))
    base = weights()
    save_file(base, tmp_path / "model.safetensors")
    found = tna.convert(file, tmp_path / "theirs", to="peft-tinylora", base=tmp_path / "model.safetensors")
    assert found.exact
    wrapped = peft.PeftModel.from_pretrained(model(SHAPES), tmp_path / "theirs")
    assert sum(p.numel() for n, p in wrapped.named_parameters() if "tinylora_v" in n) == 13
    for path, delta in updates(file.with_base(list(base.values()))).items():
        assert error(wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default"), delta) <= TOLERANCE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (presets.lora_xs(4), "it needs one θ for all weights, and both factors frozen"),
        (presets.tinylora(3, 2, scope="group"), "it needs one θ for all weights"),
        (presets.unilora(50, 3), "it needs one θ for all weights, and both factors frozen"),
        (
            presets.tinylora(7, 2).replace(rank=(2, 3)),
            "PEFT's matrices between the factors are square",
        ),
    ],
)
def test_what_is_no_tinylora_of_peft(config: tna.Config, message: str) -> None:
    file = made(config)
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(file.with_base(list(weights().values())), to="peft-tinylora")


def test_a_file_on_disk_with_its_base(tmp_path: Path) -> None:
    file, base = made(LOW_RANK["lora_xs"][0]), weights()
    save_file(base, tmp_path / "model.safetensors")
    tna.save(tmp_path / "adapter.safetensors", file)
    found = tna.convert(tmp_path / "adapter.safetensors", tmp_path / "lora", to="peft-lora",
                        base=tmp_path / "model.safetensors")  # fmt: skip
    back = tna.convert(tmp_path / "lora").file
    assert back is not None
    for path, delta in updates(file.with_base(list(base.values()))).items():
        assert error(updates(back)[path], delta) <= TOLERANCE
    assert found.parameters == (4 * 16, 4 * 4 * 44)
    # In this library's own form, the arrays are stored from now on.
    own = tna.convert(file, base=tmp_path / "model.safetensors").file
    assert own is not None
    assert own.complete


def test_another_base_is_refused(tmp_path: Path) -> None:
    file, base = made(LOW_RANK["lora_xs"][0]), weights()
    path = tmp_path / "model.safetensors"
    known = tna.AdapterFile(file.config, file.targets, file.arrays, base=fingerprint(list(base.values()), "float32"))
    save_file(base, path)
    assert tna.convert(known, to="peft-lora", base=path).exact
    save_file(weights(2), path)
    with pytest.raises(tna.TargetError, match=r"base is another model than the one that the adapter was trained on"):
        tna.convert(known, to="peft-lora", base=path)
    save_file({name: array.astype("i4") for name, array in base.items()}, path)
    with pytest.raises(tna.TargetError, match=r"'layers.0.q_proj.weight' of the shape \(24, 20\), .* it is I32"):
        tna.convert(known, to="peft-lora", base=path)
    few = dict(list(base.items())[1:])
    save_file(few, path)
    with pytest.raises(tna.TargetError, match=r"base has no module 'layers.0.q_proj'"):
        tna.convert(known, to="peft-lora", base=path)
    save_file({name: array.astype("f2") for name, array in base.items()}, path)
    assert tna.convert(file, to="peft-lora", base=path).exact


@pytest.mark.parametrize("name", ["lora_xs", "lora_fa"])
@pytest.mark.parametrize("renamed", ["headless", "earlier"])
def test_the_base_may_name_its_weights_otherwise(name: str, renamed: str, tmp_path: Path) -> None:
    # A checkpoint without the prefix of the model with a head, or with names of an earlier release.
    own = {f"encoder.{path}": shape for path, shape in SHAPES.items()}
    other = {path: path.removeprefix("encoder.") for path in own}
    if renamed == "earlier":
        kinds = {"q": "query", "v": "value"}
        other = {path: f"block.{path.split('.')[2]}.attention.{kinds[path[-6]]}" for path in own}
    config, plain = LOW_RANK[name][0], made(LOW_RANK[name][0])
    targets = [tna.Target(path, shape, path[-6]) for path, shape in own.items()]
    base = dict(zip(own, weights().values(), strict=True))
    save_file({f"{other[path]}.weight": array for path, array in base.items()}, tmp_path / "model.safetensors")
    file = tna.AdapterFile(config, targets, plain.arrays, base=fingerprint(list(base.values()), "float32"))
    found = tna.convert(file, tmp_path / "theirs", to="peft-lora", base=tmp_path / "model.safetensors")
    assert found.exact
    assert all(path.startswith("base_model.model.encoder.layers.") for path in found.tensors)
    again = tna.convert(tmp_path / "theirs").file
    assert again is not None
    want = file if file.complete else file.with_base(list(base.values()))
    for path, delta in updates(again).items():
        assert error(delta, updates(want)[path]) <= TOLERANCE
    with pytest.raises(tna.TargetError, match=r"base has no module 'encoder.layers.0.q_proj'"):
        tna.convert(file, to="peft-lora", base=list(other.values()))
