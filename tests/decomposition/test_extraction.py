"""An adapter from a tuned checkpoint on disk, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tests.support import forge
from tnadapt import presets
from tnadapt.errors import ConfigError, FileError, ShapeError, TargetError

COLS = 12


def _base(rng: np.random.Generator, layers: int = 3) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"layers.{layer}.attn.{name}.weight"] = rng.normal(size=(COLS, COLS)).astype(np.float32)
        found[f"layers.{layer}.norm.weight"] = rng.normal(size=COLS).astype(np.float32)
    found["classifier.weight"] = rng.normal(size=(2, COLS)).astype(np.float32)
    return found


def _tuned(base: dict[str, np.ndarray], rng: np.random.Generator, rank: int = 2) -> dict[str, np.ndarray]:
    found = dict(base)
    for name, weight in base.items():
        if "q_proj" in name or "v_proj" in name:
            update = rng.normal(size=(COLS, rank)) @ rng.normal(size=(rank, COLS))
            found[name] = (weight + update).astype(np.float32)
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    base = _base(rng)
    tuned = _tuned(base, rng)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", base, tuned


def test_what_changed_is_found(pair: Any) -> None:
    base, tuned, before, after = pair
    found = tna.extract(base, tuned, presets.lora(2))
    assert [target.role for target in found.file.targets] == ["q", "v"] * 3
    assert found.report.error < 1e-5
    assert found.report.certified
    assert found.others == ()
    for target, delta in zip(found.file.targets, found.file.deltas(), strict=True):
        np.testing.assert_allclose(before[target.name] + delta, after[target.name], atol=1e-5)


def test_the_file_is_bound_to_its_base(pair: Any, tmp_path: Path) -> None:
    from tnadapt.checkpoints.fingerprint import fingerprint

    base, tuned, before, _ = pair
    found = tna.extract(base, tuned, presets.lora(2))
    weights = [before[target.name] for target in found.file.targets]
    assert found.file.base == fingerprint(weights, "float32")
    tna.save(tmp_path / "adapter.safetensors", found.file)
    assert tna.load(tmp_path / "adapter.safetensors").base == found.file.base


def test_the_smallest_rank_within_an_error(pair: Any) -> None:
    base, tuned, *_ = pair
    assert tna.extract(base, tuned, presets.lora(), max_error=1e-3).file.config.rank == 2
    with pytest.raises(ConfigError, match="no rank up to 1 "):
        tna.extract(base, tuned, presets.lora(), max_error=1e-3, max_rank=1)


def test_other_tensors_that_differ_are_named_or_kept(tmp_path: Path, pair: Any) -> None:
    base, _, before, after = pair
    after = {**after, "classifier.weight": before["classifier.weight"] + 1, "head.bias": np.zeros(3, np.float32)}
    after["layers.1.norm.weight"] = before["layers.1.norm.weight"] * 2
    save_file(after, tmp_path / "more.safetensors")
    found = tna.extract(base, tmp_path / "more.safetensors", presets.lora(2))
    assert sorted(found.others) == ["classifier.weight", "head.bias", "layers.1.norm.weight"]
    kept = tna.extract(base, tmp_path / "more.safetensors", presets.lora(2), keep_trainable=["classifier", "norm"])
    assert kept.others == ("head.bias",)
    assert "classifier.weight" in kept.file.kept
    np.testing.assert_array_equal(kept.file.kept["classifier.weight"], after["classifier.weight"])
    assert tna.extract(base, tmp_path / "more.safetensors", presets.lora(2), compare=False).others == ()
    with pytest.raises(TargetError, match=r"keep_trainable: no tensor lies at or below 'clasifier'"):
        tna.extract(base, tmp_path / "more.safetensors", keep_trainable="clasifier")
    with pytest.raises(TargetError, match="both a target and in keep_trainable"):
        tna.extract(base, tmp_path / "more.safetensors", keep_trainable="q_proj")


def test_tensors_of_another_shape_or_kind_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base: cp.Tensors = {name: ("F32", array) for name, array in _base(rng, layers=1).items()}
    tuned = dict(base)
    both = {
        "steps": (("I64", np.arange(3)), ("I64", np.arange(3)), False),
        "shape": (("F32", np.ones((2, 3), "<f4")), ("F32", np.ones((3, 2), "<f4")), True),
        "integers": (("I64", np.arange(3)), ("U8", np.arange(3, dtype=np.uint8)), True),
        "float and integer": (("F32", np.ones(3, "<f4")), ("U8", np.ones(3, np.uint8)), True),
        "wider": (("F16", np.full(3, 0.1, "<f2")), ("F32", np.full(3, 0.1, "<f4")), False),
        "not a number": (("F32", np.full(2, np.nan, "<f4")), ("F64", np.full(2, np.nan)), False),
    }
    for name, (before, after, _) in both.items():
        base[name], tuned[name] = before, after
    first = "layers.0.attn.q_proj.weight"
    tuned[first] = "F32", base[first][1] + np.float32(1.0)
    cp.write_file(tmp_path / "tuned.safetensors", tuned | {"eight bits": ("F32", np.zeros(3, "<f4"))})
    header, data = forge.listed(base)
    header["eight bits"] = {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    (tmp_path / "base.safetensors").write_bytes(forge.container(header, data + bytes(3)))
    found = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", presets.lora(1))
    assert set(found.others) == {"eight bits", *(name for name, (_, _, differs) in both.items() if differs)}
    swapped = tna.extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", presets.lora(1))
    assert set(swapped.others) == set(found.others)
    with pytest.raises(TargetError, match="eight bits is F8_E4M3, which adapter files do not support"):
        tna.extract(
            tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", presets.lora(1), keep_trainable="eight bits"
        )


def test_weights_of_two_dtypes_have_no_fingerprint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"a.{n}.weight": rng.normal(size=(8, 8)).astype(d) for n, d in (("q_proj", "f4"), ("v_proj", "f2"))}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: array + array.dtype.type(1) for name, array in base.items()}, tmp_path / "tuned.safetensors")
    assert tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", presets.lora(1)).file.base is None


@pytest.mark.parametrize(("change", "fine"), [(1.2e-38, True), (1.1e-38, False), (1e-45, False)])
def test_differences_too_small_for_float32_are_refused(change: float, fine: bool, tmp_path: Path) -> None:
    base = {f"a.{name}.weight": np.zeros((4, 4)) for name in ("q_proj", "v_proj")}
    tuned = {name: array + change for name, array in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    if fine:
        assert tna.extract(*paths, presets.dense()).file.num_parameters == 32
    else:
        with pytest.raises(
            ShapeError, match=f"a.q_proj.weight differs by at most {change:.3g}, which is too small for float32"
        ):
            tna.extract(*paths, presets.dense())


def test_large_tensors_are_compared_in_little_memory_to_the_last_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = _base(rng, layers=1) | {"table": rng.integers(0, 256, (8 << 20) + 12, np.uint8)}
    tuned = _tuned(base, rng)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "same.safetensors")
    for place in (0, 1 << 20, -1):
        tuned["table"] = base["table"].copy()
        tuned["table"][place] ^= 1
        save_file(tuned, tmp_path / f"{place}.safetensors")
        other = tna.extract(tmp_path / "base.safetensors", tmp_path / f"{place}.safetensors", presets.lora(2))
        assert other.others == ("table",)
    found: list[tna.extraction.Extraction] = []

    def same() -> None:
        found.append(tna.extract(tmp_path / "base.safetensors", tmp_path / "same.safetensors", presets.lora(2)))

    assert peak_of(same) < 5 << 20
    assert found[0].others == ()


def test_rows_of_a_fused_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"blocks.0.attn.qkv.weight": rng.normal(size=(36, COLS)).astype(np.float32)}
    tuned = {name: weight.copy() for name, weight in base.items()}
    tuned["blocks.0.attn.qkv.weight"][24:] += np.outer(np.ones(12), np.arange(12)).astype(np.float32)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", presets.lora(1))
    q, v = found.file.deltas()
    assert not q.any()
    np.testing.assert_allclose(v, np.outer(np.ones(12), np.arange(12)), rtol=1e-5, atol=1e-5)
    assert found.others == ()
    tuned["blocks.0.attn.qkv.weight"][13] += 1  # a row of k
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", presets.lora(1))
    assert found.others == ("blocks.0.attn.qkv.weight (rows of no target)",)


@pytest.mark.parametrize("added", [True, False])
def test_a_backbone_without_its_prefix(tmp_path: Path, pair: Any, added: bool) -> None:
    base, tuned, before, after = pair
    named = {f"model.{name}": array for name, array in (after if added else before).items()}
    save_file(named, tmp_path / "named.safetensors")
    paths = (base, tmp_path / "named.safetensors") if added else (tmp_path / "named.safetensors", tuned)
    found = tna.extract(*paths, presets.lora(2))
    assert found.report.error < 1e-5
    assert found.others == ()


def test_half_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"a.{n}.weight": rng.normal(size=(8, 8)).astype(np.float16) for n in ("q_proj", "v_proj")}
    tuned = {name: weight + np.float16(0.5) for name, weight in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", presets.dense())
    for delta, name in zip(found.file.deltas(), base, strict=True):
        expected = tuned[name].astype(np.float64) - base[name].astype(np.float64)
        np.testing.assert_array_equal(delta, expected.astype(np.float32))


def test_shards_and_folders(tmp_path: Path, pair: Any) -> None:
    base, _, _, after = pair
    folder = tmp_path / "tuned"
    folder.mkdir()
    names = sorted(after)
    places = {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: after[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    found = tna.extract(base, folder, presets.lora(2))
    assert found.report.error < 1e-5
    assert found.file.model == "LlamaForSequenceClassification"


def test_impossible_requests_are_refused(tmp_path: Path, pair: Any) -> None:
    base, tuned, before, after = pair

    def written(name: str, tensors: dict[str, np.ndarray]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    first = "layers.0.attn.q_proj.weight"
    wrong = written("shape", {**after, first: np.zeros((COLS, 5), np.float32)})
    lacks = written("lacks", {name: array for name, array in before.items() if name != first})
    packed = written("packed", {**after, first: np.zeros((COLS, COLS), np.int8)})
    tiny = np.zeros_like(before[first])
    tiny[1, 2] = 1e-40
    nan = written("nan", {**after, first: after[first] * np.float32("nan")})
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for paths, error, match in (
        ((base, wrong), TargetError, r"shape \(12, 12\) in the base checkpoint and \(12, 5\)"),
        ((lacks, tuned), TargetError, "lacks 1 of 6 targets, such as 'layers.0.attn.q_proj.weight'"),
        ((base, packed), TargetError, "is I8; expected one of F64, F32"),
        ((base, nan), ShapeError, "NaN or infinity"),
        (
            (written("zeros", {**before, first: 0 * before[first]}), written("tiny", {**after, first: tiny})),
            ShapeError,
            f"{first} differs by at most 1e-40, which is too small for float32",
        ),
        ((base, tmp_path / "missing"), FileError, "No such file"),
        ((tmp_path / "pickle.safetensors", tuned), FileError, "is a pickle"),
    ):
        with pytest.raises(error, match=match):
            tna.extract(*paths, presets.lora(2))
    with pytest.raises(TargetError, match="no tensor of the checkpoint is a target"):
        tna.extract(base, tuned, targets=["nothing"])
    with pytest.raises(TargetError, match=f"{first} is both a target and in keep_trainable"):
        tna.extract(base, tuned, presets.lora(2), keep_trainable=["layers.0.attn"])
    with pytest.raises(
        TargetError, match="keep_trainable: no tensor lies at or below 'head2'; the tuned checkpoint has "
    ):
        tna.extract(base, tuned, presets.lora(2), keep_trainable=["head2"])
    foreign = tmp_path / "foreign"
    raw = {name: ("F32", array) for name, array in after.items()}
    header, data = forge.listed(raw)
    name = "layers.0.norm.weight"
    header[name]["dtype"] = "F8_E4M3"
    header[name]["shape"] = [header[name]["data_offsets"][1] - header[name]["data_offsets"][0]]
    foreign.write_bytes(forge.container(header, data))
    with pytest.raises(TargetError, match=f"{name} is F8_E4M3, which adapter files do not support"):
        tna.extract(base, foreign, presets.lora(2), keep_trainable=[name])
    # Not kept, it only differs.
    assert tna.extract(base, foreign, presets.lora(2)).others == (name,)
    with pytest.raises(ConfigError, match="max_error must be"):
        tna.extract(base, tuned, max_error=2.0)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_a_copy_in_another_dtype_is_no_change(tmp_path: Path, narrow_first: bool) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    rng = np.random.default_rng(0)
    wide = {name: torch.from_numpy(array) for name, array in _base(rng).items()}
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    changed = narrow if narrow_first else wide
    changed["layers.0.norm.weight"] = changed["layers.0.norm.weight"] + 1
    save_torch(narrow, tmp_path / "narrow")
    save_torch(wide, tmp_path / "wide")
    paths = ("narrow", "wide") if narrow_first else ("wide", "narrow")
    found = tna.extract(*(tmp_path / path for path in paths), presets.dense())
    assert found.others == ("layers.0.norm.weight",)


@pytest.mark.parametrize(
    ("added", "differs"),
    [
        ({"norm.weight": np.ones(COLS + 1, np.float32)}, True),  # another shape
        ({"norm.weight": np.ones(COLS, np.int32)}, True),  # another kind of number
        ({"norm.weight": np.ones(COLS, np.float64)}, False),
        ({"norm.weight": np.full(COLS, 1 + 1e-12)}, False),  # float32 cannot tell
        ({"norm.weight": np.full(COLS, 1.001)}, True),
        ({"norm.weight": np.ones(COLS, np.float16)}, False),
        ({"extra": np.zeros(1, np.float32)}, True),  # not in the base
    ],
)
def test_whatever_else_differs_is_named(tmp_path: Path, pair: Any, added: dict[str, np.ndarray], differs: bool) -> None:
    base, _, before, after = pair
    save_file({**before, "norm.weight": np.ones(COLS, np.float32)}, base)
    save_file({**after, "norm.weight": np.ones(COLS, np.float32), **added}, tmp_path / "changed")
    found = tna.extract(base, tmp_path / "changed", presets.lora(2))
    assert found.others == (tuple(added) if differs else ())


def test_a_difference_in_the_last_bytes_of_a_long_tensor_is_seen(
    tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, before, after = pair
    monkeypatch.setattr("tnadapt.decomposition.extraction._PIECE", 8)
    long = np.arange(33, dtype=np.float32)
    for place, others in ((None, ()), (0, ("long",)), (2, ("long",)), (32, ("long",))):
        changed = long.copy()
        if place is not None:
            changed[place] += 1
        save_file({**before, "long": long}, base)
        save_file({**after, "long": changed}, tmp_path / "changed")
        assert tna.extract(base, tmp_path / "changed", presets.lora(2)).others == others


# -- The command --------------------------------------------------------------------------------


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "tnadapt", "extract", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(pair: Any, tmp_path: Path) -> None:
    base, tuned, *_ = pair
    out = tmp_path / "adapter.safetensors"
    done = _run(base, tuned, "-o", out, "--preset", "lora", "--rank", "2", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["parameters"] == tna.load(out).num_parameters == 6 * 2 * 2 * COLS
    assert said["error"] < 1e-5
    assert said["certified"]
    assert len(said["targets"]) == 6
    again = _run(base, tuned, "-o", out)
    assert again.returncode == 2
    assert "exists; give another path, or --overwrite" in again.stderr
    done = _run(base, tuned, "-o", out, "--overwrite", "--preset", "lora", "--max-error", "0.001")
    assert done.returncode == 0
    assert "288 parameters for 6 weights" in done.stdout
    assert tna.load(out).config.rank == 2
    done = _run(base, tuned, "-o", out, "--overwrite", "--rank", "3")
    assert done.returncode == 0
    assert tna.load(out).config == presets.superlora(3)
    done = _run(base, tuned, "-o", out, "--overwrite", "--set", "alpha=4")
    assert done.returncode == 0
    assert tna.load(out).config == presets.superlora(8, alpha=4)
    twice = _run(base, tuned, "-o", out, "--overwrite", "--rank", "3", "--set", "rank=4")
    assert twice.returncode == 2
    assert "--set gives rank twice; leave one of them out" in twice.stderr
    # Not over a model, not even by force, and not among its files.
    before = base.read_bytes()
    done = _run(base, tuned, "-o", base, "--overwrite")
    assert done.returncode == 2
    assert "is a file of the model" in done.stderr
    assert base.read_bytes() == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(before)
    done = _run(tmp_path / "folder", tuned, "-o", tmp_path / "folder" / "adapter.safetensors")
    assert done.returncode == 2
    assert "among the weights of" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--preset", "lora", "--max-error", "3"], "max_error must be"),
        (["--preset", "lorra"], "no preset 'lorra'"),
        (["--set", "rnak=3"], "did you mean 'rank'"),
        (["--targets", "("], "nor a regular expression"),
        (["--svd", "best"], "svd must be one of"),
        (["--max-rank", "3"], "is the largest rank that --max-error tries"),
    ],
)
def test_a_mistake_is_one_line(pair: Any, tmp_path: Path, arguments: list[str], match: str) -> None:
    base, tuned, *_ = pair
    done = _run(base, tuned, "-o", tmp_path / "a.safetensors", *arguments)
    assert done.returncode == 2
    assert match in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("option", ["--error=0.1", "--keep=head", "--force"])
def test_an_option_of_another_name_is_unknown(pair: Any, tmp_path: Path, option: str) -> None:
    base, tuned, *_ = pair
    done = _run(base, tuned, "-o", tmp_path / "a.safetensors", option)
    assert done.returncode == 2
    assert f"No such option: {option.split('=')[0]}" in done.stderr


def test_an_argument_of_another_name_is_unknown(pair: Any) -> None:
    base, tuned, *_ = pair
    for name in ("error", "keep"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            tna.extract(base, tuned, presets.lora(1), **{name: None})


def test_a_folder_that_is_not_there_is_said_before_anything_is_read(pair: Any, tmp_path: Path) -> None:
    done = _run(tmp_path / "missing", tmp_path / "missing", "-o", tmp_path / "nowhere" / "a.safetensors")
    assert done.returncode == 2
    assert "does not exist; make it first" in done.stderr
