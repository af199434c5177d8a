"""
A photograph as a small tensor
==============================

A color photograph is a tensor of rows, columns and color channels. This example decomposes one in four forms with about
the same number of parameters, and shows what each keeps.
"""

# %%
# The photograph is scikit-learn's *china.jpg* (427 × 640 pixels), as numbers from 0 to 1.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import tnadapt as tna

photo = load_sample_image("china.jpg").astype(np.float32) / 255.0
print(photo.shape, photo.size)

# %%
# Four decompositions
# -------------------
#
# The Tucker decomposition keeps all three color channels. The fourth form cuts the photograph into blocks of 7 × 10
# pixels: in each Kronecker product, one block of pixels is repeated everywhere, each time with another weight.

results = {
    "CP": tna.cp(photo, 46, max_iterations=30, init="random"),
    "Tucker": tna.tucker(photo, (44, 44, 3)),
    "tensor train": tna.tensor_train(photo, (21, 3)),
    "Kronecker": tna.kronecker_decomposition(photo, [(61, 64, 1), (7, 10, 3)], 12),
}
for name, found in results.items():
    print(f"{name:13} {found.num_parameters:6,} of {photo.size:,} numbers, error {found.error:.3f}")

# %%
# The error is relative to the Frobenius norm of the photograph.

figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
for axis, (name, found) in zip(axes.flat, results.items(), strict=True):
    axis.imshow(np.clip(found.to_tensor(), 0.0, 1.0))
    axis.set_title(
        f"{name}: {photo.size / found.num_parameters:.0f} times smaller, error {found.error:.3f}", fontsize=9
    )
    axis.axis("off")
plt.show()

# %%
# Error against size
# ------------------
#
# ``max_error`` finds the ranks of an error. Trains and Tucker tensors need about as many numbers, and know how far from
# the best of their form they can be.

errors = [0.3, 0.25, 0.2, 0.15, 0.1, 0.08, 0.06]
figure, axis = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
for name, function, marker in (("Tucker", tna.tucker, "o"), ("tensor train", tna.tensor_train, "s")):
    found = [function(photo, max_error=error) for error in errors]
    axis.loglog([one.num_parameters for one in found], [one.error for one in found], marker=marker, label=name)
axis.set(xlabel="parameters", ylabel="relative error")
axis.legend()
plt.show()

# %%
# A noisy photograph
# ------------------
#
# With noise of a tenth of its norm, errors above a tenth leave some of the noise out. The line has the fewest
# parameters of all truncations of the HOSVD: the energy of its core outside of a box is the squared error of these
# ranks.

noise = np.random.default_rng(0).normal(size=photo.shape).astype(np.float32)
noisy = photo + 0.1 * np.linalg.norm(photo) / np.linalg.norm(noise) * noise
errors = [0.105, 0.11, 0.12, 0.14, 0.17, 0.2, 0.25, 0.3]
compressed = [tna.tucker(noisy, max_error=error) for error in errors]

core, _ = tna.tucker(noisy, noisy.shape, max_iterations=0)
inside = (core.astype(float) ** 2).cumsum(0).cumsum(1).cumsum(2)
ranks = np.ogrid[tuple(slice(1, size + 1) for size in photo.shape)]
parameters = ranks[0] * ranks[1] * ranks[2] + sum(rank * size for rank, size in zip(ranks, photo.shape, strict=True))
fewest = [parameters[inside >= (1.0 - error**2) * inside[-1, -1, -1]].min() for error in errors]

images = [result.to_tensor() for result in compressed]
left = [np.linalg.norm(image - photo) / np.linalg.norm(photo) for image in images]
closest = int(np.argmin(left))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axis, image, title in (
    (axes[0], noisy, "noisy: 0.100 from the photograph"),
    (axes[1], images[closest], f"max_error={errors[closest]}: {left[closest]:.3f} from the photograph"),
):
    axis.imshow(np.clip(image, 0.0, 1.0))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
axes[2].semilogy(errors, fewest, label="fewest of the HOSVD")
axes[2].semilogy(errors, [result.num_parameters for result in compressed], "o", label="max_error=")
axes[2].set(xlabel="relative error", ylabel="parameters")
axes[2].legend()
plt.show()

# %%
# Single pixels, and parts of the photograph, are computed without forming it:

train = results["tensor train"]
print(train.entry(200, 300, 0), train.part(slice(0, 100), slice(0, 50)).shape)
