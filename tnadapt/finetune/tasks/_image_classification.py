"""Classification of images: one class each."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from tnadapt.errors import FileError

from .._data import Data, Samples
from .._learning_task import Evidence
from .._sample_tables import Table
from .._specification import Spec
from ._classification import Classification

__all__ = ["ImageClassification"]


@dataclasses.dataclass(frozen=True)
class ImageClassification(Classification):
    """Each image has one class: accuracy, cross entropy."""

    name: ClassVar[str] = "image-classification"
    auto: ClassVar[str] = "AutoModelForImageClassification"
    kind: ClassVar[Literal["text", "image"]] = "image"

    @classmethod
    def fits(cls, source: Table | Data, spec: Spec) -> Evidence:
        """Images are for this task alone."""
        if isinstance(source, Data):
            return Evidence("evident", f"{source.name} has images")
        return Evidence("no", f"{source.name} is a table, not a folder of images or an .npz")

    @classmethod
    def read(cls, source: Table | Data, spec: Spec) -> Data:
        """Return the images."""
        assert isinstance(source, Data)
        return source

    def samples(self, source: Table | Data, spec: Spec) -> tuple[Samples, bool]:
        """Return images with their classes."""
        if not isinstance(source, Data):
            raise FileError(f"{source.name} is a table; the adapter predicts images: give a folder of them")
        names = [source.classes[int(label)] for label in source.samples.labels]
        return Samples(source.samples.inputs, self.numbered(names, source.name)), True
