"""What reinforcement learning with TRL leaves of a base in bfloat16: ``python benchmarks/rl_drift.py PART``.

TRL's trainers merge the adapter before each generation by vLLM, send the weights, and unmerge it. Here TRL's own code
does so, with its default settings, and a dictionary in place of vLLM receives the weights. Parts:

``cycle``
    500 updates of an adapter that moves, each followed by such a cycle, on SmolLM2-135M: the numbers of the base that
    changed, the norm of their change over that of the update, how far what was sent is from W + ΔW, and the time of a
    cycle. All contestants take turns in
    one process. The trained numbers walk at random, and the update's norm ends at 1 % of the weights'.
``tasks``
    Ask the base every task of reasoning-gym at the first level of its curriculum. Short tasks with at most 20 % right
    answers, with four examples in the prompt or by always giving the commonest answer, qualify; ``grpo`` trains on the
    one with the most questions that the base answers both right and wrong, since only these have a gradient.
``grpo``
    Train with TRL's GRPO, a cycle at every step. TRL generates with transformers here, so that the cycle changes the
    base that is trained, and not the weights that generate.
``tables``
    Write the tables of the documentation from the results. Supervised training on the same questions is run by ``python
    -m benchmarks.quality run number-sequence --tuned-by 0 --out benchmarks/results/rl_drift``, with ``--budgets 13
    --methods tinylora`` and with ``--budgets 100,1000,10000 --methods unilora``.

The results are in ``results/rl_drift``; ``tasks`` and ``grpo`` append a line for each task or training and skip those
that have one. The model is fetched into ``--cache`` by :mod:`paper.registries`. Install the extra ``benchmarks``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from decoding import llama
from formatting import list_table, number
from machine import installed, machine
from reasoning import ASKED, EXAMPLES, RIGHT, TESTS, Questions, prompt
from timing import ratios, take_turns
from torch import Tensor

import tnadapt.torch
import tnadapt.torch.peft

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "rl_drift"
#: The norm of the last update, over that of the weights.
SIZE = 0.01


# -- The contestants --------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """An adapter behind PEFT's interface."""

    title: str
    library: str
    #: The name of the config's class in its library, and its arguments.
    config: str
    arguments: Mapping[str, Any]
    #: The learning rate of GRPO.
    rate: float

    def adapted(self, model: Any, targets: Any, seed: int) -> Any:
        """Return the model with this adapter, everything random in it from a seed."""
        import peft

        arguments = {**self.arguments, "task_type": "CAUSAL_LM", "target_modules": targets}
        if self.library == "tnadapt":
            arguments["settings"] = {**arguments["settings"], "seed": seed}
        elif self.config == "TinyLoraConfig":
            arguments["projection_seed"] = seed
        torch.manual_seed(seed)  # PEFT draws from the global generator
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr({"PEFT": peft, "tnadapt": tnadapt.torch.peft}[self.library], self.config)
            return peft.get_peft_model(model, config(**arguments)).eval()


def _ours(preset: str, **settings: Any) -> Contestant:
    (size,) = settings.values()
    arguments = {"preset": preset, "settings": settings}
    return Contestant(f"tnadapt {preset}({size:,})", "tnadapt", "TnadaptConfig", arguments, 1e-2)


#: PEFT's are at its defaults, but for "13", which has TinyLoRA's thirteen numbers for all weights together. The rate of
#: its LoRA is that of TRL's page on PEFT. For its TinyLoRA no rate is documented: at this one, the first steps are as
#: large as those of tnadapt's TinyLoRA.
CONTESTANTS = {
    "peft-lora": Contestant("PEFT LoRA, r = 8", "PEFT", "LoraConfig", {}, 2e-4),
    "peft-tinylora": Contestant("PEFT TinyLoRA, u = 64 a weight", "PEFT", "TinyLoraConfig", {}, 5e-4),
    "peft-tinylora-13": Contestant(
        "PEFT TinyLoRA, 13 in all", "PEFT", "TinyLoraConfig", {"u": 13, "weight_tying": 1.0}, 5e-4
    ),
    "lora": _ours("lora", rank=8),
    "tinylora-13": _ours("tinylora", parameters=13),
    "unilora-100": _ours("unilora", parameters=100),
    "unilora-1000": _ours("unilora", parameters=1000),
    "unilora-10000": _ours("unilora", parameters=10_000),
}  # fmt: skip
#: Those of ``cycle``. 10,000 parameters are more than the arrays of the tiny model have.
CYCLED = [name for name in CONTESTANTS if name != "unilora-10000"]
REFERENCE = "peft-lora"


def trained(model: Any) -> list[Tensor]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_of(model: Any) -> dict[str, Tensor]:
    """Return the base's parameters by the names that they have without an adapter."""
    names = (
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter.detach())
        for name, parameter in model.named_parameters()
        if model.prefix not in name
    )
    return dict(names)


@torch.no_grad()
def updates_of(model: Any) -> dict[str, Tensor]:
    """Return ΔW of each adapted weight by the weight's name."""
    if adapter := tnadapt.torch.adapters(model).get("default"):
        deltas = zip(adapter.targets, adapter.deltas(), strict=True)
        return {target.name: delta.detach() for target, delta in deltas}
    return {
        f"{name.removeprefix('base_model.model.')}.weight": layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


class Vllm:
    """In place of vLLM: TRL's own code merges, names and unmerges the weights, and they are copied to ``weights``."""

    def __init__(self, model: Any) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        self.weights: dict[str, Tensor] = {}
        sender = SimpleNamespace(
            model=model, mode="server", _weight_metadata=None, vllm_client=self,
            _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda _: contextlib.nullcontext()),
            accelerator=SimpleNamespace(is_main_process=True),
        )  # fmt: skip
        for name in ("_fix_param_name_to_vllm", "_iter_named_params", "sync_weights"):
            setattr(sender, name, MethodType(getattr(VLLMGeneration, name), sender))
        self.sync: Callable[[], None] = sender.sync_weights

    def update_named_params(self, metadata: Any, parameters: Iterator[tuple[str, Tensor]]) -> None:
        """Copy the weights that are sent."""
        for name, parameter in parameters:
            self.weights.setdefault(name, torch.empty_like(parameter)).copy_(parameter)

    def reset_prefix_cache(self) -> None:
        """Do nothing, since nothing was generated."""


def norm(tensors: Iterator[Tensor]) -> float:
    """Return the Frobenius norm of several tensors together."""
    return sum(float(tensor.double().norm()) ** 2 for tensor in tensors) ** 0.5


def drift(base: Mapping[str, Tensor], before: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Row:
    """Return what differs between two states of the base, over the adapted weights."""
    changed = {
        name: int((base[name].view(torch.int16) != weight.view(torch.int16)).sum()) for name, weight in before.items()
    }
    return {
        "elements": sum(before[name].numel() for name in updates),
        "changed": sum(changed[name] for name in updates),
        "changed elsewhere": sum(count for name, count in changed.items() if name not in updates),
        "change": norm(base[name].double() - before[name].double() for name in updates),
        "update": norm(iter(updates.values())),
        "weights": norm(before[name] for name in updates),
    }


# -- The model --------------------------------------------------------------------------------------


def pretrained(folder: Path) -> Any:
    """Return SmolLM2-135M in bfloat16."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    # Of a slice of the hidden states, torch multiplies a copy of the vocabulary's weight for each row: 5 s of a step.
    model.lm_head.register_forward_pre_hook(lambda head, inputs: tuple(states.contiguous() for states in inputs))
    return model


def tiny() -> Any:
    """Return a small Llama with random weights in bfloat16."""
    return llama(2, 64, 64, 128, 4, 2).to(torch.bfloat16)


def fetched(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M, fetched if needed."""
    from paper.registries import fetch

    return fetch("llama", cache)[0]


# -- Part: cycle ------------------------------------------------------------------------------------


class Cycle:
    """A contestant whose numbers walk at random, with a cycle of TRL's after every step."""

    def __init__(self, contestant: Contestant, model: Any, updates: int) -> None:
        self.contestant = contestant
        self.model = contestant.adapted(model, ["q_proj", "v_proj"], 0)
        self.before = {name: weight.clone() for name, weight in base_of(self.model).items()}
        self.vllm = Vllm(self.model)
        self.generator = torch.Generator()
        self.step = self._calibrated(updates)
        self.vllm.sync()  # the first one sends the names

    @torch.no_grad()
    def move(self) -> None:
        """Move every trained number by a random step."""
        for parameter in trained(self.model):
            parameter += self.step * torch.randn(parameter.shape, generator=self.generator).to(parameter.dtype)

    @torch.no_grad()
    def _calibrated(self, updates: int) -> float:
        """Return the size of a step with which the last update is as large as it should be; undo the steps."""
        start = [parameter.clone() for parameter in trained(self.model)]
        weights = {name: self.before[name] for name in updates_of(self.model)}
        walked = [torch.zeros_like(parameter) for parameter in start]
        self.generator.manual_seed(1)
        for _, total in itertools.product(range(updates), walked):
            total += torch.randn(total.shape, generator=self.generator).to(total.dtype)
        low, high = 1e-8, 1e4
        for _ in range(40):
            self.step = (low * high) ** 0.5
            for parameter, first, total in zip(trained(self.model), start, walked, strict=True):
                parameter.copy_(first + self.step * total)
            size = norm(iter(updates_of(self.model).values())) / norm(iter(weights.values()))
            low, high = (self.step, high) if size < SIZE else (low, self.step)
        for parameter, first in zip(trained(self.model), start, strict=True):
            parameter.copy_(first)
        self.generator.manual_seed(1)
        return self.step

    def row(self, updates: int) -> Row:
        """Return what has become of the base."""
        deltas = updates_of(self.model)
        after = drift(base_of(self.model), self.before, deltas)
        wanted = {name: self.before[name].double() + delta.double() for name, delta in deltas.items()}
        return {
            "title": self.contestant.title, "numbers": sum(p.numel() for p in trained(self.model)), "updates": updates,
            **after, "sent": norm(self.vllm.weights[name].double() - weight for name, weight in wanted.items()),
        }  # fmt: skip


def cycle(model: Callable[[], Any], updates: int) -> Iterator[Row]:
    """Yield what has become of each base after 1, 10, 100 … updates, and the time of a cycle."""
    cycles = {name: Cycle(CONTESTANTS[name], model(), updates) for name in CYCLED}
    times: dict[str, list[float]] = {name: [] for name in cycles}
    names = list(cycles)
    shown = sorted({updates, *(10**power for power in range(len(str(updates))))})
    for turn in range(1, updates + 1):
        for contestant in cycles.values():
            contestant.move()
        # Another one begins each time.
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name, (seconds,) in take_turns({name: cycles[name].vllm.sync for name in order}, 1).items():
            times[name].append(seconds)
        if turn in shown:
            yield from (contestant.row(turn) for contestant in cycles.values())
    for name, contestant in cycles.items():
        seconds = round(statistics.median(times[name]), 4)
        yield {"title": contestant.contestant.title, "seconds": seconds, **ratios(times[name], times[REFERENCE])}


def cycle_table(rows: Sequence[Row]) -> str:
    """Return the documentation's table of the cycles."""
    about, *rows = rows
    last = max(row.get("updates", 0) for row in rows)
    lines = [("", "trained", "base changed", "by", "error sent", "time over PEFT's LoRA")]
    for title in dict.fromkeys(row["title"] for row in rows):
        (state,) = (row for row in rows if row["title"] == title and row.get("updates") == last)
        (spent,) = (row for row in rows if row["title"] == title and "seconds" in row)
        shares = state["changed"] / state["elements"], *(state[key] / state["update"] for key in ("change", "sent"))
        lines.append((
            title, f"{state['numbers']:,}", *(f"{share:.0%}" if share else "0" for share in shares),
            f"{spent['ratio']:.2f} ({1e3 * spent['seconds']:.0f} ms)",
        ))  # fmt: skip
    how = about["machine"] | {"threads": about["threads"]}
    kept = ("processor", "cores", "threads", "torch", "peft", "trl", "transformers", "date")
    listed = ", ".join(f"{name} {how[name]}" for name in kept if name in how)
    return f"{list_table(lines, ':widths: 36 14 12 12 12 18')}\n({listed})\n"


def said_of(state: Row) -> str:
    """Say what has become of a base."""
    if not state["changed"]:
        return "the same bits"
    share, over = state["changed"] / state["elements"], state["change"] / state["update"]
    return f"{share:.0%} of the numbers changed, by {over:.0%} of the update"


# -- The tasks of reasoning-gym ---------------------------------------------------------------------

#: Tokens of a question and of an answer at most, and those that are generated.
QUESTION, ANSWER, GENERATED = 64, 12, 16
SAMPLED, GENERATIONS = 16, 8
#: The largest share of right answers that a control may have.
SOLVED = 0.2


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Return the likeliest answers."""
    from examples.language_models.smollm2 import answers

    return list(answers(model, tokenizer, list(prompts), tokens=GENERATED))


def unfit(name: str, tokenizer: Any) -> str | None:
    """Return why a task is not asked, or None."""
    from reasoning_gym.factory import has_curriculum

    if not has_curriculum(name):
        return "no curriculum"
    if name == "sokoban":
        return "its first level takes seconds to minutes a question"
    try:
        few = Questions(name, 20).entries
    except Exception as error:  # of a task's own code
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    question, answer = (
        max(len(tokenizer(text)["input_ids"]) for text in texts)
        for texts in ([entry["question"] for entry in few], [str(entry["answer"]) for entry in few])
    )
    if question > QUESTION or answer > ANSWER:
        return f"{question} tokens of a question and {answer} of an answer"
    entries = len(Questions(name).entries)
    needed = EXAMPLES + ASKED + 2 * TESTS
    return f"{entries} different questions" if entries < needed else None


def asked_fairly(name: str, model: Any, tokenizer: Any) -> Row:
    """Return how the base answers a task, with examples and by sampling; the first control that solves it ends this."""
    task = Questions(name)
    (_, times), *_ = collections.Counter(entry["answer"] for entry in task.training).most_common(1)
    row: Row = {"commonest answer": times / len(task.training)}
    if row["commonest answer"] <= SOLVED:
        texts = greedy(model, tokenizer, [task.shots + prompt(entry) for entry in task.asked])
        row["four examples"] = task.right(texts, task.asked)
    if row.get("four examples", 1.0) > SOLVED:
        return {**row, "why not": "a control solves it"}
    torch.manual_seed(0)
    mixed, scores = 0, list[float]()
    for entry in task.training[:SAMPLED]:
        inputs = tokenizer([prompt(entry)] * GENERATIONS, return_tensors="pt")
        sampled = model.generate(**inputs, max_new_tokens=GENERATED, do_sample=True, temperature=1.0, top_k=0)
        texts = tokenizer.batch_decode(sampled[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        scores += task.scores(texts, [entry] * GENERATIONS)
        mixed += 0 < sum(score > RIGHT for score in scores[-GENERATIONS:]) < GENERATIONS
    return {**row, "mixed": mixed / SAMPLED, "reward": statistics.fmean(scores)}


def chosen(rows: Sequence[Row]) -> str:
    """Return the task that the rule chooses of those that were asked."""
    hard = [row for row in rows if "why not" not in row]
    return str(max(hard, key=lambda row: (row["mixed"], row["reward"]))["task"])


def ask_every_task(model: Any, tokenizer: Any, path: Path) -> None:
    """Ask every task that has no line in a file yet."""
    from reasoning_gym.factory import DATASETS

    for name in sorted(DATASETS.keys() - {row["task"] for row in read(path)}):
        reason = unfit(name, tokenizer)
        append(path, {"task": name} | ({"why not": reason} if reason else asked_fairly(name, model, tokenizer)))


# -- Part: grpo -------------------------------------------------------------------------------------

PROMPTS = 4
#: The row of the base, which is not trained.
BASE = "base"


class Plan(NamedTuple):
    """One training."""

    contestant: str
    seed: int
    rate: float
    steps: int
    task: str


def plans(only: Sequence[str], seeds: Sequence[int], factors: Sequence[float], steps: int, task: str) -> list[Plan]:
    """Return the trainings, a seed of all contestants first."""
    trainings = [Plan(BASE, 0, 0.0, 0, task)] if BASE in only else []
    for factor, seed, name in itertools.product(factors, seeds, only):
        if name != BASE:
            trainings.append(Plan(name, seed, float(f"{factor * CONTESTANTS[name].rate:.3g}"), steps, task))
    return trainings


def train(plan: Plan, task: Questions, folder: Path) -> Row:
    """Train with TRL, and return the rewards, the right answers and the drift of the base."""
    import transformers

    began = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = pretrained(folder)
    prompts = [prompt(entry) for entry in task.tests]
    if plan.contestant == BASE:
        with_examples = greedy(model, tokenizer, [task.shots + text for text in prompts])
        row: Row = {"four examples": task.right(with_examples, task.tests)}
    else:
        contestant = CONTESTANTS[plan.contestant]
        model = contestant.adapted(model, "all-linear", plan.seed)
        before = {name: weight.clone() for name, weight in base_of(model).items()}
        row = {"title": contestant.title, "numbers": sum(p.numel() for p in trained(model))}
        row["rewards"], row["seconds of cycles"] = reinforced(model, tokenizer, plan, task)
        row |= drift(base_of(model.eval()), before, updates_of(model))
    row["right"] = task.right(greedy(model, tokenizer, prompts), task.tests)
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def reinforced(model: Any, tokenizer: Any, plan: Plan, task: Questions) -> tuple[list[float], float]:
    """Return the mean reward of each step, and the seconds of all cycles."""
    import datasets
    import transformers
    import trl

    spent = [0.0]
    vllm = Vllm(model)

    class Synced(transformers.TrainerCallback):  # type: ignore[misc]
        """TRL sends the weights after the step begins, and before it generates."""

        def on_step_begin(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            start = time.perf_counter()
            vllm.sync()
            spent[0] += time.perf_counter() - start

    def reward(completions: list[str], place: list[int], **others: Any) -> list[float]:
        return task.scores(completions, [task.training[index] for index in place])

    rows = datasets.Dataset.from_list(
        [{"prompt": prompt(entry), "place": place} for place, entry in enumerate(task.training)]
    )
    with tempfile.TemporaryDirectory() as out:
        arguments = trl.GRPOConfig(
            out, learning_rate=plan.rate, max_steps=plan.steps, seed=plan.seed, num_generations=GENERATIONS,
            per_device_train_batch_size=PROMPTS * GENERATIONS, max_completion_length=GENERATED,
            lr_scheduler_type="constant", gradient_checkpointing=False, bf16=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model, reward, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Synced()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        rewards = [round(entry["reward"], 5) for entry in trainer.state.log_history if "reward" in entry]
    return rewards, round(spent[0], 2)


def grpo_table(rows: Sequence[Row]) -> str:
    """Return the documentation's table of the trainings; a setting has a row from three seeds on."""
    settings: dict[Plan, list[Row]] = collections.defaultdict(list)
    for row in rows:
        settings[Plan(**{name: row[name] for name in Plan._fields})._replace(seed=0)].append(row)
    lines = [("", "trained", "rate", "reward, first and last 10 steps", "right answers", "base in the end")]
    for several in settings.values():
        first = several[0]
        if first["contestant"] == BASE:
            lines += [("base", "", "", "", _percent(first["right"]), ""),
                      ("base, four examples", "", "", "", _percent(first["four examples"]), "")]  # fmt: skip
        elif len(several) >= 3:
            ends = (
                statistics.fmean(reward for row in several for reward in row["rewards"][part])
                for part in (slice(10), slice(-10, None))
            )
            worst = max(several, key=lambda row: row["change"] / row["update"])
            lines.append((
                first["title"], f"{first['numbers']:,}", number(first["rate"]),
                " → ".join(f"{reward:.3f}" for reward in ends), _each([row["right"] for row in several]),
                said_of(worst),
            ))  # fmt: skip
    if not any(len(several) >= 3 for several in settings.values()):
        return "No contestant has been trained with three seeds yet.\n"
    processors = " and ".join(sorted({row["machine"]["processor"] for row in rows}))
    about = f"{rows[-1]['task']} of reasoning-gym, {rows[-1]['steps']} steps, {processors}"
    return f"{list_table(lines)}\n({about}; right answers of each seed)\n"


#: The contestant of GRPO that has the update of a setting of ``benchmarks.quality``.
SAME = {
    ("tinylora", 13): "tinylora-13", ("unilora", 100): "unilora-100", ("unilora", 1000): "unilora-1000",
    ("unilora", 10_000): "unilora-10000", ("lora-8", 0): "peft-lora",
}  # fmt: skip


def supervised_table(lines: Sequence[Row], rows: Sequence[Row]) -> str:
    """Return the documentation's table of supervised training, next to GRPO on the same questions.

    Settings have a row from three seeds on. ``lines`` are those of ``benchmarks.quality``, ``rows`` those of GRPO.
    """
    settings: dict[tuple[str, int, int], list[Row]] = collections.defaultdict(list)
    for line in lines:
        if "key" in line:
            settings[line["parameters"], line["method"], line["budget"]].append(line)
    table = [("", "parameters", "supervised", "GRPO")]
    for (parameters, method, budget), several in sorted(settings.items()):
        contestant = SAME.get((method, budget))
        rewarded = [row["right"] for row in rows if row["contestant"] == contestant and row["steps"]]
        if method == "few-shot" or len(several) >= 3:
            title = " ".join(filter(None, (several[0]["title"], several[0]["label"])))
            table.append((title, f"{parameters:,}", _each([line["test"] for line in several]), _each(rewarded)))
    session = next(line["session"] for line in lines if "session" in line)
    return f"{list_table(table)}\n({session['processor']}; right answers of each seed)\n"


def _each(shares: Sequence[float]) -> str:
    """Return the share of right answers of each seed; a mean would hide one that does not learn."""
    return ", ".join(f"{100 * share:.1f}" for share in shares) + " %" if shares else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# -- Results ----------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Return the lines of a file, if it is there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, row: Row) -> None:
    """Append a line to a file, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: round(cell, 6) if isinstance(cell, float) else cell for name, cell in row.items()})
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    print(text, flush=True)


def tables(folder: Path) -> None:
    """Write the tables of the documentation."""
    for part, table in (("cycle", cycle_table), ("grpo", grpo_table)):
        if (rows := read(folder / f"{part}.jsonl")) or part == "grpo":
            (folder / f"{part}.rst").write_text(table(rows), encoding="utf-8")
    if lines := read(folder / "number-sequence.jsonl"):
        text = supervised_table(lines, read(folder / "grpo.jsonl"))
        (folder / "supervised.rst").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cycle", "tasks", "grpo", "tables"))
    parser.add_argument("--cache", type=Path, default=Path("rl_drift"), help="folder for the model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2", help="of cycle")
    parser.add_argument("--updates", type=int, default=500, help="of cycle")
    parser.add_argument("--task", help="of grpo; by default the one that the rule chooses of the results of tasks")
    parser.add_argument("--only", nargs="+", choices=(BASE, *CONTESTANTS), default=(BASE, *CONTESTANTS), help="of grpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of grpo")
    parser.add_argument("--factors", type=float, nargs="+", default=(1.0,), help="of the learning rates of grpo")
    parser.add_argument("--steps", type=int, default=100, help="of grpo")
    asked_for = parser.parse_args()
    tnadapt.torch.peft.register()
    path = asked_for.out / f"{asked_for.part}.jsonl"
    about = machine() | installed("trl", "reasoning-gym")
    if asked_for.part == "cycle":
        model = tiny if asked_for.model == "tiny" else functools.partial(pretrained, fetched(asked_for.cache))
        path.unlink(missing_ok=True)
        append(path, {"machine": about, "model": asked_for.model, "threads": torch.get_num_threads()})
        for row in cycle(model, asked_for.updates):
            append(path, row)
    elif asked_for.part == "tasks":
        import transformers

        folder = fetched(asked_for.cache)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        ask_every_task(pretrained(folder), tokenizer, path)
    elif asked_for.part == "grpo":
        from reasoning_gym.factory import DATASETS

        asked = read(asked_for.out / "tasks.jsonl")
        if not asked_for.task and DATASETS.keys() - {row["task"] for row in asked}:
            parser.error("not every task was asked: run the part tasks first, or choose one by --task")
        folder, name = fetched(asked_for.cache), asked_for.task or chosen(asked)
        task = Questions(name)
        ended = [Plan(**{name: row[name] for name in Plan._fields}) for row in read(path)]
        for plan in plans(asked_for.only, asked_for.seeds, asked_for.factors, asked_for.steps, name):
            if plan not in ended:
                append(path, {**plan._asdict(), **train(plan, task, folder), "machine": about})
    tables(asked_for.out)


if __name__ == "__main__":
    main()
