"""The check of a saved adapter: loaded on a fresh base, and merged, it predicts the same as the trained one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnadapt import torch as tnt

from .loop import evaluate
from .problem import Problem
from .training import Training

__all__ = ["Proof", "prove"]


class Proof(NamedTuple):
    """The result of :func:`prove`.

    Attributes
    ----------
    samples : int
        Number of test samples.
    loaded_same : bool
        Whether the adapter, loaded from its file on a fresh base, predicts the same as the trained one.
    merged_different : int
        Number of samples for which the merged model predicts something else than the loaded one.
    largest : float
        The largest difference in a logit between the two; of language models, in the loss of a token.
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
    """Load an adapter on a fresh base and predict the test samples, then merge it and predict them again.

    Parameters
    ----------
    problem : Problem
    record : mapping
        The result line of the training that produced it.
    path : Path
        The adapter's file.
    training : Training
        Only its ``device`` and ``batch`` are used.

    Returns
    -------
    Proof

    Raises
    ------
    FileError
        If the file is damaged or does not fit the base.
    """
    where = torch.device(training.device)
    # A different seed, which proves that the head comes from the file.
    model = problem.build(record["seed"] + 1).to(where)
    adapter = tnt.load(model, path)
    part = problem.parts["test"]
    loaded = evaluate(model, problem.logits, problem.task, part, where, training.batch)
    adapter.merge()
    merged = evaluate(model, problem.logits, problem.task, part, where, training.batch)
    return Proof(
        len(part.labels),
        problem.task.digest(loaded) == record["predictions"],
        problem.task.different(loaded, merged),
        problem.task.largest_gap(loaded, merged),
    )
