"""``tnadapt.fwht`` against a copy of the same bytes and its peers: ``python benchmarks/fwht.py [--profile | --avx2]``.

Two threads make the copy, half each, with ``numpy.copyto``. Peers, skipped if not installed: FFHT, in C
(through PyPI's fht-cpu, one thread, with AVX), and PyPI's hadamard-transform (torch). *In place* and *into an array*
measure only the computation, not normalized, since FFHT does not normalize either; *a new array* is the public call,
for which the copy also goes to new memory, whose zeroing by the system is a good part of the time. A *batch* is rows of
that length, in place and on one thread.

Each round runs all contestants, each once untimed and then timed, so that each finds its arrays as it left
them; a ratio is the median over the rounds of the ratio within one. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.algebra.maps.walsh_hadamard import fwht_plain
from tnadapt.backends import load_backend
from tnadapt.backends._kernels import kernels

Contestants = dict[str, Callable[[], object]]

POOL = ThreadPoolExecutor(1)
SECONDS = 0.6  # for each contestant of a case
ROUNDS = 5  # at least


def copy(to: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Copy with two threads."""
    half = len(of) // 2
    other = POOL.submit(np.copyto, to[:half], of[:half])
    np.copyto(to[half:], of[half:])
    other.result()
    return to


def optional(name: str) -> Any:
    """Return a peer's module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def timed(contestants: Contestants, reset: Callable[[], object], smoke: bool) -> dict[str, Any]:
    """Return the median seconds of each, and median ratios of ours to theirs."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    repeats = {}
    for name, run in contestants.items():
        reset()
        run()
        start = time.perf_counter()
        run()
        repeats[name] = 1 if smoke else max(1, int(0.002 / (time.perf_counter() - start)))
    begun = time.perf_counter()
    while True:
        for name, run in contestants.items():
            reset()
            run()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            taken[name].append((time.perf_counter() - start) / repeats[name])
        rounds = len(taken[name])
        if smoke or (rounds >= ROUNDS and time.perf_counter() - begun > SECONDS * len(contestants)):
            break
    found: dict[str, Any] = {name: statistics.median(times) for name, times in taken.items()}
    for name in contestants:
        if name != "ours":
            ratios = [ours / theirs for ours, theirs in zip(taken["ours"], taken[name], strict=True)]
            found[f"ours/{name}"] = statistics.median(ratios)
    return found


def close(found: Any, expected: Any, dtype: str) -> None:
    error = np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    assert error < {"float32": 1e-5, "float64": 1e-13}[dtype], f"off by {error}"


def numbers(size: int, dtype: str) -> np.ndarray:
    """Return normal numbers, aligned for the kernels."""
    compiled = kernels("memory")
    found: np.ndarray = np.empty(size, dtype) if compiled is None else compiled.aligned_empty((size,), np.dtype(dtype))
    found[...] = np.random.default_rng(0).standard_normal(size, dtype=np.dtype(dtype).type)
    return found


def in_memory_that_is_there(bits: int, dtype: str, smoke: bool) -> list[dict[str, Any]]:
    """Compare in place with FFHT in place, and from one array into another with a copy."""
    compiled, ffht = kernels("walsh"), optional("fht_cpu._core")
    if compiled is None:
        return []
    x, y = numbers(1 << bits, dtype), numbers(1 << bits, dtype)
    kept = x.copy()
    ours: Contestants = {"ours": lambda: compiled.transform_into(x, x, 1.0), "copy": lambda: copy(y, kept)}
    if ffht is not None:
        peer = ffht.fht_1d_f32 if dtype == "float32" else ffht.fht_1d_f64
        ours["FFHT"] = lambda: peer(x)
    head = {"size": 1 << bits, "dtype": dtype, "instructions": instructions()}
    if smoke:
        compiled.transform_into(x, x, 1.0)
        close(x, plain(kept), dtype)
        if ffht is not None:
            x[...] = kept
            peer(x)
            close(x, plain(kept), dtype)
    rows = [{"case": "in place", **head, **timed(ours, lambda: copy(x, kept), smoke)}]
    into: Contestants = {"ours": lambda: compiled.transform_into(kept, y, 1.0), "copy": lambda: copy(x, kept)}
    return [*rows, {"case": "into an array", **head, **timed(into, lambda: None, smoke)}]


def in_rows(row_bits: int, bits: int, dtype: str, smoke: bool) -> list[dict[str, Any]]:
    """Compare a batch of rows with FFHT's, in place and on one thread."""
    compiled, ffht = kernels("walsh"), optional("fht_cpu._core")
    if compiled is None or ffht is None:
        return []
    peer = ffht.fht_2d_f32_rows if dtype == "float32" else ffht.fht_2d_f64_rows
    x, y = (numbers(1 << bits, dtype).reshape(-1, 1 << row_bits) for _ in range(2))
    kept = x.copy()

    def reset() -> None:
        x[...] = y[...] = kept

    compiled.transform_into(x, x, 1.0)
    peer(y, 1)
    close(x, y, dtype)
    ours: Contestants = {"ours": lambda: compiled.transform_into(x, x, 1.0), "FFHT": lambda: peer(y, 1)}
    found = timed(ours, reset, smoke)
    head = {"case": f"a batch of 2^{row_bits}", "size": 1 << bits, "dtype": dtype, "instructions": instructions()}
    return [{**head, **found}]


def instructions() -> str:
    """Return the name of the vector instructions that the kernels are compiled for."""
    return {64: "AVX-512", 32: "AVX2"}[kernels("simd").VECTOR_BYTES]


def cases(smoke: bool) -> list[tuple[int, str]]:
    """Return the sizes, as powers of two, and dtypes of the comparisons with FFHT."""
    return [(bits, dtype) for dtype in ("float32", "float64") for bits in ((6, 10) if smoke else range(10, 27, 2))]


def plain(x: np.ndarray) -> np.ndarray:
    return np.asarray(fwht_plain(load_backend("numpy"), x, normalize=False))


def in_a_new_array(bits: int, dtype: str, smoke: bool) -> list[dict[str, Any]]:
    """Compare the public call on NumPy and torch arrays, reference implementations, peers and a copy, to new memory."""
    x = numbers(1 << bits, dtype)
    ffht, torch, peer = optional("fht_cpu"), optional("torch"), optional("hadamard_transform")
    there = np.empty_like(x)
    others: Contestants = {
        "copy": lambda: copy(np.empty_like(x), x),
        "copy to memory that is there": lambda: copy(there, x),
    }
    if ffht is not None:
        others["FFHT"] = lambda: ffht.fht(x, inplace=False)
    rows = []
    ways: dict[str, Callable[[], Any]] = {
        "NumPy": lambda: tna.fwht(x, normalize=False),
        "NumPy, plain": lambda: plain(x),
    }
    if torch is not None:
        t = torch.from_numpy(x)
        ways["torch"] = lambda: tna.fwht(t, normalize=False)
        ways["torch, plain"] = lambda: fwht_plain(load_backend("torch"), t, False)
        if peer is not None and bits <= 20:
            others["hadamard-transform"] = lambda: peer.hadamard_transform(t)
    for name, ours in ways.items():
        if smoke:
            close(ours(), plain(x), dtype)
        found = timed({"ours": ours, **others}, lambda: None, smoke)
        rows.append({"case": f"a new array, {name}", "size": 1 << bits, "dtype": dtype, **found})
    return rows


def along_axes(bits: int, smoke: bool) -> list[dict[str, Any]]:
    """Compare batches and other axes with one transform of as many numbers; all in place."""
    compiled = kernels("walsh")
    if compiled is None:
        return []
    rows, half = [], bits // 2
    shapes = {
        "rows of 64": ((1 << bits - 6, 64), 1),
        f"rows of 2^{half}": ((1 << bits - half, 1 << half), 1),
        f"columns of 2^{half}": ((1 << half, 1 << bits - half), 0),
        "columns, 3 of them": (((1 << bits) // 4, 3), 0),
        "columns, 24 of them": (((1 << bits) // 32, 24), 0),
        "an axis between, 5 after it": ((4, (1 << bits) // 32, 5), 1),
    }
    for name, (shape, axis) in shapes.items():
        x = numbers(int(np.prod(shape)), "float32").reshape(shape)
        whole, kept = numbers(1 << bits, "float32"), x.copy()
        if smoke:
            compiled.transform_into(x, x, 1.0, axis)
            close(np.moveaxis(x, axis, -1), plain(np.ascontiguousarray(np.moveaxis(kept, axis, -1))), "float32")
        runs: Contestants = {
            "ours": lambda x=x, axis=axis: compiled.transform_into(x, x, x.shape[axis] ** -0.5, axis),  # type: ignore[misc]
            "one of as many": lambda whole=whole: compiled.transform_into(whole, whole, len(whole) ** -0.5),  # type: ignore[misc]
        }
        found = timed(runs, lambda: None, smoke)
        # Correct for the slightly different number of elements.
        found["ours/one of as many"] *= whole.size / x.size
        rows.append({"case": name, "size": x.size, "dtype": "float32", **found})
    return rows


def double(bits: int, smoke: bool) -> list[dict[str, Any]]:
    """Compare float64 with float32, in place."""
    compiled = kernels("walsh")
    if compiled is None:
        return []
    x, y, scale = numbers(1 << bits, "float64"), numbers(1 << bits, "float32"), 2.0 ** (-bits / 2)
    runs: Contestants = {
        "ours": lambda: compiled.transform_into(x, x, scale),
        "float32": lambda: compiled.transform_into(y, y, scale),
    }
    return [{"case": "in place", "size": 1 << bits, "dtype": "float64", **timed(runs, lambda: None, smoke)}]


def measure(smoke: bool = False) -> list[dict[str, Any]]:
    """Return one row per case: median seconds of ``ours`` and the others, and median ratios ``ours/other``."""
    rows: list[dict[str, Any]] = []
    for bits, dtype in cases(smoke):
        rows += in_memory_that_is_there(bits, dtype, smoke)
    for row_bits, bits in ((6, 10),) if smoke else ((10, 12), (10, 16), (10, 22), (14, 22)):
        rows += [row for dtype in ("float32", "float64") for row in in_rows(row_bits, bits, dtype, smoke)]
    for bits in (6, 10) if smoke else (10, 16, 20, 24):
        rows += in_a_new_array(bits, "float32", smoke)
    rows += along_axes(12 if smoke else 22, smoke)
    if not smoke:
        rows += along_axes(24, smoke)
    for bits in (10,) if smoke else (10, 16, 20, 24):
        rows += double(bits, smoke)
    return [*rows, *profile(smoke), *with_avx2(smoke)]


def profile(smoke: bool) -> list[dict[str, Any]]:
    """Return the rows of where the time goes: each call on a small vector, and each pass over a large one."""
    from fwht_profile import call, passes

    kinds = ("float32", "float64")
    rows = [row for dtype in kinds for row in call(10, dtype, smoke)]
    sizes = (10,) if smoke else (16, 20, 24, 26)
    return [*rows, *(row for dtype in kinds for bits in sizes for row in passes(bits, dtype, smoke))]


def with_avx2(smoke: bool) -> list[dict[str, Any]]:
    """Return the rows of the transform in place with AVX2 only, if there is more."""
    import fwht_profile

    return fwht_profile.with_avx2(smoke)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check the numbers")
    parser.add_argument("--profile", action="store_true", help="only the share of the call and of each pass")
    parser.add_argument("--avx2", action="store_true", help="only the transform in place, compiled without AVX-512")
    given = parser.parse_args()
    part = profile if given.profile else with_avx2 if given.avx2 else measure
    for row in part(given.smoke):
        ratios = ", ".join(f"{key} {value:.2f}" for key, value in row.items() if "/" in key)
        ratios += "".join(f", {key} {1e6 * row[key]:.2f} us" for key in row if key == "kernel" or " - " in key)
        print(
            f"{row['case']:28} {row['size']:>10} {row['dtype']}  {row['ours'] * 1e6:>10.2f} us   {ratios}", flush=True
        )


if __name__ == "__main__":
    main()
