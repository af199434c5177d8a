"""Safetensors files and models of them on disk: strict reading, and all ways in which they can be damaged."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from packaging.version import Version
from safetensors.numpy import save_file

from tests.support import forge
from tnadapt import FileError
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import (
    DTYPES,
    FOREIGN,
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
    for padding in (0, 100):
        found = read(write(tmp_path, forge.container(json.dumps(header) + padding * " ", data, pad=False)))
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
    with safetensors.safe_open(path, "numpy") as theirs, opened(path) as ours:
        assert theirs.metadata() is None
        assert dict(ours.metadata) == {}
        assert ours.array("a").tobytes() == theirs.get_tensor("a").tobytes()


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**ONE["a"], **changes}}


#: Tensors that do not fit 8 bytes, or are none.
MISFITS: list[tuple[dict[str, Any], str]] = [
    (entry(extra=1), "must be an object of dtype, shape and data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "must be an object of dtype, shape and data_offsets"),
    (entry(dtype="F31"), "has the dtype 'F31'; expected one of F64"),
    (entry(dtype=["F32"]), "has the dtype"),
    (entry(dtype="I64"), "needs 16 bytes"),
    (entry(shape=2), "has the shape 2"),
    (entry(shape=[2.0]), "has the shape"),
    (entry(shape=[True, 2]), "has the shape"),
    (entry(shape=[-1, -2]), "has the shape"),
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
]


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04", "is a zip archive, as torch.save makes it of a pickle"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive, as torch.save makes it of a pickle"),
        (b"PK\x03\x05" + bytes(100), r"its ninth byte must be '{'; it begins with b'PK\x03\x05\x00"),
        (b"\x80\x02" + bytes(100), "is a pickle, which can run arbitrary code"),
        (b"\x80\x10" + bytes(100), "is a pickle, which can run arbitrary code"),
        (b"\x80\x11" + bytes(100), r"its ninth byte must be '{'; it begins with b'\x80\x11\x00"),
        (b"text,label\n", r"is not a safetensors file: its ninth byte must be '{'; it begins with b'text,label\n'"),
        (b"", "not a safetensors file: it has 0 bytes"),
        (b"1234567", "not a safetensors file: it has 7 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header would have 9223372036854775808 bytes, and 2 are"),
        ((9).to_bytes(8, "little") + b"{}", "header would have 9 bytes, and 2 are there"),
        (b"GGUF" + bytes(100), "is a GGUF file, where a safetensors file is expected"),
        ((0).to_bytes(8, "little"), "its ninth byte must be '{'"),
        ((0).to_bytes(8, "little") + b"{}", "does not end with '}'"),
        (forge.container("[]"), "its ninth byte must be '{'"),
        (forge.container(" {}"), "its ninth byte must be '{'"),
        (forge.container("{}\x0b", pad=False), "does not end with '}'"),
        (forge.container("{}\0", pad=False), "does not end with '}'"),
        (forge.container(b'{"\xff": 1}'), "the header is not UTF-8"),
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
        (forge.container('{"__metadata__": null, "__metadata__": {}}'), "the key '__metadata__' twice"),
        (forge.container('{"\\ud800": 1}'), "has half a surrogate pair, and is not a valid name"),
        (forge.container({"a": 1}), "must be an object of dtype, shape and data_offsets"),
        (forge.container(ONE, b"1234567"), "cut off or too long: the tensors have 8 bytes, and 7 follow"),
        (forge.container(ONE, b"123456789"), "cut off or too long: the tensors have 8 bytes, and 9 follow"),
        *((forge.container(header, bytes(8)), why) for header, why in MISFITS),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    assert why in refusal(tmp_path, content)


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


def test_a_length_that_begins_like_a_pickle_is_a_length(tmp_path: Path) -> None:
    for start in (b"\x80\x02", b"\x80\x04", b"PK"):
        assert read(write(tmp_path, start.ljust(8, b"\0") + b"{}".ljust(int.from_bytes(start, "little")))) == {}


def test_about_names_the_path_whatever_happens() -> None:
    for error in (FileError("it"), OSError(28, "it"), MemoryError(), OverflowError("it")):
        with pytest.raises(FileError, match=r"^some/path: .*it") as caught, file_error_context("some/path"):
            raise error
        assert caught.value.__cause__ is error


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "embed.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "layers.0.q.weight": rng.normal(size=(4, 3)).astype(np.float16),
        "layers.0.norm": rng.normal(size=4),
        "count": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }


def sharded(folder: Path, **changes: Any) -> Path:
    """A checkpoint in two parts, and its index; ``changes`` go into the weight map."""
    folder.mkdir(exist_ok=True)
    places = {}
    for part in range(2):
        name = f"model-{part + 1:05}-of-00002.safetensors"
        stored = dict(list(tensors().items())[part::2])
        save_file(stored, folder / name, {"format": "pt"})
        places |= dict.fromkeys(stored, name)
    index = {"metadata": {"total_size": 1}, "weight_map": {**places, **changes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(path: Path | str) -> str:
    with pytest.raises(FileError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("given", ["folder", "file", "index", "shards"])
def test_it_reads_what_safetensors_writes(tmp_path: Path, given: str) -> None:
    if given in ("index", "shards"):
        path = sharded(tmp_path)
        path = path / "model.safetensors.index.json" if given == "index" else path
    else:
        save_file(tensors(), tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors" if given == "file" else tmp_path
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found = open_checkpoint(path)
    assert found.path == str(path)
    assert found.config == {"model_type": "bert"}
    assert found.entries.keys() == found.shard.keys() == tensors().keys()
    assert (found.index is not None) == (given in ("index", "shards"))
    assert found.nbytes == sum(array.nbytes for array in tensors().values())
    for name, array in tensors().items():
        assert found.shard[name] in found.files
        assert found.entries[name].shape == array.shape
        assert np.array_equal(found.array(name), array)
        # The place that is said is where the bytes are.
        start = found.data[found.shard[name]] + found.entries[name].start
        assert Path(found.shard[name]).read_bytes()[start : start + array.nbytes] == array.tobytes()


def test_a_folder_of_another_name(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "diffusion_pytorch_model.safetensors")
    found = open_checkpoint(tmp_path)
    assert found.files == (str(tmp_path / "diffusion_pytorch_model.safetensors"),)
    assert found.config is None


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"[]", "must be a JSON object"), (b"{", "is not JSON"), (b'{"a": "\xff"}', "UTF-8"), (b" " * (1 << 24), "JSON"),
     (b" " * ((1 << 24) + 1), "longer than 16777216 bytes")],
)  # fmt: skip
def test_a_config_that_is_none_is_said_when_it_is_looked_at(tmp_path: Path, content: bytes, why: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    found = open_checkpoint(tmp_path)
    with pytest.raises(FileError, match=rf"config\.json: .*{why}"):
        _ = found.config


@pytest.mark.parametrize("tag", sorted(FOREIGN))
def test_dtypes_that_numpy_lacks_are_carried(tmp_path: Path, tag: str) -> None:
    count = 8
    nbytes = count * FOREIGN[tag] // 8
    header = {
        "a": {"dtype": tag, "shape": [2, 4], "data_offsets": [0, nbytes]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [nbytes, nbytes + 4]},
    }
    content = forge.container(header, bytes(nbytes) + np.float32(2.0).tobytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    found = open_checkpoint(tmp_path)
    assert found.entries["a"] == (tag, (2, 4), 0, nbytes)
    assert found.array("b").tolist() == [2.0]
    with pytest.raises(FileError, match=f"'a' is {tag}, which NumPy does not have"):
        found.array("a")
    try:
        theirs = dict(safetensors.deserialize(content))  # they know it, too, and count its bytes as we do
    except safetensors.SafetensorError as error:
        # Until 0.6 the message does not say what it is about.
        if "unknown variant" not in str(error) and Version(safetensors.__version__) >= Version("0.6"):
            raise
        pytest.skip(f"safetensors {safetensors.__version__} does not know {tag}: {error}")
    assert len(theirs["a"]["data"]) == nbytes


@pytest.mark.law("pickle-refused", "merge-disk-faults")
def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"
    (tmp_path / "trained.safetensors").mkdir()
    meant = f"; did you mean {str(tmp_path / 'trained.safetensors')!r}?"
    assert refused(tmp_path / "traind.safetensors").endswith(f"No such file or directory{meant}")
    # A suffix that all files share makes no names similar.
    assert refused(tmp_path / "none.safetensors").endswith("No such file or directory")
    (tmp_path / "trained.safetensors").rmdir()
    assert "empty folder" in refused(tmp_path)
    for path in ("", "a\0b"):
        assert f"a path must be a string or PathLike that can name a file; got {path!r}" in refused(path)
    (tmp_path / "readme.txt").write_text("")
    assert "has no safetensors file; it has readme.txt" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    why = "has no safetensors file: pytorch_model.bin can run arbitrary code when opened, and was not opened"
    assert why in refused(tmp_path)
    file = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}
    for content, why in (
        (b"\x80\x02}q\x00.", "is a pickle"),
        (forge.container(header, b"1"), "not a whole number of bytes"),
    ):
        file.write_bytes(content)
        assert why in refused(tmp_path)
        assert refused(file).count("model.safetensors") == 1
    file.unlink()
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(tmp_path).startswith(f"{shard}: is cut off")


def test_several_unrelated_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    why = "has a.safetensors, b.safetensors, and nothing says which is the model: give the path of one"
    assert why in refused(tmp_path)
    sharded(tmp_path)
    assert len(open_checkpoint(tmp_path).files) == 2  # the index says
    save_file(tensors(), tmp_path / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    assert "nothing says which is the model" in refused(tmp_path)


@pytest.mark.law("bad-tensors")
def test_index_and_files_disagree(tmp_path: Path) -> None:
    sharded(tmp_path, **{"more.weight": "model-00001-of-00002.safetensors"})
    assert "says that 'more.weight' is in model-00001-of-00002.safetensors; it is in none of its files" in refused(
        tmp_path
    )
    sharded(tmp_path, **{"embed.weight": "model-00002-of-00002.safetensors"})
    why = "'embed.weight' is in model-00002-of-00002.safetensors; it is in model-00001-of-00002.safetensors"
    assert why in refused(tmp_path)
    sharded(tmp_path)
    save_file({**tensors(), "new": np.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert "is also in model-00001-of-00002.safetensors" in refused(tmp_path)
    first = dict(list(tensors().items())[::2])
    save_file({**first, "new": np.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert "does not list 'new', which is in model-00001-of-00002.safetensors" in refused(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lists files that are not there: model-00002-of-00002.safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "place",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors", "C:x.safetensors",
     "x\0.safetensors", "x\n.safetensors", "x.bin", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_that_lead_elsewhere(tmp_path: Path, place: Any) -> None:
    sharded(tmp_path, **{"embed.weight": place})
    message = refused(tmp_path)
    assert "model.safetensors.index.json: says that 'embed.weight' is in" in message
    assert "expected the name of a" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1, "a": 1}}', b"\xff",
     b'{"weight_map": ' + b"[" * 100000, b'{"weight_map": {"a": NaN}}'],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert refused(tmp_path).startswith(f"{path}: ")
    assert refused(path).startswith(f"{path}: ")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    last = max(found.entries, key=lambda name: found.entries[name].stop)
    with pytest.raises(FileError, match=f"ended within '{last}'"):
        found.array(last)


def test_tensors_of_a_file_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    # A header may list them in any order: one that is written anew, and the reading of a file, follow the bytes.
    arrays = {f"t{number}": ("U8", np.full(number + 1, number, np.uint8)) for number in (3, 1, 2, 0)}
    places = {}
    for part in range(2):
        own = {name: arrays[name] for name in [*arrays][part::2]}
        header, data = forge.listed(own, list(own))
        assert sorted(header) != list(header)
        (tmp_path / f"model-{part}.safetensors").write_bytes(forge.container(dict(sorted(header.items())), data))
        places |= dict.fromkeys(own, f"model-{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = open_checkpoint(tmp_path)
    assert [[*found.of_file(file)] for file in found.files] == [["t3", "t2"], ["t1", "t0"]]


def test_a_pickle_finds_its_tensors_in_another_process(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "model"))
    (tmp_path / "checkpoint.pkl").write_bytes(pickle.dumps(checkpoint))
    code = (
        "import pickle, sys; found = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for name in found.entries: print(name, tuple(found.entries[name]), found.shard[name])"
    )
    lines = [f"{name} {tuple(entry)} {checkpoint.shard[name]}" for name, entry in checkpoint.entries.items()]
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "checkpoint.pkl")],
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.stderr, done.stdout.splitlines()) == ("", lines)
