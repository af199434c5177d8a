"""Claims of a file take no memory: at most four times its header before it is rejected, and nothing for its holes.

Headers have 1 MiB each; with ``HYPOTHESIS_PROFILE=long`` 62 MiB, and the memory of a process is measured as well.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support import forge
from tests.support.depth import LONG, in_depth
from tnadapt.checkpoints import checkpoint, container
from tnadapt.checkpoints import container as json_scan
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import MAX_METADATA, read_header, strict_json

from .hostile_headers import HEADERS, USES, write

SIZE = (62 << 20) if LONG else (1 << 20)
FACTOR = 4
#: Beside that: a value of 64 KiB that is converted, or the metadata's 4096 entries.
BESIDE = 2 << 20


#: In a default run: one of the three headers that take ten seconds each.
FEW = [
    kind for kind in [*HEADERS][::4] if kind not in ("recipe of targets", "recipe of a base and what are no targets")
]


@pytest.mark.slow
@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("kind", in_depth(HEADERS, FEW))
def test_memory_before_a_header_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.safetensors"
    length = write(path, kind, SIZE)
    tracemalloc.start()
    try:
        with pytest.raises(tna.FileError) as caught:
            tna.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    # Targets that are right are objects as soon as they are read, of 500 bytes each; there may be 131,072 of them.
    beside = (64 << 20) if kind == "recipe of targets" else BESIDE
    if kind == "recipe of groups and targets":  # some 20 bytes of header each
        beside += min(length // 20, 1 << 17) * 1024
    assert peak <= FACTOR * length + beside, f"{peak / length:.2f} times the header"


@pytest.mark.skipif(not LONG, reason="a process for each, of 62 MiB: in the long profile")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", HEADERS)
def test_memory_of_a_process_before_a_header_is_refused(tmp_path: Path, kind: str, use: str) -> None:
    path = tmp_path / "file.safetensors"
    length = write(path, kind, SIZE)
    command = [sys.executable, "-m", "tests.checkpoints.hostile_headers", str(path), use, "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout)
    if found["said"] != "read":
        assert found["more"] <= FACTOR * length + (16 << 20), found


# -- What is read is what Python's own reader makes of it ------------------------------------------

ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{ }",
        "{@}",
        '{"a" : { "data_offsets": [0 , 8], "shape" :[ 2 ], "dtype": "F32" } }',
        '{"\\u0061\\n\\ud83d\\ude00é😀":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"__metadata__":{"x":"\\ud83d\\ude00\\n\\"é😀\\\\","é":""},@}',
        '{"__metadata__":{},\n\t@}',
        '{"\\u005f_metadata__":{"x":"LONG"},@}'.replace("LONG", "\\ud83d\\ude00é\\\\" * 50_000),
    ],
)
def test_a_header_says_what_json_says(text: str) -> None:
    text = text.replace("@", ENTRY)
    entries, metadata = read_header(text.encode() + b"   ", False)
    theirs = json.loads(text)
    assert dict(metadata) == theirs.pop("__metadata__", {})
    assert {name: (e.dtype, list(e.shape), [e.start, e.stop]) for name, e in entries.items()} == {
        name: (value["dtype"], value["shape"], value["data_offsets"]) for name, value in theirs.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "{,}", "{@,}", '{@ "b":1}', "{@}}", "{@", '{"a" 1}', '{"a":}', '{"a":1',
        "{a:1}", "{'a':1}", '{"a\n":1}', '{"\\x":1}', '{"\\u00g0":1}', '{"a":tru}', '{"a":01}', '{"a":[1,]}',
        '{"a":[1 2]}',
        '{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}}',
        '{"a":]}', '{"a":[}]}', '{"__metadata__":{"a":"b",}}', '{"__metadata__":{"a":"\t"}}', "{@}//}",
    ],
)  # fmt: skip
def test_what_json_does_not_read_is_refused(text: str) -> None:
    text = text.replace("@", ENTRY)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(tna.FileError, match=r"is not JSON|does not end with|shape"):
        read_header(text.encode(), False)


@pytest.mark.parametrize("cut", range(2, 120, 7))
def test_a_header_that_is_cut_is_refused(cut: int) -> None:
    text = '{"__metadata__":{"x":"y"},"b":{"shape":[],"dtype":"U8","data_offsets":[8,9]},@}'.replace("@", ENTRY)
    with pytest.raises(tna.FileError):
        read_header(text[:-cut].encode() + b"}", False)


def test_entries_of_metadata_are_counted() -> None:
    def header(count: int) -> bytes:
        return json.dumps({"__metadata__": {f"{number}": "" for number in range(count)}}).encode()

    assert len(read_header(header(MAX_METADATA), False)[1]) == MAX_METADATA
    with pytest.raises(tna.FileError, match="more than 4096 entries of __metadata__"):
        read_header(header(MAX_METADATA + 1), False)


def test_tensors_targets_and_values_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are lowered: at their own size each takes seconds."""
    path = tmp_path / "adapter.safetensors"
    config, targets = tna.presets.lora(1), [tna.Target(f"{i}", (2, 2), "q") for i in range(3)]
    plan = tna.SuperLoRA(config, [target.shape for target in targets])
    arrays = {name: np.ones(size, "f4") for name, size in plan.param_shapes.items()}
    tna.save(path, tna.AdapterFile(config, targets, arrays))
    for limit, most, why in [
        ("container.MAX_TENSORS", 6, "the header has more than 5 tensors, and no model has as many"),
        (
            "adapter_format._MAX_TARGETS",
            3,
            "has more than 2 targets, and no model has as many weights to adapt",
        ),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(f"tnadapt.checkpoints.{limit}", most)
            assert len(tna.load(path).targets) == 3
            patched.setattr(f"tnadapt.checkpoints.{limit}", most - 1)
            with pytest.raises(tna.FileError, match=why):
                tna.load(path)


def test_many_tensors_in_several_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: cp.Tensors = {f"t.{rng.integers(1 << 40)}.{n}": ("U8", np.zeros(n % 3, np.uint8)) for n in range(300)}
    cp.write(tmp_path / "model", tensors, 3)
    found = open_checkpoint(tmp_path / "model")
    assert set(found.entries) == set(found.shard) == set(tensors)
    assert dict(found.entries) == {name: found.entries[name] for name in tensors}
    for file in found.files:
        own = found.of_file(file)
        assert all(found.shard[name] == file and found.entries[name] == entry for name, entry in own.items())
        assert list(own) == [name for name in found.entries if found.shard[name] == file]
        spans = [entry[2:] for entry in own.values()]
        assert spans == sorted(spans)
    assert "t" not in found.entries
    assert 3 not in found.entries
    assert found.nbytes == sum(array.nbytes for _, array in tensors.values())


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = cp.write(tmp_path / "model", {"a": ("U8", np.zeros(1, np.uint8)), "b": ("U8", np.zeros(1, np.uint8))}, 2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(tna.FileError, match=r"00002-of-00002\.safetensors: 'a' is also in model-00001-of"):
        open_checkpoint(folder)


# -- Holes -----------------------------------------------------------------------------------------

TERA = 1 << 40


def sparse(path: Path, header: dict[str, Any], data: bytes = b"", size: int = TERA) -> Path:
    """A file with a header, some data, and a hole for the rest."""
    content = forge.container(header, data)
    path.write_bytes(content)
    with open(path, "r+b") as file:
        file.truncate(len(content) - len(data) + size)
    if os.stat(path).st_blocks * 512 > TERA // 2:
        pytest.skip("this file system keeps holes")
    return path


def hole(start: int = 0, dtype: str = "U8", size: int = TERA) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(size - start) // (4 if dtype == "F32" else 1)], "data_offsets": [start, size]}


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    plan = tna.SuperLoRA(tna.Config(rank=1), [(4, 6)])
    tensors = {name: ("F32", array.astype("f4")) for name, array in plan.init().items()}
    header, data = forge.listed(tensors)
    recipe = {"version": 1, "config": {"rank": 1}, "targets": [["a.q", [4, 6], "q"]]}
    whole = {"__metadata__": {"tnadapt": forge.seal(recipe, tensors)}, **header, "kept.a.bias": hole(len(data))}
    sparse(tmp_path / "adapter.safetensors", whole, data)
    tna.save(tmp_path / "good.safetensors", tna.AdapterFile(plan.config, [tna.Target("a.q", (4, 6), "q")], plan.init()))
    (tmp_path / "base").mkdir()
    sparse(tmp_path / "base" / "model.safetensors", {"a.q.weight": hole(dtype="F32")})
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q"]}')
    name = "base_model.model.a.q.lora_A.weight"
    sparse(tmp_path / "peft" / "adapter_model.safetensors", {name: hole(dtype="F32")})
    return tmp_path


@pytest.mark.parametrize(
    ("value", "tokens"),
    [(b"[]", 2), (b'["a","]"]', 4), (b'{"a":[1,2],"b":{}}', 8), (b'["\\"[]",[[]], 3]', 7), (b'["", 1, "" ]', 4)],
)
def test_strings_and_brackets_of_a_value_are_counted_before_it_is_read(
    value: bytes, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json_scan.Document(b'{"a": ' + value + b"}", "the text")
    for most, refused in ((tokens, False), (tokens - 1, True)):
        monkeypatch.setattr(json_scan, "_MAX_TOKENS", most)
        if refused:
            with pytest.raises(tna.FileError, match=f"a value with more than {most} strings and brackets$"):
                list(document.members(0))
        else:
            (found,) = document.members(0)
            assert document.value(found.start, found.stop) == json.loads(value)


SPARSE: dict[str, Callable[[Path], Any]] = {
    "load": lambda at: tna.load(at / "adapter.safetensors"),
    "info": lambda at: tna.info(at / "adapter.safetensors"),
    "merge": lambda at: tna.merge(cp.write(at / "b", {"a.q.weight": ("F32", np.zeros((4, 6), np.float32))}),
                                  at / "adapter.safetensors", at / "out"),
    "convert": lambda at: tna.convert(at / "adapter.safetensors", to="peft-lora"),
    "convert from peft": lambda at: tna.convert(at / "peft"),
    "a tensor of a checkpoint": lambda at: open_checkpoint(at / "base").array("a.q.weight"),
}  # fmt: skip


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("use", SPARSE)
def test_holes_are_not_read(holes: Path, use: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(tna.FileError, match=r"has a size of 1,099,5\d\d,\d\d\d,\d\d\d bytes, and the disk holds"):
            SPARSE[use](holes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.law("allocation-limit")
def test_torch_does_not_read_holes(holes: Path) -> None:
    torch = pytest.importorskip("torch")
    import tnadapt.torch as tt

    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4)})})
    with pytest.raises(tna.FileError, match="and the disk holds"):
        tt.load(model, holes / "adapter.safetensors")


@pytest.mark.law("allocation-limit")
def test_a_checkpoint_of_holes_is_opened_and_described_in_little_memory(holes: Path) -> None:
    code = (
        "import resource, sys, tnadapt as tna\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "found = tna.info(sys.argv[1]); print(found['tensors'], found['bytes'])\n"
        "try: tna.load(sys.argv[2])\n"
        "except tna.FileError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(holes / "base"), str(holes / "adapter.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.startswith(f"1 {TERA}\n"), done.stderr
    assert "the rest is holes, and was not read" in done.stdout


def test_zeros_that_a_file_system_leaves_out_are_read(tmp_path: Path) -> None:
    # 32 MiB of holes: small sizes and a few times what is there are what compressing file systems do.
    size = 32 << 20
    path = sparse(tmp_path / "model.safetensors", {"a": hole(size=size)}, size=size)
    assert not open_checkpoint(path).array("a").any()


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZFS has it for a file that is not committed yet, and SMB servers and dataless files have it always."""
    for module in (container, checkpoint):
        monkeypatch.setattr(module, "held_bytes", lambda state: 0)
    monkeypatch.setattr(container, "_HOLES", 1 << 16)


@pytest.mark.usefixtures("no_blocks")
def test_data_are_read_where_the_system_counts_no_blocks_of_them(tmp_path: Path) -> None:
    data = bytes(range(1, 256)) * 1024
    path = tmp_path / "model.safetensors"
    path.write_bytes(forge.container({"a": hole(size=len(data))}, data))
    assert open_checkpoint(path).array("a").tobytes() == data
    with container.opened(str(path)) as file:
        assert [file.array("a").tobytes() for _ in range(2)] == [data, data]


@pytest.mark.usefixtures("no_blocks")
def test_the_data_of_a_file_with_holes_are_added_up(tmp_path: Path) -> None:
    size, data = 1 << 24, b"d" * (1 << 16)
    path = sparse(tmp_path / "model.safetensors", {"a": hole(size=size)}, data, size)
    with open(path, "r+b") as file:
        file.seek(1 << 23)
        file.write(data)
    with pytest.raises(tna.FileError, match=r"the disk holds 1[34]\d,\d\d\d of it: the rest is holes"):
        open_checkpoint(path).array("a")


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_whose_holes_the_system_does_not_know_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data = bytes(1 << 18)
    path = tmp_path / "model.safetensors"
    path.write_bytes(forge.container({"a": hole(size=len(data))}, data))
    real = os.lseek

    def lseek(handle: int, at: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(number, os.strerror(number))
        return real(handle, at, how)

    monkeypatch.setattr(os, "lseek", lseek)
    assert open_checkpoint(path).array("a").tobytes() == data
    monkeypatch.delattr(os, "SEEK_DATA")
    assert open_checkpoint(path).array("a").tobytes() == data


def test_json_says_where_it_is_wrong() -> None:
    with pytest.raises(tna.FileError, match=r"the header is not JSON: expected ':' at byte 4; got '1}'"):
        read_header(b'{"a"1}', False)
    with pytest.raises(tna.FileError, match="the text must be a JSON object; got"):
        strict_json("3", "the text")
