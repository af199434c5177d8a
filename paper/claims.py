"""The paper's claims checked against results: pairs of settings with equal training, compared seed by seed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from tnadapt.report import TextTable

from .compared_studies import ComparedPair, ComparedStudy, Setting
from .geometry_section import TITLE, distances, geometry_section, verdicts
from .paired_statistics import interval, pooled
from .pairings import (
    few_parameters,
    fewer_factors,
    living,
    more_groups,
    nonlinear,
    pairs_with,
    second_version,
    unreshaped,
    unshuffled,
    untrained,
    where,
    within,
)
from .phrases import anchor, folded, mean_and_spread, several

__all__ = ["CLAIMS", "Claim", "page", "summary"]


HEAD = """# The paper's claims, checked in miniature

What became of each claim in small repetitions of the paper's experiments, with the mean gain: *confirmed* or *reversed*
where the seeds decide, *mixed* where single comparisons contradict each other, *inconclusive* otherwise. A ° marks
comparisons with a setting whose learning rate is the lowest or highest tried. The paper's own experiments need GPUs and
were not repeated: what is not confirmed here is not refuted there.

"""

METHOD = """
`python -m paper.report` writes this page from the results in `paper/results`. `python -m paper NAME --scale mini`
produced them: miniatures of the paper's experiments on two processor cores, with models and data from package
registries.

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
at least as wide as the pairs' own spreads imply, so that their differences cannot cancel by chance.

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
        lambda study: within(study, 3),
        as_good=True,
    ),
    Claim(
        "SuperLoRA needs 10 times fewer parameters than LoRA for the same quality",
        "abstract, 4.1, A.7 (3 to 10 times)",
        "The same with at most a tenth of its parameters.",
        lambda study: within(study, 10),
        as_good=True,
    ),
    Claim(
        "Reshaping is better than stacking",
        "4.2, figure 5b",
        "The same groups and rank, reshaped to a square or stacked. The square has fewer parameters.",
        lambda study: pairs_with(study, unreshaped),
    ),
    Claim(
        "Fewer groups are better with few parameters",
        "4.2, figure 5a",
        "One group against several, with the same number of parameters (within 3 %), at most that of LoRA at rank 1.",
        lambda study: where(study, more_groups(study), few=True),
    ),
    Claim(
        "Fewer groups are also better with more parameters",
        "4.1 (the paper's explanation of figure 4)",
        "The same with more parameters than LoRA at rank 1.",
        lambda study: where(study, more_groups(study), few=False),
    ),
    Claim(
        "LoRTA and LoNKr still learn at parameter counts below all other methods",
        "4.2, figure 6",
        "All settings of these two with at most a fifth of LoRA's parameters at rank 1, against no adapter.",
        lambda study: untrained(study, few_parameters(study) // 5, ("LoRTA", "LoNKr")),
    ),
    Claim(
        "LoNKr with more factors needs fewer parameters and is as good",
        "4.2, figure 6",
        "The same groups, rank and size of factors, with K factors against K - 1. The number of parameters follows by "
        "counting; the comparison checks that the quality is as good.",
        lambda study: pairs_with(study, fewer_factors),
        as_good=True,
    ),
    Claim(
        "31 parameters still learn something",
        "4.2, figure 10",
        "All settings with at most 31 parameters, against no adapter.",
        lambda study: untrained(study, 31),
    ),
    Claim(
        "A linear projection is better than a nonlinear one",
        "A.6, figure 17",
        "The same setting, linear against nonlinear, and linear_v2 against nonlinear_v2. The nonlinear ones use this "
        "library's initialization, from which they learn at the first step.",
        lambda study: pairs_with(study, nonlinear),
    ),
    Claim(
        "A nonlinear projection learns from a start with a nonzero gradient",
        "not in the paper, which uses LoRA's initialization, with a factor of zeros",
        "With LoRA's initialization the gradient of every array is exactly 0 (`tests/algebra/test_init.py`), because "
        "tanhshrink is flat there: such an adapter never changes the model. So all nonlinear settings, with this "
        "library's initialization, are compared with no adapter. The section before shows how they compare with "
        "linear ones from that start.",
        living,
    ),
    Claim(
        "linear is better than linear_v2 with few parameters",
        "4.2, figure 7a",
        "The same setting with the other F, if it has at most as many parameters as LoRA at rank 1.",
        lambda study: where(study, pairs_with(study, second_version), few=True),
    ),
    Claim(
        "linear_v2 is better than linear with many parameters",
        "4.2, figure 7a",
        "The same with more parameters than LoRA at rank 1, with the roles exchanged.",
        lambda study: [
            ComparedPair(pair.second, pair.first) for pair in where(study, pairs_with(study, second_version), few=False)
        ],
    ),
    Claim(
        "Shuffling does no harm",
        "4.2, figure 7b",
        "The same setting with and without a shuffle.",
        lambda study: pairs_with(study, unshuffled),
        harmless=True,
    ),
)


def page(found: dict[str, ComparedStudy]) -> str:
    """Return the page as Markdown."""
    compared = [study for study in found.values() if study.settings]
    rows = [
        [f"[{claim.title}](#{anchor(claim.title)})", *(_verdict(claim, study) for study in compared)]
        for claim in CLAIMS
    ]
    text = [HEAD, _table(rows, ["claim", *(study.name for study in compared)])]
    if "geometry" in found:
        text += [f"\nThe Euclidean distance to the dense update (geometry; the last section): {distances(found)}.\n"]
    text += ["\n", folded("How settings are compared", METHOD)]
    ran = [(study.name, f"{study.title}: {study.about}") for study in found.values()]
    text += ["\n", folded("What was run", _table(ran, ("study", "what")))]
    for study in compared:
        if study.pictured:
            text += [f"\n## {study.name}: {study.title}\n\n", folded("Figures", _figures(study))]
    for claim in CLAIMS:
        text += [f"\n## {claim.title}\n\nIn the paper: {claim.place}. {claim.about}\n"]
        told = [_compared(claim, study, pairs) for study in compared if (pairs := claim.pairs(study))]
        text += ["\n", folded("Every comparison", "".join(told))] if told else []
    text += geometry_section(found)
    return "".join(text)


def summary(found: dict[str, ComparedStudy]) -> str:
    """Return what was run, and the verdicts of each claim by study, as two tables in reStructuredText."""
    compared = [study for study in found.values() if study.settings]
    ran = [(f"``{study.name}``", f"{study.title} ({_ran(study)})") for study in found.values() if study.pictured]
    words = {
        claim: {study.name: _word(claim, study, pairs) for study in compared if (pairs := claim.pairs(study))}
        for claim in CLAIMS
    }
    told = [(claim.title, claim.place, _grouped(words[claim])) for claim in CLAIMS]
    if "geometry" in found:
        by_rates = {f"geometry, {rates}": word for rates, word in verdicts(found).items()}
        told.append((TITLE, "A.4, figure 14", _grouped(by_rates)))
    return _list_table([("Study", "What was run"), *ran]) + "\n" + _list_table([("Claim", "In", "Verdict"), *told])


def _ran(study: ComparedStudy) -> str:
    values = study.settings[0].values if study.settings else {row["seed"] for row in study.spaces}
    count = len(study.settings) or len({row["arm"] for row in study.spaces})
    return f"{several(count, 'setting')}, {several(len(values), 'seed')}"


def _grouped(words: Mapping[str, str]) -> str:
    """Return each verdict with the studies that have it, such as "confirmed: digits; mixed: reviews"."""
    studies: dict[str, list[str]] = {}
    for name, word in words.items():
        studies.setdefault(word, []).append(f"{name.replace(', ', ' (')})" if ", " in name else name)
    return "; ".join(f"**{word}**: {', '.join(names)}" for word, names in studies.items())


def _list_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"   {' ' if place else '*'} - {cell}" for row in rows for place, cell in enumerate(row)]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *lines]) + "\n"


def _compared(claim: Claim, study: ComparedStudy, pairs: Sequence[ComparedPair]) -> str:
    return f"\n{study.name}, {study.quality}: {_told(claim, study, pairs)}.\n\n{_rows(pairs, study.decimals)}"


def _figures(study: ComparedStudy) -> str:
    text = (
        f"{study.about}.\n\n"
        f"![{study.title}: {study.quality} against parameters, with each method's front]({study.name}/figure.png)\n"
    )
    if study.quality.startswith("FID"):
        text += f"\n![Images that each setting generates]({study.name}/generated.png)\n"
    return text


def _verdict(claim: Claim, study: ComparedStudy) -> str:
    pairs = claim.pairs(study)
    if not pairs:
        return "–"
    return f"{_word(claim, study, pairs)} {pooled(pairs)[0]:+.{study.decimals}f}{'°' * bool(_edges(pairs))}"


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


def _rows(pairs: Sequence[ComparedPair], decimals: int) -> str:
    rows = []
    for pair in pairs:
        mean, low, high = interval(pair.gains)
        cells = [cell for one in (pair.first, pair.second) for cell in _cells(one, decimals)]
        rows.append([*cells, f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"])
    return _table(rows, ["first", "parameters", "", "second", "parameters", "", "gain"])


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    return TextTable(rows, head).markdown() + "\n"


def _cells(one: Setting, decimals: int) -> tuple[str, str, str]:
    return one.name, f"{one.parameters:,}", mean_and_spread(one.values, decimals) + "°" * one.edge
