"""
The six projections F
=====================

F maps the output vector of the tensor network to the group's update. It has no parameters: it is regenerated from a
seed. This example shows its matrix at a small size, its effect on the distribution of values, and the effect of the
nonlinearity on a start at zero.
"""

# %%
# As a matrix
# -----------
#
# A linear F applied to the identity matrix gives its matrix, transposed. Shuffle is a permutation, so it has as many
# inputs as outputs. Linear and linear_v2 fill the whole matrix: every element of ΔW depends on every element before F.

import matplotlib.pyplot as plt
import numpy as np

import tnadapt as tna

sizes = {"identity": (64, 64), "shuffle": (64, 64), "linear": (24, 64), "linear_v2": (24, 64)}

fig, axes = plt.subplots(
    1, 4, figsize=(10, 4.6), layout="constrained", width_ratios=[n_in for n_in, _ in sizes.values()]
)
for panel, (kind, (n_in, n_out)) in zip(axes, sizes.items(), strict=True):
    f = tna.Projection(kind, n_in, n_out, seed=0)
    matrix = f(np.eye(n_in)).T
    limit = np.abs(matrix).max()
    image = panel.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    panel.set(title=f"{kind}\n{n_out} × {n_in}", xticks=[], yticks=[])
    filled = np.count_nonzero(matrix) / matrix.size
    print(f"{kind:9}: {filled:4.0%} of the entries are not 0; digest {f.digest[:16]}")
plt.show()

# %%
# Entries have mean 0 and variance 1 / L, where L is the length of the Hadamard transforms, the next power of two.
# Checked over many seeds:

for kind in ("linear", "linear_v2"):
    entries = np.stack([tna.Projection(kind, 24, 60, seed=seed)(np.eye(24)) for seed in range(200)])
    length = tna.Projection(kind, 24, 60).padded
    print(f"{kind:9}: L = {length}, mean {entries.mean():+.4f}, variance × L {entries.var() * length:.3f}")

# %%
# Effect on the values
# --------------------
#
# The input has few large elements and many small ones; the plots end at ±6. Shuffling only moves values. Linear mixes
# all of them, and the result is close to normal. Linear_v2 multiplies each result by another normal number, which gives
# heavier tails. ``t - tanh(t)`` is close to t³ / 3 near zero and to t ± 1 far from it, so small values almost vanish.

n_in, n_out = 4096, 16384
rng = np.random.default_rng(0)
spiky = rng.standard_t(df=3, size=n_out)

fig, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True, sharey=True, layout="constrained")
bins = np.linspace(-6, 6, 121)
kinds = ("identity", "linear", "nonlinear", "shuffle", "linear_v2", "nonlinear_v2")
for panel, kind in zip(axes.flat, kinds, strict=True):
    square = kind in ("identity", "shuffle")
    f = tna.Projection(kind, n_out if square else n_in, n_out, seed=0)
    x = spiky[: f.n_in]
    # One scale, so that the argument of tanhshrink has variance 1.
    y = f(x if square else x * np.sqrt(f.padded) / np.linalg.norm(x))
    panel.hist(y, bins=bins, density=True, color="tab:blue", alpha=0.8)
    panel.plot(bins, np.exp(-(bins**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=1, label="standard normal")
    panel.set(yscale="log", ylim=(1e-4, 30), title=f"{kind}: kurtosis {np.mean(y**4) / np.mean(y**2) ** 2:.1f}")
axes[0, 0].legend(loc="upper right")
fig.supxlabel("value of an element of F(x)")
fig.supylabel("density")
plt.show()

# %%
# The zero gradient at zero
# -------------------------
#
# The derivative of ``t - tanh(t)`` is ``tanh(t)²``: zero at zero. An adapter whose network is zero at the start, such
# as LoRA's, would get no gradient at all through a nonlinear F. Therefore the start of a nonlinear F is not zero, and
# ΔW is the change of F since the start, ``F(x) - F(x_start)``. The markers are the root mean squares of F's argument at
# such starts.

t = np.linspace(-3, 3, 301)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(t, t - np.tanh(t), label="t − tanh(t)")
left.plot(t, t, color="grey", linestyle=":", label="t")
left.set(xlabel="t", ylim=(-3, 3), title="tanhshrink")
near = np.linspace(-0.5, 0.5, 101)
right.plot(near, np.tanh(near) ** 2)
right.set(xlabel="t", title="its derivative, near zero")
shapes = [(96, 96)] * 8
for ratio, marker in ((1.0, "o"), (0.1, "s"), (0.01, "^")):
    plan = tna.UpdatePlan(tna.presets.superlora(rank=4, projection="nonlinear", ratio=ratio), shapes)
    start = plan.init(dtype="float64")
    # The same network with the linear F: what tanhshrink is applied to.
    linear = tna.UpdatePlan(plan.config.replace(projection="linear"), shapes)
    size = np.sqrt(np.mean(linear.vector(start) ** 2))
    print(f"ρ = {ratio}: root mean square of F's argument {size:.3f}, derivative there {np.tanh(size) ** 2:.3f}")
    right.plot(size, np.tanh(size) ** 2, marker, color="tab:orange", label=f"start, ρ = {ratio}")
left.legend()
right.legend()
plt.show()
