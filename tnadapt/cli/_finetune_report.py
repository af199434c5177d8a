"""What ``tnadapt finetune`` prints: what it would train, and what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._printing import echo, echo_json, print_table

if TYPE_CHECKING:
    from tnadapt.finetune import Outcome, Point, Study

__all__ = ["print_outcome", "print_plan"]


def print_plan(study: Study, as_json: bool) -> None:
    """Print what a study would train."""
    counts = [(method, study.parameters(method)) for method in study.methods]
    if as_json:
        listed = [{"family": m.family, "label": m.label, "parameters": count} for m, count in counts]
        echo_json({"study": study.outline(), "methods": listed, "trainings": len(study.tasks)})
        return
    print_table(["method", "setting", "parameters"], [[m.family, m.label, f"{n:,}"] for m, n in counts], right=(2,))
    echo(_sizes(study))


def _sizes(study: Study) -> str:
    parts = ", ".join(f"{len(part.labels):,} {name}" for name, part in study.problem.parts.items())
    return (
        f"{_counted(len(study.targets), 'weight')} of {study.problem.name}; {parts} samples; "
        f"{_counted(len(study.methods), 'setting')} x {_counted(len(study.rates), 'rate')} x "
        f"{_counted(len(study.seeds), 'seed')} = {_counted(len(study.tasks), 'training')}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def print_outcome(study: Study, outcome: Outcome, folder: Path, as_json: bool) -> None:
    """Print the table of a study that was run, its best adapter, and where its files are."""
    best, proof = outcome.best, outcome.proof
    if as_json:
        found = {
            "study": study.settings(),
            "points": [point.to_dict() for point in outcome.points],
            "best": best and {**best.to_dict(), "file": str(outcome.adapter), "proof": proof and proof._asdict()},
            "control": outcome.control and outcome.control.to_dict(),
            "picture": outcome.picture and str(outcome.picture),
            "results": str(folder / "results.jsonl"),
        }
        echo_json(found)
        return
    from tnadapt.finetune.pareto_report import columns, rows_of

    metric = study.problem.task.metric
    print_table(columns(len(study.seeds)), rows_of(outcome.points), right=(3, 4, 5, 6, 7))
    echo(f"● Pareto front: no other has as few parameters and a better test {metric.name}.")
    if len(study.rates) > 1:
        echo("  Each is shown at the rate that was best on the validation samples.")
    if kept := outcome.points[0].kept:
        echo(f"  Each also trains {kept:,} parameters of the head.")
    if metric.lower:
        echo(f"  Validation and test: {metric.unit}.")
    echo(_sizes(study))
    if best is not None and proof is not None:
        numbers = study.problem.task.numbers
        logits = f"{numbers} within {proof.largest:.1g}" if proof.largest else f"{numbers} bitwise equal"
        echo(f"best adapter by validation: {best.method.name} ({best.parameters:,} parameters), {outcome.adapter}")
        if more := _others(best):
            echo(f"  test: {more}")
        echo(
            f"  loaded on a fresh base: {_same(proof.loaded_same)} on {proof.samples:,} test samples; merged: "
            f"{_same(not proof.merged_different, proof.merged_different)}, {logits}"
        )
    if outcome.control is not None and outcome.control.warning is not None:
        echo(f"warning: {outcome.control.warning}")
    echo(f"results: {folder / 'results.jsonl'}")
    if outcome.picture is None:
        echo("no picture: pip install 'tnadapt[plot]'")
    else:
        echo(f"picture: {outcome.picture}")


def _others(best: Point) -> str:
    """Return the other metrics of the best adapter, each the mean over seeds."""
    found = [one.get("test_metrics", {}) for one in best.records]
    means = {name: [one[name] for one in found if one[name] is not None] for name in found[0]}
    return ", ".join(f"{name} {sum(some) / len(some):.4g}" for name, some in means.items() if some)


def _same(same: bool, different: int | None = None) -> str:
    if same:
        return "the same predictions"
    return "DIFFERENT predictions" if different is None else f"DIFFERENT predictions for {different}"
