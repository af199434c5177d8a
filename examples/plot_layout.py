"""
Groups and layouts
==================

All updates form one long vector, weight after weight, each row by row. A layout cuts it into groups, and a fold
reshapes each group to a tensor. This script draws both for five small weights of three shapes.
"""

# %%
# The layout
# ----------
#
# The boundaries of three groups of equal length do not coincide with those of weights: a weight may straddle two
# groups.

import itertools

import matplotlib.pyplot as plt
import numpy as np

import tnadapt as tna

shapes = [(6, 8), (6, 8), (4, 8), (8, 6), (8, 6)]
plan = tna.UpdatePlan(tna.Config(rank=1, groups=3, fold="hypercube"), shapes)

for weight in range(len(shapes)):
    for piece in plan.layout.of_weight(weight):
        stop = piece.group_start + piece.length
        print(
            f"weight {weight}: {piece.length:2} elements are {piece.group_start:2} to {stop - 1} of group {piece.group}"
        )

# %%
# Top: the long vector with the weights' boundaries, and the groups in color. Bottom: the weights themselves. Darker
# elements are later in their group.

colormaps = [plt.colormaps[name] for name in ("Blues", "Oranges", "Greens")]


def shade(group, position):
    """Return the color of one element."""
    return colormaps[group](0.25 + 0.6 * position / plan.layout.group_size(group))


long_vector = np.array([shade(g, i) for g in range(plan.num_groups) for i in range(plan.layout.group_size(g))])
edges = np.cumsum([0] + [rows * cols for rows, cols in shapes])

fig = plt.figure(figsize=(10, 4.6), layout="constrained")
grid = fig.add_gridspec(2, len(shapes), height_ratios=(1, 3))
strip = fig.add_subplot(grid[0, :])
box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
strip.imshow(long_vector[None], aspect="auto", extent=(0, plan.size, 0, 1))
for weight, (start, stop) in enumerate(itertools.pairwise(edges)):
    strip.axvline(stop, color="black", linewidth=2)
    strip.text((start + stop) / 2, 0.5, f"ΔW$_{weight}$", ha="center", va="center", bbox=box)
starts = np.cumsum([0] + [plan.layout.group_size(g) for g in range(plan.num_groups)])
strip.set(yticks=[], xticks=starts, title="the long vector; ticks where groups begin and end")
for weight, (rows, cols) in enumerate(shapes):
    panel = fig.add_subplot(grid[1, weight])
    panel.imshow(long_vector[edges[weight] : edges[weight + 1]].reshape(rows, cols, -1))
    panel.set_xticks(np.arange(-0.5, cols), labels=[])
    panel.set_yticks(np.arange(-0.5, rows), labels=[])
    panel.grid(color="white", linewidth=1)
    panel.tick_params(length=0)
    panel.set_title(f"ΔW$_{weight}$, {rows} × {cols}")
plt.show()

# %%
# The fold
# --------
#
# Each element of a weight uses one row of each factor, given by its index in that mode of the fold. A stack preserves
# the rows and columns of the weight; a square of all elements does not, and a cube has three indices. This figure shows
# weight 3, of 8 × 6, in a group that contains all of it.

plans = {
    "stack": tna.Config(rank=1, groups=[[0, 1, 2], [3, 4]], fold="stack"),
    "hypercube, M = 2": tna.Config(rank=1, groups=1, fold="hypercube"),
    "hypercube, M = 3": tna.Config(rank=1, groups=1, fold="hypercube", order=3),
}
fig, axes = plt.subplots(len(plans), 3, figsize=(8, 9), layout="constrained")
for row, (name, config) in zip(axes, plans.items(), strict=True):
    plan = tna.UpdatePlan(config, shapes)
    (piece,) = plan.layout.of_weight(3)
    sizes = plan.groups[piece.group].network.sizes
    positions = piece.group_start + np.arange(piece.length)
    indices = np.unravel_index(positions, sizes)
    for mode, panel in enumerate(row):
        if mode >= len(sizes):
            panel.axis("off")
            continue
        index = indices[mode].reshape(shapes[3])
        panel.imshow(index, cmap="viridis", vmin=0, vmax=sizes[mode] - 1)
        for (i, j), value in np.ndenumerate(index):
            light = value < 0.6 * sizes[mode]
            panel.text(j, i, str(value), ha="center", va="center", fontsize=8, color="white" if light else "black")
        panel.set(xticks=[], yticks=[], title=f"index in mode {mode}, of {sizes[mode]}")
    row[0].set_ylabel(name, fontsize="large")
plt.show()
