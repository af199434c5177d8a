"""The paper's geometric analysis: every arm's update compared with the dense one, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tnadapt.algebra.geometry import geometry
from tnadapt.checkpoints.adapter_format import load
from tnadapt.errors import FileError, TnadaptError

if TYPE_CHECKING:
    from tnadapt.finetune import Point

__all__ = ["VECTORS", "at_one_rate", "measured", "summary"]

#: Number of leading singular vectors to compare.
VECTORS = 5


def at_one_rate(points: Sequence[Point], results: Path) -> list[Point]:
    """Return the same settings, all at the dense update's rate, since the paper has one rate for all.

    The length of an update, and with it the distance of equation 7, depends on its rate; the directions depend less.
    """
    from tnadapt.finetune.pareto_report import points_in

    return points_in(results, [_dense(points).rate])


def measured(
    points: Sequence[Point], adapters: Path, k: int = VECTORS, one_rate: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row for every arm except the dense one, seed and weight: d_L, d_R and d_E of equations 5 to 7.

    Parameters
    ----------
    points : sequence of Point
        The points of a study, one of them of the family ``dense``.
    adapters : Path
        The folder of its adapters.
    k : int
        Number of singular vectors.
    one_rate : bool
        Stored in every row.

    Raises
    ------
    TnadaptError
        If there is no dense update, or an adapter is missing.
    """
    dense = _dense(points)
    others = [point for point in points if point is not dense and point.method.config is not None]
    for place, record in enumerate(dense.records):
        targets, expected = _updates(record, adapters)
        for point in others:
            _, found = _updates(point.records[place], adapters)
            for target, one, two in zip(targets, expected, found, strict=True):
                values = geometry(one.astype(np.float64), two.astype(np.float64), min(k, *one.shape))
                yield {
                    "arm": point.method.family,
                    "parameters": point.parameters,
                    "rate": point.rate,
                    "one_rate": one_rate,
                    "seed": record["seed"],
                    "weight": target.name,
                    "role": target.role,
                    **{name: round(value, 6) for name, value in values._asdict().items()},
                }


def _dense(points: Sequence[Point]) -> Point:
    found = next((point for point in points if point.method.family == "dense"), None)
    if found is None:
        raise TnadaptError("there is nothing to compare with: the recipe has no arm 'dense'")
    return found


def _updates(record: Any, adapters: Path) -> tuple[Any, list[np.ndarray]]:
    name = record.get("adapter")
    if name is None or not (adapters / name).is_file():
        raise FileError(
            f"the adapter of {record['family']} {record['label']}, seed {record['seed']}, is not in {adapters}; "
            "train again with --fresh"
        )
    file = load(adapters / name)
    return file.targets, file.deltas()


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means of every arm over weights and seeds.

    Examples
    --------
    >>> row = {"arm": "LoRA", "parameters": 4, "d_left": 0.5, "d_right": 0.2, "d_euclid": 1.0}
    >>> summary([row, {**row, "d_left": 0.7}])
    [{'arm': 'LoRA', 'parameters': 4, 'd_left': 0.6, 'd_right': 0.2, 'd_euclid': 1.0}]
    """
    found = []
    for arm, parameters in dict.fromkeys((row["arm"], row["parameters"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["parameters"]) == (arm, parameters)]
        means = {
            name: round(float(np.mean([row[name] for row in own])), 6) for name in ("d_left", "d_right", "d_euclid")
        }
        found.append({"arm": arm, "parameters": parameters, **means})
    return found
