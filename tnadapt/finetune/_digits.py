"""The default problem: a small ViT pretrained on the digits 0 to 4, to learn 5 to 9."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.algebra import units
from tnadapt.errors import FileError, TnadaptError

from ._specification import Part, Spec
from .data import Data, Samples, choose, divide
from .engines import threads
from .loop import Schedule, accuracy, fit
from .problem import Problem, samples_digest
from .tasks import ImageClassification

# -- The vision transformer --------------------------------------------------------------------------------------------


# Sides of image and patch in pixels.
IMAGE, PATCH = 8, 2
WIDTH, DEPTH, HEADS, RATIO = 64, 4, 4, 2


class Attention(nn.Module):
    """Self-attention with query, key and value in one fused ``qkv``, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, width)`` to the same shape."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.proj(mixed)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, RATIO * WIDTH), nn.GELU(), nn.Linear(RATIO * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, width)`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class SmallViT(nn.Module):
    """A vision transformer: patches, learned positions, blocks, the mean over patches, a linear head.

    Examples
    --------
    >>> model = SmallViT(5)
    >>> model(torch.zeros(3, 1, 8, 8)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([3, 5]), 135685)
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((IMAGE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, 1, 8, 8)`` to logits ``(n, classes)``."""
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


# -- The problem -------------------------------------------------------------------------------------------------------


OLD = (0, 1, 2, 3, 4)
NEW = (5, 6, 7, 8, 9)
RATE = 2e-3
BATCH = 64
DECAY = 0.05
BETA2 = 0.999  # torch's, so that the weights stay those that published results have


class Pixels:
    """Images in one tensor: a part of a :class:`~tnadapt.finetune.Problem`."""

    lengths: Tensor | None = None

    def __init__(self, samples: Samples, mean: float, std: float) -> None:
        pixels = torch.from_numpy(np.asarray(samples.inputs, np.float32)).unsqueeze(1)
        self.images = (pixels - mean) / std
        self.labels = torch.from_numpy(samples.labels)

    def batch(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return images ``(n, 1, 8, 8)``."""
        return self.images[indices].to(device)


def digits(spec: Spec, progress: Callable[[str, float], None] = lambda what, done: None) -> Problem:
    """Return the problem of scikit-learn's digits: a model, and the five classes that it has not seen.

    The model is taken from the cache, or pretrained, when it is first built.

    Parameters
    ----------
    spec : Spec
        ``cache``, ``pretrain_epochs``, ``limit``, ``holdout`` and ``keep_trainable`` are used.
    progress : callable
        Called with ``(what, fraction done)`` during pretraining.

    Returns
    -------
    Problem

    Raises
    ------
    TnadaptError
        If scikit-learn is not installed; later, when the model is built, if the cache cannot be written.
    """
    old, new = _read(OLD), _read(NEW)
    samples = divide(old, validation=0.1, test=0.1)
    mean, std = float(samples["training"].inputs.mean()), float(samples["training"].inputs.std())
    parts = {name: Pixels(part, mean, std) for name, part in samples.items()}
    limited = dataclasses.replace(new, samples=choose(new.samples, spec.limit))
    new_parts: dict[str, Part] = {
        name: Pixels(part, mean, std) for name, part in divide(limited, validation=spec.holdout).items()
    }
    sizes = {"image": IMAGE, "patch": PATCH, "channels": 1, "width": WIDTH}
    recipe = {
        "version": 1,
        "data": samples_digest(parts),
        "sizes": {**sizes, "depth": DEPTH, "heads": HEADS, "ratio": RATIO},
        "epochs": spec.pretrain_epochs,
        "schedule": dataclasses.asdict(Schedule(RATE, weight_decay=DECAY, beta2=BETA2)),
        "batch": BATCH,
    }

    @functools.cache
    def weights() -> dict[str, Tensor]:
        folder = (spec.cache or cache_folder()) / "digits"
        return _cached(folder, recipe, lambda: _pretrain(parts, recipe, progress), SmallViT(len(OLD)))

    def sketch(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SmallViT(len(NEW))

    def build(seed: int) -> nn.Module:
        model = sketch(seed)
        model.load_state_dict({**weights(), **{k: v for k, v in model.state_dict().items() if k.startswith("head.")}})
        return model

    keep = tuple(dict.fromkeys([*spec.keep_trainable, "head"]))
    task = ImageClassification(new.classes)
    # Matrix products of this size do not gain from a second thread, but a second training in parallel does.
    return Problem(
        "the digits 5 to 9", "image", new.classes, new_parts, build, _plain, keep, ("head",), task, threads=1,
        sketch=sketch, rate=units.RATE,
    )  # fmt: skip


def _plain(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _read(classes: tuple[int, ...]) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TnadaptError(
            "the digits come with scikit-learn, which is not installed: pip install 'tnadapt[demo]'"
        ) from None
    bunch = load_digits()
    chosen = np.isin(bunch.target, classes)
    labels = np.searchsorted(classes, bunch.target[chosen]).astype(np.int64)
    images = (bunch.images[chosen] / 16.0).astype(np.float32)
    return Data("the digits", "image", tuple(map(str, classes)), Samples(images, labels))


def _pretrain(
    parts: dict[str, Pixels], recipe: dict[str, Any], progress: Callable[[str, float], None]
) -> dict[str, Tensor]:
    cpu = torch.device("cpu")
    # One thread, so that the sums, and hence the weights, do not depend on the number of cores.
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, task = SmallViT(len(OLD)), ImageClassification(tuple(map(str, OLD)))
        schedule = Schedule(**recipe["schedule"])
        parameters = list(model.parameters())
        for step in fit(model, _plain, task, parts["training"], parameters, schedule, recipe["epochs"], BATCH, cpu):
            progress("pretraining a small ViT on the digits 0 to 4", step.done / step.total)
    held_out = accuracy(model, _plain, task, parts["test"], cpu)
    if recipe["epochs"] >= 20 and held_out < 0.9:
        raise TnadaptError(
            f"the small ViT classifies only {held_out:.0%} of the digits 0 to 4 after pretraining, expected at least "
            "90%: check the installation of torch"
        )
    return model.state_dict()


# -- The cache of the pretrained model ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the cache folder: ``$XDG_CACHE_HOME/tnadapt``, or the platform's default."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "tnadapt"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "tnadapt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tnadapt"
    return Path.home() / ".cache" / "tnadapt"


def _cached(
    folder: Path, recipe: dict[str, Any], make: Callable[[], dict[str, Tensor]], like: nn.Module
) -> dict[str, Tensor]:
    """Return the weights of a recipe from the folder; if missing or damaged, compute and store them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"vit-{key}.safetensors"
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in like.state_dict().items()}
    with contextlib.suppress(OSError, SafetensorError):
        stored: dict[str, Tensor] = load_file(path)
        same = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == wanted
        if same and all(bool(tensor.isfinite().all()) for tensor in stored.values()):
            return stored
    with _kept_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in make().items()}
    with _kept_in(folder), tempfile.TemporaryDirectory(dir=folder) as beside:
        save_file(weights, Path(beside) / path.name)
        os.replace(Path(beside) / path.name, path)
    return weights


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot keep the pretrained model in {folder}: {error}; give another folder with --cache"
        ) from None
