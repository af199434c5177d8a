"""Decompositions and tensor products against their peers: ``python benchmarks/decompositions.py [--smoke]``.

Contestants take turns in one process, in an order that moves on by one each round, for many short rounds. A ratio is
our least time over theirs, and *over the best* that to the fastest contestant of the case. Times are of the processor,
on one thread of BLAS and torch: neither another's threads nor other programs of the machine that take their turns are
in them, though what these do to the caches is. Where errors differ, only contestants count among the best whose error
is at most ours (up to 1 % of it and 1e-6) and which hold as much of the squared norm (up to 1 %). Peers: TensorLy,
SciPy, ``torch.kron``, ``numpy.kron``, einsum along an optimal path (of NumPy, and opt_einsum for torch), and quimb
(``pip install quimb``), without which the table says that it is not installed.

Writes ``results/decompositions.jsonl``, and the table of the documentation beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import machine
from timing import optional, threads

import tnadapt as tna
import tnadapt.tensors as tt
from tnadapt.algebra.rearrangement import rearranged
from tnadapt.backends import load_backend

__all__ = ["main", "measure", "table"]

RESULTS = Path(__file__).with_name("results") / "decompositions.jsonl"
#: Rounds of a case, at least and at most, and the seconds that decide between these.
ROUNDS, MOST_ROUNDS, CASE_SECONDS = 5, 200, 1.0
#: Seconds that the passes of one contestant take in a round, at least.
SECONDS = 0.002
OURS = "tnadapt"
NUMPY = load_backend("numpy")

Run = Callable[[], Any]
Row = dict[str, Any]


class Case(NamedTuple):
    """One line of the table: what is computed, by whom, and how wrong a result is."""

    kind: str
    name: str
    runs: dict[str, Run]
    error: Callable[[Any], float]


def measured(case: Case, smoke: bool) -> Row:
    """Return the least processor time of each contestant, their errors, and our ratios."""
    errors, repeats, once = {}, {}, 0.0
    for name, run in case.runs.items():
        errors[name] = case.error(run())
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        repeats[name] = 1 if smoke else max(1, int(SECONDS / seconds))
        once += seconds * repeats[name]
    rounds = 1 if smoke else max(ROUNDS, min(MOST_ROUNDS, int(CASE_SECONDS / once)))
    taken = dict.fromkeys(case.runs, float("inf"))
    order = list(case.runs)
    for turn in range(rounds):
        for place in range(len(order)):
            name = order[(turn + place) % len(order)]
            start = time.process_time()
            for _ in range(repeats[name]):
                case.runs[name]()
            taken[name] = min(taken[name], (time.process_time() - start) / repeats[name])
    ratios = {name: taken[OURS] / seconds for name, seconds in taken.items() if name != OURS}
    return {
        "kind": case.kind,
        "case": case.name,
        "seconds": taken,
        "errors": errors,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "over the best": round(over_the_best(ratios, errors), 3),
        "rounds": rounds,
    }


def over_the_best(ratios: Mapping[str, float], errors: Mapping[str, float]) -> float:
    """Return our ratio to the fastest contestant whose result is as good; 0 if there is none."""
    most = 1.01 * errors[OURS] + 1e-6
    # Of a random matrix a few triplets hold little, and what misses a tenth of that has nearly the same error.
    least = 0.99 * (1.0 - errors[OURS] ** 2)
    equal = [name for name in ratios if errors[name] <= most and 1.0 - errors[name] ** 2 >= least]
    return max((ratios[name] for name in equal), default=0.0)


def relative(tensor: np.ndarray, made: Any) -> float:
    """Return the relative Frobenius error."""
    return float(np.linalg.norm(tensor - np.asarray(made)) / np.linalg.norm(tensor))


# -- Truncated SVD ---------------------------------------------------------------------------------


def singular(size: int) -> Iterator[Case]:
    """Leading singular triplets of matrices whose values decay fast, slowly, and hardly."""
    import tensorly
    from scipy.sparse.linalg import svds

    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    noise = rng.normal(size=(size, size))
    thin = rng.normal(size=(size, 4)) @ rng.normal(size=(4, size))
    matrices = {
        "rank 4": thin,
        "rank 4 and noise": thin + 0.01 * noise,
        "values 1/k": (left / np.arange(1, size + 1)) @ right,
        "random": noise,
    }
    start = rng.normal(size=size)

    def formed(found: Any) -> np.ndarray:
        u, s, v = found
        return (np.asarray(u) * np.asarray(s)) @ np.asarray(v)

    for name, matrix in matrices.items():
        for kind in ("float32", "float64"):
            x, v0 = matrix.astype(kind), start.astype(kind)

            def ours(x: np.ndarray = x) -> Any:
                found = tt.cp(x, 4)
                return found.factors[0], found.weights, found.factors[1].T

            runs = {
                OURS: ours,
                "TensorLy, truncated_svd": lambda x=x: tensorly.tenalg.svd_interface(x, n_eigenvecs=4),
                "SciPy, svds": lambda x=x, v0=v0: svds(x, 4, v0=v0),
                **{
                    f"quimb, {method}": lambda x=x, split=split: split(x, 4)
                    for method, split in quimb_splits("svds", "rsvd").items()
                },
                "NumPy, svd": lambda x=x: [part[..., :4] if n < 2 else part[:4] for n, part in enumerate(_full(x))],
            }
            yield Case("truncated SVD", f"{size}², {name}, {kind}", runs, lambda f, x=x: relative(x, formed(f)))


def _full(x: np.ndarray) -> Any:
    return np.linalg.svd(x, full_matrices=False)


def quimb_splits(*methods: str) -> dict[str, Callable[[np.ndarray, int], Any]]:
    """Return quimb's truncated decompositions of a matrix by their names; none if quimb is not installed."""
    quimb = optional("quimb.tensor.decomp")
    if quimb is None:
        return {}

    def split(x: np.ndarray, rank: int, method: str) -> Any:
        return quimb.array_split(x, method=method, absorb=None, max_bond=rank, cutoff=0.0)

    return {method: functools.partial(split, method=method) for method in methods}


# -- Kronecker products ----------------------------------------------------------------------------


def nearest_kronecker(smoke: bool) -> Iterator[Case]:
    """Nearest Kronecker products of two and of three factors, of a random matrix and of one that is near a product."""
    import tensorly
    from scipy.sparse.linalg import svds
    from tensorly.decomposition import parafac, parafac_power_iteration

    rng = np.random.default_rng(0)
    two = [(8, 8), (8, 8)] if smoke else [(32, 32), (32, 32)]
    three = [(4, 4), (4, 4), (3, 3)] if smoke else [(8, 8), (8, 8), (12, 12)]
    for shapes in (two, three):
        factors = [rng.normal(size=shape) for shape in shapes]
        product = tt.kronecker(factors)
        noise = rng.normal(size=product.shape)
        for name, matrix in {"random": noise, "near": product + 0.1 * product.std() * noise}.items():
            x = matrix.astype("float32")

            def outer(found: Any, x: np.ndarray = x, shapes: Any = shapes) -> float:
                weights, vectors = found
                weights = np.ones(1) if weights is None else np.asarray(weights, np.float64).reshape(1)
                made = tna.cp_to_tensor((weights, [np.asarray(v, np.float64).reshape(-1, 1) for v in vectors]))
                return relative(rearranged(NUMPY, x, shapes), made)

            def ours(x: np.ndarray = x, shapes: Any = shapes) -> Any:
                found = tt.kronecker_decomposition(x, shapes)
                return found.weights, [np.reshape(factor, (-1, 1)) for factor in found.terms[0]]

            def turned(x: np.ndarray = x, shapes: Any = shapes) -> np.ndarray:
                return rearranged(NUMPY, x, shapes)

            runs: dict[str, Run] = {OURS: ours}
            if len(shapes) == 2:

                def with_svd(of: Callable[[np.ndarray], Any], turned: Any = turned) -> Run:
                    def run() -> Any:
                        u, s, v = of(turned())
                        return s, [u, np.asarray(v).T]

                    return run

                runs["TensorLy, truncated_svd"] = with_svd(lambda r: tensorly.tenalg.svd_interface(r, n_eigenvecs=1))
                runs["SciPy, svds"] = with_svd(lambda r: svds(r, 1, v0=np.ones(min(r.shape), r.dtype)))
                for method, split in quimb_splits("svds").items():
                    runs[f"quimb, {method}"] = with_svd(lambda r, split=split: split(r, 1))
            else:
                runs["TensorLy, parafac"] = lambda turned=turned: parafac(turned(), 1, n_iter_max=100, tol=1e-8)
                runs["TensorLy, power iteration"] = lambda turned=turned: parafac_power_iteration(turned(), 1)
            size = "x".join(map(str, x.shape))
            yield Case("nearest Kronecker product", f"{size}, {len(shapes)} factors, {name}", runs, outer)


def kronecker(smoke: bool) -> Iterator[Case]:
    """Kronecker products of two to four square matrices."""
    torch, quimb = optional("torch"), optional("quimb")
    two = ((2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (128, 8), (8, 128), (256, 4), (4, 256), (64, 16), (512, 2))
    more = ((2, 2, 2), (4, 4, 4), (8, 8, 8), (4, 4, 64), (64, 4, 4), (4, 4, 4, 4), (8, 8, 4, 4))
    for sizes in ((8, 8), (3, 2, 4)) if smoke else two + more:
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(size, size)).astype("float32") for size in sizes]
        expected = functools.reduce(np.kron, arrays)
        name = " and ".join(f"{size}²" for size in sizes)
        runs: dict[str, Run] = {
            OURS: lambda arrays=arrays: tna.kronecker(arrays),
            "numpy.kron": lambda arrays=arrays: functools.reduce(np.kron, arrays),
        }
        if quimb is not None:
            runs["quimb.kron"] = lambda arrays=arrays: quimb.kron(*arrays)
        yield Case("kronecker", f"{name}, NumPy", runs, lambda found, e=expected: relative(e, found))
        if torch is not None:
            tensors = [torch.from_numpy(array) for array in arrays]
            runs = {
                OURS: lambda tensors=tensors: tna.kronecker(tensors),
                "torch.kron": lambda tensors=tensors: functools.reduce(torch.kron, tensors),
            }
            yield Case("kronecker", f"{name}, torch", runs, lambda found, e=expected: relative(e, found))


# -- Products of factors ---------------------------------------------------------------------------


def products(smoke: bool) -> Iterator[Case]:
    """Tensors of CP, Tucker and tensor trains against the best path of einsum."""
    shapes = (
        (128, 128, 128), (32, 32, 32, 32), (16, 16, 16, 16, 16), (200, 50, 200), (10, 2000, 40), (40, 10, 2000),
        (100, 1000, 10),
    )  # fmt: skip
    rng, rank = np.random.default_rng(0), 8
    for shape in ((6, 5, 4), (3, 4, 2, 5)) if smoke else shapes:
        modes, order = "abcdefg"[: len(shape)], len(shape)
        letters = "zyxwvut"[:order]
        ranks = [1, *[rank] * (order - 1), 1]
        core = rng.normal(size=(min(rank, 4),) * order)
        factors = [rng.normal(size=(size, rank)) for size in shape]
        narrow = [factor[:, : min(rank, 4)] for factor in factors]
        cores = [rng.normal(size=(ranks[m], size, ranks[m + 1])) for m, size in enumerate(shape)]
        bonds = [
            f"{left}{m}{right}"
            for left, m, right in zip("1" + letters, modes, letters[: order - 1] + "2", strict=False)
        ]
        subscripts = {
            "cp_to_tensor": ",".join(f"{m}z" for m in modes),
            "tucker_to_tensor": ",".join(
                [letters, *(f"{m}{letter}" for m, letter in zip(modes, letters, strict=True))]
            ),
            "tt_to_tensor": ",".join(bonds).replace("1", "p").replace("2", "q"),
        }
        arrays = {
            "cp_to_tensor": (factors, lambda xs: tna.cp_to_tensor((None, xs))),
            "tucker_to_tensor": ([core, *narrow], lambda xs: tna.tucker_to_tensor((xs[0], xs[1:]))),
            "tt_to_tensor": (cores, tna.tt_to_tensor),
        }
        for kind, (parts, ours) in arrays.items():
            yield from _against_einsum(kind, shape, [p.astype("float32") for p in parts], subscripts[kind], modes, ours)


def _against_einsum(
    kind: str, shape: Sequence[int], parts: list[np.ndarray], subscripts: str, modes: str, ours: Callable[[Any], Any]
) -> Iterator[Case]:
    import opt_einsum

    torch, text = optional("torch"), f"{subscripts}->{modes}"
    path = np.einsum_path(text, *parts, optimize="optimal")[0]
    expected = np.einsum(text, *parts, optimize=path)
    expression = opt_einsum.contract_expression(text, *(part.shape for part in parts), optimize="optimal")
    name = "x".join(map(str, shape))
    quimb, inputs = optional("quimb.tensor"), [tuple(term) for term in subscripts.split(",")]

    def theirs(arrays: Sequence[Any]) -> dict[str, Run]:
        # quimb keeps the path that it finds in the first call.
        return {} if quimb is None else {"quimb": lambda: quimb.array_contract(arrays, inputs, tuple(modes))}

    peers = {
        "numpy.einsum, optimal path": lambda: np.einsum(text, *parts, optimize=path),
        "opt_einsum": lambda: expression(*parts),
        **theirs(parts),
    }
    yield Case(kind, f"{name}, NumPy", {OURS: lambda: ours(parts), **peers}, lambda found: relative(expected, found))
    if torch is not None:
        tensors = [torch.from_numpy(part) for part in parts]
        peers = {
            "torch.einsum": lambda: torch.einsum(text, *tensors),
            "opt_einsum": lambda: expression(*tensors, backend="torch"),
            **theirs(tensors),
        }
        runs = {OURS: lambda: ours(tensors), **peers}
        yield Case(kind, f"{name}, torch", runs, lambda found: relative(expected, found))


# -- CP, Tucker, tensor trains ---------------------------------------------------------------------


def decompositions(smoke: bool) -> Iterator[Case]:
    """CP, Tucker and tensor trains of a tensor that is near one, against TensorLy from its own start."""
    from tensorly.decomposition import parafac, tucker

    size, rank = (8, 2) if smoke else (50, 5)
    rng = np.random.default_rng(0)
    near = tt.random_cp((size, size, size), rank, random_state=0).to_tensor()
    x = (near + 0.1 * near.std() * rng.normal(size=near.shape)).astype("float32")
    name = f"{size}³, rank {rank}"

    def of(make: Callable[[Any], Any]) -> Callable[[Any], float]:
        return lambda found: relative(x, make(found))

    settings: Mapping[str, Any] = {"n_iter_max": 200, "tol": 1e-8}
    runs: dict[str, Run] = {OURS: lambda: tt.cp(x, rank), "TensorLy": lambda: parafac(x, rank, **settings)}
    yield Case("CP", name, runs, of(tna.cp_to_tensor))
    ranks = [rank] * 3
    runs = {OURS: lambda: tt.tucker(x, ranks), "TensorLy": lambda: tucker(x, ranks, **settings)}
    yield Case("Tucker", name, runs, of(tna.tucker_to_tensor))
    yield from trains(x, rank)


def trains(x: np.ndarray, rank: int) -> Iterator[Case]:
    """Tensor trains by ranks and by error, and the rounding of a sum, against TensorLy and quimb."""
    from tensorly.decomposition import tensor_train

    quimb, name = optional("quimb.tensor"), f"{len(x)}³, rank {rank}"

    def error(found: Any) -> float:
        dense = hasattr(found, "to_dense")
        return relative(x, found.to_dense().reshape(x.shape) if dense else tna.tt_to_tensor(list(found)))

    bonds, at_most = [1, rank, rank, 1], 0.11
    ours = tt.tensor_train(x, (rank, rank))
    twice = ours + ours
    runs: dict[str, Run] = {
        OURS: lambda: tt.tensor_train(x, (rank, rank)),
        "TensorLy": lambda: tensor_train(x, bonds),
    }
    bounded: dict[str, Run] = {OURS: lambda: tt.tensor_train(x, max_error=at_most)}
    rounded: dict[str, Run] = {OURS: lambda: 0.5 * twice.round((rank, rank)).to_tensor()}
    if quimb is not None:
        made = quimb.MatrixProductState.from_dense
        runs["quimb"] = lambda: made(x, x.shape, max_bond=rank, cutoff=0.0)
        # Each of the two truncations may take half of the squared error.
        bounded["quimb"] = lambda: made(x, x.shape, cutoff=at_most**2 / 2, cutoff_mode="rsum2", renorm=0)
        theirs = made(x, x.shape, max_bond=rank, cutoff=0.0)
        sums = theirs + theirs

        def compressed() -> Any:
            found = sums.copy()
            found.compress(max_bond=rank, cutoff=0.0)
            return 0.5 * found.to_dense().reshape(x.shape)

        rounded["quimb"] = compressed
    yield Case("tensor train", name, runs, error)
    yield Case("tensor train", f"{len(x)}³, error at most {at_most}", bounded, error)
    yield Case("rounding of a train", f"{name} of 2 · {rank}", rounded, lambda found: relative(x, found))


def contractions(smoke: bool) -> Iterator[Case]:
    """Networks that are no format: a ring of tensors, and a lattice without open legs."""
    import opt_einsum

    quimb, rng = optional("quimb.tensor"), np.random.default_rng(0)
    size, bond = (3, 2) if smoke else (24, 8)
    networks = {
        f"ring of 4 tensors {bond}x{size}x{bond}": ("aib,bjc,ckd,dla->ijkl", {**dict.fromkeys("ijkl", size)}),
        f"lattice of 3 by 3 tensors, bonds of {bond}": ("ab,acd,ce,bfg,dfhi,ejh,gk,ikl,jl->", {}),
    }
    for name, (text, sizes) in networks.items():
        inputs, output = text.split("->")
        terms = [tuple(term) for term in inputs.split(",")]
        # Positive, so that a sum of all does not cancel.
        arrays = [rng.random([sizes.get(i, bond) for i in term]).astype("float32") for term in terms]
        expression = opt_einsum.contract_expression(text, *(array.shape for array in arrays), optimize="optimal")
        expected = expression(*arrays)
        runs: dict[str, Run] = {
            OURS: lambda text=text, arrays=arrays: tt.contract(text, *arrays),
            "opt_einsum, path known": lambda arrays=arrays, expression=expression: expression(*arrays),
        }
        if quimb is not None:
            runs["quimb, path kept"] = lambda a=arrays, t=terms, o=tuple(output): quimb.array_contract(a, t, o)
        yield Case("contract", name, runs, lambda found, e=expected: relative(e, found))


def measure(smoke: bool = False) -> Iterator[Row]:
    """Yield one row per case."""
    with warnings.catch_warnings(), threads(1):
        warnings.simplefilter("ignore")  # of peers
        for cases in (
            singular(128 if smoke else 1024), nearest_kronecker(smoke), decompositions(smoke), kronecker(smoke),
            products(smoke), contractions(smoke),
        ):  # fmt: skip
            for case in cases:
                row = measured(case, smoke)
                worst = max(row["errors"].values()) if case.kind in ("kronecker", "contract", *_PRODUCTS) else 0.0
                if not worst <= 1e-5:
                    raise AssertionError(f"{case.kind}, {case.name}: the contestants disagree: {row['errors']}")
                yield row


_PRODUCTS = ("cp_to_tensor", "tucker_to_tensor", "tt_to_tensor")


def table(rows: Sequence[Row]) -> str:
    """Return the documentation's table: our time over each contestant's."""
    about, *rows = rows
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 18 30 12 12 28", ""]
    lines += ["   * - Function", "     - Case", "     - ms", "     - Over the best", "     - Over each"]
    for row in rows:
        each = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        best = f"{row['over the best']:.2f}"
        lines += [f"   * - {row['kind']}", f"     - {row['case']}", f"     - {1e3 * row['seconds'][OURS]:.3g}"]
        lines += [f"     - {best}", f"     - {each}"]
    how = about["machine"]
    kept = ("processor", "cores", "numpy", "torch", "tensorly", "scipy", "opt-einsum", "quimb", "date")
    said = ", ".join(f"{name} {how.get(name, 'not installed')}" for name in kept)
    return "\n".join([*lines, "", f"({said})", ""])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, once: only check that contestants agree")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: list[Row] = [{"machine": machine()}]
    for row in measure(given.smoke):
        rows.append(row)
        print(f"{row['kind']}, {row['case']}: {row['over the best']} {row['ratios']}", flush=True)
    if not given.smoke:
        given.results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given.results.with_suffix(".rst").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
