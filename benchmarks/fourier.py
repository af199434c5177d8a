"""The map dft2 by an FFT against the products with cosines and sines: ``python benchmarks/fourier.py [--smoke]``.

*forward* is F of a batch of matrices; *forward and backward* adds the gradient. *fourierft(1000), deltas* is a whole
pass: the updates of all weights from 1000 numbers each. *ours* chooses between *FFT* and *products*, the reference
implementation. Contestants alternate in one process, on one thread and on two; JAX always has all threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from fastfood import alternated, close
from fwht import optional

import tnadapt as tna
from tnadapt.algebra.maps import Dft2
from tnadapt.backends import load_backend
from tnadapt.backends.blas_threads import one_blas_thread

Row = dict[str, Any]
Run = Callable[[], Any]
Way = Callable[[Any, Any], Any]
Sizes = tuple[int, int, int]

#: Weights, rows and columns: from where an FFT does not pay, with primes, to long ones; and the weights of ViT-base.
SIZES = (
    *((1, size, size) for size in (16, 32, 61, 64, 97, 128, 256, 768, 1021, 2048)),
    (24, 32, 32), (1, 768, 3072), (24, 768, 768),
)  # fmt: skip
SMOKE = ((2, 32, 32), (1, 7, 5))
WEIGHTS = (24, 768, 768)
ROUNDS = 3


class Always(Dft2):
    """The map with an FFT for all sides."""

    _fft_is_faster = True


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Limit BLAS and torch to one thread, or let both have all that the process was started with."""
    torch = optional("torch")
    with ExitStack() as stack:
        if number == 1:
            stack.enter_context(one_blas_thread())
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(number)
        yield


def compared(case: str, sizes: Sizes, runs: dict[str, Run], smoke: bool) -> Row:
    """Return a row of one pass, computed in several ways."""
    if smoke:
        expected = np.asarray(runs["products"]())
        for run in runs.values():
            close(run(), expected)
    head = {"case": case, "weights": sizes[0], "rows": sizes[1], "columns": sizes[2]}
    return {**head, **alternated(runs, 1 if smoke else ROUNDS)}


def of_a_map(library: str, sizes: Sizes, smoke: bool) -> Iterator[Row]:
    """Measure F alone, and with its gradient in torch."""
    count, rows, cols = sizes
    backend, f = load_backend(library), Dft2(rows * cols, rows * cols, shape=(rows, cols))
    x = backend.asarray(np.random.default_rng(0).standard_normal((count, f.n_in)), "float32")
    # Short passes are repeated, so that reading the clock does not count.
    times = 1 if smoke else max(1, 10**5 // (count * f.n_in))

    def repeated(run: Run) -> Run:
        return lambda: [run() for _ in range(times)][-1]

    fft = Always(f.n_in, f.n_in, shape=f.shape)
    ways = {"ours": f.forward, "FFT": fft.forward, "products": f.forward_plain}

    def forward(way: Way) -> Run:
        return lambda: finished(way(backend, x))

    def both(way: Way) -> Run:
        torch, leaf = optional("torch"), x.clone().requires_grad_()
        return lambda: torch.autograd.grad(way(backend, leaf), leaf, x)[0]

    for case, of in {"forward": forward, **({"forward and backward": both} if library == "torch" else {})}.items():
        row = compared(case, sizes, {name: repeated(of(way)) for name, way in ways.items()}, smoke)
        yield {**row, **{name: row[name] / times for name in ways}}


def of_a_preset(library: str, sizes: Sizes, smoke: bool) -> Row:
    """Measure all updates of FourierFT."""
    count, rows, cols = sizes
    plan = tna.SuperLoRA(tna.presets.fourierft(5 if smoke else 1000), [(rows, cols)] * count)
    backend, rng = load_backend(library), np.random.default_rng(0)
    params = {name: backend.asarray(rng.normal(size=shape), "float32") for name, shape in plan.param_shapes.items()}

    def ours() -> Any:
        return [finished(delta) for delta in plan.deltas(params)][-1]

    def products() -> Any:
        with mock.patch.object(type(backend), "dft2", return_value=None):
            return ours()

    return compared("fourierft(1000), deltas", sizes, {"ours": ours, "products": products}, smoke)


def finished(x: Any) -> Any:
    """Return x when it is computed: JAX returns arrays before that."""
    return x.block_until_ready() if hasattr(x, "block_until_ready") else x


def measure(smoke: bool = False) -> list[Row]:
    """Return one row per number of threads, library, case and size."""
    rows: list[Row] = []
    for number in (1, 2):
        for library in ("numpy", "torch", "jax"):
            if optional(library) is None or (library, number) == ("jax", 1):
                continue
            with threads(number):
                found = [row for sizes in (SMOKE if smoke else SIZES) for row in of_a_map(library, sizes, smoke)]
                found.append(of_a_preset(library, SMOKE[0] if smoke else WEIGHTS, smoke))
            rows += [{"library": library, "threads": number, **row} for row in found]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check the numbers")
    for row in measure(parser.parse_args().smoke):
        print(", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
