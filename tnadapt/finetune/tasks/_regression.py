"""Regression on texts: one number each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnadapt.errors import FileError, safe_repr

from .._data import Data, Samples
from .._label_facts import number
from .._learning_task import Evidence, LearningTask, Measured, Rows
from .._sample_tables import Table
from .._score import Metric
from .._specification import Spec
from ._columns import columns_of, label_facts, labels_of, missing_columns, texts_of

__all__ = ["Regression"]

# Integers of more different values than this, and not consecutive, are quantities.
_CLASSES = 50


@dataclasses.dataclass(frozen=True)
class Regression(LearningTask):
    """Each text has a number: root mean square error, correlations; squared error.

    The model learns numbers of mean 0 and standard deviation 1, so that rates do not depend on their unit.

    Attributes
    ----------
    mean, deviation : float
        Of the training targets.
    """

    name: ClassVar[str] = "regression"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[Metric] = Metric("RMSE", lower=True, percent=False)

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        for name, low in (("mean", -math.inf), ("deviation", 0.0)):
            value = getattr(self, name)
            possible = type(value) in (int, float) and math.isfinite(value) and value > low
            self._require(name, value, possible, "a positive number" if low == 0 else "a finite number")

    @classmethod
    def fits(cls, source: Table | Data, spec: Spec) -> Evidence:
        """Fractions of at least three values are quantities, and so are many integers with gaps."""
        if lacking := missing_columns(source, spec):
            return lacking
        assert isinstance(source, Table)
        name, facts = label_facts(source, spec)
        if facts.kind not in ("integers", "fractions"):
            what = "lists" if facts.kind == "lists" else "labels that are not numbers"
            such = f", such as {safe_repr(facts.odd)}" if facts.odd else ""
            return Evidence("no", f"{name!r} has {what}{such}")
        if name in source.words:
            return Evidence("no", f"{name!r} has the numbers of {len(source.words[name])} classes")
        if facts.count > 2 and facts.kind == "fractions":
            return Evidence("evident", f"{name!r} has fractions, {facts.range}")
        low, _, high = facts.range.partition(" to ")
        if facts.count > _CLASSES and float(high) - float(low) >= 2 * facts.count:
            return Evidence("evident", f"{name!r} has {facts.count} different numbers, {facts.range}")
        return Evidence(
            "possible", f"the {facts.count} different numbers in {name!r}, {facts.range}, may be quantities"
        )

    @classmethod
    def read(cls, source: Table | Data, spec: Spec) -> Data:
        """Return the texts with their numbers."""
        assert isinstance(source, Table)
        name = columns_of(source, spec)[1]
        assert name is not None
        test = source.test([name], name)
        held = None if test is None else Samples(texts_of(test, spec), _numbers(test, list(test.columns[name])))
        return Data(
            source.name, "text", (), Samples(texts_of(source, spec), _numbers(source, labels_of(source, spec))), held
        )

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with mean and deviation of the training targets."""
        deviation = float(training.labels.std())
        if not deviation:
            raise FileError(
                f"every number to learn from {data.name} is {training.labels[0]:g}; there is nothing to learn"
            )
        return cls(float(training.labels.mean()), deviation)

    def samples(self, source: Table | Data, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their numbers if there is a column of labels."""
        assert isinstance(source, Table)
        texts = texts_of(source, spec)
        label = columns_of(source, spec)[1]
        # One text may well have the number -1.
        if label is None or (len(texts) > 1 and source.hides(label)):
            return Samples(texts, np.zeros(len(texts))), False
        return Samples(texts, _numbers(source, labels_of(source, spec))), True

    @property
    def outputs(self) -> int | None:
        """One."""
        return 1

    def targets(self, samples: Samples) -> Tensor:
        """Return the numbers with mean 0 and standard deviation 1."""
        return torch.from_numpy((samples.labels - self.mean) / self.deviation).float()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(logits.float()[:, 0], labels)

    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return the root mean square error in the unit of the data, Pearson's and Spearman's correlation."""
        found, truth = torch.stack(list(rows))[:, 0].double(), labels.double()
        loss = float((found - truth).square().mean())
        more = {"Pearson": _pearson(found, truth), "Spearman": _pearson(_ranks(found), _ranks(truth))}
        return Measured(self.deviation * math.sqrt(loss), loss, more)

    def predicted(self, row: Tensor) -> Tensor:
        """Return the number in thousandths of the deviation."""
        return (1000 * row.double()).round().nan_to_num().long()

    def different(self, rows: Rows, others: Rows) -> int:
        """Return the number of samples with predictions that differ by a thousandth of the deviation."""
        return sum(not bool((one - other).abs().max() < 1e-3) for one, other in zip(rows, others, strict=True))

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the number."""
        return {"prediction": float(f"{self.mean + self.deviation * float(row[0]):.6g}")}


def _numbers(table: Table, cells: Sequence[Any]) -> NDArray[np.float64]:
    found = np.empty(len(cells))
    for row, cell in enumerate(cells):
        try:
            found[row] = number(cell)
        except ValueError as error:
            raise FileError(f"{table.place(row)}: {error}; --task regression needs numbers") from None
    return found


def _pearson(x: Tensor, y: Tensor) -> float:
    """Return the correlation; 0 if one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Return the ranks, those of equal values averaged."""
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean: Tensor = last - (counts.double() - 1) / 2
    return mean[places]
