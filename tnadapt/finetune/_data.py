"""Labelled samples: what every source of data becomes, and how it is divided."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.errors import TnadaptError

__all__ = ["HOLDOUT", "PARTS", "Data", "Labels", "Samples", "choose", "divide"]

PARTS = ("training", "validation", "test")
#: The fraction of each class that rates are chosen by.
HOLDOUT = 0.2

Labels = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs and their classes.

    Attributes
    ----------
    inputs : sequence
        Texts; or images, each an array ``(height, width[, channels])`` of uint8 or of floats from 0 to 1, a path, or
        a PIL image. Where they have a ``take``, it is used.
    labels : array of int64, shape (n,)
        Indices into :attr:`Data.classes`.
    """

    inputs: Any
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Labels) -> Samples:
        """These samples, in this order."""
        if isinstance(self.inputs, np.ndarray):
            return Samples(self.inputs[indices], self.labels[indices])
        if hasattr(self.inputs, "take"):
            return Samples(self.inputs.take(indices), self.labels[indices])
        return Samples([self.inputs[int(i)] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Data:
    """What was read from one source.

    Attributes
    ----------
    name : str
        As a report shows it.
    kind : {"image", "text"}
    classes : tuple of str
    samples : Samples
        For training and validation; for the test, too, where ``test`` is None.
    test : Samples, optional
        Where the source comes divided.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    samples: Samples
    test: Samples | None = None


def divide(data: Data, seed: int = 0, validation: float = HOLDOUT, test: float = 0.3) -> dict[str, Samples]:
    """The data in three parts, each class in the same proportions, the same for the same seed.

    Parameters
    ----------
    data : Data
    seed : int
    validation, test : float
        Fractions of each class, rounded, and never fewer than one sample. Where the source brings a test part, that
        is the test part, whole.

    Returns
    -------
    dict
        ``training``, ``validation`` and ``test``.

    Raises
    ------
    TnadaptError
        If there are fewer than two classes, or a class has too few samples to be in every part.

    Examples
    --------
    >>> labels = np.array([0] * 10 + [1] * 20)
    >>> data = Data("toy", "image", ("a", "b"), Samples(np.zeros((30, 2, 2)), labels))
    >>> {name: np.bincount(part.labels).tolist() for name, part in divide(data).items()}
    {'training': [5, 10], 'validation': [2, 4], 'test': [3, 6]}
    """
    if len(data.classes) < 2:
        raise TnadaptError(f"{data.name} has {len(data.classes)} class; classification needs at least 2")
    fractions = [validation] if data.test is not None else [validation, test]
    counts = np.bincount(data.samples.labels, minlength=len(data.classes)).tolist()
    for name, count in zip(data.classes, counts, strict=True):
        if count <= len(fractions):
            wanted = ", ".join(PARTS[: len(fractions) + 1])
            raise TnadaptError(
                f"class {name!r} of {data.name} has {count} sample{'s' * (count != 1)}; it needs at least "
                f"{len(fractions) + 1}, one for each of {wanted}: add samples, leave the class out, or raise --limit"
            )
    pieces: list[list[Labels]] = [[] for _ in range(len(fractions) + 1)]
    random = np.random.Generator(np.random.PCG64(seed))
    for label, count in enumerate(counts):
        order = random.permutation(np.flatnonzero(data.samples.labels == label))
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


def choose(samples: Samples, limit: int | None, seed: int = 0) -> Samples:
    """At most ``limit`` of the samples, each class in proportion; all of them where limit is None.

    Raises
    ------
    TnadaptError
        If limit is below the number of classes that are there.
    """
    if limit is None or limit >= len(samples):
        return samples
    present = np.unique(samples.labels)
    if limit < len(present):
        raise TnadaptError(f"--limit {limit} leaves no sample for some of the {len(present)} classes")
    random = np.random.Generator(np.random.PCG64(seed))
    # Everyone's place in its class, as a fraction: the smallest are an even choice from all classes.
    place = np.empty(len(samples))
    for label in present:
        members = np.flatnonzero(samples.labels == label)
        place[random.permutation(members)] = np.arange(len(members)) / len(members)
    return samples.take(np.sort(np.argsort(place, kind="stable")[:limit]))
