"""Results of the recipes as studies: every setting at its chosen rate, with its quality per seed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tnadapt import Config
from tnadapt.finetune import Training
from tnadapt.finetune.pareto_report import method_in, points_in
from tnadapt.finetune.results import read_lines

from .diffusion.generation import generated_in
from .phrases import several
from .recipe import open_recipe

__all__ = ["ORDER", "ComparedPair", "ComparedStudy", "Setting", "first_images", "studies"]


ORDER = ("cifar10", "reviews", "digits", "svhn-mnist", "mnist-svhn", "geometry")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting at its chosen rate.

    Attributes
    ----------
    arm, label : str
    config : Config, optional
    parameters : int
    values, held_out : tuple of float
        Quality per seed: the measured one, and the one by which the rate was chosen. Higher is better in both.
    edge : bool
        Whether its rate is the lowest or highest of those tried, so that a rate beyond might be better.
    """

    arm: str
    label: str
    config: Config | None
    parameters: int
    values: tuple[float, ...]
    held_out: tuple[float, ...]
    edge: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.label}" if self.label else self.arm


@dataclasses.dataclass(frozen=True)
class ComparedStudy:
    """A recipe's results.

    Attributes
    ----------
    name, title, about : str
    quality : str
        Name of the measure.
    margin : float
        A loss of less than this counts as no harm.
    decimals : int
        Decimals of displayed values.
    settings : tuple of Setting
    spaces : list of dict
        The lines of the geometric analysis.
    pictured : bool
        Whether the study has figures.
    """

    name: str
    title: str
    about: str
    quality: str
    margin: float = 1.0
    decimals: int = 1
    settings: tuple[Setting, ...] = ()
    spaces: tuple[dict[str, Any], ...] = ()
    pictured: bool = True

    def of(self, config: Config) -> Setting | None:
        """Return the setting of a config, or None if it was not run."""
        return next((one for one in self.settings if one.config == config), None)


@dataclasses.dataclass(frozen=True)
class ComparedPair:
    """Two settings that differ in one respect; the one that the paper claims to be better is first."""

    first: Setting
    second: Setting

    @property
    def gains(self) -> tuple[float, ...]:
        """Gains of the first over the second per seed; both had the same order of samples and the same new head."""
        return tuple(a - b for a, b in zip(self.first.values, self.second.values, strict=True))


# -- Results -----------------------------------------------------------------------------------


def studies(folder: Path) -> dict[str, ComparedStudy]:
    """Return the study of every recipe with results, by name; for a diffusion model one each by FID, IS and loss."""
    found = {}
    for name in ORDER:
        if (folder / name / "results.jsonl").is_file():
            found[name] = _study(name, folder / name)
            if open_recipe(name, "mini").kind == "diffusion":
                found.update(_other_measures(found[name], folder / name))
    return found


def _other_measures(study: ComparedStudy, folder: Path) -> dict[str, ComparedStudy]:
    """Return the same trainings compared by the distance of their IS to that of real images, and by their loss."""
    points, rates = _points_in(folder)
    distances = tuple(
        _generated(point, rates, tuple(-value for value in point.values("is_distance"))) for point in points
    )
    losses = tuple(
        dataclasses.replace(one, values=tuple(1000 * value for value in one.held_out)) for one in study.settings
    )
    same = dataclasses.replace(study, about="the same trainings", pictured=False)
    measures = {
        "IS": dataclasses.replace(
            same, quality="distance of IS to that of real images, lower is better", margin=0.1, decimals=2,
            settings=distances,
        ),
        "loss": dataclasses.replace(
            same, quality="1,000 × held-out loss, lower is better", margin=0.5, settings=losses
        ),
    }  # fmt: skip
    return {
        f"{study.name}, {what}": dataclasses.replace(one, name=f"{study.name}, {what}")
        for what, one in measures.items()
    }


def _points_in(folder: Path) -> tuple[list[Any], list[float]]:
    """Return the settings of a diffusion model whose images could be measured, and the rates that were tried."""
    points = [point for point in generated_in(folder / "results.jsonl") if None not in point.values("fid")]
    return points, _rates([record for record in read_lines(folder / "results.jsonl") if "key" in record])


def _rates(records: Sequence[dict[str, Any]]) -> list[float]:
    return sorted({record["rate"] for record in records if record["config"]})


def _study(name: str, folder: Path) -> ComparedStudy:
    lines = read_lines(folder / "results.jsonl")
    recipe, study = open_recipe(name, "mini"), lines[0]["study"]
    records = [line for line in lines if "key" in line]
    seeds, methods = len({line["seed"] for line in records}), {method_in(line) for line in records}
    rates = _rates(records)
    sessions = [line["session"] for line in lines if "session" in line]
    machine = f"{sessions[-1]['cores']} cores of {sessions[-1]['processor']}, torch {sessions[-1]['versions']['torch']}"
    tuned = f"rates {', '.join(f'{rate:g}' for rate in rates)}; {seeds} seeds; {len(records):,} trainings on {machine}"
    if recipe.kind == "diffusion":
        about = (
            f"{study['source']} to {study['target']}, {study['samples']['training']:,} images to train on; "
            f"{study['steps']:,} steps of {_how(study)}; {tuned}"
        )
        points, _ = _points_in(folder)
        finished = len(generated_in(folder / "results.jsonl"))
        about += _left_out(len(methods) - finished, "without all seeds")
        about += _left_out(finished - len(points), "whose images could not be measured")
        settings = tuple(_generated(point, rates, tuple(-fid for fid in point.values("fid"))) for point in points)
        return ComparedStudy(
            name, recipe.title, about + _reached(points, study), "FID, lower is better", 5.0, 1, settings
        )
    about = f"{study['problem']}; {' / '.join(f'{n:,}' for n in study['samples'].values())} samples; {_passes(study)}"
    if kept := max(record.get("kept", 0) for record in records):
        about += (
            f"; in addition to every adapter, and not counted, {kept:,} parameters of the model are trained (a head)"
        )
    about += f"; {tuned}"
    if recipe.kind == "geometry":
        return ComparedStudy(name, recipe.title, about, "", spaces=tuple(read_lines(folder / "geometry.jsonl")))
    points = points_in(folder / "results.jsonl")
    whole = [point for point in points if not point.diverged]
    about += _left_out(len(methods) - len(points), "without all seeds")
    about += _left_out(len(points) - len(whole), "that diverged at every rate")
    found = tuple(
        Setting(
            point.method.family, point.method.label, point.method.config, point.parameters,
            tuple(100 * value for value in point.test), tuple(100 * value for value in point.validation),
            point.rate in (rates[0], rates[-1]),
        )
        for point in whole
    )  # fmt: skip
    return ComparedStudy(name, recipe.title, about, "test accuracy, %", 1.0, 1, found)


def _how(study: dict[str, Any]) -> str:
    """Describe optimizer, schedule and batch; fields that a study lacks have the defaults of Training."""
    usual = Training(epochs=1, batch=1)
    names = {"adamw": "AdamW", "sgd": "SGD", "cosine": "a cosine", "onecycle": "OneCycle"}
    optimiser, shape = (study.get(name, getattr(usual, name)) for name in ("optimiser", "shape"))
    return f"{names.get(optimiser, optimiser)} with {names.get(shape, shape)}, batches of {study['batch']}"


def _passes(study: dict[str, Any]) -> str:
    steps = study["epochs"] * -(-study["samples"]["training"] // study["batch"])
    return f"{several(study['epochs'], 'epoch')}, {steps:,} steps, of {_how(study)}"


def _left_out(count: int, why: str) -> str:
    return f"; left out: {several(count, 'setting')} {why}" if count else ""


def _reached(points: Sequence[Any], study: dict[str, Any]) -> str:
    """Describe the quality of the dense update, between that of the pretrained model and of real images."""

    def of(records: Iterable[dict[str, Any]], metric: str) -> float:
        return statistics.fmean(record["metrics"][metric] for record in records)

    floors = [record["real"] for record in points[0].records if "real" in record]
    dense = next((point.records for point in points if point.arm == "dense"), None)
    if not floors or dense is None:
        return ""
    compared = {"as pretrained": points[0].records, "by the dense update": dense, "real": floors}
    told = ", ".join(
        f"{words} {of(some, 'fid'):.0f}, {of(some, 'is'):.1f} and {100 * of(some, 'agreement'):.0f} %"
        for words, some in compared.items()
    )
    return (
        f"; FID, IS, and how many of {study['generated']:,} images a classifier of {study['target']} assigns to the "
        f"requested class: {told}"
    )


def _generated(point: Any, rates: Sequence[float], values: tuple[float, ...]) -> Setting:
    """Return a setting of a diffusion model; its loss is negated, so that higher is better."""
    config = point.records[0]["config"]
    return Setting(
        point.arm, point.setting, config and Config.from_dict(config).replace(seed=0), point.parameters,
        values, tuple(-record["validation_loss"] for record in point.records), point.rate in (rates[0], rates[-1]),
    )  # fmt: skip


def first_images(folder: Path) -> list[str]:
    """Return the image files of the first seed of every setting, and that of real images."""
    first = [point.records[0] for point in generated_in(folder / "results.jsonl")]
    return [one["images"] for one in [*first, *(line["real"] for line in first if "real" in line)]]
