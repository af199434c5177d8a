"""Classification of texts: one class each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.errors import safe_repr

from .._data import Data, Samples
from .._data_sources import labelled_texts
from .._learning_task import Evidence, LearningTask, Measured, Rows
from .._sample_tables import Table
from .._score import ACCURACY, Metric
from .._specification import Spec
from ._columns import class_numbers, columns_of, label_facts, labels_of, missing_columns, texts_of

__all__ = ["Classification"]


@dataclasses.dataclass(frozen=True)
class Classification(LearningTask):
    """Each text has one class: accuracy, cross entropy.

    Attributes
    ----------
    classes : tuple of str
    """

    name: ClassVar[str] = "classification"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[Metric] = ACCURACY
    stratified: ClassVar[bool] = True

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        self._require_classes(self.classes)

    @classmethod
    def fits(cls, source: Table | Data, spec: Spec) -> Evidence:
        """Words are classes, and so are two numbers; more numbers may be."""
        if lacking := missing_columns(source, spec):
            return lacking
        assert isinstance(source, Table)
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
    def read(cls, source: Table | Data, spec: Spec) -> Data:
        """Return the texts with their classes, which are the distinct labels, sorted."""
        assert isinstance(source, Table)
        return labelled_texts(source, spec.text_column, spec.label_column, spec.label_names)

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with the classes of the data."""
        return cls(data.classes)

    def samples(self, source: Table | Data, spec: Spec) -> tuple[Samples, bool]:
        """Return texts, with their classes if there is a column of labels."""
        assert isinstance(source, Table)
        texts = texts_of(source, spec)
        label = columns_of(source, spec)[1]
        if label is None or (source.hides(label) and "-1" not in self.classes):
            return Samples(texts, np.zeros(len(texts), np.int64)), False
        cells = [source.word(label, row, cell) for row, cell in enumerate(labels_of(source, spec))]
        return Samples(texts, self.numbered(cells, source.name)), True

    def numbered(self, labels: list[Any], name: str) -> np.ndarray:
        """Return the numbers of classes.

        Raises
        ------
        FileError
            If the task has no such class.
        """
        return np.array(class_numbers(self.classes, [str(label).strip() for label in labels], name), np.int64)

    @property
    def outputs(self) -> int | None:
        """The number of classes."""
        return len(self.classes)

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
