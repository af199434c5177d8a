"""Layers of models: fused weights, transposed weights, heads trained alongside the adapter, dtypes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.array_presets import P
from tnadapt import AdapterFile, Config, Rows, SuperLoRA, Target
from tnadapt.checkpoints.container import DTYPES

from .conversions import SHAPES, TOLERANCE, error, fill, made, model, updates

FUSED = {"blocks.0.attn.qkv": (24, 8), "blocks.1.attn.qkv": (24, 8)}


def fused(config: Config, interleaved: bool = False) -> AdapterFile:
    """Queries and values of fused weights."""
    targets = []
    for path, stored in FUSED.items():
        places = (Rows(0, 2, 6, 4), Rows(4, 2, 6, 4)) if interleaved else (Rows(0, 8, 24), Rows(16, 8, 24))
        targets += [Target(path, stored, role, rows=rows) for role, rows in zip("qv", places, strict=True)]
    rng = np.random.default_rng(0)
    plan = SuperLoRA(config, [target.shape for target in targets])
    return AdapterFile(config, targets, {n: rng.standard_normal(s).astype("f4") for n, s in plan.param_shapes.items()})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("to", ["peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"])
def test_fused_rows_become_a_whole_module(to: str, interleaved: bool, tmp_path: Path) -> None:
    file = fused(P.lora(2, alpha=3), interleaved)
    found = tna.convert(file, tmp_path / "out", to=to)
    assert found.exact
    assert found.error <= TOLERANCE
    if to == "peft-lora":
        assert found.config is not None
        assert found.config["r"] == 4  # the sum of both
    again = updates(tna.convert(tmp_path / "out").file)  # type: ignore[arg-type]
    for path, delta in updates(file).items():
        assert error(again[path], delta) <= TOLERANCE
        k = again[path].reshape(4, 6, 8)[:, 2:4] if interleaved else again[path][8:16]
        assert not k.any()


def test_fused_rows_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    file = fused(P.lora(2, alpha=3))
    tna.convert(file, tmp_path / "out", to="peft-lora")
    wrapped = peft.PeftModel.from_pretrained(model(FUSED), tmp_path / "out")
    for path, delta in updates(file).items():
        assert error(wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default"), delta) <= TOLERANCE


def test_updates_of_one_weight_are_summed(tmp_path: Path) -> None:
    file = made(P.lora(2), {"a.q": (6, 8), "b.q": (6, 8)})
    halves = [Target("a.q", (12, 8), rows=tna.Rows(start, 6, 12)) for start in (0, 6)]
    found = tna.convert(dataclasses.replace(file, targets=halves), tmp_path / "out", to="peft-lora")
    assert found.exact
    (delta,) = updates(tna.convert(tmp_path / "out").file).values()  # type: ignore[arg-type]
    assert error(delta, np.concatenate(file.deltas()).astype(np.float64)) <= TOLERANCE


def test_transposed_weights_are_peft_s_fan_in_fan_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    import torch
    from transformers.pytorch_utils import Conv1D

    def base() -> Any:
        torch.manual_seed(0)
        root = torch.nn.Module()
        for name, (out, cols) in {"c_attn": (24, 8), "c_square": (8, 8)}.items():
            root.add_module(name, Conv1D(out, cols))
        return torch.nn.ModuleDict({"h": root}).requires_grad_(False)

    targets = [Target("h.c_attn", (8, 24), transposed=True), Target("h.c_square", (8, 8), transposed=True)]
    config = P.lora(3, alpha=5)
    plan = SuperLoRA(config, [target.shape for target in targets])
    rng = np.random.default_rng(0)
    file = AdapterFile(config, targets, {n: rng.standard_normal(s).astype("f4") for n, s in plan.param_shapes.items()})
    tna.convert(file, tmp_path / "out", to="peft-lora")
    wrapped = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    for path, delta in updates(file).items():
        found = wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        assert error(found, delta) <= TOLERANCE  # as it is stored, (in, out)
    again = tna.convert(tmp_path / "out").file
    assert again is not None
    assert [target.transposed for target in again.targets] == [True, True]
    # What PEFT itself saves: of the last layer it met.
    mine = peft.get_peft_model(base(), peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_square"]))
    fill((p for name, p in mine.named_parameters() if "lora_" in name))
    mine.save_pretrained(tmp_path / "mine")
    found = updates(tna.convert(tmp_path / "mine").file)  # type: ignore[arg-type]
    for path, delta in found.items():
        assert error(delta, mine.get_submodule(f"base_model.model.{path}").get_delta_weight("default")) <= TOLERANCE
    # The base says how a weight that is not square is stored.
    known = tna.convert(tmp_path / "mine", base={"h.c_attn": (8, 24), "h.c_square": (8, 8)}).file
    assert known is not None
    assert [target.transposed for target in known.targets] == [True, True]
    with pytest.raises(tna.FileError, match=r"unknown how the square 'h\.c_square' is stored"):
        tna.convert(tmp_path / "mine", base={"h.c_attn": (24, 8), "h.c_square": (8, 8)})
    for to in ("peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"):
        with pytest.raises(tna.ConfigError, match=r"stored as \(in, out\).*convert to 'peft-lora'"):
            tna.convert(file, to=to)


def test_multihead_attention_and_other_parameters_are_refused() -> None:
    arrays = SuperLoRA(P.lora(1), [(4, 4)]).init()
    whole = AdapterFile(P.lora(1), [Target("attn", (12, 4), "q", "in_proj_weight", Rows(0, 4, 12))], arrays)
    for to, why in (("peft-lora", "adds the update of the output projection twice"), ("lycoris-full", "has no module")):
        with pytest.raises(tna.ConfigError, match=f"attn.in_proj_weight cannot be converted.*{why}"):
            tna.convert(whole, to=to)
    for target in (Target("attn", (4, 4), parameter="table"), Target("", (4, 4))):
        with pytest.raises(tna.ConfigError, match="this is another parameter"):
            tna.convert(AdapterFile(P.lora(1), [target], arrays), to="peft-lora")


def test_a_head_goes_with_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    def base() -> Any:
        root = model(SHAPES)
        root.add_module("head", torch.nn.Linear(8, 3))
        return root.requires_grad_(False)

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    mine = peft.get_peft_model(base(), config)
    fill((p for name, p in mine.named_parameters() if p.requires_grad))
    mine.save_pretrained(tmp_path / "theirs")
    file = tna.convert(tmp_path / "theirs").file
    assert file is not None
    head = mine.base_model.model.head.modules_to_save["default"]
    assert np.array_equal(file.kept["head.weight"], head.weight.detach())
    assert np.array_equal(file.kept["head.bias"], head.bias.detach())
    tna.convert(file, tmp_path / "again", to="peft-lora")
    wrapped = peft.PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(wrapped.base_model.model.head.modules_to_save["default"].weight, head.weight)
    with pytest.raises(tna.ConfigError, match=r"LyCORIS has no place for.*head.bias.*without_kept=True"):
        tna.convert(file, to="lycoris-lora")
    assert tna.convert(file, to="lycoris-lora", without_kept=True).exact
    beside = dataclasses.replace(file, kept={"blocks.0.attn.q_proj.scale": np.zeros(12, "f4")}, ties={})
    with pytest.raises(tna.ConfigError, match=r"saves whole modules, and cannot keep 'blocks\.0\.attn\.q_proj\.scale'"):
        tna.convert(beside, to="peft-lora")


def test_trained_biases_are_kept(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    base = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(6, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["a"], bias="all"))
    fill((p for name, p in mine.named_parameters() if p.requires_grad))
    mine.save_pretrained(tmp_path / "theirs")
    file = tna.convert(tmp_path / "theirs").file
    assert file is not None
    layers = mine.base_model.model
    assert set(file.kept) == {"a.bias", "b.bias"}
    assert np.array_equal(file.kept["a.bias"], layers["a"].base_layer.bias.detach())
    assert np.array_equal(file.kept["b.bias"], layers["b"].bias.detach())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("to", ["peft-lora", "lycoris-lora"])
def test_dtypes_come_and_go_unchanged(to: str, dtype: str, tmp_path: Path) -> None:
    file = tna.convert(made(P.lora(4, alpha=8), dtype="f8"), dtype=dtype).file
    assert file is not None
    assert file.dtype == dtype
    found = tna.convert(file, tmp_path / "out", to=to)
    assert found.error == 0.0
    again = tna.convert(tmp_path / "out").file
    assert again is not None
    assert again.dtype == dtype
    assert again.config == file.config
    for name, array in file.arrays.items():
        assert np.array_equal(again.arrays[name], array)
    # A peer's own library reads the same numbers.
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    where = tmp_path / "out" / "adapter_model.safetensors" if to == "peft-lora" else tmp_path / "out"
    tensors = load_file(where)
    factor = next(t for name, t in tensors.items() if "q_proj" in name and ("lora_B" in name or "lora_up" in name))
    assert str(factor.dtype) == f"torch.{dtype}"
    assert torch.equal(factor.double(), torch.tensor(file.arrays["group0.split0.factor0"], dtype=torch.float64))


@pytest.mark.parametrize("names", ["F16 BF16", "F16 F32", "BF16 F32", "F64 F16", "BF16 F64", "F32 F64", "F16 BF16 F32"])
@pytest.mark.parametrize("library", ["peft", "lycoris"])
def test_different_dtypes_become_one_that_holds_all_numbers(library: str, names: str, tmp_path: Path) -> None:
    if library == "peft":
        name, (down, up) = "base_model.model.{}.q.{}.weight", ("lora_A", "lora_B")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        name, (down, up) = "lycoris_{}_q.{}.weight", ("lora_down", "lora_up")
    tensors, expected = {}, {}
    rng = np.random.default_rng(0)
    for layer, tag in zip("abc", names.split(), strict=False):
        dtype = DTYPES[tag]
        for part, shape in ((down, (2, 6)), (up, (4, 2))):
            stored = cp.stored(rng.standard_normal(shape), dtype)
            tensors[name.format(layer, part)] = (tag, stored)
            expected[f"{layer}.q", part] = cp.numbers(stored, dtype)
    cp.write_file(tmp_path / "adapter_model.safetensors", tensors)
    where = tmp_path if library == "peft" else tmp_path / "adapter_model.safetensors"
    file = tna.convert(where, base=["a.q", "b.q", "c.q"]).file
    assert file is not None
    assert file.dtype == ("float64" if "F64" in names else "float32")
    found = updates(file)
    assert len(found) == len(names.split())
    for path in found:
        assert error(found[path], expected[path, up] @ expected[path, down]) < 1e-15


def test_what_has_to_be_rounded_becomes_float32(tmp_path: Path) -> None:
    file = tna.convert(made(P.lora(4, alpha=8), dtype="f8"), dtype="bfloat16").file
    assert file is not None
    assert dict(file.dtypes)
    found = tna.convert(file, to="peft-lora", rank=2, max_error=0.9)
    assert not found.dtypes
    assert {array.dtype.name for array in found.tensors.values()} == {"float32"}
    rounded = tna.convert(file, to="peft-lora", rank=2, max_error=0.9, dtype="bfloat16")
    assert set(rounded.dtypes.values()) == {"bfloat16"}
    assert rounded.error > found.error
    large = dataclasses.replace(made(P.lora(1)), arrays={
        name: array * np.float32(1e6) for name, array in made(P.lora(1)).arrays.items()
    })  # fmt: skip
    with pytest.raises(tna.ConfigError, match="too large for float16; use float32"):
        tna.convert(large, dtype="float16")


def test_factors_that_cancel_lose_more_than_their_last_digit() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((8, 1)), rng.standard_normal((12, 1))
    near = {"group0.split0.factor0": np.hstack([b, b + 1e-6]), "group0.split0.factor1": np.hstack([a, -a])}
    file = AdapterFile(P.lora(2), [Target("a.q", (8, 12))], near)
    assert tna.convert(file, to="peft-lora").error == 0.0  # in float64, as it was
    with pytest.raises(tna.ConfigError, match=r"nothing but rounding is allowed: give a larger rank or a wider dtype"):
        tna.convert(file, to="peft-lora", dtype="float32")
    assert not tna.convert(file, to="peft-lora", dtype="float32", max_error=0.5).exact


def test_ranks_and_scales_that_differ_keep_the_update(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for path, rank, alpha in (("a.q", 2, 4.0), ("b.q", 3, 1.0), ("c.q", 1, 0.0)):
        name = f"lora_unet_{path.replace('.', '_')}"
        up, down = rng.standard_normal((6, rank)), rng.standard_normal((rank, 8))
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors |= {f"{name}.alpha": np.asarray(alpha)}
        deltas[path] = up @ down * (alpha / rank or 1.0)
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "kohya.safetensors")
    file = tna.convert(tmp_path / "kohya.safetensors", base=list(deltas)).file
    assert file is not None
    parts = [(config.rank, config.alpha, len(targets)) for config, targets in file.config.split(file.targets)]
    assert parts == [(2, 4.0, 1), (3, 1.0, 1), (1, None, 1)]
    for path, delta in updates(file).items():
        assert error(delta, deltas[path]) <= 1e-14


def test_a_fresh_adapter_is_zero_everywhere(tmp_path: Path) -> None:
    config = P.superlora(2, groups=1)
    file = AdapterFile(config, [Target("a.q", (6, 8))], SuperLoRA(config, [(6, 8)]).init())
    for to in ("peft-lora", "peft-lokr", "peft-loha", "lycoris-full"):
        found = tna.convert(file, to=to)
        assert (found.exact, found.error) == (True, 0.0)
