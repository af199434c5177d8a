"""The page on speed and its picture, generated only from the results: first lines that answer users, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from formatting import number, wrapped

from tnadapt.report import TextTable

Rows = Sequence[Mapping[str, Any]]
Find = Callable[[Rows], float | None]

# -- The first lines -------------------------------------------------------------------------


class Headline(NamedTuple):
    """What is measured, the part whose results answer it, and how to find each labelled number in their rows."""

    what: str
    part: str
    values: Mapping[str, Find]


def largest(column: str, factor: float = 1, **where: Any) -> Find:
    """Return a function that finds the largest number in a column, over the rows that have these values."""

    def find(rows: Rows) -> float | None:
        found = [
            factor * row[column]
            for row in rows
            if row.get(column) is not None
            and all(row.get(key) in (value if isinstance(value, tuple) else (value,)) for key, value in where.items())
        ]
        return max(found, default=None)

    return find


def found_in(column: str, cases: Mapping[str, Any], **where: Any) -> dict[str, Find]:
    """Return, for each label, what finds the largest number in a column over the rows of these cases."""
    return {label: largest(column, case=case, **where) for label, case in cases.items()}


def over_tensorly(kind: str) -> Find:
    """Return what finds the largest ratio to TensorLy for a kind of decomposition."""

    def find(rows: Rows) -> float | None:
        ratios = [row["ratios"] for row in rows if row.get("kind") == kind]
        found = [value for each in ratios for name, value in each.items() if name.partition(",")[0] == "TensorLy"]
        return max(found, default=None)

    return find


STEPS = {
    "LoRA": "lora", "LoKr": "lokr", "LoHa": "loha", "SuperLoRA": "superlora", "SuperLoRA with F": "superlora F 0.01",
    "dense": "dense",
}  # fmt: skip
LAYERS = {
    "LoRA, forward": "224 layers, lora(4)",
    "LoRA, forward and backward": "224 layers with backward, lora(4)",
    "LoRA next to bfloat16, forward": "224 layers of bfloat16, lora(4)",
    "LoRA next to bfloat16, forward and backward": "224 layers of bfloat16 with backward, lora(4)",
    "LoRA without gradients": "224 layers without gradients, lora(4)",
    "Compacter without gradients": "224 layers without gradients, compacter",
}
UNMERGED = {
    "PEFT's LoRA": "peft lora(4)",
    "LoRA": "lora(4)",
    "slowest preset": (
        "lora(4)", "superlora(4)", "lorta(4)", "loha(4)", "lokr(4)", "fourierft(1000)", "dense",
        "superlora(4) + F, ρ = 0.1",
    ),
}  # fmt: skip
FILES = {"LoRA": "lora(4)", "SuperLoRA": "superlora(4)", "SuperLoRA with F": "superlora(4) + F, ρ = 0.1"}
DECOMPOSITIONS = {
    "CP": "CP", "Tucker": "Tucker", "tensor train": "tensor train", "SVD": "truncated SVD",
    "Kronecker": "nearest Kronecker product",
}  # fmt: skip
SWITCHING = "switching between two adapters"

BYTES = {"bytes read by SuperLoRA": "superlora(4)", "bytes read by the slowest": "dense"}
EXTRACTED = {label: f"extract, {FILES[label]}" for label in ("LoRA", "SuperLoRA with F")}
MERGED = {label: f"merge, {case}" for label, case in FILES.items()}

HEADLINES = tuple(Headline(*line) for line in (
    ("A training step of ViT-base, over the step with PEFT's LoRA", "steps", found_in("ratio", STEPS, problem="vit")),
    ("A training step of MiniLM, over the step with PEFT's LoRA", "steps", found_in("ratio", STEPS, problem="minilm")),
    ("Peak memory of that step of ViT-base, above PEFT's LoRA, in MB", "memory",
     found_in("above lora MB", STEPS, problem="vit")),
    ("Decoding a token with an adapter that is not merged, over the base without one", "decoding",
     {f"{label} in {dtype}": largest("ratio", case=case, dtype=dtype)
      for dtype in ("float32", "bfloat16") for label, case in UNMERGED.items()}
     | found_in("bytes", BYTES, dtype="bfloat16")),
    ("Switching to another adapter and back", "short",
     {"over PEFT's time": largest("ratio", case=SWITCHING), "in ms": largest("seconds", 1e3, case=SWITCHING)}),
    ("A pass of 224 small layers, mostly Python's time for each, over PEFT's LoRA", "short", found_in("ratio", LAYERS)),
    ("A step of a layer with the strategy that `attach` chooses, over the best strategy", "strategies",
     {"the slowest case": largest("over best")}),
    ("Planning, and extraction from a tuned ViT-base, in seconds", "files",
     found_in("wall", {"plan for 10,000 weights": "plan, one shape", **EXTRACTED})),
    ("Merging into a checkpoint on disk, over reading and writing it", "files", found_in("wall_ratio", MERGED)),
    ("Decompositions of a tensor or matrix, over TensorLy's, the slowest case of each", "decompositions",
     {label: over_tensorly(kind) for label, kind in DECOMPOSITIONS.items()}),
    ("On a GPU: the Hadamard transform of 2^24, over a copy", "gpu",
     {"float32": largest("× copy", what="fwht", points="2^24")}),
))  # fmt: skip

#: The script of a part that is not one of ``fast.py``.
SCRIPTS = {"short": "short.py --record", "decompositions": "decompositions.py"}


def headlines(found: Mapping[str, Rows]) -> Iterator[str]:
    """Yield the lines as a list in Markdown, from a mapping of part to lines, the first being the machine."""
    for line in HEADLINES:
        rows = found.get(line.part, [{}])[1:]
        values = {label: find(rows) for label, find in line.values.items()}
        said = [f"{label} {number(value)}" for label, value in values.items() if value is not None]
        script = SCRIPTS.get(line.part, f"fast.py {line.part}")
        yield f"- **{line.what}** (`{script}`): {', '.join(said) if said else 'not measured'}\n"


# -- The page --------------------------------------------------------------------------------

HEAD = """# Speed

Times are ratios, unless a unit is given: 1 is as fast, less is faster. In brackets is the script in `benchmarks/` that
measured the line.

A *step* is forward, loss, backward and optimizer step: ViT-base with a batch of 8 images of 224², MiniLM with 32 of 64
tokens, query and value adapted, and a head trained. *Decoding* is one token through two layers of Llama-8B's shape.

"""

ABOUT = """
![A training step of ViT-base and of MiniLM with each method, over the step with PEFT's LoRA](speed_steps.png)

Measured on {machines}. Every time is a median over contestants that alternated in one process, and every ratio is from
a single run: on another machine the times differ, but the ratios differ less.

[All measurements](https://github.com/tnadapt/tnadapt/blob/main/benchmarks/results/speed_tables.md), with the case,
spread and number of rounds of each: {titles}. `python benchmarks/fast.py` measures again and generates this page from
the files in `benchmarks/results`; `python benchmarks/fast.py --page` only generates it. `python benchmarks/short.py`
compares a working tree with the recorded short profile.
"""

TABLES = """# All measurements of speed

[The page on speed](https://tnadapt.readthedocs.io/en/latest/speed.html) has the summary.
"""

WHAT = {
    "steps": (
        "A training step",
        "Forward, loss, backward and optimizer step, compared with PEFT's LoRA of rank 4 in the same round. ViT-base: "
        "batch 8 of 224², random weights; MiniLM: batch 32 of 64 tokens. Query and value are adapted, and a head is "
        "trained.",
    ),
    "memory": (
        "Memory of a training step",
        "Peak resident memory over three steps of ViT-base, each case in a separate process. The dense update has "
        "14 million parameters, each with a gradient and two numbers of optimizer state.",
    ),
    "decoding": (
        "Decoding",
        "One token through two layers of Llama-8B's shape, q and v adapted and not merged, compared with the base in "
        "the same round. *first* is the first pass after the numbers have changed, in seconds; *bytes* are those "
        "that a token reads, over the base: the limit of the ratio where reading takes all the time.",
    ),
    "files": (
        "Planning, extraction and merging on disk",
        "`tnadapt.plan` with its table; `tnadapt.extract` and `tnadapt.merge` of the q and v of ViT-base. *cpu* is "
        "processor time of all threads in seconds; *plain* reads and writes the same file by `safetensors.numpy`, "
        "*plain_synced* with an fsync, which a merge has, too.",
    ),
    "short": (
        "The short profile",
        "What `python benchmarks/short.py` compares a working tree with: a few cases of every part, on one thread. "
        "*seconds* are ours, *other* those of what is in *over*; *low* and *high* are the quartiles of the ratio.",
    ),
}


def write(found: Mapping[str, Rows], folder: Path) -> None:
    """Write the page ``speed.md``, its picture, and ``speed_tables.md`` to a folder.

    The results are a mapping of part to lines, the first being the machine.
    """
    titles = ", ".join(title[0].lower() + title[1:] for part, (title, _) in WHAT.items() if part in found)
    about = "\n".join(wrapped(ABOUT.format(machines=_machines(found), titles=titles)))
    page = [HEAD, *headlines(found), f"\n{about}"]
    (folder / "speed.md").write_text("".join(page), encoding="utf-8")
    text = [TABLES]
    for part, (title, about) in WHAT.items():
        if part in found:
            machine, *rows = found[part]
            text += [f"\n## {title}\n\n{about}\n\n", *_table(rows), _on(machine)]
    (folder / "speed_tables.md").write_text("".join(text), encoding="utf-8")
    if "steps" in found:
        _draw_steps(found["steps"][1:], folder / "speed_steps.png")


def _machines(found: Mapping[str, Rows]) -> str:
    about = [rows[0].get("machine", rows[0]) for rows in found.values()]
    return " and ".join(sorted({f"{one['processor']} with {one['cores']} cores" for one in about}))


def _table(rows: Rows) -> Iterable[str]:
    """Render the rows, with one table for each set of columns, in their order."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in rows:
        kinds.setdefault(tuple(one), []).append(one)
    for columns, several in kinds.items():
        table = TextTable([[number(one[column]) for column in columns] for one in several], columns)
        yield f"{table.markdown()}\n\n"


def _on(machine: Mapping[str, Any]) -> str:
    return "*" + ", ".join(f"{name} {text}" for name, text in machine.items() if name != "part") + "*\n"


def _draw_steps(rows: Rows, path: Path) -> None:
    """Draw bars for the steps: the time of each method relative to PEFT's LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, peer, limit = "#1f6f8b", "#c8743a", "#555555"
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, several = plt.subplots(1, len(problems), figsize=(11, 7), layout="constrained", squeeze=False)
    for axes, problem in zip(several[0], problems, strict=True):
        own = [row for row in rows if row["problem"] == problem and row.get("low") is not None]
        own.sort(key=lambda row: row["ratio"])
        peers = [
            row["case"].startswith(("peft", "lycoris")) or row["case"] in ("head only", "full q and v") for row in own
        ]
        axes.barh(
            [row["case"] for row in own],
            [row["ratio"] for row in own],
            xerr=[[row["ratio"] - row["low"] for row in own], [row["high"] - row["ratio"] for row in own]],
            color=[peer if other else ours for other in peers],
            error_kw={"elinewidth": 0.8, "ecolor": limit},
        )
        axes.axvline(1.0, color=limit, linewidth=1)
        axes.set(xlim=(0.4, None), xlabel="step over PEFT's LoRA, r = 4", title=problem)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (ours, peer)]
    several[0][0].legend(handles=handles, labels=["tnadapt", "others"], loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
