"""Feature extractors: the classifier learns, and Inception's weights are only read as tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")

from paper.diffusion.features import Classifier, Inception, train_classifier
from paper.diffusion.images import read_images

from .standins import write_idx


def test_a_classifier_learns_its_images_and_moves_no_random_state(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", 512, 100)
    training, test = (read_images("mnist", tmp_path, 16, 1, test=test) for test in (False, True))
    before = torch.get_rng_state()
    told: list[float] = []
    model = train_classifier(training, epochs=12, progress=told.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert told[-1] == 1.0
    seen = model.see(test.pixels)
    assert float((seen.logits.argmax(1) == test.labels).float().mean()) > 0.9
    again = train_classifier(training, epochs=12).see(test.pixels)
    torch.testing.assert_close(again.logits, seen.logits)


def test_a_batch_changes_nothing_that_is_seen() -> None:
    pixels = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = Classifier(3, 8)
    torch.testing.assert_close(model.see(pixels).features[290:], model.see(pixels[290:]).features)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for torch-fidelity's Inception, which can only be built from a file."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    kept: dict[str, object] = {}

    class Kept(theirs.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object) -> None:
            kept.update(self.state_dict())

    torch.save({}, path)
    Kept("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(kept, path)
    return path


def test_inception_sees_bytes_of_three_colours(weights: Path) -> None:
    grey = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = Inception(weights)
    seen = model.see(grey)
    assert seen.features.shape == (2, 2048)
    assert seen.logits.shape == (2, 1008)
    assert torch.equal(model.see(grey.expand(-1, 3, -1, -1)).features, seen.features)


def test_files_that_are_not_its_weights_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "weights.pth"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (marker,)  # type: ignore[return-value]

    for write in (
        lambda: None,  # no file
        lambda: path.write_bytes(pickle.dumps(Hostile())),
        lambda: torch.save({"model": Hostile()}, path),
        lambda: torch.save({"weight": torch.zeros(3)}, path),
    ):
        write()
        with pytest.raises(tna.TnadaptError, match=r"cannot load Inception's weights from .*--features"):
            Inception(path)
    assert not marker.exists()
