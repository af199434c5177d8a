"""The experiment folders for PEFT's boards: ``python benchmarks/peft_boards/experiments.py`` writes them.

Each is a preset with its arguments, on the query and value projections unless it says otherwise.
``adapter_config.json`` is what the plug-in's config writes, ``training_params.json`` overrides the board's optimizer
settings. The number of parameters is that of a plan on the board's base model, which is built without weights, so
nothing is downloaded. ``README.md`` lists the folders. It needs ``pip install "tnadapt[peft,hub]" diffusers``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tnadapt as tna
import tnadapt.torch
import tnadapt.torch.peft

__all__ = ["BOARDS", "LIMIT", "Board", "Experiment", "files", "plan"]

HERE = Path(__file__).resolve().parent
#: Every experiment trains fewer parameters.
LIMIT = 100_000


@dataclass(frozen=True)
class Experiment:
    """One row: a preset and its arguments."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "qv"


@dataclass(frozen=True)
class Board:
    """A board of PEFT: the name of its folder, its base model and the experiments on it."""

    name: str
    title: str
    prefix: str
    base: Callable[[], torch.nn.Module]
    num_parameters: int
    experiments: tuple[Experiment, ...]

    def path(self, experiment: Experiment) -> Path:
        """Return the folder of an experiment, relative to the board's."""
        return Path("experiments", "tnadapt", f"{self.prefix}-{experiment.name}")


# -- The base models, without weights -------------------------------------------------------------


def llama() -> torch.nn.Module:
    """Return Llama-3.2-3B on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def flux() -> torch.nn.Module:
    """Return the transformer of FLUX.2-klein-base-4B on the meta device."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model: torch.nn.Module = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128,
            joint_attention_dim=7680, guidance_embeds=False,
        )  # fmt: skip
    return model


# -- The experiments ------------------------------------------------------------------------------

# Presets train in units for which one rate suits all of them (docs/learning_rate.rst). Nobody has tuned it on these
# boards.
_RATE = 1e-2


def _everywhere() -> Iterator[Experiment]:
    """Yield what both boards have."""
    yield Experiment("tinylora-13", "tinylora", {"parameters": 13})
    yield Experiment("tinylora-64", "tinylora", {"parameters": 64})
    for parameters in (256, 1_000, 10_000):
        yield Experiment(f"unilora-{parameters}", "unilora", {"parameters": parameters})
    for rank in (8, 16, 32):
        yield Experiment(f"lora_xs-rank{rank}", "lora_xs", {"rank": rank})
    # By F from a vector that is a product of two matrices: one group for all weights, or one for each layer, which
    # needs less memory.
    for groups, rank, ratio in ((1, 1, "1e-5"), (1, 1, "1e-3"), ("layer", 1, "1e-3"), ("layer", 8, "2e-3")):
        settings = {"rank": rank, "groups": groups, "projection": "linear", "ratio": float(ratio)}
        place = "-layer" if groups == "layer" else ""
        yield Experiment(f"superlora{place}-linear-rank{rank}-ratio{ratio}", "superlora", settings)
    yield Experiment("superlora-rank1", "superlora", {"rank": 1})
    yield Experiment("fastfood-layer-ratio1e-5", "fastfood", {"ratio": 1e-5, "groups": "layer"})
    yield Experiment("lonkr-rank4", "lonkr", {"rank": 4})
    yield Experiment("lonkr-rank8-splits4", "lonkr", {"rank": 8, "splits": 4})
    yield Experiment("lorta-rank4", "lorta", {"rank": 4})
    for preset in ("lotr", "metatt"):
        # In a Llama queries have three times the rows of values, so each role is a group of its own.
        yield Experiment(f"{preset}-rank4", preset, {"rank": 4, "groups": "role"})
    heads = {"rank": 4, "groups": "role", "head_size": 128}
    yield Experiment("lorta_cp-rank4", "lorta_cp", heads)
    yield Experiment("craft-rank8", "craft", {"rank": 8, "groups": "role"})
    yield Experiment("nola-100", "nola", {"parameters": 100})
    for n in (100, 1_000):
        yield Experiment(f"fourierft-{n}", "fourierft", {"n": n})
    yield Experiment("vera-values-rank256", "vera", {"rank": 256}, targets="v")


_ALL_LINEAR = (
    Experiment("tinylora-13-all-linear", "tinylora", {"parameters": 13}, targets="all-linear"),
    Experiment("unilora-1000-all-linear", "unilora", {"parameters": 1_000}, targets="all-linear"),
    Experiment("lora_xs-rank16-all-linear", "lora_xs", {"rank": 16}, targets="all-linear"),
)

BOARDS = (
    Board(
        "MetaMathQA", "MetaMathQA: Llama-3.2-3B, mathematics in words", "llama-3.2-3B",
        llama, 3_212_749_824, (*_everywhere(), *_ALL_LINEAR),
    ),
    Board(
        "image-gen", "image-gen: FLUX.2-klein-base-4B, images of one subject", "flux2-klein",
        flux, 3_875_544_576, tuple(_everywhere()),
    ),
)  # fmt: skip


# -- Plans and files ------------------------------------------------------------------------------


def plan(base: torch.nn.Module, experiment: Experiment) -> tna.SuperLoRA:
    """Return the plan of an experiment on a base model; only shapes are read."""
    targets = tnadapt.torch.find_targets(base, experiment.targets)
    config = getattr(tna.presets, experiment.preset)(**experiment.settings)
    return tna.SuperLoRA(
        config,
        [target.shape for target in targets],
        layers=[target.layer for target in targets],
        roles=[target.role for target in targets],
    )


def adapter_config(experiment: Experiment) -> str:
    """Return ``adapter_config.json`` as the plug-in writes it, but for PEFT's version, which changes no setting."""
    tnadapt.torch.peft.register()
    config = tnadapt.torch.peft.TnadaptConfig(
        preset=experiment.preset,
        settings=dict(experiment.settings),
        target_modules=experiment.targets,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        written = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    del written["peft_version"]
    return _json(written)


def training_params(experiment: Experiment) -> str:
    """Return ``training_params.json``: the rate, and no decay."""
    return _json({"optimizer_kwargs": {"lr": _RATE, "weight_decay": 0.0}})


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def files() -> dict[Path, str]:
    """Return the content of every file that this script writes, by its path relative to this folder."""
    found, tables = dict[Path, str](), list[str]()
    for board in BOARDS:
        base = board.base()
        rows = list[tuple[int, str]]()
        for experiment in board.experiments:
            place = board.path(experiment)
            parameters = plan(base, experiment).num_parameters
            if parameters >= LIMIT:
                raise ValueError(f"{place} trains {parameters:,} parameters; only fewer than {LIMIT:,} belong here")
            found[Path(board.name) / place / "adapter_config.json"] = adapter_config(experiment)
            found[Path(board.name) / place / "training_params.json"] = training_params(experiment)
            arguments = ", ".join(f"{name}={value!r}" for name, value in experiment.settings.items())
            row = f"| `{place.name}` | `{experiment.preset}({arguments})` | `{experiment.targets}` "
            rows.append((parameters, f"{row}| {parameters:,} | {_RATE:g} |"))
        head = ["| folder | preset | targets | parameters | rate |", "|---|---|---|---:|---:|"]
        table = "\n".join([*head, *(row for _, row in sorted(rows))])
        tables.append(f"## {board.title}\n\n{table}\n")
    found[Path("README.md")] = README + "\n" + "\n".join(tables)
    return found


README = """\
# tnadapt on PEFT's boards

`experiments.py` generates this page and the folders that it lists; `run.py` runs one of them with the `run.py` of a
clone of PEFT, after it has registered tnadapt's plug-in:

```sh
pip install -e ../peft -r ../peft/method_comparison/MetaMathQA/requirements.txt
python benchmarks/peft_boards/run.py ../peft/method_comparison/MetaMathQA \\
    experiments/tnadapt/llama-3.2-3B-unilora-1000 -v --clean
```

**None of these rows has been measured.** The number of parameters is that of a plan on the shapes of the base model.
The rate is the one that presets are made for (`docs/learning_rate.rst`); nobody has tuned it on these boards.
Everything else is the board's default, except for the weight decay, which is 0.

Settings with F (`superlora-linear`, `fastfood`) compute the updates of a group together, in float32: they need more
memory and time than the others, most of all with one group for all weights. `fourierft` transforms every weight in
every step. `craft` decomposes all weights of a role together when it is attached, which needs memory, too.
"""


def main() -> None:
    """Write the folders anew."""
    made = files()
    for board in BOARDS:
        shutil.rmtree(HERE / board.name, ignore_errors=True)
    for path, content in made.items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        (HERE / path).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
