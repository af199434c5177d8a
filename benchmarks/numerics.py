"""Errors at low precision and for tiny numbers, by size: ``python benchmarks/numerics.py``.

The same numbers, rounded to the dtype, pass through the transform, every F and every format in that dtype and in
float64: normal numbers, and some so small that the results are below the dtype's smallest normal number. The results
are in ``results/numerics.jsonl``; the page ``results/numerics.md`` and its picture are generated only from them
(``--page`` does this alone).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formatting import folded
from machine import machine

import tnadapt as tna
from tnadapt.algebra.maps import KINDS, SQUARE
from tnadapt.report import TextTable

RESULTS = Path(__file__).parent / "results"
BITS = (6, 10, 14, 18, 22)
#: The relative error of one rounding.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
#: The largest allowed error of an operation, in those units.
LIMITS = {"float32": 8.0, "bfloat16": 2.0, "float16": 2.0}
#: The spacing below the smallest normal number, and a factor that makes results of normal numbers that small.
TINY = {"float64": (2.0**-1074, 2.0**-1030), "float32": (2.0**-149, 2.0**-135), "float16": (2.0**-24, 2.0**-20)}
#: The sizes at which this is measured.
TINY_BITS = (6, 10, 14)
RANK = 8
FORMATS: dict[str, dict[str, Any]] = {
    "dense": {"format": "dense", "order": 2},
    "CP, M = 2": {"format": "cp", "order": 2},
    "CP, M = 3": {"format": "cp", "order": 3},
    "weighted CP": {"format": "cp-weighted", "order": 3},
    "Tucker": {"format": "tucker", "order": 3},
    "tensor train": {"format": "tt", "order": 4},
    "Kronecker, K = 3": {"format": "cp", "order": 2, "splits": 3, "split_size": 2},
    "Hadamard, K = 2": {"format": "cp", "order": 2, "splits": 2, "combine": "hadamard"},
}
GROUPS = {"transform": "The Hadamard transform", "F": "The fixed projection F", "format": "Formats"}

Rows = Sequence[Mapping[str, Any]]
Function = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def cases(bits: int) -> Iterator[tuple[str, str, dict[str, tuple[int, ...]], Function]]:
    """Yield group, name, shapes of the arrays, and the function, for results of ``2 ** bits`` elements."""
    size = 1 << bits
    yield "transform", "fwht", {"x": (size,)}, lambda arrays: tna.fwht(arrays["x"])
    for kind in KINDS:
        if kind != "identity":
            f = tna.Projection(kind, size if kind in SQUARE else size // 4, size, seed=1)
            yield "F", kind, {"x": (f.n_in,)}, lambda arrays, f=f: f(arrays["x"])
    for name, settings in FORMATS.items():
        config = tna.Config(rank=RANK, groups=1, fold="hypercube", **settings)
        plan = tna.UpdatePlan(config, [(1 << bits // 2, 1 << (bits - bits // 2))])
        yield "format", name, plan.param_shapes, plan.vector


def measure(most: int) -> list[dict[str, Any]]:
    """Measure all errors, for sizes up to ``2 ** most``."""
    found: list[dict[str, Any]] = [{"machine": machine()}]
    for bits in (bits for bits in BITS if bits <= most):
        for group, name, shapes, function in cases(bits):
            rng = np.random.default_rng(bits)
            host = {key: torch.from_numpy(rng.standard_normal(shape)) for key, shape in shapes.items()}
            for dtype, unit in UNITS.items():
                low = {key: array.to(getattr(torch, dtype)) for key, array in host.items()}
                exact = function({key: array.double() for key, array in low.items()})
                error = function(low).double() - exact
                found.append(
                    {
                        "group": group, "name": name, "dtype": dtype, "bits": bits,
                        "largest": float(error.abs().max() / exact.abs().max()) / unit,
                        "mean": float(error.square().mean().sqrt() / exact.square().mean().sqrt()) / unit,
                    }
                )  # fmt: skip
    found += [row for bits in TINY_BITS if bits <= most for row in tiny(bits)]
    return found


def tiny(bits: int) -> Iterator[dict[str, Any]]:
    """Yield errors where the first array is so small that the results are subnormal."""
    for group, name, shapes, function in cases(bits):
        if not name.startswith("nonlinear"):  # a cube of these is 0
            rng = np.random.default_rng(bits)
            host = {key: torch.from_numpy(rng.standard_normal(shape)) for key, shape in shapes.items()}
            first = next(iter(shapes))
            for dtype, (distance, small) in TINY.items():
                low = {key: array.to(getattr(torch, dtype)) for key, array in host.items()}
                low[first] = (host[first] * small).to(getattr(torch, dtype))
                # Scaling by a power of two is exact in float64, so the reference keeps all its digits.
                exact = function(
                    {**{key: array.double() for key, array in low.items()}, first: low[first].double() / small}
                )
                error = function(low).double() / small - exact
                largest = float(error.abs().max() / (distance / small))
                yield {"group": group, "name": name, "dtype": dtype, "bits": bits, "distances": largest}


def allowed(row: Mapping[str, Any]) -> float:
    """Return the allowed error of an operation on tiny numbers, in units of their spacing."""
    if row["group"] == "format":
        return 64.0
    return 1.0 if row["dtype"] == "float16" else 4.0 * 2.0 ** (row["bits"] / 2)


# -- The page ----------------------------------------------------------------------------------

HEAD = """# Low-precision numerics

The largest error of any operation, over sizes up to 2^{bits}, in units of one rounding: 1 is a result that was computed
exactly and rounded once. The tests allow {limits} at sizes up to 2^10.

"""

ABOUT = """
Generated by `python benchmarks/numerics.py` from `benchmarks/results/numerics.jsonl`. Normal numbers are rounded to a
dtype and pass through the same operation in that dtype and in float64. Errors are in units of the dtype's rounding
error, half the spacing of numbers at 1: 2^-24 = 6.0e-8 for float32, 2^-8 = 0.0039 for bfloat16, 2^-11 = 0.00049 for
float16. *largest*: the largest error divided by the largest element. *mean*: the root mean square of the errors divided
by that of the elements. If a result is computed exactly and rounded once, the largest error is at most 1, and the mean
about 0.4. All numbers on this page are from torch on the CPU; on the other libraries the tests check only the
transform, to 2 units in the half precisions that a library supports.
"""

PICTURE = """
![Root mean square error by size, in units of one rounding](numerics.png)
"""

SMALL = """
## Subnormal numbers

NumPy and torch keep subnormal numbers (below 2.2e-308 in float64, 1.2e-38 in float32, 6.1e-5 in float16), with their
remaining digits, and so do the kernels: nothing is flushed to zero. JAX's compiler flushes them to 0, in float32 and in
float64. At the usual sizes of updates no action is needed; a bfloat16 or float16 model gets float32 adapters unless
requested otherwise.

"""

SPACING = """
The largest error, in units of the spacing of subnormal numbers; the tests limit it to 4 √n (transform and F), 1 (both
in float16) and 64 (formats). The errors of the transform and F are about √n, because every number is multiplied by 1/√n
before it is added; in half precision, which is computed in float32 and rounded once, they are at most 1.

"""
TAIL = """
## NaN and infinity

The transform and the linear and nonlinear F spread them over the whole vector: one NaN or infinity in an array affects
the whole update of its own group. With the shuffle, or without F, it appears where the products place it (0 times
infinity is NaN), and not at all if it only affects padding. It never appears in another group's update. In training it
shows in the loss. Files with such values are neither written nor read (`FileError`). An update with such a value, or
with a sum outside the range of the weight's dtype (65,504 for float16), is not merged, in memory or on disk. `extract`,
`convert` and `decompose` refuse such values.
"""


def page(rows: Rows) -> str:
    """Return the page as Markdown."""
    first, *rest = rows
    errors = [row for row in rest if "largest" in row]
    limits = ", ".join(f"{limit:g} units in {dtype}" for dtype, limit in LIMITS.items())
    worst = []
    for group, title in GROUPS.items():
        each = [max(row["largest"] for row in _of(errors, group, dtype)) for dtype in UNITS]
        worst.append([title, *(f"{number:.2g}" for number in each)])
    text = [HEAD.format(limits=limits, bits=max(row["bits"] for row in errors)), _table(worst, UNITS)]
    known = ", ".join(f"{name} {value}" for name, value in first["machine"].items())
    text += [PICTURE, "\n", folded("How this was measured", f"{ABOUT}\nOn {known}.")]
    for group, title in GROUPS.items():
        tables = [f"**{dtype}**\n\n{_by_size(_of(errors, group, dtype))}" for dtype in UNITS]
        text += [f"\n## {title}\n\n", folded("Errors by size", "\n".join(tables))]
    text += [SMALL, folded("Errors by size", SPACING + _by_dtype([row for row in rest if "distances" in row])), TAIL]
    return "".join(text)


def _of(errors: Rows, group: str, dtype: str) -> Rows:
    return [row for row in errors if row["group"] == group and row["dtype"] == dtype]


def _by_size(own: Rows) -> str:
    """Return a table with a row for each operation, and the largest and mean error at each size."""
    sizes = sorted({row["bits"] for row in own})
    lines = []
    for name in dict.fromkeys(row["name"] for row in own):
        at = {row["bits"]: row for row in own if row["name"] == name}
        lines.append([name, *(f"{at[bits]['largest']:.2g}, {at[bits]['mean']:.2g}" for bits in sizes)])
    return _table(lines, [f"2^{bits}: largest, mean" for bits in sizes])


def _by_dtype(small: Rows) -> str:
    """Return a table with a row for each operation, and its error at each dtype and size."""
    columns = list(itertools.product(TINY, TINY_BITS))
    lines = []
    for name in dict.fromkeys(row["name"] for row in small):
        off = {(row["dtype"], row["bits"]): row["distances"] for row in small if row["name"] == name}
        lines.append([name, *(f"{off[column]:.2g}" for column in columns)])
    return _table(lines, [f"{dtype}, 2^{bits}" for dtype, bits in columns])


def _table(rows: Sequence[Sequence[str]], columns: Iterable[str]) -> str:
    return TextTable(rows, ("", *columns)).markdown() + "\n"


def picture(rows: Rows, path: Path) -> None:
    """Plot mean errors by size, with one panel per group and one line style per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    errors = [row for row in rows[1:] if "largest" in row]
    drawn, panels = plt.subplots(1, len(GROUPS), figsize=(13, 4.4), layout="constrained", sharey=True)
    for axes, (group, title) in zip(panels, GROUPS.items(), strict=True):
        own = [row for row in errors if row["group"] == group]
        names = list(dict.fromkeys(row["name"] for row in own))
        for number, name in enumerate(names):
            for dtype, style in zip(UNITS, ("-", "--", ":"), strict=True):
                line = [row for row in own if row["name"] == name and row["dtype"] == dtype]
                axes.plot(
                    [2 ** row["bits"] for row in line],
                    [row["mean"] for row in line],
                    style,
                    marker="osD^vPXh"[number],
                    markersize=4,
                    color=f"C{number}",
                    label=name if dtype == "float32" else None,
                    linewidth=1.2,
                )
        axes.axhline(1.0, color="#555555", linewidth=0.8)
        axes.set(xscale="log", ylim=(-0.1, 6.0), xlabel="elements", title=title)
        axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("error, in units of one rounding")
    drawn.supxlabel("solid: float32, dashed: bfloat16, dotted: float16", fontsize=8)
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of results, the first one being the machine."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(rows: Rows, folder: Path) -> None:
    """Write the page and the picture to a folder."""
    (folder / "numerics.md").write_text(page(rows), encoding="utf-8")
    picture(rows, folder / "numerics.png")


def main() -> None:
    """Measure, unless only the page is requested, and write the page."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--page", action="store_true")
    given.add_argument("--most", type=int, default=BITS[-1], help="sizes up to 2 to this power")
    given.add_argument("--out", type=Path, default=RESULTS)
    asked = given.parse_args()
    path = asked.out / "numerics.jsonl"
    if not asked.page:
        path.write_text("".join(json.dumps(row) + "\n" for row in measure(asked.most)), encoding="utf-8")
    write(read(path), asked.out)


if __name__ == "__main__":
    main()
