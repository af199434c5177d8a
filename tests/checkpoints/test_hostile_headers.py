"""Claims of a file take no memory: at most four times its header before it is rejected, and nothing for its holes.

Headers have 1 MiB each; with ``HYPOTHESIS_PROFILE=long`` 62 MiB.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tests.support import forge
from tests.support.depth import LONG, in_depth
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import MAX_METADATA, read_header, strict_json

from .internals import container

SIZE = (62 << 20) if LONG else (1 << 20)
FACTOR = 4
#: Beside that: a value of 64 KiB that is converted, or the metadata's 4096 entries.
BESIDE = 2 << 20
#: In a default run.
FEW = [
    "deep lists", "tiny keys", "one key in an entry", "a long name", "a long string of escapes",
    "many entries in another order", "recipe of a string", "recipe of keys", "recipe of labels that are lists",
]  # fmt: skip


def filled(head: str, parts: Iterator[str], tail: str, size: int) -> str:
    """A text of about so many bytes."""
    found, length = [head], len(head.encode()) + len(tail.encode())
    for part in parts:
        length += len(part.encode())
        if length > size:
            break
        found.append(part)
    return "".join(found) + tail


def repeated(part: str) -> Iterator[str]:
    """A part again and again, in pieces that are made fast."""
    return itertools.repeat(part * 100)


def named(part: str) -> Iterator[str]:
    """A part again and again, each with another number in hex where it has ``@``."""
    return (part.replace("@", f"{number:x}") for number in itertools.count())


def many_targets(size: int) -> str:
    """An array of targets that are right."""
    return filled("[", named('["@",[1,1],"q"],'), '["~",[1,1],"q"]]', size)


def in_entry(recipe: str, escape: bool = True) -> str:
    """A header whose entry ``tnadapt`` is that text."""
    text = json.dumps(recipe, ensure_ascii=False) if escape else f'"{recipe}"'
    return f'{{"__metadata__":{{"tnadapt":{text}}}}}'


def scalars() -> Iterator[str]:
    return (f'"{n:x}":{{"dtype":"U8","shape":[],"data_offsets":[{n},{n + 1}]}},' for n in itertools.count())


LAST = '"~":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
RECIPE = '{"version":1,"config":%s,"sha256":"' + "0" * 64 + '","targets":%s}'
ONE_TARGET = '[["a",[1,1],"q"]]'
LABELS = RECIPE[:-1] % ("{}", ONE_TARGET) + ',"pretrained":{},"labels":['

#: What makes the text of a header of so many bytes.
HEADERS: dict[str, Callable[[int], str]] = {
    "deep lists": lambda size: '{"a":' + "[" * (size // 2) + "]" * (size // 2) + "}",
    "lists": lambda size: filled('{"a":[', repeated("[],"), "[]]}", size),
    "tiny keys": lambda size: filled("{", named('"@":1,'), '"~":1}', size),
    "one key in an entry": lambda size: filled('{"a":{', repeated('"dtype":1,'), '"dtype":1}}', size),
    "numbers": lambda size: filled('{"a":{"dtype":"U8","shape":[', repeated("1,"), '1],"data_offsets":[0,1]}}', size),
    "a long name": lambda size: filled('{"', repeated("name"), LAST[2:], size),
    "a long string of escapes": lambda size: filled(
        '{"__metadata__":{"a":"', repeated("\\n"), '\\ud83d\\ude00"}}', size
    ),
    "many scalars": lambda size: filled("{", scalars(), LAST, size),
    "many entries in another order": lambda size: filled(
        "{", named('"@":{"data_offsets":[0,0],"dtype":"U8","shape":[0]},'), LAST, size
    ),
    "many shapes": lambda size: filled(
        "{", named(f'"@":{{"dtype":"U8","shape":[{"1," * 62}0],"data_offsets":[0,0]}},'), LAST, size
    ),
    "no end": lambda size: filled("{", scalars(), '"~', size),
    "recipe of a string": lambda size: in_entry("x" * size + "😀"),
    "recipe of keys": lambda size: in_entry(filled("{", named('"@":1,'), '"~":1}', size * 3 // 4)),
    "recipe of groups and targets": lambda size: in_entry(
        RECIPE % (filled('{"groups":[', repeated("[0],"), "[0]]}", size * 7 // 20), many_targets(size * 9 // 20))
    ),
    "recipe of trained and a target": lambda size: in_entry(
        RECIPE % (filled('{},"trained":[', repeated('"",'), '""]', size * 3 // 5), ONE_TARGET)
    ),
    "recipe of labels": lambda size: in_entry(filled(LABELS, repeated('"a",'), '"a"]}', size)),
    "recipe of labels that are lists": lambda size: in_entry(
        filled(LABELS, itertools.repeat(f"[{'[],' * 20_000}[]],"), '"a"]}', size)
    ),
    "recipe of targets": lambda size: in_entry(RECIPE % ("{}", many_targets(size * 3 // 4))),
    "recipe of escapes": lambda size: in_entry(filled("", repeated("\\u007b"), "", size), escape=False),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("kind", in_depth(HEADERS, FEW))
def test_memory_before_a_header_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.safetensors"
    text = HEADERS[kind](SIZE).encode()
    path.write_bytes(forge.container(text, bytes(text.count(b'"shape":[],'))))
    length = len(text)

    def refused() -> None:
        with pytest.raises(tna.FileError, match=f"^{path}: "):
            tna.load(path)

    peak = peak_of(refused)
    # Targets and tensors that are right are objects as soon as they are read, of a few hundred bytes each; there may be
    # 131,072 and 524,288 of them.
    beside = (64 << 20) if kind == "recipe of targets" else BESIDE
    beside += min(text.count(b'"dtype":"U8"'), 1 << 19) * (800 if kind == "many shapes" else 300)
    if kind == "recipe of groups and targets":  # some 20 bytes of header each
        beside += min(length // 20, 1 << 17) * 1024
    assert peak <= FACTOR * length + beside, f"{peak / length:.2f} times the header"


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


def test_entries_of_metadata_are_counted() -> None:
    header, more = (
        json.dumps({"__metadata__": {f"{number}": "" for number in range(count)}}).encode()
        for count in (MAX_METADATA, MAX_METADATA + 1)
    )
    assert len(read_header(header, False)[1]) == MAX_METADATA
    with pytest.raises(tna.FileError, match="more than 4096 entries of __metadata__"):
        read_header(more, False)


def test_tensors_targets_and_values_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are lowered: at their own size each takes seconds."""
    path = tmp_path / "adapter.safetensors"
    tna.save(path, cp.adapter(tna.presets.lora(1), [tna.Target(f"{i}", (2, 2), "q") for i in range(3)]))
    for limit, most, why in (
        ("container.MAX_TENSORS", 6, "the header has more than 5 tensors, and no model has as many"),
        ("adapter_format._MAX_TARGETS", 3, "has more than 2 targets, and no model has as many weights to adapt"),
    ):
        monkeypatch.setattr(f"tnadapt.checkpoints.{limit}", most)
        assert len(tna.load(path).targets) == 3
        monkeypatch.setattr(f"tnadapt.checkpoints.{limit}", most - 1)
        with pytest.raises(tna.FileError, match=why):
            tna.load(path)
        monkeypatch.undo()


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
    plan = tna.UpdatePlan(tna.Config(rank=1), [(4, 6)])
    tensors = {name: ("F32", array.astype("f4")) for name, array in plan.init().items()}
    header, data = forge.listed(tensors)
    recipe = {"version": 1, "config": {"rank": 1}, "targets": [["a.q", [4, 6], "q"]]}
    whole = {"__metadata__": {"tnadapt": forge.seal(recipe, tensors)}, **header, "kept.a.bias": hole(len(data))}
    sparse(tmp_path / "adapter.safetensors", whole, data)
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
    for most, refused in ((tokens, False), (tokens - 1, True)):
        monkeypatch.setattr(container, "_MAX_TOKENS", most)
        text = container.JsonText(b" " + value + b" ", "the text", 1)
        if refused:
            with pytest.raises(tna.FileError, match=f"a value with more than {most} strings and brackets$"):
                text.value()
        else:
            assert text.value() == json.loads(value)


SPARSE: dict[str, Callable[[Path], Any]] = {
    "load": lambda at: tna.load(at / "adapter.safetensors"),
    "info": lambda at: tna.info(at / "adapter.safetensors"),
    "merge": lambda at: tna.merge(cp.write(at / "b", {"a.q.weight": ("F32", np.zeros((4, 6), np.float32))}),
                                  at / "adapter.safetensors", at / "out"),
    "convert": lambda at: tna.convert(at / "adapter.safetensors", to="peft-lora"),
    "convert from peft": lambda at: tna.convert(at / "peft"),
    "a tensor of a checkpoint": lambda at: open_checkpoint(at / "base").array("a.q.weight"),
    "torch": lambda at: tna.torch.load(pytest.importorskip("torch").nn.Linear(6, 4), at / "adapter.safetensors"),
}  # fmt: skip


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("use", SPARSE)
def test_holes_are_not_read(holes: Path, use: str) -> None:
    if use == "torch":
        pytest.importorskip("torch")

    def refused() -> None:
        why = r"has a size of 1,099,5[\d,]{10} bytes, and the disk holds .* the rest is holes, and was not read"
        with pytest.raises(tna.FileError, match=why):
            SPARSE[use](holes)

    assert peak_of(refused) < (8 << 20 if use != "torch" else 1 << 30)


@pytest.mark.law("allocation-limit")
def test_a_checkpoint_of_holes_is_described_in_little_memory(holes: Path) -> None:
    found = []
    assert peak_of(lambda: found.append(tna.info(holes / "base"))) < 8 << 20
    assert (found[0]["tensors"], found[0]["bytes"]) == (1, TERA)


def test_zeros_that_a_file_system_leaves_out_are_read(tmp_path: Path) -> None:
    # 32 MiB of holes: small sizes and a few times what is there are what compressing file systems do.
    size = 32 << 20
    path = sparse(tmp_path / "model.safetensors", {"a": hole(size=size)}, size=size)
    assert not open_checkpoint(path).array("a").any()


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZFS has it for a file that is not committed yet, and SMB servers and dataless files have it always."""
    monkeypatch.setattr(container, "held_bytes", lambda state: 0)
    monkeypatch.setattr(container, "_HOLES", 1 << 16)


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("failure", [0, errno.EINVAL, errno.EOPNOTSUPP, None])
def test_data_are_read_where_the_system_knows_neither_blocks_nor_perhaps_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None
) -> None:
    data, real = bytes(range(256)) * 1024, os.lseek
    path = tmp_path / "model.safetensors"
    path.write_bytes(forge.container({"a": hole(size=len(data))}, data))

    def lseek(handle: int, at: int, how: int) -> int:
        if failure and how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(failure, os.strerror(failure))
        return real(handle, at, how)

    monkeypatch.setattr(os, "lseek", lseek)
    if failure is None:
        monkeypatch.delattr(os, "SEEK_DATA")
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


def test_json_says_where_it_is_wrong() -> None:
    with pytest.raises(tna.FileError, match=r"the header is not JSON: expected a key in quotes and ':' at byte 1; got"):
        read_header(b'{"a"1}', False)
    with pytest.raises(tna.FileError, match="the text must be a JSON object; got"):
        strict_json("3", "the text")
