"""Every source of data, and the errors for bad ones."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.errors import FileError, TnadaptError

pytest.importorskip("torch")

from tests.conftest import peak_of
from tnadapt.finetune import data as archives
from tnadapt.finetune._digits import Pixels
from tnadapt.finetune.data import (
    PARTS,
    Data,
    Samples,
    choose,
    divide,
)
from tnadapt.finetune.problem import samples_digest

from .small import read


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


def test_another_seed_divides_otherwise() -> None:
    one, other = divide(toy([20, 20]), 0), divide(toy([20, 20]), 1)
    assert one["test"].inputs.tolist() != other["test"].inputs.tolist()


def test_a_test_part_that_comes_with_the_data_stays_whole() -> None:
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


def test_the_digest_sees_every_pixel_token_label_and_statistic() -> None:
    def digest(change: Any = None, mean: float = 0.0) -> str:
        samples = Samples(np.zeros((4, 2, 2)), np.array([0, 0, 1, 1]))
        if change is not None:
            change(samples)
        return samples_digest({"training": Pixels(samples, mean, 1.0)})

    def brighter(samples: Samples) -> None:
        samples.inputs[3, 1, 1] = 0.5

    def relabelled(samples: Samples) -> None:
        samples.labels[0] = 1

    assert digest() == digest()
    assert len({digest(), digest(brighter), digest(relabelled), digest(mean=0.1)}) == 4


# -- Tables ------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def test_a_table_with_usual_names(tmp_path: Path) -> None:
    data = read(
        write(tmp_path / "a.csv", 'id,Text,Label\n1,"good, really",yes\n2,bad,no\n3,"two\nlines",yes\n', "utf-8-sig")
    )
    assert (data.kind, data.classes) == ("text", ("no", "yes"))
    assert list(data.samples.inputs) == ["good, really", "bad", "two\nlines"]
    assert data.samples.labels.tolist() == [1, 0, 1]


def test_a_table_with_named_columns_and_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "what\tverdict\nx\t3\ny\t10\n")
    data = read(path, "what", "verdict")
    assert data.classes == ("10", "3")
    assert list(data.samples.inputs) == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "which column of .* is the text\\? It has 'a', 'b': give --text-column"),
        ("text,b\n1,2\n", {}, "which column of .* is the label\\?"),
        ("text,label\n1,2\n", {"text_column": "txt"}, "has no column 'txt'; its columns are 'text', 'label'"),
        ("text,label\n", {}, "has no rows"),
        ("", {}, "is empty; expected a line of column names"),
        ("text,label\nfilm 1, good,1\n", {}, "line 2: more fields than column names; a text that has commas in it"),
        ("text;label\nx;1\n", {}, r"a\.csv: its columns seem to be separated by ';': 'text;label'; expected commas"),
        ("text,label,text\na,1,b\n", {}, "has more than one column 'text'"),
        ("text,label\nx,  \n", {}, "line 2: nothing in column 'label'"),
        ("text,label\n  ,1\n", {}, "line 2: nothing in column 'text'"),
        ("text,label\nx,\n", {}, "line 2: nothing in column 'label'"),
        ("text,label\nx\n", {}, "line 2: nothing in column 'label'"),
        ("text,label\n,1\n", {}, "line 2: nothing in column 'text'"),
        ('text,label\n"x,1\n', {}, "cannot read .* as a table"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        read(write(tmp_path / "a.csv", text), **options)


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for encoding, line in (("latin-1", 3), ("utf-16", 1)):
        path.write_bytes("text,label\ngood,0\nschön,1\n".encode(encoding))
        with pytest.raises(FileError, match=rf"a\.csv, line {line} is not UTF-8; save the file in that encoding"):
            read(str(path))


@pytest.mark.parametrize("name", ["nothing.csv", "./nothing", "/nothing/here.npz"])
def test_no_such_file(name: str) -> None:
    with pytest.raises(FileError, match="there is no such file or folder"):
        read(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"expected a \.csv, \.tsv, \.jsonl, \.json or \.npz file, or a folder of images"
    ):
        read(write(tmp_path / "a.txt", "text"))


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
    assert data.test is not None
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
    ],
)
def test_bad_arrays(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        read(arrays(tmp_path / "a.npz", **given))


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"as an .npz of plain arrays"):
        read(write(tmp_path / "a.npz", "PK and no more"))


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


def forged(path: Path, shape: tuple[int, ...], content: bytes, said: int | None = None, **settings: Any) -> str:
    """Write an archive whose array x claims a shape, with the given sizes in its directory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.save(labels, np.arange(shape[0] if shape[0] < 100 else 2) % 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **settings) as archive:
        archive.writestr("x.npy", header.getvalue() + content)
        archive.writestr("y.npy", labels.getvalue())
        if said is not None:
            archive.getinfo("x.npy").file_size = said + len(header.getvalue())  # what the list at the end says
    return str(path)


SMALL = 1 << 20


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("said", [None, 1 << 30, 1 << 62])
@pytest.mark.parametrize("shape", [(1 << 10, 1 << 10, 1 << 10), (1 << 31, 1 << 31), (1 << 62,), (-1, 5)])
def test_what_an_array_claims_costs_nothing(tmp_path: Path, shape: tuple[int, ...], said: int | None) -> None:
    path = forged(tmp_path / "a.npz", shape, bytes(100), said)
    read_refused(path)
    assert peak_of(lambda: read_refused(path)) < SMALL


def read_refused(path: str) -> None:
    with pytest.raises(FileError, match=r"as an \.npz of plain arrays"):
        read(path)


@pytest.mark.law("allocation-limit")
def test_an_archive_is_read_as_far_as_it_says_and_no_further(tmp_path: Path) -> None:
    # 64 MiB of zeros, of which the array is 400 bytes by all that the archive says.
    path = forged(tmp_path / "a.npz", (4, 10, 10), bytes(64 << 20), 400)
    read_refused(path)
    assert peak_of(lambda: read_refused(path)) < SMALL


@pytest.mark.law("allocation-limit")
def test_headers_of_any_length_and_other_packers_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for method, start in (
        (zipfile.ZIP_DEFLATED, b"\x93NUMPY\x02\x00" + (64 << 20).to_bytes(4, "little")),
        (zipfile.ZIP_BZIP2, b""), (zipfile.ZIP_LZMA, b""),
    ):  # fmt: skip
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", start + b" " * (64 << 20))
            archive.writestr("y.npy", b"")
        read_refused(str(path))
        assert peak_of(lambda: read_refused(str(path))) < SMALL


def test_all_arrays_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = arrays(tmp_path / "a.npz", x=np.zeros((4, 10, 10), np.uint8), y=np.array([0, 1, 0, 1], np.uint8))
    monkeypatch.setattr(archives, "LARGEST", 404)
    assert len(read(path).samples) == 4
    monkeypatch.setattr(archives, "LARGEST", 403)
    with pytest.raises(FileError, match="may have at most 16 GiB"):
        read(path)


def test_images_of_one_colour_are_read_though_they_pack_a_thousandfold(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.full((400, 128, 128), 7, np.uint8), y=np.arange(400) % 2)
    assert path.stat().st_size * 700 < 400 * 128 * 128
    assert read(str(path)).samples.inputs.shape == (400, 128, 128)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["u1", ">f4", "<f8", "?"])
def test_arrays_are_those_that_numpy_reads(tmp_path: Path, order: str, dtype: str) -> None:
    given = np.asarray(np.random.default_rng(0).integers(0, 2, (4, 5, 6)), dtype, order=order)
    path = arrays(tmp_path / "a.npz", x=given, y=np.array(["a", "b", "c", "d"]))
    found, names = archives.read_npz(Path(path), {"x", "y"})
    assert names == ["x", "y"]
    with np.load(path) as expected:
        for name in names:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name], expected[name])


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", x=np.zeros((2, 4, 4)), X=np.zeros((2, 4, 4)), y=[0, 1])
    with pytest.raises(FileError, match="more than one array x"):
        read(path)


# -- Folders and the datasets library ----------------------------------------------------------


def pictures(folder: Path, count: int, shade: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for index in range(count):
        image.fromarray(np.full((6, 9, 3), shade + index, np.uint8)).save(folder / f"{index}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path / "cat", 3, 10)
    pictures(tmp_path / "dog", 2, 90)
    data = read(str(tmp_path))
    assert (data.kind, data.classes) == ("image", ("cat", "dog"))
    assert data.samples.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test is None


def test_a_folder_that_comes_divided(tmp_path: Path) -> None:
    for part in ("train", "test"):
        pictures(tmp_path / part / "cat", 2, 10)
        pictures(tmp_path / part / "dog", 2, 90)
    data = read(str(tmp_path))
    assert data.test is not None
    assert (len(data.samples), len(data.test)) == (4, 4)
    assert data.classes == ("cat", "dog")


def test_a_folder_that_may_be_divided_or_not(tmp_path: Path) -> None:
    for name in ("train", "test", "unlabelled"):
        pictures(tmp_path / name / "cat", 1, 10)
    with pytest.raises(FileError, match=r"has folders named train and test and others \(unlabelled\)"):
        read(str(tmp_path))


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no sub-folders with images"):
        read(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileError, match=r"no image in .*cat"):
        read(str(tmp_path))


@pytest.mark.parametrize("divided", [False, True])
def test_what_datasets_saved(tmp_path: Path, divided: bool) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    one = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    (datasets.DatasetDict({"train": one, "validation": one}) if divided else one).save_to_disk(tmp_path / "saved")
    data = read(str(tmp_path / "saved"))
    assert (data.kind, data.classes) == ("text", ("no", "yes"))
    assert list(data.samples.inputs) == ["a", "b", "c"]
    assert data.samples.labels.tolist() == [0, 1, 1]
    assert (data.test is not None) == divided


def test_images_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    pixels = [np.full((5, 5, 3), shade, np.uint8) for shade in (0, 100, 200)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    one = datasets.Dataset.from_dict({"img": pixels, "label": [7, 8, 7]}, features=features)
    one.save_to_disk(tmp_path / "saved")
    data = read(str(tmp_path / "saved"))
    assert (data.kind, data.classes) == ("image", ("7", "8"))
    np.testing.assert_array_equal(np.asarray(data.samples.inputs[1]), pixels[1])


def test_images_that_datasets_saved_are_decoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    pixels = [np.full((5, 5, 3), shade, np.uint8) for shade in range(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"img": pixels, "label": [0, 1] * 10}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: (decoded.append(1), decode(*a, **k))[1])
    few = choose(read(str(tmp_path / "saved")).samples, 4)
    assert decoded == []
    shades = [int(np.asarray(few.inputs[index])[0, 0, 0]) for index in range(len(few))]
    assert [shade % 2 for shade in shades] == few.labels.tolist()
    assert len(decoded) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b"], "label": [0, None]}, "are of type NoneType, int; expected words, or integers"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, "are of type list"),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, "are of type float"),
        ({"text": ["a", None], "label": [0, 1]}, "the text of sample 1 of .* is None"),
        ({"text": [1, 2], "label": [0, 1]}, "the text of sample 0 of .* is 1"),
    ],
)
def test_bad_rows_that_datasets_saved(tmp_path: Path, rows: dict[str, Any], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(FileError, match=message):
        read(str(tmp_path / "saved"))


def test_a_test_part_without_labels_is_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, unlabelled, held = (
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}) for labels in ([0, 1], [-1, -1], [1, 0])
    )
    parts = datasets.DatasetDict({"train": one, "test": unlabelled, "validation": held})
    parts.save_to_disk(tmp_path / "saved")
    data = read(str(tmp_path / "saved"))
    assert data.classes == ("0", "1")
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 0]


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
