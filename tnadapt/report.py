"""Output: tables of results as text, Markdown and HTML, progress bars, and silencing of other libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import logging
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Self

from tnadapt.argument_checks import checks_arguments, wrong_argument

from .errors import escaped

# Seconds between two updates: a notebook stores each of them in turn.
_PERIOD = 0.1

# -- Tables ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Rows of text, for a terminal, in Markdown, or in HTML.

    Parameters
    ----------
    rows : sequence of sequence of str
        Cells, as many in each row.
    head : sequence of str
        The titles of the columns. A table without them lists names and their values.
    right : collection of int
        The columns that are aligned to the right, as numbers are.
    caption : str
        Above it, in HTML.
    notes : sequence of str
        Lines below it, as text and in HTML.

    Examples
    --------
    >>> table = TextTable([("q", "12")], head=("name", "size"), right=[1], notes=["one weight"])
    >>> print(table)
    name  size
    q       12
    one weight
    >>> print(table.markdown())
    | name | size |
    |---|--:|
    | q | 12 |
    """

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    right: Collection[int] = ()
    caption: str = ""
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.notes])

    def lines(self) -> list[str]:
        """Return one line for each row, with columns that are aligned by spaces."""
        rows = [self.head, *self.rows] if self.head else self.rows
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]

    def markdown(self) -> str:
        """Return the table in Markdown, without its notes; the cells are Markdown, too."""
        rule = "".join("--:|" if column in self.right else "---|" for column in range(len(self.head)))
        head, *rows = (f"| {' | '.join(row)} |" for row in (self.head, *self.rows))
        return "\n".join([head, f"|{rule}", *rows])

    def html(self) -> str:
        """Return the table in HTML. Everything is escaped: names may come from files.

        Examples
        --------
        >>> TextTable([("<rank>", "4")], caption="Config").html()  # doctest: +ELLIPSIS
        '<table><caption>Config</caption><tbody><tr><th style="text-align:left">&lt;rank&gt;</th><td ...>4</td>...'
        """
        head = f"<thead>{self._row(self.head, 'th', 'th')}</thead>" if self.head else ""
        body = "".join(self._row(row, "td" if self.head else "th", "td") for row in self.rows)
        notes = "".join(f"<div>{_text(note)}</div>" for note in self.notes)
        return f"<table><caption>{_text(self.caption)}</caption>{head}<tbody>{body}</tbody></table>{notes}"

    def _row(self, row: Sequence[str], first: str, others: str) -> str:
        cells = []
        for column, text in enumerate(row):
            tag, side = others if column else first, "right" if column in self.right else "left"
            cells.append(f'<{tag} style="text-align:{side}">{_text(text)}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return html.escape(escaped(text))


# -- Progress --------------------------------------------------------------------------------------


class _Nowhere:
    """Where a bar is shown."""

    def show(self, title: str, done: float | None, words: str) -> None:
        pass

    def close(self) -> None:
        pass


class ProgressBar:
    """A progress bar, of which one method fits each kind of callback.

    Parameters
    ----------
    title : str

    Notes
    -----
    ==================  ==========================================================================================
    ``bar.counts``      ``progress=`` of :func:`tnadapt.merge`, :func:`tnadapt.plan`, :func:`tnadapt.convert`,
                        :func:`tnadapt.torch.attach`
    ``bar.steps``       ``progress=`` of :func:`tnadapt.decompose` and :func:`tnadapt.extract`
    ``bar.iterations``  ``callback=`` of :func:`tnadapt.cp`, :func:`tnadapt.tucker` and the others
    ``bar.lines``       ``progress=`` of :func:`tnadapt.verify`
    ==================  ==========================================================================================

    :class:`tnadapt.finetune.BarReporter` shows the trainings of a study. In a notebook the bar needs IPython alone.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> tensor = np.random.default_rng(0).normal(size=(6, 7, 8))
    >>> with tna.ProgressBar("CP") as bar:
    ...     result = tna.cp(tensor, rank=2, callback=bar.iterations)
    >>> bar.words.startswith("iteration ")
    True
    """

    @checks_arguments
    def __init__(self, title: str = "") -> None:
        self.title = title
        self.done: float | None = None
        self.words = ""
        self._shown = _place()
        self._next = 0.0

    @checks_arguments
    def update(self, done: float | None, words: str = "") -> None:
        """Show a state.

        Parameters
        ----------
        done : float or None
            The fraction done, from 0 to 1; None if it is not known.
        words : str
            Next to the bar.
        """
        self.done, self.words = done, words
        if time.monotonic() >= self._next:
            self._draw()

    @checks_arguments
    def counts(self, done: int, total: int) -> None:
        """Show how much is done of a total."""
        self.update(done / total if total else 1.0, f"{done:,} of {total:,}")

    def steps(self, step: Any) -> None:
        """Show a :class:`tnadapt.decomposition.Step`."""
        if not all(hasattr(step, name) for name in ("group", "groups", "iteration", "error")):
            raise wrong_argument("step", "a tnadapt.decomposition.Step", step)
        error = "" if step.error is None else f", iteration {step.iteration}, error {step.error:.4g}"
        self.update(step.group / step.groups, f"group {step.group + 1} of {step.groups}{error}")

    @checks_arguments
    def iterations(self, number: int, error: float) -> None:
        """Show the number of an iteration and its relative error."""
        self.update(None, f"iteration {number}, error {float(error):.4g}")

    @checks_arguments
    def lines(self, line: str) -> None:
        """Show what is done next."""
        self.update(None, line)

    def __enter__(self) -> Self:
        self._draw()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.done = 1.0
        self._draw()
        self._shown.close()

    def _draw(self) -> None:
        self._shown.show(escaped(self.title), self.done, escaped(self.words))
        self._next = time.monotonic() + _PERIOD


def time_left(seconds: float, done: float) -> str:
    """Return how long the rest takes of what came this far in some seconds; nothing in the first second.

    Examples
    --------
    >>> time_left(30, 0.25), time_left(60, 0.01), time_left(0.5, 0.1)
    ('about 1.5 minutes', 'about 1.6 hours', '')
    """
    return "" if seconds < 1 or done <= 0 else about(seconds * (1 - done) / done)


def about(seconds: float) -> str:
    """Return a duration as text.

    Examples
    --------
    >>> about(6000), about(200), about(60), about(0.2)
    ('about 1.7 hours', 'about 3.3 minutes', 'about 60 s', 'about 1 s')
    """
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.2g} {unit}s"
    return f"about {max(1, round(seconds))} s"


def _place() -> _Nowhere:
    # Only a notebook has imported IPython and runs its kernel.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):
        return _Notebook()
    return _Terminal() if sys.stderr.isatty() else _Nowhere()


class _Notebook(_Nowhere):
    """The output of a cell, which is replaced."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, title: str, done: float | None, words: str) -> None:
        # Without a value the bar moves, to show activity.
        value = "" if done is None else f' value="{done:.4f}"'
        share = "" if done is None else f"{done:.0%}"
        beside = " ".join(filter(None, (share, words)))
        page = f"{html.escape(title)} <progress{value}></progress> {html.escape(beside)}"
        output = {"text/html": page, "text/plain": f"{title} {beside}".strip()}
        if self.handle is None:
            display = importlib.import_module("IPython.display").display
            self.handle = display(output, raw=True, display_id=True)
        else:
            self.handle.update(output, raw=True)


class _Terminal(_Nowhere):
    """A line of stderr, which is overwritten."""

    def show(self, title: str, done: float | None, words: str) -> None:
        bar = "" if done is None else f"[{'#' * int(20 * done):20}] {done:.0%}"
        line = " ".join(filter(None, (title, bar, words)))[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr)


# -- Messages of other libraries -----------------------------------------------------------------------


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Show only messages of this level and above of other libraries' loggers inside ``with``."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, old in before.items():
            logging.getLogger(name).setLevel(old)


@contextlib.contextmanager
def silent(transformers: Any, level: int = logging.CRITICAL) -> Iterator[None]:
    """Silence the messages and progress bars of transformers and of the hub's client inside ``with``."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet("transformers", "huggingface_hub", level=level):
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
