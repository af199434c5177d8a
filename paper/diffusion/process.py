"""Noise, its prediction, and the way back to images: DDPM and DDIM, guided by the class without a classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TnadaptError

__all__ = ["SAMPLERS", "Process"]

SAMPLERS = ("ddpm", "ddim")


@dataclasses.dataclass(frozen=True)
class Process:
    """How images become noise and come back; schedules and steps are those of diffusers.

    The variance added goes linearly from 1e-4 to 0.02 in 1,000 steps (Ho, Jain and Abbeel 2020). The noise that
    leads back is ``(1 + w) e(x, class) - w e(x)`` (Ho and Salimans 2021), and the image that it predicts is cut to the
    values that images have.

    Attributes
    ----------
    steps : int
    hidden : float
        Of the images in training, how many are shown without their class.
    guidance : float
        w; 0 for none.
    sampler : {"ddpm", "ddim"}
    sampling_steps : int

    Raises
    ------
    TnadaptError
        If a setting is out of range.
    """

    steps: int = 1000
    hidden: float = 0.1
    guidance: float = 1.8
    sampler: str = "ddim"
    sampling_steps: int = 100

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise TnadaptError(f"sampler is one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        # Otherwise the last of diffusers' steps would stop one short of the image.
        if self.sampling_steps < 1 or self.steps % self.sampling_steps:
            raise TnadaptError(f"sampling_steps divides {self.steps}; got {self.sampling_steps}")
        if not (0 <= self.hidden < 1 and self.guidance >= 0):
            raise TnadaptError(f"hidden is in [0, 1), guidance at least 0; got {self.hidden} and {self.guidance}")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted noise.

        Parameters
        ----------
        model : Generator
        images : Tensor, shape (batch, channels, height, width)
            From -1 to 1.
        labels : Tensor, shape (batch,)
        generator : torch.Generator
            Draws step, noise, and whose class is hidden; of the CPU, so that they do not depend on the device.

        Returns
        -------
        Tensor, shape ()
        """
        count, device = len(images), images.device
        step = torch.randint(self.steps, (count,), generator=generator).to(device)
        noise = torch.randn(images.shape, generator=generator).to(device)
        known = (torch.rand(count, generator=generator) >= self.hidden).to(device)
        noisy = self._scheduler("ddpm").add_noise(images, noise, step)
        return nn.functional.mse_loss(model(noisy, step, labels, known), noise)

    @torch.no_grad()
    def sample(self, model: nn.Module, labels: Tensor, like: tuple[int, int, int], seed: int, batch: int) -> Tensor:
        """An image of each class that is asked for.

        Parameters
        ----------
        model : Generator
            Is put in eval mode.
        labels : Tensor, shape (n,)
            On the model's device.
        like : (channels, height, width)
        seed : int
            Of all noise: an image is the same whatever the batch.
        batch : int
            Images at once.

        Returns
        -------
        Tensor, shape (n, channels, height, width)
            On the CPU, from -1 to 1.
        """
        model.eval()
        found = []
        for number, some in enumerate(torch.split(labels, batch)):
            first = number * batch
            seeds = [seed * 1_000_003 + first + place for place in range(len(some))]
            generators = [torch.Generator().manual_seed(one) for one in seeds]
            found.append(self._sampled(model, some, like, generators).cpu())
        return torch.cat(found)

    def _sampled(
        self, model: nn.Module, labels: Tensor, like: tuple[int, int, int], generators: list[torch.Generator]
    ) -> Tensor:
        scheduler = self._scheduler(self.sampler)
        scheduler.set_timesteps(self.sampling_steps)
        images = torch.stack([torch.randn(like, generator=one) for one in generators]).to(labels.device)
        told = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        for step in scheduler.timesteps:
            now = step.to(labels.device).expand(len(labels))
            noise = model(images, now, labels, told)
            if self.guidance:
                noise = (1 + self.guidance) * noise - self.guidance * model(images, now, labels, ~told)
            images = scheduler.step(noise, step, images, generator=generators).prev_sample
        return images.clamp(-1.0, 1.0)

    def _scheduler(self, kind: str) -> Any:
        try:
            from diffusers import DDIMScheduler, DDPMScheduler
        except ImportError:
            raise TnadaptError("diffusion needs the package diffusers: pip install 'tnadapt[paper]'") from None
        made = DDPMScheduler if kind == "ddpm" else DDIMScheduler
        # "trailing": the first step is from noise alone, however few there are.
        return made(
            self.steps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True,
            timestep_spacing="trailing",
        )  # fmt: skip
