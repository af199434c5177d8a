"""How often fits are exact where an exact answer exists, and how good they are where there is noise.

    python benchmarks/exact_fits.py --out benchmarks/results/exact_fits.json

Every case is a network with random arrays, so that it has an exact decomposition: in padded folds, as CP tensors of
nearly the greatest rank that is identifiable, as sums of Kronecker products, as Hadamard products, and as noisy tensor
trains. Times are of the process, in milliseconds per case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import tnadapt as tna
from tests.support.exact_cases import cp_tensor, padded_plans, random_deltas

PADDED_FORMATS = ("cp", "cp-weighted", "tucker", "tt")
CP_CASES = (((5, 5, 5), 7), ((4, 4, 4), 5), ((4, 4, 4), 6), ((6, 5, 4), 6), ((6, 5, 4), 7))


def fitted(plans: Iterator[tna.SuperLoRA], noise: float, **settings: Any) -> dict[str, Any]:
    """Fit updates that have random parameters, with noise of a norm relative to theirs."""
    errors, spent = [], 0.0
    for number, plan in enumerate(plans):
        rng = np.random.default_rng(number)
        made = random_deltas(plan, rng)
        if noise:
            size = np.sqrt(sum((delta**2).sum() for delta in made) / plan.size)
            made = [delta + noise * size * rng.normal(size=delta.shape) for delta in made]
        begun = time.process_time()
        errors.append(tna.decompose(made, plan.config, **settings)[1].error)
        spent += time.process_time() - begun
    return _row(np.array(errors), spent)


def _row(errors: np.ndarray, spent: float) -> dict[str, Any]:
    return {
        "cases": len(errors), "below 1e-6": int((errors < 1e-6).sum()), "mean error": float(errors.mean()),
        "largest error": float(errors.max()), "ms": 1e3 * spent / len(errors),
    }  # fmt: skip


def cp_of_rank(sizes: tuple[int, ...], rank: int, count: int) -> dict[str, Any]:
    """Fit tensors of a rank by CP of that rank."""
    config = tna.Config(rank=rank, order=len(sizes), fold=sizes, groups=1)
    errors, spent = [], 0.0
    for seed in range(count):
        tensor = cp_tensor(sizes, rank, seed)
        begun = time.process_time()
        errors.append(tna.decompose(tensor, config)[1].error)
        spent += time.process_time() - begun
    return _row(np.array(errors), spent)


def noisy_trains(count: int, noise: float) -> dict[str, Any]:
    """Fit trains of rank 3 of 8 x 8 x 8 x 8 with noise."""
    config = tna.Config(rank=3, order=4, fold=(8, 8, 8, 8), groups=1, format="tt")
    return fitted(iter([tna.SuperLoRA(config, [(8, 512)])] * count), noise)


def structured(config: tna.Config, shape: tuple[int, int], count: int, noise: float) -> dict[str, Any]:
    return fitted(iter([tna.SuperLoRA(config, [shape])] * count), noise)


def matrices(config: tna.Config, kind: str, count: int) -> dict[str, Any]:
    """Fit matrices that no such network gives: random ones, or with a decaying spectrum and outlying columns."""
    errors, spent = [], 0.0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        delta = rng.normal(size=(24, 36))
        if kind == "decaying":
            u, _, v = np.linalg.svd(delta, full_matrices=False)
            delta = (u * np.arange(1, 25) ** -1.0) @ v * np.exp(0.7 * rng.normal(size=36))
        begun = time.process_time()
        errors.append(tna.decompose([delta], config)[1].error)
        spent += time.process_time() - begun
    return _row(np.array(errors), spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--only", default="", help="part of the name of the rows to run")
    given = parser.parse_args()
    rows: dict[str, Any] = {}

    def put(name: str, run: Any, *arguments: Any) -> None:
        if given.only in name:
            rows[name] = run(*arguments)
            print(name, json.dumps(rows[name]), flush=True)

    for noise in (0.0, 0.1):
        for fold in ("hypercube", "balanced"):
            for order in range(2, 6):
                for fmt in PADDED_FORMATS:
                    name = f"padded, {fmt}, order {order}, {fold}" + (f", noise {noise}" if noise else "")
                    plans = list(padded_plans(fmt, order, fold, given.cases)) if given.only in name else []
                    if plans:
                        put(name, fitted, iter(plans), noise)
    for sizes, rank in CP_CASES:
        put(f"CP of rank {rank}, {' x '.join(map(str, sizes))}", cp_of_rank, sizes, rank, given.cases)
    for noise in (0.1, 1.0):
        put(f"train, noise {noise}", noisy_trains, given.cases, noise)
    some = {
        "loha(2)": tna.presets.loha(2), "loha(4)": tna.presets.loha(4),
        "loha(2) of 3 parts": tna.presets.loha(2).replace(splits=3),
        "krona of 3 splits": tna.presets.krona(splits=3),
        "lokr(2), all factored": tna.presets.lokr(2, leading="same"),
        "lokr(2) of 2 terms": tna.presets.lokr(2, terms=2),
        "lokr(2) of 3 terms, all factored": tna.presets.lokr(2, leading="same", terms=3),
    }  # fmt: skip
    for name, config in some.items():
        put(f"{name}, exact", structured, config, (24, 36), given.cases // 4, 0.0)
        for kind in ("random", "decaying"):
            put(f"{name}, {kind}", matrices, config, kind, given.cases // 4)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
