"""
Measurements that were not made
===============================

A table of measurements over several conditions is a tensor. If few components explain it, missing elements follow from
known ones. This example hides elements of a real data set, and compares the predictions with what was measured. It
needs ``pip install "tnadapt[plot]"``.
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
# A fifth of the measurements is hidden. ``mask=`` is True where an element is known; the others may be anything, even
# NaN. The fit is to the known elements only.

rng = np.random.default_rng(0)
hidden = measured & (rng.random(responses.shape) < 0.2)
known = measured & ~hidden


def hidden_error(fit):
    """Return the relative error on the hidden elements."""
    return float(np.linalg.norm(fit.to_tensor()[hidden] - responses[hidden]) / np.linalg.norm(responses[hidden]))


fits = [tna.cp(responses, rank, mask=known, tol=1e-6) for rank in (1, 2, 4, 8, 16, 24)]
for fit in fits:
    print(f"rank {fit.rank}: error on known elements {fit.error:.3f}, on hidden ones {hidden_error(fit):.3f}")

# %%
# The error on hidden elements says which rank to trust: more components than the data support predict worse.

best = min(fits, key=hidden_error)
plt.figure(figsize=(4.5, 3.4), layout="constrained")
plt.plot(responses[hidden], best.to_tensor()[hidden], ".", ms=3)
plt.axline((0, 0), slope=1)
plt.xlabel("measured")
plt.ylabel(f"predicted, rank {best.rank}")
plt.show()

# %%
# The factors show which variants, times, doses and cells go together:

weights, factors = best
print(np.round(weights, 1), [factor.shape for factor in factors])
