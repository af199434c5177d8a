"""Questions of reasoning-gym at the first level of a task's curriculum, with verifiable answers."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: Questions that are examples, that choose tasks and rates, that test, and all with those to train on.
EXAMPLES, ASKED, TESTS, POOL = 4, 100, 200, 1200
#: What reasoning-gym's score of a right answer exceeds.
RIGHT = 0.999

Entry = Mapping[str, Any]


class Questions:
    """The questions of a task, each once, in four parts: examples, to choose by, tests, and to train on."""

    def __init__(self, name: str, size: int = POOL) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS, create_curriculum

        dataset, _ = DATASETS[name]
        config = create_curriculum(name).generate_configuration({"seed": 0, "size": size})
        with contextlib.redirect_stdout(io.StringIO()):  # some print
            self.dataset = dataset(config=config)
            entries = {entry["question"].strip(): entry for entry in self.dataset}
        self.name, self.version = name, reasoning_gym.__version__
        self.entries = list(entries.values())
        cuts = (0, EXAMPLES, EXAMPLES + ASKED, EXAMPLES + ASKED + TESTS, len(self.entries))
        parts = [self.entries[start:end] for start, end in itertools.pairwise(cuts)]
        self.examples, self.asked, self.tests, self.training = parts

    @functools.cached_property
    def shots(self) -> str:
        """The examples, for the beginning of a prompt."""
        return "".join(f"{prompt(entry)} {entry['answer']}\n\n" for entry in self.examples)

    def scores(self, texts: Sequence[str], entries: Sequence[Entry]) -> list[float]:
        """Return reasoning-gym's score of the first line of each text."""
        lines = [text.strip().partition("\n")[0].strip() for text in texts]
        return [float(self.dataset.score_answer(line, entry)) for line, entry in zip(lines, entries, strict=True)]

    def right(self, texts: Sequence[str], entries: Sequence[Entry]) -> float:
        """Return the share of texts that are right."""
        return statistics.fmean(score > RIGHT for score in self.scores(texts, entries))


def prompt(entry: Entry) -> str:
    """Return a question as the model gets it."""
    return f"Question: {entry['question'].strip()}\nAnswer:"
