"""Image files in the original formats are read, and other files are rejected."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")

from paper.diffusion.images import read_images
from tests.conftest import peak_of

from .standins import drawn, idx, write_idx, write_svhn


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_are_their_bytes(tmp_path: Path, pack: bool) -> None:
    write_idx(tmp_path / "mnist", 12, 7, pack=pack)
    images = read_images("mnist", tmp_path, 28, 1)
    pixels, labels = drawn(12, 28, 0)
    assert torch.equal(((images.pixels[:, 0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))
    assert images.labels.tolist() == labels.tolist()
    assert len(read_images("mnist", tmp_path, 28, 1, test=True)) == 7


def test_svhns_ten_is_a_zero_its_axes_are_turned_and_grey_is_the_mean(tmp_path: Path) -> None:
    write_svhn(tmp_path / "svhn", 11, 3)
    images = read_images("svhn", tmp_path, 32, 3)
    pixels, labels = drawn(11, 32, 5)
    assert images.labels.tolist() == labels.tolist()
    assert images.labels[0] == 0
    assert torch.equal(((images.pixels[:, 0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))
    assert torch.equal(((images.pixels[:, 2] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels // 4))
    grey = read_images("svhn", tmp_path, 32, 1).pixels
    torch.testing.assert_close(images.pixels.mean(1, keepdim=True), grey, rtol=0, atol=1e-6)


def test_grey_becomes_three_equal_colours(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", 5, 5)
    grey = read_images("mnist", tmp_path, 32, 3).pixels
    assert grey.shape == (5, 3, 32, 32)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_halving_is_the_mean_weighted_by_a_triangle(tmp_path: Path) -> None:
    flat = np.full((1, 28, 28), 200, np.uint8)
    write_idx(tmp_path / "mnist", 4, 4)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(idx(np.repeat(flat, 4, 0)))
    assert torch.allclose(read_images("mnist", tmp_path, 14, 1).pixels, torch.tensor(200 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "unpack"), (b"\x00\x00\x0d\x03", "not an IDX file"), (b"\x00\x00\x08\x03\x00\x00\x00\x09", "unpack"),
        (idx(np.zeros((4, 28, 28), np.uint8))[:-1], "too early"), (idx(np.zeros((3, 28, 28), np.uint8)), "labels"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "16 GiB"), (gzip.compress(b"\x00\x00\x08\x03" * 9, mtime=0)[:-9], ""),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    write_idx(tmp_path / "mnist", 4, 4)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    if content.startswith(b"\x1f\x8b"):
        path.unlink()
        path = path.with_name(path.name + ".gz")
    path.write_bytes(content)
    with pytest.raises(tna.errors.FileError, match=f"cannot read the images in .*({word}).*fetch them again"):
        read_images("mnist", tmp_path, 28, 1)


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("claimed", [0, 1 << 10, 1 << 20, 1 << 31])
def test_no_more_is_unpacked_than_a_possible_claim(tmp_path: Path, pack: bool, claimed: int) -> None:
    write_idx(tmp_path / "mnist", 4, 4)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    content = b"\x00\x00\x08\x03" + b"".join(number.to_bytes(4, "big") for number in (claimed, 28, 28))
    if claimed < 1 << 20:
        content += bytes(64 << 20)  # more than it says
    path.unlink()
    if pack:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)

    def refused() -> None:
        with pytest.raises(tna.errors.FileError, match=r"is longer than|it claims"):
            read_images("mnist", tmp_path, 28, 1)

    refused()
    assert peak_of(refused) < 4 << 20


@pytest.mark.parametrize("labels", [[0.5, 1], [11, 1], [-3, 1], ["a", "b"], None])
def test_labels_that_are_none_of_svhns_or_no_matrix(tmp_path: Path, labels: list[object] | None) -> None:
    from scipy.io import savemat

    write_svhn(tmp_path / "svhn", 2, 2)
    file = tmp_path / "svhn" / "train_32x32.mat"
    if labels is None:
        file.write_bytes(b"no matrix")
    else:
        savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": labels})
    with pytest.raises(tna.errors.FileError, match=r"cannot read the images .*fetch them again"):
        read_images("svhn", tmp_path, 32, 3)


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        tna.TnadaptError, match=r"no train_32x32.mat in .*svhn; give --data a folder with a folder 'svhn'"
    ):
        read_images("svhn", tmp_path, 32, 3)
    with pytest.raises(tna.TnadaptError, match="one of mnist, fashion-mnist, svhn; got 'cifar'"):
        read_images("cifar", tmp_path, 32, 3)
