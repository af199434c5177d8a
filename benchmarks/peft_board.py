"""Experiments for MetaMathQA, PEFT's public comparison of methods; none has been measured, for want of a GPU.

In ``method_comparison/MetaMathQA`` of a clone of PEFT, ``python …/benchmarks/peft_board.py write .`` writes their
folders to ``experiments/tnadapt`` and prints them. ``python …/benchmarks/peft_board.py run experiments/…`` runs
``run.py`` there, with the same arguments, after ``tnadapt.torch.peft.register()``, without which it does not know
tnadapt's configs. With the board's Makefile:
``make RUN_SCRIPT="…/benchmarks/peft_board.py run" results/tnadapt--unilora-1000.json``.

What a folder does not set is the board's default: AdamW, batches of 4, a cosine, one seed.

- ``unilora``, ``tinylora``, ``superlora`` and ``lora`` are presets, at the one rate that presets are made for
  (docs/learning_rate.rst). There is no weight decay: with this rate, the board's would be a hundred times as fast.
- ``lora-rank32-as-peft`` is the board's ``lora/llama-3.2-3B-rank32``, to check that two libraries agree: rate and
  decay are the board's, and ``rate="sgd"`` trains the arrays themselves. Only the random start of A differs, whose
  standard deviation is that of PEFT's within 5 %.
- ``peft-unilora-131072`` has the setting that PEFT's developers found by a search (their pull request 3552). The
  smaller ones have the rate of the preset for the same θ; at 131,072 numbers it is 1.25 times what the search found.
- ``peft-tinylora``: on the board, the R of each weight is 2 by 2, so that 64 numbers move it in four dimensions. Here
  it is 16 by 16, with as many numbers, at the board's rate for this method and at a third of it: R multiplies the
  largest singular values of the weight, so that a higher rate soon does harm.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TinyLoraConfig, UniLoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import tnadapt as tna
import tnadapt.torch
import tnadapt.torch.peft
from tnadapt.algebra.units import RATE
from tnadapt.report import TextTable

#: Where the folders are in the board's.
PLACE = Path("experiments", "tnadapt")
#: The board's default.
STEPS = 5_000
#: The numbers of the largest Uni-LoRA, and more than those of SuperLoRA.
MOST = 131_072


@dataclass(frozen=True)
class Experiment:
    """A folder of the board: an adapter's config, and the arguments of AdamW."""

    name: str
    config: PeftConfig
    optimizer: dict[str, float]

    def num_parameters(self, base: torch.nn.Module) -> int:
        """Return how many numbers it trains on a base model, by its shapes alone."""
        if isinstance(self.config, UniLoraConfig):
            return int(self.config.theta_d_length)
        if isinstance(self.config, TinyLoraConfig):
            return int(self.config.u) * len(tnadapt.torch.find_targets(base, "qv"))
        return plan(tna.Config.from_dict(self.config.settings), base).num_parameters

    def write(self, board: Path) -> None:
        """Write its two files."""
        folder = board / PLACE / self.name
        self.config.save_pretrained(str(folder))
        params = json.dumps({"max_steps": STEPS, "optimizer_kwargs": self.optimizer}, indent=2)
        (folder / "training_params.json").write_text(params + "\n", encoding="utf-8")


def llama() -> torch.nn.Module:
    """Return the board's base model, Llama-3.2-3B, without its weights."""
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def plan(config: tna.Config, base: torch.nn.Module) -> tna.UpdatePlan:
    """Return the plan of a config for the query and value projections."""
    targets = tnadapt.torch.find_targets(base, "qv")
    return tna.UpdatePlan(config, [target.shape for target in targets], layers=[target.layer for target in targets])


def rate_of_theta(parameters: int, base: torch.nn.Module) -> float:
    """Return how far the preset's Uni-LoRA moves θ itself in a step, which is scaled as in PEFT."""
    (unit,) = plan(tna.presets.unilora(parameters), base).units.values()
    return RATE * unit


def experiments(base: torch.nn.Module) -> Iterator[Experiment]:
    """Yield the experiments; rates of PEFT's Uni-LoRA are for this base model."""
    tnadapt.torch.peft.register()
    presets, sizes = tna.presets, (1_000, 10_000, MOST)
    # One group for all weights would need a vector of all their elements in each step.
    linear: dict[str, Any] = {"groups": "layer", "projection": "linear", "ratio": 2e-3}
    configs = {
        **{f"unilora-{parameters}": presets.unilora(parameters) for parameters in sizes},
        "tinylora-13": presets.tinylora(13),
        "tinylora-rank16": presets.tinylora(16**2, rank=16, scope="group"),
        "superlora-rank3": presets.superlora(3),
        "superlora-rank14-linear": presets.superlora(14, **linear),
        "lora-rank32": presets.lora(32),
        "lora-rank32-as-peft": presets.lora(32, alpha=64, rate="sgd"),
    }
    plain = {"lr": RATE, "weight_decay": 0.0}
    for name, settings in configs.items():
        config = tnadapt.torch.peft.TnadaptConfig(settings=settings, target_modules="qv", task_type="CAUSAL_LM")
        yield Experiment(name, config, {"lr": 1e-4, "weight_decay": 0.1} if settings.rate == "sgd" else plain)

    common: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    for parameters in sizes:
        config = UniLoraConfig(r=4, theta_d_length=parameters, **common)
        optimizer = {"lr": 2e-3} if parameters == MOST else {**plain, "lr": rate_of_theta(parameters, base)}
        yield Experiment(f"peft-unilora-{parameters}", config, optimizer)
    for rate in (3e-4, 1e-3):
        config = TinyLoraConfig(r=16, u=16**2, **common)
        yield Experiment(f"peft-tinylora-rank16-rate{rate:g}", config, {**plain, "lr": rate})


def write(board: Path) -> str:
    """Write all folders, and return their table."""
    base, rows = llama(), []
    for experiment in experiments(base):
        experiment.write(board)
        numbers, rate = f"{experiment.num_parameters(base):,}", f"{experiment.optimizer['lr']:g}"
        rows.append((str(PLACE / experiment.name), numbers, rate))
    return TextTable(rows, ("folder", "numbers", "rate"), (1, 2)).markdown()


def run(arguments: list[str]) -> None:
    """Run ``run.py`` of the working directory as if Python had been started with it."""
    if not Path("run.py").is_file():
        raise SystemExit(f"{Path.cwd()} has no run.py: change to method_comparison/MetaMathQA of a clone of PEFT")
    tnadapt.torch.peft.register()
    # Python puts a script's folder first; there the board's modules `utils` and `data` are.
    sys.path[0] = str(Path.cwd())
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write the folders, and print their table")
    writing.add_argument("board", type=Path, help="method_comparison/MetaMathQA of a clone of PEFT")
    commands.add_parser("run", help="run one; what follows are arguments of run.py", add_help=False)
    options, others = parser.parse_known_args()
    if options.command == "run":
        run(others)
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    else:
        print(write(options.board))


if __name__ == "__main__":
    main()
