"""Models with 7 to 405 billion parameters, tested without loading them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import peak_of
from tests.support.depth import in_depth
from tnadapt.algebra import rng
from tnadapt.backends import Backend

P = tna.presets


# Query and value: their widths, and eight heads of keys and values of 128 rows.
MODELS = {
    "Llama 3 8B": [(4096, 4096), (1024, 4096)] * 32,
    "Llama 3 70B": [(8192, 8192), (1024, 8192)] * 80,
    "Llama 3.1 405B": [(16384, 16384), (1024, 16384)] * 126,
}


@pytest.mark.law("huge-models")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        P.lora(8),
        P.dense(),
        P.lokr(8),
        P.lonkr(4, splits=4),
        P.fastfood(0.001),
        P.superlora(8),
        P.superlora(8, groups=1_000_000),
        P.lorta(4, order=5, projection="linear", ratio=0.01),
    ],
    ids=str,
)
def test_large_models_are_counted_without_allocating(model: str, config: tna.Config) -> None:
    tna.parameter_count(config, [(4096, 4096)] * 2)  # what is imported when first used is imported
    assert peak_of(lambda: tna.UpdatePlan(config, MODELS[model]).num_parameters) < 2 << 20


@pytest.mark.law("huge-models", "parameter-count")
@pytest.mark.parametrize("model", MODELS)
def test_counts_of_large_models_are_the_formulas(model: str) -> None:
    shapes = MODELS[model]
    size, order = sum(rows * cols for rows, cols in shapes), 5
    assert tna.parameter_count(P.lora(8), shapes) == 8 * sum(rows + cols for rows, cols in shapes)
    assert tna.parameter_count(P.dense(), shapes) == size
    # One group, folded to the hypercube of the least side.
    least = next(d for d in range(round(size ** (1 / order)) - 2, size) if d**order >= size)
    assert tna.parameter_count(P.lorta(2, order=order), shapes) == 2**order + order * 2 * least


@pytest.mark.slow
@pytest.mark.law("huge-models")
def test_what_a_budget_buys_is_planned_for_the_largest() -> None:
    rows = tna.plan(shapes=MODELS["Llama 3.1 405B"], budget=10_000).rows
    assert rows
    assert all(row.parameters <= 10_000 for row in rows)


def element(plan: tna.UpdatePlan, params: dict[str, np.ndarray], position: int) -> float:
    """One element of the vector of one group of CP or Tucker, by its indices."""
    split = "group0.split0."
    factors = [params[name] for name in sorted(params) if name.startswith(split + "factor")]
    index = np.unravel_index(position, [len(factor) for factor in factors])
    rows = [factor[at].astype(np.float64) for factor, at in zip(factors, index, strict=True)]
    scale = plan.config.scale
    if split + "core" not in params:
        return scale * float(np.prod(rows, axis=0).sum())
    core = params[split + "core"].astype(np.float64)
    for row in rows:
        core = np.tensordot(row, core, 1)
    return scale * float(core)


@pytest.mark.law("beyond-2-31")
@pytest.mark.parametrize("config", [P.superlora(4), P.lorta(3, order=3), P.lorta(2, order=5)], ids=["2D", "3D", "5D"])
@pytest.mark.parametrize(
    ("backend", "length"),
    [("numpy", 1), ("numpy", 7), ("numpy", 1 << 12), ("torch", 7), ("torch", 1 << 12), ("jax", 7), ("cupy", 1 << 12)],
    indirect=["backend"],
)
def test_a_group_past_2_31_elements_is_right_at_its_far_end_and_in_pieces(
    backend: Backend, config: tna.Config, length: int
) -> None:
    plan = tna.UpdatePlan(config, [(1 << 16, 1 << 16)] * 3)  # 3 * 2**32 elements
    assert plan.size > 1 << 33
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(shape) for name, shape in plan.param_shapes.items()}
    arrays = {name: backend.asarray(array, "float64") for name, array in params.items()}

    def vector(start: int, stop: int) -> np.ndarray:
        return backend.to_numpy(plan.vector(arrays, start, stop))

    for stop in (plan.size, (1 << 31) + length // 2 + 1, (1 << 32) + 3):
        start = stop - length
        whole = vector(start, stop)
        for place in {0, length // 2, length - 1}:
            want = element(plan, params, start + place)
            assert abs(whole[place] - want) < 1e-12 * max(1.0, abs(want))
        if length > 1:
            cut = start + length // 3 + 1
            pieces = np.concatenate([vector(start, cut), vector(cut, stop)])
            assert np.abs(pieces - whole).max() <= 1e-12 * np.abs(whole).max()


@pytest.mark.law("beyond-2-31")
@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "long", reason="2**32 draws take minutes: in the long profile alone"
)
def test_a_slice_of_linear_f_is_right_past_2_31_elements() -> None:
    """The reference sums the terms of each element in another order: by where the permutation takes from."""
    size, seed = 3 << 30, 5
    start, stop = size - 3, size
    plan = tna.UpdatePlan(tna.presets.fastfood(1e-9, seed=seed), [(3 << 15, 1 << 15)])
    f = plan.groups[0].projection
    assert (f.n_in, f.n_out, f.padded) == (4, size, 1 << 32)
    (name,) = plan.param_shapes
    x = np.array([1.0, -2.0, 0.5, 3.0])
    found = plan.vector({name: x.reshape(plan.param_shapes[name])}, start, stop) / plan.config.scale
    four = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) @ x
    want, part = np.zeros(3), 1 << 17
    for lo in range(0, f.padded, part):
        g = rng.normals(seed, 0, rng.PURPOSE["gaussian"], lo, lo + part).astype(np.float64)
        to = rng.permutation(f.padded, seed, 0, lo, lo + part, inverse=True)
        terms = g * np.tile(four, part // 4)
        want += [(terms * (1.0 - 2.0 * (np.bitwise_count(to & place) & 1))).sum() for place in range(start, stop)]
    want *= rng.signs(seed, 0, start, stop) / f.padded
    assert np.abs(found - want).max() < 1e-12 * np.abs(want).max()


META = """
import torch, transformers, tnadapt as tna, tnadapt.torch as tt

def highest():  # in KiB; what getrusage says begins with the memory of whoever started this program
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

config = transformers.LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
tt.attach(torch.nn.TransformerEncoderLayer(8, 2, 8), tna.presets.lora(1))  # modules that are imported when first used
before = highest()
adapter = tt.attach(model, {config})
after = highest()
assert sum(p.numel() for p in model.parameters()) > 6e9
assert all(p.device.type == "meta" for p in model.parameters())
kept = torch.ones(200 << 18)  # 200 MiB, which must show
print(adapter.num_parameters, after - before, highest() - after)
"""


@pytest.mark.slow
@pytest.mark.law("meta-device")
@pytest.mark.parametrize(
    ("config", "count"),
    in_depth(
        [("tna.presets.lora(8)", 32 * 2 * 8 * 8192), ("tna.presets.superlora(8)", 8 * 2 * 32768)],
        [("tna.presets.superlora(8)", 8 * 2 * 32768)],
    ),
)
def test_attaching_to_a_model_of_7_billion_on_the_meta_device_takes_no_memory(config: str, count: int) -> None:
    pytest.importorskip("transformers")
    if not Path("/proc/self/status").is_file():
        pytest.skip("this system does not tell a process's highest memory")
    command = [sys.executable, "-W", "ignore", "-c", META.replace("{config}", config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, attached, seen = map(int, done.stdout.split())
    assert parameters == count
    assert attached < 8 << 10  # KiB
    assert seen > 150 << 10, "memory is not seen"
