"""The digits of scikit-learn, and a small vision transformer that reads them, for the examples of populations."""

import argparse
import json
import time
from pathlib import Path

import scipy.ndimage
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

DIGITS = load_digits()
LABELS = torch.tensor(DIGITS.target)


def parser(text, steps):
    """Return the options of an example."""
    options = argparse.ArgumentParser(description=text)
    options.add_argument("--steps", type=int, default=steps)
    options.add_argument("--out", type=Path, help="a file for the result")
    return options


def turned(angles):
    """Return the images, each turned by its angle in degrees: ``(1797, 1, 8, 8)``."""
    pairs = zip(DIGITS.images, angles, strict=True)
    images = [scipy.ndimage.rotate(image, float(angle), reshape=False, order=1) for image, angle in pairs]
    return torch.tensor((images - DIGITS.images.mean()) / DIGITS.images.std()).float()[:, None]


def pretrained(images, labels, epochs=15):
    """Return a vision transformer of 136,000 numbers that is trained on images."""
    torch.set_num_threads(1)  # the arrays are small
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2,
        class_token=False, global_pool="avg", num_classes=10,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(32):
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the accuracy in percent."""
    return round(100 * (model(images).argmax(-1) == labels).double().mean().item(), 1)


def write(path, **result):
    """Print the result, and write it to a file."""
    text = json.dumps(result | {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
