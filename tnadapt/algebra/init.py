"""Initial values of the arrays: ΔW is exactly zero, and its gradient is not.

**Linear F.** In every term, one array is zero: the one of the last split that carries the leading mode, in the role
of ``lora_B``. All other arrays are random, with a common root mean square σ. ΔW is then exactly zero, and the zero
array has a gradient.

**Arrays frozen during training.** If that array is frozen and others are trained, one of the trained arrays is zero
instead: the first one of the last split of the term that has a trained array, CP weights last. The frozen array is
then random like the others, from its own stream, with the σ that belongs to the new choice. Which array is zero
depends only on which are trained.

**Arrays of a source.** Arrays that ``Config.sources`` freezes are not drawn here. The zero is then one of the other
arrays, by the same rule, and σ takes the mean square of the frozen ones into account.

**Nonlinear F.** ``tanhshrink'(0) = 0``, so that nothing would ever move from a zero start. All arrays are random with
a common σ, and ΔW is ``F(x) - F(x_start)``, with ``x_start`` recomputed from the seed.

**σ** makes the first SGD step change ΔW equally, whatever the rank, order, splits, terms and ρ are. For a white
gradient and a scale of 1, the root mean square of ΔW after one step is ``STEP`` times that of the same step of dense
fine-tuning. This is what PEFT's LoRA of rank 8 on 768 columns does, so that its learning rates carry over; the scale
``alpha / rank`` enters squared, as it does there. Let Z be the zero array, let each element of ΔW be a sum over q of
its entries, and let ΔW have n elements. The step is ``V * sqrt(q (q + P))`` times the dense one, where V is the
variance of what multiplies an entry of Z, and ``P = n q / |Z|`` is the number of elements of ΔW that an entry
affects. If no array is random (dense, and every format at order 1), there is nothing to scale, and the step is that
of dense fine-tuning times the rank.

**Draws.** Purpose 16 and up, one per array in the order of ``param_shapes`` within the group (arrays of zeros and
ones use up a purpose, too). Element i of an array is the normal number of word i. An array of up to 2**14 elements is
then scaled to have the root mean square σ exactly, because a product of a few small draws could be close to zero and
leave the group without a gradient. CP weights start at one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.backends.backend import FixedArrays
from tnadapt.errors import ConfigError

from . import rng
from ._dtype_rounding import rounded_to
from .maps.projection import Projection
from .network import Network
from .sources import FrozenArrays

__all__ = ["STEP", "Initializer"]

STEP = 1.0 / 32.0


class Initializer(FixedArrays):
    """Initial arrays of one group.

    Parameters
    ----------
    network : Network
        The network that has the arrays.
    projection : Projection
        F of the group.
    seed, group : int
        Select the random words.
    frozen : FrozenArrays
        The network's arrays that a source computes.
    trained : set of str, optional
        The network's arrays that are trained; all that are not in ``frozen`` if None.

    Attributes
    ----------
    zeros : frozenset of str
        Names of the arrays that are zero.

    Examples
    --------
    >>> from tnadapt import Config
    >>> start = Initializer(Network(Config(rank=8), 768 * 768, 768), Projection("identity", 768**2, 768**2), 0, 0)
    >>> round(start.std, 4)  # PEFT's LoRA: 1 / sqrt(3 * 768) = 0.0208
    0.0199
    >>> bool(start.host("split0.factor0").any()), start.host("split0.factor1").shape
    (False, (768, 8))
    """

    def __init__(
        self,
        network: Network,
        projection: Projection,
        seed: int,
        group: int,
        frozen: FrozenArrays | None = None,
        trained: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.projection, self.seed, self.group = network, projection, seed, group
        self.frozen = FrozenArrays(network.shapes, {}, seed, group) if frozen is None else frozen
        #: For each term, the array that is zero: the index of its split, and its name in that split.
        self._zero = [self._zero_of(prefixes, trained) for prefixes in network.prefixes]

    @functools.cached_property
    def zeros(self) -> frozenset[str]:
        """Names of the arrays that are zero: one per term, or none for a nonlinear F."""
        if not self.projection.linear:
            return frozenset()
        return frozenset(
            prefixes[k] + name for prefixes, (k, name) in zip(self.network.prefixes, self._zero, strict=True)
        )

    def _zero_of(self, prefixes: Sequence[str], trained: Collection[str] | None) -> tuple[int, str]:
        """Return which array of a term is zero for a linear F: the index of its split, and its name in that split."""
        splits, sources = self.network.splits, self.frozen.sources
        last = len(splits) - 1
        usual = last, splits[last].zero
        if trained is None:
            if prefixes[last] + usual[1] not in sources:
                return usual
            trained = self.network.shapes.keys() - sources.keys()
        elif prefixes[last] + usual[1] in trained:
            return usual
        for k in range(last, -1, -1):
            # CP weights are one number per component: make them zero only if nothing else is trained.
            for name in sorted(splits[k].shapes, key=lambda name: name in splits[k].ones):
                if prefixes[k] + name in trained:
                    return k, name
        # No array of this term is trained. One must be zero nevertheless, so that the term contributes nothing.
        return self._zero_of(prefixes, None)

    def for_trained(self, trained: Collection[str]) -> Initializer:
        """Return the initial arrays if only these of the network's arrays are trained."""
        found = Initializer(self.network, self.projection, self.seed, self.group, self.frozen, trained)
        return self if found.zeros == self.zeros else found

    @functools.cached_property
    def std(self) -> float:
        """σ of the random arrays; that of the first term, if terms differ in which array is zero."""
        return self._std(self._zero[0])

    def _std(self, zero: tuple[int, str]) -> float:
        if zero not in self._stds:
            self._stds[zero] = self._computed_std(zero)
        return self._stds[zero]

    @functools.cached_property
    def _stds(self) -> dict[tuple[int, str], float]:
        return {}

    def _computed_std(self, zero: tuple[int, str]) -> float:
        try:
            if self.projection.linear:
                found = _linear_std(self.network, self.projection, zero, self._frozen_in_term(zero))
            else:
                found = _nonlinear_std(self.network, self.projection, self._frozen_in_term(zero))
        except OverflowError:
            raise ConfigError(
                f"so many arrays of such ranks are multiplied that their initial scale is out of floating-point range "
                f"({len(self.network.shapes)} arrays per group); use a smaller rank, order or number of splits"
            ) from None
        # Round to single precision: the last bit of a power differs between machines, and x_start must not.
        return float(np.float32(found))

    def _frozen_in_term(self, zero: tuple[int, str]) -> tuple[float, int]:
        """Describe the frozen arrays in the first term that has this zero array.

        Returns
        -------
        (float, int)
            The product of their mean squares, and how many of them would be random if they were trained.
        """
        if not self.frozen.sources:
            return 1.0, 0
        squares, count = [], 0
        for prefix, split in zip(self.network.prefixes[self._zero.index(zero)], self.network.splits, strict=True):
            for name in split.shapes:
                if prefix + name in self.frozen.sources:
                    squares.append(self.frozen.mean_square(prefix + name))
                    count += name not in split.ones
        return math.prod(squares), count

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.network.shapes)}

    def make(self, key: Any) -> np.ndarray:
        """Compute an array in float32, by its name, or by (name, dtype) to round its values to that dtype."""
        if isinstance(key, tuple):
            return rounded_to(self.make(key[0]), key[1])
        shape = self.network.shapes[key]
        if key in self.zeros:
            return np.zeros(shape, np.float32)
        split = self.network.splits[int(key.rpartition(".")[0].rpartition("split")[2])]
        name = key.rpartition(".")[2]
        if name in split.ones:
            return np.ones(shape, np.float32)
        purpose = rng.PURPOSE["start"] + self._numbers[key]
        drawn = rng.normals(self.seed, self.group, purpose, 0, math.prod(shape))
        term = int(key.partition(".")[0].removeprefix("term")) if self.network.terms > 1 else 0
        return _scaled(drawn, self._std(self._zero[term])).reshape(shape)


# Longer arrays have the root mean square within half a percent without scaling.
_SHORT = 1 << 14


def _scaled(drawn: np.ndarray, std: float) -> np.ndarray:
    """Scale normal numbers to a root mean square."""
    if drawn.size > _SHORT:
        return drawn * np.float32(std)
    # fsum is correctly rounded, with the same bits on every machine; a vectorized sum does not promise that.
    wide = drawn.astype(np.float64)
    return (wide * (std / math.sqrt(math.fsum((wide * wide).tolist()) / wide.size))).astype(np.float32)


def _linear_std(network: Network, projection: Projection, zero: tuple[int, str], frozen: tuple[float, int]) -> float:
    k, name = zero
    # Frozen arrays contribute their own mean squares to V instead of σ².
    arrays = _random_arrays(network) - (name not in network.splits[k].ones) - frozen[1]
    if arrays <= 0:
        return 0.0
    # V = paths * std ** (2 * arrays), where paths is the number of products that multiply an entry of Z.
    paths = math.prod(split.num_terms for split in network.splits) / network.splits[k].num_terms_per_array(name)
    step = _spread(network, k, name) * projection.map.gain() * frozen[0]
    return float((STEP / (step * paths)) ** (1.0 / (2 * arrays)))


def _nonlinear_std(network: Network, projection: Projection, frozen: tuple[float, int]) -> float:
    # t, the argument of tanhshrink, has variance tau = scale² paths n_in / L * std ** (2 arrays). The derivative
    # tanh(t)² ~ t² scales a step twice, in the backward and in the forward pass: together by E[t⁴] = 3 tau², or in the
    # v2 kinds, where t = g' u and the step passes through g' too, by E[g'² t⁴] = 15 * 3 tau². Every array moves.
    moment = projection.map.fourth_moment()
    arrays = _random_arrays(network)
    paths = network.terms * math.prod(split.num_terms for split in network.splits)
    tau = network.scale**2 * paths * projection.map.variance()
    moved = sum(
        _spread(network, k, name) / (network.terms * split.num_terms_per_array(name))
        for k, split in enumerate(network.splits)
        for name in split.shapes
        if name not in split.ones
    )
    # Frozen arrays enter tau and the multiplier of every array by their mean squares. (They do not move, which
    # ``moved`` neglects: at most a factor of the number of arrays in the step.)
    step = moment * tau**2 * paths * moved * projection.map.gain() * frozen[0] ** 3
    arrays -= frozen[1]
    return float((STEP / step) ** (1.0 / (6 * arrays - 2))) if arrays > 0 else 1.0


def _random_arrays(network: Network) -> int:
    """Return the number of arrays in one product, without those that start at one."""
    return sum(len(split.shapes) - len(split.ones) for split in network.splits)


def _spread(network: Network, k: int, name: str) -> float:
    """Return ``sqrt(q (q + P))`` of one array, over all terms."""
    split = network.splits[k]
    paths = network.terms * split.num_terms_per_array(name)
    touched = network.size * split.num_terms_per_array(name) / math.prod(split.shapes[name])
    return math.sqrt(paths * (paths + touched))
