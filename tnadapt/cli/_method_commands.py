"""The commands about methods: ``tnadapt presets``, ``verify`` and ``plan``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import typer

import tnadapt
from tnadapt.errors import FileError, TnadaptError, pluralize, safe_repr

from ._options import AsJson, ConfigFile, OwnSettings, Targets, chosen_config, option, preset_option, targets_of
from .terminal import echo, echo_json, echo_table, print_table, stoppable

# -- The weights to plan for -------------------------------------------------------------------------------------------


ModelOfHeaders: TypeAlias = Annotated[
    str | None, typer.Argument(help="A folder, a safetensors file or index, or a hub name. Only headers are read.")
]

_shape = functools.partial(option, metavar="ROWSxCOLS")

# Maximum number of weights: a plan of this size takes half a minute, and no model's attention has as many.
MOST = 10_000


class _Weights(NamedTuple):
    """The weights to plan for."""

    shapes: list[tuple[int, int]]
    layers: list[str] | None
    names: list[str] | None  # short
    roles: list[str] | None
    targets: list[str]
    drawn_roles: list[str] | None = None  # None where roles do not tell weights apart


def shapes_of(given: Sequence[str]) -> list[tuple[int, int]]:
    """Parse shapes ``ROWSxCOLS``, each with an optional ``*TIMES``.

    Examples
    --------
    >>> shapes_of(["12x8*2", "4x6"])
    [(12, 8), (12, 8), (4, 6)]
    """
    shapes: list[tuple[int, int]] = []
    for text in given:
        size, _, times = text.partition("*")
        rows, _, cols = size.partition("x")
        try:
            repeat, shape = int(times or 1), (int(rows), int(cols))
        except ValueError:
            repeat = 0
        if repeat < 1:
            raise TnadaptError(f"--shape takes ROWSxCOLS, e.g. 768x768 or 768x768*24; got {safe_repr(text)}")
        if len(shapes) + repeat > MOST:
            raise TnadaptError(
                f"--shape takes {MOST:,} weights at the most, of all that are given; see {safe_repr(text)}"
            )
        shapes += [shape] * repeat
    return shapes


def _planned_weights(model: str | None, targets: list[str] | None, shape: list[str] | None) -> _Weights:
    """Return the weights of a model, or of ``--shape``."""
    if (model is None) == (shape is None):
        raise TnadaptError("give either a model or the shapes of weights, --shape ROWSxCOLS")
    if shape is not None:
        if targets is not None:
            raise TnadaptError("--targets chooses among the weights of a model, and --shape has none; leave it out")
        return _Weights(shapes_of(shape), None, None, None, [])
    assert model is not None
    try:
        adapted = tnadapt.planning.model_targets(model, targets_of(targets))
    except FileError as error:
        path = Path(model)
        if path.suffix.lower() == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
            raise FileError(
                f"{error}. For a GGUF file give the shapes of its weights by --shape, or open it with transformers and "
                "call tnadapt.plan([target.shape for target in tnadapt.torch.find_targets(model)], budget)"
            ) from None
        raise
    layers = [target.layer for target in adapted]
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    roles = [target.role for target in adapted]
    plain = {"linear", "conv"}.isdisjoint(roles)
    names = [f"{target.role}{numbers[target.layer]}" if plain else str(i) for i, target in enumerate(adapted)]
    shapes, paths = [target.shape for target in adapted], [target.name for target in adapted]
    return _Weights(shapes, layers, names, roles, paths, roles if plain else None)


# -- tnadapt presets ---------------------------------------------------------------------------------------------------


# The queries and values of ViT-base, as in README.md.
USUAL = _Weights([(768, 768)] * 24, [str(weight // 2) for weight in range(24)], None, ["q", "v"] * 12, [])


def presets_command(
    model: ModelOfHeaders = None,
    targets: Targets = None,
    shape: Annotated[
        list[str] | None, _shape("Shape of a weight, instead of a model; repeat for more.", "768x768*24")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the named methods, their arguments, and the fewest parameters that they can have on a model's weights.

    Without a model or --shape, the weights are the 24 queries and values of ViT-base, of 768 x 768.

    Exit code: 0, or 2 if the request is not possible.
    """
    has_weights = model is not None or shape is not None or targets is not None
    with stoppable("nothing was listed"):
        weights = _planned_weights(model, targets, shape) if has_weights else USUAL
        rows = [_row(tnadapt.presets.PRESETS[name], weights) for name in tnadapt.presets.PRESETS.installed()]
    if as_json:
        echo_json({"weights": len(weights.shapes), "presets": rows})
        return
    cells = [
        (row["preset"], row["arguments"], "–" if row["from"] is None else f"{row['from']:,}", row["method"])
        for row in rows
    ]
    print_table(("preset", "arguments", "from", "method"), cells, right=[2])
    alike = set(weights.shapes)
    size = " of {} x {}".format(*alike.pop()) if len(alike) == 1 else ""
    echo(f"from: the fewest parameters on {pluralize(len(weights.shapes), 'weight')}{size}")
    echo("–: needs more than shapes, such as the number of heads, or does not fit these weights")
    echo("tnadapt plan lists the settings that fit a budget of parameters")


def _row(preset: tnadapt.presets.Preset, weights: _Weights) -> dict[str, Any]:
    from tnadapt.planning.families import Search

    arguments = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in inspect.signature(preset.make).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.default is not None
    ]
    adapted = tnadapt.presets.AdaptedWeights(weights.shapes, weights.layers, weights.roles)
    least = Search(weights.shapes, weights.layers, weights.roles).least(preset.ladders(adapted))
    return {
        "preset": preset.name, "arguments": ", ".join(arguments), "from": None if least is None else least.parameters,
        "method": (inspect.getdoc(preset.make) or "").partition("\n")[0].replace("`", "").rstrip("."),
    }  # fmt: skip


# -- tnadapt verify ----------------------------------------------------------------------------------------------------


class _PartBars(contextlib.ExitStack):
    """A progress bar for each part of a verification, one after another."""

    bar: tnadapt.ProgressBar | None = None

    def lines(self, line: str) -> None:
        part, _, words = line.partition(": ")
        if self.bar is None or self.bar.title != part:
            self.close()
            self.bar = self.enter_context(tnadapt.ProgressBar(part))
        self.bar.lines(words)


def verify_command(
    preset: Annotated[str | None, preset_option("A named method, e.g. superlora", "all, and the library")] = None,
    settings: OwnSettings = None,
    config: ConfigFile = None,
    shape: Annotated[
        list[str] | None, _shape("Shape of a weight; repeat for more, 12x8*4 for four.", "12x8, 12x8, 8x12")
    ] = None,
    backend: Annotated[
        list[str] | None, option("An array library to check; repeat for more.", "all that are installed")
    ] = None,
    seed: Annotated[int, option("Seed of the random parameters.", min=0)] = 0,
    deep: Annotated[bool, typer.Option("--deep", help="Check everything on every library, for minutes.")] = False,
    only: Annotated[
        list[str] | None,
        option("A preset, or library, decompositions or conversion, to check alone; repeat for more.", "all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the laws of the library, or of one config, on every installed array library.

    Exit code: 0 if all laws hold, 1 if one does not, 2 for invalid arguments.
    """
    chosen = chosen_config(preset, settings or [], config)
    shapes = shapes_of(shape or []) or None
    with stoppable("there is no report"), _PartBars() as bars:
        report = tnadapt.verify(chosen, shapes, backends=backend, seed=seed, progress=bars.lines, deep=deep, only=only)
    if as_json:
        echo_json(report.to_dict())
    else:
        echo_table(str(report))
    raise typer.Exit(0 if report.holds else 1)


# -- tnadapt plan ------------------------------------------------------------------------------------------------------


# Columns to omit, in this order, if a terminal is too narrow.
SPARE = ("share", "bytes", "padding", "step", "LoRA")


def plan_command(
    model: ModelOfHeaders = None,
    budget: Annotated[
        str | None, option("A number of parameters, such as 1000; or of bytes, such as 4kB or 64KiB.", "required")
    ] = None,
    targets: Targets = None,
    shape: Annotated[
        list[str] | None,
        _shape(
            "Shape of a weight, instead of a model; repeat for more, 768x768*24 for 24.", "the weights of the model"
        ),
    ] = None,
    dtype: Annotated[str, option("dtype of the adapter file.")] = "float32",
    by: Annotated[
        list[str] | None,
        option(
            "Criteria of the Pareto front: parameters, freedom, cost, rank, waste; repeat for more.",
            "parameters, freedom and cost",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show all settings that were compared.")] = False,
    picture: Annotated[
        Path | None, option("Plot parameters against rank in this file: .png, .pdf, .svg.", "none")
    ] = None,
    layout_picture: Annotated[
        Path | None, option("Plot where a setting places each weight in this file.", "none")
    ] = None,
    preset: Annotated[
        str | None, preset_option("The setting of --layout-picture, e.g. superlora", "the first row")
    ] = None,
    settings: OwnSettings = None,
    as_json: AsJson = False,
) -> None:
    """Show which settings of which methods fit a budget of parameters, with their capacity and cost.

    Exit code: 0, or 2 if the request is not possible.
    """
    if (preset or settings) and layout_picture is None:
        raise TnadaptError("--preset and --set say what --layout-picture draws; give its file, too")
    for path in (picture, layout_picture):
        if path is not None and (path.is_dir() or not path.suffix):
            raise TnadaptError(f"a picture is a file that ends in .png, .pdf or .svg; got {safe_repr(str(path))}")
    if budget is None:
        raise TnadaptError("give a budget: --budget 1000 for parameters, --budget 4kB for bytes")
    drawn = chosen_config(preset, settings or [], None)
    with stoppable("there is no plan"), tnadapt.ProgressBar("planning") as bar:
        weights = _planned_weights(model, targets, shape)
        plan = tnadapt.plan(
            weights.shapes, budget, layers=weights.layers, roles=weights.roles, dtype=dtype, progress=bar.counts,
            **({"by": by} if by else {}),
        )  # fmt: skip
        table = plan.table(every)
    chosen = plan.shown[0].config if drawn is None else drawn
    adapter = tnadapt.UpdatePlan(chosen, weights.shapes, weights.layers, weights.roles)
    if picture is not None or layout_picture is not None:
        _draw(plan, weights, adapter, picture, layout_picture)
    if as_json:
        more: dict[str, Any] = {"model": model, "targets": weights.targets}
        if layout_picture is not None:
            more["layout"] = chosen.to_dict()
        echo_json({**more, **plan.to_dict(every)})
        return
    _print(plan, table, targets_of(targets) if targets else [])
    if picture is not None:
        echo(f"parameters against rank: {picture}")
    if layout_picture is not None:
        echo(f"where {tnadapt.planning.known_as(chosen)} places each weight: {layout_picture}")


def _draw(
    found: tnadapt.planning.Plan,
    weights: _Weights,
    adapter: tnadapt.UpdatePlan,
    picture: Path | None,
    layout_picture: Path | None,
) -> None:
    from tnadapt.plot import layout, parameters

    try:
        if picture is not None:
            parameters(found.shapes, picture, budget=found.budget, title=f"{len(found.shapes)} weights in one group")
        if layout_picture is not None:
            method = str(tnadapt.planning.known_as(adapter.config))
            layout(adapter, layout_picture, weights.names, weights.drawn_roles, method)
    except ImportError as error:
        raise TnadaptError(f"pictures need their extra: pip install 'tnadapt[plot]' ({error})") from None
    except ValueError as error:  # raised by matplotlib for an unknown suffix
        raise TnadaptError(f"cannot draw: {error}") from None


def _print(found: tnadapt.planning.Plan, table: Sequence[Sequence[str]], targets: str | list[str]) -> None:
    kept = list(range(len(table[0])))
    if sys.stdout.isatty():
        widths = [max(len(row[column]) for row in table) for column in kept]
        for spare in SPARE:
            if sum(widths[column] + 2 for column in kept) - 2 <= shutil.get_terminal_size().columns:
                break
            kept.remove(table[0].index(spare))
    rows = [[row[column] for column in kept] for row in table]
    for line in textwrap.wrap(found.recommendation, 120, subsequent_indent="  ", break_on_hyphens=False):
        echo(line)
    print_table(rows[0], rows[1:], right=range(3, len(kept)))
    for note in found.notes(targets):
        echo(note)
