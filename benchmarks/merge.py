"""``tnadapt merge`` against a copy of the same bytes: ``python benchmarks/merge.py FOLDER``.

Creates in FOLDER a checkpoint with the names and shapes of a 7-billion-parameter Llama, cut to a few layers, of
random numbers, in a few shards, and adapters for its q and v. Then, several times in turn, it copies the files (with
``shutil.copyfile``, and with the system's ``cp``, each followed by fsync) and merges (by the command line, including
Python's start-up). Times and memory go to ``results/merge.jsonl`` next to this file, one line per case.
All files are in the page cache; earlier writes are synchronized first. FOLDER needs three times the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import tnadapt as tna
from tnadapt.checkpoints.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results" / "merge.jsonl"

HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
ITEM = {"bfloat16": 2, "float32": 4}
TAG = {"bfloat16": "BF16", "float32": "F32"}

CASES = {
    "lora": (tna.presets.lora(16), "bfloat16"),
    "superlora": (tna.presets.superlora(16), "bfloat16"),
    "lora, float32": (tna.presets.lora(16), "float32"),
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as transformers stores a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{at}.mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        found |= {f"{at}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def numbers(dtype: str) -> Callable[[int], Iterator[np.ndarray]]:
    """Return a generator of normal numbers, a piece at a time: one pool, with a different offset for each tensor."""
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype("<f4")
    if dtype == "bfloat16":
        pool = (pool.view(np.uint32) >> 16).astype("<u2")
    place = 0

    def made(count: int) -> Iterator[np.ndarray]:
        nonlocal place
        while count:
            piece = pool[place : place + count]
            place = (place + len(piece) + 12345) % len(pool)
            count -= len(piece)
            yield piece

    return made


def make_base(folder: Path, dtype: str, size: float) -> None:
    """Write a checkpoint of about that size, in shards of about a gigabyte, and an index."""
    folder.mkdir(parents=True)
    layer = 2 * HIDDEN + 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP
    layers = max(1, round((size / ITEM[dtype] - 2 * VOCABULARY * HIDDEN) / layer))
    listed, made = list(shapes(layers).items()), numbers(dtype)
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in listed:
        held += int(np.prod(shape)) * ITEM[dtype]
        if held > 1.3e9:
            parts.append([])
            held = int(np.prod(shape)) * ITEM[dtype]
        parts[-1].append((name, shape))
    places = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in part:
            end = at + int(np.prod(shape)) * ITEM[dtype]
            header[name] = {"dtype": TAG[dtype], "shape": shape, "data_offsets": [at, end]}
            places[name], at = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in part:
                for piece in made(int(np.prod(shape))):
                    out.write(piece.data)
    index = {"metadata": {"total_size": sum(ITEM[dtype] * int(np.prod(shape)) for _, shape in listed)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": places}, indent=2))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))


def make_adapter(path: Path, base: Path, config: tna.Config, dtype: str) -> int:
    """Write an adapter as if trained on the base's q and v; return the number of elements that it updates."""
    from tnadapt.checkpoints.checkpoint import open_checkpoint
    from tnadapt.targets.checkpoint_targets import find_stored

    checkpoint = open_checkpoint(base)
    targets = find_stored({name: entry.shape for name, entry in checkpoint.entries.items()}, "qv", checkpoint.config)
    plan = tna.SuperLoRA(config, [target.shape for target in targets])
    rng = np.random.default_rng(1)
    arrays = {name: array + rng.normal(size=array.shape).astype("f4") * 0.01 for name, array in plan.init().items()}
    known = fingerprint((target.select(checkpoint.array(target.name)) for target in targets), dtype)
    tna.save(path, tna.AdapterFile(config, targets, arrays, base=known, model="LlamaForCausalLM"))
    return plan.size


def synchronized(folder: Path) -> None:
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def copy(base: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
    synchronized(out)


def cp(base: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", base, out], check=True)
    synchronized(out)


def merge(base: Path, adapter: Path, out: Path) -> int:
    """Run the merge command; return its peak resident memory in bytes."""
    command = [sys.executable, "-m", "tnadapt", "merge", str(base), str(adapter), "-o", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"it failed with {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return usage.ru_maxrss * 1024


def timed(work: Callable[[], int | None], out: Path) -> tuple[float, int]:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found or 0


def measure(name: str, folder: Path, size: float, rounds: int) -> dict[str, object]:
    """Measure one case: every method once per round, in turn."""
    config, dtype = CASES[name]
    base, adapter, out = folder / f"base-{dtype}", folder / "adapter.safetensors", folder / "out"
    if not base.exists():
        make_base(base, dtype, size)
    elements = make_adapter(adapter, base, config, dtype)
    ways: dict[str, Callable[[], int | None]] = {
        "copyfile": lambda: copy(base, out),
        "cp": lambda: cp(base, out),
        "merge": lambda: merge(base, adapter, out),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory, loads = 0, []
    for number in range(rounds + 1):
        loads.append(round(os.getloadavg()[0], 2))
        for way, work in ways.items():
            took, used = timed(work, out)
            memory = max(memory, used)
            if number:  # the first fills the page cache
                seconds[way].append(round(took, 3))
                print(f"{name}, round {number}: {way} {took:.2f} s", flush=True)
    shutil.rmtree(out)
    largest = max(int(np.prod(shape)) for shape in shapes(1).values()) * ITEM[dtype]
    updated = HIDDEN * HIDDEN * ITEM[dtype]
    middle = {way: statistics.median(took) for way, took in seconds.items()}
    least = {way: min(took) for way, took in seconds.items()}
    return {
        "case": name, "dtype": dtype, "config": config.to_dict(),
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "files": len(list(base.glob("*.safetensors"))), "updated_elements": elements, "seconds": seconds,
        "median": middle, "least": least,
        "merge_over_copyfile": round(middle["merge"] / middle["copyfile"], 3),
        "merge_over_cp": round(middle["merge"] / middle["cp"], 3),
        "least_merge_over_copyfile": round(least["merge"] / least["copyfile"], 3),
        "least_merge_over_cp": round(least["merge"] / least["cp"], 3),
        "peak_bytes": memory, "largest_tensor": largest, "largest_updated_tensor": updated,
        "peak_beyond_largest_updated": memory - updated,
        # The load by other processes: of the last minute, before each round.
        "load": loads, "machine": {"cpus": os.cpu_count(), "processor": processor(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "tnadapt": tna.__version__},
    }  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=float, default=4e9, help="bytes of the checkpoint, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="repeat for more; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(given.folder).free
    if free < 3 * given.size:
        raise SystemExit(f"{given.folder} has {free / 1e9:.1f} GB free; {3 * given.size / 1e9:.1f} GB are needed")
    lines = []
    for name in given.case or CASES:
        found = measure(name, given.folder, given.size, given.rounds)
        lines.append(json.dumps(found))
        beyond = found["peak_beyond_largest_updated"]
        print(
            f"{name}: {found['merge_over_copyfile']} times copyfile, {found['merge_over_cp']} times cp (medians), "
            f"{found['least_merge_over_copyfile']} and {found['least_merge_over_cp']} (fastest); "
            f"{beyond / 1e6:.0f} MB beyond the largest updated tensor"  # type: ignore[operator]
        )
        for base in given.folder.glob("base-*"):
            if base.name != f"base-{CASES[name][1]}":
                shutil.rmtree(base)
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
