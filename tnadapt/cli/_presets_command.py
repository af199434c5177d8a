"""The command ``tnadapt presets``."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.errors import pluralize

from ._common_options import AsJson, ModelOfHeaders, TargetsOfHeaders
from ._interrupts import stoppable
from ._planned_weights import Weights, planned_weights
from ._printing import echo, echo_json, print_table

__all__ = ["presets_command"]

# The queries and values of ViT-base, as in README.md.
USUAL = Weights(
    [(768, 768)] * 24, [str(weight // 2) for weight in range(24)], None, ["q", "v"] * 12, []
)  # fmt: skip


def presets_command(
    model: ModelOfHeaders = None,
    targets: TargetsOfHeaders = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxCOLS",
            help="Shape of a weight, instead of a model; repeat for more.",
            show_default="768x768*24",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the named methods, their arguments, and the fewest parameters that they can have on a model's weights.

    Without a model or --shape, the weights are the 24 queries and values of ViT-base, of 768 x 768.

    Exit code: 0, or 2 if the request is not possible.
    """
    given = model is not None or shape is not None or targets is not None
    with stoppable("nothing was listed"):
        weights = planned_weights(model, targets, shape) if given else USUAL
        rows = [_row(name, weights) for name in tnadapt.presets.__all__]
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


def _row(name: str, weights: Weights) -> dict[str, Any]:
    preset = getattr(tnadapt.presets, name)
    arguments = [
        one.name if one.default is one.empty else f"{one.name}={one.default!r}"
        for one in inspect.signature(preset).parameters.values()
        if one.kind is not one.VAR_KEYWORD and one.default is not None
    ]
    fewest = _fewest(name, weights)
    return {
        "preset": name, "arguments": ", ".join(arguments), "from": fewest,
        "method": (inspect.getdoc(preset) or "").partition("\n")[0].replace("`", "").rstrip("."),
    }  # fmt: skip


def _fewest(name: str, weights: Weights) -> int | None:
    from tnadapt.planning.ladders import Ladder, Search
    from tnadapt.planning.preset_families import PRESET_FAMILIES, AdaptedWeights

    adapted = AdaptedWeights(weights.shapes, weights.layers, weights.roles)
    # Dense updates have one size, and are no family.
    dense = [Ladder(lambda size: tnadapt.presets.dense(), lambda plan: 1)]
    family = dense if name == "dense" else PRESET_FAMILIES[name].family(adapted)
    found = Search(weights.shapes, weights.layers, weights.roles).least(family)
    return None if found is None else found.parameters
