"""An adapter from a tuned checkpoint on disk, without torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tests.support import forge
from tests.support.in_process import main, run_here
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
    return *saved(tmp_path, base, tuned), base, tuned


def saved(folder: Path, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray]) -> tuple[Path, Path]:
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def two_weights(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    return {"a.q_proj.weight": first, "a.v_proj.weight": second}


def test_what_changed_is_found_and_bound_to_its_base(pair: Any, tmp_path: Path) -> None:
    from tnadapt.checkpoints.fingerprint import fingerprint

    base, tuned, before, after = pair
    found = tna.extract(base, tuned, presets.lora(2))
    assert [target.role for target in found.file.targets] == ["q", "v"] * 3
    assert found.report.error < 1e-5
    assert found.report.certified
    assert found.others == ()
    for target, delta in zip(found.file.targets, found.file.deltas(), strict=True):
        np.testing.assert_allclose(before[target.name] + delta, after[target.name], atol=1e-5)
    assert found.file.base == fingerprint([before[target.name] for target in found.file.targets], "float32")
    tna.save(tmp_path / "adapter.safetensors", found.file)
    assert tna.load(tmp_path / "adapter.safetensors").base == found.file.base
    assert tna.extract(base, tuned, presets.lora(), max_error=1e-3).file.config.rank == 2


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


def test_what_counts_as_another_tensor(tmp_path: Path) -> None:
    """Another shape, kind of number, or value: in whichever of two dtypes has fewer digits."""
    base: cp.Tensors = {name: ("F32", array) for name, array in _base(np.random.default_rng(0), layers=1).items()}
    tuned = dict(base)
    both = {
        "steps": (("I64", np.arange(3)), ("I64", np.arange(3)), False),
        "shape": (("F32", np.ones((2, 3), "<f4")), ("F32", np.ones((3, 2), "<f4")), True),
        "size": (("F32", np.ones(3, "<f4")), ("F32", np.ones(4, "<f4")), True),
        "integers": (("I64", np.arange(3)), ("U8", np.arange(3, dtype=np.uint8)), True),
        "float and integer": (("F32", np.ones(3, "<f4")), ("U8", np.ones(3, np.uint8)), True),
        "wider": (("F16", np.full(3, 0.1, "<f2")), ("F32", np.full(3, 0.1, "<f4")), False),
        "narrower": (("F32", np.full(3, 0.1, "<f4")), ("BF16", cp.to_bfloat16(np.full(3, 0.1))), False),
        "not a number": (("F32", np.full(2, np.nan, "<f4")), ("F64", np.full(2, np.nan)), False),
        "float32 cannot tell": (("F32", np.ones(3, "<f4")), ("F64", np.full(3, 1 + 1e-12)), False),
        "float32 can tell": (("F32", np.ones(3, "<f4")), ("F64", np.full(3, 1.001)), True),
    }
    for name, (before, after, _) in both.items():
        base[name], tuned[name] = before, after
    first = "layers.0.attn.q_proj.weight"
    tuned[first] = "F32", base[first][1] + np.float32(1.0)
    cp.write_file(tmp_path / "tuned.safetensors", tuned | {"eight bits": ("F32", np.zeros(3, "<f4"))})
    header, data = forge.listed(base)
    header["eight bits"] = {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    (tmp_path / "base.safetensors").write_bytes(forge.container(header, data + bytes(3)))
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for one, other in (paths, paths[::-1]):
        found = tna.extract(one, other, presets.lora(1))
        assert set(found.others) == {"eight bits", *(name for name, (_, _, differs) in both.items() if differs)}
    with pytest.raises(TargetError, match="eight bits is F8_E4M3, which adapter files do not support"):
        tna.extract(*paths[::-1], presets.lora(1), keep_trainable="eight bits")


def test_half_precision_and_two_dtypes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for second, bound in (("f2", True), ("f4", False)):
        base = two_weights(*(rng.normal(size=(8, 8)).astype(kind) for kind in ("f2", second)))
        tuned = {name: weight + weight.dtype.type(0.5) for name, weight in base.items()}
        found = tna.extract(*saved(tmp_path, base, tuned), presets.dense())
        assert (found.file.base is not None) is bound, "weights of two dtypes have no fingerprint"
        for delta, name in zip(found.file.deltas(), base, strict=True):
            expected = tuned[name].astype(np.float64) - base[name].astype(np.float64)
            np.testing.assert_array_equal(delta, expected.astype(np.float32))


@pytest.mark.parametrize(("change", "fine"), [(1.2e-38, True), (1.1e-38, False), (1e-45, False)])
def test_differences_too_small_for_float32_are_refused(change: float, fine: bool, tmp_path: Path) -> None:
    base = two_weights(*np.zeros((2, 4, 4)))
    paths = saved(tmp_path, base, {name: array + change for name, array in base.items()})
    if fine:
        assert tna.extract(*paths, presets.dense()).file.num_parameters == 32
        return
    message = f"a.q_proj.weight differs by at most {change:.3g}, which is too small for float32"
    with pytest.raises(ShapeError, match=message):
        tna.extract(*paths, presets.dense())


def test_large_tensors_are_compared_in_little_memory_to_the_last_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = _base(rng, layers=1) | {"table": rng.integers(0, 256, (8 << 20) + 12, np.uint8)}
    tuned = _tuned(base, rng)
    paths = saved(tmp_path, base, tuned)
    found: list[tuple[str, ...]] = []
    assert peak_of(lambda: found.append(tna.extract(*paths, presets.lora(2)).others)) < 5 << 20
    for place in (0, 1 << 20, -1):
        tuned["table"] = base["table"].copy()
        tuned["table"][place] ^= 1
        found.append(tna.extract(*saved(tmp_path, base, tuned), presets.lora(2)).others)
    assert found == [(), *[("table",)] * 3]


def test_rows_of_a_fused_weight(tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    base = np.random.default_rng(0).normal(size=(36, COLS)).astype(np.float32)
    tuned = base.copy()
    tuned[24:] += np.outer(np.ones(12), np.arange(12)).astype(np.float32)
    found = tna.extract(*saved(tmp_path, {name: base}, {name: tuned}), presets.lora(1))
    q, v = found.file.deltas()
    assert not q.any()
    np.testing.assert_allclose(v, np.outer(np.ones(12), np.arange(12)), rtol=1e-5, atol=1e-5)
    assert found.others == ()
    tuned[13] += 1  # a row of k
    found = tna.extract(*saved(tmp_path, {name: base}, {name: tuned}), presets.lora(1))
    assert found.others == (f"{name} (rows of no target)",)


@pytest.mark.parametrize("added", [True, False])
def test_a_backbone_without_its_prefix(tmp_path: Path, pair: Any, added: bool) -> None:
    base, tuned, before, after = pair
    named = {f"model.{name}": array for name, array in (after if added else before).items()}
    save_file(named, tmp_path / "named.safetensors")
    paths = (base, tmp_path / "named.safetensors") if added else (tmp_path / "named.safetensors", tuned)
    found = tna.extract(*paths, presets.lora(2))
    assert found.report.error < 1e-5
    assert found.others == ()


def test_shards_and_folders(tmp_path: Path, pair: Any) -> None:
    base, _, _, after = pair
    folder = cp.write(tmp_path / "tuned", {name: ("F32", array) for name, array in after.items()}, shards=2)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    found = tna.extract(base, folder, presets.lora(2))
    assert found.report.error < 1e-5
    assert found.file.model == "LlamaForSequenceClassification"


FIRST = "layers.0.attn.q_proj.weight"


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"targets": ["nothing"]}, TargetError, "no tensor of the checkpoint is a target"),
        ({"keep_trainable": ["layers.0.attn"]}, TargetError, f"{FIRST} is both a target and in keep_trainable"),
        (
            {"keep_trainable": ["head2"]},
            TargetError,
            "keep_trainable: no tensor lies at or below 'head2'; the tuned checkpoint has ",
        ),
        ({"keep_trainable": "clasifier"}, TargetError, "keep_trainable: no tensor lies at or below 'clasifier'"),
        ({"max_error": 2.0}, ConfigError, "max_error must be"),
        ({"cfg": presets.lora(), "max_error": 1e-3, "max_rank": 1}, ConfigError, "no rank up to 1 "),
    ],
)
def test_impossible_requests_are_refused(pair: Any, settings: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        tna.extract(*pair[:2], **settings)


def test_impossible_checkpoints_are_refused(tmp_path: Path, pair: Any) -> None:
    base, tuned, before, after = pair

    def written(name: str, tensors: dict[str, np.ndarray]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    wrong = written("shape", {**after, FIRST: np.zeros((COLS, 5), np.float32)})
    lacks = written("lacks", {name: array for name, array in before.items() if name != FIRST})
    packed = written("packed", {**after, FIRST: np.zeros((COLS, COLS), np.int8)})
    nan = written("nan", {**after, FIRST: after[FIRST] * np.float32("nan")})
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for paths, error, match in (
        ((base, wrong), TargetError, r"shape \(12, 12\) in the base checkpoint and \(12, 5\)"),
        ((lacks, tuned), TargetError, "lacks 1 of 6 targets, such as 'layers.0.attn.q_proj.weight'"),
        ((base, packed), TargetError, "is I8; expected one of F64, F32"),
        ((base, nan), ShapeError, "NaN or infinity"),
        ((base, tmp_path / "missing"), FileError, "No such file"),
        ((tmp_path / "pickle.safetensors", tuned), FileError, "is a pickle"),
    ):
        with pytest.raises(error, match=match):
            tna.extract(*paths, presets.lora(2))


# -- The command --------------------------------------------------------------------------------


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("typer")
    return run_here(main, "extract", *arguments)


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
    done = _run(base, tuned, "-o", out, "--overwrite", "--preset", "lora", "--max-error", "0.001")
    assert "288 parameters for 6 weights" in done.stdout
    for options, config in (
        ([], presets.lora(2)),
        (["--rank", "3"], presets.superlora(3)),
        (["--set", "alpha=4"], presets.superlora(8, alpha=4)),
    ):
        assert not options or _run(base, tuned, "-o", out, "--overwrite", *options).returncode == 0
        assert tna.load(out).config == config
    # Not over a file that is there, nor over a model, not even by force, nor among its files.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(before := base.read_bytes())
    for arguments, message in (
        ((base, tuned, "-o", out), "exists; give another path, or --overwrite"),
        ((base, tuned, "-o", base, "--overwrite"), "is a file of the model"),
        ((tmp_path / "folder", tuned, "-o", tmp_path / "folder" / "adapter.safetensors"), "among the weights of"),
        # Before anything is read.
        ((*[tmp_path / "missing"] * 2, "-o", tmp_path / "nowhere" / "a.safetensors"), "does not exist; make it first"),
    ):
        done = _run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert base.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--preset", "lora", "--max-error", "3"], "max_error must be"),
        (["--preset", "lorra"], "no preset 'lorra'"),
        (["--set", "rnak=3"], "did you mean 'rank'"),
        (["--targets", "("], "or regular expression"),
        (["--svd", "best"], "svd must be one of"),
        (["--max-rank", "3"], "is the largest rank that --max-error tries"),
        (["--rank", "3", "--max-error", "0.1"], "--rank fixes the rank, and --max-error searches for it; give one"),
        (["--rank", "3", "--set", "rank=4"], "--set gives rank twice; leave one of them out"),
    ],
)
def test_a_mistake_is_one_line(pair: Any, tmp_path: Path, arguments: list[str], match: str) -> None:
    done = _run(*pair[:2], "-o", tmp_path / "a.safetensors", *arguments)
    assert done.returncode == 2
    assert match in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.safetensors").exists()
