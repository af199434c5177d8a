"""Models with an attached adapter as ONNX: every strategy, and merged, gives torch's outputs in ONNX Runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.array_presets import P
from tnadapt import Config

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from tnadapt.torch import attach

pytestmark = pytest.mark.slow


class Block(torch.nn.Module):
    """Attention-like: two projections of one input, and one of their product."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16, bias=False)

    def forward(self, x: Any) -> Any:
        return torch.softmax(self.q_proj(x), -1) * self.v_proj(torch.tanh(x))


def exported(model: Any, x: Any, path: Path) -> np.ndarray:
    """Outputs of ONNX Runtime, for a batch of another size than that of the export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        batch = torch.export.Dim("batch", min=2)
        torch.onnx.export(model, (x[:2],), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(found)


@pytest.mark.parametrize(
    ("strategy", "config"),
    [
        ("weight", P.superlora(2)),
        ("weight", P.superlora(2, projection="linear")),
        ("factored", P.lotr(2)),
        ("additive", P.lotr(2)),
        ("weight", P.dora(2)),
    ],
)
def test_it_is_what_torch_computes(strategy: str, config: Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(5, 16)
    before = model(x).detach().numpy()
    adapter = attach(model, config, targets=("q_proj", "v_proj"), strategy=strategy)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = model(x).detach().numpy()
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(exported(model, x, tmp_path / "attached.onnx"), expected, rtol=1e-5, atol=1e-5)
    if strategy == "factored":
        adapter.merge()
        np.testing.assert_allclose(exported(model, x, tmp_path / "merged.onnx"), expected, rtol=1e-5, atol=1e-5)
