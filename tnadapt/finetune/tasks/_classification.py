"""Tasks with one answer for each text or image: classes, several labels, or a number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnadapt.errors import FileError, safe_repr

from .._learning_task import ACCURACY, ClassTask, Evidence, LearningTask, Measured, Metric, Rows
from .._specification import Spec
from ..data import LABEL_COLUMNS, TEXT_COLUMNS, Data, LabelFacts, Samples, Table, facts_of, labelled_texts, number

# -- Columns of texts and labels ---------------------------------------------------------------------------------------


def columns_of(table: Table, spec: Spec) -> tuple[str | None, str | None]:
    """Return the columns of texts and of labels; None for one that is not there."""
    usual = (*spec.label_names, *LABEL_COLUMNS)
    return table.column(spec.text_column, TEXT_COLUMNS), table.column(spec.label_column, usual)


def missing_columns(source: Table, spec: Spec) -> Evidence | None:
    """Return the evidence against a task on labeled texts, or None if there are both columns."""
    text, label = columns_of(source, spec)
    if text is not None and label is not None:
        return None
    what = "texts" if text is None else "labels"
    return Evidence("no", f"{source.name} has no column of {what}, only {source.listed()}")


def label_facts(table: Table, spec: Spec) -> tuple[str, LabelFacts]:
    """Return the name of the label column, and what is in it."""
    name = columns_of(table, spec)[1]
    assert name is not None
    return name, facts_of(table.cells(name), spec.separator)


def texts_of(table: Table, spec: Spec) -> list[str]:
    """Return the texts.

    Raises
    ------
    FileError
        If there is no column of texts, or a cell of it holds something else.
    """
    return table.texts(table.needed_column("text", spec.text_column, TEXT_COLUMNS))


def to_predict(table: Table, spec: Spec, minus_one: bool) -> tuple[list[str], str | None]:
    """Return the texts, and the column of labels; None if there is none, or it hides them and -1 is no label."""
    texts, label = texts_of(table, spec), columns_of(table, spec)[1]
    return texts, None if label is None or (not minus_one and table.hides(label)) else label


# -- Classification of texts: one class each ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classification(ClassTask):
    """Each text has one class: accuracy, cross entropy."""

    name: ClassVar[str] = "classification"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[Metric] = ACCURACY
    stratified: ClassVar[bool] = True

    @classmethod
    def fits(cls, source: Table, spec: Spec) -> Evidence:
        """Words are classes, and so are two numbers; more numbers may be."""
        if lacking := missing_columns(source, spec):
            return lacking
        name, facts = label_facts(source, spec)
        if (name in source.words and facts.kind != "lists") or (facts.kind == "integers" and facts.count <= 2):
            return Evidence("evident", f"{name!r} has classes")
        if facts.kind in ("integers", "fractions"):
            if facts.kind == "fractions" and not source.lines:
                return Evidence("no", f"{name!r} has fractions, {facts.range}")
            return Evidence(
                "possible", f"the {facts.count} different numbers in {name!r}, {facts.range}, may be classes"
            )
        if facts.kind != "words":
            return Evidence("no", f"{name!r} has {facts.kind if facts.kind == 'lists' else 'no words or integers'}")
        if facts.separator:
            return Evidence("possible", f"{safe_repr(facts.joint)} in {name!r} may be one class")
        if facts.odd:
            return Evidence(
                "possible",
                f"most of the {facts.count} different labels in {name!r} are numbers, but not {safe_repr(facts.odd)}",
            )
        if facts.count > 2 and 2 * facts.count > facts.rows:
            return Evidence("possible", f"{name!r} has {facts.count} different labels in {facts.rows} rows")
        return Evidence("evident", f"{name!r} has {facts.count} different words")

    @classmethod
    def read(cls, source: Table, spec: Spec) -> Data:
        """Return the texts with their classes, which are the distinct labels, sorted."""
        return labelled_texts(source, spec.text_column, spec.label_column, spec.label_names)

    def samples(self, source: Table, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their classes if there is a column of labels."""
        texts, label = to_predict(source, spec, "-1" in self.classes)
        if label is None:
            return Samples(texts, np.zeros(len(texts), np.int64)), False
        words = [str(source.word(label, row, cell)).strip() for row, cell in enumerate(source.cells(label))]
        return Samples(texts, np.array(self.numbers_of(words, source.name), np.int64)), True

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(logits.float(), labels)

    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return accuracy and cross entropy."""
        logits = torch.stack(list(rows))
        accuracy = float((logits.argmax(1) == labels).double().mean())
        return Measured(accuracy, float(nn.functional.cross_entropy(logits, labels)))

    def predicted(self, row: Tensor) -> Tensor:
        """Return the number of the class."""
        return row.argmax().reshape(1)

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the class and its probability."""
        best = int(row.argmax())
        return {"prediction": self.classes[best], "score": round(float(row.double().softmax(0)[best]), 6)}

    def settings(self) -> dict[str, Any]:
        """Return nothing: the study has the classes, and its task is the usual one."""
        return {}


# -- Classification of texts: any number of labels each ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MultiLabel(ClassTask):
    """Each text has any number of labels: micro and macro F1, binary cross entropy."""

    name: ClassVar[str] = "multi-label"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[Metric] = Metric("micro F1")
    options: ClassVar[tuple[str, ...]] = ("separator",)

    @classmethod
    def fits(cls, source: Table, spec: Spec) -> Evidence:
        """Lists are several labels, and so are words with a separator whose pieces are also in other labels."""
        if lacking := missing_columns(source, spec):
            return lacking
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
    def read(cls, source: Table, spec: Spec) -> Data:
        """Return the texts; targets are 1 for the labels of a text and 0 for others."""
        name, facts = label_facts(source, spec)
        parts = [(part, _lists(part, name, facts.separator)) for part in source.parts([name], name)]
        classes = tuple(sorted({label for _, lists in parts for labels in lists for label in labels}))
        if len(classes) < 2:
            raise FileError(f"{name!r} of {source.name} has {len(classes)} different label; --task multi-label needs 2")
        task = cls(classes)
        samples = (Samples(texts_of(part, spec), task._marks(lists, source.name)) for part, lists in parts)
        return Data(source.name, "text", classes, *samples)

    def samples(self, source: Table, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their labels if there is a column of them."""
        texts, label = to_predict(source, spec, "-1" in self.classes)
        if label is None:
            return Samples(texts, np.zeros((len(texts), len(self.classes)), np.float32)), False
        _, facts = label_facts(source, spec)
        return Samples(texts, self._marks(_lists(source, label, facts.separator), source.name)), True

    def _marks(self, labels: Sequence[Sequence[str]], name: str) -> NDArray[np.float32]:
        marks = np.zeros((len(labels), len(self.classes)), np.float32)
        for row, some in enumerate(labels):
            marks[row, self.numbers_of(some, name)] = 1
        return marks

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
        scores = dict(zip(self.classes, row.double().sigmoid().tolist(), strict=True))
        labels = [name for name, probability in scores.items() if probability > 0.5]
        return {"prediction": labels, "scores": {name: round(score, 6) for name, score in scores.items()}}


def _lists(table: Table, column: str, separator: str | None) -> list[list[str]]:
    """Return the labels of each cell of a column as words."""
    lists = []
    for row, cell in enumerate(table.cells(column)):
        pieces: Any = cell if not isinstance(cell, str) else cell.split(separator) if separator else [cell]
        if not isinstance(pieces, list) or not all(isinstance(piece, (str, int)) for piece in pieces):
            raise FileError(f"{table.place(row)}: {safe_repr(cell)} is not a list of labels")
        named = [str(table.word(column, row, piece)).strip() for piece in pieces]
        if not all(named):
            raise FileError(f"{table.place(row)}: {safe_repr(cell)} has an empty label")
        lists.append(named)
    return lists


# -- Classification of images: one class each --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageClassification(Classification):
    """Each image has one class: accuracy, cross entropy."""

    name: ClassVar[str] = "image-classification"
    auto: ClassVar[str] = "AutoModelForImageClassification"
    kind: ClassVar[Literal["text", "image"]] = "image"

    @classmethod
    def fits(cls, source: Any, spec: Spec) -> Evidence:
        """Images are for this task alone."""
        return Evidence("evident", f"{source.name} has images")

    @classmethod
    def read(cls, source: Any, spec: Spec) -> Data:
        """Return the images."""
        data: Data = source
        return data

    def samples(self, source: Any, spec: Spec) -> tuple[Samples, bool]:
        """Return images with their classes."""
        names = [source.classes[int(label)] for label in source.samples.labels]
        numbers = self.numbers_of([name.strip() for name in names], source.name)
        return Samples(source.samples.inputs, np.array(numbers, np.int64)), True


# -- Regression on texts: one number each ------------------------------------------------------------------------------


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
    def fits(cls, source: Table, spec: Spec) -> Evidence:
        """Fractions of at least three values are quantities, and so are many integers with gaps."""
        if lacking := missing_columns(source, spec):
            return lacking
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
    def read(cls, source: Table, spec: Spec) -> Data:
        """Return the texts with their numbers."""
        name = columns_of(source, spec)[1]
        assert name is not None
        parts = source.parts([name], name)
        return Data(source.name, "text", (), *(Samples(texts_of(part, spec), _numbers(part, name)) for part in parts))

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with mean and deviation of the training targets."""
        deviation = float(training.labels.std())
        if not deviation:
            raise FileError(
                f"every number to learn from {data.name} is {training.labels[0]:g}; there is nothing to learn"
            )
        return cls(float(training.labels.mean()), deviation)

    def samples(self, source: Table, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their numbers if there is a column of labels."""
        # The number of a text may be -1.
        texts, label = to_predict(source, spec, len(source) <= 1)
        return Samples(texts, np.zeros(len(texts)) if label is None else _numbers(source, label)), label is not None

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
        predicted, truth = torch.stack(list(rows))[:, 0].double(), labels.double()
        loss = float((predicted - truth).square().mean())
        more = {"Pearson": _pearson(predicted, truth), "Spearman": _pearson(_ranks(predicted), _ranks(truth))}
        return Measured(self.deviation * math.sqrt(loss), loss, more)

    def predicted(self, row: Tensor) -> Tensor:
        """Return the number in thousandths of the deviation."""
        return (1000 * row.double()).round().nan_to_num().long()

    def different(self, rows: Rows, others: Rows) -> int:
        """Return the number of samples with predictions that differ by a thousandth of the deviation."""
        return sum(not bool((row - other).abs().max() < 1e-3) for row, other in zip(rows, others, strict=True))

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the number."""
        return {"prediction": float(f"{self.mean + self.deviation * float(row[0]):.6g}")}


def _numbers(table: Table, column: str) -> NDArray[np.float64]:
    numbers = np.empty(len(table))
    for row, cell in enumerate(table.cells(column)):
        try:
            numbers[row] = number(cell)
        except ValueError as error:
            raise FileError(f"{table.place(row)}: {error}; --task regression needs numbers") from None
    return numbers


def _pearson(x: Tensor, y: Tensor) -> float:
    """Return the Pearson correlation, or 0 if one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Return the ranks, averaged over equal values."""
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean: Tensor = last - (counts.double() - 1) / 2
    return mean[places]
