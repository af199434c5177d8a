"""Does one learning rate fit all settings? ``python benchmarks/rates.py TASK FOLDER`` trains each at five rates.

Presets have ``rate="adam"``, whose rate is 1e-2 for a base of usual weights. Each setting is trained at a quarter,
half, once, twice and four times that rate, with several seeds; the new head has a rate of its own, the same for all
settings, so that it does not favor one. Results are written to ``results/rates/TASK.jsonl``, one line per training; an
interrupted run resumes. On two idle cores the digits take half an hour, the others three to four hours with three
seeds.

``python benchmarks/rates.py bases FOLDER`` measures the weights of each task's base, for which
:func:`tnadapt.learning_rate` chooses the rate.

``python benchmarks/rates.py table`` writes the tables that ``docs/learning_rate.rst`` shows from the results:

- of equal betas and rates a factor of three apart, from ``results/quality`` and, of tasks that it does not have,
  ``python -m benchmarks.quality run TASK --profile day --seeds 1 --out benchmarks/results/rates/equal_betas``;
- of the powers of N / n in ``results/rates/power.jsonl``, which were trained with ``SPREAD = 0`` in
  ``tnadapt.algebra.units``;
- of norms in ``norm.jsonl``, trained with ``step_norm`` 1 for any number of weights, over the size of the base;
- of Adam's second beta, from ``results/quality/reviews.jsonl`` and ``beta2.jsonl``. The latter has the same settings
  trained with torch's 0.999: add ``"beta2": 0.999`` to the scale of ``benchmarks/quality/tasks/reviews.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formatting import list_table

from benchmarks.quality import methods, store
from benchmarks.quality import tasks as quality_tasks
from benchmarks.quality.comparison import control_of, dense_of, outcomes_of
from benchmarks.quality.tuning import held_out
from paper.registries import SOURCES, fetch
from tnadapt import presets
from tnadapt.algebra.units import RATE, WEIGHTS, step_norm
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Method, Spec, Study, Training
from tnadapt.finetune.grid import method_of
from tnadapt.finetune.results import read_lines
from tnadapt.torch import attach

RESULTS = Path(__file__).parent / "results" / "rates"
QUALITY = Path(__file__).parent / "results" / "quality"
#: Tasks of :mod:`benchmarks.quality` whose bases are measured.
BASES = ("digits", "reviews", "reviews-mpnet", "cifar10", "german")
#: Percent of the reviews that a model which has learned nothing classifies correctly, at most.
CHANCE = 55.0
DEFAULT = RATE
RATES = [DEFAULT * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]

P = presets
CONFIGS = {
    "digits": [
        P.tinylora(13), P.superlora(1, projection="linear", ratio=0.01), P.lorta(1, 5), P.lonkr(1, 3, split_size=6),
        P.unilora(100), P.fastfood(0.01), P.superlora(1), P.fourierft(50),
        P.superlora(4, projection="linear", ratio=0.1), P.vera(8), P.lokr(1), P.lorta(6, 3), P.lora(1), P.unilora(1000),
        P.loha(1), P.superlora(8), P.fastfood(0.1),
        P.lora(4), P.lora(16), P.dense(),
    ],
    "reviews": [
        P.tinylora(13), P.unilora(100), P.lorta(1, 5), P.superlora(1, projection="linear", ratio=0.01), P.unilora(1000),
        P.fourierft(100), P.superlora(1), P.vera(64), P.lorta(8, 3), P.lokr(4), P.lora(1), P.superlora(8),
        P.fastfood(0.01), P.lora(8), P.dense(),
    ],
}  # fmt: skip
CONFIGS["cifar10"] = CONFIGS["reviews"]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a task trains on, and how."""

    training: Training
    limit: int | None = None
    image_size: int | None = None

    def spec(self, name: str, folder: Path) -> Spec:
        given: dict[str, Any] = {}
        if name in SOURCES:
            model, data = fetch(name, folder)
            given = {"model": str(model), "data": str(data), "limit": self.limit, "image_size": self.image_size}
        return Spec(**given, cache=folder / "cache")


# The rates of the heads are those that are best for a head alone, of a factor of 4 apart. The betas are torch's.
TASKS = {
    "digits": _Settings(Training(epochs=25, batch=32, head_rate=0.004, beta2=0.999)),
    "reviews": _Settings(Training(epochs=2, batch=16, head_rate=0.001, beta2=0.999), limit=2000),
    "cifar10": _Settings(Training(epochs=2, batch=16, head_rate=0.001, beta2=0.999), limit=1500, image_size=56),
}


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The settings of a task, for a Study."""

    name: str

    def methods(self, shapes: Sequence[tuple[int, int]], layers: int) -> list[Method]:
        return [Method("dense", "", one) if one.format == "dense" and one.groups == "weight" and one.projection
                == "identity" else method_of(one) for one in CONFIGS[self.name]]  # fmt: skip


def run(name: str, folder: Path, seeds: int, jobs: int, engine: str = "local") -> Path:
    """Run the missing trainings of a task, and return its file of results."""
    kept, out = RESULTS / f"{name}.jsonl", folder / "runs" / f"rates-{name}"
    if kept.is_file() and not (out / "results.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, out / "results.jsonl")
    settings = TASKS[name]
    study = Study(settings.spec(name, folder), _Chosen(name), settings.training, RATES, seeds)
    study.run(out, jobs, engine=engine)
    shutil.copyfile(out / "results.jsonl", kept)
    return kept


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a task, with the test scores of the seeds at two rates."""

    name: str
    parameters: int
    #: The rate that suits the base.
    default: float
    #: The rate with the best mean validation score; of several that are equal, the nearest to the default.
    best: float
    test_best: tuple[float, ...]
    test_default: tuple[float, ...]
    validation: dict[float, float]

    @property
    def losses(self) -> tuple[float, ...]:
        """Points that the default loses against the best rate, on the test samples of each seed."""
        return tuple(100.0 * (a - b) for a, b in zip(self.test_best, self.test_default, strict=True))

    @property
    def loss(self) -> float:
        """Their mean."""
        return statistics.fmean(self.losses)

    @property
    def within(self) -> bool:
        """Whether the best rate is within a factor of 2 of the default."""
        return 0.5 <= self.best / self.default <= 2.0


def rows_of(name: str) -> list[Row]:
    """Return the rows of a task, from the fewest parameters to the most."""
    lines, default = read_lines(RESULTS / f"{name}.jsonl"), bases()[name]["rate"]
    by: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        if "key" in line:
            setting = f"{line['family']} {line['label']}".strip()
            by.setdefault(setting, {}).setdefault(line["rate"], {})[line["seed"]] = line
    rows = []
    for setting, rates in by.items():
        seeds = sorted(set.intersection(*(set(found) for found in rates.values())))
        if len(rates) < len(RATES) or not seeds:
            continue
        validation = {
            rate: statistics.fmean(found[seed]["validation"] or 0.0 for seed in seeds) for rate, found in rates.items()
        }
        best = max(validation, key=lambda rate: (validation[rate], -abs(RATES.index(rate) - RATES.index(default))))
        tests = {rate: tuple(found[seed]["test"] or 0.0 for seed in seeds) for rate, found in rates.items()}
        count = next(iter(rates[best].values()))["parameters"]
        rows.append(Row(setting, count, default, best, tests[best], tests[default], validation))
    return sorted(rows, key=lambda row: row.parameters)


def table(name: str) -> str:
    """Return the table of a task in reStructuredText."""
    rows = rows_of(name)
    (count,) = {len(row.test_best) for row in rows}
    text = [
        ("setting", "parameters", *(f"{rate:g}" for rate in RATES), "best", "test at best", "at the default", "lost")
    ]
    for row in rows:
        spread = f" ({', '.join(f'{one:+.1f}' for one in row.losses)})" if count > 1 else ""
        scores = [f"{100 * row.validation[rate]:.1f}" for rate in RATES]
        tests = [f"{100 * statistics.fmean(scores):.1f}" for scores in (row.test_best, row.test_default)]
        text.append((row.name, f"{row.parameters:,}", *scores, f"{row.best:g}", *tests, f"{row.loss:+.1f}{spread}"))
    return f"{_told(rows)} ({count} seed{'s' * (count > 1)}).\n\n{list_table(text)}"


def summary() -> str:
    """Return what the tables of all tasks say, in reStructuredText."""
    rows = [row for name in TASKS for row in rows_of(name)]
    return f"On all tasks, {_told(rows)}.\n"


def _told(rows: Sequence[Row]) -> str:
    lost = [row.loss for row in rows]
    return (
        f"{sum(row.within for row in rows)} of {len(rows)} settings have their best rate within a factor of 2 of the "
        f"default. The default loses more than half a point in {sum(one > 0.5 for one in lost)} settings, "
        f"{statistics.fmean(lost):.2f} points on average, and at most {max(lost):.2f}"
    )


def _trainings(name: str) -> list[dict[str, Any]]:
    """Return the trainings of a file, the last line of each; a key is unique within its task."""
    found = {(line.get("task"), line["key"]): line for line in read_lines(RESULTS / f"{name}.jsonl") if "key" in line}
    return list(found.values())


def _loss(line: dict[str, Any]) -> float:
    """Return the validation loss; infinity if it was not finite."""
    return math.inf if line["validation_loss"] is None else float(line["validation_loss"])


def power_table() -> str:
    """Return the powers of N / n by which the norm of a map's best step is larger, in reStructuredText.

    The best rate is that of the lowest validation loss, as a mean over seeds.
    """
    losses: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    sizes: dict[tuple[str, str, int], int] = {}
    for line in _trainings("power"):
        key = line["task"], f"{line['family']} {line['label']}".strip(), line["parameters"]
        losses.setdefault(key, {}).setdefault(line["rate"], []).append(_loss(line))
        sizes[key] = line["elements"]
    powers: dict[str, list[float]] = {}
    text = [("task", "map", "parameters", "rates tried", "best", "power")]
    for (task, name, parameters), rates in sorted(losses.items()):
        best = min(rates, key=lambda rate: statistics.fmean(rates[rate]))
        power = math.log(best / DEFAULT) / math.log(sizes[task, name, parameters] / parameters)
        powers.setdefault(task, []).append(power)
        shown = f"{best:g}{' (the edge)' * (best in (min(rates), max(rates)))}"
        text.append((task, name, f"{parameters:,}", str(len(rates)), shown, f"{power:.2f}"))
    head = "; ".join(
        f"{task}: {statistics.fmean(own):.2f} on average, {min(own):.2f} to {max(own):.2f} ({len(own)} maps)"
        for task, own in powers.items()
    )
    return f"{head}.\n\n{list_table(text)}"


def norm_table() -> str:
    """Return the norms of the best steps, trained with a norm of 1, and the sizes of the bases, in reStructuredText.

    The best rate of a setting is that of the lowest validation loss. A line has the geometric mean over settings. The
    rates of CIFAR-10 and the reviews are those of ``norm.jsonl``.
    """
    losses: dict[tuple[int, str], dict[str, dict[float, list[float]]]] = {}
    own = {"task": "digits", "weights": WEIGHTS}
    digits = [own | line for line in _trainings("digits")]
    for line in [*digits, *_trainings("norm")]:
        settings = losses.setdefault((line["weights"], line["task"]), {})
        rates = settings.setdefault(f"{line['family']} {line['label']}", {})
        rates.setdefault(line["rate"], []).append(_loss(line))
    text: list[Sequence[object]] = [
        ("task", "weights", "settings", "norm of the best step", "root mean square of the weights", "quotient")
    ]
    for (weights, task), found in sorted(losses.items()):
        whole = {name: rates for name, rates in found.items() if len(rates) == len(RATES)}
        best = [min(rates, key=lambda rate: statistics.fmean(rates[rate])) for rates in whole.values()]
        norm, size = statistics.geometric_mean(best) / DEFAULT, bases()[task]["rms"]
        text.append((task, weights, len(whole), f"{norm:.2f}", f"{size:.3f}", f"{norm / size:.0f}"))
    return list_table(text)


def measure_bases(folder: Path) -> None:
    """Measure the adapted weights of each task's base."""
    lines = []
    for name in BASES:
        task = quality_tasks.find(name)
        model = task.open("small", folder / "cache", "cpu").base  # type: ignore[attr-defined]
        adapter = attach(model, presets.lora(1), task.targets)
        weights = [target.select(model.get_parameter(target.name).detach()).double() for target in adapter.targets]
        elements = sum(weight.numel() for weight in weights)
        size = math.sqrt(sum(float(weight.square().sum()) for weight in weights) / elements)
        lines.append({
            "task": name, "weights": len(weights), "elements": elements, "rms": round(size, 5),
            "rate": adapter.learning_rate(),
        })  # fmt: skip
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (RESULTS / "bases.jsonl").write_text(text, encoding="utf-8")


@functools.cache
def bases() -> dict[str, dict[str, Any]]:
    """Return what was measured of each task's base."""
    return {line["task"]: line for line in read_lines(RESULTS / "bases.jsonl")}


def equal_betas_table() -> str:
    """Return how near the default is to the best rate with equal betas, in reStructuredText.

    For each task, of tnadapt's settings and of the references, with the first seed.
    """
    text: list[Sequence[object]] = [(
        "task", "weights", "their root mean square", "norm of the best step, over that", "default", "settings",
        "default is the best", "within a factor of 3", "loss of the default", "largest",
    )]  # fmt: skip
    ratios: list[float] = []
    for name in BASES:
        task = quality_tasks.find(name)
        found = store.read(QUALITY, name, "small") or store.read(RESULTS / "equal_betas", name, "small")
        if found is None:
            continue
        outcomes = outcomes_of(task, found.records.values())
        control, dense = control_of(task, outcomes), dense_of(outcomes)
        if control is None or dense is None:
            raise TnadaptError(f"{name} has no results of dense updates or of a control")
        whole = task.quality(dense.mean) - task.quality(control.mean)
        base = bases()[name]
        default = base["rate"]
        settings: dict[str, dict[float, dict[str, Any]]] = {}
        for line in found.records.values():
            if methods.find(line["method"]).scaled and line["seed"] == 0:
                settings.setdefault(f"{line['method']} {line['label']}", {})[line["rate"]] = line
        tried = [lines for lines in settings.values() if default in lines and len(lines) > 2]
        best = [max(sorted(lines), key=lambda rate, lines=lines: held_out(task, [lines[rate]])) for lines in tried]
        tests = [(lines[rate]["test"], lines[default]["test"]) for lines, rate in zip(tried, best, strict=True)]
        lost = [(task.quality(one) - task.quality(other)) / whole for one, other in tests]
        own = [rate / default for rate in best]
        norm = statistics.geometric_mean(best) / RATE * step_norm(base["weights"])
        ratios += own
        text.append((
            name, base["weights"], f"{base['rms']:.3f}", f"{norm / base['rms']:.0f}", f"{default:g}", len(own),
            sum(ratio == 1.0 for ratio in own), sum(map(_within_three, own)), f"{100 * statistics.fmean(lost):.0f} %",
            f"{100 * max(lost):.0f} %",
        ))  # fmt: skip
    return (
        f"{sum(map(_within_three, ratios))} of {len(ratios)} settings have their best rate within a factor of 3 of the "
        f"default, and {sum(ratio == 1.0 for ratio in ratios)} at the default itself.\n\n{list_table(text)}"
    )


def _within_three(ratio: float) -> bool:
    return 0.3 < ratio < 3.4  # rates have two digits


def beta2_table() -> str:
    """Return scores of the reviews with the default betas and with torch's, in reStructuredText.

    Only trainings at the default rate count, and seeds that both have.
    """
    files = (RESULTS / "beta2.jsonl", QUALITY / "reviews.jsonl")
    old, new = ({line["key"]: line for line in read_lines(path) if "key" in line} for path in files)
    scores: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for key in old.keys() & new.keys():
        line = new[key]
        if line["library"] == "tnadapt" and line["rate"] == DEFAULT:
            pair = (100.0 * old[key]["test"], 100.0 * line["test"])
            scores.setdefault((line["parameters"], f"{line['title']}, {line['label']}"), []).append(pair)
    text = [("setting", "parameters", "seeds", "β₂ = 0.999", "lowest", "β₂ = 0.9", "lowest")]
    worst: list[tuple[float, float]] = []
    for (parameters, name), pairs in sorted(scores.items()):
        columns = list(zip(*pairs, strict=True))
        worst.append((min(columns[0]), min(columns[1])))
        cells = (f"{value:.1f}" for column in columns for value in (statistics.fmean(column), min(column)))
        text.append((name, f"{parameters:,}", str(len(pairs)), *cells))
    means = [statistics.fmean(pair[place] for pairs in scores.values() for pair in pairs) for place in (0, 1)]
    failed = [sum(lowest[place] < CHANCE for lowest in worst) for place in (0, 1)]
    return (
        f"With 0.999, {failed[0]} of {len(worst)} settings end below {CHANCE:g} % with some seed; with 0.9, "
        f"{failed[1] or 'none'}. The mean test accuracy is {means[0]:.1f} and {means[1]:.1f} %.\n\n{list_table(text)}"
    )


def main() -> None:
    """Run a task, or write the tables."""
    parser = argparse.ArgumentParser(description="Settings at several learning rates.")
    parser.add_argument(
        "task",
        choices=[*TASKS, "bases", "table"],
        help="a task to run, what to measure, or table: only write tables",
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of models and data; needed to run a task")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default 3")
    parser.add_argument("--jobs", type=int, default=2, help="parallel trainings; default 2")
    parser.add_argument("--engine", default="local", help="local (the default), ray or slurm")
    given = parser.parse_args()
    if given.task != "table" and given.folder is None:
        parser.error("give a folder for models and data")
    if given.task == "bases":
        measure_bases(given.folder)
    elif given.task != "table":
        run(given.task, given.folder, given.seeds, given.jobs, given.engine)
    tables = {name: table(name) for name in TASKS if (RESULTS / f"{name}.jsonl").is_file()}
    tables |= {
        "summary": summary(), "power": power_table(), "norm": norm_table(), "beta2": beta2_table(),
        "equal_betas": equal_betas_table(),
    }  # fmt: skip
    for name, text in tables.items():
        path = RESULTS / f"{name}.rst"
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
