"""Starts: the values x_0 at which training begins: zero, random, given, or from the base (PiSSA, MiLoRA, OLoRA).

``Config(start=…)`` names one. If the start is subtracted, ``ΔW = net(x) - net(x_0)`` and x begins at x_0, so a fresh
adapter changes nothing, whatever x_0 is. :mod:`tnadapt.algebra.init` has the zero and random arrays. A new built-in
start is one more class and one more line in :data:`STARTS`; another package calls ``tnadapt.register_start``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError
from tnadapt.plugins import Registry

from . import rng
from .singular_vectors import OVERSAMPLING, dominant_svd, leading_qr, minor_svd
from .sources import Stream

__all__ = ["PREFIX", "STARTS", "Start", "StartPlace", "register_start"]


# -- The contract of a start -------------------------------------------------------------------------------------------


#: Prefix of an array's name under which plans and files have its x_0.
PREFIX = "start."


class StartPlace(NamedTuple):
    """One group, as integers: a start checks with it whether it can compute x_0.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        The network's arrays, by its names: ``"split0.factor0"``.
    sizes : tuple of int
        Sizes of the folded group.
    weights : tuple of (int, int)
        Shapes of the weights of which the group has elements.
    size : int
        Number of elements of the group.
    scale : float
        What the network's sum of products is multiplied by.
    plain : bool
        Whether the network is one matrix product ``factor0 @ factor1.T``, of which both factors are trained, and no map
        F follows.
    """

    shapes: Mapping[str, tuple[int, ...]]
    sizes: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]
    size: int
    scale: float
    plain: bool

    @property
    def is_lora(self) -> bool:
        """Whether the group is LoRA of one whole weight."""
        (rows, cols), *others = self.weights
        return self.plain and not others and self.sizes == (rows, cols) and self.size == math.prod(self.sizes)


class Start:
    """Where training begins. A subclass is registered under the name by which ``Config.start`` refers to it.

    Attributes
    ----------
    subtracts : bool
        Whether ``ΔW = net(x) - net(x_0)``. If False, x_0 itself must give ΔW = 0.
    needs_base : bool
        Whether :meth:`arrays` computes x_0 from the base weights; :meth:`tnadapt.UpdatePlan.with_base`.
    brought : bool
        Whether the caller may bring x_0, of all arrays or of some: ``UpdatePlan(…, start_from=…)``. It is stored in
        files.
    leaves_zero : bool
        Whether one array of each term is zero in x_0, unless it is provided or F is nonlinear.
    """

    subtracts: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    brought: ClassVar[bool] = False
    leaves_zero: ClassVar[bool] = True

    def check(self, place: StartPlace) -> None:
        """Raise a ConfigError if a group cannot begin like this. Default: any group can."""

    def arrays(self, place: StartPlace, base: np.ndarray, stream: Stream) -> dict[str, np.ndarray]:
        """Compute x_0 of a group from its base weights.

        Parameters
        ----------
        place : StartPlace
        base : ndarray of float64
            The group's base weights, folded to ``place.sizes``.
        stream : Stream
            Random words that belong to this group.

        Returns
        -------
        dict of str to ndarray
            One for each of ``place.shapes``.
        """
        raise ConfigError(
            f"start {type(self).__name__} does not define arrays(place, base, stream), which computes the initial "
            "values; define it, or set needs_base = False"
        )


# -- Given: provided by the caller -------------------------------------------------------------------------------------


class BroughtStart(Start):
    """Arrays that the caller provides; those that are not provided start as usual (:mod:`tnadapt.algebra.init`).

    They are passed to a plan by ``UpdatePlan(config, shapes, start_from=arrays)``, and to an adapter on a torch model
    by ``adapter.start_from(arrays)``. Files store them, in float32.
    """

    brought: ClassVar[bool] = True


# -- Parts of the base weight, as LoRA's two factors -------------------------------------------------------------------


_LEFT, _RIGHT = "split0.factor0", "split0.factor1"


class FactorStart(Start):
    """The base of starts that choose B and A so that their product is a part of the base weight.

    A subclass defines :meth:`factors`. Both factors are divided by the square root of the scale s = alpha / rank, so
    that ``s B A`` is that part whatever s is.
    """

    needs_base: ClassVar[bool] = True

    @property
    def _name(self) -> str:
        return type(self).__name__

    def check(self, place: StartPlace) -> None:
        """See :meth:`Start.check`."""
        if not place.is_lora:
            raise ConfigError(
                f"start={self._name.lower()!r} makes LoRA's two factors of one base weight: it needs format='cp', "
                "order=2, fold='stack', groups='weight', and no splits, terms, projection or sources, as "
                f"tnadapt.presets.lora(rank) has them; got a group with the arrays {', '.join(place.shapes)} folded to "
                f"{place.sizes} for weights of {', '.join(map(str, place.weights[:4]))}. Use start='zero', or compute "
                "arrays yourself and use start='given'"
            )
        rank, most = place.shapes[_LEFT][1], min(place.sizes)
        if rank > most:
            raise ConfigError(
                f"start={self._name.lower()!r} needs rank singular vectors of a weight of {place.sizes}, which has "
                f"{most}; got rank={rank}: use rank={most} or less"
            )

    def arrays(self, place: StartPlace, base: np.ndarray, stream: Stream) -> dict[str, np.ndarray]:
        """See :meth:`Start.arrays`."""
        what = f"start={self._name.lower()!r} of group {stream.group}"
        if not np.isfinite(base).all():
            raise ConfigError(f"{what} is computed from the base weight, which holds NaN or infinity")
        left, right = self.factors(base, place.shapes[_LEFT][1], stream, what)
        root = math.sqrt(place.scale)
        return {_LEFT: left / root, _RIGHT: right / root}

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the two factors, (rows, rank) and (cols, rank), for a scale of 1.

        Parameters
        ----------
        matrix : ndarray of float64
            The base weight, finite.
        rank : int
        stream : Stream
        what : str
            Name of what is computed, for messages.
        """
        raise NotImplementedError


# -- MiLoRA: the smallest singular values ------------------------------------------------------------------------------


class MiLoRA(FactorStart):
    """``B = U sqrt(S)``, ``A = sqrt(S) Vᵀ`` of the ``rank`` smallest singular values (arXiv 2406.09044).

    By the whole singular value decomposition in float64, with the largest entry of each left singular vector positive:
    iterations for the smallest ones need a factorization of the matrix as well. It costs about ``20 d n min(d, n)``
    multiply-adds.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        left, values, right = minor_svd(matrix, rank, what)
        return left * np.sqrt(values), right * np.sqrt(values)


# -- OLoRA: an orthonormal basis of the first columns, and the weight's part in it -------------------------------------


class OLoRA(FactorStart):
    """``B = Q_r``, ``A = R_r`` of the QR decomposition of the weight (arXiv 2406.01775).

    Computed in float64, with a positive diagonal of R. Q_r depends on the first ``rank`` columns alone, and
    ``R_r = Q_rᵀ W``. PEFT does not divide the factors by the scale: the two agree for a scale of 1, and for another one
    PEFT's W - s Q R keeps less or more of the weight in the base.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        q = leading_qr(matrix, rank, what)
        return q, matrix.T @ q


# -- PiSSA: the largest singular values --------------------------------------------------------------------------------


class PiSSA(FactorStart):
    """``B = U sqrt(S)``, ``A = sqrt(S) Vᵀ`` of the ``rank`` largest singular values (arXiv 2404.02948).

    Computed in float64 by subspace iteration from seeded normal numbers, with the largest entry of each left singular
    vector positive (:mod:`tnadapt.algebra.singular_vectors`): 16 passes, of ``2 d n (2 r + 8)`` multiply-adds each.
    Where the singular values fall slowly, the iteration ends at a part of the weight with nearly the largest ones.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        rows = matrix.shape[0]
        width = min(2 * rank + OVERSAMPLING, *matrix.shape)
        drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, rows * width)
        left, values, right = dominant_svd(matrix, drawn.astype(np.float64).reshape(rows, width), rank, what)
        return left * np.sqrt(values), right * np.sqrt(values)


# -- Random: no array is zero ------------------------------------------------------------------------------------------


class RandomStart(Start):
    """Random arrays drawn from the seed, none of which is zero; multipliers start where their sources say, or at one.

    The arrays are those of :mod:`tnadapt.algebra.init` without its zero. All of them have a gradient from the first
    step, as ΔW is ``net(x) - net(x_0)``.
    """

    leaves_zero: ClassVar[bool] = False


# -- Zero, the usual start: one array of each term is zero, the others are random --------------------------------------


class ZeroStart(Start):
    """Zero and random arrays drawn from the seed, as :mod:`tnadapt.algebra.init` describes. Nothing is subtracted."""

    subtracts: ClassVar[bool] = False


# -- The starts by name ------------------------------------------------------------------------------------------------

STARTS: Registry[Start] = Registry(
    "start",
    Start,
    {
        "zero": ZeroStart,
        "given": BroughtStart,
        "random": RandomStart,
        "pissa": PiSSA,
        "milora": MiLoRA,
        "olora": OLoRA,
    },
)


def register_start(name: str, cls: type[Start]) -> None:
    """Make a start known by a name, for ``Config(start=name)``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.starting_points.Start`, called without arguments.

    Raises
    ------
    ConfigError
        If the name is not of that form, is built in, or registered by another module, or the class is not a Start.

    Examples
    --------
    LoRA that starts at the first rows and columns of the base weight:

    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.algebra.starting_points import Start
    >>> class Corner(Start):
    ...     needs_base = True
    ...     def arrays(self, place, base, stream):
    ...         (_, rank), _ = place.shapes.values()
    ...         return {"split0.factor0": base[:, :rank], "split0.factor1": base[:rank].T}
    >>> tna.register_start("corner", Corner)
    >>> plan = tna.UpdatePlan(tna.presets.lora(1, start="corner"), [(2, 3)])
    >>> plan = plan.with_base([np.arange(1.0, 7.0).reshape(2, 3)])
    >>> params = plan.init()
    >>> params["group0.split0.factor1"].tolist(), bool(plan.deltas(params)[0].any())
    ([[1.0], [2.0], [3.0]], False)
    """
    STARTS.register(name, cls)
