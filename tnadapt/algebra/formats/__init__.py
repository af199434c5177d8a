"""Tensor formats of a split: dense, CP, Tucker, tensor train, or a registered network.

Each format is one class in one file. It defines its arrays and the einsum that computes the tensor from them; all that
the planner, the solvers, the diagrams and the cost estimates need is derived from these, or overridden
(:class:`Format`). A new built-in format needs one more file and one more line in :data:`FORMATS`; another package calls
``tnadapt.register_format``. :class:`tnadapt.testing.FormatContract` tests both kinds. Paper symbols: C the core
(``core``), A_m the plane factors (``factor0`` …), r the rank, d_m the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tnadapt.plugins import Registry

from ._cp import CP, BatchedCP, Circuit, Dense, WeightedCP
from ._format import (
    Contraction,
    Format,
    Formula,
    Legs,
    Ranges,
    Rank,
    jacobian_rank,
    letters,
    of_cp,
    of_tucker,
    rank_a_mode,
    unfolded,
)
from ._tucker import Axes, Permuted, TensorTrain, Tucker

__all__ = [
    "CP",
    "FORMATS",
    "Axes",
    "BatchedCP",
    "Circuit",
    "Contraction",
    "Dense",
    "Format",
    "Formula",
    "Legs",
    "Permuted",
    "Ranges",
    "TensorTrain",
    "Tucker",
    "WeightedCP",
    "jacobian_rank",
    "letters",
    "make_format",
    "of_cp",
    "of_tucker",
    "rank_a_mode",
    "register_format",
    "unfolded",
]

FORMATS: Registry[Format] = Registry(
    "format",
    Format,
    {
        "dense": Dense,
        "cp": CP,
        "cp-weighted": WeightedCP,
        "tucker": Tucker,
        "tt": TensorTrain,
        "cp-batched": BatchedCP,
        "circuit": Circuit,
    },
)


def register_format(name: str, cls: type[Format]) -> None:
    """Register a tensor format under a name, for ``Config(format=name)`` and everything that takes a config.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.formats.Format`.

    Raises
    ------
    ConfigError
        If the name has another form, is built in, or registered by another module, or the class is not a subclass of
        Format.

    See Also
    --------
    tnadapt.testing.FormatContract : The tests that such a class must pass.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.formats import Format
    >>> class Three(Format):
    ...     formula = "ar,rs,sb->ab"
    ...     def array_shapes(self, rank):
    ...         return {"left": (self.sizes[0], rank), "middle": (rank, rank), "right": (rank, self.sizes[1])}
    >>> tna.register_format("three", Three)
    >>> tna.SuperLoRA(tna.Config(rank=2, format="three"), [(5, 7)]).num_parameters
    28
    """
    FORMATS.register(name, cls)


def make_format(name: str, sizes: Sequence[int], rank: Rank) -> Format:
    """Return the format with that name for a tensor of these sizes.

    Raises
    ------
    ConfigError
        If there is no format with that name.

    Examples
    --------
    >>> make_format("tt", (4, 5, 6), 100).shapes
    {'core0': (1, 4, 4), 'core1': (4, 5, 6), 'core2': (6, 6, 1)}
    """
    return FORMATS.find(name)(sizes, rank)
