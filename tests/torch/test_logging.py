"""What happens to adapters is logged by the standard module, at the level INFO under ``tnadapt``, and not printed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import tnadapt as tna
import tnadapt.torch


def test_what_happens_to_an_adapter_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="tnadapt")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    path = tmp_path / "a\x1b.safetensors"
    adapter = tnadapt.torch.attach(model, "lora", "all-linear", rank=2, name="one")
    adapter.save(path)
    adapter.swap(path)
    adapter.merge()
    adapter.unmerge()
    adapter.detach()
    tnadapt.torch.load(model, path, name="two").bake()
    words = ["attached", "saved", "swapped", "merged", "unmerged", "detached", "attached", "loaded", "baked"]
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" ")[0] for message in messages] == words
    assert all("<tnadapt adapter " in message and "32 parameters" in message for message in messages)
    assert f"to {tmp_path}/a\\x1b.safetensors" in messages[1]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert {record.name.partition(".")[0] for record in caplog.records} == {"tnadapt"}
    assert capsys.readouterr() == ("", "")


def test_nothing_is_logged_of_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tnadapt")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(tna.TnadaptError):
        tnadapt.torch.attach(model, "lora", "nothing like it", rank=2)
    assert not caplog.records
