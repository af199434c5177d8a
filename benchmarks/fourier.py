"""The map dft2 by an FFT against the products with cosines and sines: ``python benchmarks/fourier.py [--smoke]``.

*forward* is F of a batch of matrices; *forward and backward* adds the gradient. *fourierft(1000), deltas* is a whole
pass: the updates of all weights from 1000 numbers each. *products* is the reference implementation: the same pass with
a backend that has no FFT. Contestants alternate in one process, on one thread and on two; JAX always has all threads.
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
from tnadapt.backends import load_backend
from tnadapt.backends.blas_threads import one_blas_thread

Row = dict[str, Any]

#: Weights, rows and columns: down to where an FFT no longer pays, a prime, and the weights of ViT-base.
SIZES = ((1, 32, 32), (24, 32, 32), (1, 64, 64), (1, 128, 128), (1, 256, 256), (1, 768, 768), (24, 768, 768),
         (1, 768, 3072), (1, 1021, 1021), (1, 2048, 2048))  # fmt: skip
SMOKE = ((2, 6, 8), (1, 7, 5))
WEIGHTS = (24, 768, 768)
ROUNDS = 7


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


def compared(library: str, case: str, sizes: tuple[int, int, int], run: Callable[[], Any], smoke: bool) -> Row:
    """Return a row of one pass with the FFT, and without it."""
    backend = load_backend(library)

    def products() -> Any:
        with mock.patch.object(type(backend), "dft2", return_value=None):
            return run()

    if smoke:
        close(run(), np.asarray(products()))
    head = {"case": case, "library": library, "weights": sizes[0], "rows": sizes[1], "columns": sizes[2]}
    return {**head, **alternated({"ours": run, "products": products}, 1 if smoke else ROUNDS)}


def of_a_map(library: str, sizes: tuple[int, int, int], smoke: bool) -> Iterator[Row]:
    """Measure F alone, and with its gradient in torch."""
    count, rows, cols = sizes
    backend, f = load_backend(library), tna.Projection.on_weights("dft2", [(rows, cols)] * count)
    x = backend.asarray(np.random.default_rng(0).standard_normal(f.n_in), "float32")
    yield compared(library, "forward", sizes, lambda: finished(f(x)), smoke)
    if library == "torch":
        torch, leaf = optional("torch"), x.clone().requires_grad_()
        yield compared(library, "forward and backward", sizes, lambda: torch.autograd.grad(f(leaf), leaf, x)[0], smoke)


def of_a_preset(library: str, sizes: tuple[int, int, int], smoke: bool) -> Row:
    """Measure all updates of FourierFT."""
    count, rows, cols = sizes
    plan = tna.SuperLoRA(tna.presets.fourierft(5 if smoke else 1000), [(rows, cols)] * count)
    backend, rng = load_backend(library), np.random.default_rng(0)
    params = {name: backend.asarray(rng.normal(size=shape), "float32") for name, shape in plan.param_shapes.items()}

    def run() -> Any:
        return [finished(delta) for delta in plan.deltas(params)][-1]

    return compared(library, "fourierft(1000), deltas", sizes, run, smoke)


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
            rows += [{"threads": number, **row} for row in found]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check the numbers")
    for row in measure(parser.parse_args().smoke):
        print(", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
