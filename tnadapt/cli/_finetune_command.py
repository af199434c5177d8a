"""The command ``tnadapt finetune``."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tnadapt.algebra.formats import FORMATS
from tnadapt.errors import TnadaptError, pluralize

from ._options import (
    ENGINE_HELP,
    ENGINE_OPTION_HELP,
    TARGETS_HELP,
    TASK_NAMES,
    ReportTo,
    check_options,
    engine_options,
    job_package,
    preset_option,
    settings_of,
    targets_of,
    word_or_number,
)
from .terminal import echo, echo_json, print_table, stoppable

if TYPE_CHECKING:
    from tnadapt.finetune import Outcome, Point, Study

__all__ = ["finetune_command"]


# -- What it prints ----------------------------------------------------------------------------------------------------


def _print_plan(study: Study, as_json: bool) -> None:
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
        f"{pluralize(len(study.targets), 'weight')} of {study.problem.name}; {parts} samples; "
        f"{pluralize(len(study.methods), 'setting')} x {pluralize(len(study.rates), 'rate')} x "
        f"{pluralize(len(study.seeds), 'seed')} = {pluralize(len(study.tasks), 'training')}"
    )


def _print_outcome(study: Study, outcome: Outcome, folder: Path, as_json: bool) -> None:
    """Print the table of a study that was run, its best adapter, and where its files are."""
    best, proof = outcome.best, outcome.proof
    if as_json:
        summary = {
            "study": study.settings(),
            "points": [point.to_dict() for point in outcome.points],
            "best": best and {**best.to_dict(), "file": str(outcome.adapter), "proof": proof and proof._asdict()},
            "control": outcome.control and outcome.control.to_dict(),
            "picture": outcome.picture and str(outcome.picture),
            "results": str(folder / "results.jsonl"),
        }
        echo_json(summary)
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
    metrics = [record.get("test_metrics", {}) for record in best.records]
    means = {name: [record[name] for record in metrics if record[name] is not None] for name in metrics[0]}
    return ", ".join(f"{name} {sum(some) / len(some):.4g}" for name, some in means.items() if some)


def _same(same: bool, different: int | None = None) -> str:
    if same:
        return "the same predictions"
    return "DIFFERENT predictions" if different is None else f"DIFFERENT predictions for {different}"


# -- The command -------------------------------------------------------------------------------------------------------


OWN = "Your own model and data"
WHAT = "Compared methods"
HOW = "Training"
# Of the files that --model and --data take; they are left out of the default folder's name.
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".npz", ".gguf")
WHERE = "Output"


class Usual(NamedTuple):
    """Default settings."""

    epochs: int
    batch: int
    rates: tuple[float, ...]


# Names of F that need no settings of their own.
PROJECTIONS = ("shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2", "gather", "sign-gather")

# Presets are trained in units for which one rate suits all of them.
RATES = (0.01,)
DIGITS = Usual(25, 32, RATES)
OTHERS = Usual(3, 32, RATES)


def finetune_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="A local folder, .gguf file or hub name for transformers; or timm:NAME.",
            rich_help_panel=OWN,
            show_default="a small ViT",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A .csv, .tsv, .json or .jsonl of texts; a folder of images, one subfolder per class; an .npz; or a "
            "datasets name.",
            rich_help_panel=OWN,
            show_default="the digits 5 to 9",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TASK_NAMES)}.", rich_help_panel=OWN, show_default="inferred from the data"),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of texts, words or prompts.", rich_help_panel=OWN, show_default="found by its name"),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of labels, numbers, tags or completions.",
            rich_help_panel=OWN,
            show_default="found by its name",
        ),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Between several labels of a text.", rich_help_panel=OWN, show_default="found in the data"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A folder, .gguf file or hub name, for a model without a tokenizer.",
            rich_help_panel=OWN,
            show_default="the model's",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Pixels per side; the model's own by default.", rich_help_panel=OWN),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum tokens per text.",
            rich_help_panel=OWN,
            show_default="256, or the model's limit if that is lower",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum number of samples from each split of the data.",
            rich_help_panel=OWN,
            show_default="all",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        preset_option("A named method, repeat for more", "a grid of 19, of 10 with --model", WHAT),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="Rank; repeat for more.", rich_help_panel=WHAT, show_default="the preset's")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="What shares a tensor network: weight, layer, role, or a number of equal groups.",
            rich_help_panel=WHAT,
            show_default="the preset's",
        ),
    ] = None,
    order: Annotated[
        int | None, typer.Option(help="Modes of the folded tensor.", rich_help_panel=WHAT, show_default="the preset's")
    ] = None,
    splits: Annotated[
        int | None, typer.Option(help="Kronecker factors.", rich_help_panel=WHAT, show_default="the preset's")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(FORMATS.built_in)}.", rich_help_panel=WHAT, show_default="the preset's"),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(help="stack, hypercube or balanced.", rich_help_panel=WHAT, show_default="the preset's"),
    ] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            help=f"Fixed map after the tensor network: {', '.join(PROJECTIONS)}; others by --set.",
            rich_help_panel=WHAT,
            show_default="the preset's",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="With a projection, its inputs as a share of its outputs (ρ).",
            rich_help_panel=WHAT,
            show_default="the preset's",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of Config, for every preset.",
            rich_help_panel=WHAT,
            show_default="the preset's",
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            help="For each family, use the setting with the most parameters up to this; repeat for more.",
            rich_help_panel=WHAT,
            show_default="none",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help=f"qv, qkvo, all-linear, conv, embeddings, {TARGETS_HELP}", rich_help_panel=HOW, show_default="qv"
        ),
    ] = None,
    keep_trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="A module or parameter to train with every adapter, in addition to a new head.",
            rich_help_panel=HOW,
            show_default="a new head alone",
        ),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            help="A learning rate; repeat for more. Every method is trained at each; validation chooses.",
            show_default="0.01",
            rich_help_panel=HOW,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training samples.",
            rich_help_panel=HOW,
            show_default="25 for the digits, else 3",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per step.", rich_help_panel=HOW, show_default="32")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.", rich_help_panel=HOW)] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, …", rich_help_panel=HOW, show_default="cuda if there is one, else cpu"),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Parallel trainings; 0: one per core for the digits, else 1; on a cluster, as many as fit.",
            rich_help_panel=HOW,
        ),
    ] = 0,
    engine: Annotated[str, typer.Option(help=ENGINE_HELP, rich_help_panel=HOW)] = "local",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help=ENGINE_OPTION_HELP, rich_help_panel=HOW, show_default="none"),
    ] = None,
    report_to: Annotated[
        ReportTo,
        typer.Option(help="Where the trainings of your own model are reported.", rich_help_panel=HOW),
    ] = ReportTo.NONE,
    pretrain_epochs: Annotated[
        int, typer.Option(min=1, help="Pretraining epochs of the small ViT for the digits.", rich_help_panel=HOW)
    ] = 60,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder.", rich_help_panel=WHERE, show_default="runs/digits, or runs/MODEL-DATA"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the results of an earlier run.", rich_help_panel=WHERE)
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the pretrained small ViT.", rich_help_panel=WHERE, show_default="the user's cache folder"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and exit.", rich_help_panel=WHERE)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=WHERE)] = False,
) -> None:
    """Adapt a pretrained model with several methods, and show accuracy, or the task's metric, against parameters.

    With no arguments, a small vision transformer trained on the digits 0 to 4 learns 5 to 9, in about two minutes on
    two cores. With --model and --data, it does the same for your own. Every method is trained at the same learning
    rate. With several --lr, each is trained at all of them, and shown at the one that was best on the validation
    samples; the test samples are not used for any choice.

    An interrupted run resumes when you run it again. Exit code: 0; 1 if the saved adapter does not make the same
    predictions as the trained one; or 2 if the run is not possible.
    """
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot print ρ must not raise an error after an hour of training: replace such characters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    changes: dict[str, Any] = {
        "groups": groups and word_or_number(groups), "order": order, "splits": splits, "format": format,
        "fold": fold and word_or_number(fold), "projection": projection and word_or_number(projection), "ratio": ratio,
    }  # fmt: skip
    options = {
        "task": task, "text-column": text_column, "label-column": label_column, "separator": separator,
        "tokenizer": tokenizer, "report-to": report_to.given,
    }  # fmt: skip
    check_options(options, model is not None or data is not None, report_to)
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= settings_of(
        settings or (), {*changes, *(["rank"] if rank else [])},
        "it applies to every preset: run the command once for each value",
    )  # fmt: skip
    where = engine_options(engine_option or ())
    rates = _checked(preset or (), changes, lr or ())
    chosen = targets_of(targets)
    job = job_package()
    digits = model is None and data is None
    usual = DIGITS if digits else OTHERS
    spec = job.Spec(
        model=model, data=data, task=task, separator=separator, tokenizer=tokenizer, text_column=text_column,
        label_column=label_column, image_size=image_size,
        max_length=max_length, limit=limit, keep_trainable=tuple(keep_trainable or ()), cache=cache,
        pretrain_epochs=pretrain_epochs,
    )  # fmt: skip
    choice = job.Choice(
        presets=tuple(preset or ()), ranks=tuple(rank or ()), changes=changes, budgets=tuple(budget or ()),
        short=not digits,
    )  # fmt: skip
    folder = out or Path("runs", "digits" if digits else f"{_word(model)}-{_word(data)}")
    # All of these refuse what is wrong before torch is imported, and a model is opened.
    spec.check()
    choice.check()
    job.check_out(folder)
    assumed = job.open_engine(engine, jobs, where).device(device)
    kept = "nothing was trained" if dry_run else f"finished trainings are in {folder}, and the same command resumes"
    with stoppable(kept):
        # Torch is imported here.
        from .training_reporter import reporter

        device_of = (None if dry_run else assumed) or job.usable_device(device)
        training = job.Training(
            epochs=epochs or usual.epochs, batch=batch or usual.batch, device=device_of,
            targets=chosen if isinstance(chosen, str) else tuple(chosen), report_to=report_to.value,
        )  # fmt: skip
        with reporter() as shown:
            study = job.Study(spec, choice, training, rates or usual.rates, seeds, shown)
            if not dry_run:
                outcome = study.run(folder, jobs, fresh, engine, where)
    if dry_run:
        _print_plan(study, as_json)
        return
    _print_outcome(study, outcome, folder, as_json)
    if outcome.proof is not None and not outcome.proof.holds:
        raise typer.Exit(1)


def _word(source: str | None) -> str:
    """Return a path or hub name as part of a folder's name."""
    path = Path(source or "none")
    # The name of a model may have a dot, as Qwen2.5-7B has.
    stem = (path.stem if path.suffix in _SUFFIXES else path.name).removeprefix("timm:")
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem) or "none"


def _checked(presets: Sequence[str], changes: Mapping[str, Any], rates: Sequence[float]) -> Sequence[float]:
    """Refuse what is wrong with the options alone, before torch is imported, which takes seconds; return the rates."""
    from tnadapt.algebra.named_config import require_preset, require_setting

    for name in presets:
        require_preset(name)
    for name in changes:
        require_setting(name, presets)
    for rate in rates:
        if not 0.0 < rate <= 1e6:
            raise TnadaptError(f"--lr must be above 0 and at most 1e6; got {rate}")
    return rates
