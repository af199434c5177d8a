"""
How close to the dense update
=============================

Appendix A.4 of the paper compares updates with that of full fine-tuning by three numbers: the similarity of the left
and of the right singular spaces, and the distance. This example computes them for increasing ranks, for the best LoRA
and the best SuperLoRA.
"""

# %%
# A dense update
# --------------
#
# Four weights whose singular values follow a power law. They partly share their right singular vectors, as updates of
# layers that read the same features would.

import math

import matplotlib.pyplot as plt
import numpy as np

import tnadapt as tna

side, count, k = 48, 4, 5
rng = np.random.default_rng(0)


def orthonormal(matrix):
    """Return an orthonormal basis of the column space (QR decomposition)."""
    return np.linalg.qr(matrix)[0]


spectrum = np.arange(1, side + 1) ** -0.75
common = rng.normal(size=(side, side))
dense = [
    orthonormal(rng.normal(size=(side, side))) * spectrum @ orthonormal(common + 0.5 * rng.normal(size=(side, side))).T
    for _ in range(count)
]
shapes = [update.shape for update in dense]

# %%
# The best of each method
# -----------------------
#
# The best LoRA of rank r truncates each weight to its r leading singular values. SuperLoRA with one group has a single
# matrix for all weights, the folded long vector, and its best version truncates that. Both are parameters of a plan;
# ``deltas`` computes the updates from them.


def halves(matrix, rank):
    """Return two factors of the best approximation of that rank, in the form that ``cp`` takes."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return {"factor0": u[:, :rank] * root, "factor1": vt[:rank].T * root}


long_vector = np.concatenate([update.reshape(-1) for update in dense])
folded = {"LoRA": dense, "SuperLoRA, G = 1": [tna.to_hypercube(long_vector, 2)]}
presets = {"LoRA": tna.presets.lora, "SuperLoRA, G = 1": tna.presets.superlora}


def measured(name, rank):
    """Return the number of parameters, and d_L, d_R and d_E of each weight."""
    plan = tna.UpdatePlan(presets[name](rank=rank), shapes)
    params = {
        f"group{g}.split0.{factor}": array
        for g, matrix in enumerate(folded[name])
        for factor, array in halves(matrix, rank).items()
    }
    return plan.num_parameters, [tna.geometry(d, v, k=k) for d, v in zip(dense, plan.deltas(params), strict=True)]


# %%
# From one parameter to as many as elements
# -----------------------------------------
#
# Lines show means over the weights, bands the range. As the update approaches the dense one, d_L and d_R approach 1,
# and d_E approaches 0. LoRA keeps the leading singular vectors of each weight, so its d_L and d_R are 1 from rank k on.
# A square of all weights cuts across them.

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
# The norms of equations (5) and (6) are computed as Frobenius norms. Only with these do the two measures approach 1, as
# the paper says. For equal spaces, the norm divided by the square root of k is

equal = np.eye(k)
print(f"with the spectral norm:  {np.linalg.norm(equal, 2) / math.sqrt(k):.3f}")
print(f"with the Frobenius norm: {np.linalg.norm(equal) / math.sqrt(k):.3f}")
