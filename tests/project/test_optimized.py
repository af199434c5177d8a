"""``python -OO``: without docstrings and without asserts, everything is there and every check is made.

The program that goes through everything runs without ``-OO``, too, and opens no connection either way.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.depth import in_depth

TARGETS = [tna.Target(f"layers.0.attn.{x}_proj", (4, 6), x) for x in "qv"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


GUARD = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise AssertionError(f"{event}{arguments!r}")

sys.addaudithook(refuse)
"""

# One process: every module, every command's help, and an adapter through all of them.
EVERYTHING = (
    GUARD
    + """
import contextlib, importlib, io, pkgutil, runpy, traceback
import paper, tnadapt
assert not sys.flags.optimize, "asserts are not to be run"

def command(*words, code=0, program="tnadapt"):
    sys.argv = [program, *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            if (end.code or 0) != code:
                raise RuntimeError(f"{words}: {end.code}")
    return out.getvalue()

folder = sys.argv[1]
names = ["info", "merge", "convert", "extract", "plan", "verify", "finetune"]
listed = command("--help")
for name in names:
    if name not in listed or "--json" not in command(name, "--help"):
        raise RuntimeError(name)
command("info", folder + "/adapter.safetensors")
command("info", folder + "/base")
command("merge", folder + "/base", folder + "/adapter.safetensors", "-o", folder + "/out")
command("convert", folder + "/adapter.safetensors", "--to", "peft-lora", "-o", folder + "/peft")
tnadapt.convert(folder + "/peft", base=["layers.0.attn.q_proj", "layers.0.attn.v_proj"])
command("extract", folder + "/base", folder + "/out", "-o", folder + "/again.safetensors", "--rank", "1")
command("plan", folder + "/base", "--budget", "100")
command("verify", "--preset", "lora", "--shape", "4x6", "--backend", "numpy")
command("merge", folder + "/base", folder + "/cut.safetensors", "-o", folder + "/no", code=2)
if "--dry-run" not in command("--help", program="paper"):
    raise RuntimeError("paper")
for package in (tnadapt, paper):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", lambda name: None):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                pass  # an extra that is not installed
            except Exception as error:
                # transformers, below PEFT, needs its docstrings; no line of this library does.
                last = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1]
                if not sys.flags.optimize or last.startswith((tnadapt.__path__[0], paper.__path__[0])):
                    raise
try:
    import torch
except ImportError:
    pass
else:
    def model():
        torch.manual_seed(0)
        return torch.nn.TransformerEncoderLayer(8, 2, 8)

    config = tnadapt.presets.superlora(2, projection="linear", ratio=0.5)
    tnadapt.torch.attach(model(), config).save(folder + "/of_torch")
    adapter = tnadapt.torch.load(model(), folder + "/of_torch")
    adapter.merge()
    adapter.unmerge()
print("all of it")
"""
)


@pytest.mark.slow
@pytest.mark.law("optimized-python", "offline")
@pytest.mark.parametrize(
    "options", in_depth([("-OO",), ()], [("-OO",)]), ids=lambda options: " ".join(options) or "as usual"
)
def test_every_command_and_every_module(tmp_path: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("typer")
    tensors = cp.base(TARGETS)
    cp.write(tmp_path / "base", tensors)
    tna.save(tmp_path / "adapter.safetensors", cp.adapter(tna.presets.lora(2), TARGETS, tensors))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "adapter.safetensors").read_bytes()[:-1])
    done = run(*options, "-W", "ignore", "-c", EVERYTHING, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("all of it\n")
    assert "cut off or too long" in done.stderr


@pytest.mark.law("offline")
def test_the_guard_sees_a_connection() -> None:
    done = run("-c", GUARD + "import socket\nsocket.create_connection(('127.0.0.1', 9))\n")
    assert "AssertionError: socket." in done.stderr


@pytest.mark.slow
@pytest.mark.law("optimized-python")
def test_files_that_the_fuzzer_found_are_refused_in_the_same_words() -> None:
    paths = sorted((Path(__file__).parents[2] / "fuzz" / "corpus" / "adapter").iterdir())
    said = []
    for path in paths:
        try:
            tna.load(path)
        except tna.FileError as error:
            said.append(str(error))
        else:
            said.append(f"READ {path}")
    assert len({re.sub(r"[^ ]*/|\d+", "", message) for message in said}) > 20
    code = (
        "import sys, tnadapt\n"
        "for path in sys.argv[1:]:\n"
        "    try: tnadapt.load(path); print('READ', path)\n"
        "    except tnadapt.FileError as error: print(error)\n"
    )
    done = run("-OO", "-c", code, *map(str, paths))
    assert done.stdout.splitlines() == said, done.stderr
