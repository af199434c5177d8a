"""What the paper claims, and what results say of it: pairs of settings trained alike, seed by seed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from tnadapt import Config
from tnadapt.finetune.report import points_in
from tnadapt.reproduce import open_recipe
from tnadapt.reproduce.diffusion.generation import generated_in
from tnadapt.reproduce.similarity import summary

__all__ = ["Study", "first_images", "page", "studies"]

ORDER = ("cifar10", "reviews", "digits", "svhn-mnist", "mnist-svhn", "geometry")
REFERENCES = ("head alone", "as pretrained", "dense")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting at its rate.

    Attributes
    ----------
    arm, label : str
    config : Config, optional
    parameters : int
    values, held_out : tuple of float
        Quality, a seed each: measured, and what the rate was chosen by. More is better in both.
    edge : bool
        Whether its rate is the least or the greatest of those that were tried: another might be better.
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
class Study:
    """A recipe's results.

    Attributes
    ----------
    name, title, about : str
    quality : str
        What the values are.
    margin : float
        So little of it is no harm.
    settings : tuple of Setting
    spaces : list of dict
        Of the geometry: its lines.
    pictured : bool
        Whether it has pictures of its own.
    """

    name: str
    title: str
    about: str
    quality: str
    margin: float = 1.0
    settings: tuple[Setting, ...] = ()
    spaces: tuple[dict[str, Any], ...] = ()
    pictured: bool = True

    def of(self, config: Config) -> Setting | None:
        """The setting of a config, if it was run."""
        return next((one for one in self.settings if one.config == config), None)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two settings that differ in one thing: the one that the paper says is better first."""

    first: Setting
    second: Setting

    @property
    def gains(self) -> tuple[float, ...]:
        """Of the first over the second, seed by seed: both had the same order of samples and the same new head."""
        return tuple(a - b for a, b in zip(self.first.values, self.second.values, strict=True))


# -- Results -----------------------------------------------------------------------------------


def studies(folder: Path) -> dict[str, Study]:
    """Of every recipe that has results, by name; of a diffusion model, the loss beside FID."""
    found = {}
    for name in ORDER:
        if (folder / name / "results.jsonl").is_file():
            found[name] = _study(name, folder / name)
            if open_recipe(name, "mini").kind == "diffusion":
                found[f"{name}, loss"] = _losses(found[name])
    return found


def _losses(study: Study) -> Study:
    """The same settings by their loss on the images held out, in thousandths."""
    settings = tuple(
        dataclasses.replace(one, values=tuple(1000 * value for value in one.held_out)) for one in study.settings
    )
    return dataclasses.replace(
        study, name=f"{study.name}, loss", about="the same trainings", quality="1,000 × loss held out, less is better",
        margin=0.5, settings=settings, pictured=False,
    )  # fmt: skip


def _study(name: str, folder: Path) -> Study:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    recipe, study = open_recipe(name, "mini"), lines[0]["study"]
    records = [line for line in lines if "key" in line]
    seeds = len({line["seed"] for line in records})
    rates = sorted({line["rate"] for line in records if line["config"]})
    sessions = [line["session"] for line in lines if "session" in line]
    machine = f"{sessions[-1]['cores']} cores of {sessions[-1]['processor']}, torch {sessions[-1]['versions']['torch']}"
    tuned = f"rates {', '.join(f'{rate:g}' for rate in rates)}; {seeds} seeds; {len(records)} trainings on {machine}"
    if recipe.kind == "diffusion":
        about = f"{study['source']} to {study['target']}, {study['samples']['training']:,} images to train on; {tuned}"
        points = generated_in(folder / "results.jsonl")
        whole = [point for point in points if None not in point.values("fid")]
        about += _left_out(len(points) - len(whole))
        settings = tuple(_generated(point, rates) for point in whole)
        floor = [record["real"]["metrics"]["fid"] for record in points[0].records if "real" in record]
        if floor:
            about += f"; {study['generated']:,} real images have a FID of {statistics.fmean(floor):.0f}"
        return Study(name, recipe.title, about, "FID, less is better", 5.0, settings)
    about = f"{study['problem']}; {' / '.join(f'{n:,}' for n in study['samples'].values())} samples; {tuned}"
    if recipe.kind == "geometry":
        text = (folder / "geometry.jsonl").read_text(encoding="utf-8")
        return Study(name, recipe.title, about, "", spaces=tuple(json.loads(line) for line in text.splitlines()))
    points = points_in(folder / "results.jsonl")
    found = tuple(
        Setting(
            point.method.family, point.method.label, point.method.config, point.parameters,
            tuple(100 * value for value in point.test), tuple(100 * value for value in point.validation),
            point.rate in (rates[0], rates[-1]),
        )
        for point in points if not point.diverged
    )  # fmt: skip
    return Study(name, recipe.title, about + _left_out(len(points) - len(found)), "test accuracy, %", 1.0, found)


def _left_out(count: int) -> str:
    return f"; {count} settings diverged at every rate and are left out" if count else ""


def _generated(point: Any, rates: Sequence[float]) -> Setting:
    """A generated setting; of FID and loss less is better, so their signs are turned."""
    config = point.records[0]["config"]
    return Setting(
        point.arm, point.setting, config and Config.from_dict(config).replace(seed=0), point.parameters,
        tuple(-value for value in point.values("fid")), tuple(-record["validation_loss"] for record in point.records),
        point.rate in (rates[0], rates[-1]),
    )  # fmt: skip


def first_images(folder: Path) -> list[str]:
    """Of every setting of generated images, the file of those of its first seed, and that of real ones."""
    first = [point.records[0] for point in generated_in(folder / "results.jsonl")]
    return [one["images"] for one in [*first, *(line["real"] for line in first if "real" in line)]]


# -- Pairs -------------------------------------------------------------------------------------


def _pairs(study: Study, other: Callable[[Config], Iterable[Config]]) -> list[Pair]:
    """Every setting with those that ``other`` says it is better than."""
    found = []
    for one in study.settings:
        if one.config is not None and one.arm not in REFERENCES:
            against = [study.of(config) for config in other(one.config)]
            found += [Pair(one, two) for two in against if two is not None]
    return found


def _unreshaped(config: Config) -> Iterable[Config]:
    if config.fold == "hypercube" and config.order == 2 and config.format == "cp" and config.splits == 1:
        yield config.replace(fold="stack")


def _few(study: Study) -> int:
    """What few parameters are: no more than the least LoRA has."""
    return min((one.parameters for one in study.settings if one.arm == "LoRA"), default=0)


def _more_groups(study: Study) -> list[Pair]:
    """One group against several, of the same format and fold, with equally many parameters."""
    found = []
    for one in study.settings:
        if one.config is not None and one.config.groups == 1 and one.arm not in REFERENCES:
            found += [
                Pair(one, two)
                for two in study.settings
                if two.config is not None
                and isinstance(two.config.groups, int)
                and two.config.groups > 1
                and abs(two.parameters / one.parameters - 1) < 0.03
                and two.config.replace(groups=1, rank=1) == one.config.replace(rank=1)
            ]
    return found


def _nonlinear(config: Config) -> Iterable[Config]:
    if config.projection in ("linear", "linear_v2"):
        yield config.replace(projection="non" + config.projection)


def _second_version(config: Config) -> Iterable[Config]:
    if config.projection == "linear":
        yield config.replace(projection="linear_v2")


def _unshuffled(config: Config) -> Iterable[Config]:
    if config.projection == "shuffle":
        yield config.replace(projection="identity")


def _untrained(study: Study, least: int, arms: tuple[str, ...] = ("",)) -> list[Pair]:
    """The settings of so few parameters, of these arms, against what is there without an adapter."""
    base = next((one for one in study.settings if one.config is None), None)
    few = [
        one for one in study.settings if one.config is not None and one.parameters <= least and one.arm.startswith(arms)
    ]
    return [] if base is None else [Pair(one, base) for one in sorted(few, key=lambda one: one.parameters)]


def _within(study: Study, times: int) -> list[Pair]:
    """Every rank of LoRA, and of what has so many times fewer parameters the best on what rates are chosen by."""
    found = []
    for one in study.settings:
        if one.arm == "LoRA":
            small = [
                other
                for other in study.settings
                if other.config is not None
                and other.arm not in (*REFERENCES, "LoRA")
                and times * other.parameters <= one.parameters
            ]
            found += [Pair(max(small, key=lambda other: statistics.fmean(other.held_out)), one)] if small else []
    return found


# -- The page ----------------------------------------------------------------------------------

HEAD = """# The paper's claims, run again

Made by `python benchmarks/paper.py` of the results in `benchmarks/results/paper`, which `tnadapt reproduce NAME --scale
mini` made: miniatures of the paper's experiments, on two processor cores, with models and data of package registries.
What the paper trains on a graphics card has not been run at its own scale; a claim that does not come out here is not
refuted there.

Every setting was tried at the same rates, and stands at the one that was better on samples held out for that, with the
first seed or with all; the test samples chose nothing. A ° marks what stands at the least or the greatest of the rates:
another might do better by it. Two settings are compared seed by seed: with one seed, both get the samples in the same
order, start from the same new head where there is one, and draw the same F. The *gain* is the mean of these
differences, in the units of the study (points of accuracy; FID and loss, their signs turned), with the 95 % interval
of Student's t over seeds. With three seeds such an interval is wide. All seeds have the same samples, so what another
test set would give is not in it; and of as many intervals as here are shown, some miss.

*comes out*: the interval of the mean gain of all pairs is above 0. *the other way*: it is below. *not decided*: it is
neither. That something does *no harm*, or is as good, needs an interval above -1 point of accuracy, -5 of FID, or
-0.0005 of loss.

FID of some hundred images is wide, and the miniature of the diffusion model generates strokes rather than digits. So
its loss on images held out stands beside FID: every model meets the same images with the same noise. By it the rates
were chosen, too, alike for all.
"""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper.

    Attributes
    ----------
    title, place, about : str
        In words, where it stands, and how it is tried.
    pairs : callable
        Of a study.
    harmless : bool
        Whether it says that something does no harm, and not that it gains.
    as_good : bool
        Whether it says that something is as good, and gains otherwise.
    """

    title: str
    place: str
    about: str
    pairs: Callable[[Study], list[Pair]]
    harmless: bool = False
    as_good: bool = False


CLAIMS = (
    Claim(
        "SuperLoRA needs 3 times fewer parameters than LoRA for the same quality",
        "abstract, 4.1, A.7 (3 to 10 times)",
        "Against every rank of LoRA, of all other settings with a third of its parameters or fewer the one that is "
        "best on the held-out samples.",
        lambda study: _within(study, 3),
        as_good=True,
    ),
    Claim(
        "SuperLoRA needs 10 times fewer parameters than LoRA for the same quality",
        "abstract, 4.1, A.7 (3 to 10 times)",
        "The same with a tenth of its parameters or fewer.",
        lambda study: _within(study, 10),
        as_good=True,
    ),
    Claim(
        "Reshaping is better than stacking",
        "4.2, figure 5b",
        "The same groups and rank, folded to a square and stacked. The square has fewer parameters.",
        lambda study: _pairs(study, _unreshaped),
    ),
    Claim(
        "Fewer groups are better with equally many parameters",
        "4.2, figure 5a (where parameters are few)",
        "One group against several, with equally many parameters (within 3 %).",
        _more_groups,
    ),
    Claim(
        "LoRTA and LoNKr reach where others have no point, and still learn",
        "4.2, figure 6",
        "Of these two, all settings with at most a fifth of LoRA's parameters at rank 1, against no adapter.",
        lambda study: _untrained(study, _few(study) // 5, ("LoRTA", "LoNKr")),
    ),
    Claim(
        "31 parameters still learn something",
        "4.2, figure 10",
        "All settings of at most 31 parameters, against no adapter.",
        lambda study: _untrained(study, 31),
    ),
    Claim(
        "A linear projection is better than a nonlinear one",
        "A.6, figure 17",
        "The same setting, linear against nonlinear, and linear_v2 against nonlinear_v2. The nonlinear ones have the "
        "start of this library, from which they learn at their first step: from a start at zero their gradient is "
        "zero, and they never would.",
        lambda study: _pairs(study, _nonlinear),
    ),
    Claim(
        "linear is better than linear_v2 where parameters are few",
        "4.2, figure 7a",
        "The same setting with the other F, if it has no more parameters than LoRA at rank 1.",
        lambda study: [pair for pair in _pairs(study, _second_version) if pair.first.parameters <= _few(study)],
    ),
    Claim(
        "Shuffling does no harm",
        "4.2, figure 7b",
        "The same setting with and without a shuffle.",
        lambda study: _pairs(study, _unshuffled),
        harmless=True,
    ),
)


def page(found: dict[str, Study]) -> str:
    """The page, as Markdown."""
    compared = [study for study in found.values() if study.settings]
    text = [HEAD, "\n## What was run\n\n| study | what |\n|---|---|\n"]
    text += [f"| {study.name} | {study.title}: {study.about} |\n" for study in found.values()]
    text += ["\n## In one table\n\n", _row(["claim", *(study.name for study in compared)])]
    text += [_row(["---"] * (len(compared) + 1))]
    for claim in CLAIMS:
        text += [_row([claim.title, *(_verdict(claim, study) for study in compared)])]
    if "geometry" in found:
        text += ["\nThe distance to the dense update has a section of its own, the last.\n"]
    for study in compared:
        if not study.pictured:
            continue
        text += [f"\n## {study.name}: {study.title}\n\n", f"{study.about}.\n\n"]
        text += [
            f"![{study.title}: {study.quality} against parameters, with each method's front]({study.name}/figure.png)\n"
        ]
        if (study.quality).startswith("FID"):
            text += [f"\n![Images that each setting generates]({study.name}/generated.png)\n"]
    for claim in CLAIMS:
        text += [f"\n## {claim.title}\n\nIn the paper: {claim.place}. {claim.about}\n"]
        for study in compared:
            if pairs := claim.pairs(study):
                text += [f"\n{study.name}, {study.quality}: {_told(claim, study, pairs)}.\n\n", *_table(pairs)]
    text += _geometry(found)
    return "".join(text)


def _verdict(claim: Claim, study: Study) -> str:
    pairs = claim.pairs(study)
    if not pairs:
        return "–"
    mean, low, high = interval(_over_pairs(pairs))
    if claim.harmless:
        word = "harm" if high < 0 else "no harm" if low > -study.margin else "not decided"
    else:
        least = -study.margin if claim.as_good else 0.0
        word = "comes out" if low > least else "the other way" if high < least else "not decided"
    return f"{word} ({mean:+.1f}, {_several(len(pairs), 'pair')})"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _told(claim: Claim, study: Study, pairs: Sequence[Pair]) -> str:
    mean, low, high = interval(_over_pairs(pairs))
    won = sum(statistics.fmean(pair.gains) > 0 for pair in pairs)
    edges = sum(pair.first.edge or pair.second.edge for pair in pairs)
    told = (
        f"{_verdict(claim, study)}; mean gain {mean:+.2f}, from {low:+.2f} to {high:+.2f}; "
        f"the first is ahead in {won} of {len(pairs)}"
    )
    return told + (f"; in {edges}, one stands at the least or greatest rate tried (°)" if edges else "")


def _table(pairs: Sequence[Pair]) -> list[str]:
    text = [_row(["first", "parameters", "", "second", "parameters", "", "gain"]), _row(["---"] * 7)]
    for pair in pairs:
        mean, low, high = interval(pair.gains)
        cells = [cell for one in (pair.first, pair.second) for cell in _cells(one)]
        text.append(_row([*cells, f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"]))
    return text


def _cells(one: Setting) -> tuple[str, str, str]:
    return one.name, f"{one.parameters:,}", _mean(one.values) + "°" * one.edge


def _over_pairs(pairs: Sequence[Pair]) -> tuple[float, ...]:
    """The mean gain of all pairs, seed by seed."""
    return tuple(statistics.fmean(column) for column in zip(*(pair.gains for pair in pairs), strict=True))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of the 95 % interval of Student's t.

    Examples
    --------
    >>> [round(value, 3) for value in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{abs(statistics.fmean(values)):.1f}{spread}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _geometry(found: dict[str, Study]) -> list[str]:
    if "geometry" not in found:
        return []
    study = found["geometry"]
    text = [
        "\n## The distance to the dense update shrinks, with reshaping above all\n\n",
        f"In the paper: A.4, figure 14. {study.about}. Means over weights, and the difference to LoRA's d_E seed by "
        "seed (below 0: nearer to the dense update). A d_E above 1 says that no update at all would be nearer. How "
        "long an update is depends on its rate, so both are shown.\n",
        "\nEach at its own best rate:\n\n", *_spaces([row for row in study.spaces if not row["one_rate"]]),
        "\nAll at the dense update's best rate, as the paper has one rate for all:\n\n",
        *_spaces([row for row in study.spaces if row["one_rate"]]),
    ]  # fmt: skip
    return [*text, f"\n![Singular spaces and distance, weight by weight]({study.name}/figure.png)\n"]


def _spaces(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line an arm: the mean similarities, the distance, and how far that is from LoRA's."""
    seeds = sorted({row["seed"] for row in rows})

    def of(arm: str, seed: int | None = None) -> dict[str, Any]:
        (means,) = summary([row for row in rows if row["arm"] == arm and seed in (None, row["seed"])])
        return means

    heads = ["method", "parameters", "rate", "d_L", "d_R", "d_E", "d_E less LoRA's"]
    text = [_row(heads), _row(["---"] * len(heads))]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        apart = [of(arm, seed)["d_euclid"] - of("LoRA", seed)["d_euclid"] for seed in seeds]
        mean, low, high = interval(apart)
        rate = next(row["rate"] for row in rows if row["arm"] == arm)
        spaces = [f"{of(arm)[name]:.3f}" for name in ("d_left", "d_right", "d_euclid")]
        told = "" if arm == "LoRA" else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        text.append(_row([arm, f"{of(arm)['parameters']:,}", f"{rate:g}", *spaces, told]))
    return text
