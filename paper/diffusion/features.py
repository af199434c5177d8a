"""Feature extractors for images: Inception, or a small classifier that is trained on the real images."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tnadapt.errors import TnadaptError
from tnadapt.finetune.loop import train_steps

from .images import ImageSet
from .metrics import Seen

__all__ = ["Classifier", "Extractor", "Inception", "train_classifier"]

BATCH = 256


class Extractor(Protocol):
    """The interface of a feature extractor for images with values from -1 to 1."""

    @property
    def digest(self) -> str:
        """Identifies the extractor: measures by different extractors must not be compared."""
        ...

    def see(self, pixels: Tensor) -> Seen:
        """Return features and logits of images ``(n, channels, size, size)``, on the CPU."""
        ...


class Classifier(nn.Module):
    """A classifier of three convolutions, each of which halves the image, and two linear maps; 64 features.

    Parameters
    ----------
    channels, size : int
        Channels and size of the images; the size must be at least 8.
    classes : int

    Examples
    --------
    >>> seen = Classifier(1, 16).see(torch.zeros(2, 1, 16, 16))
    >>> seen.features.shape, seen.logits.shape
    (torch.Size([2, 64]), torch.Size([2, 10]))
    """

    def __init__(self, channels: int, size: int, classes: int = 10) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        layers = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
            for before, after in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (size // 8) ** 2, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``(n, 64)`` and logits ``(n, classes)``."""
        features = self.body(pixels)
        return features, self.head(features)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        seen = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            seen.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Seen:
        """Return features and logits; see :class:`Extractor`."""
        self.eval()
        device = self.head.weight.device
        parts = [[part.cpu() for part in self(some.to(device))] for some in torch.split(pixels, BATCH)]
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Seen(features, logits)


def train_classifier(
    images: ImageSet, epochs: int = 4, seed: int = 0, progress: Callable[[float], None] = lambda done: None
) -> Classifier:
    """Train a classifier of these images with AdamW, with a rate of 0.002 that decays to 0.

    Parameters
    ----------
    images : ImageSet
    epochs : int
    seed : int
    progress : callable
        Called with the fraction done.

    Returns
    -------
    Classifier
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.pixels.shape[1], images.pixels.shape[-1])
        optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
        steps = epochs * math.ceil(len(images) / BATCH)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        batches = (some for _ in range(epochs) for some in torch.split(torch.randperm(len(images)), BATCH))

        def loss_of(step: int) -> Tensor:
            part = images[next(batches)]
            return nn.functional.cross_entropy(model(part.pixels)[1], part.labels)

        model.train()
        for step in train_steps(loss_of, list(model.parameters()), optimiser, rates, steps):
            progress(step.done / steps)
    return model.eval()


class Inception:
    """The Inception-v3 that defines FID, from torch-fidelity: 2,048 features and 1,008 logits.

    Parameters
    ----------
    weights : Path
        torch-fidelity's file of weights (``weights-inception-2015-12-05-6726825d.pth`` of its release 0.2.0). A file
        that holds objects other than tensors is rejected. Nothing is downloaded.
    device : str

    Raises
    ------
    TnadaptError
        If torch-fidelity is not installed, or the file cannot be read or does not fit.
    """

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise TnadaptError("Inception needs torch-fidelity: pip install 'tnadapt[paper]'") from None
        try:
            # torch-fidelity would unpickle any object in the file, so this first rejects files with other than tensors.
            torch.load(weights, map_location="cpu", weights_only=True)
            found: Any = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # errors of files, of pickles, or of weights that do not fit
            raise TnadaptError(
                f"cannot load Inception's weights from {weights} ({str(error).splitlines()[0]}); give --features a "
                "file of torch-fidelity's weights, or classifier"
            ) from None
        self.model, self.device = found.to(device).eval(), device
        #: SHA-256 of the file.
        self.digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Seen:
        """Return features and logits; see :class:`Extractor`. The model takes RGB bytes and rescales them itself."""
        parts = []
        for some in torch.split(pixels, 64):
            colours = some.expand(-1, 3, -1, -1)
            shown = ((colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            parts.append([part.cpu() for part in self.model(shown.to(self.device))])
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Seen(features, logits)
