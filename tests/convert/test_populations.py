"""Members of a population's file in other forms: equal to their own adapters' conversions, one or all of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tnadapt as tna
from tests.support.file_layer import intercepted, recorded
from tnadapt import AdapterFile, ConfigError, FileError, PopulationFile
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.convert import Conversion, PopulationConversion

from .conversions import SHAPES, P, made

# A child process never uses JAX, whose threads it lacks.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

WEIGHTS = {f"{path}.weight": np.random.default_rng(0).normal(size=shape).astype("f4") for path, shape in SHAPES.items()}
CONFIGS = {
    "lora": P.lora(2, alpha=3),
    "theta": P.unilora(9, 2),
    "base": P.tinylora(5),
    "start": P.lora(2, start="pissa"),
    "magnitude": P.dora(2),
}
NAMES = ["ann", None, "größe 7", "3", "user@example.com"]


def members(case: str = "lora", count: int = 4, dtype: str = "f4") -> list[AdapterFile]:
    files = [made(CONFIGS[case], seed=seed, dtype=dtype) for seed in range(count)]
    if case == "lora":
        return [dataclasses.replace(file, kept={"head.weight": np.ones((2, 3), "f4")}) for file in files]
    return [dataclasses.replace(file, base=fingerprint(list(WEIGHTS.values()), "float32")) for file in files]


def saved(path: Path, files: list[AdapterFile], names: list[str | None] | None = None) -> Path:
    tna.save(path, PopulationFile.from_members(files, names))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(WEIGHTS, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- The laws ----------------------------------------------------------------------------------------------------------


@given(
    case=st.sampled_from(list(CONFIGS)), to=st.sampled_from(["peft-lora", "vllm-lora", "peft-loha", "lycoris-full"]),
    dtype=st.sampled_from(["f2", "f4", "f8"]), names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    options=st.sampled_from([{}, {"dtype": "bfloat16"}, {"rank": 1, "max_error": 1.0}]),
)  # fmt: skip
def test_a_member_gives_what_its_own_adapter_gives(
    case: str, to: str, dtype: str, names: list[str | None], options: dict[str, Any], base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    names = [name for number, name in enumerate(names) if name is None or name not in names[:number]]
    files = members(case, len(names), dtype)
    options = {"to": to, "base": base, "without_kept": to == "lycoris-full", **options}
    if to == "lycoris-full":
        options.pop("rank", None)
    folder = tmp_path_factory.mktemp("population")
    path = saved(folder / "population.safetensors", files, names)

    def outcome(source: Any, **more: Any) -> Conversion | str:
        try:
            conversion: Conversion = tna.convert(source, **options, **more)
        except ConfigError as error:
            return str(error)
        except FileError as error:
            return str(error).removeprefix(f"{path}: ")
        return conversion

    expected = [outcome(file) for file in files]
    for number, (name, alone) in enumerate(zip(names, expected, strict=True)):
        for source, member in ((path, number), (tna.load(path), number if name is None else name)):
            result = outcome(source, member=member)
            if isinstance(alone, str):
                assert result == alone
            else:
                assert isinstance(result, Conversion)
                assert (result.files, result.errors, str(result)) == (alone.files, alone.errors, str(alone))
    if to != "lycoris-full" and not any(isinstance(alone, str) for alone in expected):
        out = folder / "out"
        result = tna.convert(path, out, **options)
        assert isinstance(result, PopulationConversion)
        folders = [str(number) if name is None else name for number, name in enumerate(names)]
        assert {path.name: contents(path) for path in out.iterdir()} == {
            name: alone.files for name, alone in zip(folders, expected, strict=True)
        }
        assert result.errors == {name: alone.error for name, alone in zip(folders, expected, strict=True)}
        assert result.error == max(alone.error for alone in expected)
        assert result.exact == all(alone.exact for alone in expected)
        assert result.parameters == tuple(np.sum([alone.parameters for alone in expected], axis=0))
        assert tna.convert(path, **options).to_dict() == result.to_dict()


def test_the_base_is_read_once_for_all_members(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_base, calls = AdapterFile.with_base, list[int]()
    monkeypatch.setattr(
        AdapterFile, "with_base", lambda file, *arguments: calls.append(1) or with_base(file, *arguments)
    )
    path = saved(tmp_path / "population.safetensors", members("base", 6))
    tna.convert(path, tmp_path / "out", to="vllm-lora", base=base)
    assert (len(calls), len(list((tmp_path / "out").iterdir()))) == (1, 6)


@pytest.mark.parametrize("out", [None, "out"])
def test_progress_counts_the_members_that_are_converted(tmp_path: Path, out: str | None) -> None:
    path, calls = saved(tmp_path / "population.safetensors", members("theta", 3)), list[tuple[int, int]]()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if out is not None:
            (stage,) = tmp_path.glob(".tnadapt-*.tmp")
            assert len(list(stage.iterdir())) == done

    where = None if out is None else tmp_path / out
    tna.convert(path, where, to="vllm-lora", progress=progress)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    tna.convert(path, to="vllm-lora", member=1, progress=progress)
    assert len(calls) == 3

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tna.convert(path, tmp_path / "other", to="vllm-lora", progress=stop)
    assert sorted(os.listdir(tmp_path)) == sorted(["population.safetensors", *([out] if out is not None else [])])
    with pytest.raises(ConfigError, match="progress must be a function or None; got 3"):
        tna.convert(path, to="vllm-lora", progress=3)  # type: ignore[call-overload]


def damaged(path: Path, whole: int) -> None:
    """Damage the checksums of all members but one, in a file of rows alone."""
    content, rows = path.read_bytes(), len(tna.load(path))
    start = int.from_bytes(content[:8], "little") + 8
    size = (len(content) - start) // rows
    changed = bytearray(content)
    for number in range(rows):
        if number != whole:
            changed[start + (number + 1) * size - 1] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize("which", [1, "user-1"])
def test_other_members_are_not_read(tmp_path: Path, which: int | str) -> None:
    files = members("theta")
    path = saved(tmp_path / "population.safetensors", files, [f"user-{number}" for number in range(4)])
    damaged(path, whole=1)
    assert tna.convert(path, to="vllm-lora", member=which).files == tna.convert(files[1], to="vllm-lora").files
    with pytest.raises(FileError, match=r"member 0 \('user-0'\) is damaged: its bytes do not match its checksum"):
        tna.convert(path, tmp_path / "out", to="vllm-lora")
    assert not (tmp_path / "out").exists()


# -- The folder --------------------------------------------------------------------------------------------------------


def test_an_existing_folder_keeps_what_else_is_in_it(tmp_path: Path) -> None:
    files, out = members("theta"), tmp_path / "out"
    path = saved(tmp_path / "population.safetensors", files[:2], ["ann", "bob"])
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    tna.convert(path, out, to="vllm-lora")
    assert sorted(os.listdir(out)) == ["ann", "bob", "notes.txt"]
    saved(path, files[2:], ["ann", "cid"])
    before = contents(out / "ann")
    with pytest.raises(FileError, match=r"out/ann: exists; give another path, or overwrite=True \(--overwrite\)"):
        tna.convert(path, out, to="vllm-lora")
    assert (sorted(os.listdir(out)), contents(out / "ann")) == (["ann", "bob", "notes.txt"], before)
    (out / "ann" / "notes.txt").write_text("mine")
    tna.convert(path, out, to="vllm-lora", overwrite=True)
    assert sorted(os.listdir(out)) == ["ann", "bob", "cid", "notes.txt"]
    (out / "ann" / "notes.txt").unlink()
    assert contents(out / "ann") == tna.convert(files[2], to="vllm-lora").files


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "one file": (
        {"to": "kohya-lora"},
        "a population of 2 members does not fit in one file: give one of them, such as member='ann' (--member ann), or "
        "a form that is a folder, such as to='vllm-lora' (--to vllm-lora)",
    ),
    "the own form": ({}, "a population of 2 members does not fit in one file: give one of them"),
    "nobody": (
        {"to": "peft-lora", "member": "cid"},
        "member: there is no member 'cid'; the names are 'ann', 'bob'; numbers are from 0 to 1",
    ),
    "a number": ({"to": "peft-lora", "member": -1}, "member must be from 0 to 1; got -1"),
    "no member": ({"to": "peft-lora", "member": 1.5}, "member must be an integer, a string or None; got 1.5"),
    "a loss": (
        {"to": "peft-lora", "rank": 1},
        "member 0 ('ann'): the conversion to peft-lora would change the updates by a relative error of 0.",
    ),
    "a part": ({"to": "peft-lora", "part": "unet"}, "part='unet' (--part) has no effect on a conversion from tnadapt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_if_it_is_refused(tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    population = PopulationFile.from_members(members()[:2], ["ann", "bob"])
    tna.save(path := tmp_path / "population.safetensors", population)
    for source in (path, population):
        with pytest.raises((ConfigError, FileError)) as caught:
            tna.convert(source, tmp_path / "out", **options)
        assert message in str(caught.value)
        assert os.listdir(tmp_path) == ["population.safetensors"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a/b", None],
            "the name of member 0, 'a/b', cannot be that of a folder: convert that member alone, by member=0",
        ),
        (
            [None, ".."],
            "the name of member 1, '..', cannot be that of a folder: convert that member alone, by member=1",
        ),
        (["é" * 128, None], "the name of member 0, '" + "é" * 128 + "', cannot be that of a folder"),
        ([".a", None], "the name of member 0, '.a', cannot be that of a folder"),
        (["1", None], "members 0 and 1 would have the same folder, '1': convert that member alone, by member=1 (--m"),
        ([None, "0"], "members 0 and 1 would have the same folder, '0': convert that member alone, by member=1 (--m"),
    ],
)
def test_members_that_have_no_folder_are_converted_alone(tmp_path: Path, names: list[str | None], message: str) -> None:
    files = members("theta")[:2]
    path = saved(tmp_path / "population.safetensors", files, names)
    with pytest.raises(ConfigError) as caught:
        tna.convert(path, tmp_path / "out", to="vllm-lora")
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["population.safetensors"]
    for number, name in enumerate(names):
        for which in {number, number if name is None else name}:
            alone = tna.convert(path, to="vllm-lora", member=which)
            assert alone.files == tna.convert(files[number], to="vllm-lora").files


def test_a_single_adapter_has_no_members(tmp_path: Path) -> None:
    (file,) = members("theta", 1)
    tna.save(own := tmp_path / "own.safetensors", file)
    tna.convert(file, theirs := tmp_path / "theirs", to="peft-lora")
    for source, subject in ((own, f"{own}:"), (theirs, f"{theirs}:"), (file, "source")):
        with pytest.raises(FileError) as caught:
            tna.convert(source, member="ann")
        assert str(caught.value) == f"{subject} has one adapter, and no members: leave out member= (--member)"


def test_a_population_is_found_in_a_folder(tmp_path: Path) -> None:
    files = members("theta")[:2]
    saved(tmp_path / "adapter.safetensors", files)
    assert tna.convert(tmp_path, to="vllm-lora", member=1).files == tna.convert(files[1], to="vllm-lora").files
    out = tmp_path / "file"
    out.write_text("")
    with pytest.raises(FileError, match="file: is a file; several adapters are a folder of folders"):
        tna.convert(tmp_path, out, to="vllm-lora", overwrite=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked and killed")
def test_a_kill_leaves_all_members_or_none(tmp_path: Path) -> None:
    path, out = saved(tmp_path / "population.safetensors", members("theta", 2)), tmp_path / "out"

    def convert() -> None:
        tna.convert(path, out, to="vllm-lora")

    def convert_killed_before(at: int) -> None:
        left = itertools.count(-at)
        with intercepted(lambda call: None if next(left) else os.kill(os.getpid(), signal.SIGKILL)):
            convert()

    steps = len(recorded(convert))
    expected = {place.name: contents(place) for place in out.iterdir()}
    results = list[bool]()
    # Before the first steps, one in the middle, and each of the last.
    for at in sorted({0, 1, steps // 2, *range(steps - 6, steps)}):
        shutil.rmtree(out, ignore_errors=True)
        process = os.fork()
        if process == 0:
            convert_killed_before(at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        results.append(out.exists())
        assert not out.exists() or {place.name: contents(place) for place in out.iterdir()} == expected
    # All members appear in one step.
    assert results == sorted(results)
    assert set(results) == {False, True}
