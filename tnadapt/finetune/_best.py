"""The proof of a saved adapter: read again on a fresh base, and merged, it predicts what the trained one did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnadapt import torch as tnt

from .loop import evaluate
from .problem import Problem
from .training import Training, predictions_digest

__all__ = ["Proof", "prove"]


class Proof(NamedTuple):
    """What came of it.

    Attributes
    ----------
    samples : int
        Test samples that were predicted.
    loaded_same : bool
        Whether the adapter, loaded from its file on a fresh base, predicts every class that the trained one did.
    merged_different : int
        Samples of which the merged model predicts another class than the loaded one.
    largest : float
        The largest difference of a logit between the two.
    """

    samples: int
    loaded_same: bool
    merged_different: int
    largest: float

    @property
    def holds(self) -> bool:
        """Whether all predictions are the same."""
        return self.loaded_same and not self.merged_different


def prove(problem: Problem, record: Mapping[str, Any], path: Path, training: Training) -> Proof:
    """Load an adapter on a fresh base, predict the test samples, merge, predict again.

    Parameters
    ----------
    problem : Problem
    record : mapping
        The line of results of the training that it comes from.
    path : Path
        The adapter's file.
    training : Training
        Its ``device`` and ``batch`` are looked at.

    Returns
    -------
    Proof

    Raises
    ------
    FileError
        If the file is damaged or does not fit the base.
    """
    where = torch.device(training.device)
    # Another seed: the head must come from the file.
    model = problem.build(record["seed"] + 1).to(where)
    adapter = tnt.load(model, path)
    part = problem.parts["test"]
    loaded = evaluate(model, problem.logits, part, where, training.batch)
    adapter.merge()
    merged = evaluate(model, problem.logits, part, where, training.batch)
    return Proof(
        len(part.labels),
        predictions_digest(loaded) == record["predictions"],
        int((loaded.argmax(1) != merged.argmax(1)).sum()),
        float((loaded - merged).abs().max()),
    )
