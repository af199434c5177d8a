"""Extract an adapter from a fully tuned checkpoint on disk: a fit to the changes of the target weights.

It does not need torch, and reads both checkpoints one tensor at a time. :func:`tnadapt.torch.extract` does the same for
models in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import config_of
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import load_backend
from tnadapt.backends.stored_floats import rounded, widened
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tnadapt.checkpoints.container import DTYPES
from tnadapt.checkpoints.stored_weights import FLOATS, StoredWeights, find_weights, numbers
from tnadapt.errors import FileError, ShapeError, TargetError, safe_repr
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.prefixes import Prefix
from tnadapt.targets.roles import is_within
from tnadapt.targets.target import Target, check_distinct

from . import FitReport, Settings, Step, smallest_rank

_PIECE = 1 << 20


class Extraction(NamedTuple):
    """The adapter extracted from a tuned checkpoint.

    Attributes
    ----------
    file : AdapterFile
        Save it with :func:`tnadapt.save`.
    report : FitReport
        Accuracy of the fit.
    others : tuple of str
        Tensors that differ between the two checkpoints, or are only in the tuned one, and are not in the file.
    """

    file: AdapterFile
    report: FitReport
    others: tuple[str, ...]


@checks_arguments
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    cfg: Config | str | None = None,
    targets: Any = "qv",
    *,
    max_error: float | None = None,
    max_rank: int | None = None,
    keep_trainable: str | Sequence[str] = (),
    compare: bool = True,
    progress: Callable[[Step], None] | None = None,
    **settings: Any,
) -> Extraction:
    """Extract an adapter from a fully tuned checkpoint.

    Parameters
    ----------
    base, tuned : path
        Two checkpoints of one model: safetensors files, indices, or folders.
    cfg : Config or str, optional
        The method to fit: a config, or the name of a preset; ``tnadapt.presets.superlora(rank=8)`` by default.
    targets : str, list of str or list of Target
        The weights, as for :func:`tnadapt.targets.checkpoint_targets.find_stored`.
    max_error : float, optional
        Use the smallest rank with at most this relative error, instead of the config's rank.
    max_rank : int, optional
        The largest rank to test with ``max_error``.
    keep_trainable : str or sequence of str
        Tensors to store in the adapter file as they are in the tuned checkpoint, by whole components of their names:
        ``"classifier"`` selects everything at or below it.
    compare : bool
        Whether to look for other tensors that differ, which reads both checkpoints completely.
    progress : callable, optional
        Called with a :class:`~tnadapt.decomposition.Step`.
    **settings
        ``tol``, ``max_iterations``, ``svd`` and ``seed`` of :func:`tnadapt.decompose`; with the name of a preset also
        its settings, except for the seed.

    Returns
    -------
    Extraction
        Adapter file, report, and the names of other tensors that differ.

    Raises
    ------
    FileError
        If a checkpoint cannot be read.
    TargetError
        If a target is missing in a checkpoint, has another shape, or is not floating; or ``keep_trainable`` matches
        nothing.
    ConfigError, ShapeError
        If the config does not fit the weights, or no rank reaches the error.

    Notes
    -----
    Memory is the kept tensors, two tensors with their difference, and a few times one group's part of the long vector.
    The difference is computed in float64 and fitted in float32. With ``max_error``, the targets are read again for
    each rank that is tested.

    Examples
    --------
    >>> import tempfile
    >>> import tnadapt as tna
    >>> from safetensors.numpy import save_file
    >>> rng = np.random.default_rng(0)
    >>> base = {f"attn.{x}_proj.weight": rng.normal(size=(8, 8)).astype("f4") for x in "qkv"}
    >>> update = (rng.normal(size=(8, 2)) @ rng.normal(size=(2, 8))).astype("f4")
    >>> tuned = {name: w + update if "k_proj" not in name else w for name, w in base.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(base, folder + "/base.safetensors")
    ...     save_file(tuned, folder + "/tuned.safetensors")
    ...     extraction = extract(folder + "/base.safetensors", folder + "/tuned.safetensors", tna.presets.lora(2))
    >>> extraction.file, extraction.report.error < 1e-5, extraction.others
    (AdapterFile(64 parameters in 4 arrays, 2 targets, 0 kept), True, ())
    """
    chosen, rest = Settings.taken_from(settings)
    cfg = config_of(cfg, rest, "extract", ("targets", "max_error", "max_rank", "keep_trainable", *Settings.NAMES))
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    shapes = {name: entry.shape for name, entry in after.entries.items()}
    resolved = find_stored(shapes, targets, after.config or before.config)
    check_distinct(resolved)
    (new, _), (old, prefix) = find_weights(after, resolved, "tuned"), find_weights(before, resolved, "base")
    kept = _kept(after, keep_trainable, new.names)
    backend, like = load_backend("numpy"), np.zeros(0, np.float32)

    def read(weight: int) -> np.ndarray:
        return _difference(resolved[weight].label, old.of(weight), new.of(weight))

    def fit(config: Config) -> tuple[dict[str, np.ndarray], FitReport]:
        plan = UpdatePlan(
            config,
            [target.shape for target in resolved],
            [target.layer for target in resolved],
            [target.role for target in resolved],
        )
        return chosen.fit(backend, like, plan.with_base(old.of), read, progress)

    if max_error is None:
        arrays, report = fit(cfg)
    else:
        _, cfg, arrays, report = smallest_rank(fit, cfg, max_error, max_rank)
    dtypes = {KEPT + name: "bfloat16" for name in kept if after.entries[name].dtype == "BF16"}
    base_print = old.fingerprint()
    # A base without a fingerprint could not be recognized later, so arrays that are computed from it are stored.
    frozen = {} if base_print is not None else report.plan.given
    file = AdapterFile(
        cfg,
        resolved,
        arrays,
        kept={name: numbers(after, name) for name in kept},
        dtypes=dtypes,
        base=base_print,
        given=frozen,
        model=_model(after),
    )
    others = tuple(_others(before, after, new, prefix, set(kept))) if compare else ()
    return Extraction(file, report, others)


# -- Reading ---------------------------------------------------------------------------------------


def _difference(label: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        wide = after.astype(np.float64) - before
        difference: np.ndarray = wide.astype(np.float32)
    if not np.isfinite(difference).all():
        raise ShapeError(f"{label} holds NaN or infinity, or differs by more than float32 can represent")
    largest = float(np.max(np.abs(wide), initial=0.0))
    if 0.0 < largest < np.finfo(np.float32).smallest_normal:
        raise ShapeError(
            f"{label} differs by at most {largest:.3g}, which is too small for float32, in which updates are "
            "fitted: scale both checkpoints up, or leave this weight out of the targets"
        )
    return difference


def _model(checkpoint: Checkpoint) -> str:
    names = (checkpoint.config or {}).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _kept(tuned: Checkpoint, patterns: str | Sequence[str], targets: set[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in tuned.entries if is_within(name, pattern)]
        if not matching:
            some = ", ".join(list(tuned.entries)[:6])
            raise TargetError(
                f"keep_trainable: no tensor lies at or below {safe_repr(pattern)}; the tuned checkpoint has {some}, …"
            )
        names.update(dict.fromkeys(matching))
    both = sorted(targets & names.keys())
    if both:
        raise TargetError(f"{both[0]} is both a target and in keep_trainable: remove it from one of them")
    for name in names:
        if tuned.entries[name].dtype not in DTYPES:
            raise TargetError(f"{name} is {tuned.entries[name].dtype}, which adapter files do not support")
    return list(names)


# -- Other differences of the two checkpoints --------------------------------------------------------------------------


def _others(
    base: Checkpoint, tuned: Checkpoint, weights: StoredWeights, prefix: Prefix, kept: set[str]
) -> Iterator[str]:
    adapted: dict[str, list[Target]] = {}
    for part in (part for parts in weights.parts for part in parts):
        adapted.setdefault(part.name, []).append(part)
    for name, entry in tuned.entries.items():
        if name in kept:
            continue
        # Tensors outside of the backbone may have the same name, without the prefix, in both.
        place = next((place for place in (prefix.of(name), name) if place in base.entries), None)
        if any(part.is_whole for part in adapted.get(name, ())):
            differs = False
        elif place is None:
            differs = True
        elif name in adapted:
            differs = _rest_differs(adapted[name], base, place, tuned)
        elif base.entries[place].shape != entry.shape:
            differs = True
        elif base.entries[place].dtype != entry.dtype:
            differs = not _same_numbers(base, place, tuned, name)
        else:
            differs = not _same_bytes(base, place, tuned, name)
        if differs:
            yield f"{name} (rows of no target)" if name in adapted else name


def _rest_differs(own: Sequence[Target], base: Checkpoint, place: str, tuned: Checkpoint) -> bool:
    before, after = _alike(base, place, tuned, own[0].name)
    for target in own:
        target.write(after, target.select(before))
    return not np.array_equal(before, after, equal_nan=True)


def _same_numbers(base: Checkpoint, place: str, tuned: Checkpoint, name: str) -> bool:
    if base.entries[place].dtype not in FLOATS or tuned.entries[name].dtype not in FLOATS:
        return False
    return np.array_equal(*_alike(base, place, tuned, name), equal_nan=True)


def _alike(base: Checkpoint, place: str, tuned: Checkpoint, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read two tensors, rounded to the narrower dtype if they differ, so that a mere cast is not a difference."""
    before, after = numbers(base, place), numbers(tuned, name)
    kinds = base.entries[place].dtype, tuned.entries[name].dtype
    if kinds[0] == kinds[1]:
        return before, after
    # Neither of bfloat16 and float16 can represent all numbers of the other; either choice is fine.
    narrow = DTYPES[min(kinds, key=[*FLOATS][::-1].index)]
    return tuple(widened(rounded(array.astype(np.float64), narrow), narrow) for array in (before, after))  # type: ignore[return-value]


def _same_bytes(base: Checkpoint, place: str, tuned: Checkpoint, name: str) -> bool:
    with open(base.shard[place], "rb") as base_file, open(tuned.shard[name], "rb") as tuned_file:
        base_file.seek(base.data[base.shard[place]] + base.entries[place].start)
        tuned_file.seek(tuned.data[tuned.shard[name]] + tuned.entries[name].start)
        left = tuned.entries[name].stop - tuned.entries[name].start
        while left:
            size = min(left, _PIECE)
            ours, theirs = base_file.read(size), tuned_file.read(size)
            if len(ours) != size or len(theirs) != size:
                raise FileError(
                    f"{base.path} or {tuned.path}: a file ended within {safe_repr(name)}, while it was read"
                )
            if ours != theirs:
                return False
            left -= size
        return True
