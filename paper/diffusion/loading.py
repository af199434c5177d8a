"""Loading of the base, both sets of images and the feature extractor: read, or trained and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tnadapt.checkpoints.atomic_files import atomic_write
from tnadapt.errors import TnadaptError

from .bench import Bench, Setup
from .features import Classifier, Extractor, Inception, train_classifier
from .images import ImageSet, balanced, read_images
from .metrics import require_packages
from .pretrain import images_digest, pretrained
from .unet import Generator

__all__ = ["open_bench"]


def open_bench(setup: Setup, progress: Callable[[str, float], None] = lambda what, done: None) -> Bench:
    """Read the images, and train the models or load them from the cache.

    Parameters
    ----------
    setup : Setup
    progress : callable
        Called with ``(what, fraction done)``.

    Returns
    -------
    Bench

    Raises
    ------
    TnadaptError
        If images or weights are unavailable.

    Examples
    --------
    A setup like that of a recipe, with images in ``data``::

        open_bench(Setup(Path("data"), Path("cache"), "mnist", "fashion-mnist", 16, 1, 32, Pretraining(), Process()))
    """
    require_packages()
    # Files that may be missing are opened before long computations.
    inception = None if setup.features == "classifier" else Inception(Path(setup.features), setup.device)
    target = read_images(setup.target, setup.data, setup.size, setup.channels)
    test = balanced(read_images(setup.target, setup.data, setup.size, setup.channels, test=True), setup.real)
    held_out = setup.held_out
    if not 1 <= held_out < len(target):
        raise TnadaptError(
            f"cannot hold out {held_out} of {len(target)} images of {setup.target}; give held_out from 1 to "
            f"{len(target) - 1}"
        )
    rest = target[held_out:]
    weights = _given(setup) if setup.model else _trained(setup, progress)
    extractor: Extractor = inception or _classifier(
        setup, rest, lambda done: progress(f"training a classifier of {setup.target}", done)
    )
    seen = extractor.see(test.pixels)
    return Bench(setup, weights, rest[: setup.limit], target[:held_out], test, extractor, seen)


def _trained(setup: Setup, progress: Callable[[str, float], None]) -> dict[str, Tensor]:
    source = read_images(setup.source, setup.data, setup.size, setup.channels)
    what = f"training a diffusion model of {setup.source}"
    return pretrained(
        setup.cache / "diffusion", setup.pretraining, setup.process, source, setup.base, setup.device,
        lambda done: progress(what, done),
    )  # fmt: skip


def _given(setup: Setup) -> dict[str, Tensor]:
    assert setup.model is not None
    try:
        found: dict[str, Tensor] = load_file(setup.model)
    except (OSError, SafetensorError) as error:
        raise TnadaptError(f"cannot read the model {setup.model}: {error}; expected a file of safetensors") from None
    wanted = {name: tensor.shape for name, tensor in Generator(setup.channels, setup.base).state_dict().items()}
    wrong = sorted(wanted.keys() ^ found.keys()) or [name for name in wanted if found[name].shape != wanted[name]]
    if wrong:
        raise TnadaptError(
            f"{setup.model} is not a U-Net of {setup.channels} channels and width {setup.base}: {wrong[0]!r} differs"
        )
    return found


def _classifier(setup: Setup, images: ImageSet, progress: Callable[[float], None]) -> Classifier:
    """Return the classifier from the cache, or train it on all images."""
    path = setup.cache / "diffusion" / f"classifier-{images_digest(images)[:16]}.safetensors"
    try:
        model = Classifier(setup.channels, setup.size)
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        model = train_classifier(images, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    return model.eval().to(setup.device)
