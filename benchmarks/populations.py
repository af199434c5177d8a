"""Populations against single adapters, ``rows`` and PEFT's LoRA: ``python benchmarks/populations.py [--smoke]``.

A BERT of 6 layers (width 384, random weights, without dropout) gets 32 rows of 32 tokens, each with an adapter of its
own on query and value. A step is forward and backward, without an optimizer. All contestants of a table live in one
process, share the base's weights and alternate in a rotating order; each round gives each one a ratio to the reference
in that round, and the printed value is the median. Before that, contestants are given the same numbers, and have to
give the same losses and gradients.

*steps*: 32 distinct members of 32 and of 1,000, over one adapter of the same setting for all rows; and 32 single
adapters by ``rows``. PEFT's LoRA trains 32 adapters one after another, each on its row. *serving*: the same batch
without gradients, over PEFT's LoRA with ``adapter_names=``. *attaching*: ``attach`` of 1,000 members that start alike,
or each from its own seed; and the resident memory that it takes, at its end and at most, with that of one adapter.
*sizes*: populations of 1 to 100,000 members of 100 numbers. *optimizers*: the step of 100,000 members with that of the
optimizer, by dense and by row-sparse gradients, over one adapter with AdamW.

Results go to ``results/populations.json``, and the documentation's tables to ``results/populations/``; ``--tables``
only writes these. Keep the machine otherwise idle. ``--smoke`` takes tiny sizes, and writes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from formatting import list_table
from machine import machine
from timing import ratios, shared_copy, take_turns
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch

P = tna.presets
RESULTS = Path(__file__).parent / "results" / "populations.json"
TABLES = RESULTS.with_suffix("")
THREADS, ROUNDS, ATTACHED = 2, 9, 3
ROWS, MEMBERS = 32, 1000
TARGETS = ["query", "value"]


class Case(NamedTuple):
    """A preset, and the ratio of a step to that of one adapter that it should not exceed."""

    config: tna.Config
    target: float | None = None


CASES = {
    "LoRA (8)": Case(P.lora(8), 1.25),
    "Uni-LoRA (1,000)": Case(P.unilora(1000), 1.25),
    "TinyLoRA (13)": Case(P.tinylora(), 1.25),
    "VeRA (256)": Case(P.vera(256), 1.25),
    "LoRA-XS (8)": Case(P.lora_xs(8), 1.25),
    "SuperLoRA (8)": Case(P.superlora(8), 2.0),
    "DoRA (8)": Case(P.dora(8)),
    "LoKr (8)": Case(P.lokr(8)),
}
#: Which of them are compared with 32 single adapters, and which serve.
SINGLE = ("LoRA (8)", "SuperLoRA (8)")
SERVED = ("LoRA (8)", "Uni-LoRA (1,000)", "SuperLoRA (8)")
SIZES = (1, 10, 100, 1000, 10_000, 100_000)
ONE, NAMED = "one adapter", "PEFT's LoRA, adapter_names"


class Problem(NamedTuple):
    """A model and its batch."""

    base: nn.Module
    ids: Tensor
    labels: Tensor

    def loss(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """Return the sum of the losses of some rows, over the number of all."""
        logits = model(self.ids[rows]).logits
        return nn.functional.cross_entropy(logits, self.labels[rows], reduction="sum") / len(self.labels)


def problem(smoke: bool) -> Problem:
    """Return the BERT, whose own parameters are frozen, and 32 rows."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, heads, inner = (2, 64, 4, 128) if smoke else (6, 384, 6, 1536)
    config = BertConfig(
        vocab_size=1000, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=inner, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).requires_grad_(False).train()
    return Problem(base, torch.randint(config.vocab_size, (ROWS, 8 if smoke else 32)), torch.arange(ROWS) % 2)


def stirred(parameters: Sequence[Tensor]) -> None:
    """Move parameters away from the start, where gradients of one factor are zero."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)


# -- Contestants -------------------------------------------------------------------------------------------------------


class Contestant:
    """Adapters on a model that shares the base's weights.

    Parameters
    ----------
    problem : Problem
    model : Module
    several : list of list of Tensor
        The parameters of each adapter; of a population, which is one, with a leading axis.
    like : list of Tensor, optional
        What each of them gets as values.
    """

    def __init__(
        self, problem: Problem, model: nn.Module, several: list[list[Tensor]], like: list[Tensor] | None = None
    ) -> None:
        self.problem, self.model, self.several = problem, model, several
        with torch.no_grad():
            for parameters in several if like is not None else []:
                for parameter, values in zip(parameters, like or [], strict=True):
                    parameter.copy_(values.expand_as(parameter))

    def losses(self) -> Iterator[Tensor]:
        """Yield the loss, in one part or in several."""
        yield self.problem.loss(self.model)

    def logits(self) -> Tensor:
        """Return what the model answers to all rows."""
        answer: Tensor = self.model(self.problem.ids).logits
        return answer

    def step(self) -> float:
        """Run forward and backward from cleared gradients, and return the loss."""
        for parameters in self.several:
            for parameter in parameters:
                parameter.grad = None
        total = 0.0
        for loss in self.losses():
            loss.backward()
            total += loss.item()
        return total

    def gradients(self) -> list[Tensor]:
        """Return the gradients, summed over adapters."""
        summed = []
        for alike in zip(*self.several, strict=True):
            gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
            summed.append(torch.stack(gradients).sum(0))
        return summed


class Single(Contestant):
    """One adapter for all rows."""

    def __init__(self, problem: Problem, config: tna.Config) -> None:
        model = shared_copy(problem.base)
        self.adapter = tnadapt.torch.attach(model, config)
        super().__init__(problem, model, [list(self.adapter.parameters())])
        stirred(self.several[0])


class Members(Contestant):
    """A population, of which each row has a member; distinct ones where there are enough."""

    def __init__(
        self, problem: Problem, config: tna.Config, count: int, like: list[Tensor], sparse: bool = False
    ) -> None:
        model = shared_copy(problem.base)
        self.population = tnadapt.torch.attach(model, config, population=count, sparse=sparse)
        super().__init__(problem, model, [list(self.population.parameters())], like)
        # Spread over the population, and not in order.
        places = torch.arange(ROWS) * max(1, count // ROWS) % count
        self.index = places[torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))]

    def losses(self) -> Iterator[Tensor]:
        with self.population.members(self.index):
            yield self.problem.loss(self.model)

    def logits(self) -> Tensor:
        with self.population.members(self.index):
            return super().logits()

    def gradients(self) -> list[Tensor]:
        return [gradient.sum(0) for gradient in super().gradients()]


class Rows(Contestant):
    """As many single adapters as rows."""

    def __init__(self, problem: Problem, config: tna.Config, like: list[Tensor]) -> None:
        model = shared_copy(problem.base)
        self.names = [f"a{row}" for row in range(ROWS)]
        adapters = [tnadapt.torch.attach(model, config, name=name) for name in self.names]
        super().__init__(problem, model, [list(adapter.parameters()) for adapter in adapters], like)

    def losses(self) -> Iterator[Tensor]:
        with tnadapt.torch.rows(self.model, self.names):
            yield self.problem.loss(self.model)

    def logits(self) -> Tensor:
        with tnadapt.torch.rows(self.model, self.names):
            return super().logits()


class Peft(Contestant):
    """PEFT's LoRA: one adapter for all rows, or as many as rows, which train one after another."""

    def __init__(self, problem: Problem, count: int, like: list[Tensor] | None = None) -> None:
        import peft

        def config() -> Any:
            return peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)

        self.names = [f"a{row}" for row in range(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(shared_copy(problem.base), config(), self.names[0])
            for name in self.names[1:]:
                model.add_adapter(name, config())
        model.train(problem.base.training)
        several = [
            [parameter for path, parameter in model.named_parameters() if "lora_" in path and f".{name}." in path]
            for name in self.names
        ]
        super().__init__(problem, model, several, like)
        if like is None:
            stirred(several[0])

    def losses(self) -> Iterator[Tensor]:
        if len(self.names) == 1:
            yield from super().losses()
            return
        for row, name in enumerate(self.names):
            self.model.set_adapter(name)
            yield self.problem.loss(self.model, slice(row, row + 1))

    def logits(self) -> Tensor:
        answer: Tensor = self.model(input_ids=self.problem.ids, adapter_names=self.names).logits
        return answer


def contestants(problem: Problem, name: str) -> dict[str, Contestant]:
    """Return what is compared for a preset, the reference first."""
    config = CASES[name].config
    single = Single(problem, config)
    like = single.several[0]
    several: dict[str, Contestant] = {ONE: single}
    for count in (ROWS, MEMBERS):
        several[f"members of {count:,}"] = Members(problem, config, count, like)
    if name in SINGLE:
        several[f"rows, {ROWS} adapters"] = Rows(problem, config, like)
    if name == "LoRA (8)":
        several["PEFT's LoRA, one adapter"] = theirs = Peft(problem, 1)
        several[f"PEFT's LoRA, {ROWS} adapters"] = Peft(problem, ROWS, theirs.several[0])
    return several


def check(several: Mapping[str, Contestant]) -> None:
    """Take a step of each; losses and gradients have to be those of the first of the same library."""
    firsts: dict[bool, tuple[float, list[Tensor]]] = {}
    for name, contestant in several.items():
        mine = contestant.step(), contestant.gradients()
        first = firsts.setdefault(isinstance(contestant, Peft), mine)
        assert abs(mine[0] - first[0]) < 1e-4 * abs(first[0]), name
        for gradient, expected in zip(mine[1], first[1], strict=True):
            size = float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * size, msg=lambda m: f"{name}: {m}")  # noqa: B023


# -- What is measured --------------------------------------------------------------------------------------------------


def compared(runs: Mapping[str, Callable[[], object]], reference: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of each run, its ratios to the reference, and the ratio of the shortest times."""
    times = take_turns(runs, rounds)
    for name, seconds in times.items():
        yield {
            "case": name, **ratios(seconds, times[reference]),
            "minima": round(min(seconds) / min(times[reference]), 3),
            "seconds": round(statistics.median(seconds), 4), "rounds": rounds,
        }  # fmt: skip


def steps(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a step of each contestant, preset after preset."""
    for name, (_, target) in CASES.items():
        several = contestants(problem, name)
        check(several)
        about = {"preset": name, "numbers": sum(parameter.numel() for parameter in several[ONE].several[0])}
        for row in compared({case: each.step for case, each in several.items()}, ONE, rounds):
            yield about | row | ({"target": target} if target and row["case"].startswith("members") else {})


@torch.no_grad()
def serving(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a pass without gradients of PEFT's adapters and of ours."""
    problem.base.eval()
    several: dict[str, Contestant] = {NAMED: Peft(problem, ROWS), "no adapter": Contestant(problem, problem.base, [])}
    for name in SERVED:
        single = Single(problem, CASES[name].config)
        several[f"{name}, members of {MEMBERS:,}"] = Members(problem, CASES[name].config, MEMBERS, single.several[0])
        if name == SERVED[0]:
            several[f"{name}, rows, {ROWS} adapters"] = Rows(problem, CASES[name].config, single.several[0])
    for contestant in several.values():
        contestant.logits()
    yield from compared({name: contestant.logits for name, contestant in several.items()}, NAMED, rounds)
    problem.base.train()


def attaching(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of attaching 1,000 members, and how much memory it takes."""
    for name, (config, _) in CASES.items():
        size, at_most, _ = attached(problem, config)
        single = {"one, bytes": size, "one, bytes at most": at_most}
        runs = [attached(problem, config, MEMBERS) for _ in range(rounds)]
        own_starts = [attached(problem, config, MEMBERS, "each")[2] for _ in range(rounds)]
        numbers = MEMBERS * Single(problem, config).adapter.num_parameters
        sizes = {"bytes": max(run[0] for run in runs), "bytes at most": max(run[1] for run in runs)}
        seconds = [run[2] for run in runs]
        yield {
            "preset": name, "seconds": round(statistics.median(seconds), 3), "shortest": round(min(seconds), 3),
            "seconds with own starts": round(statistics.median(own_starts), 3),
            "bytes of numbers": 4 * numbers, **sizes, **single,
        }  # fmt: skip


def attached(
    problem: Problem, config: tna.Config, count: int | None = None, seeds: str = "one"
) -> tuple[int, int, float]:
    """Attach, and return by how many bytes resident memory grew, by how many at most, and the seconds it took."""
    model = shared_copy(problem.base)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not hide what is allocated
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    start = time.perf_counter()
    adapter = tnadapt.torch.attach(model, config, population=count, seeds=seeds)
    seconds = time.perf_counter() - start
    at_most, after = resident("VmHWM"), resident("VmRSS")
    adapter.detach()
    return after - before, at_most - before, seconds


def resident(line: str) -> int:
    """Return a line of this process's status in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"^{line}:\s*(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def sizes(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield attaching, and a step of 32 rows, of populations of members of 100 numbers."""
    config = P.unilora(100)
    single = Single(problem, config)
    attached(problem, config)
    several: dict[str, Contestant] = {ONE: single}
    about: dict[str, dict[str, Any]] = {ONE: {}}
    for count in SIZES:
        size, _, seconds = attached(problem, config, count)
        contestant = several[f"{count:,}"] = Members(problem, config, count, single.several[0])
        numbers = sum(parameter.nbytes for parameter in contestant.several[0])
        about[f"{count:,}"] = {"attach": round(seconds, 4), "bytes of numbers": numbers, "bytes": size}
    check(several)
    for row in compared({name: contestant.step for name, contestant in several.items()}, ONE, rounds):
        yield row | about[row["case"]]


#: The optimizer of each case of *optimizers*, and whether gradients are sparse.
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], bool]] = {
    "AdamW, dense": (lambda population: torch.optim.AdamW(population.parameters()), False),
    "MemberAdamW, dense": (tnadapt.torch.MemberAdamW, False),
    "MemberAdamW, sparse": (tnadapt.torch.MemberAdamW, True),
    "SparseAdam, sparse": (lambda population: torch.optim.SparseAdam(list(population.parameters())), True),
}


def optimizers(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a step of 32 rows and of the optimizer, of the largest population of members of 100 numbers."""

    def run(contestant: Contestant, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        return lambda: (contestant.step(), optimizer.step())

    config, runs, populations = P.unilora(100), dict[str, Callable[[], object]](), dict[str, Members]()
    single = Single(problem, config)
    like = [parameter.detach().clone() for parameter in single.several[0]]
    runs[ONE] = run(single, torch.optim.AdamW(single.adapter.parameters()))
    for name, (make, sparse) in OPTIMIZERS.items():
        populations[name] = members = Members(problem, config, SIZES[-1], like, sparse)
        runs[name] = run(members, make(members.population))
    for each in runs.values():
        each()
    dense, sparse = (populations[f"MemberAdamW, {layout}"].several[0] for layout in ("dense", "sparse"))
    torch.testing.assert_close(sparse, dense)
    for row in compared(runs, ONE, rounds):
        yield row | {"members": 1 if row["case"] == ONE else SIZES[-1]}


PARTS = {"steps": steps, "serving": serving, "attaching": attaching, "sizes": sizes, "optimizers": optimizers}


# -- Tables ------------------------------------------------------------------------------------------------------------


def span(row: Mapping[str, Any]) -> str:
    """Write a median and its range over the rounds."""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def megabytes(size: int) -> str:
    """Write a size in MB, small ones with a digit more."""
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2f}"


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of members over one adapter."""
    cases = [f"members of {count:,}" for count in (ROWS, MEMBERS)]
    lines = [["preset", "numbers", "one adapter, s", *cases]]
    for name in CASES:
        by_case = {row["case"]: row for row in rows if row["preset"] == name}
        single = by_case[ONE]
        cells = [span(by_case[case]) for case in cases]
        lines.append([name, f"{single['numbers']:,}", f"{single['seconds']:.2f}", *cells])
    return list_table(lines)


def other_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the other ways to train 32 adapters, over one adapter of the same setting."""
    lines = [["preset", "way", "over one adapter", "s"]]
    for row in rows:
        if row["preset"] in SINGLE and row["case"] not in (ONE, f"members of {ROWS:,}"):
            lines.append([row["preset"], row["case"], span(row), f"{row['seconds']:.2f}"])
    return list_table(lines)


def serving_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of passes without gradients."""
    return list_table([["", f"over {NAMED}", "s"], *([r["case"], span(r), f"{r['seconds']:.3f}"] for r in rows)])


def attaching_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of attaching a thousand members."""
    lines = [["preset", "s", 's, seeds="each"', "MB of numbers", "MB, and at most", "one adapter: MB, and at most"]]
    for row in rows:
        sizes = [(row[f"{whose}bytes"], row[f"{whose}bytes at most"]) for whose in ("", "one, ")]
        both = [f"{megabytes(after)}, {megabytes(at_most)}" for after, at_most in sizes]
        times = [f"{row[key]:.2f}" for key in ("seconds", "seconds with own starts")]
        lines.append([row["preset"], *times, megabytes(row["bytes of numbers"]), *both])
    return list_table(lines)


def size_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of populations by their number of members."""
    lines = [["members", "attach, s", "MB of numbers", "MB", "a step over one adapter"]]
    for row in rows[1:]:
        both = megabytes(row["bytes of numbers"]), megabytes(row["bytes"])
        lines.append([row["case"], f"{row['attach']:.3f}", *both, span(row)])
    return list_table(lines)


def optimizer_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of steps with that of an optimizer."""
    lines = [["optimizer, gradients", "members", "over one adapter with AdamW", "s"]]
    lines += [[r["case"], f"{r['members']:,}", span(r), f"{r['seconds']:.3f}"] for r in rows[1:]]
    return list_table(lines)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Return each table of the documentation by the name of its file."""
    about = results["machine"]
    kept = ("processor", "cores", "threads", "rows", "torch", "peft", "transformers", "date")
    listed = f"\n({', '.join(f'{name} {about[name]}' for name in kept if name in about)})\n"
    made = {
        "steps": step_table(results["steps"]), "others": other_table(results["steps"]),
        "serving": serving_table(results["serving"]), "attaching": attaching_table(results["attaching"]),
        "sizes": size_table(results["sizes"]), "optimizers": optimizer_table(results["optimizers"]),
    }  # fmt: skip
    return {name: text + listed for name, text in made.items()}


def main() -> None:
    """Measure, and write the results and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once: check that contestants agree")
    parser.add_argument("--tables", action="store_true", help="only write the tables from the results")
    parser.add_argument("--part", choices=PARTS, help="measure one part, and write nothing")
    given = parser.parse_args()
    if not given.tables:
        torch.set_num_threads(1 if given.smoke else THREADS)
        results: dict[str, Any] = {"machine": {**machine(), "threads": THREADS, "rows": ROWS}}
        posed = problem(given.smoke)
        for part, measure in PARTS.items():
            if given.part in (None, part):
                rounds = 1 if given.smoke else ATTACHED if part == "attaching" else ROUNDS
                results[part] = []
                for row in measure(posed, rounds):
                    results[part].append(row)
                    print(part, "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if given.part:
            return
        if given.smoke:
            tables(results)
            return
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    TABLES.mkdir(exist_ok=True)
    for name, text in tables(json.loads(RESULTS.read_text(encoding="utf-8"))).items():
        (TABLES / f"{name}.rst").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
