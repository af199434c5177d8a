"""
Read an adapter with NumPy alone
================================

An adapter file is one safetensors file: a JSON header, then numbers. This example reads one by hand, from its bytes,
and computes the updates from it by the formula. Then it evaluates the whole adapted model in NumPy. torch is used only
to train the model first.
"""

# %%
# A file to read
# --------------
#
# A small transformer reads scikit-learn's digits row by row: eight tokens of eight pixels. It learns 0 to 4, and then
# an adapter on its query and value projections learns 5 to 9, together with a new head.

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

import tnadapt as tna
import tnadapt.torch

torch.set_num_threads(1)  # the arrays are small
torch.manual_seed(0)

digits = load_digits()
images = (digits.images / 16 - 0.3).astype(np.float32)
new = digits.target >= 5
held_out = np.arange(len(images)) % 3 == 0
WIDTH, HEADS = 32, 4


class RowReader(torch.nn.Module):
    """Rows, positions, two layers of attention, and a head on the mean."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(8, WIDTH)
        self.position = torch.nn.Parameter(0.5 * torch.randn(8, WIDTH))
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, HEADS, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def fit(model, chosen, rate, epochs):
    """Train the parameters that require a gradient on the chosen images."""
    x, y = torch.tensor(images[chosen]), torch.tensor(digits.target[chosen] % 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(y) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(32):
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


folder = tempfile.TemporaryDirectory()
path, base_path = Path(folder.name, "adapter.safetensors"), Path(folder.name, "base.npz")

model = RowReader()
fit(model, ~new & ~held_out, rate=3e-3, epochs=30)
torch.nn.init.zeros_(model.head.weight)
np.savez(base_path, **{name: value.numpy() for name, value in model.state_dict().items()})
adapter = tnadapt.torch.attach(
    model, tna.presets.superlora(rank=3, projection="linear", ratio=0.25), keep_trainable="head"
)
fit(model, new & ~held_out, rate=1e-2, epochs=30)
adapter.save(path)
with torch.no_grad():
    torch_logits = model.eval()(torch.tensor(images[new & held_out])).numpy()
print(adapter)

# %%
# By hand
# -------
#
# The first eight bytes are the length of the header, which gives the position of each tensor's bytes.

content = path.read_bytes()
length = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + length])
recipe = json.loads(header.pop("__metadata__")["tnadapt"])
arrays = {}
for name, entry in header.items():
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    arrays[name] = np.frombuffer(content[start:stop], "<f4").reshape(entry["shape"])
    print(f"{name:24} {arrays[name].shape}")
print(recipe["config"])
for target in recipe["targets"]:
    print(target)

# %%
# Most of a small file is metadata: the recipe, a fingerprint of the base, and checksums.

parts = {"recipe": length + 8}
parts |= {name.removeprefix("group0.split0."): array.nbytes for name, array in arrays.items()}
fig, axes = plt.subplots(figsize=(9, 2.1), layout="constrained")
left = 0
for (name, size), color in zip(parts.items(), plt.cm.Set2.colors, strict=False):
    axes.barh(0, size, left=left, color=color, label=f"{name}: {size:,} bytes")
    left += size
axes.set(yticks=[], xlim=(0, left), xlabel="byte of the file")
fig.legend(ncols=3, loc="outside upper center", frameon=False)
plt.show()

# %%
# The config contains what differs from the format's defaults. With these settings the updates of all four weights are
# one vector y = F(x), and x is a square matrix of rank 3, read row by row and cut to a quarter of y's length. F is
# drawn from the seed, and is the only part that is not in the file.

settings = recipe["config"]
shapes = [(WIDTH, WIDTH)] * len(recipe["targets"])
total = sum(rows * cols for rows, cols in shapes)
low_rank = arrays["group0.split0.factor0"] @ arrays["group0.split0.factor1"].T
x = low_rank.ravel()[: int(total * settings["ratio"])]
y = tna.Projection(settings["projection"], len(x), total, seed=0)(x)
by_hand = y.reshape(-1, WIDTH, WIDTH)

# %%
# With tnadapt
# ------------
#
# ``tna.load`` does the same and checks everything: that the file is complete, that all numbers are finite, and that
# this machine draws the same F that the file was created with.

file = tna.load(path)
print(file)
deltas = file.deltas()
print("the same updates:", all(np.allclose(a, b, atol=1e-6) for a, b in zip(by_hand, deltas, strict=True)))

# %%
# The square has rank 3. F destroys the low rank: every weight gets an update of full rank.

names = [f"layer {target.module.split('.')[2]}, {target.role}" for target in file.targets]
fig, axes = plt.subplots(1, 6, figsize=(13, 2.6), layout="constrained", width_ratios=(1, 1, 1, 1, 1, 1.5))
panels = [("the square", low_rank), *zip(names, deltas, strict=True)]
for panel, (title, matrix) in zip(axes, panels, strict=False):
    limit = np.abs(matrix).max()
    panel.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    panel.set(title=title, xticks=[], yticks=[])
for title, matrix in panels:
    values = np.linalg.svd(matrix, compute_uv=False)
    axes[-1].semilogy(values / values[0], label=title, color="black" if title == "the square" else None)
axes[-1].set(title="singular values", xlabel="number", ylim=(1e-3, 1.5))
axes[-1].legend(fontsize=7)
plt.show()

# %%
# The adapted model, in NumPy
# ---------------------------
#
# Twenty lines suffice for a transformer of this kind.

weights = dict(np.load(base_path))


def linear(x, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(x, name):
    both = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
    q, k, v = (one.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for one in np.split(both, 3, axis=-1))
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(WIDTH / HEADS))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{name}.out_proj")


def logits(images):
    """The model's answer to images ``(n, 8, 8)``."""
    x = linear(images, "embed") + weights["position"]
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        x = x + attention(norm(x, f"{layer}.norm1"), f"{layer}.self_attn")
        x = x + linear(np.maximum(linear(norm(x, f"{layer}.norm2"), f"{layer}.linear1"), 0), f"{layer}.linear2")
    return linear(x.mean(1), "head")


# %%
# A target identifies rows of a parameter. Query and value of ``nn.MultiheadAttention`` are the first and the last third
# of the rows of ``in_proj_weight``; the rows of the key are not changed.

x, labels = images[new & held_out], digits.target[new & held_out] % 5
weights |= file.kept
print(f"the new head alone, on the base: {100 * np.mean(logits(x).argmax(1) == labels):.1f} % of the digits 5 to 9")
for target, delta in zip(file.targets, deltas, strict=True):
    print(f"  {target.name}, {target.role}: {target.rows}")
    target.block(weights[target.name])[...] += target.like_block(delta)
print(f"with the updates in its weights: {100 * np.mean(logits(x).argmax(1) == labels):.1f} %")
print(f"largest difference from torch's logits: {np.abs(logits(x) - torch_logits).max():.1e}")
folder.cleanup()
