"""Every source of data, and the errors for bad ones."""

from __future__ import annotations

import contextlib
import io
import itertools
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.errors import FileError, TnadaptError

torch = pytest.importorskip("torch")

from tests.conftest import peak_of
from tnadapt.finetune import data as archives
from tnadapt.finetune.data import PARTS, Data, Samples, choose, divide, open_source
from tnadapt.finetune.problem import samples_digest

from .tiny_models import read


def toy(counts: list[int], test: list[int] | None = None) -> Data:
    def samples(counts: list[int], first: int) -> Samples:
        labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
        return Samples(np.arange(first, first + len(labels), dtype=np.float32), labels)

    names = tuple(f"class {index}" for index in range(len(counts)))
    return Data("toy", "image", names, samples(counts, 0), None if test is None else samples(test, 1000))


# -- Dividing ----------------------------------------------------------------------------------


@given(st.lists(st.integers(3, 40), min_size=2, max_size=6), st.integers(0, 5))
def test_the_parts_are_all_of_the_data_once_and_every_class_is_in_each(counts: list[int], seed: int) -> None:
    parts = divide(toy(counts), seed)
    assert tuple(parts) == PARTS
    everything = np.concatenate([part.inputs for part in parts.values()])
    assert sorted(everything.tolist()) == list(range(sum(counts)))
    for part in parts.values():
        assert set(part.labels) == set(range(len(counts)))
        np.testing.assert_array_equal(part.labels, toy(counts).samples.labels[part.inputs.astype(int)])
    again = divide(toy(counts), seed)
    assert all(np.array_equal(parts[name].inputs, again[name].inputs) for name in PARTS)


def test_another_seed_divides_otherwise_and_a_test_part_stays_whole() -> None:
    one, other = divide(toy([20, 20]), 0), divide(toy([20, 20]), 1)
    assert one["test"].inputs.tolist() != other["test"].inputs.tolist()
    parts = divide(toy([10, 10], [3, 4]))
    assert parts["test"].inputs.tolist() == [1000.0 + i for i in range(7)]
    assert {name: len(part) for name, part in parts.items()} == {"training": 16, "validation": 4, "test": 7}


@pytest.mark.parametrize(
    ("counts", "test", "message"),
    [
        ([10, 1], None, "class 'class 1' of toy has 1 sample; it needs at least 3"),
        ([10, 2], None, "class 'class 1' of toy has 2 samples; it needs at least 3"),
        ([10, 1], [5, 5], "class 'class 1' of toy has 1 sample; it needs at least 2"),
        ([10], None, "has 1 class"),
    ],
)
def test_too_few_samples(counts: list[int], test: list[int] | None, message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        divide(toy(counts, test))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 80))
def test_a_limit_takes_from_all_classes_alike(counts: list[int], limit: int) -> None:
    samples = toy(counts).samples
    if limit < len(counts) and limit < len(samples):
        with pytest.raises(TnadaptError, match="leaves no sample for some"):
            choose(samples, limit)
        return
    chosen = choose(samples, limit)
    assert len(chosen) == min(limit, len(samples))
    assert len(set(chosen.inputs.tolist())) == len(chosen)
    for label, count in enumerate(counts):
        taken = int((chosen.labels == label).sum())
        assert taken >= 1
        assert abs(taken - len(chosen) * count / len(samples)) <= len(counts)


def test_the_digest_sees_every_pixel_token_and_label() -> None:
    def digest(brighter: float = 0.0, label: int = 0, name: str = "training") -> str:
        inputs = torch.zeros(300, 2, 2)
        inputs[299, 1, 1] = brighter
        part: Any = SimpleNamespace(
            labels=torch.tensor([label, 1] * 150), batch=lambda indices, device: inputs[indices]
        )
        return samples_digest({name: part})

    assert digest() == digest()
    assert len({digest(), digest(brighter=0.5), digest(label=2), digest(name="test")}) == 4


# -- Tables ------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def test_a_table_with_usual_or_named_columns(tmp_path: Path) -> None:
    data = read(
        write(tmp_path / "a.csv", 'id,Text,Label\n1,"good, really",yes\n2,bad,no\n3,"two\nlines",yes\n', "utf-8-sig")
    )
    assert (data.kind, data.classes) == ("text", ("no", "yes"))
    assert list(data.samples.inputs) == ["good, really", "bad", "two\nlines"]
    assert data.samples.labels.tolist() == [1, 0, 1]
    data = read(write(tmp_path / "a.tsv", "what\tverdict\nx\t3\ny\t10\n"), "what", "verdict")
    assert (data.classes, list(data.samples.inputs)) == (("10", "3"), ["x", "y"])


LABEL_MISSING, TEXT_MISSING = "line 2: nothing in column 'label'", "line 2: nothing in column 'text'"
LABELS = '{{"text": "b", "label": {1}}}\n{{"text": {0}, "label": {2}}}\n'
ENCODED = "text,label\ngood,0\nschön,1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "is empty; expected a line of column names"),
        ("a.csv", "text,label\nfilm 1, good,1\n", "line 2: more fields than column names; a text that has commas in"),
        ("a.csv", "text;label\nx;1\n", r"a\.csv: its columns seem to be separated by ';': 'text;label'; expected com"),
        ("a.csv", "text,label,text\na,1,b\n", "has more than one column 'text'"),
        ("a.csv", "text,label\nx,  \n", LABEL_MISSING),
        ("a.csv", "text,label\n  ,1\n", TEXT_MISSING),
        ("a.csv", "text,label\nx,\n", LABEL_MISSING),
        ("a.csv", "text,label\nx\n", LABEL_MISSING),
        ("a.csv", "text,label\n,1\n", TEXT_MISSING),
        ("a.csv", 'text,label\n"x,1\n', "cannot read .* as a table"),
        ("a.csv", ENCODED.encode("latin-1"), r"a\.csv is not UTF-8; save the file in that encoding"),
        ("a.csv", ENCODED.encode("utf-16"), r"a\.csv is not UTF-8; save the file in that encoding"),
        ("a.txt", "text", r"expected a \.csv, \.tsv, \.jsonl, \.json or \.npz file, or a folder of images"),
        ("a.npz", "PK and no more", r"as an .npz of plain arrays"),
        ("nothing.csv", None, "there is no such file or folder"),
        ("/nothing/here.npz", None, "there is no such file or folder"),
        ("./nothing", None, "there is no such file or folder"),
        ("a.jsonl", '{"text": "x"', "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is \\[1\\]; expected an object with one value for each column"),
        ("a.jsonl", '{"text": "x"}\n\n{"label": "y"}\n', "line 3: column 'label' is not in every row"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.jsonl", LABELS.format('"a"', 0, "null"), "are of type NoneType, int; expected words, or integers"),
        ("a.jsonl", LABELS.format('"a"', "[0]", "[1]"), "are of type list"),
        ("a.jsonl", LABELS.format('"a"', 0.5, 1.5), "are of type float"),
        ("a.jsonl", LABELS.format("null", 0, 1), "the text of sample 1 of .* is None"),
        ("a.jsonl", LABELS.format("1", 0, 1), "the text of sample 1 of .* is 1"),
        ("a.json", '{"text": "x"}', "is not a list of objects"),
        ("a.json", '[{"text": "x"}, 3]', "entry 2 is 3; expected an object"),
        ("a.json", "[" * 100_000, "the file is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=message):
        read(name if name.startswith(".") else str(tmp_path / name))


def test_a_list_and_lines_of_json_are_the_same(tmp_path: Path) -> None:
    rows = [f'{{"text": "t{number}", "label": "{number % 2}"}}' for number in range(4)]
    lines = open_source(write(tmp_path / "a.jsonl", "\n".join(rows)))
    whole = open_source(write(tmp_path / "a.json", f"[{','.join(rows)}]"))
    assert dict(lines.columns) == dict(whole.columns)  # type: ignore[union-attr]


# -- Arrays ------------------------------------------------------------------------------------


def arrays(path: Path, **given: Any) -> str:
    np.savez(path, **given)
    return str(path)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 3), (6, 3, 8, 8), (6, 8, 8, 1)])
def test_arrays_in_every_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    data = read(arrays(tmp_path / "a.npz", x=x, y=np.array([[0], [1], [0], [2], [1], [2]])))
    assert data.classes == ("0", "1", "2")
    assert data.samples.inputs.shape[:3] == (6, 8, 8)
    assert data.samples.labels.tolist() == [0, 1, 0, 2, 1, 2]
    if shape == (6, 3, 8, 8):
        np.testing.assert_array_equal(data.samples.inputs, np.moveaxis(x, 1, 3))


def test_arrays_that_come_divided(tmp_path: Path) -> None:
    x = np.zeros((4, 5, 5), np.float64)
    path = arrays(tmp_path / "a.npz", x_train=x, y_train=["a", "b", "a", "b"], x_test=x[:2], y_test=["a", "c"])
    data = read(path)
    assert data.classes == ("a", "b", "c")
    assert data.test.labels.tolist() == [0, 2]
    assert data.samples.inputs.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": np.zeros(3)}, "holds 'z'; expected x_train, y_train"),
        ({}, "holds nothing"),
        ({"x": np.zeros((3, 4)), "y": [0, 1, 0]}, "expected images"),
        ({"x": np.zeros((3, 4, 4, 7)), "y": [0, 1, 0]}, "expected images"),
        ({"x": np.zeros((0, 4, 4)), "y": np.zeros(0, int)}, "expected images"),
        ({"x": np.zeros((3, 4, 4), np.uint8), "y": [0, 1]}, "expected 3 integers or words"),
        ({"x": np.zeros((3, 4, 4), np.uint8), "y": [0.5, 1.5, 2]}, "expected 3 integers or words"),
        ({"x": np.full((3, 4, 4), -1.0), "y": [0, 1, 0]}, "go from -1 to -1; expected 0 to 255"),
        ({"x": np.full((3, 4, 4), np.nan), "y": [0, 1, 0]}, "expected 0 to 255"),
        ({"x": np.zeros((3, 4, 4), complex), "y": [0, 1, 0]}, "expected numbers"),
        ({"images": np.array([{}, {}]), "labels": [0, 1]}, "as an .npz of plain arrays"),
        ({"x": np.zeros((2, 4, 4)), "X": np.zeros((2, 4, 4)), "y": [0, 1]}, "more than one array x"),
    ],
)
def test_bad_arrays(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        read(arrays(tmp_path / "a.npz", **given))


def test_an_archive_that_is_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 9, (20, 8, 8), np.uint8), y=np.arange(20) % 2)
    content = bytearray(path.read_bytes())
    for place in range(60, len(content), 37):
        broken = bytearray(content)
        broken[place : place + 20] = b"\xff" * 20
        path.write_bytes(broken)
        with contextlib.suppress(FileError):
            read(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("y.npy", "text")
    with pytest.raises(FileError):
        read(str(path))


def forged(path: Path, shape: tuple[int, ...], content: bytes, said: int | None) -> str:
    """Write an archive whose array x claims a shape, with the given sizes in its directory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.save(labels, np.arange(shape[0] if shape[0] < 100 else 2) % 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + content)
        archive.writestr("y.npy", labels.getvalue())
        if said is not None:
            archive.getinfo("x.npy").file_size = said + len(header.getvalue())  # what the list at the end says
    return str(path)


SHAPES = [(1 << 10, 1 << 10, 1 << 10), (1 << 31, 1 << 31), (1 << 62,), (-1, 5)]


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize(
    ("shape", "size", "said"),
    [
        *itertools.product(SHAPES, [100], [None, 1 << 30, 1 << 62]),
        ((4, 10, 10), 64 << 20, 400),  # of zeros, of which the array is 400 bytes by all that the archive says
        ((4, 10, 10), 500, 500),  # 100 bytes more than the header declares
    ],
)
def test_what_arrays_claim_costs_nothing(tmp_path: Path, shape: tuple[int, ...], size: int, said: int | None) -> None:
    refused_cheaply(forged(tmp_path / "a.npz", shape, bytes(size), said))


def refused_cheaply(path: str) -> None:
    def refused() -> None:
        with pytest.raises(FileError, match=r"as an \.npz of plain arrays"):
            read(path)

    refused()  # it imports what it needs
    assert peak_of(refused) < 1 << 20


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize(
    ("method", "start"),
    [
        (zipfile.ZIP_DEFLATED, b"\x93NUMPY\x02\x00" + (64 << 20).to_bytes(4, "little")),
        (zipfile.ZIP_BZIP2, b""), (zipfile.ZIP_LZMA, b""),
    ],
    ids=["header", "bzip2", "lzma"],
)  # fmt: skip
def test_headers_of_any_length_and_other_packers_are_not_read(tmp_path: Path, method: int, start: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("x.npy", start + b" " * (64 << 20))
        archive.writestr("y.npy", b"")
    refused_cheaply(str(tmp_path / "a.npz"))


def test_all_arrays_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    # Images of one colour are read though they pack a thousandfold.
    np.savez_compressed(path, x=np.full((400, 128, 128), 7, np.uint8), y=np.arange(400) % 2)
    assert path.stat().st_size * 700 < 400 * 128 * 128
    assert read(str(path)).samples.inputs.shape == (400, 128, 128)
    arrays(path, x=np.zeros((4, 10, 10), np.uint8), y=np.array([0, 1, 0, 1], np.uint8))
    monkeypatch.setattr(archives, "LARGEST", 404)
    assert len(read(str(path)).samples) == 4
    monkeypatch.setattr(archives, "LARGEST", 403)
    with pytest.raises(FileError, match="may have at most 16 GiB"):
        read(str(path))


# -- Folders and the datasets library ----------------------------------------------------------


def pictures(folder: Path, count: int, shade: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for index in range(count):
        image.fromarray(np.full((6, 9, 3), shade + index, np.uint8)).save(folder / f"{index}.png")


def test_a_folder_of_images_may_be_divided(tmp_path: Path) -> None:
    pictures(tmp_path / "whole" / "cat", 3, 10)
    pictures(tmp_path / "whole" / "dog", 2, 90)
    data = read(str(tmp_path / "whole"))
    assert (data.kind, data.classes, data.test) == ("image", ("cat", "dog"), None)
    assert data.samples.labels.tolist() == [0, 0, 0, 1, 1]
    for name, part in (("divided", "test"), ("other", "val")):
        for folder in (tmp_path / name / "train", tmp_path / name / part):
            pictures(folder / "cat", 2, 10)
            pictures(folder / "dog", 2, 90)
        data = read(str(tmp_path / name))
        assert (len(data.samples), len(data.test), data.classes) == (4, 4, ("cat", "dog"))
        assert data.test_name == part
    pictures(tmp_path / "divided" / "unlabelled" / "cat", 1, 10)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    for name, message in {
        "divided": r"has folders named train and test and others \(unlabelled\)",
        "empty/cat": "no sub-folders with images",
        "empty": r"no image in .*cat",
    }.items():
        with pytest.raises(FileError, match=message):
            read(str(tmp_path / name))


def test_images_that_datasets_saved_are_decoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    pixels = [np.full((5, 5, 3), shade, np.uint8) for shade in range(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": pixels, "label": [7, 8] * 10}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: (decoded.append(1), decode(*a, **k))[1])
    data = read(str(tmp_path / "saved"))
    few = choose(data.samples, 4)
    assert (data.kind, data.classes, decoded) == ("image", ("7", "8"), [])
    shades = [int(np.asarray(few.inputs[index])[0, 0, 0]) for index in range(len(few))]
    assert [shade % 2 for shade in shades] == few.labels.tolist()
    assert len(decoded) == 4
    np.testing.assert_array_equal(np.asarray(data.samples.inputs[1]), pixels[1])


def test_a_datasets_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, config: str | None) -> None:
        raise FileNotFoundError(f"Couldn't find {name!r} / {config!r}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        TnadaptError,
        match=r"'nobody/nothing:at', .* Couldn't find 'nobody/nothing' / 'at'; give --data a file or folder$",
    ):
        read("nobody/nothing:at")
