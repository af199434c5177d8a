"""Models on disk: one file, several with an index, and all ways in which they can be damaged."""

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
from packaging.version import Version
from safetensors.numpy import save_file

from tests.support import forge
from tnadapt import FileError
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import FOREIGN, Entries


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "layers.0.q.weight": rng.normal(size=(4, 3)).astype(np.float16),
        "layers.0.norm": rng.normal(size=4),
        "count": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }


def sharded(folder: Path, parts: int = 2, **changes: Any) -> Path:
    """A checkpoint in parts, and its index; ``changes`` go into the weight map."""
    folder.mkdir(exist_ok=True)
    places = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = {key: value for place, (key, value) in enumerate(tensors().items()) if place % parts == part}
        save_file(own, folder / name, {"format": "pt"})
        places |= dict.fromkeys(own, name)
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
    import safetensors

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


def test_part_of_a_byte_is_no_tensor(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}
    (tmp_path / "model.safetensors").write_bytes(forge.container(header, b"1"))
    assert "not a whole number of bytes" in refused(tmp_path)


# -- What is wrong with it ------------------------------------------------------------------------


def test_no_such_thing(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"
    assert "empty folder" in refused(tmp_path)
    assert "must be a string or PathLike" in refused("")
    assert "must be a string or PathLike" in refused("a\0b")
    (tmp_path / "readme.txt").write_text("")
    assert "has no safetensors file; it has readme.txt" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert (
        "has no safetensors file: pytorch_model.bin can run arbitrary code when opened, and was not opened"
        in refused(tmp_path)
    )


@pytest.mark.law("pickle-refused")
def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert "is a pickle" in refused(tmp_path)
    message = refused(tmp_path / "model.safetensors")
    assert message.count("model.safetensors") == 1


def test_several_unrelated_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    assert "has a.safetensors, b.safetensors, and nothing says which is the model" in refused(tmp_path)
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
    message = refused(tmp_path)
    assert "'embed.weight' is in model-00002-of-00002.safetensors; it is in model-00001-of-00002.safetensors" in message
    sharded(tmp_path)
    save_file({**tensors(), "new": np.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert "is also in model-00001-of-00002.safetensors" in refused(tmp_path)
    own = {key: value for place, (key, value) in enumerate(tensors().items()) if place % 2 == 0}
    save_file({**own, "new": np.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
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


@pytest.mark.law("merge-disk-faults")
def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(tmp_path).startswith(f"{path}: is cut off")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    last = max(found.entries, key=lambda name: found.entries[name].stop)
    with pytest.raises(FileError, match=f"ended within '{last}'"):
        found.array(last)


@pytest.mark.parametrize("parts", [1, 2])
def test_tensors_of_a_file_come_in_the_order_of_their_bytes(tmp_path: Path, parts: int) -> None:
    # A header may list them in any order: one that is written anew, and the reading of a file, follow the bytes.
    arrays = {f"t{number}": ("U8", np.full(number + 1, number, np.uint8)) for number in (3, 0, 2, 1)}
    places = {}
    for part in range(parts):
        own = {name: value for place, (name, value) in enumerate(arrays.items()) if place % parts == part}
        header, data = forge.listed(own, list(own))
        name = f"model-{part}.safetensors"
        turned = dict(sorted(header.items()))
        assert parts > 1 or list(turned) != list(header)
        (tmp_path / name).write_bytes(forge.container(turned, data))
        places |= dict.fromkeys(own, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = open_checkpoint(tmp_path)
    for file in found.files:
        entries = found.of_file(file)
        starts = [entry.start for entry in entries.values()]
        assert starts == sorted(starts)
        assert list(entries) == [name for name in arrays if found.shard[name] == file]
    assert sum(len(found.of_file(file)) for file in found.files) == len(arrays)


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


def test_names_of_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnadapt.checkpoints.container.hash", lambda name: len(name), raising=False)
    entries = Entries()
    for i in range(5):
        entries.add(f"{i}".encode(), "F32", b"1", 4 * i, 4 * i + 4)
    entries.index()
    assert [entries[f"{i}"].start for i in range(5)] == [0, 4, 8, 12, 16]
    for missing in ("9", "10", 3):
        assert missing not in entries
        with pytest.raises(KeyError):
            entries[missing]  # type: ignore[index]
