"""The first lines of the page on speed: what a user asks, answered from the result files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from finding import Find, Rows, largest, times
from formatting import number
from targets import UNMERGED

__all__ = ["HEADLINES", "Headline", "lines", "sources"]


class Headline(NamedTuple):
    """One line.

    Attributes
    ----------
    what : str
        What is measured, and what a value of 1 means.
    part : str
        The part whose results answer it.
    values : mapping of str to callable
        Each label with a function that finds its number in the rows, or None if they lack it.
    """

    what: str
    part: str
    values: Mapping[str, Find]


def found_in(column: str, cases: Mapping[str, Any], **where: Any) -> dict[str, Find]:
    """Return a finder for each label: the largest number in a column over the rows of these cases."""
    return {label: largest(column, case=case, **where) for label, case in cases.items()}


def over_tensorly(**cases: str) -> dict[str, Find]:
    """Return a finder of the largest ratio to TensorLy for each kind of decomposition."""

    def finder(kind: str) -> Find:
        def find(rows: Rows) -> float | None:
            ratios = [row["ratios"] for row in rows if row.get("kind") == kind]
            found = [value for each in ratios for name, value in each.items() if name.partition(",")[0] == "TensorLy"]
            return max(found, default=None)

        return find

    return {label.replace("_", " "): finder(kind) for label, kind in cases.items()}


STEPS = {
    "LoRA": "lora", "LoKr": "lokr", "LoHa": "loha", "SuperLoRA": "superlora", "SuperLoRA with F": "superlora F 0.01",
    "dense": "dense",
}  # fmt: skip

HEADLINES: tuple[Headline, ...] = (
    Headline(
        "A training step of ViT-base, over the step with PEFT's LoRA",
        "steps",
        found_in("ratio", STEPS, problem="vit"),
    ),
    Headline("The same of MiniLM", "steps", found_in("ratio", STEPS, problem="minilm")),
    Headline(
        "Peak memory of that step of ViT-base, above PEFT's LoRA, in MB",
        "memory",
        found_in("above lora MB", STEPS, problem="vit"),
    ),
    Headline(
        "Decoding a token with an adapter that is not merged, over the base without one",
        "decoding",
        {
            f"{label} in {dtype}": largest("ratio", case=case, dtype=dtype)
            for dtype in ("float32", "bfloat16")
            for label, case in {"PEFT's LoRA": "peft lora(4)", "LoRA": "lora(4)", "slowest preset": UNMERGED}.items()
        }
        | {
            f"bytes read by {label}": largest("bytes", case=case, dtype="bfloat16")
            for label, case in {"SuperLoRA": "superlora(4)", "the slowest": "dense"}.items()
        },
    ),
    Headline(
        "Switching to another adapter and back",
        "short",
        {
            "over PEFT's time": largest("ratio", case="switching between two adapters"),
            "in ms": times(1e3, largest("seconds", case="switching between two adapters")),
        },
    ),
    Headline(
        "A pass of 224 small layers, mostly Python's time for each, over PEFT's LoRA",
        "short",
        found_in(
            "ratio",
            {
                "LoRA, forward": "224 layers, lora(4)",
                "LoRA, forward and backward": "224 layers with backward, lora(4)",
                "LoRA next to bfloat16, forward": "224 layers of bfloat16, lora(4)",
                "LoRA next to bfloat16, forward and backward": "224 layers of bfloat16 with backward, lora(4)",
                "LoRA without gradients": "224 layers without gradients, lora(4)",
                "Compacter without gradients": "224 layers without gradients, compacter",
            },
        ),
    ),
    Headline(
        "Planning, and extraction from a tuned ViT-base, in seconds",
        "files",
        found_in(
            "wall",
            {
                "plan for 10,000 weights": "plan, one shape",
                "LoRA": "extract, lora(4)",
                "SuperLoRA with F": "extract, superlora(4) + F, ρ = 0.1",
            },
        ),
    ),
    Headline(
        "Merging into a checkpoint on disk, over reading and writing it",
        "files",
        found_in(
            "wall_ratio",
            {
                "LoRA": "merge, lora(4)",
                "SuperLoRA": "merge, superlora(4)",
                "SuperLoRA with F": "merge, superlora(4) + F, ρ = 0.1",
            },
        ),
    ),
    Headline(
        "Decompositions of a tensor or matrix, over TensorLy's, the slowest case of each",
        "decompositions",
        over_tensorly(
            CP="CP", Tucker="Tucker", tensor_train="tensor train", SVD="truncated SVD",
            Kronecker="nearest Kronecker product",
        ),
    ),
    Headline(
        "On a GPU: the Hadamard transform of 2^24, over a copy",
        "gpu",
        {"float32": largest("× copy", what="fwht", points="2^24")},
    ),
)  # fmt: skip

#: The script of a part that is not one of ``fast.py``.
SCRIPTS = {"short": "short.py --record", "decompositions": "decompositions.py"}


def lines(found: Mapping[str, Rows]) -> Iterator[str]:
    """Yield the lines as a list in Markdown, from a mapping of part to lines, the first being the machine."""
    for line in HEADLINES:
        rows = found.get(line.part, [{}])[1:]
        values = {label: find(rows) for label, find in line.values.items()}
        said = [f"{label} {number(value)}" for label, value in values.items() if value is not None]
        yield f"- **{line.what}**: {', '.join(said) if said else 'not measured'}\n"


def sources() -> Iterator[str]:
    """Yield the script and the results file of each line, in the same order."""
    for line in HEADLINES:
        script = SCRIPTS.get(line.part, f"fast.py {line.part}")
        file = f"{line.part}.jsonl" if line.part in SCRIPTS else f"fast/{line.part}.jsonl"
        yield f"- {line.what}: `{script}`, `{file}`\n"
