"""Importing and attaching does not import torch's compiler, and what it reads of this package is marked as it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from tnadapt.backends.backend import constant_result


def test_the_mark_is_torchs() -> None:
    def ours() -> int:
        return 1

    def torchs() -> int:
        return 1

    assert constant_result(ours) is ours
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


def test_torchs_compiler_is_imported_when_it_is_needed() -> None:
    code = """
import sys, torch, tnadapt as tna
model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "v_proj": torch.nn.Linear(4, 4)})
adapter = tna.torch.attach(model, "lora", rank=1)
model["q_proj"](torch.ones(2, 4)).sum().backward()
with torch.no_grad():
    model["q_proj"](torch.ones(2, 4))
adapter.merge()
adapter.unmerge()
print("torch._dynamo" in sys.modules)
with tna.torch.rows(model, ["default", None]):
    model["q_proj"](torch.ones(2, 4))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr
