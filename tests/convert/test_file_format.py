"""A file format of another package: one class and one registration; missing methods are named."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support.in_process import main, run_here
from tnadapt.convert import (
    FORMS,
    Base,
    EncodedAdapter,
    ExportChoice,
    FileFormat,
    ForeignAdapter,
    Module,
    ModuleUpdate,
    Pair,
    StoredFiles,
    register_file_format,
)
from tnadapt.plugins import Registry

from .conversions import CONVS, SHAPES, TOLERANCE, adapter_on, assert_same_updates, converted, made
from .internals import pipeline_module


class NpzFormat(FileFormat):
    """``PATH:up``, shape (rows, rank), and ``PATH:down``, shape (rank, cols)."""

    library = "the npz library"
    kinds = ("lora",)

    def detect(self, path: str) -> str | None:
        return path if path.endswith(".npz") else None

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        with files.open() as stream, np.load(stream, allow_pickle=False) as arrays:
            factors = {name: arrays[name] for name in arrays if name != "record"}
        updates = {}
        for path in sorted({name.rpartition(":")[0] for name in factors}):
            up, down = (factors[f"{path}:{half}"].astype(np.float64) for half in ("up", "down"))
            updates[path] = ModuleUpdate("lora", (up.shape[0], down.shape[1]), (Pair(up, down.T),))
        return ForeignAdapter.of("lora", updates, base, str(next(iter(factors.values())).dtype))

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        tensors = {}
        for module, update in zip(modules, choice.updates, strict=True):
            pair = update.absorb_scale().pair
            tensors |= {f"{module.path}:up": pair.b, f"{module.path}:down": pair.a.T}
        return EncodedAdapter(tensors)

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        stream = io.BytesIO()
        np.savez(stream, **tensors, record=np.array(json.dumps(record)))  # type: ignore[arg-type]
        return {"": stream.getvalue()}


def register() -> None:
    """Register it, as a plug-in does."""
    register_file_format("npz", NpzFormat)


@pytest.fixture(autouse=True)
def npz(monkeypatch: pytest.MonkeyPatch) -> None:
    """The npz format beside the built-in ones, for one test."""
    built_in = {name: pipeline_module._formats[name] for name in pipeline_module._formats.built_in}
    monkeypatch.setattr(pipeline_module, "_formats", Registry("file format", FileFormat, built_in))
    register()


def test_there_and_back(tmp_path: Path) -> None:
    file, out = made(tna.presets.lora(3, alpha=5)), tmp_path / "out.npz"
    assert sys.modules["tnadapt.convert"].FORMS[-1] == "npz-lora"
    message = r"to \(--to\) must be one of tnadapt, peft, .*, npz-lora; got 'npz-lokr'; did"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(file, to="npz-lokr")
    found = tna.convert(file, out, to="npz-lora")
    assert (found.exact, found.kind, found.origin) == (True, "npz-lora", "tnadapt")
    assert found.error <= TOLERANCE
    with np.load(out) as arrays:
        assert arrays["blocks.10.mlp.fc_1:up"].shape == (24, 3)
        record = json.loads(str(arrays["record"]))
    assert (record["from"], record["to"], record["exact"]) == ("tnadapt", "npz-lora", True)
    assert out.read_bytes() == found.content
    back = tna.convert(out, base=SHAPES)
    assert (back.origin, back.exact) == ("npz-lora", True)
    assert_same_updates(back.file, file)
    with pytest.raises(tna.FileError, match=r"out\.npz: base has no module 'blocks\.0\.attn\.q_proj'"):
        tna.convert(out, base={"b.q": (3, 4)})
    # Of a format that is for reading only there is no form; and the format registered last is asked first.
    before = pipeline_module.forms()
    register_file_format("reader", type("Reader", (FileFormat,), {"detect": NpzFormat.detect, "read": NpzFormat.read}))
    assert pipeline_module.forms() == before
    assert tna.convert(out).origin == "reader-lora"
    out.unlink()
    with pytest.raises(tna.FileError, match=r"out\.npz: No such file"):
        tna.convert(out)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("peft-lo", "lycoris-"))])
def test_straight_from_and_to_other_libraries(form: str, tmp_path: Path) -> None:
    file = made(tna.presets.lora(2, alpha=3))
    tna.convert(file, tmp_path / "one.npz", to="npz-lora")
    assert tna.convert(tmp_path / "one.npz", tmp_path / "theirs", to=form).origin == "npz-lora"
    found = tna.convert(tmp_path / "theirs", tmp_path / "two.npz", to="npz-lora", rank=2)
    assert found.origin == form
    assert found.exact
    (tmp_path / "three.npz").write_bytes(found.content)
    assert_same_updates(converted(tmp_path / "three.npz"), file)


def test_what_a_format_does_not_say_it_can_hold_is_refused() -> None:
    lora = tna.presets.lora(1)
    kept = dataclasses.replace(made(lora), kept={"head.weight": np.ones((2, 2), "f4")})
    for file, message in (
        (made(lora, CONVS), r"'stem\.conv' is a convolution, and the npz library has no lora of convolutions: m"),
        (
            adapter_on([tna.Target("a.q", (4, 4), transposed=True)], lora),
            r"'a\.q' is stored as \(in, out\), and the npz library has no lora for such a layer",
        ),
        (kept, r"the npz library has no place for .*head\.weight.*without_kept=True"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tna.convert(file, to="npz-lora")
    assert tna.convert(kept, to="npz-lora", without_kept=True).exact


METHODS = {"detect": lambda self, path: None, "read": None, "encode": None, "write": None, "fit_kronecker": None}


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("npz-2", FileFormat, "the name of a file format has no '-', which begins the form"),
        (3, FileFormat, "the name of a file format must consist of at most 64 lower-case letters.*got 3"),
        ("peft", FileFormat, "file format 'peft' is built in and cannot be replaced"),
        ("tnadapt", FileFormat, "file format 'tnadapt' is built in and cannot be replaced"),
        ("other", dict, r"a class that inherits from tnadapt\.convert\.FileFormat; got <class 'dict'>"),
        ("other", type("Other", (FileFormat,), {}), "'other' lacks detect, read: define that on Other"),
        ("other", type("Other", (FileFormat,), {**METHODS, "kinds": ("dora",)}), "kinds of Other may have lora, lokr"),
    ],
)
def test_what_is_no_format_is_refused_by_name(name: Any, cls: Any, message: str) -> None:
    before = pipeline_module.forms()
    with pytest.raises(tna.ConfigError, match=message):
        register_file_format(name, cls)
    assert pipeline_module.forms() == before


@pytest.mark.parametrize(
    ("missing", "arguments"), {"detect": 1, "read": 3, "encode": 4, "write": 4, "fit_kronecker": 2}.items()
)
def test_a_missing_method_is_named(missing: str, arguments: int) -> None:
    methods = {name: method for name, method in METHODS.items() if name != missing}
    lacking = type("Lacking", (FileFormat,), {**methods, "kinds": ("lora", "lokr")})
    with pytest.raises(tna.ConfigError, match=f"the file format 'lacking' lacks {missing}: define that on Lacking"):
        register_file_format("lacking", lacking)
    with pytest.raises(tna.ConfigError, match=rf"lacks a method: define FileFormat\.{missing}"):
        getattr(FileFormat(), missing)(*[None] * arguments)


def test_a_cell_can_be_run_again() -> None:
    before = pipeline_module.forms()
    again = {"library": "the same", "__module__": NpzFormat.__module__}
    register_file_format("npz", type("Again", (NpzFormat,), again))
    assert pipeline_module.forms() == before
    assert pipeline_module.format_of("npz").library == "the same"
    with pytest.raises(tna.ConfigError, match=r"file format must be one of 'peft', 'lycoris', .*'npz'; got 'nonsense'"):
        pipeline_module.format_of("nonsense")


def test_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    file = made(tna.presets.lora(2, alpha=4))
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "out.npz"
    tna.save(ours, file)
    # A process of its own: the help lists the formats that are registered when the command is imported.
    code = """
import runpy
from tests.convert.test_file_format import register
register()
runpy.run_module("tnadapt", run_name="__main__")
"""
    command = [sys.executable, "-c", code, "convert", "--help"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=root)
    assert "npz-lora" in done.stdout
    done = run_here(main, "convert", ours, "-o", theirs, "--to", "npz-lora")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tnadapt -> npz-lora, 3 weights\n")
    assert_same_updates(converted(theirs, base=SHAPES), file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x00" * 100, b"garbage"])
def test_what_a_plug_in_s_libraries_raise_is_an_error_of_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    message = r"damaged.npz: the file format 'npz' \(the npz library\) cannot read it: \w+"
    with pytest.raises(tna.FileError, match=message):
        tna.convert(path)
