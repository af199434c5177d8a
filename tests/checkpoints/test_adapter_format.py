"""Adapter files: exact, small, reproducible, and safe to open whatever their content."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import forge
from tests.support.array_presets import P
from tnadapt import AdapterFile, Config, FileError, Rows, Target, UpdatePlan
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.fingerprint import Fingerprint, fingerprint

from .internals import MAX_LABELS
from .test_adapter_file import CONFIGS, LORA, SHAPES, arrays_of, composite, made, round_to_bfloat16

Recipe = dict[str, Any]
Stored = dict[str, tuple[str, np.ndarray]]

FULL_TARGETS = (
    Target("model.blocks.0.attn.qkv", (12, 4), "q", rows=Rows(0, 4, 12), layer="0"),
    Target("model.blocks.1.attn.qkv", (12, 4), "v", rows=Rows(1, 2, 3, 4), layer="0"),
    Target("blöcke.1.attn", (4, 9), "k", parameter="in_proj_weight", transposed=True, layer="1"),
    Target("conv", (2, 2, 3, 3), "conv", layer="1"),
    Target("", (3, 3), layer="2"),
)


def full(config: Config | None = None, dtype: str = "float32") -> AdapterFile:
    """A file that has everything a file can have."""
    rng = np.random.default_rng(3)
    config = config or P.superlora(1, projection="linear", ratio=0.5, seed=9)
    shapes = [target.shape for target in FULL_TARGETS]
    plan = UpdatePlan(config, shapes, layers=[target.layer for target in FULL_TARGETS])
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in plan.param_shapes.items()}
    next(iter(arrays.values())).flat[:3] = (-0.0, np.finfo(dtype).tiny / 2, np.finfo(dtype).max)
    kept = {
        "head.weight": np.asfortranarray(rng.standard_normal((3, 2))),  # neither its strides nor the order show
        "head.bias": round_to_bfloat16(rng.standard_normal(3)),
        "head.scale": np.float16(1.5)[...],
        "steps": np.int64(-7)[...],
        "none": np.zeros((0, 3), np.uint8),
        "mask": np.array([True, False]),
    }
    base = fingerprint([rng.standard_normal(shape).astype(np.float32) for shape in shapes], "float32")
    return AdapterFile(config, FULL_TARGETS, arrays, kept, {"kept.head.bias": "bfloat16"}, base, "gelu", "Vît")


def same(one: AdapterFile, other: AdapterFile) -> None:
    """Equal to the bit."""
    for name in ("config", "targets", "dtypes", "base", "activation", "model", "draws"):
        assert getattr(one, name) == getattr(other, name)
    mine, theirs = dict(one.tensors()), dict(other.tensors())
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        assert array.tobytes() == theirs[name].tobytes()


def content_of(file: AdapterFile, folder: Path) -> bytes:
    tna.save(folder / "made", file)
    return (folder / "made").read_bytes()


def read(folder: Path, content: bytes, **settings: Any) -> AdapterFile:
    path = folder / "adapter.safetensors"
    forge.write(path, content)
    return tna.load(path, **settings)


def refusal(folder: Path, content: bytes, **settings: Any) -> str:
    with pytest.raises(FileError) as caught:
        read(folder, content, **settings)
    path = f"{folder / 'adapter.safetensors'}: "
    assert str(caught.value).startswith(path)
    assert str(caught.value).count(path) == 1
    return str(caught.value)[len(path) :]


@pytest.mark.law("parameter-count", "file-round-trip")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_round_trip_is_exact(tmp_path: Path, name: str, dtype: str) -> None:
    arrays = arrays_of(CONFIGS[name], "float32" if dtype == "bfloat16" else dtype)
    dtypes = {}
    if dtype == "bfloat16":
        arrays = {array: round_to_bfloat16(values) for array, values in arrays.items()}
        dtypes = dict.fromkeys(arrays, dtype)
    file = made(CONFIGS[name], arrays=arrays, dtypes=dtypes)
    swapped = {array: values.astype(values.dtype.newbyteorder("S")) for array, values in arrays.items()}
    same(made(CONFIGS[name], arrays=swapped, dtypes=dtypes), file)
    assert file.dtype == dtype
    plan = UpdatePlan(CONFIGS[name], SHAPES, layers=["a", "a", "b"], roles="qvq")
    assert file.plan.param_shapes == plan.param_shapes
    assert file.plan is file.plan
    assert file.num_parameters == plan.num_parameters
    if dtype == "float32":
        assert all(map(np.array_equal, file.deltas(), plan.deltas(file.arrays)))
    # A layer says nothing where groups are not layers.
    assert {target.layer for target in file.targets} == ({"a", "b"} if name == "layers" else {""})
    content = content_of(file, tmp_path)
    found = read(tmp_path, content)
    same(file, found)
    assert content_of(found, tmp_path) == content
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + itemsize * file.num_parameters


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("groups", [1, "layer"])
def test_everything_it_can_hold_comes_back(tmp_path: Path, dtype: str, groups: Any) -> None:
    file = full(Config(rank=1, groups=groups, fold="hypercube", alpha=0.1), dtype)
    for path in (str(tmp_path / "one"), tmp_path / "two", os.fsencode(tmp_path / "three")):
        tna.save(path, file)
        found = tna.load(path)
        same(file, found)
    assert len(list(tmp_path.iterdir())) == 3
    assert [target.layer for target in found.targets] == (["0", "0", "1", "1", "2"] if groups == "layer" else [""] * 5)
    assert all(array.flags.writeable and array.flags.c_contiguous for _, array in found.tensors())


@pytest.mark.law("file-bytes")
def test_the_bytes_are_known(tmp_path: Path) -> None:
    # Format version 1, for ever: with the defaults of Config, the draws of F, and the order of keys and tensors.
    plan = UpdatePlan(P.lora(2, alpha=4, seed=3), [(6, 4)])
    shapes = plan.param_shapes.items()
    counted = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes}
    for file, sha256 in (
        (full(), "885b5dc0ff37952a0a37ce76a59b4dbeb3677712fa5034d3e9727e5d3be5cfb9"),
        # Written before sources, θ, axes, roles and maps with settings existed.
        (
            AdapterFile(plan.config, [Target("m", (6, 4))], counted, model="ViT"),
            "f30149f7478eb61551e536df2e8aa3d0efdfcd4069668c7b98f6f1018564e52e",
        ),
    ):
        assert hashlib.sha256(content_of(file, tmp_path)).hexdigest() == sha256


def test_the_shape_that_a_preset_asks_of_weights_changes_no_file(tmp_path: Path) -> None:
    preset = tna.presets.lotr(2, weights=2, rows=4, cols=6)
    targets = [Target(f"layer.{number}.q", (4, 6), "q") for number in range(2)]
    both = (preset, preset.replace(weight_shape=None))
    one, other = (
        content_of(AdapterFile(config, targets, UpdatePlan(config, [(4, 6)] * 2).init()), tmp_path) for config in both
    )
    assert one == other
    assert read(tmp_path, one).config == preset


@pytest.mark.law("independent-readers")
def test_a_reader_by_the_specification_reads_it(tmp_path: Path) -> None:
    file = full()
    recipe, tensors = forge.parsed(content_of(file, tmp_path))
    assert file.base is not None
    assert recipe == {
        "version": 1,
        "config": {"rank": 1, "groups": 1, "fold": "hypercube", "projection": "linear", "ratio": 0.5, "seed": 9},
        "targets": [
            ["model.blocks.0.attn.qkv", [12, 4], "q", {"rows": [0, 4, 12, 1]}],
            ["model.blocks.1.attn.qkv", [12, 4], "v", {"rows": [1, 2, 3, 4]}],
            ["blöcke.1.attn", [4, 9], "k", {"parameter": "in_proj_weight", "transposed": True}],
            ["conv", [2, 2, 3, 3], "conv"],
            ["", [3, 3], "linear"],
        ],
        "model": "Vît",
        "activation": "gelu",
        "base": {"dtype": "float32", "sha256": file.base.sha256, "sketch": list(file.base.sketch)},
        "draws": file.draws,
    }
    assert {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()} == {
        "group0.split0.factor0": ("F32", (9, 1)),
        "group0.split0.factor1": ("F32", (9, 1)),
        "kept.head.weight": ("F64", (3, 2)),
        "kept.head.bias": ("BF16", (3,)),
        "kept.head.scale": ("F16", ()),
        "kept.steps": ("I64", ()),
        "kept.none": ("U8", (0, 3)),
        "kept.mask": ("BOOL", (2,)),
    }
    with safetensors.safe_open(str(tmp_path / "made"), framework="np") as theirs:
        assert list(theirs.metadata()) == ["tnadapt"]
        assert set(theirs.keys()) == tensors.keys()
        for name in (*file.arrays, "kept.head.weight"):
            assert np.array_equal(tensors[name][1], dict(file.tensors())[name])
            assert np.array_equal(tensors[name][1], theirs.get_tensor(name))


@pytest.mark.law("independent-readers")
def test_a_writer_by_the_specification_is_read(tmp_path: Path) -> None:
    recipe, tensors = forge.parsed(content_of(full(), tmp_path))
    header, data = forge.listed(tensors)
    loose = json.dumps({"__metadata__": {"tnadapt": forge.seal(recipe, tensors)}, **header}, indent=1)
    # Neither the order of the tensors nor how the JSON is written is laid down.
    for content in (
        forge.adapter(recipe, tensors),
        forge.adapter(recipe, tensors, sorted(tensors, reverse=True)),
        forge.container(loose, data),
    ):
        same(read(tmp_path, content), full())


def test_what_is_as_usual_is_not_stored(tmp_path: Path) -> None:
    file = AdapterFile(Config(), [Target("fc", (2, 2))], UpdatePlan(Config(), [(2, 2)]).init())
    recipe, _ = forge.parsed(content_of(file, tmp_path))
    assert recipe == {"version": 1, "config": {}, "targets": [["fc", [2, 2], "linear"]]}


def small() -> AdapterFile:
    config = tna.presets.superlora(1, projection="shuffle")
    target = Target("fc", (2, 3), rows=Rows(0, 1, 2))
    base = Fingerprint("0" * 64, "float16", (0.5,) * 8)
    arrays = UpdatePlan(config, [(1, 3)]).init()
    return AdapterFile(config, [target], arrays, {"head": np.ones(1)}, base=base, model="M")


@pytest.mark.law("cut-off")
def test_cut_off_or_with_a_byte_too_many_or_too_few_it_is_refused(tmp_path: Path) -> None:
    content = content_of(small(), tmp_path)
    for position in range(len(content)):
        before, rest = content[:position], content[position:]
        for damaged in (before, before + rest[1:], before + b"0" + rest):
            refusal(tmp_path, damaged)
    for more in (b"\0", b" ", content):
        refusal(tmp_path, content + more)


@pytest.mark.law("byte-changed")
def test_whichever_byte_is_changed_it_is_refused(tmp_path: Path) -> None:
    content = content_of(small(), tmp_path)
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    # To all 255 others, where one that means the same is likeliest: in the padding, and among the outer punctuation.
    likeliest = {*range(len(header.rstrip(b" ")), len(header)), 7, 8, 9, 24, header.index(b'"F64"')}
    assert len(likeliest) > 5
    likeliest.add(header.index(b"[", header.index(b"shape")) + 1)
    for position, byte in enumerate(content):
        for flip in range(1, 256) if position in likeliest else (1, 2, 4, 8, 16, 32, 64, 128, 255):
            refusal(tmp_path, content[:position] + bytes([byte ^ flip]) + content[position + 1 :])


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.law("pickle-refused")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Bomb(), 1, {"lora_A": [1.0] * 100}])
def test_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, value: Any) -> None:
    monkeypatch.chdir(tmp_path)
    why = refusal(tmp_path, pickle.dumps(value, protocol))
    assert why.startswith("is a pickle, which can run arbitrary code when opened, so it was not opened.")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "metadata", "likeness"),
    [
        ("base_model.model.fc.lora_A.weight", {"format": "pt"}, "an adapter of PEFT: 1 tensor such as 'base_model.mod"),
        ("lora_unet_fc.lora_up.weight", {}, "an adapter of LyCORIS or kohya: 1 tensor"),
        ("lycoris_fc.lokr_w1", {}, "an adapter of LyCORIS or kohya: 1 tensor"),
        ("lora_transformer_fc.lora_up.weight", {}, "an adapter of LyCORIS or kohya: 1 tensor"),
        ("unet.mid_block.to_q.lora_A.weight", {"format": "pt"}, "an adapter of diffusers: 1 tensor"),
        (
            "model.fc.weight",
            {"format": "pt"},
            "weights that torch saved: 1 tensor such as 'model.fc.weight'; tnadapt.extract (tnadapt extract) makes",
        ),
        ("x", None, "a file of another library: 1 tensor such as 'x'"),
        ("", None, "a file of another library: 0 tensors"),
        ("", {}, "a file of another library: 0 tensors"),
    ],
)
def test_somebody_else_s_file_is_named(tmp_path: Path, name: str, metadata: Any, likeness: str) -> None:
    header, data = forge.listed({name: ("F32", np.ones((2, 2)))} if name else {})
    if metadata is not None:
        header["__metadata__"] = metadata
    why = refusal(tmp_path, forge.container(header, data))
    assert why.startswith("is not a tnadapt adapter: its metadata has no entry 'tnadapt'. It looks like " + likeness)


def test_paths_that_cannot_be_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, taken = tmp_path / "missing", tmp_path / "taken"
    convert = (
        r"tnadapt convert FOLDER -o adapter\.safetensors, or in Python tnadapt\.convert\(FOLDER, 'adapter\.safetens"
    )
    a_folder = "is a folder; give the path of a file in it"
    for use, path, why, files in (
        ("save", taken / "a", f"^{taken / 'a'}: the folder .* does not exist; make it first", ["taken"]),
        ("save", tmp_path, f"^{tmp_path}: {a_folder}", []),
        ("save", missing / "a", f"^{missing / 'a'}: the folder {missing} does not exist; make it first", []),
        ("load", missing, f"^{missing}: No such file", []),
        ("load", tmp_path, f"^{tmp_path}: {a_folder}", []),
        ("load", tmp_path, rf"^{tmp_path}: {a_folder}, such as b\.safetensors$", ["b.safetensors"]),
        (
            "load",
            tmp_path,
            rf"^{tmp_path}: is an adapter folder of PEFT; convert it: {convert}",
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
    ):
        for name in files:
            (tmp_path / name).touch()
        with pytest.raises(FileError, match=why):
            tna.load(path) if use == "load" else tna.save(path, made())
        assert sorted(os.listdir(tmp_path)) == files
        for name in files:
            (tmp_path / name).unlink()
    with pytest.raises(FileError, match=r"got AdapterFile\(.*; path and adapter_file may be swapped"):
        tna.save(made(), missing)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="expected an AdapterFile or a PopulationFile to save; got dict"):
        tna.save(missing, {})  # type: ignore[arg-type]
    monkeypatch.setattr(adapter_format.container, "MAX_HEADER", 100)
    with pytest.raises(FileError, match="6 arrays need a header of more than 100 bytes; use fewer groups"):
        tna.save(missing, made())
    assert list(tmp_path.iterdir()) == []


RECIPES: dict[str, list[tuple[Recipe, str]]] = {
    "small": [
        ({"version": 0}, "the format version 0; expected 1"),
        ({"version": True}, "the format version True; expected 1"),
        ({"version": 1.0}, "the format version 1.0; expected 1"),
        ({"version": "1"}, "the format version '1'; expected 1"),
        ({"version": None}, "the format version None; expected 1"),
        ({"version": 4, "more": 1}, "has format version 4, and this tnadapt reads up to 3: update tnadapt"),
        ({"more": 1}, "unknown keys: 'more'; lacks: none"),
        ({"config": ...}, "unknown keys: none; lacks: 'config'"),
        ({"targets": ...}, "unknown keys: none; lacks: 'targets'"),
        ({"config": []}, "config must be an object; got []"),
        ({"config": None}, "config must be an object; got None"),
        ({"config": {"rnak": 3}}, "config has unknown fields: 'rnak'"),
        ({"config": {"rank": -1}}, "config: rank must be at least 1; got -1"),
        ({"config": {"fold": ["stack"]}}, "config: fold[0] must be an integer"),
        ({"config": {"fold": ["weights", "rows/2", 2, "cols"], "order": 4}}, "and group 0 has 1 rows: give a divisor"),
        ({"config": {"axes": [1, 0], "fold": [1, 4]}}, "reorder all 4 elements of fold=(1, 4), and a group has 3"),
        ({"config": {"groups": [[0], [7]]}}, "explicit groups must name each of the weights"),
        ({"config": {"groups": 100}}, "groups=100 is more than the 3 elements"),
        ({"targets": {}}, "targets must be a list; got {}"),
        ({"targets": []}, "shapes is empty"),
        ({"targets": ["fc"]}, "target 0: a target must be [module, shape, role]"),
        ({"targets": [["fc", [2, 3], "linear"], ["fc", [2], "q"]]}, "target 1: a target's stored shape must be"),
        ({"targets": [["fc", [2, 3], ["q"]]]}, "target 0: a target's role must be one of"),
        ({"targets": [["fc", [2, 3], "q", {"rows": [0, 9, 2, 1]}]]}, "target 0: rows 0 to 8"),
        ({"targets": [["fc", [2, 1 << 62], "q"]]}, "more than 2**62 elements"),
        ({"targets": [["\ud800", [1, 3], "q"]]}, "half a surrogate pair"),
        ({"model": 1}, "model must be a string; got 1"),
        ({"ties": []}, "ties must be an object; got"),
        ({"ties": {"a.q.weight": [1]}}, "ties must be a mapping of strings to sequences of strings; got"),
        ({"activation": None}, "activation must be a string; got None"),
        ({"base": {}}, "base must have dtype, sha256 and sketch; got {}"),
        ({"base": {"dtype": "float32", "sha256": "0", "sketch": [0.0] * 8}}, "a fingerprint's sha256 must be"),
        ({"base": {"dtype": "float32", "sha256": "0" * 64, "sketch": [0.0] * 7}}, "a fingerprint's sketch must be"),
        ({"draws": "0" * 63}, "draws must be 64 lower-case hex digits"),
        ({"draws": "0" * 64 + "\n"}, "draws must be 64 lower-case hex digits"),
        ({"labels": ["a"]}, "the tnadapt entry has labels without pretrained, whose outputs they name"),
        ({"pretrained": {"labels": ["a"]}}, "pretrained has unknown keys: 'labels'"),
        ({"pretrained": {"auto_map": "x"}}, "pretrained has unknown keys: 'auto_map'"),
        ({"pretrained": {"task": "exec"}}, "pretrained: task must be one of"),
        ({"pretrained": []}, "the tnadapt entry's pretrained must be an object; got []"),
        ({"pretrained": {}, "labels": {}}, "the tnadapt entry's labels must be a list; got {}"),
        ({"pretrained": {}, "labels": [1]}, "pretrained: a label must be a string"),
        ({"pretrained": {"name": "x" * (1 << 17)}}, "'pretrained' has a value or name of more than 65536 bytes"),
        ({"pretrained": {}, "labels": ["a"] * (MAX_LABELS + 1)}, f"labels must be at most {MAX_LABELS}"),
    ],
    "frozen": [
        ({"trained": ["group0.split0.factor1"] * 2}, "trained must name some of the arrays, each once"),
        ({"trained": [1]}, "trained must be a list of names of arrays"),
        ({"trained": ["group0.split0.factor1", "group1.split0.factor0"]}, "missing: 'group1.split0.factor0'"),
        ({"trained": "group0.split0.factor1"}, "trained must be a list; got"),
        ({"trained": [f"group{n}.split0.factor{m}" for n in range(2) for m in range(2)]}, "missing"),
        # There may be a thousand more names than arrays, of which this file has one.
        ({"trained": [f"x{number}" for number in range(1025)]}, "each once; unknown: 'x0'"),
        ({"trained": [f"x{number}" for number in range(1026)]}, "trained names more than 1025 arrays"),
    ],
    "parts": [
        ({"version": 1}, "the tnadapt entry has unknown keys: 'parts'; lacks: 'config'"),
        ({"config": {"rank": 2}}, "the tnadapt entry has unknown keys: 'config'; lacks: none"),
        ({"parts": ...}, "has unknown keys: none; lacks: 'parts'"),
        ({"version": 0}, "the tnadapt entry has the format version 0; expected 1, 2 or 3"),
        ({"parts": {}}, "the tnadapt entry's parts must be a list; got {}"),
        ({"parts": []}, "parts: parts must be a list of two or more pairs"),
        ({"parts": [[{"rank": 3}, 4]]}, "parts: parts must be a list of two or more pairs"),
        ({"parts": [[{"rank": 3}, 4], 3]}, "part 1 must be a list of a config and a number of targets; got 3"),
        ({"parts": [[{"rank": 3}, 3], [{"rnak": 3}, 1]]}, "part 1: config has unknown fields: 'rnak'"),
        ({"parts": [[{"rank": 3}, 3], [[], 1]]}, "part 1: the tnadapt entry's config must be an object; got []"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 0}, 1]]}, "part 1: config: rank must be at least 1"),
        (
            {"parts": [[{"rank": 3}, 3], [{"rank": 3}, 2]]},
            "parts: items must be one for each of the 5 weights of the configs; got",
        ),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, 1.0]]}, "parts: the weights of part 1 must be an integer; got 1.0"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, -1]]}, "parts: the weights of part 1 must be at least 1"),
        ({"parts": [[{"rank": 1}, 1]] * 5}, "has more than 4 parts, and each has a target"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3, "apply": "hadamard"}, 1]]}, "must have the same apply"),
        ({"parts": [[{"terms": 60000}, 3], [{"rank": 3}, 1]]}, "config and targets require 360002 arrays; there are"),
        (
            {"parts": [[{"terms": 60000, "splits": 3, "leading": "dense"}, 3], [{"rank": 3}, 1]]},
            "config and targets require 720002 arrays; there are",  # per term: two factors and two dense tensors
        ),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, 1]]}, "the arrays must be those of config and targets; missing:"),
    ],
}


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(("base", "changes", "why"), [(base, *row) for base, rows in RECIPES.items() for row in rows])
def test_a_recipe_that_is_none_is_refused(tmp_path: Path, base: str, changes: Recipe, why: str) -> None:
    file = {"small": small, "frozen": lambda: frozen(tna.presets.lora(2)), "parts": composite}[base]()
    recipe, tensors = forge.parsed(content_of(file, tmp_path))
    changed = {key: value for key, value in {**recipe, **changes}.items() if value is not ...}
    header, data = forge.listed(tensors)
    # Escaped, as JSON can be, so that half a surrogate pair gets in.
    text = forge.seal(changed, tensors, escaped="\\ud800" in repr(changes))
    assert why in refusal(tmp_path, forge.container({"__metadata__": {"tnadapt": text}, **header}, data))


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the tnadapt entry is not JSON"),
        ("[]", "the tnadapt entry must be a JSON object; got '[]'"),
        ('{"version":1,"version":1}', "the tnadapt entry has the key 'version' twice"),
        (
            '{"version":1,"config":{"order":2,"rank":1,"rank":2},"targets":[],"sha256":"' + "0" * 64 + '"}',
            "the tnadapt entry's 'config' has the key 'rank' twice",
        ),
        ('{"version":NaN}', "the tnadapt entry's 'version' has the number 'NaN', which is not finite"),
        ('{"config":' + "[" * 10**5, "the tnadapt entry is nested too deep"),
        ('{"version":1,"config":{},"targets":[],"sha256":"F"}', "sha256 must be 64 lower-case hex digits; got 'F'"),
        ("\ud800", "the tnadapt entry has half a surrogate pair"),
    ],
)
def test_an_entry_that_is_none_is_refused(tmp_path: Path, text: str, why: str) -> None:
    assert why in refusal(tmp_path, forge.container(json.dumps({"__metadata__": {"tnadapt": text}})))


@pytest.mark.law("bad-tensors")
def test_a_header_with_other_metadata_or_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    recipe, tensors = forge.parsed(content_of(small(), tmp_path))
    header, data = forge.listed(tensors)
    whole = {"__metadata__": {"tnadapt": forge.seal(recipe, tensors), "format": "pt"}, **header}
    why = refusal(tmp_path, forge.container(whole, data))
    assert why == "must have 'tnadapt' as its only entry of metadata; it also has 'format'"
    # What is kept may have any name, and the name is hashed.
    whole["kept.\ud800"] = whole.pop("kept.head")
    del whole["__metadata__"]["format"]
    assert "'kept.\\ud800' has half a surrogate pair" in refusal(tmp_path, forge.container(json.dumps(whole), data))


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("group0.split0.factor0", None, "missing: 'group0.split0.factor0'; unknown: none"),
        ("group0.split0.factor9", ("F32", np.ones(2)), "missing: none; unknown: 'group0.split0.factor9'"),
        ("group0.split0.factor0", ("F64", np.ones((2, 1))), "one dtype; got float32 and float64"),
        ("group0.split0.factor0", ("F32", np.full((2, 1), np.nan)), "'group0.split0.factor0' holds NaN or infinity"),
        ("kept.head", ("BF16", np.full(1, 0x7F80)), "'kept.head' holds NaN or infinity"),
        ("head", ("F32", np.ones(2)), "missing: none; unknown: 'head'"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, name: str, tensor: Any, why: str) -> None:
    recipe, tensors = forge.parsed(content_of(small(), tmp_path))
    changed = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
    assert why in refusal(tmp_path, forge.adapter(recipe, changed))


@pytest.mark.law("draws-digest")
@pytest.mark.parametrize("projection", ["shuffle", "linear", "nonlinear", "identity"])
def test_other_draws_are_refused_by_both_names(tmp_path: Path, projection: str) -> None:
    file = full(tna.presets.superlora(1, projection=projection))
    recipe, tensors = forge.parsed(content_of(file, tmp_path))
    assert recipe.get("draws") == file.draws
    assert (file.draws is None) == (projection == "identity")
    other = forge.adapter({**recipe, "draws": "ab" * 32}, tensors)
    why = refusal(tmp_path, other)
    assert f"digest is {'ab' * 32}; on this machine it is {file.draws}" in why
    same(read(tmp_path, other, check_draws=False), file)
    if projection != "identity":
        missing = forge.adapter({key: value for key, value in recipe.items() if key != "draws"}, tensors)
        assert "digest is None" in refusal(tmp_path, missing)


def lora_tensors(count: int) -> Stored:
    return {f"group{n // 2}.split0.factor{n % 2}": ("F16", np.zeros((1, 1))) for n in range(count)}


HUGE = [["fc", [1 << 31, 1 << 31], "q"]]
MANY_DIVISORS = 9316358251200  # 10,752 of them, which are tried against each other
TT = {"order": 32, "format": "tt", "fold": "hypercube", "groups": 1}


def tt_start_beyond_floats() -> tuple[Recipe, list[Any], Stored]:
    """Its first step would be a power of 4 beyond the largest float64."""
    config = {**TT, "rank": 4, "splits": 32, "leading": "same", "combine": "hadamard", "projection": "nonlinear"}
    shapes = UpdatePlan(Config(**config), [(1 << 16, 1 << 16)]).param_shapes
    return config, [["fc", [1 << 16, 1 << 16], "q"]], {name: ("F16", np.zeros(s)) for name, s in shapes.items()}


HOSTILE: dict[str, tuple[Recipe, list[Any], Stored]] = {
    "rank": ({"rank": 10**12}, HUGE, lora_tensors(2)),
    "groups": ({"groups": 1 << 40, "fold": "hypercube"}, HUGE, lora_tensors(2)),
    "terms": ({"terms": 1 << 16, "groups": 1, "fold": "hypercube"}, HUGE, lora_tensors(2)),
    "terms of a train": ({**TT, "terms": 1 << 16, "splits": 32, "leading": "same"}, HUGE, lora_tensors(2)),
    "4096 groups of them": (
        {**TT, "terms": 1 << 16, "splits": 32, "leading": "same", "groups": 4096},
        HUGE,
        lora_tensors(2),
    ),
    "order": ({"order": 32, "rank": 1 << 40, "groups": 1, "fold": "hypercube", "format": "tucker"}, HUGE, {}),
    "fold": ({"order": 32, "fold": [1 << 62] * 32, "rank": 1 << 40, "format": "tucker"}, HUGE, lora_tensors(2)),
    "dense": ({"order": 1, "format": "dense", "groups": 1}, HUGE, {"group0.split0.dense": ("F16", np.zeros(1))}),
    "a number to factor": (
        {"order": 1, "splits": 16, "groups": 1},
        [["fc", [1, MANY_DIVISORS], "q"]],
        {f"group0.split{k}.{'dense' if k < 15 else 'factor0'}": ("F16", np.zeros(1)) for k in range(16)},
    ),
    "many numbers to factor": (
        {"order": 1, "splits": 2},
        [["fc", [1, MANY_DIVISORS // (n + 1)], "q"] for n in range(300)],
        {f"group{n}.split{k}.{'factor0' if k else 'dense'}": ("F16", np.zeros(1)) for n in range(300) for k in (0, 1)},
    ),
    "sizes of a fold to factor": (
        {"order": 32, "splits": 16, "groups": 1, "fold": [MANY_DIVISORS] * 32, "leading": "same"},
        HUGE,
        {f"group0.split{k}.factor{m}": ("F16", np.zeros((1, 4))) for k in range(16) for m in range(32)},
    ),
    "targets": ({}, [["fc", [1 << 20, 1 << 20], "q"]] * 20_000, lora_tensors(2)),
    "a group too many": ({"groups": 1001, "fold": "hypercube"}, HUGE, lora_tensors(2000)),
    "a start beyond floats": tt_start_beyond_floats(),
    "a shape to print": ({"rank": [10**4000] * 100}, HUGE, {}),
}


@pytest.mark.slow
@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_claims_costs_nothing(tmp_path: Path, name: str) -> None:
    config, targets, tensors = HOSTILE[name]
    content = forge.adapter({"version": 1, "config": config, "targets": targets, "draws": "0" * 64}, tensors)
    begin = time.process_time()
    assert "SHA-256" not in refusal(tmp_path, content)  # it is refused for what it claims
    # Of this load, as tracing takes most of the time of the next one.
    assert time.process_time() - begin < 5.0
    # The memory of the next one, as this one may have imported the compiler.
    peak = peak_of(lambda: refusal(tmp_path, content))
    # In proportion to the file that is there, and to nothing in it.
    assert peak < (4 << 20) + 40 * len(content)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_saved(tmp_path: Path, kept: bool, bad: float) -> None:
    path = tmp_path / "adapter.safetensors"
    tna.save(path, made())
    before = path.read_bytes()
    arrays = arrays_of(LORA)
    arrays["group1.split0.factor1"][2, 1] = bad
    file = made(kept={"head": np.array(bad)}) if kept else made(arrays=arrays)
    name = "kept.head" if kept else "group1.split0.factor1"
    with pytest.raises(FileError, match=f"^{path}: '{name}' holds NaN or infinity"):
        tna.save(path, file)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def frozen(config: Config, trained: list[str] | None = None, dtype: str = "float32") -> AdapterFile:
    """An adapter at its start, of which the last array of each split is trained, moved by a little."""
    targets = [Target(f"layer.{number}.q", (6, 4), "q") for number in range(2)]
    plan = UpdatePlan(config, [(6, 4)] * 2)
    words = list(plan.groups[0].names.values())
    trained = [words[-1]] if trained is None else trained
    arrays = plan.init(dtype=dtype, trained=trained)
    arrays[trained[0]] = arrays[trained[0]] + np.asarray(0.5, dtype)
    return AdapterFile(config, targets, arrays, trained=trained)


FROZEN = {
    "lora": tna.presets.lora(2), "lorta": tna.presets.lorta(2), "lokr": tna.presets.lokr(2),
    "terms": tna.presets.compacter(1, terms=2),
    "train": Config(order=3, rank=2, groups=1, fold="balanced", format="tt"),
    "linear": tna.presets.superlora(2, projection="linear", ratio=0.5),
    "nonlinear": tna.presets.superlora(2, projection="nonlinear", ratio=0.5, seed=3),
    "parts": CompositeConfig([(P.lora(2, seed=1), 1), (P.lora(3, seed=2), 1)]),
}  # fmt: skip


@pytest.mark.law("frozen-arrays")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_arrays_are_left_out_and_drawn_again(name: str, dtype: str, tmp_path: Path) -> None:
    file = frozen(FROZEN[name], dtype=dtype)
    assert file.trained is not None
    assert set(file.left_out) == file.arrays.keys() - set(file.trained)
    content = content_of(file, tmp_path)
    recipe, tensors = forge.parsed(content)
    assert list(tensors) == recipe["trained"] == list(file.trained)
    found = read(tmp_path, content)
    same(found, file)
    assert (found.trained, found.num_parameters) == (file.trained, tensors[file.trained[0]][1].size)
    assert all(np.array_equal(*pair) for pair in zip(found.deltas(), file.deltas(), strict=True))
    assert content_of(found, tmp_path) == content


def test_of_a_frozen_array_that_has_moved_the_file_has_the_bits(tmp_path: Path) -> None:
    trained = ["group0.split0.factor0", "group0.split0.factor1"]
    for file, name in (
        (frozen(tna.presets.lora(2)), "group0.split0.factor0"),
        # There all are zeros, and a negative zero is a number of its own.
        (frozen(tna.presets.superlora(2, groups=2), trained), "group1.split0.factor0"),
    ):
        assert name in file.left_out
        moved = AdapterFile(file.config, file.targets, {**file.arrays, name: -file.arrays[name]}, trained=file.trained)
        assert moved.left_out == tuple(other for other in file.left_out if other != name)
        same(read(tmp_path, content_of(moved, tmp_path)), moved)


def test_arrays_that_are_changed_in_place_after_a_save_are_saved_as_they_are(tmp_path: Path) -> None:
    file = frozen(FROZEN["nonlinear"])
    first = content_of(file, tmp_path)
    name, draws = file.left_out[0], file.draws
    before = file.arrays[name].copy()
    file.arrays[name][...] = 7
    assert name not in file.left_out
    assert file.draws != draws
    content = content_of(file, tmp_path)
    assert name in forge.parsed(content)[1]
    same(read(tmp_path, content), file)
    file.arrays[name][...] = before
    assert content_of(file, tmp_path) == first


def test_other_draws_of_frozen_arrays_are_refused(tmp_path: Path) -> None:
    recipe, tensors = forge.parsed(content_of(frozen(tna.presets.lora(2)), tmp_path))
    content = forge.adapter({**recipe, "config": {**recipe["config"], "seed": 1}}, tensors)
    assert "whose digest is" in refusal(tmp_path, content)
    assert read(tmp_path, content, check_draws=False).trained == ("group0.split0.factor1",)
    # Left out without a word of it, and stored although they need not be.
    bare = {key: value for key, value in recipe.items() if key != "draws"}
    assert "whose digest is None" in refusal(tmp_path, forge.adapter(bare, tensors))
    file = frozen(tna.presets.lora(2))
    stored = {name: ("F32", array) for name, array in file.arrays.items()}
    same_arrays = read(tmp_path, forge.adapter(bare, stored)).arrays
    assert all(np.array_equal(array, file.arrays[name]) for name, array in same_arrays.items())


@pytest.mark.law("bad-tensors")
def test_numbers_before_the_network_are_never_left_out(tmp_path: Path) -> None:
    config = tna.presets.lora(2).replace(before="one-hot", parameters=3, scope="group")
    recipe, tensors = forge.parsed(content_of(made(config), tmp_path))
    del tensors["group1.theta"]
    for trained in (["group0.theta"], ["group2.theta", "group0.theta"]):
        why = refusal(tmp_path, forge.adapter({**recipe, "trained": trained}, tensors))
        assert "missing: 'group1.theta'; unknown: none" in why


def test_a_small_file_makes_no_reader_draw_much(tmp_path: Path) -> None:
    recipe = {"version": 1, "config": {"rank": 20}, "targets": [["a", [1 << 20, 1], "q"]], "draws": "0" * 64,
              "trained": ["group0.split0.factor1"]}  # fmt: skip
    content = forge.adapter(recipe, {"group0.split0.factor1": ("F32", np.zeros((1, 20), np.float32))})
    why = "1 frozen arrays are left out; at most 1024 with 16777216 elements in total"
    assert why in refusal(tmp_path, content)
    assert peak_of(lambda: refusal(tmp_path, content)) < 1 << 22


def test_large_and_many_frozen_arrays_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = frozen(tna.presets.compacter(1, terms=3))
    sizes = [file.arrays[name].size for name in file.left_out]
    assert len(sizes) > 3
    ends = list(itertools.accumulate(sizes, initial=0))
    limits = [("MAX_LEFT_OUT", count, count) for count in range(4)]
    for count, end in enumerate(ends[1:4], 1):
        limits += [("MAX_DRAWN", end - 1, count - 1), ("MAX_DRAWN", end, count)]
    for name, value, kept in limits:
        with monkeypatch.context() as patch:
            patch.setattr(f"tnadapt.checkpoints.adapter_file.{name}", value)
            limited = AdapterFile(file.config, file.targets, file.arrays, trained=file.trained)
            assert limited.left_out == file.left_out[:kept], (name, value)
            same(read(tmp_path, content_of(limited, tmp_path)), limited)


@pytest.mark.parametrize("terms", [1, 6])
def test_a_list_of_trained_arrays_may_be_longer_than_the_targets(terms: int, tmp_path: Path) -> None:
    # Many arrays a weight, half of which are trained.
    config = Config(rank=1, splits=4, split_size=1, terms=terms)
    targets = [Target(f"l.{number}", (4, 4)) for number in range(160)]
    arrays = arrays_of(config, targets=targets)
    file = AdapterFile(config, targets, arrays, trained=list(arrays)[1::2])
    content = content_of(file, tmp_path)
    recipe = forge.parsed(content)[0]
    assert (len(forge.compact(recipe["trained"])) > len(forge.compact(recipe["targets"])) + 65536) == (terms == 6)
    same(read(tmp_path, content), file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "M" * 65536}, "the tnadapt entry's 'model' has a value or name of more than 65536 bytes"),
        (
            {"targets": [Target("m" * 65536, (4, 6))]},
            "the tnadapt entry's 'targets' has a value or name of more than 65536 bytes",
        ),
        ({"kept": {"k" * 65536: np.zeros(1)}}, "the header has a value or name of more than 65536 bytes"),
    ],
)
def test_what_load_would_refuse_is_not_saved(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    targets = [Target("q", (4, 6))]
    file = AdapterFile(**{"config": LORA, "targets": targets, "arrays": arrays_of(LORA, targets=targets), **fields})
    with pytest.raises(FileError) as caught:
        tna.save(tmp_path / "a.safetensors", file)
    assert f"was not written, as load would refuse it: {message}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_config_may_be_longer_by_what_its_targets_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [Target(f"l.{number}", (2, 2)) for number in range(200)]
    config = Config(rank=1, groups=tuple((number,) for number in range(200)))
    file = AdapterFile(config, targets, arrays_of(config, targets=targets))
    monkeypatch.setattr(adapter_format, "_CONFIG", 0)
    same(read(tmp_path, content_of(file, tmp_path)), file)
    monkeypatch.setattr(adapter_format, "_CONFIG_OF_TARGET", 1)
    with pytest.raises(
        FileError, match=r"load would refuse it: .* 'config' has a value or name of more than 200 bytes"
    ):
        content_of(file, tmp_path)
