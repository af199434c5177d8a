"""A file format of another package: one class and one registration; missing methods are named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.convert import FORMS, FileFormat, register_file_format
from tnadapt.convert import _pipeline as _format_registry
from tnadapt.convert._file_format import KINDS
from tnadapt.plugins import Registry

from .conversions import CONVS, SHAPES, TOLERANCE, error, made, updates
from .npz_format import NpzFormat, register


@pytest.fixture(autouse=True)
def npz(monkeypatch: pytest.MonkeyPatch) -> None:
    """The npz format beside the built-in ones, for one test."""
    built_in = {name: _format_registry._formats[name] for name in _format_registry._formats.built_in}
    monkeypatch.setattr(_format_registry, "_formats", Registry("file format", FileFormat, built_in))
    register()


def test_it_is_one_of_the_forms() -> None:
    assert sys.modules["tnadapt.convert"].FORMS[-1] == "npz-lora"
    with pytest.raises(
        tna.ConfigError, match=r"to \(--to\) must be one of tnadapt, peft, .*, npz-lora; got 'npz-lokr'; did"
    ):
        tna.convert(made(tna.presets.lora(1)), to="npz-lokr")


def test_there_and_back(tmp_path: Path) -> None:
    file, out = made(tna.presets.lora(3, alpha=5)), tmp_path / "out.npz"
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
    for path, delta in updates(file).items():
        assert error(updates(back.file)[path], delta) <= TOLERANCE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.startswith(("peft-", "lycoris-")) and form.rpartition("-")[2] in KINDS]
)
def test_straight_from_and_to_other_libraries(form: str, tmp_path: Path) -> None:
    file = made(tna.presets.lora(2, alpha=3))
    tna.convert(file, tmp_path / "one.npz", to="npz-lora")
    assert tna.convert(tmp_path / "one.npz", tmp_path / "theirs", to=form).origin == "npz-lora"
    found = tna.convert(tmp_path / "theirs", tmp_path / "two.npz", to="npz-lora", rank=2)
    assert found.origin == form
    assert found.exact
    (tmp_path / "three.npz").write_bytes(found.content)
    again = updates(tna.convert(tmp_path / "three.npz").file)  # type: ignore[arg-type]
    for path, delta in updates(file).items():
        assert error(again[path], delta) <= TOLERANCE


class WithStructures(NpzFormat):
    """It has the magnitudes of DoRA beside factors, and a structure that can only be added."""

    structures = ("blocks",)

    def applied(self, *args: Any) -> Any:
        raise NotImplementedError

    def encode_file(self, *args: Any) -> Any:
        raise NotImplementedError


def test_what_is_not_added_has_no_structure_of_its_own() -> None:
    register_file_format("own", WithStructures)
    with pytest.raises(tna.ConfigError, match=r"apply='magnitude' of this adapter does more than add .*own-blocks"):
        tna.convert(made(tna.presets.dora(2)), to="own-blocks")


def test_errors_are_measured_and_limited_as_for_built_in_formats() -> None:
    file = made(tna.presets.lora(4))
    with pytest.raises(tna.ConfigError, match=r"the conversion to npz-lora would change the updates.*lycoris-full"):
        tna.convert(file, to="npz-lora", rank=2)
    ours, theirs = (tna.convert(file, to=form, rank=2, max_error=1.0) for form in ("npz-lora", "peft-lora"))
    assert ours.errors == pytest.approx(theirs.errors, rel=1e-5)
    assert not ours.exact
    rounded = tna.convert(file, to="npz-lora", dtype="float16")
    assert {array.dtype.name for array in rounded.tensors.values()} == {"float16"}
    assert 0 < rounded.error < 4e-3


def test_the_base_is_checked(tmp_path: Path) -> None:
    tna.convert(made(tna.presets.lora(1), {"a.q": (3, 4)}), tmp_path / "out.npz", to="npz-lora")
    with pytest.raises(tna.FileError, match=r"out\.npz: base has no module 'a\.q'"):
        tna.convert(tmp_path / "out.npz", base={"b.q": (3, 4)})
    (tmp_path / "out.npz").unlink()
    with pytest.raises(tna.FileError, match=r"out\.npz: No such file"):
        tna.convert(tmp_path / "out.npz")


def test_what_a_format_does_not_say_it_can_hold_is_refused() -> None:
    with pytest.raises(
        tna.ConfigError, match=r"'stem\.conv' is stored in 4 axes, and the npz library has lora only for m"
    ):
        tna.convert(made(tna.presets.lora(1), {"stem.conv": CONVS["stem.conv"]}), to="npz-lora")
    file = made(tna.presets.lora(1), {"a.q": (4, 4)})
    turned = dataclasses.replace(file, targets=[tna.Target("a.q", (4, 4), transposed=True)])
    with pytest.raises(
        tna.ConfigError, match=r"'a\.q' is stored as \(in, out\), and the npz library has lora only for m"
    ):
        tna.convert(turned, to="npz-lora")
    kept = dataclasses.replace(file, kept={"head.weight": np.ones((2, 2), "f4")})
    with pytest.raises(tna.ConfigError, match=r"the npz library has no place for .*head\.weight.*without_kept=True"):
        tna.convert(kept, to="npz-lora")
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
    before = _format_registry.forms()
    with pytest.raises(tna.ConfigError, match=message):
        register_file_format(name, cls)
    assert _format_registry.forms() == before


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


def test_a_format_may_be_for_reading_only(tmp_path: Path) -> None:
    tna.convert(made(tna.presets.lora(1), {"a.q": (3, 4)}), tmp_path / "out.npz", to="npz-lora")
    reader = type("Reader", (FileFormat,), {"detect": NpzFormat.detect, "read": NpzFormat.read})
    before = _format_registry.forms()
    register_file_format("reader", reader)
    assert _format_registry.forms() == before
    # The format registered last is asked first.
    assert tna.convert(tmp_path / "out.npz").origin == "reader-lora"


def test_a_cell_can_be_run_again() -> None:
    before = _format_registry.forms()
    again = {"library": "the same", "__module__": NpzFormat.__module__}
    register_file_format("npz", type("Again", (NpzFormat,), again))
    assert _format_registry.forms() == before
    assert _format_registry.format_of("npz").library == "the same"
    with pytest.raises(tna.ConfigError, match=r"file format must be one of 'peft', 'lycoris', .*'npz'; got 'nonsense'"):
        _format_registry.format_of("nonsense")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``tnadapt convert`` in a process in which the other package has registered its format."""
    code = """
import runpy
from tests.convert.npz_format import register
register()
runpy.run_module("tnadapt", run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", code, "convert", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    file = made(tna.presets.lora(2, alpha=4))
    tna.save(tmp_path / "ours.safetensors", file)
    assert "npz-lora" in command("--help").stdout
    done = command(tmp_path / "ours.safetensors", "-o", tmp_path / "out.npz", "--to", "npz-lora")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tnadapt -> npz-lora, 3 weights\n")
    again = command(tmp_path / "ours.safetensors", "-o", tmp_path / "out.npz", "--to", "npz-lora")
    assert again.returncode == 2
    assert again.stderr.endswith("out.npz: exists; give another path, or overwrite=True (--overwrite)\n")
    done = command(tmp_path / "out.npz", "-o", tmp_path / "back.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["from"], report["to"], report["exact"]) == ("npz-lora", "tnadapt", True)
    back = updates(tna.load(tmp_path / "back.safetensors"))
    for path, delta in updates(file).items():
        assert error(back[path], delta) <= TOLERANCE


@pytest.mark.usefixtures("npz")
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x00" * 100, b"garbage"])
def test_what_a_plug_in_s_libraries_raise_is_an_error_of_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    with pytest.raises(
        tna.FileError, match=r"damaged.npz: the file format 'npz' \(the npz library\) cannot read it: \w+"
    ):
        tna.convert(path)
