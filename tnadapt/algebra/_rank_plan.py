"""What a plan says about the matrix ranks of its updates."""

from __future__ import annotations

import functools

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ShapeError, integer

from ._parameter_plan import ParameterPlan
from .rank_bounds import lora_rank, rank_bound, rank_bounds

__all__ = ["RankPlan"]


class RankPlan(ParameterPlan):
    """A plan with bounds on the ranks of its updates."""

    @checks_arguments
    def largest_rank(self, i: int) -> int:
        """Return a matrix rank that the update of a weight never exceeds, whatever the arrays are.

        LoRA of that rank holds the update exactly, and :func:`tnadapt.convert` writes it from the factors.

        Parameters
        ----------
        i : int
            Index of the weight, ``0 <= i < len(shapes)``.

        Returns
        -------
        int
            At most ``min(shapes[i])``.

        Raises
        ------
        ShapeError
            If there is no weight i.

        Notes
        -----
        The bound follows from the integers of the plan: the least product of bonds of the network between the rows and
        the columns of the weight, as a slice of the folded tensor. It holds for frozen arrays as well. Terms add up,
        and ranks of the splits of Kronecker and Hadamard products multiply. Behind a map F that mixes rows with
        columns, or where a fold cuts through rows, only ``min(rows, cols)`` is known. Random arrays usually attain it;
        see :func:`tnadapt.planning.largest_rank` for the rank that they have.

        Examples
        --------
        >>> import tnadapt as tna
        >>> vit, P = [(768, 768)] * 24, tna.presets
        >>> for config in (P.lora(4), P.lotr(4), P.cara(4, heads=12), P.lokr(4), P.superlora(4)):
        ...     print(tna.SuperLoRA(config, vit).largest_rank(0))
        4
        4
        4
        96
        768
        """
        i = integer("i", i, 0, len(self.shapes) - 1, ShapeError)
        return rank_bound(self.layout, self.groups, i)

    @functools.cached_property
    def lora_rank(self) -> int | None:
        """The rank of LoRA that holds the update of every weight exactly: the maximum of :meth:`largest_rank`.

        None if for some weight two factors of its rank are no smaller than the update itself, or if ``config.apply``
        does more than add the update.

        Examples
        --------
        >>> import tnadapt as tna
        >>> gqa = [(64, 32), (16, 32)] * 3
        >>> tna.SuperLoRA(tna.presets.fact_tk(2, groups="role"), gqa, roles="qvqvqv").lora_rank
        2
        >>> tna.SuperLoRA(tna.presets.superlora(2), gqa).lora_rank is None
        True
        """
        if not self.applying.additive:
            return None
        return lora_rank(self.shapes, self.largest_ranks)

    @functools.cached_property
    def largest_ranks(self) -> list[int]:
        """:meth:`largest_rank` of every weight."""
        return list(rank_bounds(self.layout, self.groups))

    def full_rank_bound(self) -> int | None:
        """Return the rank of the weights' smaller sides if some update may have it and is no smaller as LoRA.

        None if not; no other rank has to be known then.
        """
        most = max(map(min, self.shapes))
        for (rows, cols), rank in zip(self.shapes, rank_bounds(self.layout, self.groups), strict=True):
            if rank * (rows + cols) < rows * cols:
                return None
            if rank == most:
                return most
        return None
