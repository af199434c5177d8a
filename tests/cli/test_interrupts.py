"""Ctrl-C in every long command: a process of its own is interrupted, as a terminal does it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"), pytest.mark.usefixtures("keyboard"),
]  # fmt: skip

#: Seconds from the signal to the exit: much less than the work would go on for.
LIMIT = 10.0

# A command whose work is replaced by one that says when it has begun, and goes on for a minute.
CODE = """
import importlib, sys, time
where, what, how = sys.argv[1:4]
del sys.argv[1:4]
def work(*given, **settings):
    print("begun", flush=True)
    if how == "stubborn":
        try:
            time.sleep(60)
        finally:
            time.sleep(60)
    elif how == "failing":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'a' from partially initialized module 'b'")
    time.sleep(60)
setattr(importlib.import_module(where), what, work)
import runpy
runpy.run_module("tnadapt", run_name="__main__")
"""
COMMANDS = {
    "extract": (("tnadapt", "extract"), "base.safetensors tuned.safetensors -o out.safetensors",
                "out.safetensors is unchanged or complete; the same command starts over"),
    "convert": (("tnadapt.cli._convert_command", "convert"), "a.safetensors -o out --to peft-lora",
                "out is unchanged or complete; the same command starts over"),
    "merge": (("tnadapt", "merge"), "base a.safetensors -o out",
              "out is unchanged or complete; the same command resumes"),
    "verify": (("tnadapt", "verify"), "--preset lora", "there is no report"),
    "plan": (("tnadapt", "plan"), "--shape 8x8 --budget 100", "there is no plan"),
    "presets": (("tnadapt.cli._method_commands", "_row"), "", "nothing was listed"),
    "predict": (("tnadapt.finetune._prediction", "predict"), "a.safetensors --data a.csv",
                "nothing was written; the same command starts over"),
    "finetune": (("tnadapt.finetune._study", "open_problem"), "--out out",
                 "finished trainings are in out, and the same command resumes"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands look at before they begin."""
    import numpy as np
    from safetensors.numpy import save_file

    import tnadapt as tna
    from tests.support import checkpoint_files as cp

    for name in ("base", "tuned"):
        save_file({"q_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / f"{name}.safetensors")
    tna.save(tmp_path / "a.safetensors", cp.adapter(tna.presets.lora(1), [tna.Target("q_proj.weight", (4, 4), "q")]))
    (tmp_path / "a.csv").write_text("text\na\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(
            pytest.param(name, "sleeping", marks=[pytest.mark.slow] * (name in ("predict", "finetune")))
            for name in COMMANDS
        ),
        ("verify", "failing"),  # because of the interrupt
        ("verify", "stubborn"),  # the first one alone would wait for the clean-up, which takes a minute
    ],
)
def test_an_interrupt_ends_a_command_and_says_what_is_kept(name: str, how: str, folder: Path) -> None:
    if name in ("predict", "finetune"):
        pytest.importorskip("torch")
        pytest.importorskip("sklearn")
    before = sorted(path.name for path in folder.iterdir())
    place, arguments, kept = COMMANDS[name]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *place, how, name, *arguments.split()], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 120)[0]
    assert process.stdout.readline() == "begun\n", process.communicate(timeout=60)[1]
    time.sleep(0.2)
    start = time.monotonic()
    for _ in range(2 if how == "stubborn" else 1):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        time.sleep(0.3)
    _, message = process.communicate(timeout=60)
    assert time.monotonic() - start < LIMIT
    assert (process.returncode, message.strip()) == (130, f"stopped; {kept}")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_error_of_another_kind_is_passed_on() -> None:
    from tnadapt.cli.terminal import stoppable

    with pytest.raises(ValueError, match="wrong"), stoppable("nothing"):
        raise ValueError("wrong")
