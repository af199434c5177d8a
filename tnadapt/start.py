"""Where training starts: ΔW = 0 to the bit, and a gradient that is not.

**Linear F.** In every term, the array of the last split that carries the leading mode (``lora_B``'s place)
is zero; all others are normal with one standard deviation σ. ΔW is then exactly zero, and the zero
array has a gradient.

**Nonlinear F.** ``tanhshrink'(0) = 0``: from a zero start nothing would ever move. There every array is
normal with one σ, and ΔW is ``F(x) - F(x_start)``, with ``x_start`` drawn again from the seed.

**σ** is chosen so that the first SGD step moves ΔW equally far whatever the rank, order, splits, terms
and ρ: for a white gradient, the root mean square of ΔW after one step is ``STEP`` times what the same
step of dense fine-tuning gives. That is what PEFT's LoRA of rank 8 on 768 columns does, so that
learning rates carry over from it. With an array Z of which each element of ΔW sums q entries, and n
elements of ΔW in all, the step is ``V * sqrt(q (q + P))`` of the dense one, V being the variance of
what an entry of Z is multiplied with and ``P = n q / |Z|`` the elements of ΔW that an entry touches.

The CP weights start at one. Draws: purpose 16 and up, one an array in the order of ``param_shapes``
within the group (zeros and ones use up a purpose too); element i of the array is word i.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from . import draws
from .backends.base import FixedArrays
from .network import Network
from .projection import Projection

__all__ = ["STEP", "Start"]

STEP = 1.0 / 32.0


class Start(FixedArrays):
    """The arrays of one group at the start of training.

    Parameters
    ----------
    network : Network
        What the arrays belong to.
    projection : Projection
        F of the group.
    seed, group : int
        Of the draws.

    Examples
    --------
    >>> from tnadapt import Config
    >>> start = Start(Network(Config(rank=8), 768 * 768, 768), Projection("identity", 768**2, 768**2), 0, 0)
    >>> round(start.std, 4)  # PEFT's LoRA: 1 / sqrt(3 * 768) = 0.0208
    0.0199
    >>> bool(start.host("split0.factor0").any()), start.host("split0.factor1").shape
    (False, (768, 8))
    """

    def __init__(self, network: Network, projection: Projection, seed: int, group: int) -> None:
        super().__init__()
        self.network, self.projection, self.seed, self.group = network, projection, seed, group

    @functools.cached_property
    def std(self) -> float:
        """σ of the random arrays."""
        return (_linear_std if self.projection.linear else _nonlinear_std)(self.network, self.projection)

    def make(self, key: Any) -> np.ndarray:
        """One array, float32: numbers that every floating dtype of at least that precision holds exactly."""
        shape = self.network.shapes[key]
        last = f"split{len(self.network.splits) - 1}."
        split = self.network.splits[int(key.rpartition(".")[0].rpartition("split")[2])]
        name = key.rpartition(".")[2]
        if name in split.ones:
            return np.ones(shape, np.float32)
        if self.projection.linear and key.endswith(last + split.zero):
            return np.zeros(shape, np.float32)
        purpose = draws.PURPOSE["start"] + list(self.network.shapes).index(key)
        drawn = draws.normals(self.seed, self.group, purpose, 0, math.prod(shape))
        return (drawn * np.float32(self.std)).reshape(shape)


def _linear_std(network: Network, projection: Projection) -> float:
    last = network.splits[-1]
    arrays = _random_arrays(network) - 1
    if arrays == 0:
        return 0.0
    # V = paths * std ** (2 * arrays), paths being how many products an entry of Z is multiplied with.
    paths = math.prod(split.total_paths for split in network.splits) / last.paths(last.zero)
    step = network.scale**2 * _spread(network, -1, last.zero) * _gain(projection)
    return float((STEP / (step * paths)) ** (1.0 / (2 * arrays)))


def _nonlinear_std(network: Network, projection: Projection) -> float:
    # t = F's argument has variance tau² = scale² paths n_in / L * std ** (2 arrays). A step is weakened by the
    # derivative tanh(t)² ~ t² on the way back and on the way out: by E[t⁴] = 3 tau⁴. Every array moves.
    arrays = _random_arrays(network)
    paths = network.terms * math.prod(split.total_paths for split in network.splits)
    tau = network.scale**2 * paths * projection.n_in / projection.padded
    moved = sum(
        _spread(network, k, name) / (network.terms * split.paths(name))
        for k, split in enumerate(network.splits)
        for name in split.shapes
        if name not in split.ones
    )
    step = 3.0 * tau**2 * network.scale**2 * paths * moved * _gain(projection)
    return float((STEP / step) ** (1.0 / (6 * arrays - 2)))


def _random_arrays(network: Network) -> int:
    """How many arrays are multiplied in one product, those that start at one left out."""
    return sum(len(split.shapes) - len(split.ones) for split in network.splits)


def _spread(network: Network, k: int, name: str) -> float:
    """``sqrt(q (q + P))`` of one array, over all terms."""
    split = network.splits[k]
    paths = network.terms * split.paths(name)
    touched = network.size * split.paths(name) / math.prod(split.shapes[name])
    return math.sqrt(paths * (paths + touched))


def _gain(projection: Projection) -> float:
    """Root mean square of ``F δ``, δ white and as large as ``Fᵀ g``: the two passes taken as independent."""
    if projection.kind in ("identity", "shuffle"):
        return 1.0
    return math.sqrt(projection.n_in * projection.n_out) / projection.padded
