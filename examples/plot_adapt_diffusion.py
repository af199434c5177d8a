"""
Adapt a diffusion model
=======================

A diffusion model draws digits. From 200 pictures, an adapter teaches it to draw them as in a mirror. A classifier says
how many of the drawn digits can be read. The model is a U-Net of diffusers; the last section says what is different
for Stable Diffusion.

You need ``pip install "tnadapt[plot,torch]" diffusers scikit-learn``. No package contains a pretrained diffusion
model that is small enough to run here, so this page begins by training one.
"""

# %%
# Train a small model
# -------------------
#
# scikit-learn's digits have 8 × 8 pixels. The U-Net gets a noisy picture, the time step and the class, and predicts the
# noise. Training takes about half a minute.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import tnadapt as tna

torch.manual_seed(0)
digits = load_digits()
pictures = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # from -1 to 1
labels = torch.tensor(digits.target)
noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def train(model, parameters, pictures, labels, steps, rate):
    """Train by the usual loss: the squared error of the predicted noise."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen, time = torch.randint(len(pictures), (64,)), torch.randint(1000, (64,))
        noise = torch.randn(64, 1, 8, 8)
        noisy = noising.add_noise(pictures[chosen], noise, time)
        predicted = model(noisy, time, class_labels=labels[chosen]).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


model = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=16,
    norm_num_groups=8,
    num_class_embeds=10,
)
train(model, model.parameters(), pictures, labels, steps=300, rate=2e-3)

# %%
# Draw and read
# -------------
#
# Ten drawings of each class, from the same noise every time. A support vector machine that was trained on the real
# pictures reads them.

wanted = torch.arange(10).repeat(10)
reader = SVC(gamma=0.02).fit(pictures.flatten(1).numpy(), labels.numpy())


@torch.no_grad()
def draw(model, steps=15):
    """Return 100 pictures, 10 of each class."""
    sampler = DDIMScheduler.from_config(noising.config)
    sampler.set_timesteps(steps)
    drawn = torch.randn(len(wanted), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for time in sampler.timesteps:
        drawn = sampler.step(model(drawn, time, class_labels=wanted).sample, time, drawn).prev_sample
    return drawn.clamp(-1, 1)


def read(pictures):
    """Return the share of pictures that the classifier reads as what they should be."""
    return float(reader.score(pictures.flatten(1).numpy(), wanted.numpy()))


before = draw(model)
print(f"the model: {read(before):.0%} of its digits are read")
print(f"in a mirror: {read(before.flip(-1)):.0%}, as some digits look alike there")

# %%
# Teach it to write mirrored digits
# ---------------------------------
#
# The adapter is attached to all 25 convolutions, which have four fifths of this U-Net's weights; one of the attention
# alone changed too little for this task. The convolutions have 14 different shapes. One tensor of order 4 covers all.

mirrored = pictures.flip(-1)
few = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:200]
torch.manual_seed(1)
adapter = tna.torch.attach(model, "superlora", rank=32, order=4, targets="conv")
adapter.print_trainable_parameters()
train(model, adapter.parameters(), mirrored[few], labels[few], steps=200, rate=1e-2)
after = draw(model)
print(f"with {adapter.num_parameters:,} trained numbers: {read(after.flip(-1)):.0%} are read in a mirror")

# %%
# Above, what the model draws without the adapter; below, with it, from the same noise.

fig, axes = plt.subplots(2, 10, figsize=(10, 2.3), layout="constrained")
for row, drawn in zip(axes, (before, after), strict=True):
    for axis, picture in zip(row, drawn[:10], strict=True):
        axis.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
plt.show()

# %%
# Save, detach, and load
# ----------------------
#
# Without the adapter, the model draws what it drew before, to the last bit; with the loaded file, what it learned.

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "mirror.safetensors")
    adapter.save(file)
    adapter.detach()
    print("detached, the same pictures:", torch.equal(draw(model), before))
    tna.torch.load(model, file)
    print(f"loaded from {file.stat().st_size:,} bytes, the same pictures:", torch.equal(draw(model), after))

# %%
# Stable Diffusion and others
# ---------------------------
#
# A pipeline has its U-Net as ``pipeline.unet``, or its transformer as ``pipeline.transformer``. Attach to that, and
# train with the loss of your script:
#
# .. code-block:: python
#
#    adapter = tna.torch.attach(pipeline.unet, "lora", rank=4, targets="all-linear")
#
# Pipelines load files of LoRA, and many programs those of LoHa and LoKr: :doc:`/convert` writes them. Any other adapter
# can be merged into the weights, :doc:`/merging`. :doc:`/from_lycoris` has the settings for those who know LyCORIS or
# kohya's scripts. :doc:`/distributed` trains on several GPUs.
