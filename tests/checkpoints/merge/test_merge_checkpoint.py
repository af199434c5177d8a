"""``tnadapt.merge``: exact sums, all else unchanged, and no incomplete output under the final name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tnadapt.algebra import rounding
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.errors import TnadaptError
from tnadapt.testing.strategies import configs

from ..internals import shards as copying
from ..test_atomic_files import raising
from .merge_scene import content

P, T = tna.presets, tna.Target
PARTIAL = ".tnadapt-partial"

# One of each kind of view: a whole weight, fused rows, interleaved ones, a transposed one, a convolution.
VIEWS = [
    T("h.0.q", (6, 4), "q"),
    T("h.0.qkv", (18, 4), "q", rows=tna.Rows(0, 6, 18)),
    T("h.0.qkv", (18, 4), "v", rows=tna.Rows(12, 6, 18)),
    T("h.1.c_attn", (4, 12), "v", rows=tna.Rows(8, 4, 12), transposed=True),
    T("h.1.whole", (4, 6), "q", transposed=True),
    T("h.2.neox", (12, 4), "v", rows=tna.Rows(4, 2, 6, 2)),
    T("h.3.conv", (5, 2, 2, 1), "conv"),
    T("", (4, 4), "q", parameter="in_proj_weight"),
]


def exact(file: tna.AdapterFile) -> list[np.ndarray]:
    """The updates in float64, from the plan alone."""
    arrays = {name: array.astype(np.float64) for name, array in file.arrays.items()}
    return file.plan.deltas(arrays)


def small(folder: Path, shards: int = 1, dtype: str = "float32", **settings: Any) -> tuple[Path, Path, tna.AdapterFile]:
    """A base, an adapter's path, and the adapter."""
    targets = [T(f"layer.{number}.q", (6, 4), "q") for number in range(3)]
    tensors = cp.base(targets, dtype)
    file = cp.adapter(P.lora(2), targets, tensors, **settings)
    cp.write(folder / "base", tensors, shards)
    tna.save(folder / "adapter.safetensors", file)
    return folder / "base", folder / "adapter.safetensors", file


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@given(data=st.data())
def test_it_is_the_sum_rounded_and_nothing_else_is_touched(
    dtype: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("case")
    targets = data.draw(st.lists(st.sampled_from(VIEWS), min_size=1, max_size=4, unique=True))
    config = data.draw(configs([target.shape for target in targets], ("identity", "shuffle", "linear", "linear_v2")))
    tensors = cp.base(targets, dtype)
    try:
        # float64 arrays: there, what is subtracted for a nonlinear F is not rounded.
        file = cp.adapter(config, targets, tensors, data.draw(st.sampled_from(["float64", "float32"])))
    except TnadaptError:
        return  # a config that does not suit these weights
    shards = data.draw(st.integers(1, 3))
    single = shards == 1 and data.draw(st.booleans())
    source = cp.write(folder / "base", tensors, shards)
    where = (source / "model.safetensors", folder / "out.safetensors") if single else (source, folder / "out")
    before = content(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "SPAN", data.draw(st.sampled_from([5, 1 << 24])))
        report = tna.merge(where[0], file, where[1])
    expected = cp.merged(tensors, targets, exact(file), dtype, file)
    found = cp.read(where[1])
    assert found.keys() == expected.keys()
    updated = {target.name for target in targets}
    for name, (tag, array) in found.items():
        assert (tag, array.shape) == (expected[name][0], expected[name][1].shape)
        if name not in updated:
            assert array.tobytes() == expected[name][1].tobytes()
            continue
        # Slices and wholes may differ in the last bit of float64: then two sums are neighbors, and no more.
        wide, want = cp.numbers(array, dtype), cp.numbers(expected[name][1], dtype)
        assert np.allclose(wide, want, rtol=1e-12 if dtype == "float64" else 1e-2)
        assert (wide != want).sum() <= (wide.size if dtype == "float64" else 1)
    assert content(source) == before
    assert (report.tensors, report.targets) == (len(tensors), len(targets))
    assert sorted(os.listdir(folder)) == sorted(["base", where[1].name])
    if not single:
        for name in before.keys() - {name for name in before if name.endswith(".safetensors")}:
            assert content(where[1])[name] == before[name]


def test_dtypes_that_numpy_lacks_pass_through(tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    raw = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    header["scales"] = {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [end, end + 3]}
    (base / "model.safetensors").write_bytes(cp.forge.container(header, raw[8 + length :] + b"abc"))
    tna.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(b"abc")


@pytest.mark.parametrize("ways", ["copy_file_range", "hand"])
def test_every_way_of_copying(ways: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = small(tmp_path, 2)
    tna.merge(base, adapter, tmp_path / "expected")
    left = {
        "copy_file_range": copying._WAYS[:1],
        "hand": [raising(errno.ENOSYS), lambda *arguments: 0, copying._by_hand],
    }[ways]
    monkeypatch.setattr(copying, "_WAYS", left)
    monkeypatch.setattr(copying, "_PIECE", 7)
    monkeypatch.setattr(copying, "_KERNEL_PIECE", 7)
    seen: list[tuple[int, int]] = []
    tna.merge(base, adapter, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    # Progress reaches its end, in steps of a piece or of a tensor of 96 bytes.
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert {total for _, total in seen} == {size}
    steps = np.diff([0, *(done for done, _ in seen)])
    assert set(steps) <= {*range(1, 8), 96}
    assert seen[-1] == (size, size)


@pytest.mark.law("merge-links")
@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_of_links_as_a_hub_s_cache_is(shards: int, tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path, shards)
    (base / "code").mkdir()
    (base / "code" / "model.py").write_text("pass")
    tna.merge(base, adapter, tmp_path / "expected")
    # The same files as the cache of Hugging Face's hub keeps them: links to blobs named by their hashes.
    snapshot, blobs = (tmp_path / "models--made--up" / name for name in ("snapshots/0123abcd", "blobs"))
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:064x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    (tmp_path / "link").symlink_to(snapshot)
    for number, source in enumerate([snapshot, tmp_path / "link"]):
        report = tna.merge(source, adapter, tmp_path / f"out{number}")
        assert content(tmp_path / f"out{number}") == content(tmp_path / "expected")
        assert not any(path.is_symlink() for path in (tmp_path / f"out{number}").rglob("*"))
        assert report.left_out == ()
    index = snapshot / ("model.safetensors" if shards == 1 else "model.safetensors.index.json")
    tna.merge(index, adapter, tmp_path / ("one.safetensors" if shards == 1 else "indexed"))
    if shards == 1:
        blob = (snapshot / "model.safetensors").resolve()
        with pytest.raises(tna.FileError, match="is an input of the merge"):
            tna.merge(snapshot / "model.safetensors", adapter, blob, overwrite=True)


@pytest.mark.law("merge-links")
@pytest.mark.parametrize("what", ["model", "shard", "index"])
def test_weights_outside_of_the_checkpoint_are_refused(what: str, tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path, 1 if what == "model" else 2)
    name = {"shard": "model-00002-of-00002", "index": "model.safetensors.index"}.get(what, what)
    name += ".json" if what == "index" else ".safetensors"
    (tmp_path / "blobs").mkdir()  # as in the cache of a hub, but the base is in no folder of snapshots
    (base / name).rename(tmp_path / "blobs" / "0")
    (base / name).symlink_to(tmp_path / "blobs" / "0")
    assert refused(tmp_path, base, adapter) == (
        f"{base}: {name} is a link to {tmp_path / 'blobs' / '0'}, which is outside of the checkpoint, and is not "
        "followed: copy the folder with its links followed (cp -rL)"
        + (", or give the path of that one file" if what == "model" else "")  # else no single file is the model
    )
    if what == "model":  # Who names a link means what it leads to.
        tna.merge(base / name, adapter, tmp_path / "out.safetensors")
    shutil.copytree(base, tmp_path / "copied")  # which follows links
    tna.merge(tmp_path / "copied", adapter, tmp_path / "out")


@pytest.mark.law("merge-links")
def test_other_files_are_copied_and_links_that_leave_the_checkpoint_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = small(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("of another folder")
    copied = {"tokenizer.json", "code/model.py", ".gitattributes"}
    left_out = {"pytorch_model.bin", "onnx/model.onnx", "other.safetensors", ".git/config"}
    for name in copied | left_out:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    links = {
        "absolute.txt": secret, "relative.txt": "../secret.txt", "chain.txt": "absolute.txt", "code/deep.txt": secret,
        "zero.json": "/dev/zero", "dangling.txt": "nowhere", "round.txt": "round.txt", "up": "..", "itself": ".",
        "proc.txt": "/proc/self/environ", "round": base, "inside.txt": "tokenizer.json",
        "linked.txt": base / "tokenizer.json", "code/up.txt": "../tokenizer.json",
    }  # fmt: skip
    for name, target in links.items():
        (base / name).symlink_to(target)
    os.mkfifo(base / "pipe.json")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(base)  # a socket's path must be short
        server.bind("socket")
    report = tna.merge(base, adapter, tmp_path / "out")
    copied |= {"config.json", "inside.txt", "linked.txt", "code/up.txt"}
    folders = {"up", "itself", "round", ".git/config"}
    assert set(report.copied) == copied
    assert set(content(tmp_path / "out")) == copied | {"model.safetensors"}
    left_out |= links.keys() - copied | {"pipe.json", "socket"}
    assert set(report.left_out) == left_out - folders | {"up/", "itself/", "round/", ".git/"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.law("merge-links")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "config.json", "adapter.safetensors"]
)
def test_a_pipe_for_weights_settings_or_an_adapter_is_no_wait(name: str, tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path, 2 if "of" in name else 1)
    place = adapter if name == adapter.name else base / name
    place.unlink()
    os.mkfifo(place)
    if name == "config.json":
        assert tna.merge(base, adapter, tmp_path / "out").left_out == ("config.json",)
    else:
        assert "is neither a file nor a folder" in refused(tmp_path, base, adapter)


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_a_pipe_or_device_is_never_replaced(single: bool, overwrite: bool, tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.safetensors").symlink_to("pipe.safetensors")
    outs = [tmp_path / "pipe.safetensors", tmp_path / "link.safetensors"] if single else [tmp_path / "pipe"]
    for out in [*outs, Path(os.devnull)]:
        message = refused(tmp_path, base / "model.safetensors" if single else base, adapter, out, overwrite=overwrite)
        assert message == (
            f"{out}: is neither a file nor a folder but a pipe, a device or the like, and is never replaced"
        )
    assert (tmp_path / "pipe.safetensors").is_fifo()
    assert (tmp_path / "pipe").is_fifo()
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_trained_head_replaces_the_base_s_or_is_added(shards: int, tmp_path: Path) -> None:
    targets = [T("layer.0.q", (6, 4), "q")]
    tensors = cp.base(targets, "bfloat16")
    tensors["head.weight"] = "BF16", cp.to_bfloat16(np.ones((2, 6)))
    tensors["head.count"] = "I64", np.array(3)
    kept = {"head.weight": np.full((2, 6), 1 / 3, np.float32), "head.count": np.array(5), "new.bias": np.arange(3.0)}
    file = cp.adapter(P.lora(1), targets, tensors, kept=kept)
    report = tna.merge(cp.write(tmp_path / "base", tensors, shards), file, tmp_path / "out")
    found = cp.read(tmp_path / "out")
    assert report.replaced == ("head.count", "head.weight")
    assert report.added == ("new.bias",)
    assert found["head.weight"][0] == "BF16"
    assert np.array_equal(found["head.weight"][1], cp.to_bfloat16(kept["head.weight"]))
    assert found["head.count"][1] == 5
    assert found["new.bias"][0] == "F64"
    assert found["new.bias"][1].tolist() == [0.0, 1.0, 2.0]
    expected = cp.merged(tensors, targets, exact(file), "bfloat16")
    assert np.array_equal(found["layer.0.q.weight"][1], expected["layer.0.q.weight"][1])
    assert all(found[name][1].tobytes() == tensors[name][1].tobytes() for name in ("a.first", "z.last"))
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in found.values())
    assert tna.merge(tmp_path / "out", file, tmp_path / "again", check_base=False).added == ()


def test_half_a_surrogate_pair_in_metadata_is_kept_where_a_head_is_added(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    said = {"a\udc00": "\ud800\\ud800 é \U0001f600", "format": "pt"}
    entry = {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}
    base.write_bytes(cp.forge.container(json.dumps({"__metadata__": said, "h.0.q.weight": entry}), bytes(96)))
    head_weight = np.ones((2, 4), np.float32)
    arrays = tna.UpdatePlan(P.lora(1), [(6, 4)]).init()
    file = tna.AdapterFile(P.lora(1), [T("h.0.q", (6, 4), "q")], arrays, kept={"head.weight": head_weight})
    tna.merge(base, file, tmp_path / "out.safetensors")
    merged = open_checkpoint(tmp_path / "out.safetensors")
    assert dict(merged.metadata[merged.files[0]]) == said
    assert np.array_equal(merged.array("head.weight"), head_weight)
    assert not merged.array("h.0.q.weight").any()


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    targets = [T("layer.0.q", (6, 4), "q")]
    tensors = cp.base(targets, "float16")
    tensors["head.weight"] = "F16", np.ones((2, 6), np.float16)
    tensors["head.count"] = "I64", np.array(3)
    base = cp.write(tmp_path / "base", tensors)
    for kept, why in (
        ({"head.weight": np.ones((3, 6))}, r"shape \(3, 6\), and the checkpoint's is \(2, 6\)"),
        ({"head.count": np.array(1.5)}, "as float64, and the checkpoint's is I64"),
        ({"head.count": np.array(3, np.int32)}, "as int32, and the checkpoint's is I64"),
        ({"head.count": np.array(3, np.uint64)}, "as uint64, and the checkpoint's is I64"),
        ({"head.weight": np.ones((2, 6), np.int64)}, "as int64, and the checkpoint's is F16"),
        ({"head.bias": np.ones(2)}, "though it has others of that module; nearest: 'head.weight'"),
        ({"head.weight": np.full((2, 6), 1e6)}, "leaves the range of float16"),
        ({"layer.0.q.weight": np.ones((6, 4))}, "both updates and replaces"),
    ):
        with pytest.raises(tna.FileError, match=why):
            tna.merge(base, cp.adapter(P.lora(1), targets, kept=kept), tmp_path / "out")
        assert os.listdir(tmp_path) == ["base"]


def refused(tmp_path: Path, base: Any, adapter: Any, out: Any = None, **settings: Any) -> str:
    before = content(tmp_path)
    with pytest.raises(TnadaptError) as caught:
        tna.merge(base, adapter, tmp_path / "out" if out is None else out, **settings)
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
    return str(caught.value)


def test_arguments_in_another_order_or_a_model_in_memory(tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    tna.convert(adapter, tmp_path / "peft", to="peft-lora")
    for first in (adapter, tmp_path / "peft"):
        assert refused(tmp_path, first, base) == f"{first}: is an adapter; BASE comes first, ADAPTER second"
    assert refused(tmp_path, tna.load(adapter), base) == "base is an adapter; BASE comes first, ADAPTER second"
    model = types.SimpleNamespace(named_modules=None)
    assert "base is a model in memory, and tnadapt.merge merges files: call adapter.merge()" in refused(
        tmp_path, model, adapter
    )


@pytest.mark.law("base-dtype", "wrong-base")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_base_in_any_dtype_is_the_base_and_another_is_refused(dtype: str, tmp_path: Path) -> None:
    targets = [T(f"layer.{number}.q", (60, 40), "q") for number in range(3)]
    file = cp.adapter(P.lora(2), targets, cp.base(targets))
    other = cp.write(tmp_path / "other", cp.base(targets, dtype, seed=9))
    message = refused(tmp_path, other, file)
    assert message.startswith(f"{other}: is another base model")
    assert f"their {'SHA-256' if dtype == 'float32' else 'sketches'} differ" in message
    assert tna.merge(other, file, tmp_path / "any", check_base=False).base_checked is False
    base = cp.write(tmp_path / "base", cp.base(targets, dtype))
    assert tna.merge(base, file, tmp_path / "out").base_checked is True


def test_a_base_of_two_dtypes(tmp_path: Path) -> None:
    kinds = {T(f"layer.{number}.q", (6, 4), "q"): kind for number, kind in enumerate(("float16", "bfloat16"))}
    mixed = cp.base(list(kinds), "float16") | {t.name: cp.base(list(kinds), kind)[t.name] for t, kind in kinds.items()}
    single = [cp.numbers(mixed[target.name][1], kind).astype("f4") for target, kind in kinds.items()]
    file = dataclasses.replace(cp.adapter(P.lora(1), list(kinds)), base=fingerprint(single, "float32"))
    assert tna.merge(cp.write(tmp_path / "mixed", mixed), file, tmp_path / "out").base_checked
    found = cp.read(tmp_path / "out")
    for (target, kind), delta in zip(kinds.items(), exact(file), strict=True):
        assert found[target.name][1].tobytes() == cp.merged(mixed, [target], [delta], kind)[target.name][1].tobytes()


@pytest.mark.parametrize("tag", ["I8", "U8", "F8_E4M3", "F4", "I32", "BOOL"])
def test_a_quantized_target_is_named(tag: str, tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    header, end = {}, 0
    for name, dtype, width in (("0", "F32", 4), ("1", tag, {"I32": 4, "F4": 0.5}.get(tag, 1)), ("2", "F32", 4)):
        start, end = end, end + int(24 * width)
        header[f"layer.{name}.q.weight"] = {"dtype": dtype, "shape": [6, 4], "data_offsets": [start, end]}
    (base / "model.safetensors").write_bytes(cp.forge.container(header, bytes(end)))
    assert f"'layer.1.q.weight' is {tag}, " in refused(tmp_path, base, adapter)


def test_other_names_shapes_and_kinds(tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    message = refused(tmp_path, base, cp.adapter(P.lora(1), [T("layer.0.qq", (6, 4), "q")]))
    assert "lacks the adapter's weight, such as 'layer.0.qq.weight'" in message
    assert "'layer.0.q.weight'" in message
    message = refused(tmp_path, base, cp.adapter(P.lora(1), [T("layer.0.q", (4, 6), "q")]))
    assert "has shape (6, 4) in the checkpoint, and the adapter was trained on one of (4, 6)" in message
    loda = tna.AdapterFile(P.lora(1), [T("layer.0.q", (6, 4), "q")],
                           tna.UpdatePlan(P.lora(1), [(6, 4)]).init(), activation="gelu")  # fmt: skip
    assert "LoDA" in refused(tmp_path, base, loda)
    assert "No such file" in refused(tmp_path, tmp_path / "none", adapter)
    assert "No such file" in refused(tmp_path, base, tmp_path / "none")
    assert "is not a tnadapt adapter" in refused(tmp_path, base, base / "model.safetensors")
    tensors = {"layer.0.q.qweight": ("U8", np.zeros((6, 2), "<u1")), "layer.0.q.scales": ("F16", np.ones(6, "<f2"))}
    packed = cp.write(tmp_path / "packed", tensors)
    message = refused(tmp_path, packed, cp.adapter(P.lora(1), [T("layer.0.q", (6, 4), "q")]))
    assert "its module has 'layer.0.q.qweight', 'layer.0.q.scales': is the checkpoint quantized?" in message
    shard = cp.write(tmp_path / "shards", cp.read(base), 2) / "model-00001-of-00002.safetensors"
    message = refused(tmp_path, shard, adapter, tmp_path / "out.safetensors")
    assert "This file looks like one of several: give the folder" in message


@pytest.mark.parametrize("shards", [1, 3])
def test_numbers_that_are_none_or_leave_the_range_leave_nothing(shards: int, tmp_path: Path) -> None:
    targets = [T(f"layer.{number}.q", (6, 4), "q") for number in range(3)]
    base = cp.write(tmp_path / "base", cp.base(targets, "float16"), shards)
    for bad, why in (
        (1e6, "'layer.2.q.weight' with its update leaves the range of float16"),
        (np.nan, "NaN or infinity"),
        (np.inf, "NaN or infinity"),
    ):
        file = cp.adapter(P.dense(), targets)
        list(file.arrays.values())[-1][-1] = bad  # the last weight's last number
        assert why in refused(tmp_path, base, file)
    huge = cp.adapter(P.lora(1), targets, dtype="float64")
    for array in huge.arrays.values():
        array[...] = 1e300
    assert re.search(r"the update of 'layer.\d.q.weight' is not finite", refused(tmp_path, base, huge))


def test_where_it_may_go(tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)
    file = base / "model.safetensors"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("")
    (tmp_path / "taken.safetensors").write_text("")
    (tmp_path / "link").symlink_to(base)
    for source, out, why in (
        (base, base, "is the folder of the base: give another folder for the output"),
        (base, tmp_path / "link", "is the folder of the base"),
        (base, base / "merged", "is in the folder of the base"),
        (base, tmp_path, "contains an input of the merge"),
        (base, tmp_path / "out.safetensors", "would be a folder"),
        (base, tmp_path / "none" / "out", "does not exist; make it first"),
        (base, tmp_path / "taken", "already exists"),
        (base, adapter, "is an input of the merge"),
        (base, base / "config.json", "is in the folder of the base"),
        (file, file, "is an input of the merge"),
        (file, base / "../base/model.safetensors", "is an input of the merge"),
        (file, tmp_path / "out", r"must end with .safetensors"),
        (file, tmp_path / "taken", "is a folder, and the base is one file"),
        (file, tmp_path / "taken.safetensors", "already exists"),
        (file, "", "must be a string or PathLike"),
        (file, 7, "must be a string or PathLike"),
        (file, "a\0.safetensors", "must be a string or PathLike"),
    ):
        assert why in refused(tmp_path, source, adapter, out), (source, out)
    assert "is not the folder of a checkpoint" in refused(tmp_path, base, adapter, tmp_path / "taken", overwrite=True)
    assert "is a file, and the base is a folder" in refused(tmp_path, base, adapter, __file__, overwrite=True)
    # What is no safetensors file is overwritten if asked, and a link is followed.
    tna.merge(file, adapter, tmp_path / "taken.safetensors", overwrite=True)
    (tmp_path / "away").symlink_to(tmp_path / "elsewhere")
    tna.merge(base, adapter, tmp_path / "away")
    merged = (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    assert (tmp_path / "taken.safetensors").read_bytes() == merged


def test_an_output_that_others_replace_while_it_is_looked_at_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = small(tmp_path)
    out, there = tmp_path / "out", os.listdir
    out.mkdir()

    def replaced(path: Any = ".") -> list[str]:
        names = there(path)
        if path == str(out) and not (tmp_path / "gone").exists():
            # A folder that is no checkpoint; when it has been listed, there is a checkpoint.
            out.rename(tmp_path / "gone")
            shutil.copytree(base, out)
        return names

    monkeypatch.setattr(os, "listdir", replaced)
    tna.merge(base, adapter, out, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "gone") == []
    tna.merge(base, adapter, tmp_path / "expected")
    assert content(out) == content(tmp_path / "expected")


@pytest.mark.law("merge-killed")
@pytest.mark.parametrize("change", ["nothing", "adapter", "base", "arithmetic", "state", "file"])
def test_interrupted_it_goes_on_or_starts_anew_where_something_has_changed(change: str, tmp_path: Path) -> None:
    base, adapter, file = small(tmp_path, 3)
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tna.merge(base, adapter, out, overwrite=True, progress=interrupt)
    assert not out.exists()
    # The files that it has finished are kept, and nothing else.
    (run,) = (tmp_path / f"out{PARTIAL}").glob("run-*")
    state = run / "state.json"
    done = list(json.loads(state.read_text())["done"])
    assert done
    assert {path.name for path in run.glob("files/*")} == set(done)
    if change == "adapter":
        next(iter(file.arrays.values()))[0, 0] += 1.0
        tna.save(adapter, file)
    elif change == "base":
        os.utime(base / "model-00002-of-00003.safetensors")
    elif change == "arithmetic":  # of a release that rounded in another way
        state.write_text(json.dumps({**json.loads(state.read_text()), "arithmetic": 0}))
    elif change == "state":
        state.write_text("{")
    elif change == "file":
        os.truncate(run / "files" / done[0], 10)
    report = tna.merge(base, adapter, out, overwrite=True)
    assert report.resumed == {"nothing": len(done), "file": len(done) - 1}.get(change, 0)
    tna.merge(base, adapter, tmp_path / "expected")
    assert content(out) == content(tmp_path / "expected")


@pytest.mark.law("merge-disk-faults")
def test_a_base_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    base, adapter, _ = small(tmp_path)

    def touch(done: int, total: int) -> None:
        os.utime(base / "model.safetensors", (1, done))

    with pytest.raises(tna.FileError, match="was changed while it was merged"):
        tna.merge(base, adapter, tmp_path / "out", progress=touch)
    assert sorted(os.listdir(tmp_path)) == ["adapter.safetensors", "base"]


@pytest.mark.law("merge-memory")
@pytest.mark.parametrize("projection", ["identity", "linear"])
def test_memory_is_one_tensor(projection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 32 tensors of a mebibyte: all of them together, or a second span of F each, would be far above the bounds.
    one, count = 512 * 512 * 4, 32
    targets = [T(f"layer.{number}.q", (512, 512), "q") for number in range(count)]
    tensors = cp.base(targets)
    tensors["big"] = "F32", np.zeros(1 << 23, "<f4")
    ratio = 1.0 if projection == "identity" else 0.5
    config = P.superlora(2, groups=1, projection=projection, ratio=ratio)
    base, file = cp.write(tmp_path / "base", tensors), cp.adapter(config, targets, tensors)
    assert rounding.SPAN == 1 << 24
    span = 1 << 20  # an eighth of the group
    monkeypatch.setattr(rounding, "SPAN", span)
    peak = peak_of(lambda: tna.merge(base, file, tmp_path / "out"))
    if projection == "identity":
        # The tensor, a few pieces of an eighth of a million numbers in float64, and no part of the 32 MiB.
        assert peak < 2 * one + 8 * 8 * rounding.PIECE
    else:
        # The tensor, five times a span in float64, and what F keeps of its draws: 9 bytes for each of 2**23 elements.
        assert peak < 2 * one + 5 * 8 * span + 9 * count * 512 * 512
