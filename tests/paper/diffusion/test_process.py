"""Adding noise and sampling, against formulas; a base that is trained once, and resumed to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from paper.diffusion import pretrain
from paper.diffusion.images import ImageSet, read_images
from paper.diffusion.pretrain import Pretraining, pretrained
from paper.diffusion.process import Process
from tnadapt.finetune.engines import threads

from .standins import write_idx

# What Ho, Jain and Abbeel's forward process has left of an image after each step.
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Oracle(torch.nn.Module):
    """A model that knows the image of each class, and hence the noise in any noisy image; it records its calls."""

    def __init__(self, images: Any, unknown: float = 0.0) -> None:
        super().__init__()
        self.images, self.unknown = images, unknown
        self.asked: list[tuple[Any, ...]] = []

    def forward(self, x: Any, t: Any, label: Any, known: Any) -> Any:
        self.asked.append((x, t, label, known))
        kept = torch.tensor(KEPT)[t][:, None, None, None]
        told = (x - kept.sqrt() * self.images[label]) / (1 - kept).sqrt()
        # Where the class is not told, its answer is off by a constant: guidance by w then adds w times that.
        return (told + torch.where(known, 0.0, self.unknown)[:, None, None, None]).float()


def generator(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


@given(st.sampled_from([1, 2, 4, 5, 8, 10, 20, 40]), st.sampled_from(["ddim", "ddpm"]), st.floats(0, 4))
@settings(max_examples=15)
def test_with_the_true_noise_the_image_comes_back(steps: int, sampler: str, guidance: float) -> None:
    images = torch.rand(10, 1, 4, 4, generator=generator()) * 1.8 - 0.9
    process = Process(sampler=sampler, sampling_steps=steps, guidance=guidance)
    labels = torch.tensor([3, 1, 4, 1, 5])
    found = process.sample(Oracle(images), labels, (1, 4, 4), seed=0, batch=5)
    # The last step of both goes to the predicted image itself; float32 schedules lose some digits on the way.
    torch.testing.assert_close(found, images[labels], rtol=0, atol=2e-3)


def test_guidance_is_away_from_what_is_said_without_the_class() -> None:
    images = torch.zeros(10, 1, 4, 4)
    model = Oracle(images, unknown=0.001)
    found = Process(sampling_steps=1, guidance=2.0).sample(model, torch.tensor([7]), (1, 4, 4), 0, 1)
    first = int(model.asked[0][1][0])
    # One step from t to the image: x0 = (x - sqrt(1 - a) e) / sqrt(a), with e = 3 told - 2 (told + 0.001).
    expected = 0.002 * np.sqrt(1 - KEPT[first]) / np.sqrt(KEPT[first])
    torch.testing.assert_close(found, torch.full_like(found, float(expected)), rtol=1e-3, atol=1e-5)
    assert [bool(known) for *_, known in model.asked] == [True, False]
    model = Oracle(images)
    Process(sampling_steps=4, guidance=0.0).sample(model, torch.tensor([7]), (1, 4, 4), 0, 1)
    assert len(model.asked) == 4


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    model = Oracle(torch.zeros(10, 1, 4, 4), unknown=0.3)
    process = Process(sampler=sampler, sampling_steps=4)
    labels = torch.arange(7)
    one, three = (process.sample(model, labels, (1, 4, 4), 5, batch) for batch in (7, 3))
    assert torch.equal(one, three)
    assert not torch.equal(one, process.sample(model, labels, (1, 4, 4), 6, 7))


def test_the_loss_is_that_of_the_noise_and_hides_some_classes() -> None:
    images = torch.rand(10, 1, 4, 4, generator=generator(1)) * 2 - 1
    labels = torch.arange(10).repeat(40)
    model = Oracle(images)
    assert float(Process().loss(model, images[labels], labels, generator())) < 1e-6
    x, t, _, known = model.asked[0]
    assert 0.04 < float((~known).double().mean()) < 0.18
    assert 0 <= int(t.min()) < 50 < 950 < int(t.max()) < 1000
    noise = (x - torch.tensor(KEPT)[t].sqrt()[:, None, None, None] * images[labels]) / torch.tensor(1 - KEPT)[t].sqrt()[
        :, None, None, None
    ]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    hidden = Oracle(images, unknown=1.0)
    found = float(Process(hidden=0.1).loss(hidden, images[labels], labels, generator()))
    assert found == pytest.approx(float((~hidden.asked[0][3]).double().mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("given_", "word"),
    [
        ({"sampler": "euler"}, "one of ddpm, ddim; got 'euler'"), ({"sampling_steps": 0}, "must divide 1000; got 0"),
        ({"sampling_steps": 3}, "got 3"), ({"hidden": 1.0}, "got 1.0 and 1.8"), ({"guidance": -1}, "and -1"),
    ],
)  # fmt: skip
def test_settings_out_of_range(given_: dict[str, Any], word: str) -> None:
    with pytest.raises(tna.TnadaptError, match=word):
        Process(**given_)


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


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_training_that_diverges_keeps_nothing(images: ImageSet, tmp_path: Path) -> None:
    with threads(1), pytest.raises(tna.TnadaptError, match=r"the loss of pretraining is nan at step 2; give a lower"):
        pretrained(tmp_path, Pretraining(3, batch=2, rate=float("inf")), Process(), images, 32)
    assert not list(tmp_path.iterdir())
