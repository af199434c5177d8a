"""Labeled samples, the common form of all data sources, and their split into parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.errors import FileError, TnadaptError, pluralize

__all__ = ["HOLDOUT", "PARTS", "Data", "Labels", "Samples", "choose", "divide"]

PARTS = ("training", "validation", "test")
#: The fraction of each class held out to choose learning rates.
HOLDOUT = 0.2

Labels = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs and their classes.

    Attributes
    ----------
    inputs : sequence
        Texts; or images, each an array ``(height, width[, channels])`` of uint8 or of floats from 0 to 1, a path, or
        a PIL image. A ``take`` method is used if there is one.
    labels : array, one row per sample
        Indices into :attr:`Data.classes`, int64 of shape (n,); other tasks have others.
    """

    inputs: Any
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Labels) -> Samples:
        """Return these samples, in this order."""
        if isinstance(self.inputs, np.ndarray):
            return Samples(self.inputs[indices], self.labels[indices])
        if hasattr(self.inputs, "take"):
            return Samples(self.inputs.take(indices), self.labels[indices])
        return Samples([self.inputs[int(i)] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of one source.

    Attributes
    ----------
    name : str
        Name in reports.
    kind : {"image", "text"}
    classes : tuple of str
    samples : Samples
        For training and validation, and for the test if ``test`` is None.
    test : Samples, optional
        The test part, if the source has one.
    test_name : str
        The source's name of it.
    hidden : tuple of str and sequence, optional
        The source's name and the inputs of a part that comes before ``test`` but has no labels.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    samples: Samples
    test: Samples | None = None
    test_name: str = "test"
    hidden: tuple[str, Any] | None = None

    def with_words(self, words: Sequence[str]) -> Data:
        """Return the data with these names of the classes, which are numbers.

        Raises
        ------
        FileError
            If there is no class of one of the numbers.
        """
        known = {str(number): word for number, word in enumerate(words)}
        if unknown := [one for one in self.classes if one not in known]:
            raise FileError(
                f"{self.name} has the label {unknown[0]}, which is not the number of a class; expected 0 to "
                f"{len(words) - 1}: leave such samples out"
            )
        return dataclasses.replace(self, classes=tuple(known[one] for one in self.classes))


def divide(
    data: Data, seed: int = 0, validation: float = HOLDOUT, test: float = 0.3, stratified: bool = True
) -> dict[str, Samples]:
    """Split the data into three parts, reproducible by seed.

    Parameters
    ----------
    data : Data
    seed : int
    validation, test : float
        Fractions of each class, rounded, but at least one sample. If the source has a test part, all of it is used.
    stratified : bool
        Whether to split each class by itself; labels must then be numbers of classes.

    Returns
    -------
    dict
        ``training``, ``validation`` and ``test``.

    Raises
    ------
    TnadaptError
        If there are fewer than two classes, or a class has too few samples for every part.

    Examples
    --------
    >>> labels = np.array([0] * 10 + [1] * 20)
    >>> data = Data("toy", "image", ("a", "b"), Samples(np.zeros((30, 2, 2)), labels))
    >>> {name: np.bincount(part.labels).tolist() for name, part in divide(data).items()}
    {'training': [5, 10], 'validation': [2, 4], 'test': [3, 6]}
    """
    fractions = [validation] if data.test is not None else [validation, test]
    strata = data.samples.labels if stratified else np.zeros(len(data.samples), np.int64)
    counts = np.bincount(strata, minlength=len(data.classes) if stratified else 1).tolist()
    _check_counts(data, counts if stratified else None, len(fractions) + 1)
    pieces: list[list[Labels]] = [[] for _ in range(len(fractions) + 1)]
    random = np.random.Generator(np.random.PCG64(seed))
    for label, count in enumerate(counts):
        order = random.permutation(np.flatnonzero(strata == label))
        sizes = [max(1, round(fraction * count)) for fraction in fractions]
        while count - sum(sizes) < 1:
            sizes[int(np.argmax(sizes))] -= 1
        edges = np.cumsum([count - sum(sizes), *sizes])
        for piece, part in zip(pieces, np.split(order, edges[:-1]), strict=True):
            piece.append(part)
    parts = [data.samples.take(np.sort(np.concatenate(piece))) for piece in pieces]
    if data.test is not None:
        parts.append(data.test)
    return dict(zip(PARTS, parts, strict=True))


def _check_counts(data: Data, counts: Sequence[int] | None, parts: int) -> None:
    """Raise an error unless there is a sample of each class, or any sample, for each part."""
    wanted = f"it needs at least {parts}, one for each of {', '.join(PARTS[:parts])}"
    if counts is None:
        if len(data.samples) < parts:
            raise TnadaptError(f"{data.name} has {pluralize(len(data.samples), 'sample')}; {wanted}: add samples")
        return
    if len(data.classes) < 2:
        raise TnadaptError(f"{data.name} has {len(data.classes)} class; classification needs at least 2")
    for name, count in zip(data.classes, counts, strict=True):
        if count < parts:
            raise TnadaptError(
                f"class {name!r} of {data.name} has {pluralize(count, 'sample')}; {wanted}: add samples, leave the "
                "class out, or raise --limit"
            )


def choose(samples: Samples, limit: int | None, seed: int = 0, stratified: bool = True) -> Samples:
    """Return at most ``limit`` samples, with equal shares of all classes if stratified; all if limit is None.

    Raises
    ------
    TnadaptError
        If limit is less than the number of classes present.
    """
    if limit is None or limit >= len(samples):
        return samples
    strata = samples.labels if stratified else np.zeros(len(samples), np.int64)
    present = np.unique(strata)
    if limit < len(present):
        raise TnadaptError(f"--limit {limit} leaves no sample for some of the {len(present)} classes")
    random = np.random.Generator(np.random.PCG64(seed))
    # The rank of each sample in its class, as a fraction: taking the smallest selects evenly from all classes.
    place = np.empty(len(samples))
    for label in present:
        members = np.flatnonzero(strata == label)
        place[random.permutation(members)] = np.arange(len(members)) / len(members)
    return samples.take(np.sort(np.argsort(place, kind="stable")[:limit]))
