"""Feature extractors and the measures on features: against closed forms, and piq's implementation of MSID."""

from __future__ import annotations

import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.support.depth import long_only

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")

from paper.diffusion.features import Classifier, Inception, train_classifier
from paper.diffusion.images import read_images
from paper.diffusion.metrics import LOWER, METRICS, Seen, quality
from paper.diffusion.msid import heat_trace, msid

from .standins import write_idx


def cloud(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> Any:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def seen(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> Seen:
    return Seen(cloud(count, width, seed, shift), cloud(count, 10, seed + 1))


@given(st.integers(0, 1000), st.floats(0.5, 3))
@settings(max_examples=10)
def test_a_shift_is_its_square_in_fid(seed: int, shift: float) -> None:
    real = seen(200, seed=seed)
    moved = Seen(real.features + shift, real.logits)
    found = quality(moved, real)
    assert found["fid"] == pytest.approx(6 * shift**2, rel=1e-5)
    assert found["is_distance"] == 0.0
    assert found["msid"] == pytest.approx(0.0, abs=1e-3), "a shift is no other shape"


def test_certain_images_of_all_classes_have_the_highest_score() -> None:
    real, classes = seen(1000), torch.arange(1000) % 10
    logits = 50.0 * torch.eye(10)[classes]
    found = quality(Seen(real.features, logits), real, classes)
    assert found["is"] == pytest.approx(10.0, rel=0.06)  # each of ten parts has its classes unequally
    assert found["agreement"] == 1.0
    one = quality(Seen(real.features, logits[:1].expand(1000, -1)), real, classes)
    assert one["is"] == pytest.approx(1.0)
    assert one["agreement"] == 0.1


def test_far_away_nothing_is_precise_and_nothing_recalled() -> None:
    found = quality(seen(100, shift=50.0), seen(100, seed=9))
    assert (found["precision"], found["recall"]) == (0.0, 0.0)
    # One mode among many: all of it is real, and little of what is real is it.
    real = torch.cat([cloud(100, shift=20.0 * place, seed=place) for place in range(4)])
    mode = quality(Seen(cloud(100, seed=11), cloud(100, 10)), Seen(real, cloud(400, 10)))
    assert mode["precision"] > 0.8
    assert mode["recall"] < 0.3


def test_kid_is_unbiased_and_grows() -> None:
    near, far = (quality(seen(300, seed=1, shift=shift), seen(300, seed=2))["kid"] for shift in (0.0, 1.0))
    assert abs(near) < 0.05 < far


def test_of_unequal_numbers_as_many_are_looked_at() -> None:
    real, classes = seen(400, seed=3), torch.arange(400) % 10
    some = Seen(real.features[:100], real.logits[:100])
    found = quality(some, real, classes[:100])
    assert (found["is_distance"], found["msid"], found["precision"]) == (0.0, 0.0, 1.0)
    assert found["recall"] < 1.0, "of all that is real"


def test_what_is_not_finite_is_none_and_all_are_named() -> None:
    broken = seen(20)
    broken.features[3, 1] = math.nan
    assert quality(broken, seen(20)) == dict.fromkeys(METRICS)
    assert quality(seen(20), seen(20))["agreement"] is None
    assert set(LOWER) < set(METRICS)


@pytest.mark.parametrize(("generated", "real"), [((9, 6), (20, 6)), ((20, 6), (9, 6)), ((20, 6), (20, 5))])
def test_too_few_or_other_features(generated: tuple[int, int], real: tuple[int, int]) -> None:
    with pytest.raises(tna.errors.ShapeError, match="at least 10 images of either kind"):
        quality(seen(*generated), seen(*real))


# -- MSID --------------------------------------------------------------------------------------------

TIMES = np.logspace(-1, 1, 9)


def normal(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


@given(st.integers(6, 40))
def test_a_ring_has_the_eigenvalues_of_its_circulant(count: int) -> None:
    angles = 2 * np.pi * np.arange(count) / count
    # A little unequal radii would not do: of equal distances, either may be taken. Two neighbors are unique.
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    expected = np.exp(-np.outer(TIMES, 1 - np.cos(angles))).mean(1)
    np.testing.assert_allclose(heat_trace(points, TIMES, neighbors=2), expected, rtol=1e-10)
    # Of all neighbors the graph is complete.
    expected = (1 + (count - 1) * np.exp(-TIMES * count / (count - 1))) / count
    np.testing.assert_allclose(heat_trace(normal(count, 3), TIMES, neighbors=count - 1), expected, rtol=1e-10)


@given(st.integers(0, 2**32 - 1))
def test_it_is_symmetric_and_knows_no_place_scale_or_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.normal(size=(60, 3)), random.uniform(size=(50, 2))
    moved = random.permutation(first) @ np.linalg.qr(random.normal(size=(3, 3)))[0] * 7 + random.normal(size=3)
    assert msid(first, moved) < 1e-4
    assert msid(first, second) == msid(second, first) > 0


def test_the_estimate_is_near_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(600, 8)
    exact, estimated = (heat_trace(points, TIMES, exact=exact) for exact in (True, False))
    # In the units of MSID, in which unlike clouds are some hundreds apart.
    assert 0 < 1e6 * np.max(np.exp(-2 * (TIMES + 1 / TIMES)) * np.abs(estimated - exact)) < 5
    assert np.array_equal(estimated, heat_trace(points, TIMES, exact=False)), "the same seed, the same estimate"
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda *_: pytest.fail("all eigenvalues of a large graph"))
    assert 0 < msid(normal(2049, 2), normal(2049, 2, 1)) < 100


def test_points_that_lie_on_one_another_are_not_their_own_neighbors() -> None:
    points = np.repeat(normal(12, 2), 8, axis=0)
    found = heat_trace(points, [0.0, 1.0])
    assert found[0] == pytest.approx(1.0)
    assert np.isfinite(found).all()


def test_it_is_piqs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        piq = pytest.importorskip("piq")
    angles = np.random.default_rng(1).uniform(0, 2 * np.pi, 300)
    flat = np.zeros((300, 4))
    first, second = normal(300, 6), np.concatenate([np.cos(angles)[:, None], np.sin(angles)[:, None], flat], 1)
    theirs = piq.MSID(k=5, m=10, niters=2000, normalize="empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = float(theirs(torch.tensor(first), torch.tensor(second)))
    # Theirs is an estimate from random vectors.
    assert msid(first, second) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.zeros(9), np.zeros((0, 3))])
def test_too_few_points(points: np.ndarray) -> None:
    with pytest.raises(tna.errors.ShapeError, match="more than 5 points; got shape"):
        heat_trace(points, TIMES)


@long_only
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
