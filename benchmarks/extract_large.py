"""Extract adapters from a synthetic pair of checkpoints in Llama-7B's shapes, and record time and peak memory.

    python benchmarks/extract_large.py [--layers 4] [--folder FOLDER] [--smoke]

Writes results/extract_large.json, and the documentation's table to extract_large.rst beside it. Both checkpoints have
one shard per layer, in bfloat16, with embeddings and a head. Each takes 0.5 GB, and 0.4 GB for each layer; they are
removed at the end. Each extraction is a command of its own, and its peak is that of its process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formatting import list_table

RESULTS = Path(__file__).parent / "results" / "extract_large.json"
WIDTH, HIDDEN, TOKENS = 4096, 11008, 32000
#: What fine-tuning changes: an update of this rank with singular values 1/k, and noise of this share of its norm.
RANK, SIZE, NOISE = 32, 1e-3, 0.1
LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"
CASES = {
    "lora(8), queries and values": ["--preset", "lora", "--rank", "8"],
    "lora(8), all linear layers": ["--preset", "lora", "--rank", "8", "--targets", LINEAR],
    "lotr(8), queries and values": ["--preset", "lotr", "--rank", "8", "--iterations", "10"],
    "superlora(8), a group per layer": [
        "--preset", "superlora", "--rank", "8", "--set", "groups=layer", "--set", "order=3", "--iterations", "10"
    ],
}  # fmt: skip


def shapes(layers: int, width: int, hidden: int, tokens: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the tensors of each shard."""
    own = {f"self_attn.{one}_proj": (width, width) for one in "qkvo"}
    own |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}
    found = {
        f"layer{layer}": {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        for layer in range(layers)
    }
    return found | {
        "ends": {"model.embed_tokens.weight": (tokens, width), "lm_head.weight": (tokens, width)}
    }  # fmt: skip


def write(folder: Path, layers: int, small: bool) -> None:
    """Write the base and the tuned checkpoint, shard by shard."""
    import torch
    from safetensors.torch import save_file

    sizes = (64, 160, 300) if small else (WIDTH, HIDDEN, TOKENS)
    for kind in ("base", "tuned"):
        place = folder / kind
        place.mkdir()
        index: dict[str, str] = {}
        for shard, tensors in shapes(layers, *sizes).items():
            made = {}
            for number, (name, (rows, cols)) in enumerate(tensors.items()):
                random = torch.Generator().manual_seed(len(index) * 100 + number)
                weight = torch.randn(rows, cols, generator=random) * 0.02
                if kind == "tuned" and shard != "ends":
                    weight += update(rows, cols, random)
                made[name] = weight.to(torch.bfloat16)
            save_file(made, place / f"{shard}.safetensors")
            index |= dict.fromkeys(made, f"{shard}.safetensors")
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
        (place / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": sizes[0], **heads}))


def update(rows: int, cols: int, random: Any) -> Any:
    """Return an update whose largest singular value is about that of SIZE times the noise of a weight."""
    import torch

    left, right = torch.randn(rows, RANK, generator=random), torch.randn(RANK, cols, generator=random)
    found = (left / torch.arange(1, RANK + 1)) @ right
    found = found / found.square().mean().sqrt()
    return SIZE * (found + NOISE * torch.randn(rows, cols, generator=random))


def command(arguments: list[str]) -> tuple[float, float, str]:
    """Run a command of tnadapt; return seconds, peak memory in MB, and what it printed."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "tnadapt", *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"tnadapt {' '.join(arguments)} ended with {child.returncode}: {printed}")
    return time.perf_counter() - begun, usage.ru_maxrss / 1024.0, printed


def table(found: dict[str, Any]) -> str:
    """Return the documentation's table."""
    lines: list[Sequence[object]] = [("Preset", "Targets", "Seconds", "Peak, MB")]
    lines += [(row["case"], row["targets"], f"{row['seconds']:.0f}", f"{row['peak MB']:,}") for row in found["rows"]]
    size = f"{found['layers']} layers, {found['checkpoint MB']:,} MB on disk"
    return f"{list_table(lines)}\n({size}; threads: {found['threads']}; {found['note']})\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints go; the system's by default")
    parser.add_argument("--write", action="store_true", help="only write the checkpoints into the folder")
    parser.add_argument("--note", default="idle machine", help="what the table says of the machine")
    parser.add_argument("--smoke", action="store_true", help="small shapes, and no result file")
    given = parser.parse_args()
    if given.write:
        write(given.folder, given.layers, given.smoke)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        # In another process, because a command's peak begins at the memory of the one that starts it.
        own = [sys.executable, __file__, "--write", "--layers", str(given.layers), "--folder", name]
        subprocess.run([*own, "--smoke"] if given.smoke else own, check=True)
        stored = sum(file.stat().st_size for file in (folder / "tuned").iterdir()) / 1e6
        base, tuned, out = (str(folder / one) for one in ("base", "tuned", "adapter.safetensors"))
        _, idle, _ = command(["extract", "--help"])
        for case, words in CASES.items():
            seconds, peak, printed = command(["extract", base, tuned, "-o", out, "--overwrite", "--json", *words])
            report = json.loads(printed)
            rows.append({
                "case": case, "seconds": round(seconds, 1), "peak MB": round(peak), "error": report["error"],
                "parameters": report["parameters"], "targets": len(report["targets"]),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if given.smoke:
        return
    found = {
        "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS", "all"), "layers": given.layers,
        "checkpoint MB": round(stored), "peak of --help MB": round(idle), "note": given.note, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".rst").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
