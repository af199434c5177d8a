"""``tnadapt.plan``: find the settings that fit a budget, on the weights of a model given by shapes or headers."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.layout import KnownWeights, make_layout, require_keys
from tnadapt.algebra.presets import PRESETS, AdaptedWeights
from tnadapt.argument_checks import checks_arguments, is_sequence, wrong_argument
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import MAX_CONFIG, json_file, path_of
from tnadapt.errors import ConfigError, FileError, ShapeError, TnadaptError, safe_repr
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.target import Target

from ._measured import TaskMeasurements, gain_of, measurements, recommendation, without_gain
from ._plan_table import RUNG, Plan, Row, bytes_each, checked_criteria, front_of, parameters_of
from ._setting_names import known_as
from .families import Family, Found, Search, families

# -- The search --------------------------------------------------------------------------------------------------------


def plan(
    shapes: Sequence[tuple[int, int]],
    budget: int | str,
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
    dtype: str = "float32",
    by: Sequence[str] = ("parameters", "freedom", "cost"),
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find the settings of all families within a budget, with their capacity and cost, and their Pareto front.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
        Shapes of the weights to update, in torch's order (out_features, in_features).
    budget : int or str
        A number of parameters, also as ``"1k"``; or bytes of the arrays in a file: ``"4 kB"``, ``"64 KiB"``.
    layers : sequence of hashable, optional
        One key per weight; if given, ``groups="layer"`` is among the settings.
    roles : sequence of hashable, optional
        One key per weight, such as ``"q"`` and ``"v"``; if given, ``groups="role"`` is among the settings.
    dtype : str
        Dtype of the file: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    by : sequence of str
        The criteria of the front: ``"parameters"``, ``"freedom"``, ``"cost"``, ``"rank"``, ``"waste"``. With
        ``"rank"``, the rank of every row is computed, which takes a second each for weights of 4096².
    progress : callable, optional
        Called with the number of families that are searched and of all, after each.

    Returns
    -------
    Plan
        ``print`` shows the recommendation for about this budget and a table; see ``rows``, ``front``, ``freest`` and
        ``to_dict()``.

    Raises
    ------
    ConfigError
        If the budget is invalid or is less than the smallest setting needs; if ``by`` or the dtype is unknown, or
        layers or roles do not fit.
    ShapeError
        If shapes are not a list of (rows, cols), or are empty.

    Notes
    -----
    The families are the methods of table 1 of the paper, settings between them (over G, M, K, format, projection and
    ratio), and the methods of the literature with the fewest parameters. For each family, bisection finds the setting
    with the most parameters within the budget (if the family has several K and f, or ρ, the one with the most freedom),
    the same for a tenth of the budget, a hundredth, …, and the smallest setting. No array is created until a rank is
    needed. Shapes are checked once, and what settings need of them is counted once for each different group, so that
    the time hardly depends on the number of weights.

    Freedom and rank measure what a setting can represent, not its accuracy. Where published results apply, rows are in
    the order of the accuracy that their methods reached on held-out samples: on tasks whose adapted weights have
    between a tenth and ten times as many elements, with at most 3.2 times more or fewer parameters
    (``benchmarks/quality``). On your own task, measure it with ``tnadapt finetune``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.plan([(768, 768)] * 24, 1000)
    >>> row = max(plan.rows, key=lambda row: row.freedom)
    >>> print(row.name, row.parameters, row.freedom, row.rank)
    Uni-LoRA p = 1000, r = 4 1000 1000 4
    """
    names = checked_criteria(by)
    each = bytes_each(dtype)
    require_keys(layers, roles)
    if progress is not None and not callable(progress):
        raise wrong_argument("progress", "a function or None", progress)
    if is_sequence(budget) and not is_sequence(shapes):
        raise ShapeError(
            f"shapes must be a list of (rows, cols) integers; got {safe_repr(shapes)}; shapes and budget may be swapped"
        )
    if isinstance(shapes, (str, os.PathLike)):
        raise ShapeError(
            f"shapes must be a list of (rows, cols) integers; got {safe_repr(shapes)}. The command tnadapt plan and "
            "tnadapt.planning.model_targets take a model: give [target.shape for target in model_targets(…)]"
        )
    layers, roles = (None if keys is None else list(keys) for keys in (layers, roles))
    shapes = KnownWeights(shapes, layers, roles)
    for name, keys in (("layer", layers), ("role", roles)):
        if keys is not None:
            make_layout(name, shapes, layers, roles)  # raise errors early
    size = sum(rows * cols for rows, cols in shapes)
    wanted = parameters_of(budget, dtype)
    search, kinds = Search(shapes, layers, roles), families(shapes, layers, roles)
    words, method, served = recommendation(min(wanted, size))
    kinds += _ladders_of(method, search)
    configs = _down(search, kinds, min(wanted, size), progress)
    if not configs:
        least = _least(search, kinds)
        raise ConfigError(
            f"a budget of {wanted:,} parameters is less than any setting needs on these {len(shapes)} weights; the "
            f"least is {least.parameters:,}: {known_as(least.config)}"
        )
    known = measurements(size)
    rows = sorted((_with_gain(Row.of(search.adapter(config), each), known) for config in configs), key=_order)
    freest = _freest(rows)
    rows.sort(key=lambda row: not (row.name.family == method and row in freest))
    front = tuple(front_of(rows, names, min(wanted, size)))
    used = {title for row in rows for title in (*row.measured_on, *row.estimated_on)}
    titles = tuple(task.title for task in known if task.title in used)
    no_gain = without_gain(known, [min(wanted, size), *(row.parameters for row in rows if row.measured is not None)])
    if served and all(row.name.family != served for row in rows):
        words += _too_large(served, search, min(wanted, size), rows)
    return Plan(wanted, dtype, tuple(shapes), names, tuple(rows), front, tuple(freest), titles, no_gain, words)


def _ladders_of(method: str, search: Search) -> list[Family]:
    """Return the family of a preset, given its title; none if it is no preset."""
    weights = AdaptedWeights(search.shapes, search.layers, search.roles)
    return [preset.ladders(weights) for preset in PRESETS.values() if preset.title == method]


def _too_large(served: str, search: Search, allowed: int, rows: Sequence[Row]) -> str:
    """Return that the method that is served as LoRA does not fit, and what fits instead; nothing if it is no preset."""
    weights = AdaptedWeights(search.shapes, search.layers, search.roles)
    for preset in PRESETS.values():
        least = search.least(preset.ladders(weights)) if preset.title == served else None
        if least is not None and least.parameters > allowed:
            other = next((row for row in rows if row.lora_rank is not None), None)
            instead = "" if other is None else f"; of the settings below, LoRA servers take {other.name}"
            return f" On these weights, {served} takes {least.parameters:,} parameters or more{instead}."
    return ""


def _with_gain(row: Row, known: Sequence[TaskMeasurements]) -> Row:
    gain = gain_of(known, row.config, row.parameters)
    if gain is None:
        return row
    return dataclasses.replace(
        row, measured=gain.held_out, gain=gain.test, measured_on=gain.measured_on, estimated_on=gain.estimated_on
    )


def _order(row: Row) -> tuple[float, ...]:
    """Sort by measured accuracy where there is any, then by parameters."""
    measured = -1.0 if row.measured is None else row.measured
    return (row.measured is None, -measured, -row.parameters, row.cost, -row.freedom)


def _freest(rows: Sequence[Row]) -> list[Row]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.name.family, []).append(row)
    return [max(of_family, key=lambda row: (row.freedom, -row.cost)) for of_family in families.values()]


def _least(search: Search, kinds: Sequence[Family]) -> Found:
    return min((least for family in kinds if (least := search.least(family))), key=lambda least: least.parameters)


def _down(
    search: Search, kinds: Sequence[Family], allowed: int, progress: Callable[[int, int], None] | None
) -> dict[Config, None]:
    """Return each family's freest settings that fill the budget, a tenth of it, and so on, and its smallest one."""
    configs: dict[Config, None] = {}
    for number, family in enumerate(kinds):
        least, rung = search.least(family), allowed
        while least is not None and rung >= least.parameters:
            best = search.largest(family, rung, search.freedom)
            assert best is not None
            configs[best.config] = None
            rung //= RUNG
        if least is not None and least.parameters <= allowed:
            configs[least.config] = None
        if progress is not None:
            progress(number + 1, len(kinds))
    return configs


# -- Weights of a model from its headers alone: a folder, a safetensors file or index, a name on the hub ---------------


_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


#: The shapes of a model's tensors, and its config.
Headers = tuple[dict[str, tuple[int, ...]], Mapping[str, Any] | None]


@checks_arguments
def model_targets(model: str | os.PathLike[str], targets: Any = "qv") -> list[Target]:
    """Return the weights of a stored model to be adapted, without reading a tensor.

    Parameters
    ----------
    model : str or PathLike
        A folder, a ``.safetensors`` file or index, or a hub name such as ``"google/vit-base-patch16-224"``, whose
        headers are requested by HTTP.
    targets : str or list of str
        Roles such as ``"qv"``, a regular expression, or paths of modules: see
        :func:`tnadapt.targets.checkpoint_targets.find_stored`.

    Returns
    -------
    list of Target
        ``[target.shape for target in …]`` are the shapes that :func:`tnadapt.plan` takes, ``target.layer`` the layers.

    Raises
    ------
    FileError
        If there is no such model, neither on disk nor on the hub, or it is damaged.
    TargetError
        If no weight matches.

    Examples
    --------
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> save_file({f"h.{i}.attn.{x}_proj.weight": np.zeros((8, 8)) for i in range(2) for x in "qkv"}, "m.safetensors")
    >>> [(target.name, target.shape) for target in model_targets("m.safetensors")][:2]
    [('h.0.attn.q_proj.weight', (8, 8)), ('h.0.attn.v_proj.weight', (8, 8))]
    """
    shapes, config = _headers(model)
    return find_stored(shapes, targets, config)


def _headers(model: str | os.PathLike[str]) -> Headers:
    name = path_of(model)
    if name.startswith("timm:"):
        plain = name.removeprefix("timm:")
        raise FileError(
            f"{name}: plans read the headers of files; give the model's repository on the hub, "
            f"timm/{plain} with its tag such as .augreg_in1k, or plan in Python for the shapes of "
            f"tnadapt.torch.find_targets(timm.create_model({plain!r}))"
        )
    if os.path.lexists(name) or not _HUB.fullmatch(name) or name.endswith((".safetensors", ".json")):
        stored = open_checkpoint(model)
        if stored.is_adapter:
            raise FileError(f"{name}: is an adapter; give the model that it is for")
        return {tensor: entry.shape for tensor, entry in stored.entries.items()}, stored.config
    return _from_hub(name)


def _from_hub(name: str) -> Headers:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileError(
            f"{name}: no such file or folder here; to look on the hub, pip install 'tnadapt[hub]' ({error})"
        ) from None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name)
        config = None
        if huggingface_hub.file_exists(name, "config.json"):
            path = huggingface_hub.hf_hub_download(name, "config.json")
            config = json_file(path, MAX_CONFIG, f"{name}: config.json")
    except TnadaptError:
        raise
    except Exception as error:  # the hub's client raises its own errors, those of its HTTP library, and system errors
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        near = difflib.get_close_matches(name, list(PRESETS), n=1)
        meant = f"; a model is expected here, and {near[0]!r} is a method" if near else ""
        raise FileError(
            f"{name}: no such file or folder here, and loading it from the hub failed: {said}{meant}"
        ) from error
    shapes = {
        tensor: tuple(int(size) for size in entry.shape)
        for file in metadata.files_metadata.values()
        for tensor, entry in file.tensors.items()
    }
    return shapes, config
