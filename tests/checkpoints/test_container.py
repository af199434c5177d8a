"""The safetensors container: strict reading and atomic writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from tests.support import forge
from tnadapt import FileError
from tnadapt.checkpoints.container import (
    DTYPES,
    MAX_HEADER,
    file_error_context,
    opened,
    raw_dtype,
    serialized,
)

EMPTY = '{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(folder: Path, content: bytes) -> str:
    path = folder / "file.safetensors"
    forge.write(path, content)
    return str(path)


def read(path: str) -> dict[str, np.ndarray]:
    with file_error_context(path), opened(path) as container:
        return {name: container.array(name) for name in container.entries}


def refusal(folder: Path, content: bytes) -> str:
    path = write(folder, content)
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value).startswith(path)
    return str(caught.value)


# -- Reading what is right ----------------------------------------------------------------------


@pytest.mark.law("independent-readers")
def test_it_reads_what_safetensors_writes_and_the_other_way_round(tmp_path: Path, rng: np.random.Generator) -> None:
    shapes: list[tuple[int, ...]] = [(2, 3), (), (0, 4), (5,)]
    tensors = {}
    for number, tag in enumerate(DTYPES):
        raw = rng.integers(0, 2 if tag == "BOOL" else 256, 64 * 8, dtype=np.uint8)
        shape = shapes[number % len(shapes)]
        array = raw.view(raw_dtype(tag))[: int(np.prod(shape))].reshape(shape).copy()
        tensors[f"tensor of {tag} é"] = (tag, array)
    content = serialized(tensors, {"about": "α"})
    found = read(write(tmp_path, content))
    theirs = dict(safetensors.deserialize(content))
    assert found.keys() == tensors.keys() == theirs.keys()
    for name, (tag, array) in tensors.items():
        assert found[name].tobytes() == array.tobytes() == bytes(theirs[name]["data"])
        assert found[name].shape == array.shape == tuple(theirs[name]["shape"])
        assert theirs[name]["dtype"] == tag
        assert found[name].flags.writeable


def test_it_reads_tensors_in_any_order_and_padding_of_any_length(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [8, 8]},
        "a": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
    }
    data = np.int64(7).tobytes() + np.float32(1.5).tobytes()
    for text in (json.dumps(header), json.dumps(header) + 100 * " "):
        found = read(write(tmp_path, forge.container(text, data, pad=False)))
        assert (found["a"].item(), found["b"].tolist(), found["empty"].shape) == (7, [1.5], (0, 7))


@pytest.mark.parametrize("padding", ["\n", "\t", "\r", 5000 * "\r\n", " \t\n\r "])
def test_it_reads_the_padding_that_safetensors_reads(tmp_path: Path, padding: str) -> None:
    path = write(tmp_path, forge.container(json.dumps(ONE) + padding, b"12345678", pad=False))
    with safetensors.safe_open(path, "numpy") as theirs, opened(path, foreign=True) as ours:
        assert ours.array("a").tobytes() == theirs.get_tensor("a").tobytes() == b"12345678"
    with pytest.raises(FileError, match="the header does not end with"):  # tnadapt pads its own with spaces
        read(path)


def test_it_reads_metadata_that_are_null_as_safetensors_does(tmp_path: Path) -> None:
    path = write(tmp_path, forge.container({"__metadata__": None, **ONE}, b"12345678"))
    with safetensors.safe_open(path, "numpy") as theirs:
        assert theirs.metadata() is None
        assert read(path)["a"].tobytes() == theirs.get_tensor("a").tobytes()
    with opened(path) as ours:
        assert dict(ours.metadata) == {}


# -- Refusing what is wrong ---------------------------------------------------------------------


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04", "is a zip archive, as torch.save makes it of a pickle"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive, as torch.save makes it of a pickle"),
        (b"PK\x03\x05" + bytes(100), "header would have 84101968 bytes, and 96 are there"),
        (b"\x80\x02" + bytes(100), "is a pickle, which can run arbitrary code"),
        (b"\x80\x10" + bytes(100), "is a pickle, which can run arbitrary code"),
        (b"\x80\x11" + bytes(100), "header would have 4480 bytes, and 94 are there"),
        (b"", "not a safetensors file: it has 0 bytes"),
        (b"1234567", "not a safetensors file: it has 7 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header would have 9223372036854775808 bytes, and 2 are"),
        ((9).to_bytes(8, "little") + b"{}", "header would have 9 bytes, and 2 are there"),
        (b"GGUF" + bytes(100), "is a GGUF file, where a safetensors file is expected"),
        ((0).to_bytes(8, "little"), "does not begin with '{'"),
        ((0).to_bytes(8, "little") + b"{}", "does not end with '}'"),
        (forge.container("[]"), "does not begin with '{'"),
        (forge.container(" {}"), "does not begin with '{'"),
        (forge.container("{}\x0b", pad=False), "does not end with '}'"),
        (forge.container("{}\0", pad=False), "does not end with '}'"),
        (forge.container(b'{"\xff": 1}'), "is not UTF-8"),
        (forge.container("{nothing}"), "is not JSON"),
        (forge.container('{"a": NaN}'), "not finite"),
        (forge.container('{"a": -Infinity}'), "not finite"),
        (forge.container('{"a": 1e999}'), "not finite"),
        (forge.container('{"a": ' + "9" * 5000 + "}"), "is not JSON"),
        (forge.container('{"a": ' + "[" * 100000 + "]" * 100000 + "}"), "nested too deep"),
        (forge.container('{"a": ' + '{"a":' * 100000 + "1" + "}" * 100001), "nested too deep"),
        (forge.container(f'{{"a": {EMPTY}, "a": {EMPTY}}}'), "the key 'a' twice"),
        (forge.container('{"__metadata__": {}, "__metadata__": {}}'), "the key '__metadata__' twice"),
        (forge.container('{"__metadata__": {"a": "", "\\u0061": ""}}'), "the key 'a' twice"),
        (forge.container('{"a": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": []}}'), "'dtype' twice"),
        (forge.container(f'{{"a": {EMPTY}, "\\u0061": {EMPTY}}}'), "the key 'a' twice"),
        (forge.container({"__metadata__": {"a": 1}}), "an object of strings"),
        (forge.container({"__metadata__": ["a"]}), "an object of strings"),
        (forge.container({"__metadata__": True}), "an object of strings"),
        (forge.container({"__metadata__": {"a": None}}), "an object of strings"),
        (forge.container('{"__metadata__": null, "__metadata__": {}}'), "the key '__metadata__' twice"),
        (forge.container('{"\\ud800": 1}'), "has half a surrogate pair, and is not a valid name"),
        (forge.container({"a": 1}), "must be an object of dtype, shape and data_offsets"),
        (forge.container(ONE, b"1234567"), "cut off or too long: the tensors have 8 bytes, and 7 follow"),
        (forge.container(ONE, b"123456789"), "cut off or too long: the tensors have 8 bytes, and 9 follow"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    assert why in refusal(tmp_path, content)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**ONE["a"], **changes}}


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("header", "why"),
    [
        (entry(extra=1), "must be an object of dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "must be an object of dtype, shape and data_offsets"),
        (entry(dtype="F31"), "has the dtype 'F31'; expected one of F64"),
        (entry(dtype=["F32"]), "has the dtype"),
        (entry(dtype="I64"), "needs 16 bytes"),
        (entry(shape=2), "has the shape 2"),
        (entry(shape=[2.0]), "has the shape"),
        (entry(shape=[True, 2]), "has the shape"),
        (entry(shape=[-1, -2]), "has the shape"),
        (entry(shape=["2"]), "has the shape"),
        (entry(shape=[1] * 64 + [2]), "expected up to 64"),
        (entry(shape=[1 << 80]), "has the shape"),
        (entry(shape=[1 << 40, 1 << 40]), "more than 2**62 bytes"),
        (entry(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]), "more than 2**62 bytes"),
        (entry(shape=[3]), "needs 12 bytes; its data_offsets 0 and 8"),
        (entry(data_offsets=[8, 0]), "needs 8 bytes"),
        (entry(data_offsets=[0]), "expected two natural numbers"),
        (entry(data_offsets=[0, 8, 8]), "expected two natural numbers"),
        (entry(data_offsets=[-8, 0]), "expected two natural numbers"),
        (entry(data_offsets=[0.0, 8.0]), "expected two natural numbers"),
        (entry(data_offsets={"0": 0, "1": 8}), "expected two natural numbers"),
        (entry(data_offsets=[8, 16]), "leaves a hole before it"),
        ({**ONE, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "overlaps the tensor before it"),
        ({**ONE, "b": ONE["a"]}, "overlaps the tensor before it"),
        ({**ONE, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, "overlaps the tensor before it"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, header: dict[str, Any], why: str) -> None:
    assert why in refusal(tmp_path, forge.container(header, bytes(8)))


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    header = {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    assert read(write(tmp_path, forge.container(header, b"\0\1\1")))["a"].tolist() == [False, True, True]
    assert "bytes other than 0 and 1" in refusal(tmp_path, forge.container(header, b"\0\2\1"))


@pytest.mark.law("allocation-limit")
def test_a_header_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with open(path, "wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER + 100)  # a hole, which takes no space on the disk
    with pytest.raises(FileError, match=r"file\.safetensors: has a header of 67108865 bytes; at most"):
        read(str(path))


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_length_that_begins_like_a_pickle_is_a_length(tmp_path: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + b"{}".ljust(length)
    assert content[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    assert read(write(tmp_path, content)) == {}


def test_about_names_the_path_whatever_happens() -> None:
    for error in (FileError("it"), OSError(28, "it"), MemoryError(), OverflowError("it")):
        with pytest.raises(FileError, match=r"^some/path: .*it") as caught, file_error_context("some/path"):
            raise error
        assert caught.value.__cause__ is error
