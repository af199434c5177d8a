"""What is launched, in which order, for the Hadamard transform and for F: the same for Triton and for CUDA C.

A launcher is what runs one pass; arrays are touched by ``reshape`` and ``sum`` alone, so they may be of any library.
The reference implementations are :func:`tnadapt.algebra.maps.hadamard.fwht` and the linear part of
:class:`tnadapt.algebra.maps.projection.Projection`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from .passes import Pass, passes

__all__ = ["Drawn", "Launcher", "fastfood", "fastfood_adjoint", "fwht"]


class Drawn(NamedTuple):
    """The integers that make one F."""

    n_in: int
    n_out: int
    length: int
    """Of the long transform: L, a power of two."""
    period: int
    """Of the small one: the least power of two that n_in fits in."""
    seed: int
    group: int
    signs: bool
    """Whether signs are the diagonal at the end; else normal numbers."""

    @classmethod
    def of(cls, draws: Any, n_in: int) -> Drawn:
        """Of a :class:`tnadapt.algebra.maps._fastfood_draws.FastfoodDraws`."""
        n_out = draws.lengths["diagonal"]
        return cls(n_in, n_out, draws.padded, draws.pruned, draws.seed, draws.group, bool(draws.signs))


#: For a transform that draws nothing.
_NOTHING = Drawn(1, 1, 1, 1, 0, 0, True)


class Launcher(Protocol):
    """What runs kernels on arrays (vectors, n): contiguous, float32 or float64."""

    tile_bytes: int
    """How much of an array one program works on."""

    def empty(self, x: Any, *shape: int) -> Any:
        """A new array like x."""
        ...

    def transform(
        self, x: Any, out: Any, length: int, step: Pass, scale: float, f: Drawn, load: str, store: str
    ) -> None:
        """One pass of a transform of that length, from the rows of x to those of out, which may be shorter.

        ``load`` says what the first pass reads: "plain" numbers, zero beyond the end of x's row; those times the
        "diagonal" of f; numbers "permuted", ``x[perm[j] % period] * g[perm[j]]``; or "unpermuted",
        ``x[inverse[j]] * g[j]``. ``store`` says what the last pass writes: "plain" numbers or those times the
        "diagonal". Either is scaled.
        """
        ...

    def gathered_sum(self, x: Any, f: Drawn) -> Any:
        """Sums over repeats of the period of ``x[inverse[j]] * g[j]``, in some pieces: (vectors, pieces, period)."""
        ...


def _transform(
    launcher: Launcher, x: Any, length: int, scale: float, n_out: int, f: Drawn = _NOTHING, load: str = "plain",
    store: str = "plain",
) -> Any:  # fmt: skip
    vectors = x.shape[0]
    steps = passes(length.bit_length() - 1, x.itemsize, launcher.tile_bytes)
    between = launcher.empty(x, vectors, length) if len(steps) > 1 else x
    out = between if n_out == length and len(steps) > 1 else launcher.empty(x, vectors, n_out)
    if not vectors:
        return out
    for step in steps:
        begins, ends = step is steps[0], step is steps[-1]
        launcher.transform(
            x if begins else between, out if ends else between, length, step, scale if ends else 1.0, f,
            load if begins else "plain", store if ends else "plain",
        )  # fmt: skip
    return out


def fwht(launcher: Launcher, x: Any, length: int, scale: float, n_out: int) -> Any:
    """``scale * (H pad(x))[..., :n_out]``, the entries of H being 1 and -1.

    Parameters
    ----------
    launcher : Launcher
        What runs a pass.
    x : array, shape (vectors, n_in)
        float32 or float64, contiguous, ``n_in <= length``.
    length : int
        A power of two.
    scale : float
        What the transform is multiplied by.
    n_out : int
        How much of each vector is wanted.

    Returns
    -------
    array, shape (vectors, n_out)
        New; the dtype and device of x.
    """
    return _transform(launcher, x, length, scale, n_out)


def fastfood(launcher: Launcher, x: Any, f: Drawn) -> Any:
    """The linear part of F: (vectors, n_in) to (vectors, n_out), as :func:`fwht` for the rest.

    The small transform of x; then the first pass of the long one gathers its input through the Feistel network, times
    the normal number of that place, and the last one ends with the signs or normal numbers of the diagonal. Memory
    beside the result: one long vector for each of x.
    """
    small = fwht(launcher, x, f.period, 1.0 / math.sqrt(f.length), f.period)
    return _transform(launcher, small, f.length, 1.0 / math.sqrt(f.length), f.n_out, f, "permuted", "diagonal")


def fastfood_adjoint(launcher: Launcher, y: Any, f: Drawn) -> Any:
    """The adjoint of :func:`fastfood`: (vectors, n_out) to (vectors, n_in); the same bits at every run.

    Each place of the small vector gathers through the inverse network what the repeats of the period send it, summed
    in a fixed order.
    """
    scale = 1.0 / math.sqrt(f.length)
    if not y.shape[0]:
        return launcher.empty(y, 0, f.n_in)
    long = _transform(launcher, y, f.length, scale, f.length, f, "diagonal")
    if f.period == f.length:
        return _transform(launcher, long, f.length, scale, f.n_in, f, "unpermuted")
    sums = launcher.gathered_sum(long, f)
    small = sums.reshape(sums.shape[0], f.period) if sums.shape[1] == 1 else sums.sum(1)
    return fwht(launcher, small, f.period, scale, f.n_in)
