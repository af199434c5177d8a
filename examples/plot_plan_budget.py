"""
A budget of parameters
======================

Find the settings that fit a budget, their capacity, and where a setting places each weight. Nothing is trained: a plan
consists of integers.
"""

# %%
# Ten thousand parameters
# -----------------------
#
# For the 24 query and value weights of ViT-base. A dot marks the front: no other row is as good in parameters, freedom
# and cost, and better in one of them.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import tnadapt as tna
from tnadapt import plot
from tnadapt.planning import largest_rank

vit = [(768, 768)] * 24
layers = [weight // 2 for weight in range(24)]
found = tna.plan(vit, 10_000, layers=layers)
print(found)

# %%
# Freedom and cost
# ----------------
#
# Settings that use more than a tenth of the budget, by degrees of freedom and multiply-adds per step; those on the
# front have a dark edge. Kronecker products and low ranks take little more than one product per element, forward and
# twice backward. Projections cost their transforms, of :math:`L \log_2 L` additions each, however few the parameters
# are. High ranks of high orders cost the most.

styles = plot.styles(row.name.family for row in found.rows)
fig, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
for row in sorted(found.rows, key=lambda row: row in found.front):
    if row.parameters > 1000:
        color, marker = styles[row.name.family]
        edge = "black" if row in found.front else "white"
        axes.scatter(row.freedom, row.cost, s=70, color=color, marker=marker, edgecolors=edge, label=row.name.family)
        if row in found.front:
            axes.annotate(str(row.name), (row.freedom, row.cost), xytext=(0, -15), textcoords="offset points",
                          ha="right" if row.freedom > 5000 else "left", fontsize="small")  # fmt: skip
axes.set(yscale="log", xlabel="degrees of freedom", ylabel="multiply-adds per step", ylim=(2.5e7, 6e9))
axes.grid(which="major", alpha=0.3)
handles, labels = axes.get_legend_handles_labels()
firsts = dict(zip(reversed(labels), reversed(handles), strict=True))
axes.legend(firsts.values(), firsts, frameon=False, fontsize="small", loc="upper left")
plt.show()


# %%
# Parameters against rank
# -----------------------
#
# Higher orders need fewer parameters at equal rank, so they reach a higher rank within a budget. ``tnadapt plan`` draws
# this plot with ``--picture``.


def show(draw, *args, **settings):
    """Show one of tnadapt's plots, which are written to files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        draw(*args, path, **settings)
        image = plt.imread(path)
    height, width, _ = image.shape
    plt.figure(figsize=(width / 150, height / 150), dpi=150).figimage(image)
    plt.show()


show(plot.parameters, vit, budget=10_000, title="Query and value of ViT-base, one group")

# %%
# Where each weight is
# --------------------
#
# The boundaries of five groups of 24 weights do not coincide with those of weights. ``tnadapt plan`` draws this plot
# with ``--layout-picture``.

names = [f"{role}{layer}" for layer in range(12) for role in "qv"]
roles = ["query", "value"] * 12
plan = tna.UpdatePlan(tna.presets.superlora(rank=1, groups=5), vit)
show(plot.layout, plan, names=names, roles=roles, title="SuperLoRA, G = 5")

# %%
# The U-Net of the paper has weights of two sizes. A cube of 58³ is longer than a third of them:

channels = [64] * 2 + [128] * 6 + [128] + [128] * 9 + [64] * 3
unet = [(c, c) for c in channels for _ in "qv"]
names = [f"{role}{module}" for module in range(21) for role in "qv"]
plan = tna.UpdatePlan(tna.presets.lorta(rank=1, groups=3), unet)
show(plot.layout, plan, names=names, roles=["query", "value"] * 21, title="LoRTA of order 3, G = 3")

# %%
# Ranks, and powers of two
# ------------------------
#
# Here the square of all weights has rank 1, and the update of one weight has full rank: each of its rows is cut from
# the square at a different column. If sizes are powers of two, the cuts may line up, and the rank stays low.

for name, shapes in {"24 of 768²": vit, "64 of 4096²": [(4096, 4096)] * 64}.items():
    for groups in (1, 3, 4):
        plan = tna.UpdatePlan(tna.presets.superlora(rank=1, groups=groups), shapes)
        sizes = plan.groups[0].network.sizes
        print(f"{name:12} G = {groups}: folded to {sizes}, rank of an update {largest_rank(plan)}")
