"""
A covariance as a Kronecker product
===================================

The covariance of images has as many rows as there are pixels. If rows and columns vary on their own, it is a Kronecker
product of a covariance of rows and one of columns: for images of 8 × 8 pixels, 72 different numbers in place of 2,080.
"""

# %%
# The data are scikit-learn's 1,797 handwritten digits, divided into two halves: one to estimate, one to judge.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tnadapt as tna

images = np.random.default_rng(0).permutation(load_digits().data)
first, second = (half - half.mean(axis=0) for half in (images[:900], images[900:]))
covariance, other = first.T @ first / len(first), second.T @ second / len(second)
print(covariance.shape)

# %%
# The nearest Kronecker product
# -----------------------------
#
# It is the best one in the Frobenius norm (Van Loan and Pitsianis, 1993), which the result certifies. Adding products
# brings the sum closer.

sums = [tna.kronecker_decomposition(covariance, [(8, 8), (8, 8)], terms) for terms in range(1, 13)]
rows, columns = sums[0].factors
print(sums[0].error, sums[0].certified)

# %%
# With the same shapes a low-rank approximation has other strengths: it keeps the directions of largest variance.
# Both are judged by the other half of the data, too.


def distance(found, truth):
    """Return the relative distance of an approximation from a covariance."""
    return float(np.linalg.norm(found.to_tensor() - truth) / np.linalg.norm(truth))


ranks = [tna.cp(covariance, rank) for rank in range(1, 13)]
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
for found, name, marker in ((sums, "Kronecker products", "o"), (ranks, "low rank", "s")):
    size = [one.num_parameters for one in found]
    (line,) = axes[0].plot(size, [one.error for one in found], marker=marker, label=name)
    axes[0].plot(size, [distance(one, other) for one in found], "--", color=line.get_color())
axes[0].axhline(float(np.linalg.norm(covariance - other) / np.linalg.norm(other)), color="gray", lw=0.8)
axes[0].set(xlabel="parameters", ylabel="relative error", ylim=(0, None))
axes[0].set_title("solid: fitted; dashed: other half;\ngray: the two halves", fontsize=9)
axes[0].legend(fontsize=8)
limit = float(np.abs(covariance).max())
for axis, matrix, title in ((axes[1], covariance, "covariance"), (axes[2], sums[0].to_tensor(), "Kronecker product")):
    axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_title(title, fontsize=9)
    axis.axis("off")
plt.show()

# %%
# The two factors are covariances of rows and of columns, up to a number that they share. Both are symmetric and have no
# negative eigenvalue, as is true of the nearest Kronecker product of any such matrix:

for factor in (rows, columns):
    print(np.allclose(factor, factor.T), np.linalg.eigvalsh(factor * np.sign(factor[0, 0])).min() > -1e-9)
