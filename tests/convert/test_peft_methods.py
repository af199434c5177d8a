"""PEFT's methods with a structure of their own: its files give its updates, and ours load there to ours.

A ``test_fault_…`` pins a fault of PEFT: if it fails, PEFT was repaired, and the reader must follow.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tnadapt as tna
from tnadapt.sources import Given, Scaled

from .conversions import SHAPES, TOLERANCE, assert_same_updates, converted, error, fill, model, trained_by_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import tnadapt.torch as tt

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "fc_1", "q", "v"]
Shapes = dict[str, tuple[int, ...]]
# SHAPES has weights with more rows than columns and with fewer, in different sizes.
ALIKE: Shapes = {"a.q": (12, 8), "a.v": (12, 8)}
TALL: Shapes = {"a.q": (12, 8), "b.q": (9, 8)}
WIDE: Shapes = {"a.q": (8, 12), "b.q": (4, 12)}
FOURS: Shapes = {"a.q": (12, 8), "a.v": (8, 12), "b.q": (8, 16)}
SIXES: Shapes = {"a.q": (12, 18), "a.fc_1": (24, 12)}


def merged(wrapped: Any, shapes: Shapes) -> dict[str, np.ndarray]:
    """What merging adds to each weight; MiSS has no other way to tell it."""
    found = {}
    for path in shapes:
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            layer.get_base_layer().weight.zero_()
            layer.merge()
        found[path] = layer.get_base_layer().weight.detach().double().numpy()
    return found


def theirs(folder: Path, config: Any, shapes: Shapes) -> dict[str, np.ndarray]:
    """An adapter that PEFT makes, fills and saves; its updates."""
    return merged(trained_by_peft(folder, model(shapes), config, 1), shapes)


def loaded(folder: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    return merged(peft.PeftModel.from_pretrained(model(shapes), folder), shapes)


def check(folder: Path, shapes: Shapes, expected: dict[str, np.ndarray]) -> tna.convert.Conversion:
    found = tna.convert(folder, base=shapes)
    assert found.exact
    assert found.error <= TOLERANCE
    assert_same_updates(found.file, expected)
    return found


CASES: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "vera": ("Vera", {"r": 5}, SHAPES),
    "vera, drawn": ("Vera", {"r": 5, "save_projection": False, "projection_prng_key": -3}, SHAPES),
    "randlora": ("RandLora", {"r": 3, "randlora_alpha": 5}, SHAPES),
    "randlora, tall": ("RandLora", {"r": 3, "randlora_alpha": 5}, TALL),
    "randlora, wide": ("RandLora", {"r": 3, "randlora_alpha": 5}, WIDE),
    "randlora, one basis": ("RandLora", {"r": 8}, TALL),
    "fourierft": ("FourierFT", {"n_frequency": 30}, SHAPES),
    "fourierft, patterns": (
        "FourierFT",
        {"n_frequency": 30, "n_frequency_pattern": {"v_proj": 20}, "random_loc_seed": 5, "scaling": 2.5},
        SHAPES,
    ),
    "fourierft, negative": ("FourierFT", {"n_frequency": 30, "scaling": -2.0}, SHAPES),
    "waveft": ("WaveFT", {"n_frequency": 30}, ALIKE),
    "waveft, db3": ("WaveFT", {"n_frequency": 30, "wavelet_family": "db3", "n_frequency_pattern": {"q": 20}}, ALIKE),
    "waveft, unequal": (
        "WaveFT", {"n_frequency": 30, "wavelet_family": "db2", "random_loc_seed": 5, "scaling": 3.0}, SHAPES
    ),
    "waveft, odd": ("WaveFT", {"n_frequency": 30, "wavelet_family": "db4"}, {"a.q": (7, 12), "b.q": (12, 9)}),
    "waveft, no transform": ("WaveFT", {"n_frequency": 30, "use_idwt": False}, SHAPES),
    "c3a": ("C3A", {"block_size": 6}, SIXES),
    "c3a, patterns": ("C3A", {"block_size": 6, "block_size_pattern": {"v_proj": 2}}, SHAPES),
    "shira": ("Shira", {"r": 2}, SHAPES),
    "shira, seeded": ("Shira", {"r": 2, "random_seed": 4}, SHAPES),
    "miss": ("Miss", {"r": 4}, SHAPES),
    "miss, cut": ("Miss", {"r": 5}, SHAPES),
    "miss, mini": ("Miss", {"r": 5, "mini_r": 4, "init_weights": "mini"}, SHAPES),
    "unilora": ("UniLora", {"r": 3, "theta_d_length": 17, "save_indices": True}, SHAPES),
    "unilora, drawn": ("UniLora", {"r": 3, "theta_d_length": 17}, SHAPES),
    "unilora, used once": ("UniLora", {"r": 3, "theta_d_length": 50}, {"a.q": (12, 8)}),
    "unilora, high rank": ("UniLora", {"r": 9, "theta_d_length": 17, "save_indices": True}, ALIKE),
    "unilora, many": ("UniLora", {"r": 3, "theta_d_length": 90, "save_indices": True}, {"a.q": (12, 8)}),
    "tinylora, many": ("TinyLora", {"r": 1, "u": 7}, SHAPES),
    "tinylora": ("TinyLora", {"r": 3, "u": 7}, SHAPES),
    "tinylora, low": ("TinyLora", {"r": 10, "u": 7}, SHAPES),
    "tinylora, tied": ("TinyLora", {"r": 3, "u": 7, "weight_tying": 1.0}, SHAPES),
    "tinylora, pairs": ("TinyLora", {"r": 3, "u": 7, "weight_tying": 0.5}, SHAPES),
    "tinylora, four": ("TinyLora", {"r": 3, "u": 7, "weight_tying": 0.5}, {**ALIKE, "b.q": (8, 12), "b.v": (9, 12)}),
    "vblora": ("VBLoRA", {"r": 3, "num_vectors": 9, "vector_length": 4}, FOURS),
    "vblora, top 3": (
        "VBLoRA", {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True}, FOURS
    ),
}  # fmt: skip

# What no config of ours has.
NOTES = {
    "vera, drawn": "PEFT left A and B to a seed of torch's: regenerated as torch draws on a CPU, which PEFT does not "
    "promise for every system, and stored here",
    "unilora, many": "stored as LoRA of the same rank, as it has 90 trained numbers for 60 elements: 90 trained",
    "vblora": "stored as LoRA of the same rank, as no config has mixtures",
    "tinylora, many": "stored as LoRA of the same rank, as a config holds PEFT's factors and P in float32",
    "randlora, wide": "stored dense: PEFT pairs the bases differently for weights that differ in the smaller side, or",
    "c3a, patterns": r"stored dense: a config has one size of block, and there are [2, 6]",
    "randlora": "stored dense: PEFT pairs the bases differently for weights that differ in the smaller side, or",
}


# Positions that are a seed.
SEEDS = {
    "fourierft, patterns": (tna.maps.TorchScatter(30, seed=5), "dft2"),
    "shira": tna.maps.TorchScatter(72),
    "shira, seeded": tna.maps.TorchScatter(72, seed=4),
    "waveft, unequal": (tna.maps.TorchScatter(30, seed=5), tna.maps.CenteredWavelet("db2")),
    "waveft, no transform": tna.maps.TorchScatter(30, seed=777),
}


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_gives_its_updates_here_and_back(name: str, tmp_path: Path) -> None:
    shapes, expected = saved(name, tmp_path / "theirs")
    found = check(tmp_path / "theirs", shapes, expected)
    assert found.origin == f"peft-{name.partition(',')[0]}"
    assert NOTES.get(name, "") in str(found)
    assert found.file is not None
    if name in SEEDS:
        assert found.file.config.projection == SEEDS[name]
    if name == "vera":
        assert not found.notes
        assert found.file.num_parameters == sum(5 + rows for rows, _ in shapes.values())
    if name == "randlora, tall":
        assert found.file.num_parameters == 2 * 3 * (3 + 8)
    # The file on disk, which is read by itself.
    tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=shapes)
    file = tna.load(tmp_path / "ours.safetensors")
    assert_same_updates(file, expected)
    if "," not in name:
        assert tt.load(model(shapes), tmp_path / "ours.safetensors").num_parameters == file.num_parameters
    if name in WRITTEN:
        back = tna.convert(tmp_path / "theirs", tmp_path / "again", to=found.origin, base=shapes)
        assert back.exact
        assert back.error <= (1e-15 if name != "fourierft, negative" else TOLERANCE)
        assert_same_updates(loaded(tmp_path / "again", shapes), expected)
        # A folder that this library wrote needs no base.
        assert_same_updates(converted(tmp_path / "again"), expected)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", CASES)
def test_what_a_config_does_not_say_is_as_peft_has_it_by_default(name: str, tmp_path: Path) -> None:
    shapes, expected = saved(name, tmp_path)
    default = type(config_of(name))().to_dict()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    said = {key: value for key, value in config.items() if key == "peft_type" or value != default[key]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    assert_same_updates(converted(tmp_path, base=shapes), expected)


#: What is written again as the same method.
WRITTEN = {
    "vera", "vera, drawn", "randlora, tall", "randlora, one basis", "fourierft", "fourierft, patterns",
    "fourierft, negative", "waveft", "waveft, db3", "waveft, unequal", "waveft, odd", "c3a",
    "shira", "shira, seeded", "miss", "miss, cut", "miss, mini",
}  # fmt: skip


def config_of(name: str) -> Any:
    """PEFT's settings of a case, with fresh dictionaries."""
    method, settings, shapes = CASES[name]
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    return getattr(peft, f"{method}Config")(**copy.deepcopy({"target_modules": targets, **settings}))


def saved(name: str, folder: Path) -> tuple[Shapes, dict[str, np.ndarray]]:
    """Save PEFT's adapter of a case; return the shapes and updates of its weights."""
    shapes = CASES[name][2]
    return shapes, theirs(folder, config_of(name), shapes)


OURS: dict[str, tuple[tna.Config, str, Shapes]] = {
    "vera": (tna.presets.vera(5, alpha=3), "vera", SHAPES),
    "vera of one's own": (
        tna.presets.lora(3, sources={"factor0": Scaled(Given(shared=True)),
                                     "factor1": Scaled(Given(shared=True), size=False, rank=True)}), "vera", SHAPES
    ),
    "randlora": (tna.presets.randlora(3, rows=12, cols=8, alpha=5), "randlora", TALL),
    "randlora, wide": (tna.presets.randlora(3, rows=8, cols=12), "randlora", {"a.q": (8, 12), "b.q": (7, 12)}),
    "randlora, one basis": (tna.presets.randlora(8, rows=12, cols=8), "randlora", TALL),
    "fourierft": (
        tna.Config(order=1, format="dense", rank=1, on="weight", alpha=3,
                   projection=[tna.maps.TorchScatter(20, seed=9), "dft2"]), "fourierft", SHAPES
    ),
    "shira": (tna.presets.shira(40), "shira", SHAPES),
    "shira, given": (tna.presets.shira(3, (5, 90, 1), alpha=2), "shira", SHAPES),
    "c3a": (tna.presets.c3a(6, alpha=2), "c3a", SIXES),
    "unilora": (
        tna.presets.lora(3, before=tna.maps.TiedElements(normalized=True), parameters=9, offset=False, alpha=2),
        "unilora", SHAPES,
    ),
    "one-hot": (tna.presets.lora(3, before="one-hot", parameters=9, offset=False), "unilora", SHAPES),
    "signed one-hot": (tna.presets.lora(3, before="signed-one-hot", parameters=9, offset=False), "unilora", SHAPES),
    "tied": (tna.presets.lora(2, before="tied", parameters=9, offset=False), "unilora", ALIKE),
    "circulant": (tna.Config(order=1, format="dense", projection=tna.maps.Circulant(3), on="weight"), "c3a", SIXES),
    "miss": (tna.presets.miss(5, alpha=2), "miss", SHAPES),
    "miss, mini": (tna.presets.miss(5, 4), "miss", SHAPES),
}  # fmt: skip


def our_file(config: tna.Config, shapes: Shapes) -> tna.AdapterFile:
    """An adapter of ours with random numbers in all arrays, those that are not trained included."""
    rng = np.random.default_rng(0)
    plan = tna.UpdatePlan(config, list(shapes.values()))
    given = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.given_shapes.items()}
    if plan.theta is not None:
        given |= plan.theta.stand_ins(rng)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, [tna.Target(path, shape) for path, shape in shapes.items()], arrays, given=given)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", OURS)
def test_what_we_write_gives_our_updates(name: str, tmp_path: Path) -> None:
    config, method, shapes = OURS[name]
    file = our_file(config, shapes)
    found = tna.convert(file, tmp_path / "theirs", to=f"peft-{method}")
    assert found.exact
    assert found.error <= TOLERANCE
    assert_same_updates(loaded(tmp_path / "theirs", shapes), file)


@pytest.mark.parametrize(
    "name", ["unilora", "unilora, drawn", "tinylora", "tinylora, tied", "tinylora, pairs", "tinylora, four"]
)
def test_few_numbers_stay_few(name: str, tmp_path: Path) -> None:
    """PEFT's trained numbers are our θ, element by element, and its draws are stored."""
    shapes, _ = saved(name, tmp_path / "theirs")
    found = converted(tmp_path / "theirs", base=shapes)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    own = [stored[key] for key in sorted(stored) if "theta_d" in key or "tinylora_v" in key]
    assert found.arrays.keys() == ({f"group{g}.theta" for g in range(3)} if name == "tinylora" else {"theta"})
    assert np.array_equal(np.concatenate(list(found.arrays.values())), np.concatenate(own))
    assert found.num_parameters == sum(array.size for array in own)
    if name == "unilora":
        index = stored["base_model.model.blocks.0.attn.q_proj.unilora_indices_B"]
        assert np.array_equal(found.given["theta.index"][: index.size].reshape(index.shape), index)
    elif name == "tinylora, tied":
        p = stored["base_model.model.blocks.0.attn.q_proj.tinylora_P"]
        assert np.array_equal(found.given["theta.matrix"][: p[0].size].T.reshape(p.shape), p)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        # A config holds the scales, factors and P in float32, or rounds them differently.
        ("unilora", torch.float64, ""),
        ("tinylora", torch.float64, ""),
        # PEFT rounds the scales to the model's dtype: they are no longer those of an isometry.
        ("unilora", torch.bfloat16, "its scales are not 1 / sqrt of the number of elements that share one, in the d"),
    ],
)
def test_numbers_of_another_dtype_are_read_as_lora(name: str, dtype: Any, why: str, tmp_path: Path) -> None:
    shapes = CASES[name][2]
    wrapped = peft.get_peft_model(model(shapes).to(dtype), config_of(name), autocast_adapter_dtype=False)
    fill(wrapped.parameters(), 1)
    wrapped.save_pretrained(tmp_path / "theirs")
    found = tna.convert(tmp_path / "theirs", base=shapes)
    assert found.exact
    assert found.error <= (1e-12 if dtype == torch.float64 else TOLERANCE)
    assert f"stored as LoRA of the same rank, as {why}" in str(found)
    if dtype == torch.bfloat16:
        assert_same_updates(found.file, loaded(tmp_path / "theirs", shapes))


def test_a_scale_becomes_part_of_unilora_s_numbers(tmp_path: Path) -> None:
    file = our_file(*OURS["unilora"][::2])
    tna.convert(file, tmp_path / "theirs", to="peft-unilora")
    again = converted(tmp_path / "theirs")
    assert again.num_parameters == file.num_parameters == 9
    np.testing.assert_allclose(again.arrays["theta"], file.arrays["theta"] * math.sqrt(2 / 3), rtol=1e-6)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize(("offset", "to"), [(True, "peft-lora"), (False, "peft-lora"), (False, "peft-unilora")])
def test_theta_in_bfloat16(offset: bool, to: str, tmp_path: Path) -> None:
    config = tna.presets.lora(3, before="tied", parameters=9, offset=offset)
    whole = our_file(config, SHAPES)
    rounded = (whole.arrays["theta"].view("u4") & 0xFFFF0000).view("f4")
    file = tna.AdapterFile(config, whole.targets, {"theta": rounded}, dtypes={"theta": "bfloat16"}, given=whole.given)
    found = tna.convert(file, tmp_path / "theirs", to=to, dtype="float32")
    assert found.exact == (found.error <= TOLERANCE)
    expected = dict(zip(SHAPES, file.deltas(), strict=True))
    for path, delta in loaded(tmp_path / "theirs", SHAPES).items():
        # PEFT computes Uni-LoRA's factors in float32; this library rounds them to bfloat16, as in training.
        assert error(delta, expected[path]) <= (TOLERANCE if to == "peft-lora" else 2.0**-7)


@pytest.mark.parametrize(("rank", "shapes"), [(2, SHAPES), (50, {"a.q": (120, 120), "b.q": (120, 120)})])
def test_positions_of_a_mask_of_one_s_own(rank: int, shapes: Shapes, tmp_path: Path) -> None:
    def mask(layer: Any, r: int, **_: Any) -> Any:
        found = torch.zeros_like(layer.weight)
        found.view(-1)[-r * sum(layer.weight.shape) :] = 1.0
        return found

    config = peft.ShiraConfig(r=rank, target_modules=TARGETS, mask_type="mine")
    config.mask_fn = mask
    found = check(tmp_path / "theirs", shapes, theirs(tmp_path / "theirs", config, shapes))
    assert found.file is not None
    projection = found.file.config.projection
    if rank == 50:
        assert found.notes == ("stored dense: no seed gives its 24000 positions, and a config cannot list them",)
    else:
        assert isinstance(projection, tna.maps.Scatter)
        assert found.file.config.rank == 1  # as in presets.shira
        assert found.file.num_parameters == projection.size == 2 * sum(sum(shape) for shape in SHAPES.values())
        tna.convert(tmp_path / "theirs", tmp_path / "again", to="peft-shira", base=SHAPES)
        assert_same_updates(loaded(tmp_path / "again", SHAPES), found.file)


def test_fault_randlora_pairs_columns_of_different_bases() -> None:
    """The paper's update is ``sum_n B_n Λ_n A Γ_n``; PEFT flattens the two stacks in different orders."""
    wrapped = peft.get_peft_model(model(TALL), peft.RandLoraConfig(r=3, target_modules=["q"], randlora_alpha=3))
    fill(wrapped.parameters(), 1)
    layer = wrapped.base_model.model.a.q
    a, b = layer.randlora_A["default"].float(), layer.randlora_B["default"].float()
    lambdas, gammas = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    found = layer.get_delta_weight("default").detach()
    paper = torch.einsum("ktr,rt,rj,tj->kj", b, lambdas, a[:, 0], gammas).detach()
    assert error(found, paper) > 0.5
    # Column k of the bases, flattened base by base, meets row k // N of A and row k % N of γ.
    columns, count = b.flatten(start_dim=1), gammas.shape[0]
    theirs_ = sum(
        torch.outer(columns[:, k], lambdas[k // count, k % count] * a[k // count, 0] * gammas[k % count])
        for k in range(columns.shape[1])
    )
    assert error(found, theirs_.detach()) < TOLERANCE  # type: ignore[union-attr]


def test_fault_unilora_is_loaded_silently_onto_modules_in_another_order(tmp_path: Path) -> None:
    """Its file names no module: the indices depend on the order in which the model has them."""
    expected = theirs(tmp_path / "a", peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=["q", "v"]), ALIKE)
    turned = {path: ALIKE[path] for path in reversed(ALIKE)}
    found = loaded(tmp_path / "a", turned)
    assert error(found["a.q"], expected["a.q"]) > 0.5
    assert_same_updates(converted(tmp_path / "a", base=turned), found)


def test_the_settings_that_are_written() -> None:
    found = tna.convert(our_file(tna.presets.c3a(6), SIXES), to="peft-c3a")
    absent = dict.fromkeys(["base_model_name_or_path", "modules_to_save", "task_type"])
    settings = {"block_size": 6, "inference_mode": True, "peft_type": "C3A", "target_modules": sorted(SIXES)}
    assert json.loads(found.files["adapter_config.json"]) == absent | settings
