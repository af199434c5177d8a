"""
A function of a trillion points
===============================

A function on a fine grid of many variables is a tensor that nobody can form. :func:`tnadapt.tt_cross` finds a tensor
train of it from few values, and sums over the train take milliseconds. This example integrates two functions whose
integrals are known. It needs ``pip install "tnadapt[plot]"``.
"""

# %%
# One variable, 2^40 points
# -------------------------
#
# A grid of :math:`2^{40}` points in [0, 1) is a tensor of 40 modes of two elements, the binary digits of the points: a
# *quantized* tensor train. A thousand random points would hardly meet this peak.

import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import quad

import tnadapt as tna
from tnadapt.tensors import TTTensor, inner

DIGITS = 40
values = 2.0 ** -np.arange(1, DIGITS + 1)


def peak(x):
    """Return a narrow peak, of width 1e-5, on a smooth slope."""
    return 1e-5 / ((x - 0.3) ** 2 + 1e-10) + np.exp(-x)


train = tna.tt_cross(lambda digits: peak(digits @ values), (2,) * DIGITS, max_error=1e-9)
print(f"ranks up to {max(train.rank)}: {train.num_parameters:,} parameters for {train.size:,} values")

# %%
# The integral is the inner product with ones, divided by the number of points. What remains is the error of the train
# and of the sum. (``train.entry`` and ``train.entries`` compute single values.)

ones = TTTensor([np.ones((1, 2, 1))] * DIGITS)
integral = float(inner(train, ones)) / 2.0**DIGITS
exact = np.arctan(0.7e5) + np.arctan(0.3e5) + 1.0 - np.exp(-1.0)
print(f"{integral:.12f}, exactly {exact:.12f}, from {train.outcome.calls:,} values")

# %%
# Twenty variables
# ----------------
#
# :math:`1 / (1 + x_1 + \dots + x_{20})`, at 8 Gauss-Legendre points in each variable: :math:`8^{20} = 10^{18}` points.
# One number for each mode, the weight of the point, makes the integral a product of small matrices. The exact value is
# an integral in one variable.

VARIABLES = 20
points, weights = np.polynomial.legendre.leggauss(8)
points, weights = (points + 1.0) / 2.0, weights / 2.0
rule = TTTensor([weights[None, :, None]] * VARIABLES)
exact = quad(lambda t: np.exp(-t) * (-np.expm1(-t) / t) ** VARIABLES, 0.0, np.inf, epsabs=1e-14, epsrel=1e-13)[0]


def ratio(indices):
    """Return the function at grid points."""
    return 1.0 / (1.0 + points[indices].sum(axis=1))


calls, errors, sampled = [], [], []
for limit in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
    train = tna.tt_cross(ratio, (len(points),) * VARIABLES, max_error=limit)
    calls.append(train.outcome.calls)
    errors.append(abs(float(inner(train, rule)) / exact - 1.0))
    x = np.random.default_rng(0).random((calls[-1], VARIABLES))
    sampled.append(abs(np.mean(1.0 / (1.0 + x.sum(axis=1))) / exact - 1.0))

# %%
# The error of random sampling falls with the square root of the number of values, that of the train much faster.

plt.figure(figsize=(5, 3.2), layout="constrained")
plt.loglog(calls, sampled, marker="s", label="random sampling")
plt.loglog(calls, errors, marker="o", label="tensor train")
plt.xlabel("values of the function")
plt.ylabel("relative error of the integral")
plt.legend()
plt.show()
