"""Decompositions against their peers: ``python benchmarks/decompositions.py [--smoke | --difficult]``.

Contestants take turns in one process, in an order that moves on by one each round, for many short rounds. A ratio is
our least time over theirs, and *over the best* that to the fastest contestant of the case. Times are of the processor,
on one thread of BLAS and torch: neither another's threads nor other programs of the machine that take their turns are
in them, though what these do to the caches is. Where errors differ, only contestants count among the best whose error
is at most ours (up to 1 % of it and 1e-6) and which hold as much of the squared norm (up to 1 %). Where the request is
an error, they also need no more parameters (up to 1 %), and the table says how many times as many the others need.
Peers: TensorLy, SciPy, NumPy, and where they are installed quimb and teneva (the extra ``benchmarks``).

Writes ``results/decompositions.jsonl``, and the table of the documentation beside it. ``--difficult`` says instead how
often ``cp`` finds the answer of tensors on which it is hard to find, and writes ``results/difficult_cp.json``, and its
table.
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
from formatting import list_table
from machine import machine
from timing import optional, threads

import tnadapt as tna
import tnadapt.tensors as tt
from tnadapt.algebra.products import rearranged
from tnadapt.backends import load_backend

RESULTS = Path(__file__).with_name("results") / "decompositions.jsonl"
DIFFICULT = RESULTS.with_name("difficult_cp.json")
#: Rounds of a case, at least and at most, and the seconds that decide between these.
ROUNDS, MOST_ROUNDS, CASE_SECONDS = 5, 200, 1.0
#: Seconds of a round from which two are enough.
LONG = 10.0
#: Seconds that the passes of one contestant take in a round, at least.
SECONDS = 0.002
OURS = "tnadapt"
NUMPY = load_backend("numpy")

Run = Callable[[], Any]
Row = dict[str, Any]


class Case(NamedTuple):
    """One line of the table: what is computed, by whom, and how wrong, and for an error how large, a result is."""

    kind: str
    name: str
    runs: dict[str, Run]
    error: Callable[[Any], float]
    parameters: Callable[[Any], int] | None = None


def measured(case: Case, smoke: bool) -> Row:
    """Return the least processor time of each contestant, their errors, and our ratios."""
    errors, sizes, repeats, once = dict[str, float](), dict[str, int](), dict[str, int](), 0.0
    for name, run in case.runs.items():
        errors[name] = case.error(result := run())
        if case.parameters is not None:
            sizes[name] = case.parameters(result)
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        repeats[name] = 1 if smoke else max(1, int(SECONDS / seconds))
        once += seconds * repeats[name]
    rounds = 1 if smoke else max(ROUNDS if once < LONG else 2, min(MOST_ROUNDS, int(CASE_SECONDS / once)))
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
        **({"parameters": sizes} if sizes else {}),
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "over the best": round(over_the_best(ratios, errors, sizes), 3),
        "rounds": rounds,
    }


def over_the_best(ratios: Mapping[str, float], errors: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Return our ratio to the fastest contestant whose result is as good, and as small if sizes count; 0 if none is."""
    most = 1.01 * errors[OURS] + 1e-6
    # Of a random matrix a few triplets hold little, and what misses a tenth of that has nearly the same error.
    least = 0.99 * (1.0 - errors[OURS] ** 2)
    equal = [name for name in ratios if errors[name] <= most and 1.0 - errors[name] ** 2 >= least]
    equal = [name for name in equal if not sizes or sizes[name] <= 1.01 * sizes[OURS]]
    return max((ratios[name] for name in equal), default=0.0)


def parameters(cores: Any) -> int:
    """Return the number of elements of cores, or of the tensors of a network of quimb."""
    return sum(int(getattr(core, "size", 0)) for core in getattr(cores, "tensors", cores))


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

    def leading(u: np.ndarray, s: np.ndarray, v: np.ndarray) -> Any:
        return u[:, :4], s[:4], v[:4]

    def formed(found: Any) -> np.ndarray:
        u, s, v = found
        return (np.asarray(u) * np.asarray(s)) @ np.asarray(v)

    for name, matrix in matrices.items():
        for kind in ("float32", "float64"):
            x, v0 = matrix.astype(kind), start.astype(kind)

            def ours(x: np.ndarray = x) -> Any:
                found = tt.cp(x, 4)
                return found.factors[0], found.weights, found.factors[1].T

            runs: dict[str, Run] = {
                OURS: ours,
                "TensorLy, truncated_svd": lambda x=x: tensorly.tenalg.svd_interface(x, n_eigenvecs=4),
                "SciPy, svds": lambda x=x, v0=v0: svds(x, 4, v0=v0),
            }
            for method, split in quimb_splits("svds", "rsvd").items():
                runs[f"quimb, {method}"] = lambda x=x, split=split: split(x, 4)
            runs["NumPy, svd"] = lambda x=x: leading(*np.linalg.svd(x, full_matrices=False))
            yield Case("truncated SVD", f"{size}², {name}, {kind}", runs, lambda f, x=x: relative(x, formed(f)))


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
    yield from rings(x, rank)
    yield from others(near, rank)


def rings(x: np.ndarray, rank: int) -> Iterator[Case]:
    """Tensor rings: of given ranks, and of a picture within an error, against TensorLy at the ranks that we find."""
    from tensorly.decomposition import tensor_ring

    def error(x: np.ndarray) -> Callable[[Any], float]:
        return lambda cores: relative(x, tt.TRTensor(list(cores)).to_tensor())

    bonds = [2, 3, rank, 2]
    runs: dict[str, Run] = {
        OURS: lambda: tt.tensor_ring(x, bonds[:3], max_iterations=0),
        "TensorLy": lambda: tensor_ring(x, bonds),
    }
    yield Case("TR-SVD", f"{len(x)}³, ranks 2, 3, {rank}", runs, error(x))
    size, at_most = (16, 0.3) if len(x) < 20 else (256, 0.1)
    rows, cols = np.meshgrid(*[np.linspace(0.0, 1.0, size)] * 2, indexing="ij")
    waves = [np.sin(40.0 * rows * cols + k) + (rows > cols + 0.2 * k - 0.3) for k in range(3)]
    picture = np.stack(waves, axis=-1)
    ring = tt.tensor_ring(picture, max_error=at_most)
    runs = {OURS: lambda: tt.tensor_ring(picture, max_error=at_most)}
    if ring.rank[0] * ring.rank[1] <= size:
        runs["TensorLy, at these ranks"] = lambda: tensor_ring(picture, list(ring.rank))
    yield Case(
        "tensor ring", f"picture of {size} × {size} × 3, error at most {at_most}", runs, error(picture), parameters
    )


def others(near: np.ndarray, rank: int) -> Iterator[Case]:
    """Nonnegative CP and PARAFAC2, against TensorLy."""
    from tensorly.decomposition import non_negative_parafac_hals, parafac2
    from tensorly.random import random_parafac2

    rng, settings = np.random.default_rng(0), {"n_iter_max": 200, "tol": 1e-8}
    counts = abs(near) + 0.1 * near.std() * rng.random(near.shape)
    runs: dict[str, Run] = {
        OURS: lambda: tt.cp(counts, rank, nonnegative=True),
        "TensorLy, HALS": lambda: non_negative_parafac_hals(counts, rank, init="svd", **settings),
    }
    name = f"{len(near)}³, rank {rank}"
    yield Case("nonnegative CP", name, runs, lambda found: relative(counts, tna.cp_to_tensor(found)))
    size = len(near)
    planted = random_parafac2([(size + number, size) for number in range(8)], rank, random_state=0, full=True)
    slices = [slice_ + 0.1 * slice_.std() * rng.normal(size=slice_.shape) for slice_ in map(np.asarray, planted)]
    runs = {
        OURS: lambda: tt.parafac2(slices, rank),
        "TensorLy": lambda: parafac2(slices, rank, random_state=0, normalize_factors=False, **settings),
    }

    def error(result: Any) -> float:
        weights, factors, projections = result
        weights = np.ones(rank) if weights is None else weights
        pairs = zip(projections, factors[0], strict=True)
        matrices = [(p @ factors[1] * (weights * a)) @ factors[2].T for p, a in pairs]
        return relative(np.concatenate(slices), np.concatenate(matrices))

    yield Case("PARAFAC2", f"8 slices of {size} to {size + 7} × {size}, rank {rank}", runs, error)


def sizes(smoke: bool) -> Iterator[Case]:
    """The cost against the size, in float32: ten sweeps of CP and Tucker, and TT-SVD, against TensorLy.

    The largest without peers, which take minutes.
    """
    from tensorly.decomposition import parafac, tensor_train, tucker

    rank, ten = 5, {"n_iter_max": 10, "tol": 0.0}
    for size in (8,) if smoke else (100, 200, 500):
        rng = np.random.default_rng(size)
        x = np.asarray(tt.random_cp((size,) * 3, rank, random_state=0, dtype="float32").to_tensor())
        x = x + 0.1 * x.std() * rng.standard_normal(x.shape, np.float32)
        contestants: dict[str, tuple[Run, Run, Callable[[Any], Any]]] = {
            "CP, 10 sweeps": (
                lambda x=x: tt.cp(x, rank, max_iterations=10, tol=0.0), lambda x=x: parafac(x, rank, **ten),
                tna.cp_to_tensor,
            ),
            "Tucker, 10 sweeps": (
                lambda x=x: tt.tucker(x, rank, max_iterations=10, tol=0.0), lambda x=x: tucker(x, [rank] * 3, **ten),
                tna.tucker_to_tensor,
            ),
            "tensor train": (
                lambda x=x: tt.tensor_train(x, rank), lambda x=x: tensor_train(x, [1, rank, rank, 1]),
                lambda cores: tna.tt_to_tensor(list(cores)),
            ),
        }  # fmt: skip
        for kind, (ours, theirs, formed) in contestants.items():
            runs = {OURS: ours} if size > 200 else {OURS: ours, "TensorLy": theirs}
            yield Case(kind, f"{size}³, rank {rank}", runs, lambda f, x=x, formed=formed: relative(x, formed(f)))


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
        most = max(tt.tensor_train(x, max_error=at_most).rank)
        bounded["quimb, at these ranks"] = lambda: made(x, x.shape, max_bond=most, cutoff=0.0)
        theirs = made(x, x.shape, max_bond=rank, cutoff=0.0)
        sums = theirs + theirs

        def compressed() -> Any:
            found = sums.copy()
            found.compress(max_bond=rank, cutoff=0.0)
            return 0.5 * found.to_dense().reshape(x.shape)

        rounded["quimb"] = compressed
    yield Case("tensor train", name, runs, error)
    yield Case("tensor train", f"{len(x)}³, error at most {at_most}", bounded, error, parameters)
    yield Case("rounding of a train", f"{name} of 2 · {rank}", rounded, lambda found: relative(x, found))


# -- Cross approximation ---------------------------------------------------------------------------


def crosses(smoke: bool) -> Iterator[Case]:
    """Trains of functions: of a tensor at given ranks against TensorLy, and by an error against teneva."""
    from tensorly.contrib.decomposition import tensor_train_cross

    def ratio(indices: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + indices.sum(axis=1))

    size, rank = (6, 3) if smoke else (20, 6)
    x = ratio(np.indices((size,) * 5).reshape(5, -1).T).reshape((size,) * 5)
    bonds = [1, *[rank] * 4, 1]
    runs: dict[str, Run] = {
        OURS: lambda: tt.tt_cross(lambda i: x[tuple(i.T)], x.shape, rank=rank),
        "TensorLy": lambda: tensor_train_cross(x, bonds, tol=1e-8, random_state=0),
    }
    title = "cross approximation"
    yield Case(title, f"1 / (1 + i + …), {size}^5, rank {rank}", runs, lambda y: relative(x, tna.tt_to_tensor(list(y))))
    limit, teneva = 1e-4, optional("teneva")
    for order in (10, 20):
        shape = [size] * order
        held, other = (
            np.random.default_rng(seed).integers(0, size, (count, order)) for seed, count in ((0, 1000), (1, 20_000))
        )
        runs = {OURS: lambda shape=shape: tt.tt_cross(ratio, shape, max_error=limit)}
        if teneva is not None:
            # It stops at the same error of as many points, which are not counted there.
            stop = {"m": 10_000_000, "dr_max": 1, "I_vld": held, "y_vld": ratio(held), "e_vld": limit}
            runs["teneva"] = lambda shape=shape, stop=stop: teneva.cross(
                ratio, teneva.rand(shape, 1, seed=0), cache={}, **stop
            )

        def error(cores: Any, other: np.ndarray = other) -> float:
            return relative(ratio(other), tt.TTTensor(list(cores)).entries(other))

        yield Case(title, f"the same, {size}^{order}, error {limit}", runs, error, parameters)


# -- CP tensors that are difficult to find ---------------------------------------------------------


def matmul(size: int) -> np.ndarray:
    """Return the tensor of the product of two square matrices."""
    tensor, (i, j, k) = np.zeros((size**2,) * 3), np.indices((size,) * 3)
    tensor[size * i + j, size * j + k, size * k + i] = 1.0
    return tensor


def textbook(x: np.ndarray, rank: int, seed: int, steps: int = 300) -> float:
    """Return the error of Levenberg-Marquardt with Nielsen's damping on the normal equations, from normal factors."""

    def formed(factors: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("ar,br,cr->abc", *factors, optimize=True))

    rng, n = np.random.default_rng(seed), x.shape[0]
    factors, norm = rng.normal(size=(3, n, rank)), float(np.linalg.norm(x))
    factors *= (norm / np.linalg.norm(formed(factors))) ** (1 / 3)
    left, damping, growth = formed(factors) - x, 0.1, 2.0
    for _ in range(steps):
        square, (a, b, c), grams = float(np.sum(left**2)), factors, [f.T @ f for f in factors]
        specs = (("abc,br,cr->ar", b, c), ("abc,ar,cr->br", a, c), ("abc,ar,br->cr", a, b))
        gradient = np.concatenate([np.einsum(spec, left, y, z, optimize=True).ravel() for spec, y, z in specs])
        normal = np.zeros((3, n, rank, 3, n, rank))
        for m, k in np.ndindex(3, 3):
            if m == k:
                left_gram, right_gram = (grams[i] for i in range(3) if i != m)
                normal[m, :, :, m] = np.einsum("ij,rs->irjs", np.eye(n), left_gram * right_gram)
            else:
                normal[m, :, :, k] = np.einsum("is,jr,rs->irjs", factors[m], factors[k], grams[3 - m - k])
        normal = normal.reshape(gradient.size, -1)
        step = -np.linalg.solve(normal + damping * np.eye(len(normal)), gradient)
        moved = factors + step.reshape(factors.shape)
        now, gain = formed(moved) - x, -2.0 * step @ gradient - step @ normal @ step
        agreement = (square - float(np.sum(now**2))) / gain if gain > 0 else -1.0
        if agreement > 0:
            factors, left = moved, now
            damping, growth = damping * max(1 / 3, 1 - (2 * agreement - 1) ** 3), 2.0
        else:
            damping, growth = damping * growth, 2.0 * growth
        if square**0.5 < 1e-14 * norm or damping > 1e20:
            break
    return float(np.linalg.norm(left)) / norm


def difficult() -> Iterator[Row]:
    """Yield one row per case: the errors of ``cp``, its time, and what is wanted."""

    def row(case: str, wanted: str, holds: Callable[[list[float]], bool], calls: Sequence[Run], **more: Any) -> Row:
        start = time.process_time()
        errors = [call().error for call in calls]
        seconds = round(time.process_time() - start, 2)
        return {"case": case, "wanted": wanted, "holds": holds(errors), "seconds": seconds, "errors": errors, **more}

    calls = [functools.partial(tna.cp, matmul(2), 7, init="random", random_state=seed) for seed in range(20)]
    yield row("2 × 2 matrix product, rank 7", "19 of 20", lambda errors: sum(e < 1e-10 for e in errors) >= 19, calls)
    calls = [functools.partial(tna.cp, matmul(3), 23, init="random", starts=50, random_state=seed) for seed in range(5)]
    yield row("3 × 3 matrix product, rank 23, 50 starts", "each exact", lambda errors: max(errors) < 1e-10, calls)
    for cosine in (0.99, 0.999):
        calls = []
        for seed in range(10):
            rng, gram = np.random.default_rng(seed), np.full((5, 5), cosine) + (1 - cosine) * np.eye(5)
            factors = [np.linalg.qr(rng.normal(size=(30, 5)))[0] @ np.linalg.cholesky(gram).T for _ in range(3)]
            calls.append(functools.partial(tna.cp, tna.cp_to_tensor((None, factors)), 5))
        yield row(f"30³, rank 5, cosines of {cosine}", "each exact", lambda errors: max(errors) < 1e-10, calls)
    calls = []
    for seed in range(12):
        planted = [np.random.default_rng([seed, mode]).normal(size=(40, 10)) for mode in range(3)]
        calls.append(functools.partial(tna.cp, tna.cp_to_tensor((None, planted)), 10))
    yield row("40³, rank 10", "12 of 12 exact", lambda errors: max(errors) < 1e-10, calls)
    hilbert = 1.0 / (np.indices((20, 20, 20)).sum(axis=0) + 1.0)
    for rank in range(4, 9):
        best = min(textbook(hilbert, rank, seed) for seed in range(20))
        yield row(
            f"Hilbert 20³, rank {rank}", "at most twice the best of 20 textbook runs", lambda e, b=best: e[0] <= 2 * b,
            [functools.partial(tna.cp, hilbert, rank)], best=best,
        )  # fmt: skip


def difficult_table(results: Mapping[str, Any]) -> str:
    """Return the documentation's table of the difficult tensors."""
    lines: list[Sequence[str]] = [("Tensor", "Calls", "Largest error", "Best of 20 textbook runs", "Seconds of a call")]
    for row in results["cases"]:
        best, errors = f"{row['best']:.1e}" if "best" in row else "", row["errors"]
        seconds = f"{row['seconds'] / len(errors):.2g}"
        lines.append((row["case"], str(len(errors)), f"{max(errors):.1e}", best, seconds))
    how = ", ".join(f"{name} {results['machine'][name]}" for name in ("processor", "numpy", "date"))
    return f"{list_table(lines, ':widths: 36 8 18 22 16')}\n({how}, one thread)\n"


def measure(smoke: bool = False) -> Iterator[Row]:
    """Yield one row per case."""
    with warnings.catch_warnings(), threads(1):
        warnings.simplefilter("ignore")  # of peers
        for cases in (
            singular(128 if smoke else 1024),
            nearest_kronecker(smoke),
            decompositions(smoke),
            sizes(smoke),
            crosses(smoke),
        ):
            for case in cases:
                yield measured(case, smoke)


def table(rows: Sequence[Row]) -> str:
    """Return the documentation's table: our time over each contestant's."""
    about, *rows = rows
    lines: list[Sequence[str]] = [("Function", "Case", "ms", "Over the best", "Over each")]
    for row in rows:
        sizes = row.get("parameters", {})
        larger = {name: f" (parameters × {sizes[name] / sizes[OURS]:.1f})" for name in sizes}
        each = ", ".join(f"{name} {ratio:.2f}{larger.get(name, '')}" for name, ratio in row["ratios"].items())
        best = f"{row['over the best']:.2f}" if row["over the best"] else "none"
        lines.append((row["kind"], row["case"], f"{1e3 * row['seconds'][OURS]:.3g}", best, each))
    how = about["machine"]
    kept = ("processor", "cores", "numpy", "tensorly", "scipy", "quimb", "teneva", "date")
    said = ", ".join(f"{name} {how.get(name, 'not installed')}" for name in kept)
    return f"{list_table(lines, ':widths: 18 30 12 12 28')}\n({said})\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, once, nothing kept")
    parser.add_argument("--difficult", action="store_true", help="tensors whose CP is hard to find")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.difficult:
        cases = []
        with threads(1):
            for row in difficult():
                cases.append(row)
                print(f"{row['case']}: {row['holds']} ({row['wanted']}), {row['seconds']} s", flush=True)
        results = {"machine": machine(), "cases": cases}
        DIFFICULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        DIFFICULT.with_suffix(".rst").write_text(difficult_table(results), encoding="utf-8")
        return
    rows: list[Row] = [{"machine": machine()}]
    for row in measure(given.smoke):
        rows.append(row)
        print(f"{row['kind']}, {row['case']}: {row['over the best']} {row['ratios']}", flush=True)
    if not given.smoke:
        given.results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given.results.with_suffix(".rst").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
