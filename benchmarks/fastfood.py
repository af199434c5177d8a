"""The linear F against a copy of as many bytes: ``python benchmarks/fastfood.py [--smoke]``.

ρ is the ratio of the length of the compressed vector to that of the update. Two threads make the copy, half each, to
existing memory; for *copy to new memory* the system finds and zeroes that memory first, as for every result of F.

*state* covers the draws of F at its first call: the time is that of the first call minus that of a later one, plus the
bytes kept per element. *fallback* is F without compiled kernels, in NumPy and in torch, against the transform that is
commonly written in torch, which stacks sums and differences.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
from fwht import copy, numbers, optional

import tnadapt as tna
from tnadapt.backends._kernels import kernels
from tnadapt.testing import _reference_maps as reference_maps

RATIOS = (0.01, 0.1, 0.5, 1.0)
ROUNDS = 9


def alternated(contestants: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the median seconds of each, alternating in every round, and median ratios of ours to theirs."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number:  # the first round is a warm-up
                taken[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {name: statistics.median(times) for name, times in taken.items()}
    for name in contestants:
        if name != "ours":
            ratios = [ours / theirs for ours, theirs in zip(taken["ours"], taken[name], strict=True)]
            found[f"ours/{name}"] = statistics.median(ratios)
    return found


def close(found: Any, expected: Any) -> None:
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error < 1e-5, f"off by {error}"


def ways(size: int, ratio: float, smoke: bool) -> list[dict[str, Any]]:
    """Measure forward and backward, on NumPy arrays and on tensors; then the state."""
    n_in = max(1, round(size * ratio))
    f = tna.Projection("linear", n_in, size)
    x, y, there = numbers(n_in, "float32"), numbers(size, "float32"), numbers(size, "float32")
    runs: dict[str, Callable[[], Any]] = {"forward": lambda: f(x), "backward": lambda: f.adjoint(y)}
    torch = optional("torch")
    if torch is not None:
        leaf, grad = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)

        def both() -> None:
            torch.autograd.grad(f(leaf), leaf, grad)

        runs["forward and backward, torch"] = both
    if smoke:
        close(f(x), dense(f) @ x)
        close(f.adjoint(y), y @ dense(f))
        if torch is not None:
            close(torch.autograd.grad(f(leaf), leaf, grad)[0], y @ dense(f))
    rows = []
    for case, ours in runs.items():
        found = alternated(
            {
                "ours": ours,
                "copy": lambda: copy(there, y),
                "copy to new memory": lambda: copy(np.empty_like(y), y),
            },
            1 if smoke else ROUNDS,
        )
        rows.append({"case": case, "size": size, "ρ": ratio, **found})
    drawn = []
    for _ in range(1 if smoke else 3):
        f = tna.Projection("linear", n_in, size)
        start = time.perf_counter()
        f(x)
        drawn.append(time.perf_counter() - start - rows[0]["ours"])
    bytes_kept = sum(array.nbytes for array in f.map.draws.kept.values())
    rows.append(
        {
            "case": "state",
            "size": size,
            "ρ": ratio,
            "ours": statistics.median(drawn),
            "bytes an element": round(bytes_kept / f.padded, 3),
        }
    )
    return rows


def dense(f: tna.Projection) -> np.ndarray:
    return reference_maps.matrix("linear", f.n_in, f.n_out, f.seed, f.group)


def fallback(size: int, smoke: bool) -> list[dict[str, Any]]:
    """Measure F at ρ = 1 without compiled kernels."""
    torch = optional("torch")
    if torch is None:
        return []
    f = tna.Projection("linear", size, size)
    perm, g, signs = (torch.from_numpy(f.map.draws.make(name)) for name in ("perm", "g", "diagonal"))
    x = torch.from_numpy(numbers(size, "float32"))

    def butterflies(z: Any) -> Any:
        half = 1
        while half < size:
            z = z.reshape(-1, 2, half)
            z = torch.stack((z[:, 0] + z[:, 1], z[:, 0] - z[:, 1]), dim=1)
            half *= 2
        return z.reshape(size) / size**0.5

    def stacked() -> Any:
        return butterflies((g * butterflies(x))[perm]) * signs

    rows = []
    nothing = mock.patch.multiple
    with (
        nothing("tnadapt.backends._numpy", kernels=lambda name: None),
        nothing("tnadapt.backends._torch_kernels", kernels=lambda name: None),
    ):
        for library, given in (("NumPy", x.numpy()), ("torch", x)):
            close(f(given), stacked().numpy())
            contestants = {"ours": lambda given=given: f(given), "stacked butterflies": stacked}  # type: ignore[misc]
            found = alternated(contestants, 1 if smoke else 3)
            found["stacked butterflies/ours"] = 1 / found.pop("ours/stacked butterflies")
            rows.append({"case": f"fallback, {library}", "size": size, "ρ": 1.0, **found})
    return rows


def measure(smoke: bool = False) -> list[dict[str, Any]]:
    """Return one row per case: median seconds of ``ours`` and the others, and median ratios ``ours/other``."""
    if smoke and kernels("fastfood") is not None:
        # This size is too large for a dense matrix: compare with the reference implementation.
        f = tna.Projection("linear", 1 << 12, 1 << 14)
        x, y = numbers(f.n_in, "float32"), numbers(f.n_out, "float32")
        close(f(x), f(x.astype(np.float64)))
        close(f.adjoint(y), f.adjoint(y.astype(np.float64)))
    sizes = (1 << 10,) if smoke else (1 << 20, 1 << 24)
    rows = [row for size in sizes for ratio in RATIOS for row in ways(size, ratio, smoke)]
    return rows + fallback(1 << 10 if smoke else 1 << 24, smoke)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check the numbers")
    for row in measure(parser.parse_args().smoke):
        rest = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if "/" in key or "element" in key)
        print(f"{row['case']:30} {row['size']:>9} ρ {row['ρ']:<5} {row['ours'] * 1e3:>9.2f} ms   {rest}", flush=True)


if __name__ == "__main__":
    main()
