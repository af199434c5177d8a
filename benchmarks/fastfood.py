"""The linear F against a copy of as many bytes: ``python benchmarks/fastfood.py [--smoke | --profile]``.

ρ is the ratio of the length of the compressed vector to that of the update. Two threads make the copy, half each, to
existing memory; for *copy to new memory* the system finds and zeroes that memory first, as for every result of F.

*state* covers the draws of F at its first call: the time is that of the first call minus that of a later one, plus the
bytes kept per element. *fallback* is F without compiled kernels, in NumPy and in torch, against the transform that is
commonly written in torch, which stacks sums and differences.

``--profile`` measures the passes of F on one thread, in processor time, and stores them in
``results/fastfood_profile.jsonl``. Each round measures everything once; a share is a median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from fwht import copy, numbers, optional
from profiles import store

import tnadapt as tna
from tnadapt.backends._kernels import kernels
from tnadapt.testing import _reference_maps as reference_maps

RATIOS = (0.01, 0.1, 0.5, 1.0)
ROUNDS = 9
#: The columns of the table of passes, and their headings.
COLUMNS = {"ρ": "ρ", "way": "direction", "case": "pass", "ms": "ms", "copies": "copies", "share": "share"}
#: The passes over memory of the compiled F, and what each of them does.
PASSES = {
    "begin": "the stages within blocks, of the input",
    "gather": "draws the permutation, gathers, multiplies by the gain, and does the stages within blocks",
    "scatter": "draws the permutation, multiplies by the gain, and adds to a table",
    "chunks_to_buckets": "multiplies by g and sorts chunks into runs, one for each bucket",
    "place": "puts the runs of each bucket in order, and does the stages within blocks",
    "unplace": "splits buckets into runs",
    "chunks_from_buckets": "puts the runs of each chunk in order, multiplies by g, and does the stages within blocks",
    "end": "the stages across blocks, and the signs",
}


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


# -- The passes of F -------------------------------------------------------------------------


def profile(smoke: bool = False) -> list[dict[str, Any]]:
    """Return, for both directions and each pass, milliseconds and copies of one thread, and the share of the pass."""
    size, rounds = (1 << 14, 1) if smoke else (1 << 24, ROUNDS)
    loops: Any = kernels("fastfood")
    if loops is None:
        return []
    there, y = numbers(size, "float32"), numbers(size, "float32")
    taken: dict[tuple[float, str, str], list[float]] = {}
    with mock.patch.object(loops, "thread_count", return_value=1), _timed_passes(loops) as passes:
        runs = {}
        for ratio in (0.01, 1.0):
            f = tna.Projection("linear", max(1, round(size * ratio)), size)
            runs[ratio, "forward"] = (f, numbers(f.n_in, "float32"))
            runs[ratio, "backward"] = (f.adjoint, y)
        for number in range(rounds + 1):
            for (ratio, way), (run, x) in runs.items():
                passes.clear()
                start = time.process_time()
                made = run(x)
                passes["whole"] = time.process_time() - start
                start = time.process_time()
                np.copyto(there, y)
                passes["a copy"] = time.process_time() - start
                del made
                for name, seconds in passes.items():
                    if number:  # the first round draws, too
                        taken.setdefault((ratio, way, name), []).append(seconds)
    rows = []
    for (ratio, way, name), seconds in taken.items():
        whole, copied = taken[ratio, way, "whole"], taken[ratio, way, "a copy"]
        row = {"case": name, "way": way, "size": size, "ρ": ratio, "ms": round(statistics.median(seconds) * 1e3, 2)}
        row["copies"] = round(statistics.median(s / c for s, c in zip(seconds, copied, strict=True)), 2)
        if name in PASSES:
            row["share"] = round(statistics.median(s / w for s, w in zip(seconds, whole, strict=True)), 3)
            row["what"] = PASSES[name]
        rows.append(row)
    return rows + _parts(loops, size, rounds)


@contextlib.contextmanager
def _timed_passes(loops: Any) -> Iterator[dict[str, float]]:
    """Add up the processor time of the calls of each pass."""
    passes: dict[str, float] = {}

    def timed(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            start = time.process_time()
            kernel(*arguments)
            passes[name] = passes.get(name, 0.0) + time.process_time() - start

        return run

    with mock.patch.multiple(loops, **{name: timed(name, getattr(loops, name)) for name in PASSES}):
        yield passes


def _parts(loops: Any, size: int, rounds: int) -> list[dict[str, Any]]:
    """Measure what is within passes on its own: drawing, gathering in a cache, and new pages."""
    keys = tna.algebra.rng.words(0, 0, 1, 0, 8)
    y, there, buckets = numbers(size, "float32"), numbers(size, "float32"), np.empty(size, np.uint8)
    bits = (size - 1).bit_length()
    drawn = max(1, size >> loops.CHUNK_BITS)
    parts: dict[str, Callable[[], object]] = {
        "a copy": lambda: np.copyto(there, y),
        "drawing the permutation, one byte of each image stored": lambda: loops.draw_buckets(
            0, drawn, keys, bits, buckets
        ),
        "writing to memory that is there": lambda: there.fill(0),
        "writing to new memory": lambda: np.empty_like(there).fill(0),
    }
    if size < 1 << loops.CHUNK_BITS:
        parts.pop("drawing the permutation, one byte of each image stored")
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, run in parts.items():
            start = time.process_time()
            run()
            taken[name] += [time.process_time() - start] if number else []
    copied = statistics.median(taken["a copy"])
    return [
        {
            "case": name,
            "way": "alone",
            "size": size,
            "ms": round(statistics.median(seconds) * 1e3, 2),
            "copies": round(statistics.median(seconds) / copied, 2),
        }
        for name, seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check the numbers")
    parser.add_argument("--profile", action="store_true", help="the passes of F on one thread, in processor time")
    given = parser.parse_args()
    if given.profile:
        rows = profile(given.smoke)
        for row in rows:
            share = f"{row['share']:.1%}" if "share" in row else ""
            measured = f"{row['ms']:>7.2f} ms {row['copies']:>6.2f} copies {share:>6}"
            print(f"{row['way']:9} ρ {row.get('ρ', '')!s:<5} {measured}  {row['case']}")
        if not given.smoke:
            store("fastfood_profile", rows, COLUMNS)
        return
    for row in measure(given.smoke):
        rest = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if "/" in key or "element" in key)
        print(f"{row['case']:30} {row['size']:>9} ρ {row['ρ']:<5} {row['ours'] * 1e3:>9.2f} ms   {rest}", flush=True)


if __name__ == "__main__":
    main()
