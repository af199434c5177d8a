"""PEFT's DoRA and HiRA, read and written, on torch models whose outputs stay the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support.array_presets import P

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from torch import nn
from transformers.pytorch_utils import Conv1D

import tnadapt.torch as tt

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


class Model(nn.Module):
    """Linear layers with and without a bias, and a convolution."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (
            (Conv1D(7, 6), Conv1D(5, 7)) if transposed else (nn.Linear(6, 7), nn.Linear(7, 5, bias=False))
        )
        self.conv = None if transposed else nn.Conv2d(1, 3, 3)

    def forward(self, x: Any) -> Any:
        y = self.two(torch.tanh(self.one(x)))
        return y if self.conv is None else self.conv(y[None, None])


def names(model: Model) -> list[str]:
    return ["one", "two"] if model.conv is None else ["one", "two", "conv"]


def stir(parameters: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn_like(parameter)


X = torch.linspace(-1.0, 1.0, 30).reshape(5, 6)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize(
    "config",
    [P.dora(2, alpha=3), P.hira(2, alpha=3), P.lokr(2, split_size=1, apply="hadamard"), P.dora(2).replace(terms=2)],
    ids=["dora", "hira", "lokr", "terms"],
)
def test_ours_become_peft_s(config: tna.Config, transposed: bool, tmp_path: Path) -> None:
    ours = Model(transposed)
    adapter = tt.attach(ours, config, [f"{name}" for name in names(ours)])
    stir(parameter for _, parameter in adapter.named_parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora", dtype="float32", rank=None)
    assert found.error < 1e-6
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert written["peft_type"] == ("LORA" if config.apply == "magnitude" else "HIRA")
    theirs = peft.PeftModel.from_pretrained(Model(transposed), str(tmp_path / "theirs")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(X), ours(X), rtol=1e-5, atol=1e-5)
    # And back.
    again = tna.convert(tmp_path / "theirs")
    assert again.file is not None
    assert again.file.config.apply == config.apply
    for name, array in again.file.arrays.items():
        if name.endswith("magnitude"):
            number = int(name[len("weight")])
            path = again.file.targets[number].module
            own = next(index for index, target in enumerate(adapter.targets) if target.module == path)
            assert np.array_equal(array, adapter.arrays()[f"weight{own}.magnitude"].detach().numpy())


def own_file(config: tna.Config, **settings: Any) -> tna.AdapterFile:
    targets = [tna.Target("attn.q", (6, 4), "q")]
    if settings:
        targets = [tna.Target("attn.qkv", (18, 4), "q", rows=tna.Rows(0, 6, 18))]
    plan = tna.SuperLoRA(config, [(6, 4)])
    arrays = {name: np.ones(shape, np.float32) for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, targets, arrays)


@pytest.mark.parametrize(
    ("file", "to", "message"),
    [
        (
            own_file(P.dora(2)),
            "lycoris-lora",
            "apply='magnitude' of this adapter does more than add ΔW to the weight, and",
        ),
        (
            own_file(P.dora(2)),
            "peft-lokr",
            "and peft-lokr can only add: merge it into the base with tnadapt.merge (tnadapt merge), or convert it to "
            "'peft-lora' (--to peft-lora)",
        ),
        (own_file(P.hira(2)), "lycoris-full", "apply='hadamard' of this adapter does more than add"),
        (
            own_file(P.dora(2, magnitude_axis="cols")),
            "peft-lora",
            "and peft-lora can only add: merge it into the base with tnadapt.merge (tnadapt merge)",
        ),
        (own_file(P.dora(2), rows=True), "peft-lora", "'attn.qkv' has magnitudes of some of its rows only"),
    ],
)
def test_what_a_form_does_not_hold_is_refused(file: tna.AdapterFile, to: str, message: str) -> None:
    with pytest.raises(tna.ConfigError) as error:
        tna.convert(file, to=to)
    assert message in str(error.value)


def test_it_is_refused_before_a_rank_is_asked_for() -> None:
    # An update that is no Kronecker product: a rank would not help.
    file = own_file(P.dora(2, start="pissa"))
    rng = np.random.default_rng(0)
    arrays, given = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for shapes in (file.plan.param_shapes, file.plan.start_shapes)
    )
    for to in ("peft-lokr", "lycoris-lokr", "peft-loha"):
        with pytest.raises(tna.ConfigError, match="apply='magnitude' of this adapter does more than add"):
            tna.convert(dataclasses.replace(file, arrays=arrays, given=given), to=to)


def test_a_magnitude_of_another_length_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tna.convert(own_file(P.dora(2)), tmp_path / "theirs", to="peft-lora")
    place = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(place)
    name = "base_model.model.attn.q.lora_magnitude_vector"
    save_file({**tensors, name: np.ones(5, np.float32)}, place)
    with pytest.raises(
        tna.FileError, match=r"the magnitude of 'attn.q' has 5 elements; expected 6, one for each output"
    ):
        tna.convert(tmp_path / "theirs")
    save_file({**{key: array for key, array in tensors.items() if key != name}, f"{name}.weight": tensors[name]}, place)
    assert tna.convert(tmp_path / "theirs").exact
