"""No text in a file can control the terminal: every command, on files in which all texts try to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support import forge
from tests.support.hostile_text import EVIL, adapter, checkpoint, named, peft, speaks
from tnadapt.errors import escaped, safe_repr

pytestmark = pytest.mark.slow


@pytest.mark.law("printed-text")
@given(st.text())
def test_escaped_text_is_one_visible_line(text: str) -> None:
    found = escaped(text)
    assert not speaks(found)
    assert "\n" not in found
    assert escaped(found) == found
    assert not speaks(safe_repr(text))
    assert not speaks(str(tna.FileError(text)))


@pytest.mark.parametrize("text", ["größe", "重み", "вес", "a b", "λ×é", "😀"])
def test_what_people_write_is_left_alone(text: str) -> None:
    assert escaped(text) == text


def test_the_text_is_hostile() -> None:
    # Else the tests below say nothing.
    assert len(speaks(EVIL)) > 15
    assert any(line.startswith("FORGED") for line in speaks(EVIL))


class Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = checkpoint(folder / "base", "m")
        self.tuned = checkpoint(folder / "tuned", "m")
        adapter(folder / "adapter.safetensors", "m")
        adapter(folder / "draws.safetensors", "m", draws="0" * 64)
        adapter(folder / "other.safetensors", "elsewhere")
        adapter(folder / "key.safetensors", "m", **{EVIL: 1})
        adapter(folder / "field.safetensors", "m", config={EVIL: 1})
        adapter(folder / "role.safetensors", "m", targets=[[EVIL, [4, 6], EVIL]])
        adapter(folder / "activation.safetensors", "m", activation=EVIL)
        self.peft = peft(folder / "peft")
        peft(folder / "peft-odd", modules_to_save=[EVIL], bias=EVIL)
        for name, header in (
            ("dtype", {EVIL: {"dtype": EVIL, "shape": [], "data_offsets": [0, 0]}}),
            ("entry", {EVIL: {EVIL: EVIL}}),
            ("meta", {"__metadata__": {EVIL: EVIL}, EVIL: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            ("gap", {EVIL: {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}),
            ("kohya", {f"lora_unet_{EVIL}.alpha": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        ):
            (folder / f"{name}.safetensors").write_bytes(forge.container(header))
        self.index = folder / "index"
        self.index.mkdir()
        (self.index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EVIL: EVIL}}))
        self.twice = folder / "twice.json"
        self.twice.write_text(json.dumps({EVIL: 1})[:-1] + "," + json.dumps({EVIL: 1})[1:])
        self.named = named(folder, "adapter")
        adapter(self.named, "m")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("hostile"))


BROKEN = ("key", "field", "role", "activation", "dtype", "entry", "meta", "gap", "kohya", "other", "draws")

COMMANDS: dict[str, Callable[[Files], list[Any]]] = {
    "info adapter": lambda f: ["info", f.folder / "adapter.safetensors", "--all"],
    "info file of a hostile name": lambda f: ["info", f.named],
    "info checkpoint": lambda f: ["info", f.base, "--all"],
    "info peft": lambda f: ["info", f.peft / "adapter_model.safetensors"],
    "info index": lambda f: ["info", f.index],
    "merge": lambda f: ["merge", f.base, f.folder / "adapter.safetensors", "-o", f.folder / "merged", "--overwrite"],
    "merge to a hostile name": lambda f: ["merge", f.base, f.named, "-o", named(f.folder, "merged"), "--overwrite"],
    "convert": lambda f: ["convert", f.folder / "adapter.safetensors", "--to", "peft-lora", "--without-kept"],
    "convert from peft": lambda f: ["convert", f.peft],
    "convert with an error": lambda f: ["convert", f.peft, "--to", "peft-lora", "--rank", "1", "--max-error", "1"],
    "convert with a base": lambda f: ["convert", f.peft, "--base", f.base],
    "convert odd peft": lambda f: ["convert", f.folder / "peft-odd"],
    "extract": lambda f: ["extract", f.base, f.tuned, "-o", f.folder / "out.safetensors", "--overwrite", "--rank", "1"],
    "extract with keep_trainable": lambda f: [
        "extract", f.base, f.tuned, "-o", f.folder / "x.safetensors", "--keep-trainable", EVIL,
    ],
    "plan": lambda f: ["plan", f.base, "--budget", "100"],
    "plan with other targets": lambda f: ["plan", f.base, "--budget", "100", "--targets", EVIL],
    "verify with a config": lambda f: ["verify", "--config", f.twice],
    "one argument too many": lambda f: ["info", f.base, EVIL],
    "an option that is none": lambda f: ["info", f.base, f"--{EVIL}"],
    "a value that is none": lambda f: ["convert", f.base, "--rank", EVIL],
    "no command": lambda f: [EVIL],
    "a path that is not there": lambda f: ["info", named(f.folder, "none")],
    **{f"info {name}": lambda f, name=name: ["info", f.folder / f"{name}.safetensors"] for name in BROKEN},
    **{
        f"merge {name}": lambda f, name=name: [
            "merge", f.base, f.folder / f"{name}.safetensors", "-o", f.folder / "no",
        ]
        for name in BROKEN
    },
    **{f"convert {name}": lambda f, name=name: ["convert", f.folder / f"{name}.safetensors"] for name in BROKEN},
}  # fmt: skip

# Those that are to succeed: a refusal alone would show little.
FINE = {
    "info adapter", "info file of a hostile name", "info checkpoint", "info peft", "merge", "merge to a hostile name",
    "convert with an error", "convert from peft", "extract", "plan", "info other", "info draws",
}  # fmt: skip


@pytest.mark.law("printed-text")
def test_no_command_prints_what_a_terminal_would_act_on(files: Files) -> None:
    pytest.importorskip("typer")
    from tests.support.in_process import main, run_here

    failed = {}
    for what, arguments in COMMANDS.items():
        for more in ([], ["--json"]) if what in FINE else ([],):
            done = run_here(main, *arguments(files), *more)
            assert done.stdout or done.stderr, what
            if more:
                json.loads(done.stdout)
                assert done.stdout.isascii()
            printed = done.stdout + done.stderr
            if found := speaks(printed) + [f"exit code {done.returncode}"] * (done.returncode != 0 and what in FINE):
                failed[what] = found[:4], printed[:300]
    assert not failed


@pytest.mark.law("printed-text")
def test_in_a_terminal_nothing_is_taken_for_markup(files: Files) -> None:
    pytest.importorskip("typer")
    pty = pytest.importorskip("pty")
    for arguments in (["info", files.folder / "adapter.safetensors", "--all"], ["plan", files.base, "--budget", "100"]):
        terminal, theirs = pty.openpty()
        command = [sys.executable, "-m", "tnadapt", *map(os.fspath, arguments)]
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL) as done:
            os.close(theirs)
            seen = b""
            with contextlib.suppress(OSError):  # Linux says so where the other end is closed
                while piece := os.read(terminal, 1 << 16):
                    seen += piece
        os.close(terminal)
        assert done.returncode == 0
        text = seen.decode()
        # What the program itself writes to a terminal is colours and the cursor; nothing of the file's.
        assert not any(word in text for word in ("\x1b[31mred", "\x1b]", "\u202e"))
        assert not any(line.startswith("FORGED") for line in text.split("\n"))
        if "info" in arguments:
            assert "[red]markup[/red]" in text


@pytest.mark.law("printed-text")
def test_reprs_and_reports_in_the_library(files: Files) -> None:
    file = tna.load(files.folder / "adapter.safetensors")
    for text in (repr(file), repr(file.targets[0]), repr(file.base)):
        assert not speaks(text)
    merged = tna.merge(files.base, files.folder / "adapter.safetensors", files.folder / "merged2", overwrite=True)
    assert not speaks(repr(merged))
    found = tna.convert(files.peft, to="peft-lora", rank=1, max_error=1.0)
    assert not found.exact
    assert not speaks(str(found))
    assert not speaks(repr(found))


@pytest.mark.law("printed-text")
def test_summaries_and_warnings_in_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import tnadapt.torch as tt

    def model() -> Any:
        torch.manual_seed(0)
        inner = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
        return torch.nn.ModuleDict({EVIL.replace(".", ""): inner, "o": torch.nn.Linear(4, 4)})

    adapter = tt.attach(model(), targets=["q"])
    assert not speaks(str(adapter.summary()))
    assert not speaks(repr(adapter))
    tuned = model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.rand_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tt.extract(model(), tuned, targets=["o"], cfg=tna.presets.lora(1))
    assert caught
    assert not any(speaks(str(warning.message)) for warning in caught)


def test_the_middle_of_a_long_message_is_left_out() -> None:
    for call in (lambda: tna.load("x" * 30_000), lambda: tna.convert("/".join(["y" * 200] * 140))):
        with pytest.raises(tna.FileError, match=r"^[xy]{200}.* … .*File name too long$") as caught:
            call()
        assert len(str(caught.value)) < 5100
    assert str(tna.FileError("x" * 5000)) == "x" * 5000
