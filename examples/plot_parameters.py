"""
Parameters against rank
=======================

The paper's figure 2 and the counts stated in its text, computed from plans. A plan allocates nothing, so counting is
instant for a model of any size.
"""

# %%
# The weights
# -----------
#
# ViT-base: query and value of twelve layers. The U-Net of the paper's section 4.2: query and value of 21 attention
# modules, of 64 or 128 channels.

import matplotlib.pyplot as plt
import numpy as np

import tnadapt as tna

vit = [(768, 768)] * 2 * 12
channels = [64] * 2 + [128] * 6 + [128] + [128] * 9 + [64] * 3  # down, middle, up
unet = [(c, c) for c in channels for _ in "qv"]

for name, shapes in {"ViT-base": vit, "U-Net": unet}.items():
    print(f"{name}: {len(shapes)} weights, {tna.UpdatePlan(tna.presets.dense(), shapes).size} elements")

# %%
# Higher order, fewer parameters
# ------------------------------
#
# One group of all weights is folded to a hypercube of order M. A CP factorization, which is Tucker with a diagonal or
# identity core, has :math:`r\,M\,d` parameters, where :math:`d = \lceil N^{1/M} \rceil`, which is linear in the rank. A
# full Tucker core adds :math:`r^M`, which dominates as the rank grows, until the rank is limited to :math:`d`.


def counts(ranks, order, kind):
    """Return the parameter counts of one group folded to that order, for each rank."""
    configs = (tna.Config(rank=r, order=order, groups=1, fold="hypercube", format=kind) for r in ranks)
    return [tna.parameter_count(config, vit) for config in configs]


ranks = np.unique(np.geomspace(1, 128, 60).astype(int)).tolist()
orders = (2, 3, 4, 5)
colors = plt.colormaps["viridis"](np.linspace(0, 0.85, len(orders)))

fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
for panel, (kind, title) in zip(axes, {"cp": "CP (figure 2)", "tucker": "Tucker (LoRTA)"}.items(), strict=True):
    lora = [tna.parameter_count(tna.presets.lora(rank=r), vit) for r in ranks]
    panel.plot(ranks, lora, color="crimson", linestyle="--", label="LoRA, one group per weight")
    for order, color in zip(orders, colors, strict=True):
        panel.plot(ranks, counts(ranks, order, kind), color=color, label=f"M = {order}")
    panel.axhline(tna.parameter_count(tna.presets.dense(), vit), color="grey", linestyle=":", label="dense")
    panel.set(xscale="log", yscale="log", xlabel="rank r", title=title, xlim=(1, 128))
    panel.grid(which="major", alpha=0.3)
axes[0].set(ylabel="parameters", ylim=(1e2, 5e7))
fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
fig.suptitle("Query and value of ViT-base, G = 1")
plt.show()

# %%
# The paper's counts
# ------------------
#
# Appendix A.4 lists four adapters of ViT-base with their exact counts; section 4.2 describes the U-Net's smallest ones
# in words. The last column quotes the paper, the one before it is computed.

P = tna.presets
stated = [
    ("LoRA (2D), r = 4", vit, P.lora(rank=4), "147,456"),
    ("SuperLoRA (2D), r = 6", vit, P.superlora(rank=6, fold="stack"), "115,200"),
    ("SuperLoRA (2D, reshape), r = 22", vit, P.superlora(rank=22), "165,572"),
    ("the same with projection, ρ = 0.5, r = 26", vit, P.superlora(26, projection="linear", ratio=0.5), "138,372"),
    ("dense", vit, P.dense(), "14M"),
    ("LoRA, r = 1", unet, P.lora(rank=1), "about 10^4"),
    ("SuperLoRA (2D, reshape), r = 1", unet, P.superlora(rank=1), "beyond 1000"),
    ("LoRTA (3D), r = 1", unet, P.lorta(rank=1, order=3), "beyond 200"),
    ("LoRTA (5D), r = 1", unet, P.lorta(rank=1, order=5), "less than 80"),
    ("LoRTA (5D), ρ = 0.01, r = 1", unet, P.lorta(1, order=5, projection="linear", ratio=0.01), "31"),
]
for what, shapes, config, said in stated:
    model = "ViT-base" if shapes is vit else "U-Net"
    print(f"{model:9} {what:42} {tna.parameter_count(config, shapes):>12,}   {said}")

# %%
# "About 120-fold more parameters" is LoRA against LoRTA of order 5:

fold = tna.parameter_count(P.lora(rank=1), unet) / tna.parameter_count(P.lorta(rank=1, order=5), unet)
print(f"{fold:.1f}")
