"""Layers of models: fused weights, transposed weights, heads trained alongside the adapter, dtypes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.array_presets import P
from tnadapt import AdapterFile, Config, Rows, SuperLoRA, Target
from tnadapt.checkpoints.container import DTYPES

from .conversions import (
    TOLERANCE,
    adapter_on,
    assert_same_updates,
    converted,
    error,
    loaded_by_peft,
    made,
    peft_updates,
    trained_by_peft,
    updates,
)

FUSED = {"blocks.0.attn.qkv": (24, 8), "blocks.1.attn.qkv": (24, 8)}


def fused(config: Config, interleaved: bool = False) -> AdapterFile:
    """Queries and values of fused weights."""
    places = (Rows(0, 2, 6, 4), Rows(4, 2, 6, 4)) if interleaved else (Rows(0, 8, 24), Rows(16, 8, 24))
    pairs = list(zip("qv", places, strict=True))
    return adapter_on([Target(path, FUSED[path], role, rows=rows) for path in FUSED for role, rows in pairs], config)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("to", ["peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"])
def test_fused_rows_become_a_whole_module(to: str, interleaved: bool, tmp_path: Path) -> None:
    file = fused(P.lora(2, alpha=3), interleaved)
    found = tna.convert(file, tmp_path / "out", to=to)
    assert found.exact
    assert found.error <= TOLERANCE
    again = updates(converted(tmp_path / "out"))
    assert_same_updates(again, file)
    for delta in again.values():
        assert not (delta.reshape(4, 6, 8)[:, 2:4] if interleaved else delta[8:16]).any()
    if to == "peft-lora":
        assert found.config is not None
        assert found.config["r"] == 4  # the sum of both
        assert_same_updates(loaded_by_peft(tmp_path / "out", FUSED), file)


def test_transposed_weights_are_peft_s_fan_in_fan_out(tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D

    def base() -> Any:
        torch.manual_seed(0)
        layers = torch.nn.ModuleDict({"c_attn": conv(24, 8), "c_square": conv(8, 8)})
        return torch.nn.ModuleDict({"h": layers}).requires_grad_(False)

    shapes = {"h.c_attn": (8, 24), "h.c_square": (8, 8)}
    file = adapter_on([Target(path, shape, transposed=True) for path, shape in shapes.items()], P.lora(3, alpha=5))
    tna.convert(file, tmp_path / "out", to="peft-lora")
    assert_same_updates(loaded_by_peft(tmp_path / "out", base()), file)  # as it is stored, (in, out)
    assert [target.transposed for target in converted(tmp_path / "out").targets] == [True, True]
    # What PEFT itself saves: of the last layer it met.
    config = peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_square"])
    mine = trained_by_peft(tmp_path / "mine", base(), config)
    assert_same_updates(converted(tmp_path / "mine"), peft_updates(mine))
    # The base says how a weight that is not square is stored.
    known = converted(tmp_path / "mine", base=shapes)
    assert [target.transposed for target in known.targets] == [True, True]
    with pytest.raises(tna.FileError, match=r"unknown how the square 'h\.c_square' is stored"):
        tna.convert(tmp_path / "mine", base={**shapes, "h.c_attn": (24, 8)})
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


def test_what_was_trained_beside_it_needs_a_place() -> None:
    file = dataclasses.replace(
        made(P.lora(2)), kept={"head.weight": np.ones((3, 8), "f4"), "head.bias": np.ones(3, "f4")}
    )
    assert tna.convert(file, to="peft-lora").exact
    with pytest.raises(tna.ConfigError, match=r"LyCORIS has no place for.*head.bias.*without_kept=True"):
        tna.convert(file, to="lycoris-lora")
    assert tna.convert(file, to="lycoris-lora", without_kept=True).exact
    beside = dataclasses.replace(file, kept={"blocks.0.attn.q_proj.scale": np.zeros(12, "f4")})
    with pytest.raises(tna.ConfigError, match=r"saves whole modules, and cannot keep 'blocks\.0\.attn\.q_proj\.scale'"):
        tna.convert(beside, to="peft-lora")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("to", ["peft-lora", "lycoris-lora"])
def test_dtypes_come_and_go_unchanged(to: str, dtype: str, tmp_path: Path) -> None:
    file = converted(made(P.lora(4, alpha=8), dtype="f8"), dtype=dtype)
    assert file.dtype == dtype
    assert tna.convert(file, tmp_path / "out", to=to).error == 0.0
    again = converted(tmp_path / "out")
    assert (again.dtype, again.config) == (dtype, file.config)
    for name, array in file.arrays.items():
        assert np.array_equal(again.arrays[name], array)
    # A peer's own library reads the same numbers.
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors" if to == "peft-lora" else tmp_path / "out")
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
    file = converted(where, base=["a.q", "b.q", "c.q"])
    assert file.dtype == ("float64" if "F64" in names else "float32")
    found = updates(file)
    assert len(found) == len(names.split())
    for path in found:
        assert error(found[path], expected[path, up] @ expected[path, down]) < 1e-15


def test_what_has_to_be_rounded_becomes_float32(tmp_path: Path) -> None:
    file = converted(made(P.lora(4, alpha=8), dtype="f8"), dtype="bfloat16")
    assert dict(file.dtypes)
    found = tna.convert(file, to="peft-lora", rank=2, max_error=0.9)
    assert not found.dtypes
    assert {array.dtype.name for array in found.tensors.values()} == {"float32"}
    rounded = tna.convert(file, to="peft-lora", rank=2, max_error=0.9, dtype="bfloat16")
    assert set(rounded.dtypes.values()) == {"bfloat16"}
    assert rounded.error > found.error
    small = made(P.lora(1))
    large = dataclasses.replace(small, arrays={n: array * np.float32(1e6) for n, array in small.arrays.items()})
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
    for path, rank, alpha in (("a.q", 2, 4.0), ("b.q", 3, 1), ("c.q", 1, 0.0)):  # some scripts store integers
        name = f"lora_unet_{path.replace('.', '_')}"
        up, down = rng.standard_normal((6, rank)), rng.standard_normal((rank, 8))
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors |= {f"{name}.alpha": np.asarray(alpha)}
        deltas[path] = up @ down * (alpha / rank or 1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    file = converted(tmp_path / "kohya.safetensors", base=list(deltas))
    parts = [(config.rank, config.alpha, len(targets)) for config, targets in file.config.split(file.targets)]
    assert parts == [(2, 4.0, 1), (3, 1.0, 1), (1, None, 1)]
    assert_same_updates(file, deltas, 1e-14)


def test_a_fresh_adapter_is_zero_everywhere(tmp_path: Path) -> None:
    config = P.superlora(2, groups=1)
    file = AdapterFile(config, [Target("a.q", (6, 8))], SuperLoRA(config, [(6, 8)]).init())
    for to in ("peft-lora", "peft-lokr", "peft-loha", "lycoris-full"):
        found = tna.convert(file, to=to)
        assert (found.exact, found.error) == (True, 0.0)
