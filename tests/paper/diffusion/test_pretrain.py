"""The base is trained once: an interrupted training resumes to the same bits, and a damaged file is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from paper.diffusion import pretrain
from paper.diffusion.images import ImageSet, read_images
from paper.diffusion.pretrain import Pretraining, pretrained
from paper.diffusion.process import Process
from tnadapt.finetune.engines import threads

from .standins import write_idx

pytestmark = pytest.mark.slow

HOW = Pretraining(4, batch=2, rate=1e-3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    write_idx(folder / "mnist", 20, 10)
    return read_images("mnist", folder, 8, 1)


class StoppedError(Exception):
    pass


def trained(folder: Path, images: ImageSet, stop: float = 2.0) -> dict[str, object]:
    def progress(done: float) -> None:
        if done >= stop:
            raise StoppedError

    with threads(1):
        return dict(pretrained(folder, HOW, Process(), images, 32, progress=progress))


def test_what_was_stopped_goes_on_to_the_same_bits(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "KEPT", 2)
    before = torch.get_rng_state()
    whole = trained(tmp_path / "whole", images)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(StoppedError):
        trained(tmp_path / "stopped", images, stop=0.75)
    steps: list[float] = []
    with threads(1):
        found = pretrained(tmp_path / "stopped", HOW, Process(), images, 32, progress=steps.append)
    assert steps == [0.75, 1.0], "from the second step on"
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    (path,) = (tmp_path / "stopped").iterdir()
    assert not any(":" in name for name in pretrain._read(path)[1]), "moments are dropped at the end"  # type: ignore[index]
    found = pretrained(tmp_path / "stopped", HOW, Process(), images, 32, progress=lambda done: pytest.fail("again"))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_damaged_file_is_made_anew_and_others_get_their_own(images: ImageSet, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tmp_path, images)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def damages() -> Iterator[None]:
        yield path.write_bytes(whole[:-100])
        for step in ("4", "9", "0", "-1", "x"):  # a whole file of another model
            yield save_file({"weight": torch.zeros(3)}, path, {"step": step})

    for _ in damages():
        trained(tmp_path, images)
        assert path.read_bytes() == whole
    with threads(1):
        pretrained(tmp_path, Pretraining(1, batch=2), Process(), images, 32)
        pretrained(tmp_path, Pretraining(1, batch=2), Process(), images[:19], 32)
        pretrained(tmp_path, Pretraining(1, batch=2), Process(hidden=0.2), images, 32)
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tna.errors.FileError, match="--cache"):
        trained(tmp_path / "file" / "cache", images)


def test_a_training_that_diverges_keeps_nothing(images: ImageSet, tmp_path: Path) -> None:
    with threads(1), pytest.raises(tna.TnadaptError, match=r"the loss of pretraining is nan at step 2; give a lower"):
        pretrained(tmp_path, Pretraining(3, batch=2, rate=float("inf")), Process(), images, 32)
    assert not list(tmp_path.iterdir())
