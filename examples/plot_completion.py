"""
Measurements that were not made
===============================

A table of measurements over several conditions is a tensor. If few components explain it, the elements that are missing
follow from those that are known. This example hides elements of a real data set, and compares the prediction with what
was measured.
"""

# %%
# The data come with TensorLy: how 8 kinds of immune cells respond to 13 variants of interleukin-2, at 12 doses and 4
# times (Orcutt-Jahns et al., 2021). Some responses were never measured.

import matplotlib.pyplot as plt
import numpy as np
from tensorly.datasets import load_IL2data

import tnadapt as tna

data = load_IL2data()
responses = np.asarray(data["tensor"])
measured = np.isfinite(responses)
print(dict(zip(data["dims"], responses.shape, strict=True)), f"{np.mean(measured):.1%} measured")

# %%
# Hide, fit, compare
# ------------------
#
# A fifth of the measurements is hidden. ``mask=`` is True where an element is known; the others may be anything, even
# NaN. The fit is to the known elements only.

rng = np.random.default_rng(0)
hidden = measured & (rng.random(responses.shape) < 0.2)
known = measured & ~hidden


def left(found, where):
    """Return the relative error on some elements."""
    made = found.to_tensor()[where]
    return float(np.linalg.norm(made - responses[where]) / np.linalg.norm(responses[where]))


ranks = range(1, 8)
fits = [tna.cp(responses, rank, mask=known, tol=1e-6) for rank in ranks]
for rank, found in zip(ranks, fits, strict=True):
    print(f"rank {rank}: error on known elements {found.error:.3f}, on hidden ones {left(found, hidden):.3f}")

# %%
# The error on hidden elements says which rank to trust.

best = min(fits, key=lambda found: left(found, hidden))
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
axes[0].plot(ranks, [found.error for found in fits], marker="o", label="known")
axes[0].plot(ranks, [left(found, hidden) for found in fits], marker="s", label="hidden")
axes[0].set(xlabel="rank", ylabel="relative error", ylim=(0, None))
axes[0].legend()
axes[1].plot(responses[hidden], best.to_tensor()[hidden], ".", ms=3)
limits = [float(responses[hidden].min()), float(responses[hidden].max())]
axes[1].plot(limits, limits, color="gray", lw=0.8)
axes[1].set(xlabel="measured", ylabel=f"predicted, rank {best.rank}")
plt.show()

# %%
# The factors show which variants, times, doses and cells go together:

weights, factors = best
print(np.round(weights, 1), [factor.shape for factor in factors])
