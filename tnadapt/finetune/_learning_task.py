"""LearningTask, the interface of a task: which data fit it, how they are encoded, its loss and its metrics."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from tnadapt.errors import ConfigError, FileError, TnadaptError, safe_repr

from ._inputs import Texts
from ._specification import Part, Spec
from .data import Data, Samples, Table

# -- Metrics -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes
    ----------
    name : str
    lower : bool
        Whether lower is better.
    percent : bool
        Whether it is a fraction that is shown in percent.

    Examples
    --------
    >>> ACCURACY.show([0.875]), Metric("loss", lower=True, percent=False).show([1.25, 1.75])
    ('87.5%', '1.5 ± 0.354')
    >>> ACCURACY.quality(0.9), Metric("loss", lower=True).quality(0.9)
    (0.9, -0.9)
    """

    name: str
    lower: bool = False
    percent: bool = True

    @property
    def worst(self) -> float:
        """A value worse than all others."""
        return math.inf if self.lower else -math.inf

    def quality(self, value: float) -> float:
        """Return a number that is higher for better values."""
        return -value if self.lower else value

    def show(self, values: Sequence[float]) -> str:
        """Return the mean, and the standard deviation of several values, as text."""
        mean = statistics.fmean(values)
        text = f"{mean:.1%}" if self.percent else f"{mean:.4g}"
        if len(values) > 1:
            spread = statistics.stdev(values)
            text += f" ± {100 * spread:.1f}" if self.percent else f" ± {spread:.3g}"
        return text

    @property
    def unit(self) -> str:
        """The name with the direction, for captions."""
        return f"{self.name}, lower is better" if self.lower else self.name


ACCURACY = Metric("accuracy")


# -- The interface -----------------------------------------------------------------------------------------------------


Rows = Sequence[Tensor]
"""What is kept of the logits of each sample, in the order of the samples."""


class Evidence(NamedTuple):
    """Whether data are of a task.

    Attributes
    ----------
    level : {"evident", "possible", "allowed", "no"}
        ``possible`` data are used for the task only if the user names it, and ``allowed`` ones are not even proposed.
    why : str
        A clause for messages: what was found, and for ``no`` what would be needed.
    """

    level: Literal["evident", "possible", "allowed", "no"]
    why: str


class Measured(NamedTuple):
    """The outcome of :meth:`LearningTask.measure`.

    Attributes
    ----------
    score : float
        Of the task's metric.
    loss : float
    more : dict
        Other metrics by name.
    """

    score: float
    loss: float
    more: Mapping[str, float] = {}


class LearningTask(abc.ABC):
    """One kind of task, such as classification.

    A subclass is a frozen dataclass whose fields are JSON values: all that is needed to predict with a trained model.
    They are written to the adapter's file. A task of texts reads a :class:`~tnadapt.finetune.data.Table`, and a task of
    images a :class:`~tnadapt.finetune.data.Data`; :func:`evidence_of` refuses the other.
    """

    name: ClassVar[str]
    #: The class of transformers that loads the model.
    auto: ClassVar[str]
    kind: ClassVar[Literal["text", "image"]] = "text"
    metric: ClassVar[Metric]
    #: Whether the tokenizer takes texts as lists of words.
    split_words: ClassVar[bool] = False
    #: Whether labels are class indices, of which every part gets an equal share.
    stratified: ClassVar[bool] = False
    #: The user's options that other tasks do not accept, as fields of Spec.
    options: ClassVar[tuple[str, ...]] = ()
    #: Whether the model needs a head for the task; else its own output is used.
    needs_head: ClassVar[bool] = True
    #: Batch size of evaluation, in batches of training.
    evaluation_factor: ClassVar[int] = 4
    #: What may differ between a merged model and an adapted one, for messages.
    numbers: ClassVar[str] = "logits"

    # -- Data --------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def fits(cls, source: Any, spec: Spec) -> Evidence:
        """Return whether the data are of this task."""

    @classmethod
    @abc.abstractmethod
    def read(cls, source: Any, spec: Spec) -> Data:
        """Return samples with targets.

        Raises
        ------
        FileError
            If a row does not fit the task.
        """

    @classmethod
    @abc.abstractmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task for these data; only the training samples may be measured."""

    @abc.abstractmethod
    def samples(self, source: Any, spec: Spec) -> tuple[Samples, bool]:
        """Return samples to predict, and whether they have targets.

        Raises
        ------
        FileError
            If there are no inputs, or a target is unknown to the task.
        """

    # -- Model -------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def outputs(self) -> int | None:
        """The size of the last axis of the logits; None for that of the model."""

    def targets(self, samples: Samples) -> Tensor:
        """Return the targets of samples as :attr:`~tnadapt.finetune.Problem.labels`."""
        return torch.from_numpy(samples.labels)

    def encode(self, samples: Samples, tokenizer: Any, longest: int) -> Part:
        """Return texts as tokens, at most ``longest`` of each."""
        tokens = tokenizer(list(samples.inputs), truncation=True, max_length=longest)["input_ids"]
        return Texts(tokens, self.targets(samples), tokenizer.pad_token_id)

    def check(self, compute: Callable[[Any], Tensor], inputs: Any, model: str, data: str) -> None:
        """Raise an error if the model's logits for a batch are not those of the task.

        Parameters
        ----------
        compute : callable
            Returns the logits of inputs.
        inputs : any
            Those of two samples.
        model, data : str
            Names for the message.

        Raises
        ------
        TnadaptError
        """
        shape = tuple(compute(inputs).shape)
        if self.outputs is not None and shape[1:] != (self.outputs,):
            raise TnadaptError(
                f"{model} returned {shape} logits for two samples of {data}; expected (2, {self.outputs})"
            )

    @abc.abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""

    # -- Evaluation --------------------------------------------------------------------------------

    def rows(self, logits: Tensor, labels: Tensor) -> Rows:
        """Return what is kept of the logits of a batch: one tensor per sample, float32 on the CPU."""
        return list(logits.float().cpu())

    @abc.abstractmethod
    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return the metrics of a part."""

    @abc.abstractmethod
    def predicted(self, row: Tensor) -> Tensor:
        """Return the prediction for one sample as integers."""

    @abc.abstractmethod
    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the prediction for one sample as the user reads it: JSON values by column."""

    def answers(self, rows: Rows, part: Part, samples: Samples) -> list[dict[str, Any]]:
        """Return the prediction for each sample."""
        return [self.answer(row) for row in rows]

    def complete(
        self,
        model: Any,
        tokenizer: Any,
        samples: Samples,
        longest: int,
        batch: int,
        new_tokens: int | None,
        device: torch.device,
    ) -> list[str] | None:
        """Return what the model writes after each sample; None if the task is not about writing."""
        return None

    def digest(self, rows: Rows) -> str:
        """Return the SHA-256 of the predictions, in order."""
        numbers = (self.predicted(row).to(torch.int64).cpu().numpy().astype("<i8") for row in rows)
        return hashlib.sha256(b"".join(row.tobytes() for row in numbers)).hexdigest()

    def different(self, rows: Rows, others: Rows) -> int:
        """Return the number of samples for which two predictions differ."""
        pairs = zip(rows, others, strict=True)
        return sum(not torch.equal(self.predicted(row), self.predicted(other)) for row, other in pairs)

    def largest_gap(self, rows: Rows, others: Rows) -> float:
        """Return the largest difference between two outputs."""
        gaps = ((row - other).abs() for row, other in zip(rows, others, strict=True))
        return max((float(gap.max()) for gap in gaps if gap.numel()), default=0.0)

    # -- Files -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **{name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Return the task of :meth:`to_dict`.

        Raises
        ------
        TnadaptError
            If a field is missing or of another type.
        """
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name != "name"}
        try:
            return cls(**fields)
        except TypeError as error:
            raise TnadaptError(f"the description of the task {cls.name!r} is damaged: {error}") from None

    def _require(self, field: str, value: Any, possible: bool, expected: str) -> None:
        """Raise a ConfigError that names the field if its value is not possible."""
        if not possible:
            raise ConfigError(f"{field} of the task {self.name!r} must be {expected}; got {safe_repr(value)}")

    def settings(self) -> dict[str, Any]:
        """Return what a study's settings say about the task."""
        return {"task": self.to_dict()}


def evidence_of(task: type[LearningTask] | LearningTask, source: Table | Data, spec: Spec) -> Evidence:
    """Return whether data are of a task: they must have texts or images, as the task has."""
    if (task.kind == "image") == isinstance(source, Data):
        return task.fits(source, spec)
    what = "has images" if isinstance(source, Data) else "is a table, not a folder of images or an .npz"
    return Evidence("no", f"{source.name} {what}")


@dataclasses.dataclass(frozen=True)
class ClassTask(LearningTask):
    """A task whose answers are made of named classes.

    Attributes
    ----------
    classes : tuple of str
    """

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        words = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        possible = words and len(set(self.classes)) == len(self.classes) >= 2
        self._require("classes", self.classes, possible, "two or more different names")

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with the classes of the data."""
        return cls(data.classes)

    @property
    def outputs(self) -> int | None:
        """The number of classes."""
        return len(self.classes)

    def numbers_of(self, labels: Sequence[str], name: str, what: str = "label") -> list[int]:
        """Return the numbers of classes by their names, which messages call by ``what``.

        Raises
        ------
        FileError
            If there is no such class.
        """
        place = {label: index for index, label in enumerate(self.classes)}
        for label in labels:
            if label not in place:
                known = ", ".join(map(repr, self.classes[:20]))
                raise FileError(f"{name} has the {what} {safe_repr(label)}; the adapter knows {known}")
        return [place[label] for label in labels]


# -- The samples of a task on texts, as tokens -------------------------------------------------------------------------


def encoded(
    task: LearningTask, samples: Mapping[str, Samples], tokenizer: Any, longest: int, model: Any, name: str
) -> dict[str, Part]:
    """Return the parts as tokens, after checking them.

    Raises
    ------
    TnadaptError
        If a text has no token, none has a known word, or the model does not know a token.
    """
    known = model.get_input_embeddings().num_embeddings
    special = torch.tensor(tokenizer.all_special_ids)
    parts: dict[str, Part] = {}
    for part, some in samples.items():
        texts = task.encode(some, tokenizer, longest)
        assert isinstance(texts, Texts)
        # If the folder has no tokenizer, transformers returns one without a vocabulary.
        if all(bool(torch.isin(tokens, special).all()) for tokens in texts.tokens):
            raise TnadaptError(
                f"{safe_repr(name)} has no tokenizer, or one that knows no word of the texts; give a folder or hub "
                "name with one as --tokenizer"
            )
        if texts.lengths is not None and not bool(texts.lengths.all()):
            empty = some.inputs[int(texts.lengths.argmin())]
            raise TnadaptError(f"the tokenizer of {safe_repr(name)} finds no token in {safe_repr(empty)}")
        top = max((int(tokens.max()) for tokens in texts.tokens if len(tokens)), default=0)
        if top >= known:
            raise TnadaptError(
                f"the tokenizer returned token {top}, but the model has only {known} tokens: they do not fit together"
            )
        parts[part] = texts
    return parts
