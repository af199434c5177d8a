"""The paper's claims checked against results: pairs of settings with equal training, compared seed by seed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from tnadapt import Config
from tnadapt.finetune import Training
from tnadapt.finetune.pareto_report import method_in, points_in
from tnadapt.finetune.results import read_lines

from .diffusion.generation import generated_in
from .recipe import open_recipe
from .similarity import summary

__all__ = ["ComparedStudy", "first_images", "page", "studies"]

ORDER = ("cifar10", "reviews", "digits", "svhn-mnist", "mnist-svhn", "geometry")
# The stacks of recipes whose weights have several widths: as wide as the widest weight.
STACKS = ((2208, 64),)
RESHAPED, STACKED = "SuperLoRA 2D, reshape", "SuperLoRA 2D"
REFERENCES = ("head alone", "as pretrained", "dense")


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
    """Describe optimiser, schedule and batch; fields that a study lacks have the defaults of Training."""
    usual = Training(epochs=1, batch=1)
    names = {"adamw": "AdamW", "sgd": "SGD", "cosine": "a cosine", "onecycle": "OneCycle"}
    optimiser, shape = (study.get(name, getattr(usual, name)) for name in ("optimiser", "shape"))
    return f"{names.get(optimiser, optimiser)} with {names.get(shape, shape)}, batches of {study['batch']}"


def _passes(study: dict[str, Any]) -> str:
    steps = study["epochs"] * -(-study["samples"]["training"] // study["batch"])
    return f"{_several(study['epochs'], 'epoch')}, {steps:,} steps, of {_how(study)}"


def _left_out(count: int, why: str) -> str:
    return f"; left out: {_several(count, 'setting')} {why}" if count else ""


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


# -- Pairs -------------------------------------------------------------------------------------


def _pairs(study: ComparedStudy, other: Callable[[Config], Iterable[Config]]) -> list[ComparedPair]:
    """Pair every setting with those that, according to ``other``, it should be better than."""
    found = []
    for one in study.settings:
        if one.config is not None and one.arm not in REFERENCES:
            against = [study.of(config) for config in other(one.config)]
            found += [ComparedPair(one, two) for two in against if two is not None]
    return found


def _unreshaped(config: Config) -> Iterable[Config]:
    """Yield the same config with stacking instead of reshaping, also for stacks of several widths."""
    if config.fold == "hypercube" and config.order == 2 and config.format == "cp" and config.splits == 1:
        yield config.replace(fold="stack")
        yield from (config.replace(fold=fold) for fold in STACKS)


def _few(study: ComparedStudy) -> int:
    """Return the limit of "few parameters": those of the smallest LoRA."""
    return min((one.parameters for one in study.settings if one.arm == "LoRA"), default=0)


def _more_groups(study: ComparedStudy) -> list[ComparedPair]:
    """Pair one group with several, of the same format and fold and about the same number of parameters."""
    found = []
    for one in study.settings:
        if one.config is not None and one.config.groups == 1 and one.arm not in REFERENCES:
            found += [
                ComparedPair(one, two)
                for two in study.settings
                if two.config is not None
                and isinstance(two.config.groups, int)
                and two.config.groups > 1
                and abs(two.parameters / one.parameters - 1) < 0.03
                and two.config.replace(groups=1, rank=1) == one.config.replace(rank=1)
            ]
    return found


def _where(study: ComparedStudy, pairs: Iterable[ComparedPair], few: bool) -> list[ComparedPair]:
    """Select the pairs whose first setting has few parameters, or those where it has more."""
    return [pair for pair in pairs if (pair.first.parameters <= _few(study)) == few]


def _fewer_factors(config: Config) -> Iterable[Config]:
    if config.splits > 2:
        yield config.replace(splits=config.splits - 1)


def _nonlinear(config: Config) -> Iterable[Config]:
    if config.projection in ("linear", "linear_v2"):
        yield config.replace(projection="non" + config.projection)


def _second_version(config: Config) -> Iterable[Config]:
    if config.projection == "linear":
        yield config.replace(projection="linear_v2")


def _unshuffled(config: Config) -> Iterable[Config]:
    if config.projection == "shuffle":
        yield config.replace(projection="identity")


def _living(study: ComparedStudy) -> list[ComparedPair]:
    """Pair the settings with a nonlinear projection with the model without an adapter."""
    base = next((one for one in study.settings if one.config is None), None)
    return [
        ComparedPair(one, base)
        for one in study.settings
        if base is not None and one.config is not None and one.config.projection.startswith("nonlinear")
    ]


def _untrained(study: ComparedStudy, least: int, arms: tuple[str, ...] = ("",)) -> list[ComparedPair]:
    """Pair the settings of these arms with at most ``least`` parameters with the model without an adapter."""
    base = next((one for one in study.settings if one.config is None), None)
    few = [
        one for one in study.settings if one.config is not None and one.parameters <= least and one.arm.startswith(arms)
    ]
    return [] if base is None else [ComparedPair(one, base) for one in sorted(few, key=lambda one: one.parameters)]


def _within(study: ComparedStudy, times: int) -> list[ComparedPair]:
    """Pair every rank of LoRA with the best setting, on held-out samples, of ``times`` times fewer parameters."""
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
            if small:
                found.append(ComparedPair(max(small, key=lambda other: statistics.fmean(other.held_out)), one))
    return found


# -- The page ----------------------------------------------------------------------------------

HEAD = """# The paper's claims, checked in miniature

`python -m paper.report` writes this page from the results in `paper/results`. `python -m paper NAME --scale mini`
produced them: miniatures of the paper's experiments on two processor cores, with models and data from package
registries. The paper's GPU experiments have not been run at full scale; a claim that is not confirmed here is not
thereby refuted there.

Every setting was trained at the same learning rates. It is shown at the rate that was best on held-out samples, with
the first seed or with all; test samples were not used to choose anything. A ° marks a setting whose rate is the lowest
or highest tried, so that a rate beyond might be better. Two settings are compared seed by seed: with the same seed,
both get the samples in the same order, start from the same new head if there is one, and draw the same F. The *gain*
is the mean of these differences, in the units of the study (points of accuracy; FID and loss with their signs
reversed), with the 95 % interval of Student's t over seeds. With three seeds such an interval is wide. All seeds share
the same samples, so the interval does not cover the choice of the test set; and with as many intervals as on this page,
some miss the true value.

*confirmed*: the interval of the mean gain of all pairs is above 0. *reversed*: it is below 0. *inconclusive*:
neither. *mixed*: whatever the mean, some pair alone shows the opposite. *no harm*, and that something is as good,
require an interval above -1 point of accuracy, -5 of FID, -0.1 of IS, or -0.0005 of loss. The interval of all pairs is
at least as wide as the pairs' own spreads imply, so that their differences cannot cancel by chance. The table has the
mean gain, the number of pairs, and the number of pairs with a setting at the edge of the rates (°).

The paper evaluates its diffusion models by the distance of the Inception score to that of real images. With a few
hundred images this and FID have a wide spread, and the miniature, trained for few steps, generates strokes rather than
digits, even with the dense update. The measures disagree, so all are shown. The loss on held-out images varies least,
because every model sees the same images with the same noise; but it also chose the rates, for all settings alike.
"""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes
    ----------
    title, place, about : str
        The claim in words, its place in the paper, and how it is checked.
    pairs : callable
        Returns the pairs of a study that check the claim.
    harmless : bool
        Whether it claims no harm rather than a gain.
    as_good : bool
        Whether it claims equal quality, with an advantage in another respect.
    """

    title: str
    place: str
    about: str
    pairs: Callable[[ComparedStudy], list[ComparedPair]]
    harmless: bool = False
    as_good: bool = False


CLAIMS = (
    Claim(
        "SuperLoRA needs 3 times fewer parameters than LoRA for the same quality",
        "abstract, 4.1, A.7 (3 to 10 times)",
        "Every rank of LoRA is compared with the best setting, on held-out samples, of those with at most a third of "
        "its parameters.",
        lambda study: _within(study, 3),
        as_good=True,
    ),
    Claim(
        "SuperLoRA needs 10 times fewer parameters than LoRA for the same quality",
        "abstract, 4.1, A.7 (3 to 10 times)",
        "The same with at most a tenth of its parameters.",
        lambda study: _within(study, 10),
        as_good=True,
    ),
    Claim(
        "Reshaping is better than stacking",
        "4.2, figure 5b",
        "The same groups and rank, reshaped to a square or stacked. The square has fewer parameters.",
        lambda study: _pairs(study, _unreshaped),
    ),
    Claim(
        "Fewer groups are better with few parameters",
        "4.2, figure 5a",
        "One group against several, with the same number of parameters (within 3 %), at most that of LoRA at rank 1.",
        lambda study: _where(study, _more_groups(study), few=True),
    ),
    Claim(
        "Fewer groups are also better with more parameters",
        "4.1 (the paper's explanation of figure 4)",
        "The same with more parameters than LoRA at rank 1.",
        lambda study: _where(study, _more_groups(study), few=False),
    ),
    Claim(
        "LoRTA and LoNKr still learn at parameter counts below all other methods",
        "4.2, figure 6",
        "All settings of these two with at most a fifth of LoRA's parameters at rank 1, against no adapter.",
        lambda study: _untrained(study, _few(study) // 5, ("LoRTA", "LoNKr")),
    ),
    Claim(
        "LoNKr with more factors needs fewer parameters and is as good",
        "4.2, figure 6",
        "The same groups, rank and size of factors, with K factors against K - 1. The number of parameters follows by "
        "counting; the comparison checks that the quality is as good.",
        lambda study: _pairs(study, _fewer_factors),
        as_good=True,
    ),
    Claim(
        "31 parameters still learn something",
        "4.2, figure 10",
        "All settings with at most 31 parameters, against no adapter.",
        lambda study: _untrained(study, 31),
    ),
    Claim(
        "A linear projection is better than a nonlinear one",
        "A.6, figure 17",
        "The same setting, linear against nonlinear, and linear_v2 against nonlinear_v2. The nonlinear ones use this "
        "library's initialisation, from which they learn at the first step.",
        lambda study: _pairs(study, _nonlinear),
    ),
    Claim(
        "A nonlinear projection learns from a start with a nonzero gradient",
        "not in the paper, which uses LoRA's initialisation, with a factor of zeros",
        "With LoRA's initialisation the gradient of every array is exactly 0 (`tests/algebra/test_init.py`), because "
        "tanhshrink is flat there: such an adapter never changes the model. So all nonlinear settings, with this "
        "library's initialisation, are compared with no adapter. The section before shows how they compare with "
        "linear ones from that start.",
        _living,
    ),
    Claim(
        "linear is better than linear_v2 with few parameters",
        "4.2, figure 7a",
        "The same setting with the other F, if it has at most as many parameters as LoRA at rank 1.",
        lambda study: _where(study, _pairs(study, _second_version), few=True),
    ),
    Claim(
        "linear_v2 is better than linear with many parameters",
        "4.2, figure 7a",
        "The same with more parameters than LoRA at rank 1, with the roles exchanged.",
        lambda study: [
            ComparedPair(pair.second, pair.first) for pair in _where(study, _pairs(study, _second_version), few=False)
        ],
    ),
    Claim(
        "Shuffling does no harm",
        "4.2, figure 7b",
        "The same setting with and without a shuffle.",
        lambda study: _pairs(study, _unshuffled),
        harmless=True,
    ),
)


def page(found: dict[str, ComparedStudy]) -> str:
    """Return the page as Markdown."""
    compared = [study for study in found.values() if study.settings]
    text = [HEAD, "\n## What was run\n\n| study | what |\n|---|---|\n"]
    text += [f"| {study.name} | {study.title}: {study.about} |\n" for study in found.values()]
    text += ["\n## Summary\n\n", _row(["claim", *(study.name for study in compared)])]
    text += [_row(["---"] * (len(compared) + 1))]
    for claim in CLAIMS:
        text += [_row([claim.title, *(_verdict(claim, study) for study in compared)])]
    if "geometry" in found:
        text += [f"\nThe Euclidean distance to the dense update (geometry; the last section): {_distances(found)}.\n"]
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
                told = _told(claim, study, pairs)
                text += [f"\n{study.name}, {study.quality}: {told}.\n\n", *_table(pairs, study.decimals)]
    text += _geometry(found)
    return "".join(text)


def _verdict(claim: Claim, study: ComparedStudy) -> str:
    pairs = claim.pairs(study)
    if not pairs:
        return "–"
    edges = _edges(pairs)
    told = f"{pooled(pairs)[0]:+.{study.decimals}f}, {_several(len(pairs), 'pair')}" + (f", {edges}°" if edges else "")
    return f"{_word(claim, study, pairs)} ({told})"


def _word(claim: Claim, study: ComparedStudy, pairs: Sequence[ComparedPair]) -> str:
    """Return the verdict of all pairs together, or "mixed" if some pair alone shows the opposite."""
    _, low, high = pooled(pairs)
    above, below = _single(claim, study, pairs)
    least, most = _bounds(claim, study)
    if high < most:
        word, contrary = "harm" if claim.harmless else "reversed", above
    elif low > least:
        word, contrary = "no harm" if claim.harmless else "confirmed", below
    else:
        word, contrary = "inconclusive", min(above, below)
    return "mixed" if contrary else word


def _bounds(claim: Claim, study: ComparedStudy) -> tuple[float, float]:
    """Return the bounds on the gain: a claim is confirmed above the first, and reversed below the second."""
    return -study.margin * (claim.harmless or claim.as_good), -study.margin * claim.as_good


def _single(claim: Claim, study: ComparedStudy, pairs: Sequence[ComparedPair]) -> tuple[int, int]:
    """Count the pairs that alone confirm a claim, and those that alone show the opposite."""
    least, most = _bounds(claim, study)
    own = [interval(pair.gains) for pair in pairs]
    below = sum(high < most for _, _, high in own)
    return sum(low > least and high >= most for _, low, high in own), below


def _edges(pairs: Sequence[ComparedPair]) -> int:
    return sum(pair.first.edge or pair.second.edge for pair in pairs)


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"


def _told(claim: Claim, study: ComparedStudy, pairs: Sequence[ComparedPair]) -> str:
    mean, low, high = pooled(pairs)
    won = sum(statistics.fmean(pair.gains) > 0 for pair in pairs)
    above, below = _single(claim, study, pairs)
    edges = _edges(pairs)
    told = (
        f"{_word(claim, study, pairs)}; mean gain {mean:+.2f}, from {low:+.2f} to {high:+.2f}; "
        f"the first is ahead in {won} of {len(pairs)}; alone, {above} confirm the claim and {below} show the opposite"
    )
    return told + (f"; in {edges}, a setting has the lowest or highest rate tried (°)" if edges else "")


def _table(pairs: Sequence[ComparedPair], decimals: int = 1) -> list[str]:
    text = [_row(["first", "parameters", "", "second", "parameters", "", "gain"]), _row(["---"] * 7)]
    for pair in pairs:
        mean, low, high = interval(pair.gains)
        cells = [cell for one in (pair.first, pair.second) for cell in _cells(one, decimals)]
        text.append(_row([*cells, f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"]))
    return text


def _cells(one: Setting, decimals: int) -> tuple[str, str, str]:
    return one.name, f"{one.parameters:,}", _mean(one.values, decimals) + "°" * one.edge


def pooled(pairs: Sequence[ComparedPair]) -> tuple[float, float, float]:
    """Return the mean gain of pairs, and the wider of two 95 % intervals.

    One interval is over seeds, of the means of all pairs, because pairs with the same seed are correlated. With few
    seeds their differences may cancel by chance. The other uses the pairs' own spread, as if they were independent.
    """
    mean, low, high = interval(
        [statistics.fmean(column) for column in zip(*(pair.gains for pair in pairs), strict=True)]
    )
    seeds = len(pairs[0].gains)
    if seeds < 2:
        return mean, low, high
    error = sum(statistics.variance(pair.gains) / seeds for pair in pairs) ** 0.5 / len(pairs)
    half = max(high - mean, float(scipy.stats.t.ppf(0.975, len(pairs) * (seeds - 1))) * error)
    return mean, mean - half, mean + half


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and the ends of the 95 % interval of Student's t.

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


def _mean(values: Sequence[float], decimals: int) -> str:
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{abs(statistics.fmean(values)):.{decimals}f}{spread}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _geometry(found: dict[str, ComparedStudy]) -> list[str]:
    if "geometry" not in found:
        return []
    study = found["geometry"]
    text = [
        "\n## The distance to the dense update shrinks, most of all with reshaping\n\n",
        f"In the paper: A.4, figure 14. {study.about}. Means over weights, and the difference from LoRA's d_E seed by "
        "seed (below 0: nearer to the dense update). With a d_E above 1, no update at all would be nearer. The length "
        f"of an update depends on its rate, so both choices of the rate are shown. {_distances(found)}.\n",
        "\nEach at its own best rate:\n\n", *_spaces(_own_rate(study)),
        "\nAll at the dense update's best rate, since the paper has one rate for all; also drawn below:\n\n",
        *_spaces(_one_rate(study)),
    ]  # fmt: skip
    return [*text, f"\n![Singular spaces and distance, weight by weight]({study.name}/figure.png)\n"]


def _own_rate(study: ComparedStudy) -> list[dict[str, Any]]:
    return [row for row in study.spaces if not row["one_rate"]]


def _one_rate(study: ComparedStudy) -> list[dict[str, Any]]:
    return [row for row in study.spaces if row["one_rate"]]


def _distances(found: dict[str, ComparedStudy]) -> str:
    """Describe whether the distance shrinks, with each method at its own rate and with all at the same rate."""
    rows = {"each at its own rate": _own_rate(found["geometry"]), "all at one rate": _one_rate(found["geometry"])}
    return "; ".join(f"{_nearer(some)}, {words}" for words, some in rows.items())


def _nearer(rows: Sequence[dict[str, Any]]) -> str:
    apart = [interval(_apart(rows, arm)) for arm in _arms(rows) if arm != "LoRA"]
    nearer, farther = sum(high < 0 for _, _, high in apart), sum(low > 0 for _, low, _ in apart)
    word = "mixed" if nearer and farther else "confirmed" if nearer else "reversed" if farther else "inconclusive"
    told = f"{word} (nearer than LoRA in {nearer} of {_several(len(apart), 'method')}, farther in {farther}"
    if {RESHAPED, STACKED} <= set(_arms(rows)):
        mean, low, high = interval(_apart(rows, RESHAPED, STACKED))
        told += f"; reshaped minus stacked {mean:+.2f}, from {low:+.2f} to {high:+.2f}"
    return f"{told})"


def _arms(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _space(rows: Sequence[dict[str, Any]], arm: str, seed: int | None = None) -> dict[str, Any]:
    (means,) = summary([row for row in rows if row["arm"] == arm and seed in (None, row["seed"])])
    return means


def _apart(rows: Sequence[dict[str, Any]], arm: str, other: str = "LoRA") -> list[float]:
    """Return how much farther a method's update is from the dense one than another method's, seed by seed."""
    seeds = sorted({row["seed"] for row in rows})
    return [_space(rows, arm, seed)["d_euclid"] - _space(rows, other, seed)["d_euclid"] for seed in seeds]


def _spaces(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per arm: the mean similarities, the distance, and its difference from LoRA's."""
    heads = ["method", "parameters", "rate", "d_L", "d_R", "d_E", "d_E minus LoRA's"]
    text = [_row(heads), _row(["---"] * len(heads))]
    for arm in _arms(rows):
        mean, low, high = interval(_apart(rows, arm))
        rate = next(row["rate"] for row in rows if row["arm"] == arm)
        means = _space(rows, arm)
        spaces = [f"{means[name]:.3f}" for name in ("d_left", "d_right", "d_euclid")]
        told = "" if arm == "LoRA" else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        text.append(_row([arm, f"{means['parameters']:,}", f"{rate:g}", *spaces, told]))
    return text
