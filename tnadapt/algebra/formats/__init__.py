"""What one split of one group is made of: dense, CP, Tucker or a tensor train.

One class a format and a file, each with two questions: which arrays, and what tensor do they make on a box. A new
format is one more class and one more line in :data:`FORMATS`; :class:`tnadapt.testing.FormatContract` checks
it against its own whole tensor. Paper symbols: C the core (``core``), A_m the plane factors (``factor0`` …),
r the rank, d_m the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tnadapt.errors import ConfigError

from ._cp import CP, WeightedCP
from ._dense import Dense
from ._format import Format, Ranges, Rank, unfolded
from ._tensor_train import TensorTrain
from ._tucker import Tucker

__all__ = [
    "CP",
    "FORMATS",
    "Dense",
    "Format",
    "Ranges",
    "TensorTrain",
    "Tucker",
    "WeightedCP",
    "make_format",
    "unfolded",
]

FORMATS: dict[str, type[Format]] = {
    "dense": Dense,
    "cp": CP,
    "cp-weighted": WeightedCP,
    "tucker": Tucker,
    "tt": TensorTrain,
}


def make_format(name: str, sizes: Sequence[int], rank: Rank) -> Format:
    """The format of that name for a tensor of these sizes.

    Raises
    ------
    ConfigError
        If there is none of that name.

    Examples
    --------
    >>> make_format("tt", (4, 5, 6), 100).shapes
    {'core0': (1, 4, 4), 'core1': (4, 5, 6), 'core2': (6, 6, 1)}
    """
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name](sizes, rank)
