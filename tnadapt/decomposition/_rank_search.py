"""``tnadapt.search_rank``: find the smallest rank within an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.group import useful_rank
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer, safe_repr

from ._decompose import decompose
from .fits import FitReport

__all__ = ["FoundRank", "search_rank", "smallest_rank"]


class FoundRank(NamedTuple):
    """The result of a rank search.

    Attributes
    ----------
    rank : int
    config : Config
        The config with that rank.
    params : dict of str to array
    report : FitReport
    """

    rank: int
    config: Config
    params: dict[str, Array]
    report: FitReport


@checks_arguments
def search_rank(
    deltas: Any, cfg: Config, max_error: float = 0.1, *, max_rank: int | None = None, **settings: Any
) -> FoundRank:
    """Find the smallest rank at which a config fits given updates within an error.

    Parameters
    ----------
    deltas : list of array, or one array
        As for :func:`tnadapt.decompose`.
    cfg : Config
        The config whose rank is searched; a scale of ``alpha / rank`` changes with it. If it has one rank per mode,
        those that are not None must be equal, and are changed together.
    max_error : float
        Maximum relative Frobenius error of all updates together, above 0 and below 1.
    max_rank : int, optional
        The largest rank to test; by default the rank beyond which the config gains no expressiveness.
    **settings
        Settings of :func:`tnadapt.decompose`.

    Returns
    -------
    FoundRank
        Rank, config, parameters and report.

    Raises
    ------
    ConfigError
        If no rank reaches the error (the message has the error at the largest rank), or the config has no rank to
        search.

    Notes
    -----
    Doubling, then bisection: about 2 log2(r) decompositions. If each decomposition is optimal (LoRA: SVD), so is the
    rank. Otherwise a smaller rank may exist for which the solver did not find the optimum.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> rng = np.random.default_rng(0)
    >>> delta = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 8))
    >>> search_rank([delta], tna.presets.lora(), max_error=1e-6).rank
    3
    """
    return smallest_rank(lambda config: decompose(deltas, config, **settings), cfg, max_error, max_rank)


@checks_arguments
def smallest_rank(
    fit: Callable[[Config], tuple[dict[str, Array], FitReport]],
    cfg: Config,
    max_error: float,
    max_rank: int | None = None,
) -> FoundRank:
    """:func:`search_rank` with any function that fits a config."""
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float, np.floating)) or not 0.0 < max_error < 1.0:
        raise ConfigError(f"max_error must be above 0 and below 1, relative to the updates; got {safe_repr(max_error)}")
    if not isinstance(cfg, Config):
        raise ConfigError(f"expected a tnadapt.Config; got {type(cfg).__name__}")
    ranks = {cfg.rank} if isinstance(cfg.rank, int) else set(cfg.rank) - {None}
    if len(ranks) != 1:
        raise ConfigError(f"only one rank can be searched, and rank={cfg.rank} has {len(ranks)}: give an integer")
    if max_rank is not None:
        max_rank = integer("max_rank", max_rank, 1, MAX_SIZE, ConfigError)

    def at(rank: int) -> FoundRank:
        several = not isinstance(cfg.rank, int) and tuple(None if r is None else rank for r in cfg.rank)
        config = cfg.replace(rank=several or rank)
        return FoundRank(rank, config, *fit(config))

    found = at(1)
    useful = useful_rank(found.report.plan.groups)
    if useful is None:
        raise ConfigError(f"format={cfg.format!r} has no rank to search: decompose() gives its parameters")
    most = min(useful, max_rank or useful)
    low = 0  # the largest rank known to be too small
    while found.report.error > max_error:
        if found.rank >= most:
            raise ConfigError(
                f"no rank up to {most} comes within {max_error:g}: the error there is {found.report.error:.4g}; allow "
                "a larger error, or use another format or fold"
            )
        low = found.rank
        found = at(min(2 * low, most))
    while found.rank - low > 1:
        tried = at((low + found.rank) // 2)
        if tried.report.error <= max_error:
            found = tried
        else:
            low = tried.rank
    return found
