"""Parts shared by all plots: colors, a figure that is drawn into a file, and unobtrusive axes.

Ground and ink, the colors of background and text, are matplotlib's settings ``figure.facecolor`` and ``text.color``
when a picture is drawn: white and a dark grey by default. ``matplotlib.style.context("dark_background")`` gives dark
pictures.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.container import encodes, file_error_context, path_of
from tnadapt.errors import ConfigError, safe_repr

_MAX_TEXT = 1000

# The palette of Okabe and Ito, which is safe for the color-blind, with different shapes for print in grey.
STYLES: dict[str, tuple[str, str]] = {
    "LoRA": ("#0072B2", "s"),
    "LoKr": ("#56B4E9", "D"),
    "LoNKr": ("#009E73", "P"),
    "LoRTA": ("#E69F00", "^"),
    "SuperLoRA": ("#D55E00", "o"),
    "SuperLoRA + F": ("#CC79A7", "v"),
    "fastfood": ("#7F7F7F", "X"),
}
OTHERS = (("#332288", "h"), ("#117733", "<"), ("#882255", ">"), ("#AA4499", "p"), ("#999933", "*"), ("#44AA99", "d"))

# On a dark ground, a color with less contrast is moved toward the ink. The palettes are made for a white ground.
_CONTRAST = 3.0
# For small text, as WCAG requires.
_TEXT_CONTRAST = 4.5


def tone(share: float) -> str:
    """Return a grey between the color of texts, at 0, and the ground, at 1, as ``#RRGGBB``.

    Examples
    --------
    >>> import matplotlib
    >>> with matplotlib.rc_context():
    ...     matplotlib.rcdefaults()
    ...     print(tone(0.0), tone(0.5), tone(1.0))
    #000000 #808080 #FFFFFF
    """
    import matplotlib

    return between(matplotlib.rcParams["text.color"], matplotlib.rcParams["figure.facecolor"], share)


def ground() -> str:
    """Return the color behind the picture."""
    return tone(1.0)


def ink() -> str:
    """Return the color of texts and outlines."""
    return tone(2 / 15)


def pale() -> str:
    """Return the color of what is in the background."""
    return tone(0.54)


def legible(colour: str, text: bool = False) -> str:
    """Return a color that stands out from the ground: the same, or one nearer to the ink.

    Parameters
    ----------
    colour : str
        ``#RRGGBB``.
    text : bool
        Whether small text has this color, which needs more contrast, also on a light ground.

    Examples
    --------
    >>> import matplotlib
    >>> legible("#E69F00"), legible("#E69F00", text=True)
    ('#E69F00', '#8A5F00')
    >>> with matplotlib.rc_context({"text.color": "white", "figure.facecolor": "black"}):
    ...     legible("#332288")
    '#5C4EA0'
    """
    if not text and _luminance(ground()) > 0.5:
        return colour
    back, front, shade = ground(), tone(0.0), colour
    for step in range(1, 11):
        if _contrast(shade, back) >= (_TEXT_CONTRAST if text else _CONTRAST):
            break
        shade = between(colour, front, step / 10)
    return shade


def rgb(colour: Any) -> tuple[float, ...]:
    """Return red, green and blue, each from 0 to 1."""
    from matplotlib.colors import to_rgba

    *parts, opacity = to_rgba(colour)
    return tuple(parts) if opacity else (1.0, 1.0, 1.0)  # a transparent ground shows the page, which is usually white


def between(one: Any, other: Any, share: float) -> str:
    """Return a mixture of two colors, with a share of the second one."""
    mixed = [(1 - share) * left + share * right for left, right in zip(rgb(one), rgb(other), strict=True)]
    return "#" + "".join(f"{round(255 * part):02X}" for part in mixed)


def _contrast(one: str, other: str) -> float:
    """Return the contrast ratio of the Web Content Accessibility Guidelines, from 1 to 21."""
    low, high = sorted(_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb(colour)]
    return float(sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))


@checks_arguments
def styles(families: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a color and a marker for each family: those of ``STYLES``, and others in turn for the rest.

    Parameters
    ----------
    families : iterable of str
        In the order of the legend. Names may repeat.

    Returns
    -------
    dict of str to tuple of (str, str)
        No two families share a color and a marker, unless there are more than 36 outside ``STYLES``.

    Examples
    --------
    >>> styles(["LoRA", "LoRA-XS"])
    {'LoRA': ('#0072B2', 's'), 'LoRA-XS': ('#332288', 'h')}
    """
    colors, markers = zip(*OTHERS, strict=True)
    # After one round, the same colors again, each with the next marker.
    others = itertools.cycle(
        (color, markers[(place + turn) % len(markers)])
        for turn in range(len(markers)) for place, color in enumerate(colors)
    )  # fmt: skip
    return {family: STYLES.get(family) or next(others) for family in dict.fromkeys(families)}


def checked_text(**texts: str) -> None:
    """Raise a ConfigError if a text cannot be drawn: matplotlib takes minutes for a long one."""
    for name, text in texts.items():
        if len(text) > _MAX_TEXT:
            raise ConfigError(f"{name} must have at most {_MAX_TEXT:,} characters; got {len(text):,}")
        if not encodes(text):
            raise ConfigError(f"{name} has half a surrogate pair, which no font can draw; got {safe_repr(text)}")


def text_width(text: str, points: float) -> float:
    """Return the approximate width of a text in inches."""
    return 0.0088 * points * len(text)


def labelled(axes: Any, title: str, pad: int, x: str, y: str = "") -> None:
    """Write the title of a plot, and what its axes are."""
    axes.set_title(title, loc="left", fontsize=11, color=ink(), pad=pad, parse_math=False)
    axes.set_xlabel(x, fontsize=9, color=ink())
    axes.set_ylabel(y, fontsize=9, color=ink())


def figure(width: float, height: float) -> tuple[Any, Any]:
    """Create a figure of this size in inches that draws into files; return it and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=ground())
    FigureCanvasAgg(drawn)
    return drawn, drawn.add_subplot(facecolor=ground())


def quiet(axes: Any) -> None:
    """Reduce axes to two sides and small ticks."""
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink(), labelsize=8, length=3)
    axes.tick_params(which="minor", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(pale())


def count_ticks(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as whole numbers.

    Within a decade there are few powers of ten, so that matplotlib labels some ticks between them, as 3 × 10².
    """
    from matplotlib.ticker import LogFormatterSciNotation

    class _Counts(LogFormatterSciNotation):  # decides which ticks have labels
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.0f}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_minor_formatter(_Counts(labelOnlyBase=False))
    axis.set_tick_params(which="minor", labelsize=8, labelcolor=ink())


def saved(drawn: Any, path: str | os.PathLike[str], tight: bool = False) -> None:
    """Draw a figure into a file, which is replaced atomically.

    Parameters
    ----------
    drawn : matplotlib.figure.Figure
    path : path-like
        Its suffix determines the format; without one, ``.png`` is appended.
    tight : bool
        Whether the picture is as large as what is drawn, and not as the figure.

    Raises
    ------
    FileError
        If the file cannot be written.
    ValueError
        If matplotlib does not support the format.
    """
    place = path_of(path)
    suffix = os.path.splitext(place)[1][1:]
    if not suffix:  # as matplotlib does
        suffix, place = "png", place.rstrip(".") + ".png"
    content = io.BytesIO()
    drawn.savefig(content, format=suffix, bbox_inches="tight" if tight else None)
    with file_error_context(place):
        replace_file(place, content.getvalue())
