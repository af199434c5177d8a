"""The diffusion process: noise, the training loss, and sampling by DDPM or DDIM with classifier-free guidance."""

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
    """The settings of the process; schedules and steps are those of diffusers.

    The added variance rises linearly from 1e-4 to 0.02 in 1,000 steps (Ho, Jain and Abbeel 2020). The noise used in
    sampling is ``(1 + w) e(x, class) - w e(x)`` (Ho and Salimans 2021), and the predicted image is clipped to the range
    of images.

    Attributes
    ----------
    steps : int
    hidden : float
        Fraction of training images whose class is hidden.
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
            raise TnadaptError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        # Otherwise diffusers' last step would end one short of the image.
        if self.sampling_steps < 1 or self.steps % self.sampling_steps:
            raise TnadaptError(f"sampling_steps must divide {self.steps}; got {self.sampling_steps}")
        if not (0 <= self.hidden < 1 and self.guidance >= 0):
            raise TnadaptError(
                f"hidden must be in [0, 1) and guidance at least 0; got {self.hidden} and {self.guidance}"
            )

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the mean squared error of the predicted noise.

        Parameters
        ----------
        model : Generator
        images : Tensor, shape (batch, channels, height, width)
            Values from -1 to 1.
        labels : Tensor, shape (batch,)
        generator : torch.Generator
            Draws steps, noise and hidden classes; on the CPU, so that they do not depend on the device.

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
        """Generate one image for each requested class.

        Parameters
        ----------
        model : Generator
            Set to eval mode.
        labels : Tensor, shape (n,)
            On the model's device.
        like : (channels, height, width)
        seed : int
            Seed of all noise; an image does not depend on the batch size.
        batch : int
            Batch size.

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
        # With "trailing" spacing the first step starts from pure noise, however few steps there are.
        return made(
            self.steps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True,
            timestep_spacing="trailing",
        )  # fmt: skip
