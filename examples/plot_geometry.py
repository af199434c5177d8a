"""
How close to the dense update
=============================

Appendix A.4 of the paper compares updates with the one of full fine-tuning by three numbers: the similarity of the left
and of the right singular spaces, and the distance. Here they are along growing ranks, for LoRA and for SuperLoRA, both
at their best.
"""

# %%
# A dense update
# --------------
#
# Four weights with singular values that fall as a power law. They share their right singular vectors in part, as
# updates of layers that read the same features would.

import math

import matplotlib.pyplot as plt
import numpy as np

import tnadapt as tna

side, count, k = 48, 4, 5
rng = np.random.default_rng(0)


def orthonormal(matrix):
    """The orthonormal basis that Gram and Schmidt make of its columns."""
    return np.linalg.qr(matrix)[0]


spectrum = np.arange(1, side + 1) ** -0.75
common = rng.normal(size=(side, side))
dense = [
    orthonormal(rng.normal(size=(side, side))) * spectrum @ orthonormal(common + 0.5 * rng.normal(size=(side, side))).T
    for _ in range(count)
]
shapes = [update.shape for update in dense]

# %%
# The best that either can do
# ---------------------------
#
# LoRA of rank r is at its best where each weight is cut to its r leading singular values. SuperLoRA with one group has
# one matrix for all, the folded long vector, and is at its best where that is cut. Both are parameters of a plan;
# ``deltas`` makes the updates of them.


def halves(matrix, rank):
    """Two factors of the best approximation of that rank, as ``cp`` wants them."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return {"factor0": u[:, :rank] * root, "factor1": vt[:rank].T * root}


long_vector = np.concatenate([update.reshape(-1) for update in dense])
folded = {"LoRA": dense, "SuperLoRA, G = 1": [tna.to_hypercube(long_vector, 2)]}
presets = {"LoRA": tna.presets.lora, "SuperLoRA, G = 1": tna.presets.superlora}


def measured(name, rank):
    """Parameters, and d_L, d_R and d_E of each weight."""
    ad = tna.SuperLoRA(presets[name](rank=rank), shapes)
    params = {
        f"group{g}.split0.{factor}": array
        for g, matrix in enumerate(folded[name])
        for factor, array in halves(matrix, rank).items()
    }
    return ad.num_parameters, [tna.geometry(d, v, k=k) for d, v in zip(dense, ad.deltas(params), strict=True)]


# %%
# From one parameter to as many as elements
# -----------------------------------------
#
# Lines are means over the weights, bands from the least to the largest. As the update goes to the dense one, d_L and
# d_R go to 1, and d_E to 0. LoRA keeps the leading singular vectors of each weight themselves, so its d_L and d_R are 1
# from rank k. A square of all weights cuts across them.

names = ("d_L, left singular vectors", "d_R, right singular vectors", "d_E, distance")
fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
for name in presets:
    largest = min(matrix.shape[0] for matrix in folded[name])
    ranks = np.unique(np.geomspace(1, largest, 25).astype(int)).tolist()
    counts, found = zip(*(measured(name, rank) for rank in ranks), strict=True)
    values = np.array(found)  # (rank, weight, measure)
    for panel, title, column in zip(axes, names, np.moveaxis(values, -1, 0), strict=True):
        (line,) = panel.plot(counts, column.mean(axis=1), label=name)
        panel.fill_between(counts, column.min(axis=1), column.max(axis=1), color=line.get_color(), alpha=0.2)
        panel.set(xscale="log", xlabel="parameters", title=title, ylim=(0, 1.05))
for panel in axes:
    panel.axvline(len(long_vector), color="grey", linestyle=":", label="elements of ΔW")
    panel.grid(alpha=0.3)
axes[2].legend()
plt.show()

# %%
# The norms of equations (5) and (6) are Frobenius norms here. Only then do the two measures go to 1, as the paper says
# they do. For equal spaces, the norm over the square root of k is

equal = np.eye(k)
print(f"with the spectral norm:  {np.linalg.norm(equal, 2) / math.sqrt(k):.3f}")
print(f"with the Frobenius norm: {np.linalg.norm(equal) / math.sqrt(k):.3f}")
