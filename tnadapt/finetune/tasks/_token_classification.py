"""Token classification: one tag for each word of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnadapt.errors import FileError, TnadaptError, safe_repr

from .._inputs import IGNORED, Texts, token_targets
from .._learning_task import ClassTask, Evidence, Measured, Metric, Rows
from .._specification import Part, Spec
from ..data import Data, Samples, Table

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")
#: The tag of words that belong to nothing.
OUTSIDE = "O"


@dataclasses.dataclass(frozen=True)
class TokenClassification(ClassTask):
    """Each word has a tag: F1 of words over all tags but ``O``, accuracy, macro F1; cross entropy.

    The first token of a word carries its tag. F1 counts words, not whole entities; without a tag ``O`` it equals the
    accuracy.
    """

    name: ClassVar[str] = "token-classification"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[Metric] = Metric("F1 of words")
    split_words: ClassVar[bool] = True

    @classmethod
    def fits(cls, source: Table, spec: Spec) -> Evidence:
        """Columns of words and tags are for this task alone."""
        words, tags = _columns(source, spec)
        if words is None or tags is None:
            needed = "columns tokens and tags, lists or words with spaces between them"
            return Evidence("no", f"{source.name} has {source.listed()}; it needs {needed}")
        usual = words in WORD_COLUMNS and tags in TAG_COLUMNS
        return Evidence("evident" if usual else "possible", f"{words!r} has words, and {tags!r} may have their tags")

    @classmethod
    def read(cls, source: Table, spec: Spec) -> Data:
        """Return the words with the numbers of their tags."""
        names = _columns(source, spec)
        parts = [_both(part, names) for part in source.parts([name for name in names if name], names[1])]
        classes = tuple(sorted({tag for _, lists in parts for tags in lists for tag in tags}))
        if len(classes) < 2:
            raise FileError(f"{source.name} has the tag {classes[0]!r} alone; --task token-classification needs two")
        task = cls(classes)
        return Data(
            source.name, "text", classes, *(Samples(words, task._numbered(tags, source.name)) for words, tags in parts)
        )

    def samples(self, source: Table, spec: Spec) -> tuple[Samples, bool]:
        """Return words, with their tags if there is a column of them."""
        words, tags = _columns(source, spec)
        if words is None:
            raise FileError(f"{source.name} has no column 'tokens', only {source.listed()}: give --text-column NAME")
        if tags is not None and (not source.hides(tags) or "-1" in self.classes):
            inputs, marks = _both(source, (words, tags))
            return Samples(inputs, self._numbered(marks, source.name)), True
        lists = [_pieces(source, row, cell, "words") for row, cell in enumerate(source.columns[words])]
        return Samples(lists, self._numbered([[self.classes[0]] * len(some) for some in lists], source.name)), False

    def _numbered(self, tags: Sequence[Sequence[str]], name: str) -> NDArray[Any]:
        numbers = np.empty(len(tags), object)
        for row, some in enumerate(tags):
            numbers[row] = self.numbers_of(some, name, "tag")
        return numbers

    def encode(self, samples: Samples, tokenizer: Any, longest: int) -> Part:
        """Return tokens; the first of each word has its tag, and the others none."""
        if not tokenizer.is_fast:
            raise TnadaptError(
                "--task token-classification needs a fast tokenizer, which knows the word of each token; "
                f"{type(tokenizer).__name__} is none: give another with --tokenizer"
            )
        encoding = tokenizer(list(samples.inputs), is_split_into_words=True, truncation=True, max_length=longest)
        targets, words = [], []
        for row, tags in enumerate(samples.labels):
            owners = encoding.word_ids(row)
            first = [word is not None and word != last for word, last in zip(owners, [None, *owners], strict=False)]
            targets.append([tags[word] if begins else IGNORED for word, begins in zip(owners, first, strict=True)])
            words.append([word for word, begins in zip(owners, first, strict=True) if begins])
        return Texts(encoding["input_ids"], token_targets(targets), tokenizer.pad_token_id, words)

    def check(self, compute: Callable[[Any], Tensor], inputs: Any, model: str, data: str) -> None:
        """Raise an error unless there are logits of each tag for each token."""
        shape, expected = tuple(compute(inputs).shape), (*inputs["input_ids"].shape, len(self.classes))
        if shape != expected:
            raise TnadaptError(f"{model} returned {shape} logits for two samples of {data}; expected {expected}")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy, the mean over words."""
        labels = labels[:, : logits.shape[1]]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def rows(self, logits: Tensor, labels: Tensor) -> Rows:
        """Return the logits of the words of each text."""
        some = labels[:, : logits.shape[1]].to(logits.device) != IGNORED
        return [scores[chosen].float().cpu() for scores, chosen in zip(logits, some, strict=True)]

    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return F1 of words over all tags but ``O``, accuracy, macro F1 and cross entropy."""
        logits, truth = torch.cat(list(rows)), labels[labels != IGNORED]
        if not len(truth) or not bool(logits.isfinite().all()):
            return Measured(float("nan"), float("nan"))
        here = logits.argmax(1)
        hits = torch.bincount(truth[here == truth], minlength=len(self.classes)).double()
        both = sum(torch.bincount(tags, minlength=len(self.classes)).double() for tags in (here, truth))
        assert isinstance(both, Tensor)
        inside = torch.tensor([name != OUTSIDE for name in self.classes])
        micro = float(2 * hits[inside].sum() / both[inside].sum().clamp_min(1))
        used = both > 0
        macro = float((2 * hits[used] / both[used]).mean())
        more = {"accuracy": float(hits.sum() / len(truth)), "macro F1": macro}
        return Measured(micro, float(nn.functional.cross_entropy(logits, truth)), more)

    def predicted(self, row: Tensor) -> Tensor:
        """Return the numbers of the tags."""
        return row.argmax(1)

    def answers(self, rows: Rows, part: Part, samples: Samples) -> list[dict[str, Any]]:
        """Return a tag for each word; None for one that is cut off or has no token."""
        assert isinstance(part, Texts)
        answers = []
        for row, places, words in zip(rows, part.words, samples.inputs, strict=True):
            here = self.answer(row)
            whole: dict[str, list[Any]] = {name: [None] * len(words) for name in here}
            for name, values in here.items():
                for place, value in zip(places, values, strict=True):
                    whole[name][place] = value
            answers.append(whole)
        return answers

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the tag of each word that has a token."""
        scores = row.double().softmax(1).amax(1) if len(row) else row.new_zeros(0)
        return {
            "prediction": [self.classes[int(tag)] for tag in self.predicted(row)] if len(row) else [],
            "scores": [round(score, 6) for score in scores.tolist()],
        }


def _columns(table: Table, spec: Spec) -> tuple[str | None, str | None]:
    return table.column(spec.text_column, WORD_COLUMNS), table.column(spec.label_column, TAG_COLUMNS)


def _both(table: Table, names: tuple[str | None, str | None]) -> tuple[list[list[str]], list[list[str]]]:
    """Return words and tags."""
    words_in, tags_in = names
    assert words_in is not None
    assert tags_in is not None
    words, tags = [], []
    for row, (cell, marks) in enumerate(zip(table.columns[words_in], table.columns[tags_in], strict=True)):
        words.append(_pieces(table, row, cell, "words"))
        if isinstance(marks, list):
            marks = [table.word(tags_in, row, mark) for mark in marks]
        tags.append(_pieces(table, row, marks, "tags"))
        if len(words[-1]) != len(tags[-1]):
            raise FileError(f"{table.place(row)}: {len(words[-1])} words and {len(tags[-1])} tags; each word needs one")
    return words, tags


def _pieces(table: Table, row: int, cell: Any, what: str) -> list[str]:
    pieces = cell.split() if isinstance(cell, str) else cell
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, (str, int)) for piece in pieces):
        raise FileError(f"{table.place(row)}: {safe_repr(cell)} is not a list of {what}")
    return [str(piece) for piece in pieces]
