"""The laws of the library's operations by themselves: draws, fwht, products and projections, without a config.

They are compared with known answers, with SciPy's Hadamard matrix and with TensorLy's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.maps.walsh_hadamard import fwht
from tnadapt.algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._law import Law, LawCollector, relative_error
from ._projection_laws import of_projection

__all__ = ["of_library"]

# (seed, group, purpose, first word), and the words from there.
KNOWN_WORDS = (
    ((0, 0, 1, 0), ("844515e1", "f08d6eaa", "0f19c053", "83f875f0", "ca7cf69e")),
    (((1 << 40) + 7, 3, 2, 6), ("63e2c124", "276e314f")),
)
# Name -> length, and the first 16 hex digits of SHA-256 of the bytes of seed 0, group 0.
KNOWN_DIGESTS = {
    "signs": (1000, "3557a0b7985e0a08"),
    "permutation": (1000, "2e6668c5a904a31a"),
    "normals": (100_000, "9ef7bb3d30e7e723"),
}


def of_library(backend: Backend, rng: np.random.Generator) -> list[Law]:
    """Check the laws of the operations by themselves: draws, fwht, products, projections.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> all(law.holds for law in of_library(load_backend("numpy"), np.random.default_rng(0)))
    True
    """
    collector = LawCollector("library", backend)
    _draw_laws(collector)
    _fwht_laws(collector, rng)
    _product_laws(collector, rng)
    for kind in ("shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2"):
        for n_in, n_out in ((1, 1), (7, 7), (37, 509), (64, 64), (40, 7)):
            if kind == "shuffle":
                n_in = n_out
            collector.found += of_projection("library", Projection(kind, n_in, n_out, seed=5), backend, rng)
    return collector.found


def _draw_laws(collector: LawCollector) -> None:
    wrong = 0
    for (seed, group, purpose, first), expected in KNOWN_WORDS:
        found = rng.words(seed, group, purpose, first, first + len(expected))
        wrong += [f"{word:08x}" for word in found.tolist()] != list(expected)
    made = {name: _drawn(name, 0, length) for name, (length, _) in KNOWN_DIGESTS.items()}
    wrong += sum(rng.digest(iter([array.tobytes()]))[:16] != KNOWN_DIGESTS[name][1] for name, array in made.items())
    for name, array in made.items():
        # A round trip through the library, whole or in pieces, preserves the bits.
        whole = collector.backend.to_numpy(collector.backend.constant(array, None))
        cut = len(array) // 3
        edges = ((0, cut), (cut, cut + 1), (cut + 1, len(array)))
        joined = np.concatenate([_drawn(name, start, stop) for start, stop in edges])
        wrong += not np.array_equal(whole, joined)
    collector.add("draws = the known answers, whole or in pieces", [float(wrong)], 0.0)


def _drawn(name: str, start: int, stop: int) -> np.ndarray:
    if name == "signs":
        return rng.signs(0, 0, start, stop).astype("<f4")
    if name == "permutation":
        return rng.permutation(KNOWN_DIGESTS[name][0], 0, 0, start, stop).astype("<i8")
    return rng.normals(0, 0, rng.PURPOSE["gaussian"], start, stop).astype("<f4")


def _fwht_laws(collector: LawCollector, rng: np.random.Generator) -> None:
    from scipy.linalg import hadamard

    backend = collector.backend
    twice, dense = [], []
    for bits in range(13):
        host = rng.normal(size=(2, 1 << bits))
        x = backend.asarray(host, "float64")
        twice.append(relative_error(backend.to_numpy(fwht(fwht(x))), host))
        dense.append(relative_error(backend.to_numpy(fwht(x, normalize=False)), host @ hadamard(1 << bits)))
    collector.add("fwht twice = the identity", twice)
    collector.add("fwht = SciPy's Hadamard matrix", dense)


def _product_laws(collector: LawCollector, rng: np.random.Generator) -> None:
    import tensorly

    backend, errors = collector.backend, list[float]()

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    def sent(arrays: Sequence[np.ndarray]) -> list[Array]:
        return [backend.asarray(array, "float64") for array in arrays]

    def compare(found: Array, expected: Any) -> None:
        errors.append(relative_error(backend.to_numpy(found), expected))

    # TensorLy's backend is a process-wide setting: set it for this thread only, and restore it.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        for order in range(1, 6):
            sizes = range(2, order + 2)
            weights, factors = draw(3), [draw(d, 3) for d in sizes]
            compare(cp_to_tensor((sent([weights])[0], sent(factors))), tensorly.cp_to_tensor((weights, factors)))
            core, factors = draw(*([2] * order)), [draw(d, 2) for d in sizes]
            compare(tucker_to_tensor((sent([core])[0], sent(factors))), tensorly.tucker_to_tensor((core, factors)))
            bonds = [1, *(2 + m % 2 for m in range(order - 1)), 1]
            cores = [draw(bonds[m], d, bonds[m + 1]) for m, d in enumerate(sizes)]
            compare(tt_to_tensor(sent(cores)), tensorly.tt_to_tensor(cores))
        matrices, x = [draw(2, 3), draw(4, 2), draw(3, 5)], draw(30)
        product = tensorly.tenalg.kronecker(matrices)
        compare(kronecker(sent(matrices)), product)
        compare(kron_matvec(sent(matrices), sent([x])[0]), product @ x)
    collector.add("products = TensorLy's", errors)
