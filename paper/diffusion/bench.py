"""One adaptation of the base: training, sampling and measuring, with a result line as the outcome."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnadapt import torch as tnt
from tnadapt.checkpoints.atomic_files import atomic_write
from tnadapt.errors import FileError
from tnadapt.finetune import Task
from tnadapt.finetune.loop import Schedule, train_steps
from tnadapt.finetune.problem import base_digest

from .features import Extractor
from .images import CLASSES, ImageSet, balanced
from .metrics import Seen, quality
from .pretrain import Pretraining, images_digest
from .process import Process
from .unet import Generator

__all__ = ["FIELDS", "SHOWN", "Adapting", "Bench", "Setup"]

# Batch size without gradients. Results do not depend on it for sampling, where each image has its own seed; the
# held-out loss draws its noise batch by batch.
CHUNK = 64
#: Images per class that are kept of each adaptation, for inspection.
SHOWN = 4
#: Required fields of a result line.
FIELDS = {"key", "config", "seed", "rate", "parameters", "diverged", "validation_loss", "metrics", "seconds"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Source, target and evaluation of an adaptation; small, because it is sent to workers.

    Attributes
    ----------
    data : Path
        The folder of the images: see :func:`~paper.diffusion.images.read_images`.
    cache : Path
        Folder for the pretrained model.
    source, target : str
        Names of image data sets.
    size, channels, base : int
        Size and channels of the images, and width of the U-Net's first level.
    pretraining : Pretraining
    process : Process
    model : Path, optional
        A safetensors file of a :class:`~paper.diffusion.unet.Generator`, used instead of pretraining one.
    features : str
        ``classifier`` for one trained on the target's images, or torch-fidelity's file of Inception's weights.
    limit : int, optional
        Number of the target's images to train on.
    held_out : int
        Number of the target's first training images that are held out to choose the rate.
    real : int
        Number of the target's test images to compare with.
    device : str
    """

    data: Path
    cache: Path
    source: str
    target: str
    size: int
    channels: int
    base: int
    pretraining: Pretraining
    process: Process
    model: Path | None = None
    features: str = "classifier"
    limit: int | None = None
    held_out: int = 512
    real: int = 2000
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Adapting:
    """The settings of training and measuring, the same for every method.

    Attributes
    ----------
    batch : int
    epochs, steps : int
        ``steps`` is used if it is not 0.
    samples : int
        Number of images to generate, cycling through the ten classes.
    optimiser, shape, weight_decay
        See :class:`~tnadapt.finetune.loop.Schedule`.
    """

    batch: int = 32
    epochs: int = 1
    steps: int = 0
    samples: int = 1000
    optimiser: str = "adamw"
    shape: str = "cosine"
    weight_decay: float = 0.0

    def schedule(self, rate: float) -> Schedule:
        """Return the schedule for one rate."""
        return Schedule(rate, 0.1, self.weight_decay, 1.0, self.optimiser, self.shape)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A base, the images to learn and the evaluation: the same in every process that opens the same setup.

    Attributes
    ----------
    setup : Setup
    weights : dict of str to Tensor
        The base's weights.
    training, validation, test : ImageSet
        The target's images; ``test`` are test images, balanced over classes.
    extractor : Extractor
    real : Seen
        Features of the target's test images.
    """

    setup: Setup
    weights: dict[str, Tensor]
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    extractor: Extractor
    real: Seen

    def model(self) -> Generator:
        """Return a new copy of the base."""
        made = Generator(self.setup.channels, self.setup.base)
        made.load_state_dict(self.weights)
        return made.to(self.setup.device)

    def settings(self) -> dict[str, Any]:
        """Return everything that an outcome depends on, except method, seed and rate."""
        setup = self.setup
        return {
            "source": setup.source,
            "target": setup.target,
            "samples": {"training": len(self.training), "validation": len(self.validation)},
            "process": dataclasses.asdict(setup.process),
            "pretraining": dataclasses.asdict(setup.pretraining),
            "features": "classifier" if setup.features == "classifier" else "inception",
            "base_digest": base_digest(self.model()),
            "data_digest": "".join(images_digest(part)[:16] for part in (self.training, self.validation, self.test)),
            "features_digest": self.extractor.digest,
        }

    def adapt(
        self, task: Task, how: Adapting, out: Path | None, progress: Callable[[float], None] = lambda done: None
    ) -> dict[str, Any]:
        """Adapt the base with one method, sample from it, and measure the images.

        Parameters
        ----------
        task : Task
            Without a config, the unchanged base is measured, and as many real images, which are the best that generated
            ones can be expected to reach.
        how : Adapting
        out : Path, optional
            A folder for the adapter and the images to keep.
        progress : callable
            Called with the fraction done; training is nine tenths.

        Returns
        -------
        dict
            A result line of JSON values.
        """
        began = time.perf_counter()
        device = torch.device(self.setup.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(task.seed)
            model = self.model()
            adapter = None
            value = 0.0
            if task.method.config is not None:
                adapter = tnt.attach(model, task.method.config.replace(seed=task.seed), "qv")
                value = self._fit(model, how, task, lambda done: progress(0.9 * done))
            validation = self._loss(model) if math.isfinite(value) else math.nan
            diverged = not math.isfinite(validation)
            metrics, shown = ({}, None) if diverged else self._measured(model, how, task.seed)
        record: dict[str, Any] = {
            **task.to_dict(),
            "parameters": 0 if adapter is None else adapter.num_parameters,
            "diverged": diverged,
            "training_loss": round(value, 6) if math.isfinite(value) else None,
            "validation_loss": None if diverged else round(validation, 6),
            "metrics": _rounded(metrics),
        }
        if adapter is None:
            measured, real = self._floor(how.samples, task.seed)
            record["real"] = {"metrics": _rounded(measured)}
            if out is not None:
                record["real"]["images"] = f"real-{task.key}.npy"
                _keep(out / "images" / record["real"]["images"], real)
        if out is not None and shown is not None:
            record["images"] = f"{task.key}.npy"
            _keep(out / "images" / record["images"], shown)
            if adapter is not None:
                record["adapter"] = task.file_name()
                (out / "adapters").mkdir(parents=True, exist_ok=True)
                adapter.save(out / "adapters" / record["adapter"])
        record["seconds"] = round(time.perf_counter() - began, 2)
        return record

    def _floor(self, count: int, seed: int) -> tuple[dict[str, float | None], Tensor]:
        """Measure real images of the target other than those compared with; also return the first of them.

        They are held-out images, or training images if there are too few held-out ones.
        """
        some = balanced(self.validation if len(self.validation) >= count else self.training, count, seed)
        return quality(self.extractor.see(some.pixels), self.real, some.labels), some.pixels[: SHOWN * CLASSES]

    def _fit(self, model: Generator, how: Adapting, task: Task, progress: Callable[[float], None]) -> float:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps = how.steps or how.epochs * math.ceil(len(self.training) / how.batch)
        schedule = how.schedule(task.rate)
        generator = torch.Generator().manual_seed(task.seed)
        epochs = (torch.randperm(len(self.training), generator=generator) for _ in itertools.count())
        batches = (chosen for order in epochs for chosen in torch.split(order, how.batch))
        value = math.nan
        model.train()
        for step in train_steps(
            lambda _: self._noised(model, self.training[next(batches)], generator), parameters,
            *schedule.begin(parameters, steps), steps, schedule.clip,
        ):  # fmt: skip
            value = step.loss
            progress(step.done / steps)
        return value

    def _noised(self, model: Generator, images: ImageSet, generator: torch.Generator) -> Tensor:
        device = self.setup.device
        return self.setup.process.loss(model, images.pixels.to(device), images.labels.to(device), generator)

    @torch.no_grad()
    def _loss(self, model: Generator) -> float:
        """Return the loss on held-out images, each with one step and noise, which are the same for every model."""
        model.eval()
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for some in torch.split(torch.arange(len(self.validation)), CHUNK):
            total += float(self._noised(model, self.validation[some], generator)) * len(some)
        return total / len(self.validation)

    def _measured(self, model: Generator, how: Adapting, seed: int) -> tuple[dict[str, float | None], Tensor]:
        asked = torch.arange(how.samples) % CLASSES
        like = (self.setup.channels, self.setup.size, self.setup.size)
        images = self.setup.process.sample(model, asked.to(self.setup.device), like, seed, CHUNK)
        return quality(self.extractor.see(images), self.real, asked), images[: SHOWN * CLASSES]


def _rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if one is None else float(f"{one:.6g}") for name, one in metrics.items()}


def _keep(path: Path, images: Tensor) -> None:
    """Write images as bytes ``(n, size, size, channels)`` in NumPy's format."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as file:
            np.lib.format.write_array(file, pixels, allow_pickle=False)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; give another folder with --out") from None
