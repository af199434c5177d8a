"""Random numbers of torch's CPU generator, drawn without torch, for adapters that only record a torch seed.

The generator is MT19937 with its classic seeding, which NumPy's ``RandomState`` has as well and never changes (NEP 19).
The numbers are exactly those of torch 1.0 to 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.errors import ConfigError

#: The default seed of ``torch.Generator()``.
DEFAULT_SEED = 67280421310721

# torch draws longer permutations with 64-bit words.
_LONGEST = ((1 << 32) - 1) // 20


class TorchStream:
    """A ``torch.Generator("cpu").manual_seed(seed)``: each call continues where the last one ended.

    Parameters
    ----------
    seed : int
        Any integer that torch takes; it uses the last 32 bits.

    Examples
    --------
    >>> TorchStream(0).uniforms((2,), 0.0, 1.0)
    array([0.4962566, 0.7682218], dtype=float32)
    """

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % (1 << 32))

    def words(self, count: int) -> NDArray[np.uint32]:
        """Return the next words."""
        return np.frombuffer(self._state.bytes(4 * count), "<u4").astype(np.uint32)

    def uniforms(self, shape: Sequence[int], low: float, high: float) -> NDArray[np.float32]:
        """Return what ``torch.empty(shape).uniform_(low, high)`` holds."""
        unit = (self.words(math.prod(shape)) & np.uint32((1 << 24) - 1)) * 2.0**-24
        ends = np.array([low, high], np.float32)
        uniforms = (unit * np.float64(ends[1] - ends[0]) + np.float64(ends[0])).astype(np.float32)
        return np.where(uniforms == ends[1], ends[0], uniforms).reshape(tuple(shape))


def permutation_head(length: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return ``torch.randperm(length)[:count]`` for a seed, in time and memory for ``count`` elements.

    Raises
    ------
    ConfigError
        If the length is beyond 214,748,364, where torch draws permutations differently.

    Examples
    --------
    >>> permutation_head(1 << 24, 3, seed=777)
    array([1374311, 8240085, 6766295])
    """
    if length > _LONGEST:
        raise ConfigError(
            f"torch draws permutations of more than {_LONGEST} elements differently, and {length} are asked for: give "
            "the positions instead"
        )
    words = TorchStream(seed).words(min(count, length - 1)).tolist()
    # A Fisher-Yates shuffle from the front that stores only the elements that have moved.
    moved, head = dict[int, int](), list[int]()
    for place, word in enumerate(words):
        other = place + word % (length - place)
        head.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    if count == length:
        head.append(moved.get(length - 1, length - 1))
    return np.array(head, np.int64)
