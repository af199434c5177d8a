"""
First steps
===========

A ``Config`` and shapes give a plan, the plan creates arrays, and the arrays give weight updates. This script takes
these steps on NumPy and on torch, inspects the gradient at the start, and fits a given update by gradient
descent.
"""

# %%
# A plan
# ------
#
# Sixteen weights stand for query and value of eight layers. The settings below are the paper's main variant: all
# weights in one group, folded to a square, a factorization of rank 4. A plan consists of integers only and allocates
# nothing.

import matplotlib.pyplot as plt
import numpy as np
import torch

import tnadapt as tna

torch.set_num_threads(1)  # the arrays are small

shapes = [(32, 32)] * 16
cfg = tna.Config(rank=4, order=2, groups=1, fold="hypercube", format="cp")
plan = tna.UpdatePlan(cfg, shapes)

print(f"{plan.size} elements of ΔW, {plan.num_parameters} parameters")
for name, shape in plan.param_shapes.items():
    print(name, shape)

# %%
# Arrays
# ------
#
# ``init`` draws the initial arrays from ``cfg.seed``. They are the same in every library, and ΔW is exactly zero.

on_numpy = plan.init()
on_torch = plan.init(backend="torch")

for name, array in on_numpy.items():
    same = np.array_equal(array, on_torch[name].numpy())
    print(f"{name}: the same bits in NumPy and torch: {same}")
deltas = plan.deltas(on_numpy)
print(f"{len(deltas)} updates of shape {deltas[0].shape}, largest element {max(np.abs(d).max() for d in deltas)}")

# %%
# The gradient at the start
# -------------------------
#
# ΔW is zero at the start, but training moves it. One factor is zero and the other is not, so the zero one has a
# gradient. After the first step the other one has a gradient as well.


def gradient_norms(plan, params, target):
    """Return, for each array, the norm of the gradient of half the squared distance to a target."""
    leaves = {name: array.clone().requires_grad_() for name, array in params.items()}
    loss = 0.5 * (plan.vector(leaves) - target).square().sum()
    loss.backward()
    return {name: float(leaf.grad.norm()) for name, leaf in leaves.items()}


rng = np.random.default_rng(0)
common = rng.normal(size=(2, 32))  # the row space of all updates
signal = np.stack([rng.normal(size=(32, 2)) @ common for _ in shapes])
noise = 0.3 * rng.normal(size=signal.shape)
target = torch.tensor((signal + noise).reshape(-1), dtype=torch.float32)
target /= target.norm()

for name, norm in gradient_norms(plan, on_torch, target).items():
    print(f"{name}: gradient of norm {norm:.2e}")

# %%
# Fitting a given update
# ----------------------
#
# The target above consists of sixteen updates of rank two with a common row space, plus noise. Four methods fit it by
# plain gradient descent, all with the same learning rate. This works because the start is scaled so that the first step
# moves ΔW by the same amount, whatever the rank, order and format.

methods = {
    "LoRA, one group per weight": tna.presets.lora(rank=2),
    "SuperLoRA, one group": tna.presets.superlora(rank=8),
    "LoTR, weights × rows × cols": tna.presets.lotr(rank=8, weights=16, rows=32, cols=32),
    "SuperLoRA, linear F, ρ = 0.5": tna.presets.superlora(rank=8, projection="linear", ratio=0.5),
}
rate, steps = 0.6, 150

curves = {}
for name, method in methods.items():
    plan = tna.UpdatePlan(method, shapes)
    params = {key: array.requires_grad_() for key, array in plan.init("torch").items()}
    optimizer = torch.optim.SGD(params.values(), lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (plan.vector(params) - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    curves[f"{name}: {plan.num_parameters} parameters"] = losses
    print(f"{name}: {plan.num_parameters} parameters, {losses[-1]:.3f} of the target's square left")

fig, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for label, losses in curves.items():
    axes.plot(np.arange(1, steps + 1), losses, label=label)
floor = np.square(noise).sum() / np.square(signal + noise).sum()
axes.axhline(floor, color="grey", linestyle=":", label="the noise in the target")
axes.set(xlabel="step", ylabel="‖ΔW − target‖² / ‖target‖²", xscale="log", xlim=(1, steps), ylim=(0, 1.05))
axes.set_title("Four methods, one learning rate, one target")
fig.legend(loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %%
# Which curve ends lowest depends on the target. Here every update has rank two, which LoRA of rank 2 can represent, and
# a common row space, which the square preserves, since each of its rows holds four rows of a weight. LoTR shares rows
# *and* columns, and a linear F mixes all elements and so cannot exploit the row structure: these two fit less well.
#
# The updates are returned as matrices, one per weight, ready to be added to it.

for weight, delta in enumerate(plan.deltas(params)[:2]):
    print(f"weight {weight}: ΔW of shape {tuple(delta.shape)}, norm {delta.norm().item():.3f}")
