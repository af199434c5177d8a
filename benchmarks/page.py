"""The page and the pictures of ``fast.py``, made of its results and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures
from targets import TARGETS, Target

__all__ = ["write"]

Rows = Sequence[Mapping[str, Any]]

HEAD = """# Speed

Made by `python benchmarks/fast.py` of the results in `benchmarks/results/fast`. Every time is a median over contestants
that took turns in one process, and every ratio one of the same run: on another machine the times differ, and the
ratios less. A *copy* is one of as many bytes (read once, written once) by two threads, unless it says otherwise.
"""

WHAT = {
    "fwht": ("The Hadamard transform", "Of random numbers, not normalised; out of place, as the public function is."),
    "fastfood": ("The linear F", "Fastfood: two transforms, a permutation, a gain, signs; and its adjoint."),
    "steps": (
        "A training step",
        "Forward, loss, backward and optimiser step, against PEFT's LoRA of rank 4 in the same round. ViT-base: batch "
        "8 of 224², random weights; MiniLM: batch 32 of 64 tokens. Query and value are adapted, and a head is trained.",
    ),
    "memory": (
        "Memory of a training step",
        "The most that was resident over three steps of ViT-base, each case in a process of its own. The dense update "
        "has 14 million parameters, each with a gradient and two numbers of the optimiser.",
    ),
    "strategies": (
        "How a layer uses its update",
        "A training step of one linear layer by each strategy, relative to the plain layer's; *chosen* is what "
        "`attach` takes for that many tokens.",
    ),
    "growth": ("Cost against the number of elements", "The slope of log time against log N; 1 is linear."),
    "slices": ("One weight of 4096² out of a group of 2^30", "Against a copy of the slice by one thread."),
    "startup": ("Import and attach", "Beyond what the libraries and the arrays cost by themselves."),
    "gpu": ("On a graphics card", ""),
}


def write(found: Mapping[str, Rows], folder: Path) -> None:
    """``speed.md`` and its pictures into a folder, of part -> its lines, the first one being the machine."""
    text = [HEAD]
    text += ["\n## What was to be reached\n\n", *_targets(found)]
    for part, (title, about) in WHAT.items():
        if part not in found:
            continue
        machine, *rows = found[part]
        text += [f"\n## {title}\n\n", *([about, "\n\n"] if about else [])]
        for name in pictures.draw(part, rows, folder):
            text += [f"![{title}]({name})\n\n"]
        text += [*_table(_SHORT.get(part, list)(rows)), "\n", _on(machine)]
    (folder / "speed.md").write_text("".join(text), encoding="utf-8")


def _targets(found: Mapping[str, Rows]) -> Iterable[str]:
    yield "| point | what | at most | measured | |\n|---|---|---|---|---|\n"
    for target in TARGETS:
        rows = found.get(target.part, [{}])[1:]
        value = target.find(rows) if rows else None
        cells = target.point, target.what, _number(target.limit), _measured(value), _verdict(target, value)
        yield f"| {' | '.join(cells)} |\n"


def _measured(value: float | None) -> str:
    return "not measured" if value is None else _number(value)


def _verdict(target: Target, value: float | None) -> str:
    if value is None:
        return target.why
    if value <= target.limit:
        return "met"
    return f"missed by {100 * (value / target.limit - 1):.0f} %. {target.why}".strip()


def _of_growth(rows: Rows) -> Rows:
    """Of each format and phase the largest size."""
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["elements"]):
        last[row["case"], row["phase"]] = row
    columns = ("case", "phase", "exponent", "elements", "parameters", "seconds", "peak_bytes")
    return [{column: row[column] for column in columns} for row in last.values()]


def _of_strategies(rows: Rows) -> Rows:
    """Of each format and width, how near the best the choice is over all numbers of tokens."""
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


#: What of a part's many rows the page shows; the files have all.
_SHORT: dict[str, Callable[[Rows], Rows]] = {"growth": _of_growth, "strategies": _of_strategies}


def _table(rows: Rows) -> Iterable[str]:
    """All rows with the same columns in one table, in their order."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    for columns, several in kinds.items():
        yield "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
        for row in several:
            yield "| " + " | ".join(_number(row[column]) for column in columns) + " |\n"
        yield "\n"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _on(machine: Mapping[str, Any]) -> str:
    return "*" + ", ".join(f"{name} {text}" for name, text in machine.items() if name != "part") + "*\n"
