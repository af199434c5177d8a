"""Verification of the laws as a library call: whether a config computes what it defines, on this machine and library.

Each law reports the largest error found and the error allowed; a report holds if no law exceeds its limit.
:mod:`tnadapt.testing._config_laws`, :mod:`tnadapt.testing._projection_laws` and
:mod:`tnadapt.testing._library_laws` check them one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.starting_points import STARTS
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import available_backends, load_backend
from tnadapt.errors import ConfigError, integer, safe_repr
from tnadapt.report import html_table, text_table

from ._config_laws import checkable, of_config
from ._law import Law
from ._library_laws import of_library

__all__ = ["Law", "Report", "examples", "verify"]

_HEAD = ("law", "backend", "cases", "largest error", "allowed", "")


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of :func:`verify`.

    Attributes
    ----------
    laws : tuple of Law
    absent : dict of str to str
        Libraries that were requested but cannot be used here, and why.
    """

    laws: tuple[Law, ...]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every law holds."""
        return bool(self.laws) and all(law.holds for law in self.laws)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Examples
        --------
        >>> verify(presets.lora(1), [(2, 2)], backends=["numpy"]).to_dict()["holds"]
        True
        """
        return {
            "holds": self.holds,
            "laws": [{**dataclasses.asdict(law), "holds": law.holds} for law in self.laws],
            "absent": self.absent,
        }

    def rows(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Yield one row per law and library, over all subjects: name, backend, cases, error, allowed, verdict."""
        grouped: dict[tuple[str, str], list[Law]] = {}
        for law in self.laws:
            grouped.setdefault((law.name, law.backend), []).append(law)
        for (name, backend), laws in grouped.items():
            broken = [law.subject for law in laws if not law.holds]
            # max() may ignore a NaN, so check for one first.
            errors = [law.error for law in laws]
            worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
            yield (
                name,
                backend,
                str(sum(law.cases for law in laws)),
                f"{worst:.1e}",
                f"{laws[0].allowed:.0e}" if laws[0].allowed else "0",
                "holds" if not broken else "BROKEN: " + ", ".join(broken),
            )

    def __str__(self) -> str:
        """Return the table as plain text."""
        return "\n".join([*text_table([_HEAD, *self.rows()]), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table("Laws", _HEAD, self.rows(), self._notes())

    def _notes(self) -> list[str]:
        absent = [f"{name}: not checked: {why}" for name, why in self.absent.items()]
        return [*absent, "all laws hold" if self.holds else "NOT all laws hold"]


@checks_arguments
def verify(
    config: Config | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[Hashable] | None = None,
    backends: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> Report:
    """Check the laws of a config, or of the library and all presets.

    Parameters
    ----------
    config : Config, optional
        The config to check; of a :class:`tnadapt.CompositeConfig` every part, on its own of the shapes. If None, the
        draws, the products, fwht and F of the library, every preset of :mod:`tnadapt.presets` against the formula of
        its method, and every start.
    shapes : sequence of (rows, cols), optional
        Shapes of the weights for ``config``; ``[(12, 8), (12, 8), (8, 12)]`` by default. A projection is compared with
        its dense matrix, so use at most a few thousand elements per group.
    layers : sequence of hashable, optional
        For ``groups="layer"``.
    backends : sequence of str, optional
        Libraries to check on; by default all that are usable here.
    seed : int
        Seed of the random parameters.
    progress : callable, optional
        Called with a line that says what is checked next.
    roles : sequence of hashable, optional
        For ``groups="role"``.

    Returns
    -------
    Report
        ``print`` it for a table; ``report.holds``; ``report.to_dict()``.

    Raises
    ------
    ConfigError
        If shapes are given without a config, the config does not suit them or has more than 2**27 elements, seed is not
        an integer from 0 to 2**64 - 1, or backends is empty.
    BackendError
        If a backend is unknown.

    Notes
    -----
    The laws: the number of parameters equals the number of elements created and the format's formula; ΔW equals the
    textbook formula and the method's formula; a slice equals that part of the whole; initially ΔW is exactly 0 and its
    gradient is not; the gradient equals the exact derivative; where ``apply`` is not "add", W' equals its formula, is W
    to the bit initially, and has the formula's derivative; F equals its dense matrix, and its adjoint passes the dot
    test; every library agrees with NumPy; draws equal known answers.

    Examples
    --------
    >>> print(verify(presets.lora(rank=2), [(4, 3)], backends=["numpy"]))
    law                                    backend  cases  largest error  allowed
    parameters counted = made = formula    numpy    1      0.0e+00        0        holds
    ...
    all laws hold
    """
    shapes = None if shapes is None else list(shapes)
    if config is None and shapes is not None:
        raise ConfigError("shapes belong to a config; give verify(config, shapes)")
    seed = integer("seed", seed, 0, (1 << 64) - 1, ConfigError)
    where = shapes if shapes is not None else ((12, 8), (12, 8), (8, 12))
    if config is not None:  # before the libraries are imported, which takes longer
        for _, own, weights, keys, own_roles in _parts(config, where, layers, roles):
            checkable(own, weights, keys, own_roles)
    names, absent = _usable(backends)
    tell = progress or (lambda line: None)
    found: list[Law] = []
    for name in names:
        backend = load_backend(name)
        with backend.double_precision():
            rng = np.random.default_rng(seed)
            tell(f"{name}: {'the operations' if config is None else 'the config'}")
            if config is not None:
                for label, own, weights, keys, own_roles in _parts(config, where, layers, roles):
                    found += of_config(label, own, weights, keys, backend, rng, own_roles)
                continue
            found += of_library(backend, rng)
            for label, (example, weights) in {**examples(), **_starts()}.items():
                tell(f"{name}: {label}")
                found += of_config(label, example, weights, None, backend, rng)
    return Report(tuple(found), absent)


def examples() -> dict[str, tuple[Config, list[tuple[int, int]]]]:
    """Return a small instance of every preset: name -> (config, shapes)."""
    four: dict[str, Any] = {"weights": 4, "rows": 12, "cols": 8}
    made = {
        "dense": presets.dense(),
        "dora": presets.dora(3, alpha=6),
        "hira": presets.hira(3, alpha=6),
        "lora": presets.lora(3, alpha=6),
        "lokr": presets.lokr(2, alpha=3),
        "krona": presets.krona(),
        "loha": presets.loha(2, alpha=3),
        "lonkr": presets.lonkr(2, splits=3, split_size=2),
        "lotr": presets.lotr(3, **four),
        "lorta": presets.lorta(2, order=4),
        "lorta_cp": presets.lorta_cp(3, layers=2, rows=12, cols=8, heads=3),
        "fastfood": presets.fastfood(0.1),
        "superlora": presets.superlora(2, projection="linear", ratio=0.3),
        "fact_tt": presets.fact_tt(3, **four),
        "fact_tk": presets.fact_tk(3, **four),
        "cara": presets.cara(3, heads=3, **four),
        "metatt": presets.metatt(2, layers=2, rows=12, cols=8, alpha=3),
        "gralora": presets.gralora(4, blocks=2, alpha=3),
        "compacter": presets.compacter(1, terms=2),
        "quanta": presets.quanta((2, 2)),
        "craft": presets.craft(3, groups=1),
        "lora_fa": presets.lora_fa(3, alpha=6),
        "lora_xs": presets.lora_xs(3),
        "nola": presets.nola(5, rank=2),
        "randlora": presets.randlora(3, rows=12, cols=8, alpha=6),
        "share_lora": presets.share_lora(3),
        "svft": presets.svft(8),
        "tied_lora": presets.tied_lora(3, alpha=6),
        "tinylora": presets.tinylora(5),
        "unilora": presets.unilora(11, rank=3),
        "vera": presets.vera(5),
        "shira": presets.shira(10),
        "fourierft": presets.fourierft(10),
        "loca": presets.loca(10),
        "waveft": presets.waveft(10, family="db2"),
        "c3a": presets.c3a(4),
        "miss": presets.miss(3),
    }
    return {name: (config, [(12, 8)] * 4) for name, config in made.items()}


def _starts() -> dict[str, tuple[Config, list[tuple[int, int]]]]:
    """Return a small instance of every start but the usual one, which the presets have."""
    rank = {"rank": 3, "alpha": 6}
    return {
        f"lora, start={name}": (presets.lora(**rank, start=name), [(12, 8)] * 2)
        for name in STARTS.built_in
        if STARTS[name].subtracts
    }


Keys = Sequence[Hashable] | None


def _parts(
    config: Config, shapes: Sequence[tuple[int, int]], layers: Keys, roles: Keys
) -> Iterator[tuple[str, Config, Sequence[tuple[int, int]], Keys, Keys]]:
    """Yield each config of an adapter with a label, and its own of the weights."""
    parts = config.split(range(len(shapes)))
    if len(parts) == 1:
        yield "config", config, shapes, layers, roles
        return
    for number, (own, places) in enumerate(parts):
        keys = [None if given is None else [given[place] for place in places] for given in (layers, roles)]
        yield f"part {number}", own, [shapes[place] for place in places], keys[0], keys[1]


def _usable(wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    if wanted is None:
        return available_backends(), {}
    if isinstance(wanted, str) or not list(wanted):
        raise ConfigError(f'backends must be a list of one or more names, e.g. ["numpy"]; got {safe_repr(wanted)}')
    absent = {name: "no device to compute on" for name in wanted if not load_backend(name).usable()}
    return [name for name in wanted if name not in absent], absent
