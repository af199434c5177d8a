"""
Attach to a vision transformer of timm
======================================

A small ViT learns the digits 0 to 4. Then its weights are frozen, and adapters on its query and value projections learn
the digits 5 to 9. The example compares the default of ``attach`` with LoRA, with training all of q and v, and with the
head alone. Finally the best small adapter is merged, which leaves the predictions unchanged.
"""

# %%
# A base model
# ------------
#
# The digits are scikit-learn's: 1797 real images of 8 × 8 pixels. The ViT uses patches of 2 × 2. It is trained in this
# script, so nothing needs to be downloaded.

import copy

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from sklearn.datasets import load_digits

import tnadapt as tna
import tnadapt.torch

torch.set_num_threads(1)  # the arrays are small
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 3 == 0


def part(low, high, test):
    """Return the images of the digits from low to high, and their labels counted from 0."""
    chosen = (low <= labels) & (labels <= high) & (held_out == test)
    return images[chosen], labels[chosen] - low


def fit(model, parameters, data, rate, epochs):
    """Train with AdamW and a warm-up; return the test accuracy after each epoch, in percent."""
    (x, y), test = (part(*data, test=which) for which in (False, True))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(y) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    found = [accuracy(model, *test)]
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(y)).split(32):
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found.append(accuracy(model, *test))
    return found


@torch.no_grad()
def accuracy(model, x, y):
    """Return the accuracy in percent."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


base = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2,
    class_token=False, global_pool="avg", num_classes=5,
)  # fmt: skip
curve = fit(base, base.parameters(), (0, 4), rate=2e-3, epochs=25)
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {curve[-1]:.1f} % of the digits 0 to 4")

# %%
# Attach
# ------
#
# The head is new, and stays trainable. Everything else is frozen, and one call adapts query and value. timm stores q, k
# and v in one weight; the rows of k are left unchanged.

base.reset_classifier(5)
model = copy.deepcopy(base)
adapter = tnadapt.torch.attach(model, keep_trainable="head")
print(adapter.summary())

# %%
# One group, eight weights
# ------------------------
#
# All updates form one long vector. Its elements, row by row, fill a square, which is one low-rank matrix. Each row of
# the square holds almost three rows of a weight, and its boundaries coincide with no weight's boundary.

rows = adapter.summary().rows
side = adapter.plan.groups[0].network.sizes[0]
square = np.full(side * side, np.nan)
for number, row in enumerate(rows):
    ((_, start, stop),) = row.slices
    square[start:stop] = number

fig, axes = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
axes.imshow(square.reshape(side, side), cmap="Paired", vmin=-0.5, vmax=11.5, interpolation="nearest")
for row in rows:
    ((_, start, stop),) = row.slices
    label = f"$\\Delta W_{row.role}$ of block {row.target.split('.')[1]}: {row.shape[0]} × {row.shape[1]}"
    axes.text(side / 2, (start + stop) / 2 / side, label, ha="center", va="center")
axes.set(xticks=[0, side - 1], yticks=[0, side - 1], xlabel="column of the square", ylabel="row of the square")
axes.set_title(f"{adapter.plan.size:,} elements of ΔW, {adapter.num_parameters:,} parameters")
plt.show()

# %%
# Training
# --------
#
# An ordinary loop over the parameters that require a gradient. All adapters have the same learning rate: presets train
# in units for which one rate suits all of them. One seed: the curves are an illustration, not a benchmark.

P = tna.presets
methods = {
    "head alone": (None, 0.1),
    "LoRA, r = 1": (P.lora(1), 0.01),
    "SuperLoRA, r = 2": (P.superlora(2), 0.01),
    "LoRA, r = 4": (P.lora(4), 0.01),
    "SuperLoRA, r = 8 (default)": (P.superlora(8), 0.01),
    "all of q and v": (P.dense(), 0.01),
}
curves, trained = {}, {}
for name, (config, rate) in methods.items():
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    count, parameters = 0, list(model.head.parameters())
    if config is not None:
        adapter = tnadapt.torch.attach(model, config, keep_trainable="head")
        count, parameters = adapter.num_parameters, [p for p in model.parameters() if p.requires_grad]
        trained[name] = adapter
    curves[name] = count, fit(model, parameters, (5, 9), rate, epochs=12)
    print(f"{name:26}: {count:6,} parameters and the head, {curves[name][1][-1]:.1f} %")

# %%
# The right panel shows the learned square, with lines at the ends of weights: a matrix of rank 8. Cut into eight
# weights, it gives matrices of (almost) full rank, which no low-rank update of a single weight could produce.

adapter = trained["SuperLoRA, r = 8 (default)"]
b, a = (array.detach() for array in adapter.arrays().values())
learned = b @ a.T
ranks = [int(torch.linalg.matrix_rank(delta, rtol=1e-4)) for delta in adapter.deltas()]
print(f"rank of the square: {torch.linalg.matrix_rank(learned, rtol=1e-4)}; ranks of the weights: {ranks}")

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(1.25, 1))
colors = ["grey", "tab:blue", "tab:orange", "tab:blue", "tab:orange", "black"]
styles = [":", ":", ":", "-", "-", "-"]
for (name, (count, curve)), color, style in zip(curves.items(), colors, styles, strict=True):
    label = f"{name}: {count:,}" if count else name
    left.plot(curve, color=color, linestyle=style, label=label)
left.set(xlabel="epoch", ylabel="test accuracy, digits 5 to 9, %", ylim=(40, 95), xlim=(0, 12), xticks=range(0, 13, 3))
left.legend(title="parameters in addition to the head's 325", loc="lower right")
left.grid(alpha=0.3)
limit = float(learned.abs().quantile(0.995))
right.imshow(learned, cmap="RdBu", vmin=-limit, vmax=limit)
for row in rows[1:]:
    right.axhline(row.slices[0][1] / side, color="black", linewidth=0.7)
centers = [sum(row.slices[0][1:]) / 2 / side for row in rows]
right.set_yticks(centers, labels=[f"{row.role}, block {row.target.split('.')[1]}" for row in rows])
right.set(xticks=[], title="ΔW of the default, as the square it is")
plt.show()

# %%
# Merging
# -------
#
# After a merge, each weight is the sum, and the adapter costs nothing. The merge can be undone bit for bit, or made
# permanent.

model = adapter.model.eval()
x, y = part(5, 9, test=True)
with torch.no_grad():
    attached = model(x)
    adapter.merge()
    merged = model(x)
    adapter.unmerge()
    again = model(x)
print(f"same answers merged: {bool((merged.argmax(1) == attached.argmax(1)).all())}")
print(f"largest difference of a logit: {(merged - attached).abs().max():.1e}")
print(f"unmerged, to the bit as before: {torch.equal(again, attached)}")

final = adapter.bake()
print(f"baked: {type(final).__name__} with {sum(p.numel() for p in final.parameters()):,} parameters")
