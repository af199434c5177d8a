"""
A photograph as a small tensor
==============================

A color photograph is a tensor of rows, columns and color channels. This example decomposes one in four forms with about
the same number of parameters, shows what each keeps, and removes noise. It needs ``pip install "tnadapt[plot]"
scikit-learn``.
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
for name, result in results.items():
    print(f"{name:13} {result.num_parameters:6,} of {photo.size:,} numbers, error {result.error:.3f}")

# %%
# The error is relative to the Frobenius norm of the photograph.

figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
for axis, (name, result) in zip(axes.flat, results.items(), strict=True):
    axis.imshow(np.clip(result.to_tensor(), 0.0, 1.0))
    axis.set_title(name)
    axis.axis("off")
plt.show()

# %%
# A noisy photograph
# ------------------
#
# ``max_error`` finds the ranks. With noise of a tenth of the norm, an error a little above a tenth leaves some of the
# noise out: the tensor is nearer to the photograph than the noisy copy that it was computed from.

noise = np.random.default_rng(0).normal(size=photo.shape).astype(np.float32)
noisy = photo + 0.1 * np.linalg.norm(photo) / np.linalg.norm(noise) * noise
cleaned = tna.tucker(noisy, max_error=0.11).to_tensor()
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, name, image in zip(axes, ("noisy", "Tucker, max_error=0.11"), (noisy, cleaned), strict=True):
    axis.imshow(np.clip(image, 0.0, 1.0))
    axis.set_title(
        f"{name}: {np.linalg.norm(image - photo) / np.linalg.norm(photo):.3f} from the photograph", fontsize=9
    )
    axis.axis("off")
plt.show()

# %%
# Single pixels, and parts of the photograph, are computed without forming it:

train = results["tensor train"]
print(train.entry(200, 300, 0), train.part(slice(0, 100), slice(0, 50)).shape)
