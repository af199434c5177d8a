"""The command line: ``python -m benchmarks.quality run | merge | report | page``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tnadapt.cli.terminal import ENGINE_HELP, ENGINE_OPTION_HELP, engine_options, stoppable
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Engine, open_engine, usable_device

from . import evidence, methods, page, readme, report, store, tasks
from .grid import Grid, Trial, grid_of, shard_of
from .profiles import PROFILES, Profile, profile_of
from .running import Listener, Run
from .tasks import QualityTask
from .tuning import Plan, due

#: The results that the documentation shows.
PUBLISHED = Path(__file__).parents[1] / "results" / "quality"

#: How many combinations without a setting are listed with the reason.
_TOLD = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = parser().parse_args(arguments)
    try:
        with stoppable("what is finished is kept, and the same command resumes"):
            options.do(options)
    except TnadaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.Exit as stopped:
        return stopped.exit_code
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Quality per parameter: a benchmark that anyone can run."
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train what is not finished yet, then write tables and figures")
    run.set_defaults(do=_run)
    run.add_argument("tasks", nargs="*", metavar="TASK", help=f"of the profile by default: {', '.join(tasks.TASKS)}")
    about = "; ".join(f"{name}: {one.about}" for name, one in PROFILES.items())
    run.add_argument("--profile", default="quick", help=f"default quick. {about}")
    run.add_argument("--methods", help="names, or tnadapt, PEFT or all, with commas")
    run.add_argument("--budgets", help="numbers of parameters, with commas between them")
    run.add_argument("--seeds", type=int, help="seeds 0 to N - 1")
    run.add_argument(
        "--tuned-by", type=int, help="number of seeds with which other rates than the default are tried; 0 for none"
    )
    run.add_argument("--scale", help="smoke, small or full: of data and training")
    run.add_argument("--shard", default="1/1", metavar="I/N", help="only every N-th setting, with a file of its own")
    run.add_argument("--retry", action="store_true", help="try trainings again that failed with an error")
    run.add_argument("--dry-run", action="store_true", help="only list the settings")
    run.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    run.add_argument("--cache", type=Path, default=Path("runs/quality-cache"), help="folder of models and data")
    run.add_argument(
        "--jobs", type=int, default=0, help="parallel trainings of one thread; default one per core, or one on a GPU"
    )
    run.add_argument(
        "--together",
        type=int,
        help="trainings of one setting that share their passes, 0 for all; default 0 on a GPU, else 1",
    )
    run.add_argument("--device", help="such as cuda; default the CPU")
    run.add_argument("--engine", default="local", help=ENGINE_HELP)
    run.add_argument("--engine-option", action="append", default=[], metavar="KEY=VALUE", help=ENGINE_OPTION_HELP)

    for name, do, words in (
        ("merge", _merge, "write the results of all shards into one file per task"),
        ("report", _report, "write the tables and figures of all tasks with results"),
    ):
        one = commands.add_parser(name, help=words)
        one.set_defaults(do=do)
        one.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    shown = commands.add_parser(
        "page",
        help="generate the pages of the documentation, and what tnadapt plan ranks by, from the published results",
    )
    shown.set_defaults(do=_page)
    shown.add_argument("--out", type=Path, default=PUBLISHED, help="folder of the results")
    listed = commands.add_parser("methods", help="list all methods")
    listed.set_defaults(do=_methods)
    return made


# -- Commands -------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    profile = profile_of(options.profile)
    scale = options.scale or profile.scale
    shard = _shard(options.shard)
    if options.together is not None and options.together < 0:
        raise TnadaptError(f"--together must be at least 0; got {options.together}")
    chosen = [tasks.find(name) for name in options.tasks or profile.tasks]
    engine, device = _where(options)
    # What is wrong for the last task is refused before the first one is trained, which may take hours.
    for task in chosen:
        task.scaled(scale)
    wanted = []
    for task in chosen:
        plan = _plan(profile, options)
        print(f"{task.name}: choosing the settings of all methods", file=sys.stderr, flush=True)  # seconds to minutes
        wanted.append((task, _grid(task, profile, options), plan))
        if options.dry_run:
            _list(task, scale, wanted[-1][1], shard, plan, options.out)
    if options.dry_run:
        return
    for task, grid, plan in wanted:
        # Workers on other machines may start in another folder.
        together = (0 if device.startswith("cuda") else 1) if options.together is None else options.together
        run = Run(options.out.resolve(), options.cache.resolve(), engine, device, shard, options.retry, together)
        count = run.task(task, scale, shard_of(grid.settings, shard), plan, Progress())
        print(f"{task.name}: {count} trainings finished")
        if shard == (1, 1):
            for path in report.write(options.out, task, scale):
                print(path)


def _merge(options: argparse.Namespace) -> None:
    _check_results(options.out)
    for task, scale in _every():
        if (path := store.merge(options.out, task.name, scale)) is not None:
            print(path)


def _check_results(folder: Path) -> None:
    if not any(store.files_of(folder, task.name, scale) for task, scale in _every()):
        raise TnadaptError(f"no results in {folder}; give the folder of a run with --out")


def _report(options: argparse.Namespace) -> None:
    _check_results(options.out)
    for task, scale in _every():
        for path in report.write(options.out, task, scale):
            print(path)


def _page(options: argparse.Namespace) -> None:
    for path in page.write(options.out):
        print(path)
    if options.out.resolve() == PUBLISHED.resolve():
        print(evidence.write(options.out))
        print(readme.write(options.out))


def _methods(options: argparse.Namespace) -> None:
    for name in methods.names(("control", "tnadapt", "PEFT")):
        print(f"{name:22} {methods.find(name).title}")


def _every() -> list[tuple[QualityTask, str]]:
    return [(tasks.find(name), scale) for name in tasks.TASKS for scale in tasks.find(name).scales]


def _list(task: QualityTask, scale: str, grid: Grid, shard: tuple[int, int], plan: Plan, out: Path) -> None:
    """Print the settings of a shard, and what is left to train."""
    settings = shard_of(grid.settings, shard)
    print(f"{task.name} ({task.title}): {len(settings)} settings")
    for one in settings:
        budget = f"{one.budget:,}" if one.budget else "–"
        print(f"  {budget:>8}  {one.parameters:>8,}  {one.method:22} {one.label}")
    why = {f"{one.method} at {one.budget:,}: {one.why}" for one in grid.absent}
    print(f"  without a setting at a budget: {len(why)} combinations of method and budget")
    for line in sorted(why) if len(why) <= _TOLD else ():
        print(f"    {line}")
    found = store.read(out, task.name, scale)
    records = {} if found is None else found.records
    print(f"  {len(records)} trainings are finished; {len(due(task, scale, settings, records, plan))} can be run now")


# -- Options --------------------------------------------------------------------------------------


def _grid(task: QualityTask, profile: Profile, options: argparse.Namespace) -> Grid:
    names: Sequence[str] | None = profile.methods
    if options.methods is not None:
        groups = {name: methods.names([name]) for name in ("tnadapt", "PEFT")} | {"all": methods.names()}
        words = [word.strip() for word in options.methods.split(",")]
        names = list(dict.fromkeys(name for word in words for name in groups.get(word, [word])))
    budgets = profile.budgets
    if options.budgets is not None:
        budgets = tuple(int(value) for value in _numbers("--budgets", options.budgets))
    return grid_of(task, names, budgets)


def _plan(profile: Profile, options: argparse.Namespace) -> Plan:
    seeds = profile.seeds if options.seeds is None else options.seeds
    tuned_by = profile.tuned_by if options.tuned_by is None else options.tuned_by
    if seeds < 1 or tuned_by < 0:
        raise TnadaptError(f"--seeds must be at least 1 and --tuned-by at least 0; got {seeds} and {tuned_by}")
    return Plan(seeds, tuned_by)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise TnadaptError(f"{option} takes numbers with commas between them; got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise TnadaptError(f"--shard takes I/N with I from 1 to N, such as 2/8; got {text!r}")
    return int(number), int(of)


def _where(options: argparse.Namespace) -> tuple[Engine, str]:
    """Return the engine, and the device of trainings; that of a cluster need not be on this machine."""
    given = engine_options(options.engine_option)
    device = open_engine(options.engine, None, given).device(options.device) or usable_device(options.device or "cpu")
    # A training uses one core, so that one per core can run; but not several on one GPU.
    return open_engine(options.engine, options.jobs, given, light=device == "cpu"), device


class Progress(Listener):
    """Prints a line for each finished training."""

    def __init__(self) -> None:
        self.left, self.began = 0, time.monotonic()

    def round(self, task: QualityTask, trials: int) -> None:
        self.left = trials
        print(f"{task.name}: {trials} trainings can be run now", flush=True)

    def finished(self, trial: Trial, line: Mapping[str, Any]) -> None:
        self.left -= 1
        score = "failed" if "failed" in line else "diverged" if line["diverged"] else f"{line['validation']:.4g}"
        minutes = (time.monotonic() - self.began) / 60
        print(
            f"{minutes:7.1f} min, {self.left:4} left: {trial.name}, rate {trial.rate:g}, seed {trial.seed}: "
            f"{score} ({line['seconds']:.0f} s)",
            flush=True,
        )
