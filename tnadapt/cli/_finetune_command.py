"""The command ``tnadapt finetune``."""

from __future__ import annotations

import enum
import functools
import importlib.util
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tnadapt.algebra.formats import FORMATS
from tnadapt.errors import TnadaptError, pluralize
from tnadapt.planning import parameters_of

from ._options import TARGETS_HELP, job_package, option, preset_option, settings_of, targets_of, word_or_number
from .terminal import ENGINE_HELP, ENGINE_OPTION_HELP, echo, echo_json, engine_options, print_table, stoppable

if TYPE_CHECKING:
    from tnadapt.finetune import Outcome, Point, Study


# -- Output ------------------------------------------------------------------------------------------------------------


def _print_plan(study: Study, as_json: bool) -> None:
    """Print what a study would train."""
    counts = [(method, study.parameters(method)) for method in study.methods]
    if as_json:
        listed = [{"family": m.family, "label": m.label, "parameters": count} for m, count in counts]
        echo_json({"study": study.outline(), "methods": listed, "rates": study.rates, "trainings": len(study.tasks)})
        return
    print_table(["method", "setting", "parameters"], [[m.family, m.label, f"{n:,}"] for m, n in counts], right=(2,))
    echo(_sizes(study))
    echo(f"learning rate: {' '.join(f'{rate:g}' for rate in study.rates)}")


def _sizes(study: Study) -> str:
    parts = ", ".join(f"{len(part.labels):,} {name}" for name, part in study.problem.parts.items())
    steps = pluralize(study.steps, "step")
    return (
        f"{pluralize(len(study.targets), 'weight')} of {study.problem.name}; {parts} samples; "
        f"{pluralize(len(study.methods), 'setting')} x {pluralize(len(study.rates), 'rate')} x "
        f"{pluralize(len(study.seeds), 'seed')} = {pluralize(len(study.tasks), 'training')} of {steps}"
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
    if len(study.seeds) == 1:
        small = "one or two points" if metric.percent else "a few percent"
        echo(f"  One seed: differences of {small} may be noise; --seeds 3 shows the spread.")
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
        loaded = "the same" if proof.loaded_same else "DIFFERENT"
        different = proof.merged_different
        merged = f"DIFFERENT predictions for {different}" if different else "the same predictions"
        echo(
            f"  loaded on a fresh base: {loaded} predictions on {proof.samples:,} test samples; merged: {merged}, "
            f"{logits}"
        )
        if more := _next_try(best.rate, study.rates, study.steps, study.training.epochs):
            echo(f"  {more}")
    if outcome.control is not None and outcome.control.warning is not None:
        echo(f"warning: {outcome.control.warning}")
    echo(f"results: {folder / 'results.jsonl'}")
    echo("no picture: pip install 'tnadapt[plot]'" if outcome.picture is None else f"picture: {outcome.picture}")


#: With fewer steps, no rate trains an adapter to the end.
_FEW_STEPS = 50
#: By default, few samples are passed over until there are so many.
ENOUGH_STEPS = 200


def _next_try(rate: float, tried: Sequence[float], steps: int, epochs: int) -> str:
    """Say what to try next: more steps if they were few, or rates if the best one is the only, lowest or highest one.

    Examples
    --------
    >>> _next_try(0.03, [0.01, 0.03], steps=200, epochs=3)
    'its rate, 0.03, is the highest that was tried: run it again with --lr 0.01 --lr 0.03 --lr 0.09'
    >>> _next_try(0.03, [0.01, 0.03, 0.1], steps=200, epochs=3)
    ''
    >>> _next_try(0.01, [0.01], steps=12, epochs=3)
    'each training had 12 steps, and most need hundreds: run it with --epochs 50 and another --out'
    """
    if steps < _FEW_STEPS:
        more = math.ceil(ENOUGH_STEPS / steps * epochs)
        few = pluralize(steps, "step")
        return f"each training had {few}, and most need hundreds: run it with --epochs {more} and another --out"
    if len(tried) == 1:
        why, others = "one rate was tried, and some models and short trainings need another", [rate / 3, rate * 3]
    elif rate == max(tried):
        why, others = f"its rate, {rate:g}, is the highest that was tried", [rate * 3]
    elif rate == min(tried):
        why, others = f"its rate, {rate:g}, is the lowest that was tried", [rate / 3]
    else:
        return ""
    # All rates, since the table and the best adapter are of those that a command names. None is trained twice.
    rates = sorted([*tried, *(float(f"{other:.2g}") for other in others)])
    return f"{why}: run it again with {' '.join(f'--lr {each:g}' for each in rates)}"


def _others(best: Point) -> str:
    """Return the other metrics of the best adapter as means over seeds."""
    metrics = [record.get("test_metrics", {}) for record in best.records]
    means = {name: [record[name] for record in metrics if record[name] is not None] for name in metrics[0]}
    return ", ".join(f"{name} {sum(some) / len(some):.4g}" for name, some in means.items() if some)


# -- The command -------------------------------------------------------------------------------------------------------


#: The built-in tasks; a test compares them with ``tnadapt.finetune.tasks``.
TASK_NAMES = (
    "classification", "multi-label", "regression", "token-classification", "causal-lm", "image-classification",
)  # fmt: skip


class ReportTo(enum.StrEnum):
    """Where trainings are reported, through transformers."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"


# The panels of the help page.
WHAT = "Compared methods"
_own = functools.partial(option, panel="Your own model and data")
_what = functools.partial(option, panel=WHAT)
_how = functools.partial(option, panel="Training")
_where = functools.partial(option, panel="Output")

# Suffixes of files for --model and --data, which are left out of the default folder's name.
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".npz", ".gguf")
# Names of F that need no settings of their own.
PROJECTIONS = ("shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2", "gather", "sign-gather")


def finetune_command(
    model: Annotated[
        str | None, _own("A local folder, .gguf file or hub name for transformers; or timm:NAME.", "a small ViT")
    ] = None,
    data: Annotated[
        str | None,
        _own(
            "A .csv, .tsv, .json or .jsonl of texts; a folder of images, one subfolder per class; an .npz; or a "
            "datasets name.",
            "the digits 5 to 9",
        ),
    ] = None,
    task: Annotated[str | None, _own(f"{', '.join(TASK_NAMES)}.", "inferred from the data")] = None,
    text_column: Annotated[str | None, _own("Column of texts, words or prompts.", "found by its name")] = None,
    label_column: Annotated[
        str | None, _own("Column of labels, numbers, tags or completions.", "found by its name")
    ] = None,
    separator: Annotated[str | None, _own("Between several labels of a text.", "found in the data")] = None,
    tokenizer: Annotated[
        str | None, _own("A folder, .gguf file or hub name, for a model without a tokenizer.", "the model's")
    ] = None,
    image_size: Annotated[int | None, _own("Pixels per side; the model's own by default.", min=1, max=4096)] = None,
    max_length: Annotated[
        int | None, _own("Maximum tokens per text.", "256, or the model's limit if that is lower", min=2)
    ] = None,
    limit: Annotated[int | None, _own("Maximum number of samples from each split of the data.", "all", min=2)] = None,
    preset: Annotated[
        list[str] | None, preset_option("A named method, repeat for more", "a grid of 19, of 10 with --model", WHAT)
    ] = None,
    rank: Annotated[list[int] | None, _what("Rank; repeat for more.", "the preset's")] = None,
    groups: Annotated[
        str | None,
        _what("What shares a tensor network: weight, layer, role, or a number of equal groups.", "the preset's"),
    ] = None,
    order: Annotated[int | None, _what("Modes of the folded tensor.", "the preset's")] = None,
    splits: Annotated[int | None, _what("Kronecker factors.", "the preset's")] = None,
    format: Annotated[str | None, _what(f"{', '.join(FORMATS.built_in)}.", "the preset's")] = None,
    fold: Annotated[str | None, _what("stack, hypercube or balanced.", "the preset's")] = None,
    projection: Annotated[
        str | None,
        _what(f"Fixed map after the tensor network: {', '.join(PROJECTIONS)}; others by --set.", "the preset's"),
    ] = None,
    ratio: Annotated[
        float | None, _what("With a projection, its inputs as a share of its outputs (ρ).", "the preset's")
    ] = None,
    settings: Annotated[
        list[str] | None,
        _what("Any other field of Config, for every preset.", "the preset's", names=["--set"], metavar="FIELD=VALUE"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        _what(
            "For each family, use the setting with the most parameters up to this (1000, 1k); repeat for more.",
            "none",
            metavar="N",
        ),
    ] = None,
    targets: Annotated[list[str] | None, _how(f"qv, qkvo, all-linear, conv, embeddings, {TARGETS_HELP}", "qv")] = None,
    keep_trainable: Annotated[
        list[str] | None,
        _how("A module or parameter to train with every adapter, in addition to a new head.", "a new head alone"),
    ] = None,
    lr: Annotated[
        list[float] | None,
        _how(
            "A learning rate; repeat for more. Every method is trained at each; validation chooses.",
            "the one that suits the base, often 0.01",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        _how("Passes over the training samples.", "25 for the digits; else 3, or more on few samples", min=1),
    ] = None,
    batch: Annotated[int | None, _how("Samples per step.", "32", min=1)] = None,
    seeds: Annotated[int, _how("Number of seeds.", min=1)] = 1,
    device: Annotated[str | None, _how("cpu, cuda, …", "cuda if there is one, else cpu")] = None,
    jobs: Annotated[
        int, _how("Parallel trainings; 0: one per core for the digits, else 1; on a cluster, as many as fit.", min=0)
    ] = 0,
    together: Annotated[
        int | None,
        _how(
            "Trainings of one setting, at several rates and seeds, that share their passes; 0: all.",
            "0 on a GPU, else 1",
            min=0,
        ),
    ] = None,
    engine: Annotated[str, _how(ENGINE_HELP)] = "local",
    engine_option: Annotated[list[str] | None, _how(ENGINE_OPTION_HELP, "none", metavar="KEY=VALUE")] = None,
    report_to: Annotated[ReportTo, _how("Where the trainings of your own model are reported.")] = ReportTo.NONE,
    pretrain_epochs: Annotated[int, _how("Pretraining epochs of the small ViT for the digits.", min=1)] = 60,
    out: Annotated[Path | None, _where("A folder.", "runs/digits, or runs/MODEL-DATA")] = None,
    fresh: Annotated[bool, _where("Delete the results of an earlier run.", names=["--fresh"])] = False,
    cache: Annotated[Path | None, _where("A folder for the pretrained small ViT.", "the user's cache folder")] = None,
    dry_run: Annotated[bool, _where("Print what would be trained, and exit.", names=["--dry-run"])] = False,
    as_json: Annotated[bool, _where("Print JSON.", names=["--json"])] = False,
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
        # A console that cannot print ρ must not cause an error after an hour of training: replace such characters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if report_to is not ReportTo.NONE:
        if model is None and data is None:
            raise TnadaptError("--report-to needs --model and --data; without them the data are scikit-learn's digits")
        if importlib.util.find_spec(report_to.value) is None:
            raise TnadaptError(
                f"--report-to {report_to.value} needs {report_to.value}, which is not installed: "
                f"pip install {report_to.value}"
            )
    changes: dict[str, Any] = {
        "groups": groups and word_or_number(groups), "order": order, "splits": splits, "format": format,
        "fold": fold and word_or_number(fold), "projection": projection and word_or_number(projection), "ratio": ratio,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= settings_of(
        settings or (), {*changes, *(["rank"] if rank else [])},
        "it applies to every preset: run the command once for each value",
    )  # fmt: skip
    where = engine_options(engine_option or ())
    _check(preset or (), changes, lr or ())
    chosen = targets_of(targets)
    job = job_package()
    digits = model is None and data is None
    spec = job.Spec(
        model=model, data=data, task=task, separator=separator, tokenizer=tokenizer, text_column=text_column,
        label_column=label_column, image_size=image_size, max_length=max_length, limit=limit,
        keep_trainable=tuple(keep_trainable or ()), cache=cache, pretrain_epochs=pretrain_epochs,
    )  # fmt: skip
    choice = job.Choice(
        presets=tuple(preset or ()), ranks=tuple(rank or ()), changes=changes,
        budgets=tuple(parameters_of(text) for text in budget or ()),
        short=not digits,
    )  # fmt: skip
    folder = out or Path("runs", "digits" if digits else f"{_word(model)}-{_word(data)}")
    # All of these reject invalid input before torch is imported and a model is opened.
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
            epochs=epochs or (25 if digits else 3), batch=batch or 32, device=device_of,
            least_steps=0 if epochs or digits else ENOUGH_STEPS,
            targets=chosen if isinstance(chosen, str) else tuple(chosen), report_to=report_to.value,
        )  # fmt: skip
        with reporter() as shown:
            study = job.Study(spec, choice, training, lr or None, seeds, shown)
            if not dry_run:
                outcome = study.run(folder, jobs, fresh, engine, where, together)
    if dry_run:
        _print_plan(study, as_json)
        return
    _print_outcome(study, outcome, folder, as_json)
    if outcome.proof is not None and not outcome.proof.holds:
        raise typer.Exit(1)


def _word(source: str | None) -> str:
    """Return a path or hub name as part of a folder's name."""
    path = Path(source or "none")
    # The name of a model may contain a dot, such as Qwen2.5-7B.
    stem = (path.stem if path.suffix in _SUFFIXES else path.name).removeprefix("timm:")
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem) or "none"


def _check(presets: Sequence[str], changes: Mapping[str, Any], rates: Sequence[float]) -> None:
    """Reject invalid options before torch is imported, which takes seconds."""
    from tnadapt.algebra.named_config import require_setting

    for name in changes:
        require_setting(name, presets)
    for rate in rates:
        if not 0.0 < rate <= 1e6:
            raise TnadaptError(f"--lr must be above 0 and at most 1e6; got {rate}")
