"""The page and the pictures of ``fast.py``, generated only from its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import headlines
import pictures
from formatting import folded, number
from targets import TARGETS, Target

__all__ = ["write"]

Rows = Sequence[Mapping[str, Any]]

HEAD = """# Speed

Times are multiples of another's, unless a unit is given: 1 is as fast, less is faster.

"""

ABOUT = """
Measured on {machines}. Every time is a median over contestants that alternated in one process, and every ratio is from
a single run: on another machine the times differ, but the ratios differ less. A *copy* copies as many bytes (read once,
written once) with two threads, unless stated otherwise.

`python benchmarks/fast.py` generates this page from the files in `benchmarks/results/`. The scripts in `benchmarks/`
that measured the lines above, and their results:

"""

WHAT = {
    "fwht": (
        "The Hadamard transform",
        "Of random numbers, not normalized; out of place, like the public function. FFHT has one thread, and ours uses "
        "two for long ones. *pass* is a pass over memory by one thread, *a call* divides the time of a small vector.",
    ),
    "fastfood": ("The linear F", "Fastfood: two transforms, a permutation, a gain and signs; and its adjoint."),
    "fastfood_profile": (
        "The linear F, pass by pass",
        "Each pass over memory by one thread, in processor time; *copies* are multiples of a copy by one thread.",
    ),
    "fourier": (
        "The Fourier transform of FourierFT",
        "The map `dft2` by the library's own FFT, compared with the products with cosines and sines, in float32.",
    ),
    "steps": (
        "A training step",
        "Forward, loss, backward and optimizer step, compared with PEFT's LoRA of rank 4 in the same round. ViT-base: "
        "batch 8 of 224², random weights; MiniLM: batch 32 of 64 tokens. Query and value are adapted, and a head is "
        "trained. *alone*: the adapted layers of ViT-base without the rest, 64 rows, in processor time of one thread, "
        "compared with the dense update.",
    ),
    "decoding": (
        "Decoding",
        "One token through two layers of Llama-8B's shape, q and v adapted and not merged, compared with the base in "
        "the same round. *first* is the first pass after the numbers have changed, in seconds; *bytes* are those "
        "that a token reads, over the base: the limit of the ratio where reading takes all the time.",
    ),
    "adapters": (
        "Many weights and many adapters",
        "Overhead in processor time of passes through layers of 32 by 32, and what they consist of (operators of torch "
        "include those that others call); and adapters on q and v of a BERT of MiniLM's size.",
    ),
    "memory": (
        "Memory of a training step",
        "Peak resident memory over three steps of ViT-base, each case in a separate process. The dense update has "
        "14 million parameters, each with a gradient and two numbers of optimizer state.",
    ),
    "memory_profile": (
        "Where the memory of a training step goes",
        "Peaks of forward and backward in the last of three steps of ViT-base, what the import of numba adds, and the "
        "arrays of F by name.",
    ),
    "strategies": (
        "How a layer applies its update",
        "A training step of one linear layer with each strategy, relative to the plain layer's; *chosen* is what "
        "`attach` chooses for that many tokens.",
    ),
    "growth": ("Cost against the number of elements", "The slope of log time against log N; 1 is linear."),
    "slices": ("One weight of 4096² out of a group of 2^30", "Compared with a copy of the slice by one thread."),
    "files": (
        "Planning, extraction and merging on disk",
        "`tnadapt.plan` with its table; `tnadapt.extract` and `tnadapt.merge` of the q and v of ViT-base. *cpu* is "
        "processor time of all threads in seconds; *plain* reads and writes the same file by `safetensors.numpy`, "
        "*plain_synced* with an fsync, which a merge has, too.",
    ),
    "startup": ("Import and attach", "In addition to the cost of the libraries and the arrays themselves."),
    "gpu": ("On a GPU", ""),
    "short": (
        "The short profile",
        "What `python benchmarks/short.py` compares a working tree with: a few cases of every part, on one thread. "
        "*seconds* are ours, *other* those of what is in *over*; *low* and *high* are the quartiles of the ratio.",
    ),
}


def write(found: Mapping[str, Rows], folder: Path) -> None:
    """Write ``speed.md`` and its pictures to a folder, from a mapping of part to lines, the first being the machine."""
    text = [HEAD, *headlines.lines(found), "\n"]
    text += [folded("How this was measured", ABOUT.format(machines=_machines(found)) + "".join(headlines.sources()))]
    text += ["\n## Targets\n\n", *_targets(found)]
    for part, (title, about) in WHAT.items():
        if part not in found:
            continue
        machine, *rows = found[part]
        inside = [f"{about}\n\n" if about else ""]
        inside += [f"![{title}]({name})\n\n" for name in pictures.draw(part, rows, folder)]
        inside += [*_table(_SHORT.get(part, list)(rows)), _on(machine)]
        # The heading stays outside: links to it work, and it can be skimmed.
        text += [f"\n## {title}\n\n", folded("All measurements", "".join(inside))]
    (folder / "speed.md").write_text("".join(text), encoding="utf-8")


def _machines(found: Mapping[str, Rows]) -> str:
    about = [rows[0].get("machine", rows[0]) for rows in found.values()]
    return " and ".join(sorted({f"{one['processor']} with {one['cores']} cores" for one in about}))


def _targets(found: Mapping[str, Rows]) -> Iterable[str]:
    table = ["| part | what | at most | measured | |\n|---|---|---|---|---|\n"]
    verdicts = []
    for target in TARGETS:
        rows = found.get(target.part, [{}])[1:]
        value = target.find(rows) if rows else None
        part = WHAT[target.part][0] if target.part in WHAT else target.part
        verdicts.append(_verdict(target, value))
        cells = part, target.what, number(target.limit), _measured(value), verdicts[-1]
        table.append(f"| {' | '.join(cells)} |\n")
    met, missed = (sum(verdict.startswith(word) for verdict in verdicts) for word in ("met", "missed"))
    rest = len(verdicts) - met - missed
    yield f"Of {len(verdicts)} targets {met} are met, {missed} are missed, and {rest} not measured.\n\n"
    yield folded("All targets, and why some are missed", "".join(table))


def _measured(value: float | None) -> str:
    return "not measured" if value is None else number(value)


def _verdict(target: Target, value: float | None) -> str:
    if value is None:
        return target.why
    if value <= target.limit:
        return "met"
    return f"missed by {number(100 * (value / target.limit - 1))} %. {target.why}".strip()


def _of_growth(rows: Rows) -> Rows:
    """Return the largest size of each format and phase."""
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["elements"]):
        last[row["case"], row["phase"]] = row
    columns = ("case", "phase", "exponent", "elements", "parameters", "seconds", "peak_bytes")
    return [{column: row[column] for column in columns} for row in last.values()]


def _of_strategies(rows: Rows) -> Rows:
    """Return, for each format and width, how close to the best the choice is over all token counts."""
    several: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        several.setdefault((row["format"], row["width"]), []).append(row)
    found = []
    for (kind, width), own in several.items():
        worst = max(own, key=lambda row: row["over best"])
        near = sum(row["over best"] <= 1.1 for row in own)
        found.append(
            {
                "format": kind,
                "width": str(width),
                "chosen, by tokens": ", ".join(f"{row['tokens']}: {row['chosen']}" for row in own),
                "within 10 % of the best": f"{near} of {len(own)}",
                "worst": worst["over best"],
                "at tokens": str(worst["tokens"]),
            }
        )
    return found


#: The rows of a part that the page shows; the files have all of them.
_SHORT: dict[str, Callable[[Rows], Rows]] = {"growth": _of_growth, "strategies": _of_strategies}


def _table(rows: Rows) -> Iterable[str]:
    """Render the rows, with one table for each set of columns, in their order."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    for columns, several in kinds.items():
        yield "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
        for row in several:
            yield "| " + " | ".join(number(row[column]) for column in columns) + " |\n"
        yield "\n"


def _on(machine: Mapping[str, Any]) -> str:
    return "*" + ", ".join(f"{name} {text}" for name, text in machine.items() if name != "part") + "*\n"
