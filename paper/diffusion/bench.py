"""One adaptation of the base: trained, sampled, measured; a line of results."""

from __future__ import annotations

import dataclasses
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
from tnadapt.finetune.loop import Schedule
from tnadapt.finetune.problem import base_digest

from .features import Extractor
from .images import CLASSES, ImageSet, balanced
from .metrics import Seen, quality
from .pretrain import Pretraining, images_digest
from .process import Process
from .unet import Generator

__all__ = ["FIELDS", "SHOWN", "Adapting", "Bench", "Setup"]

# Images at once where there are no gradients: of a set and seed, each gets the same noise whatever the batch is.
CHUNK = 64
#: Images that are kept of each adaptation, to be looked at: so many a class.
SHOWN = 4
#: What a line of results must have to be read.
FIELDS = {"key", "config", "seed", "rate", "parameters", "diverged", "validation_loss", "metrics", "seconds"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is adapted to what, and what looks at the outcome: small, for a worker is sent it.

    Attributes
    ----------
    data : Path
        The folder of the images: see :func:`~paper.diffusion.images.read_images`.
    cache : Path
        Where the pretrained model is kept.
    source, target : str
        Sets of images.
    size, channels, base : int
        Of the images, and width of the U-Net's first level.
    pretraining : Pretraining
    process : Process
    model : Path, optional
        A safetensors file of a :class:`~paper.diffusion.unet.Generator`, instead of pretraining one.
    features : str
        ``classifier`` for one trained on the target's images on the spot, or torch-fidelity's file of Inception's
        weights.
    limit : int, optional
        Of the target's images, so many are trained on.
    held_out : int
        Of its images to train on, the first so many are not: they choose the rate.
    real : int
        Of its test images, so many are compared with.
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
    """How every method is trained and measured.

    Attributes
    ----------
    batch : int
    epochs, steps : int
        The latter if it is not 0.
    samples : int
        Images to generate, the ten classes in turn.
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
        """For one rate."""
        return Schedule(rate, 0.1, self.weight_decay, 1.0, self.optimiser, self.shape)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A base, what it is to learn, and what looks at it: the same in every process that opens the same setup.

    Attributes
    ----------
    setup : Setup
    weights : dict of str to Tensor
        The base's.
    training, validation, test : ImageSet
        Of the target; the last of its test images, as many of each class as there are.
    extractor : Extractor
    real : Seen
        The target's test images as the extractor sees them.
    """

    setup: Setup
    weights: dict[str, Tensor]
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    extractor: Extractor
    real: Seen

    def model(self) -> Generator:
        """The base anew."""
        made = Generator(self.setup.channels, self.setup.base)
        made.load_state_dict(self.weights)
        return made.to(self.setup.device)

    def settings(self) -> dict[str, Any]:
        """All that an outcome depends on, but for method, seed and rate."""
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
        """Adapt the base by one method, sample from it, and measure what comes.

        Parameters
        ----------
        task : Task
            Without a config, the base is measured as it is, and so are as many real images: what nothing generated can
            be expected to better.
        how : Adapting
        out : Path, optional
            A folder for the adapter and for the images that are kept.
        progress : callable
            Is told the fraction done: nine tenths are the training.

        Returns
        -------
        dict
            A line of results, as JSON keeps it.
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
        """Measures of real images of the target that are not among those compared with, and the first of them.

        They are of those held out, or, where these are fewer, of those trained on.
        """
        some = balanced(self.validation if len(self.validation) >= count else self.training, count, seed)
        return quality(self.extractor.see(some.pixels), self.real, some.labels), some.pixels[: SHOWN * CLASSES]

    def _fit(self, model: Generator, how: Adapting, task: Task, progress: Callable[[float], None]) -> float:
        parameters = [one for one in model.parameters() if one.requires_grad]
        steps = how.steps or how.epochs * math.ceil(len(self.training) / how.batch)
        optimiser, rates = how.schedule(task.rate).begin(parameters, steps)
        generator = torch.Generator().manual_seed(task.seed)
        order = torch.empty(0, dtype=torch.int64)
        value = math.nan
        model.train()
        for step in range(steps):
            if len(order) == 0:
                order = torch.randperm(len(self.training), generator=generator)
            chosen, order = self.training[order[: how.batch]], order[how.batch :]
            loss = self._noised(model, chosen, generator)
            value = float(loss.detach())
            if not math.isfinite(value):
                break
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if step + 1 < steps:
                rates.step()
            progress((step + 1) / steps)
        return value

    def _noised(self, model: Generator, images: ImageSet, generator: torch.Generator) -> Tensor:
        device = self.setup.device
        return self.setup.process.loss(model, images.pixels.to(device), images.labels.to(device), generator)

    @torch.no_grad()
    def _loss(self, model: Generator) -> float:
        """Of the images held out, each with one step and noise, the same for every model."""
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
    """As bytes ``(n, size, size, channels)``, in NumPy's format."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as file:
            np.lib.format.write_array(file, pixels, allow_pickle=False)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; give another folder with --out") from None
