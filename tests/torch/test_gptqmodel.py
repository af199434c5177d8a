"""GPTQModel's own layers, where the package is installed: the same numbers, and gradients after an evaluation."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt

from .quantized_models import library, numbers
from .small import stir

pytestmark = pytest.mark.slow
ROWS, COLS, GROUP = 64, 128, 32
LAYERS = "gptqmodel.nn_modules.qlinear"


@pytest.fixture(autouse=True)
def _gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    library("gptqmodel")


def empty(name: str, bits: int, **settings: Any) -> Any:
    """Return a layer of GPTQModel, named as ``module.Class``, before packing."""
    module, cls = name.split(".")
    return getattr(importlib.import_module(f"{LAYERS}.{module}"), cls)(
        bits=bits, group_size=GROUP, sym=False, desc_act=False, in_features=COLS, out_features=ROWS,
        bias="Embeddings" not in cls, register_buffers=True, **settings,
    )  # fmt: skip


def packed(name: str, bits: int, ordered: bool = True, **settings: Any) -> Any:
    """Return a layer that GPTQModel has packed from random weights, scales and zero points."""
    made = empty(name, bits, **settings)
    torch.manual_seed(bits)
    plain = nn.Embedding(COLS, ROWS) if "Embeddings" in name else nn.Linear(COLS, ROWS)
    group = torch.arange(COLS) // GROUP
    group = group if ordered else group[torch.randperm(COLS)]
    scales, zeros = torch.rand(ROWS, COLS // GROUP) * 0.02 + 0.01, torch.randint(0, 1 << bits, (ROWS, COLS // GROUP))
    if "awq" in name:
        made.pack(plain, scales, zeros.float())
    else:
        made.pack_original(plain, scales, zeros.float(), group.to(torch.int32))
    return made


def own_numbers(made: Any) -> Any:
    """Return the weight (in, out) by the package's plain code: its classes may compile theirs."""
    if hasattr(made, "g_idx"):
        base = importlib.import_module(LAYERS).PackableQuantLinear
        return base.dequantize_weight(made)
    return made._dequantize_weight_for_inference(torch.zeros(1, COLS), dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "bits", "settings"),
    [
        *itertools.product(["torch.TorchLinear"], range(2, 9), [{}, {"ordered": False}]),
        *itertools.product(["torch.TorchLinear"], [2, 3, 4, 8], [{"format": "GPTQ_P"}]),
        *itertools.product(["torch_awq.AwqTorchLinear"], range(2, 9), [{}]),
    ],
)
def test_it_has_the_same_numbers(name: str, bits: int, settings: dict[str, Any]) -> None:
    if "format" in settings:
        settings = {"format": getattr(importlib.import_module("gptqmodel.quantization").FORMAT, settings["format"])}
    made = packed(name, bits, **settings)
    assert torch.equal(numbers(made), own_numbers(made).T)
    if "awq" in name or "format" in settings:
        return
    # As a model of the first format is converted when it is loaded.
    convert = importlib.import_module("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    convert(made, bits=bits, pack_dtype=torch.int32)
    assert made.qzero_format() == 2
    assert torch.equal(numbers(made), own_numbers(made).T)


def test_an_embedding_is_adapted() -> None:
    made = packed("torch.TorchQuantEmbeddings", 4)
    table = own_numbers(made)
    assert torch.equal(numbers(made), table)
    model = nn.Sequential(made)
    adapter = tt.attach(model, tna.presets.lora(2), "embeddings")
    stir(adapter, 0.1)
    ids = torch.tensor([[0, 5, COLS - 1]])
    torch.testing.assert_close(model(ids).float(), (table + adapter.deltas()[0])[ids].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "torch_aten_kernel.TorchAtenLinear",
        "torch_fused.TorchFusedLinear",
        "torch_aten_kernel_awq.TorchAtenAwqLinear",
        "torch_fused_awq.TorchFusedAwqLinear",
    ],
)
def test_a_layer_for_cpus_has_a_backward_after_an_evaluation(name: str) -> None:
    if "awq" in name:  # these do not pack
        made, source = empty(name, 4), packed("torch_awq.AwqTorchLinear", 4)
        for tensor in ("qweight", "qzeros", "scales", "bias"):
            setattr(made, tensor, getattr(source, tensor))
    else:
        made = packed(name, 4)
    made.post_init()
    before = numbers(made)
    model = nn.Sequential(nn.Linear(COLS, COLS).bfloat16(), made).eval()
    adapter = tt.attach(model, tna.presets.lora(2), ["1"])
    x = torch.randn(3, COLS).bfloat16()
    with torch.no_grad():
        model(x)
    assert torch.equal(numbers(made), before)
    x.requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad is not None
    adapter.detach()
    with torch.no_grad():
        model.eval()(x)
    assert (made.linear_mode, numbers(made)) == ("inference", None)
