"""What each module's update becomes in another library's form: exactly where algebra permits, else the nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.decomposition import decompose
from tnadapt.errors import ConfigError, shown

from ._kronecker_rules import lycoris_fit, peft_factorization, peft_fits
from ._low_rank import Chosen, Spectrum, exact_pair, low_rank
from ._modules import Module
from ._taking_apart import Wide
from ._updates import Float, Pair, Update

__all__ = ["Choice", "Wish", "choose"]


class Wish(NamedTuple):
    """What is asked of a conversion.

    Attributes
    ----------
    library : {"PEFT", "LyCORIS"}
    kind : {"lora", "lokr", "loha", "full"}
    rank : int or None
        The largest rank allowed.
    max_error : float or None
    """

    library: str
    kind: str
    rank: int | None
    max_error: float | None


class Choice(NamedTuple):
    """What the updates of all modules become.

    Attributes
    ----------
    kind : {"lora", "lokr", "loha", "full"}
    updates : list of Update
    ranks : list of int
        The rank that the library takes of each.
    exact : bool
        Whether nothing but rounding is lost.
    settings : dict
        Of PEFT's config, beside ranks and scales.
    """

    kind: str
    updates: list[Update]
    ranks: list[int]
    exact: bool
    settings: dict[str, Any]


def choose(modules: Sequence[Module], wide: Wide, wish: Wish) -> Choice:
    """What every module's update becomes.

    Raises
    ------
    ConfigError
        If it takes a rank to be possible.
    """
    if wish.kind == "lokr":
        return _lokr(modules, wide, wish)
    if wish.kind == "full":
        chosen = [Chosen(Update("dense", module.shape, (module.delta(wide),)), True) for module in modules]
    elif wish.kind == "lora":
        chosen = low_rank(modules, wide, wish.rank, wish.max_error)
    else:
        chosen = [_loha(module, wide, wish) for module in modules]
    updates = [one.update for one in chosen]
    return Choice(wish.kind, updates, [update.rank for update in updates], all(one.exact for one in chosen), {})


# -- LoHa ----------------------------------------------------------------------------------------


def _loha(module: Module, wide: Wide, wish: Wish) -> Chosen:
    form = module.form(wide)
    if form is not None and form.kind == "loha" and (wish.rank is None or form.rank <= wish.rank):
        return Chosen(form, True)
    own = exact_pair(module, wide, form, wish.rank)
    if isinstance(own, Pair):
        return Chosen(_beside_ones(module, own), True)
    if wish.rank is None:
        raise _no_rank(module, "LoHa")
    delta = module.delta(wide)
    fitted = _fitted(delta, Config(rank=wish.rank, splits=2, combine="hadamard", leading="same"))
    pairs = (Pair(fitted[f"split{k}.factor0"], fitted[f"split{k}.factor1"]) for k in (0, 1))
    # Not all LoHa of a rank are better than LoRA of it: the one beside ones is what it starts to win from.
    candidates = [Update("loha", module.shape, tuple(pairs)), _beside_ones(module, own.pair(wish.rank))]
    return Chosen(min(candidates, key=lambda update: float(np.linalg.norm(update.delta() - delta))), False)


def _beside_ones(module: Module, pair: Pair) -> Update:
    """A product of two factors as LoHa: its Hadamard product with a matrix of ones, which has rank 1."""
    rows, cols = module.shape
    return Update("loha", module.shape, (pair, Pair(np.ones((rows, 1)), np.ones((cols, 1)))))


# -- LoKr ----------------------------------------------------------------------------------------


def _lokr(modules: Sequence[Module], wide: Wide, wish: Wish) -> Choice:
    """What every module's update becomes as LoKr.

    The Kronecker products that they are, where the library can load these; else low-rank W2 beside a W1 of 1 × 1,
    where they are low-rank; else the nearest of the asked rank, with the library's own sizes.
    """
    forms = [module.form(wide) for module in modules]
    kept = [form for form in forms if form is not None and form.kind == "lokr"]
    if len(kept) == len(modules) and all(wish.rank is None or form.rank <= wish.rank for form in kept):
        found = _loaded(kept, modules, wish.library)
        if found is not None:
            return found
    own = [exact_pair(module, wide, form, wish.rank) for module, form in zip(modules, forms, strict=True)]
    if all(isinstance(pair, Pair) for pair in own):
        updates = [_beside_one(module, pair) for module, pair in zip(modules, own, strict=True)]
        found = _loaded(updates, modules, wish.library)
        assert found is not None  # a factor of 1 divides everything
        return found
    if wish.rank is None:
        raise _no_rank(next(m for m, pair in zip(modules, own, strict=True) if isinstance(pair, Spectrum)), "LoKr")
    deltas = [module.delta(wide) for module in modules]
    fitted = [_nearest_lokr(module, wide, wish.rank) for module in modules]
    # LoRA beside a W1 of 1 × 1 is LoKr of the same rank, and often the nearer one.
    plain = [
        _beside_one(module, pair if isinstance(pair, Pair) else pair.pair(wish.rank))
        for module, pair in zip(modules, own, strict=True)
    ]

    def off(updates: Sequence[Update]) -> float:
        return math.fsum(float(np.sum((u.delta() - d) ** 2)) for u, d in zip(updates, deltas, strict=True))

    nearest = sorted((fitted, plain), key=off)
    found = next((made for updates in nearest if (made := _loaded(updates, modules, wish.library))), None)
    if found is None:
        raise ConfigError(
            "PEFT multiplies other axes where W2 of a one-dimensional convolution is full, as it is at this rank: "
            "give a lower rank, or to='lycoris-lokr'"
        )
    return found._replace(exact=False)


def _loaded(updates: Sequence[Update], modules: Sequence[Module], library: str) -> Choice | None:
    """The updates as the library loads them, or None where it cannot."""
    stored, settings = [module.stored for module in modules], dict[str, Any]()
    if library == "PEFT":
        found = peft_fits(updates, stored)
        if found is None:
            return None
        factor, both, fits = found
        settings = {"decompose_factor": factor, "decompose_both": both}
    else:
        fits = [fit for update, shape in zip(updates, stored, strict=True) if (fit := lycoris_fit(update, shape))]
        if len(fits) < len(modules):
            return None
    return Choice("lokr", [fit.update for fit in fits], [fit.rank for fit in fits], True, settings)


def _beside_one(module: Module, pair: Pair | Spectrum) -> Update:
    assert isinstance(pair, Pair)
    return Update("lokr", module.shape, (np.ones((1, 1)), pair))


def _nearest_lokr(module: Module, wide: Wide, rank: int) -> Update:
    """The nearest LoKr whose W1 has the sizes that both libraries choose by themselves."""
    (p, k), (q, n) = (peft_factorization(size) for size in module.stored[:2])
    full = 2 * rank >= max(k, n)  # W2 of such a rank is stored as it is
    settings = Config(rank=rank, splits=2, split_size=(p, q), format="dense" if full else "cp")
    found = _fitted(module.delta(wide), settings)
    last = found["split1.dense"] if full else Pair(found["split1.factor0"], found["split1.factor1"])
    assert found["split0.dense"].shape == (p, q)
    assert last.shape == (k, n * math.prod(module.stored[2:]))
    return Update("lokr", module.shape, (found["split0.dense"], last))


def _fitted(delta: Float, config: Config) -> dict[str, Float]:
    """The arrays of one weight that come nearest to an update, without the group's prefix."""
    params, _ = decompose([delta], config)
    return {name.removeprefix("group0."): np.asarray(array, np.float64) for name, array in params.items()}


def _no_rank(module: Module, method: str) -> ConfigError:
    return ConfigError(
        f"the update of {shown(module.path)} is no {method} by itself: give rank= for the nearest of that rank, and "
        "max_error= for how far off it may be; or to='lycoris-full' for all of it"
    )
