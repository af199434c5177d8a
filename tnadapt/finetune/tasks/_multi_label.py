"""Multi-label classification of texts: any number of labels each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnadapt.errors import FileError, safe_repr

from .._data import Data, Samples
from .._learning_task import Evidence, LearningTask, Measured, Rows
from .._sample_tables import Table
from .._score import Metric
from .._specification import Spec
from ._columns import (
    class_numbers,
    columns_of,
    label_facts,
    labels_of,
    missing_columns,
    texts_of,
)

__all__ = ["MultiLabel"]


@dataclasses.dataclass(frozen=True)
class MultiLabel(LearningTask):
    """Each text has any number of labels: micro and macro F1, binary cross entropy.

    Attributes
    ----------
    classes : tuple of str
    """

    name: ClassVar[str] = "multi-label"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[Metric] = Metric("micro F1")
    options: ClassVar[tuple[str, ...]] = ("separator",)

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        self._require_classes(self.classes)

    @classmethod
    def fits(cls, source: Table | Data, spec: Spec) -> Evidence:
        """Lists are several labels, and so are words with a separator whose pieces are also in other labels."""
        if lacking := missing_columns(source, spec):
            return lacking
        assert isinstance(source, Table)
        name, facts = label_facts(source, spec)
        if facts.kind == "lists":
            return Evidence("evident", f"{name!r} has lists")
        if facts.separator is None:
            marks = safe_repr(spec.separator) if spec.separator else "'|' or ';'; give --separator if there is another"
            return Evidence("no", f"no label in {name!r} has {marks}")
        if facts.alone and not spec.separator:
            return Evidence(
                "possible",
                f"{safe_repr(facts.joint)} in {name!r} may be several labels, separated by {facts.separator!r}, but "
                f"{safe_repr(facts.alone)} is in no other label",
            )
        return Evidence("evident", f"labels in {name!r} are separated by {facts.separator!r}")

    @classmethod
    def read(cls, source: Table | Data, spec: Spec) -> Data:
        """Return the texts; targets are 1 for the labels of a text and 0 for others."""
        assert isinstance(source, Table)
        name, facts = label_facts(source, spec)
        test = source.test([name], name)
        labels = _lists(source, name, labels_of(source, spec), facts.separator)
        more = [] if test is None else _lists(test, name, list(test.columns[name]), facts.separator)
        classes = tuple(sorted({one for some in (*labels, *more) for one in some}))
        if len(classes) < 2:
            raise FileError(f"{name!r} of {source.name} has {len(classes)} different label; --task multi-label needs 2")
        made = cls(classes)
        held = None if test is None else Samples(texts_of(test, spec), made._marks(more, source.name))
        return Data(
            source.name, "text", classes, Samples(texts_of(source, spec), made._marks(labels, source.name)), held
        )

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with the labels of the data."""
        return cls(data.classes)

    def samples(self, source: Table | Data, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their labels if there is a column of them."""
        assert isinstance(source, Table)
        texts = texts_of(source, spec)
        label = columns_of(source, spec)[1]
        if label is None or (source.hides(label) and "-1" not in self.classes):
            return Samples(texts, np.zeros((len(texts), len(self.classes)), np.float32)), False
        name, facts = label_facts(source, spec)
        labels = _lists(source, name, labels_of(source, spec), facts.separator)
        return Samples(texts, self._marks(labels, source.name)), True

    def _marks(self, labels: Sequence[Sequence[str]], name: str) -> NDArray[np.float32]:
        found = np.zeros((len(labels), len(self.classes)), np.float32)
        for row, some in enumerate(labels):
            found[row, class_numbers(self.classes, some, name)] = 1
        return found

    @property
    def outputs(self) -> int | None:
        """The number of labels."""
        return len(self.classes)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross entropy, the mean over samples and labels."""
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)

    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return micro and macro F1 at a probability of one half, and the loss."""
        logits = torch.stack(list(rows))
        here, truth = logits > 0, labels > 0.5
        hits = (here & truth).sum(0).double()
        both = here.sum(0).double() + truth.sum(0).double()
        macro = torch.where(both > 0, 2 * hits / both.clamp_min(1), 0.0).mean()
        micro = float(2 * hits.sum() / both.sum().clamp_min(1)) if bool(logits.isfinite().all()) else float("nan")
        more = {"macro F1": float(macro), "all labels right": float((here == truth).all(1).double().mean())}
        return Measured(micro, float(self.loss(logits, labels)), more)

    def predicted(self, row: Tensor) -> Tensor:
        """Return 1 for the labels of a probability above one half, else 0."""
        return (row > 0).long()

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the labels of a probability above one half, and the probabilities of all."""
        found = row.double().sigmoid().tolist()
        labels = [name for name, one in zip(self.classes, found, strict=True) if one > 0.5]
        scores = {name: round(one, 6) for name, one in zip(self.classes, found, strict=True)}
        return {"prediction": labels, "scores": scores}


def _lists(table: Table, column: str, cells: Sequence[Any], separator: str | None) -> list[list[str]]:
    """Return the labels of each cell as words."""
    found = []
    for row, cell in enumerate(cells):
        pieces: Any = cell if not isinstance(cell, str) else cell.split(separator) if separator else [cell]
        if not isinstance(pieces, list) or not all(isinstance(one, (str, int)) for one in pieces):
            raise FileError(f"{table.place(row)}: {safe_repr(cell)} is not a list of labels")
        named = [str(table.word(column, row, one)).strip() for one in pieces]
        if not all(named):
            raise FileError(f"{table.place(row)}: {safe_repr(cell)} has an empty label")
        found.append(named)
    return found
