"""The benchmarks and training scripts run, and what the documentation shows of them is made of their results."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import BENCHMARKS
from tests.support.depth import in_depth, long_only

torch = pytest.importorskip("torch")
if not (BENCHMARKS / "rates.py").is_file():
    pytest.skip("the benchmarks are not in this copy of the project", allow_module_level=True)

Scripts = Callable[[str], ModuleType]

DOCS = BENCHMARKS.parent / "docs"


def results(name: str) -> Any:
    text = (BENCHMARKS / "results" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


#: The scripts that make the tables, and how.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rates/digits": ("rates", lambda script: script.table("digits")),
    "rates/reviews": ("rates", lambda script: script.table("reviews")),
    "rates/cifar10": ("rates", lambda script: script.table("cifar10")),
    "rates/summary": ("rates", lambda script: script.summary()),
    "rates/power": ("rates", lambda script: script.power_table()),
    "rates/norm": ("rates", lambda script: script.norm_table()),
    "rates/equal_betas": ("rates", lambda script: script.equal_betas_table()),
    "rates/beta2": ("rates", lambda script: script.beta2_table()),
    "unmerge": ("unmerge", lambda script: script.table(results("unmerge.json")["rows"])),
    "quantized": ("quantized", lambda script: script.tables(results("quantized.json"))),
    "extract_large": ("extract_large", lambda script: script.table(results("extract_large.json"))),
    "model_memory": ("model_memory", lambda script: script.table(results("model_memory.json"))),
    "mixed_batch": ("mixed_batch", lambda script: script.table(results("mixed_batch.jsonl"))),
    "decompositions": ("decompositions", lambda script: script.table(results("decompositions.jsonl"))),
    "difficult_cp": ("decompositions", lambda script: script.difficult_table(results("difficult_cp.json"))),
    **{
        f"populations/{part}": (
            "populations",
            lambda script, part=part: script.tables(results("populations.json"))[part],
        )
        for part in ("steps", "others", "serving", "attaching", "sizes", "optimizers")
    },
    "rl_drift/cycle": ("rl_drift", lambda script: script.cycle_table(results("rl_drift/cycle.jsonl"))),
    "rl_drift/grpo": ("rl_drift", lambda script: script.grpo_table(script.read(script.RESULTS / "grpo.jsonl"))),
    "rl_drift/supervised": (
        "rl_drift",
        lambda script: script.supervised_table(
            results("rl_drift/number-sequence.jsonl"), results("rl_drift/grpo.jsonl")
        ),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_made_of_its_results(benchmark_scripts: Scripts, name: str) -> None:
    script, table = TABLES[name]
    assert (BENCHMARKS / "results" / f"{name}.rst").read_text(encoding="utf-8") == table(benchmark_scripts(script))


# -- Learning rates -------------------------------------------------------------------------------


def test_what_the_tables_of_rates_say_together(benchmark_scripts: Scripts) -> None:
    script = benchmark_scripts("rates")
    rows_of = {task: script.rows_of(task) for task in script.TASKS}
    for task, rows in rows_of.items():
        assert len(rows) == len(script.CONFIGS[task]), f"a setting of {task} lacks a rate"
    rows = [row for task in script.TASKS for row in rows_of[task]]
    within = [max(row.best, row.default) <= 2 * min(row.best, row.default) for row in rows]
    lost = [100 * (statistics.fmean(row.test_best) - statistics.fmean(row.test_default)) for row in rows]
    text = script.summary()
    assert text.startswith(f"On all tasks, {sum(within)} of {len(rows)} settings have their best rate within a factor")
    assert f"loses more than half a point in {sum(one > 0.5 for one in lost)} settings" in text
    assert text.endswith(f"at most {max(lost):.2f}.\n")


# -- Quantized bases ------------------------------------------------------------------------------


def test_every_quantization_was_tried_and_only_calibrated_ones_refuse_a_merge() -> None:
    from tests.torch.quantized_models import EMBEDDINGS, KINDS

    kinds = results("quantized.json")["kinds"]
    assert {name for name in kinds if not name.startswith(("GPTQ", "AWQ"))} == {*KINDS, *EMBEDDINGS}
    for name, row in kinds.items():
        refused = {step for step, outcome in row["steps"].items() if outcome != "yes"}
        assert refused == ({"merge"} if name.startswith(("GPTQ", "AWQ")) else set()), name


def test_the_numbers_of_quantized_bases_are_measured() -> None:
    kinds = results("quantized.json")["kinds"]
    text = " ".join((DOCS / "quantized.rst").read_text(encoding="utf-8").split())
    nf4 = kinds["bitsandbytes nf4"]
    small, large = nf4["merges"]["0.01"], nf4["merges"]["0.1"]
    kept, most, off = (round(100 * number) for number in (small["kept"], large["kept"], large["update_error"]))
    assert f"of an update of 1 % of the weight, nf4 keeps {kept} %, and of 10 % it keeps {most} %" in text
    assert f"with an error of {off} %" in text
    wrong, right = (round(100 * nf4[shape]) for shape in ("64 by 96", "96 by 64"))
    assert f"an nf4 layer of 64 by 96 is off by {wrong} % instead of {right} %" in text
    for name, row in kinds.items():
        for bits, size in (("8", "0.1"), ("int8", "0.03")):
            if bits in name and "merges" in row:
                assert row["merges"][size]["kept"] > 0.95, name


# -- The comparison with PEFT ----------------------------------------------------------------------


def test_the_figures_of_the_comparison_with_peft_are_measured(benchmark_scripts: Scripts) -> None:
    text = " ".join((DOCS / "compare.rst").read_text(encoding="utf-8").split())
    rows = {(row["library"], row["dtype"], row["times"]): row["error"] for row in results("unmerge.json")["rows"]}
    assert f"100 LoRAs in bfloat16, the base is off by {100 * rows['PEFT', 'bfloat16', 100]:.0f} %" in text
    cycles = results("rl_drift/cycle.jsonl")
    (last,) = (row for row in cycles if row.get("title") == "PEFT LoRA, r = 8" and row.get("updates") == 500)
    assert f"after 500 of TRL's cycles for vLLM by {100 * last['change'] / last['update']:.0f} %" in text
    (ratio,) = (row["ratio"] for row in cycles if row.get("title") == "tnadapt lora(8)" and "ratio" in row)
    assert f"tnadapt's cycle takes about {ratio:.1f} times as long" in text
    within, settings = re.findall(r"^(\d+) of (\d+) settings", benchmark_scripts("rates").equal_betas_table())[0]
    assert f"for {within} of {settings} settings" in text


# -- Memory of large models -----------------------------------------------------------------------


def test_what_is_recorded_of_large_models_follows_from_their_shapes(benchmark_scripts: Scripts) -> None:
    recorded = results("model_memory.json")
    for row, expected in zip(benchmark_scripts("model_memory").compute(), recorded, strict=True):
        # A file names the version that wrote it.
        assert row.pop("file", 0) == pytest.approx(expected.pop("file", 0), abs=100)
        assert row == expected


def test_the_numbers_of_memory_are_measured() -> None:
    text = " ".join((DOCS / "memory.rst").read_text(encoding="utf-8").split())
    peaks = {row["case"]: row for row in results("fast/memory.jsonl")[1:]}
    above = {case: peaks[case]["above lora MB"] for case in ("lora", "superlora", "superlora F 0.01")}
    assert f"{peaks['peft lora r=4']['peak MB']:,} MB with PEFT's LoRA of rank 4" in text
    assert f"takes {-above['lora']} MB less, SuperLoRA {above['superlora']} MB more" in text
    assert f"of ρ = 0.01 {above['superlora F 0.01']} MB more" in text
    rows = [row for row in results("fast/decoding.jsonl")[1:] if (row["dtype"], row["how"]) == ("bfloat16", "eager")]
    ratios = {row["case"]: row["ratio"] for row in rows}
    lora, superlora = (f"{ratios[case]:.2f} times" for case in ("lora(4)", "superlora(4)"))
    assert f"takes {lora} as long as the base with LoRA, and {superlora} with SuperLoRA" in text


def test_a_llama_keeps_what_the_formulas_say(benchmark_scripts: Scripts) -> None:
    import tnadapt.torch
    from tests.torch.internals import drawn, held_by_draws

    transformers = pytest.importorskip("transformers")
    script = benchmark_scripts("model_memory")
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64, vocab_size=16))
    model.to(torch.bfloat16).requires_grad_(False)

    def kept(tokens: int) -> int:
        """Return the bytes that backward of a batch keeps."""
        storages = {}

        def pack(tensor: Any) -> Any:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model.model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    base = kept(128) - kept(64)
    for method, config in script.METHODS.items():
        strategy = "weight" if method.startswith("SuperLoRA") else "factored"
        adapter = tnadapt.torch.attach(model, config, strategy=strategy)
        plan = adapter.plan
        for_each_token = (kept(128) - kept(64) - base) / 64
        # TinyLoRA's narrow factor is frozen: x times it is not kept.
        unused = 2 * 2 * 4 if method.startswith("TinyLoRA") else 0
        assert for_each_token == script.activation_bytes(plan) - unused, method
        assert held_by_draws(drawn(plan)) == pytest.approx(script.fixed_bytes(plan), rel=0.01, abs=500), method
        adapter.detach()


# -- Language models ------------------------------------------------------------------------------


def test_the_table_of_language_models_is_that_of_the_results() -> None:
    lines = [line.strip().removeprefix("* ") for line in (DOCS / "language_models.rst").read_text("utf-8").splitlines()]
    cells = [line[1:].strip() for line in lines if line == "-" or line.startswith("- ")]
    both = [results("smollm2_sft.json"), results("smollm2_grpo.json")]
    for label, key, form in (
        ("trained parameters", "trained parameters", "{:,}"),
        ("bytes of the file", "bytes of the file", "{:,}"),
        ("right before", "accuracy of the base", "{:.1%}"),
        ("right after", "accuracy", "{:.1%}"),
        ("the likelier label is right, before", "accuracy of the base's likelier label", "{:.1%}"),
        ("the likelier label is right, after", "accuracy of the likelier label", "{:.1%}"),
        ("held-out examples", "tests", "{}"),
    ):
        at = cells.index(label)
        # Only classification has labels.
        expected = [form.format(one[key]).replace("%", " %") if key in one else "" for one in both]
        assert cells[at : at + 3] == [label, *expected]
    at = cells.index("steps")
    assert cells[at : at + 3] == ["steps", *(one["settings"]["steps"] for one in both)]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_few_parameters_learned_something(name: str) -> None:
    result = results(f"smollm2_{name}.json")
    assert result["trained parameters"] <= 1000
    # More than three standard deviations of the difference of two shares.
    assert result["accuracy"] - result["accuracy of the base"] > 3 * (2 * 0.25 / result["tests"]) ** 0.5


# -- Reinforcement learning ------------------------------------------------------------------------


@pytest.mark.slow
def test_cycles_of_trl_change_the_bases_of_peft_alone(benchmark_scripts: Scripts, tmp_path: Path) -> None:
    for package in ("peft", "transformers", "trl"):
        pytest.importorskip(package)
    command = [sys.executable, str(BENCHMARKS / "rl_drift.py"), "cycle", "--model", "tiny", "--updates", "20"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    script = benchmark_scripts("rl_drift")
    about, *rows = script.read(tmp_path / "cycle.jsonl")
    assert about["model"] == "tiny"
    titles = [script.CONTESTANTS[name].title for name in script.CYCLED]
    assert [row["title"] for row in rows] == 4 * titles  # after 1, 10 and 20 updates, and the times
    for row in rows[: 3 * len(titles)]:
        assert (row["changed"] == 0) == (row["change"] == 0.0) == row["title"].startswith("tnadapt"), row
        assert row["changed elsewhere"] == 0
        # What is sent has the update, but for its rounding and the drift.
        assert row["sent"] < 0.7 * row["update"]
    last = rows[2 * len(titles) : 3 * len(titles)]
    assert all(abs(row["update"] / row["weights"] - script.SIZE) < 1e-4 for row in last)
    assert (tmp_path / "cycle.rst").read_text(encoding="utf-8") == script.cycle_table([about, *rows])


def test_the_task_has_the_most_gradients_of_those_that_no_control_solves(benchmark_scripts: Scripts) -> None:
    script = benchmark_scripts("rl_drift")
    solved = [{"task": "easy", "four examples": 0.21, "why not": "a control solves it"}]
    hard = [
        {"task": task, "mixed": mixed, "reward": reward}
        for task, mixed, reward in (("hopeless", 0.0, 0.9), ("right", 0.5, 0.2), ("harder", 0.5, 0.1))
    ]
    assert script.chosen([*solved, *hard]) == "right"


def test_a_training_has_a_row_from_three_seeds_on(benchmark_scripts: Scripts) -> None:
    script = benchmark_scripts("rl_drift")
    assert script.grpo_table([]) == "No contestant has been trained with three seeds yet.\n"
    shared = {"steps": 20, "task": "sums", "machine": {"processor": "P"}}
    state = {"numbers": 13, "elements": 100, "changed": 5, "change": 0.1, "update": 1.0}
    rows = [{"contestant": "base", "seed": 0, "rate": 0.0, "right": 0.01, "four examples": 0.11, **shared}]
    rows[0]["machine"] = {"processor": "Q"}
    for title, seeds in (("three", 3), ("two", 2)):
        rows += [
            {
                "contestant": title, "title": title, "seed": seed, "rate": 0.01, "right": 0.1 * (seed + 1),
                "rewards": [0.0] * 10 + [0.5] * 10, **state, **shared,
            }
            for seed in range(seeds)
        ]  # fmt: skip
    text = script.grpo_table(rows)
    cells = [line[7:] for line in text.splitlines() if line[5:6] == "-"]
    assert cells[-6:] == [
        "three",
        "13",
        "0.01",
        "0.000 → 0.500",
        "10.0, 20.0, 30.0 %",
        "5% of the numbers changed, by 10% of the update",
    ]
    assert [cell for cell in cells if cell.endswith("%")] == ["1.0 %", "11.0 %", "10.0, 20.0, 30.0 %"]
    assert "two" not in text
    assert text.endswith("(sums of reasoning-gym, 20 steps, P and Q; right answers of each seed)\n")


# -- The short profile -----------------------------------------------------------------------------


@pytest.fixture
def short(benchmark_scripts: Scripts) -> ModuleType:
    pytest.importorskip("torch")
    return benchmark_scripts("short")


def taking(clock: list[float], seconds: list[float]) -> Callable[[], None]:
    """Return a contestant, each of whose calls takes the next of its seconds of a clock."""
    left = iter(seconds)
    return lambda: clock.append(clock[-1] + next(left))


def test_a_ratio_is_the_median_of_those_within_a_round(short: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "SECONDS", 0.0)
    monkeypatch.setattr(short, "ROUNDS", 3)
    # Two calls first. The machine is ten times as slow in the third round, of which the ratio shows nothing.
    clock = [0.0]
    ours, theirs = taking(clock, [9.0, 1.0, 2.0, 3.0, 20.0]), taking(clock, [9.0, 1.0, 1.0, 1.0, 10.0])
    ratio = short.turns(ours, theirs, lambda: clock[-1], smoke=False)
    assert ratio == {"ratio": 2.0, "low": 2.0, "high": 2.5, "seconds": 3.0, "other": 1.0, "rounds": 3}


def test_the_committed_results_have_every_case(short: ModuleType) -> None:
    rows = short.read()
    assert [row["case"] for row in rows] == list(short.CASES)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    machine = json.loads(short.RESULTS.read_text(encoding="utf-8").partition("\n")[0])
    assert {"processor", "cores", "date", "numpy", "torch", "peft"} <= set(machine)


# -- PEFT's own tests over the plug-in -------------------------------------------------------------


def test_the_page_is_that_of_its_results_and_explains_every_difference(benchmark_scripts: Scripts) -> None:
    suite = benchmark_scripts("peft_suite")
    found = suite.unpacked([json.loads(line) for line in suite.RESULTS.read_text(encoding="utf-8").splitlines()])
    reasons = tomllib.loads(suite.REASONS.read_text(encoding="utf-8"))["difference"]
    assert suite.page(found, reasons) == suite.PAGE.read_text(encoding="utf-8")
    rows = [one for one in found if "test" in one]
    assert suite.explained(suite.differences(rows), reasons)[1] == []


# -- PEFT's board ----------------------------------------------------------------------------------


# PEFT 0.21 asks transformers 5 for a property under its old name.
old_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def board(benchmark_scripts: Scripts) -> ModuleType:
    for package in ("peft", "transformers"):
        pytest.importorskip(package)
    return benchmark_scripts("peft_board")


def board_llama(layers: int) -> Any:
    """Return a Llama with fewer values than queries, like the board's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": layers, "vocab_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=128, **sizes))


@old_name
def test_a_folder_of_the_board_trains_as_many_numbers_as_it_says(board: ModuleType, tmp_path: Path) -> None:
    import torch
    from peft import PeftConfig, get_peft_model

    table, base = board.write(tmp_path), board.llama()
    # As many as on the board itself, in the results of its experiment lora/llama-3.2-3B-rank32.
    assert "/lora-rank32 | 9,175,040 | 0.01 |" in table
    for experiment in board.experiments(base):
        # LoRA of rank 4 needs 40 such layers to have more numbers than the largest Uni-LoRA.
        small = board_llama(layers=40 if experiment.name.endswith(str(board.MOST)) else 4)
        numbers, told = experiment.num_parameters(small), experiment.num_parameters(base)
        assert told <= board.MOST or experiment.name.startswith("lora-rank32")
        folder = tmp_path / board.PLACE / experiment.name
        model = get_peft_model(small, PeftConfig.from_pretrained(str(folder)))
        assert model.get_nb_trainable_parameters()[0] == numbers, experiment.name
        params = json.loads((folder / "training_params.json").read_text(encoding="utf-8"))
        assert params == {"max_steps": 5000, "optimizer_kwargs": experiment.optimizer}
        rate = torch.optim.AdamW(model.parameters(), **params["optimizer_kwargs"]).param_groups[0]["lr"]
        assert f"/{experiment.name} | {told:,} | {rate:g} |" in table


@old_name
def test_the_control_of_the_board_is_lora_of_peft(board: ModuleType) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import tnadapt.torch
    from tnadapt import Config

    (control,) = (one for one in board.experiments(board.llama()) if one.name == "lora-rank32-as-peft")
    settings = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    models = [get_peft_model(board_llama(layers=2), config) for config in (LoraConfig(**settings), control.config)]
    arrays = dict(tnadapt.torch.adapters(models[1])["default"].named_parameters())
    for number, target in enumerate(tnadapt.torch.adapters(models[1])["default"].targets):
        a = models[0].base_model.model.get_submodule(target.module).lora_A["default"].weight
        arrays[f"group{number}.split0.factor1"].data.copy_(a.T)
    words = torch.arange(12).view(2, 6)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), **control.optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
    with torch.no_grad():
        peft, ours, untrained = (model(input_ids=words).logits for model in (*models, board_llama(layers=2)))
    # The start, on the board's model: PEFT draws A uniformly, up to one by the root of its columns.
    start = board.plan(Config.from_dict(control.config.settings), board.llama()).init()
    assert start["group0.split0.factor1"].std() == pytest.approx((3 * 3072) ** -0.5, rel=0.05)
    torch.testing.assert_close(ours - untrained, peft - untrained, rtol=0, atol=1e-3 * (peft - untrained).abs().max())


def test_the_script_of_the_board_knows_the_plugin(
    board: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", ["peft_board.py", "run", "-v", "experiments/tnadapt/unilora-1000"])
    with pytest.raises(SystemExit, match=r"has no run\.py: change to method_comparison/MetaMathQA of a clone of PEFT"):
        board.main()
    board.write(tmp_path)
    (tmp_path / "utils.py").write_text("NAME = 'of the board'")
    (tmp_path / "run.py").write_text(
        "import sys, peft, utils\n"
        "config = peft.PeftConfig.from_pretrained(sys.argv[2])\n"
        "print(__name__, sys.argv[:2], utils.NAME, config.peft_type.value)\n",
    )
    printed: list[Any] = []
    monkeypatch.setattr("builtins.print", lambda *words: printed.extend(words))
    board.main()
    sys.modules.pop("utils")
    assert printed == ["__main__", ["run.py", "-v"], "of the board", "TNADAPT"]


# -- The scripts themselves ------------------------------------------------------------------------

SMOKES: list[tuple[str, ...]] = [
    ("fast.py", part) for part in ("steps", "memory", "decoding", "strategies", "files", "gpu")
]
SMOKES += [(f"{name}.py",) for name in ("mixed_batch", "decompositions", "population_files", "populations", "short")]


def smoke(script: str, *options: str) -> str:
    """Run a script on tiny sizes, and return what it prints."""
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", in_depth(SMOKES, SMOKES[:1]), ids=" ".join)
def test_a_script_runs(command: tuple[str, ...]) -> None:
    for package in ("peft", "tensorly", "transformers"):
        pytest.importorskip(package)
    smoke(*command)


@pytest.mark.slow
@long_only
def test_adapters_are_extracted_from_shards(tmp_path: Path) -> None:
    printed = smoke("extract_large.py", "--layers", "1", "--folder", str(tmp_path))
    assert [json.loads(line)["targets"] for line in printed.splitlines()] == [2, 7, 2, 2]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_page_is_that_of_its_results(benchmark_scripts: Scripts, tmp_path: Path) -> None:
    script = benchmark_scripts("fast")
    importlib.import_module("page").write(script.read(script.RESULTS), tmp_path)
    shown = BENCHMARKS / "results"
    for name in ("speed.md", "speed_tables.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (shown / name).read_text(encoding="utf-8")
    for picture in tmp_path.glob("*.png"):
        assert (shown / picture.name).is_file(), picture.name


@pytest.mark.slow
@long_only
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_language_model_is_trained(script: str, tmp_path: Path) -> None:
    for name in ("datasets", "gguf", "transformers", "trl"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", f"examples.language_models.{script}_smollm2", "--steps", "1", "--tests", "4"]
    extra = ["--cache", str(tmp_path / "data")] if script == "sft" else ["--prompts", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), *extra], cwd=BENCHMARKS.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["trained parameters"] == 1000
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", in_depth(["evolution", "users"], ["users"]))
def test_an_example_of_populations(name: str, tmp_path: Path) -> None:
    """The committed result has the same entries; of users, those who are trained together are as those alone."""
    for package in ("scipy", "sklearn", "timm"):
        pytest.importorskip(package)
    out = tmp_path / "result.json"
    short = {"evolution": ["--steps", "3", "--adam-steps", "100", "--seeds", "1"], "users": ["--steps", "3"]}[name]
    command = [sys.executable, "-m", f"examples.populations.{name}", *short, "--out", str(out)]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    committed = json.loads((BENCHMARKS / "results" / f"population_{name}.json").read_text(encoding="utf-8"))
    for result in (json.loads(out.read_text(encoding="utf-8")), committed):
        assert result.keys() == committed.keys()
        if name == "users":
            assert float(result["largest difference of a test loss"]) < 1e-3
            assert result["of the population"] == result["of models of their own"]
        else:
            assert result["base, turned"] < result["Adam"]
    assert committed["steps" if name == "users" else "evolution, steps"] > 3


def test_the_numbers_of_the_examples_of_populations_are_measured() -> None:
    text = " ".join((DOCS / "populations.rst").read_text(encoding="utf-8").split())
    evolution, users = results("population_evolution.json"), results("population_users.json")
    assert (
        f"rises from {evolution['base, turned']} % to {evolution['evolution']} % in {evolution['evolution, steps']} "
        f"steps, and to {evolution['Adam']} % in {evolution['Adam, steps']} steps of Adam"
    ) in text
    assert users["of the population"] == users["of models of their own"]
    assert f"{users['of the population']} % in both cases, {users['accuracy of the base']} % before" in text


def test_supervised_training_stands_next_to_grpo_with_the_same_update(benchmark_scripts: Scripts) -> None:
    def line(method: str, parameters: int, budget: int, seed: int, test: float) -> dict[str, Any]:
        return {
            "key": "k", "method": method, "title": method.title(), "label": "r = 4" * (method == "unilora"),
            "parameters": parameters, "budget": budget, "seed": seed, "test": test,
        }  # fmt: skip

    lines = [
        {"study": {}}, {"session": {"processor": "P"}}, line("few-shot", 0, 0, 0, 0.09),
        *(line("unilora", 100, 100, seed, 0.1 * seed) for seed in range(3)),
        *(line("lora-8", 5000, 0, seed, 0.5) for seed in range(3)),
        *(line("dense", 9000, 0, seed, 0.6) for seed in range(2)),
    ]  # fmt: skip
    rows = [{"contestant": "base", "steps": 0, "right": 0.01}]
    rows += [{"contestant": "unilora-100", "steps": 20, "right": 0.2 + 0.1 * seed} for seed in range(3)]
    text = benchmark_scripts("rl_drift").supervised_table(lines, rows)
    cells = [line[7:] for line in text.splitlines() if line[5:6] == "-"]
    assert cells[4:] == [
        *("Few-Shot", "0", "9.0 %", "–"),
        *("Unilora r = 4", "100", "0.0, 10.0, 20.0 %", "20.0, 30.0, 40.0 %"),
        *("Lora-8", "5,000", "50.0, 50.0, 50.0 %", "–"),
    ]
    assert text.endswith("(P; right answers of each seed)\n")


def test_what_the_page_says_of_few_parameters_is_in_the_results() -> None:
    supervised = collections.defaultdict(list)
    rewarded = collections.defaultdict(list)
    for line in results("rl_drift/number-sequence.jsonl"):
        if "key" in line:
            supervised[line["method"], line["budget"]].append(line["test"])
    for row in results("rl_drift/grpo.jsonl"):
        rewarded[row["contestant"]].append(row["right"])
    (few_shot,) = supervised["few-shot", 0]
    assert statistics.fmean(supervised["tinylora", 13]) < few_shot
    assert statistics.fmean(rewarded["tinylora-13"]) < few_shot
    for count in (100, 1_000, 10_000):
        assert min(supervised["unilora", count]) >= statistics.fmean(rewarded[f"unilora-{count}"]), count
    everywhere = statistics.fmean(rewarded["peft-lora"])
    for count, seeds in ((100, 2), (1_000, 3), (10_000, 2)):
        learned = sorted(rewarded[f"unilora-{count}"], reverse=True)
        assert all(abs(everywhere - right) < 0.025 for right in learned[:seeds]), count
        assert all(right < 0.05 for right in learned[seeds:]), count
