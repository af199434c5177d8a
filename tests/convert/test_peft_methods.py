"""PEFT's methods with a structure of their own: its files give its updates, and ours load there to ours.

A ``test_fault_…`` pins a fault of PEFT: if it fails, PEFT was repaired, and the reader must follow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.sources import Given, Scaled, Tied

from .conversions import SHAPES, TOLERANCE, error, fill, model, updates

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "fc_1"]
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
    wrapped = peft.get_peft_model(model(shapes), config)
    fill((p for _, p in wrapped.named_parameters() if p.requires_grad), 1)
    wrapped.save_pretrained(folder)
    return merged(wrapped, shapes)


def loaded(folder: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    return merged(peft.PeftModel.from_pretrained(model(shapes), folder), shapes)


def check(folder: Path, shapes: Shapes, expected: dict[str, np.ndarray]) -> tna.convert.Conversion:
    found = tna.convert(folder, base=shapes)
    assert found.exact
    assert found.error <= TOLERANCE
    assert found.file is not None
    ours = updates(found.file)
    assert ours.keys() == expected.keys()
    for path, delta in expected.items():
        assert error(ours[path], delta) <= TOLERANCE, path
    return found


CASES: dict[str, tuple[Callable[[], Any], Shapes]] = {
    "vera": (lambda: peft.VeraConfig(r=5, target_modules=TARGETS), SHAPES),
    "vera, drawn": (
        lambda: peft.VeraConfig(r=5, target_modules=TARGETS, save_projection=False, projection_prng_key=-3), SHAPES
    ),
    "randlora": (lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=TARGETS), SHAPES),
    "randlora, tall": (lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=["q"]), TALL),
    "randlora, wide": (lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=["q"]), WIDE),
    "randlora, one basis": (lambda: peft.RandLoraConfig(r=8, target_modules=["q"]), TALL),
    "randlora, drawn": (lambda: peft.RandLoraConfig(r=3, target_modules=TARGETS, save_projection=False), SHAPES),
    "randlora, sparse": (
        lambda: peft.RandLoraConfig(r=3, target_modules=TARGETS, save_projection=False, sparse=True), SHAPES
    ),
    "randlora, very sparse": (
        lambda: peft.RandLoraConfig(r=3, target_modules=["q"], save_projection=False, very_sparse=True), TALL
    ),
    "fourierft": (lambda: peft.FourierFTConfig(n_frequency=30, target_modules=TARGETS), SHAPES),
    "fourierft, patterns": (
        lambda: peft.FourierFTConfig(
            n_frequency=30, target_modules=TARGETS, n_frequency_pattern={"v_proj": 20}, random_loc_seed=5, scaling=2.5
        ),
        SHAPES,
    ),
    "fourierft, negative": (lambda: peft.FourierFTConfig(n_frequency=30, target_modules=TARGETS, scaling=-2.0), SHAPES),
    "fourierft, dense": (
        lambda: peft.FourierFTConfig(n_frequency=200, target_modules=TARGETS, n_frequency_pattern={"v_proj": 20}),
        SHAPES,
    ),
    "waveft": (lambda: peft.WaveFTConfig(n_frequency=30, target_modules=["q", "v"]), ALIKE),
    "waveft, db3": (
        lambda: peft.WaveFTConfig(
            n_frequency=30, target_modules=["q", "v"], wavelet_family="db3", n_frequency_pattern={"q": 20}
        ),
        ALIKE,
    ),
    "waveft, unequal": (
        lambda: peft.WaveFTConfig(
            n_frequency=30, target_modules=TARGETS, wavelet_family="db2", random_loc_seed=5, scaling=3.0
        ),
        SHAPES,
    ),
    "waveft, odd": (
        lambda: peft.WaveFTConfig(n_frequency=30, target_modules=["q"], wavelet_family="db4"),
        {"a.q": (7, 12), "b.q": (12, 9)},
    ),
    "waveft, dense": (
        lambda: peft.WaveFTConfig(n_frequency=200, target_modules=TARGETS, n_frequency_pattern={"v_proj": 20}), SHAPES
    ),
    "waveft, proportional": (
        lambda: peft.WaveFTConfig(n_frequency=30, target_modules=TARGETS, proportional_parameters=True), SHAPES
    ),
    "waveft, no transform": (lambda: peft.WaveFTConfig(n_frequency=30, target_modules=TARGETS, use_idwt=False), SHAPES),
    "c3a": (lambda: peft.C3AConfig(block_size=6, target_modules=["q", "fc_1"]), SIXES),
    "c3a, patterns": (
        lambda: peft.C3AConfig(block_size=6, target_modules=TARGETS, block_size_pattern={"v_proj": 2}), SHAPES
    ),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=TARGETS), SHAPES),
    "shira, seeded": (lambda: peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=4), SHAPES),
    "miss": (lambda: peft.MissConfig(r=4, target_modules=TARGETS), SHAPES),
    "miss, cut": (lambda: peft.MissConfig(r=5, target_modules=TARGETS), SHAPES),
    "miss, mini": (lambda: peft.MissConfig(r=5, mini_r=4, init_weights="mini", target_modules=TARGETS), SHAPES),
    "unilora": (
        lambda: peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=TARGETS, save_indices=True), SHAPES
    ),
    "unilora, drawn": (lambda: peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=TARGETS), SHAPES),
    "unilora, used once": (lambda: peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=["q"]), {"a.q": (12, 8)}),
    "unilora, expression": (
        lambda: peft.UniLoraConfig(r=3, theta_d_length=8, target_modules=r".*\.[qv]", proj_seed=3), FOURS
    ),
    "unilora, high rank": (
        lambda: peft.UniLoraConfig(r=9, theta_d_length=17, target_modules=["q", "v"], save_indices=True), ALIKE
    ),
    "unilora, many": (
        lambda: peft.UniLoraConfig(r=3, theta_d_length=90, target_modules=["q"], save_indices=True), {"a.q": (12, 8)}
    ),
    "tinylora, many": (lambda: peft.TinyLoraConfig(r=1, u=7, target_modules=TARGETS), SHAPES),
    "tinylora": (lambda: peft.TinyLoraConfig(r=3, u=7, target_modules=TARGETS), SHAPES),
    "tinylora, low": (lambda: peft.TinyLoraConfig(r=10, u=7, target_modules=TARGETS), SHAPES),
    "tinylora, tied": (lambda: peft.TinyLoraConfig(r=3, u=7, target_modules=TARGETS, weight_tying=1.0), SHAPES),
    "tinylora, pairs": (lambda: peft.TinyLoraConfig(r=3, u=7, target_modules=TARGETS, weight_tying=0.5), SHAPES),
    "tinylora, drawn": (lambda: peft.TinyLoraConfig(r=3, u=7, target_modules=TARGETS, save_projection=False), SHAPES),
    "vblora": (lambda: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, target_modules=["q", "v"]), FOURS),
    "vblora, top 2": (
        lambda: peft.VBLoRAConfig(
            r=3, num_vectors=9, vector_length=4, target_modules=["q", "v"], save_only_topk_weights=True
        ),
        FOURS,
    ),
    "vblora, top 3": (
        lambda: peft.VBLoRAConfig(
            r=3, num_vectors=9, vector_length=4, topk=3, target_modules=["q", "v"], save_only_topk_weights=True
        ),
        FOURS,
    ),
}  # fmt: skip


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_gives_its_updates(name: str, tmp_path: Path) -> None:
    make, shapes = CASES[name]
    expected = theirs(tmp_path / "theirs", make(), shapes)
    found = check(tmp_path / "theirs", shapes, expected)
    assert found.origin == f"peft-{name.partition(',')[0]}"
    # The file on disk, which is read by itself.
    tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=shapes)
    again = tna.load(tmp_path / "ours.safetensors")
    for path, delta in expected.items():
        assert error(updates(again)[path], delta) <= TOLERANCE, path


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_bfloat16_files(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make, shapes = CASES[name]
    theirs(tmp_path / "theirs", make(), shapes)
    place = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(place)
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}, place)
    found = check(tmp_path / "theirs", shapes, loaded(tmp_path / "theirs", shapes))
    assert found.file is not None
    if name in ("vera", "fourierft", "waveft", "c3a", "shira", "miss"):
        assert found.file.dtype == "bfloat16"
    if name == "randlora":  # its diagonals of ones are not in the file, and have the dtype of the others
        assert found.file.dtype == "float32"


WRITTEN = [
    "vera", "vera, drawn", "randlora, tall", "randlora, one basis", "fourierft", "fourierft, patterns",
    "fourierft, negative", "waveft", "waveft, db3", "waveft, unequal", "waveft, odd", "waveft, proportional", "c3a",
    "shira", "shira, seeded", "miss", "miss, cut", "miss, mini",
]  # fmt: skip


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", WRITTEN)
def test_and_back_again(name: str, tmp_path: Path) -> None:
    make, shapes = CASES[name]
    kind = name.partition(",")[0]
    expected = theirs(tmp_path / "theirs", make(), shapes)
    found = tna.convert(tmp_path / "theirs", tmp_path / "again", to=f"peft-{kind}", base=shapes)
    assert found.exact
    assert found.error <= (1e-15 if name != "fourierft, negative" else TOLERANCE)
    for path, delta in loaded(tmp_path / "again", shapes).items():
        assert error(delta, expected[path]) <= TOLERANCE, path
    # A folder that this library wrote needs no base.
    again = tna.convert(tmp_path / "again").file
    assert again is not None
    for path, delta in updates(again).items():
        assert error(delta, expected[path]) <= TOLERANCE, path


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


def our_file(config: tna.Config, shapes: Shapes, seed: int = 0) -> tna.AdapterFile:
    targets = [tna.Target(path, shape) for path, shape in shapes.items()]
    rng = np.random.default_rng(seed)
    plan = tna.SuperLoRA(config, [target.shape for target in targets])
    given = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.given_shapes.items()}
    if plan.theta is not None:
        given |= plan.theta.stand_ins(rng)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, targets, arrays, given=given)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", OURS)
def test_what_we_write_gives_our_updates(name: str, tmp_path: Path) -> None:
    config, kind, shapes = OURS[name]
    file = our_file(config, shapes)
    found = tna.convert(file, tmp_path / "theirs", to=f"peft-{kind}")
    assert found.exact
    assert found.error <= TOLERANCE
    expected = updates(file)
    for path, delta in loaded(tmp_path / "theirs", shapes).items():
        assert error(delta, expected[path]) <= TOLERANCE, path


# -- The structure -------------------------------------------------------------------------------


def test_vera_keeps_its_numbers(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    for name in ("vera", "vera, drawn"):
        make, shapes = CASES[name]
        theirs(tmp_path / name, make(), shapes)
        found = tna.convert(tmp_path / name, base=shapes)
        assert found.file is not None
        assert found.file.config.sources == {
            "factor0": Scaled(Given(shared=True), start=0.0),
            "factor1": Scaled(Given(shared=True), size=False, rank=True, start=0.1),
        }
        assert found.file.num_parameters == sum(5 + rows for rows, _ in shapes.values())
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert np.array_equal(
            found.file.arrays["group1.split0.factor0.size"],
            stored["base_model.model.blocks.0.attn.v_proj.vera_lambda_b"],
        )
        if name == "vera":
            assert np.array_equal(found.file.given["group0.split0.factor1"], stored["base_model.vera_A"].T)
            assert not found.notes
        else:
            wrapped = peft.get_peft_model(model(shapes), make())
            for ours, own in (("factor0", wrapped.base_model.vera_B), ("factor1", wrapped.base_model.vera_A)):
                drawn = own["default"].numpy()
                assert np.array_equal(
                    found.file.given[f"group0.split0.{ours}"], drawn.T if ours == "factor1" else drawn
                )
            assert found.notes == (
                "PEFT left A and B to a seed of torch's: regenerated as torch draws on a CPU, which PEFT does not "
                "promise for every system, and stored here",
            )


@pytest.mark.parametrize("name", ["unilora", "unilora, drawn", "tinylora", "tinylora, tied", "tinylora, pairs"])
def test_few_numbers_stay_few(name: str, tmp_path: Path) -> None:
    """PEFT's trained numbers are our θ, element by element, and its draws are stored."""
    from safetensors.numpy import load_file

    make, shapes = CASES[name]
    theirs(tmp_path / "theirs", make(), shapes)
    found = tna.convert(tmp_path / "theirs", base=shapes).file
    assert found is not None
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


@pytest.mark.parametrize("name", ["unilora", "tinylora"])
def test_numbers_in_float64_are_read_as_lora(name: str, tmp_path: Path) -> None:
    """A config holds the scales, factors and P in float32, or rounds them differently."""
    make, shapes = CASES[name]
    wrapped = peft.get_peft_model(model(shapes).double(), make(), autocast_adapter_dtype=False)
    fill((p for _, p in wrapped.named_parameters() if p.requires_grad), 1)
    wrapped.save_pretrained(tmp_path / "theirs")
    found = tna.convert(tmp_path / "theirs", base=shapes)
    assert found.exact
    assert found.error <= 1e-12
    assert "stored as LoRA of the same rank, as " in str(found)


def test_a_scale_becomes_part_of_unilora_s_numbers(tmp_path: Path) -> None:
    file = our_file(*OURS["unilora"][::2])
    tna.convert(file, tmp_path / "theirs", to="peft-unilora")
    again = tna.convert(tmp_path / "theirs").file
    assert again is not None
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


def test_unilora_in_half_precision_is_read_as_lora(tmp_path: Path) -> None:
    """PEFT rounds the scales to the model's dtype, and then they are no longer those of an isometry."""
    from safetensors.torch import load_file, save_file

    make, shapes = CASES["unilora"]
    theirs(tmp_path / "theirs", make(), shapes)
    place = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(place)
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}, place)
    found = tna.convert(tmp_path / "theirs", base=shapes)
    assert "as its scales are not 1 / sqrt of the number of elements that share one, in the dtype" in str(found)
    assert found.exact


def test_randlora_is_terms_of_scaled_factors(tmp_path: Path) -> None:
    theirs(tmp_path / "a", CASES["randlora, one basis"][0](), TALL)
    theirs(tmp_path / "b", peft.RandLoraConfig(r=3, target_modules=["q"]), TALL)
    one, more = (tna.convert(tmp_path / name, base=TALL).file for name in "ab")
    assert one is not None
    assert more is not None
    assert (one.config.terms, more.config.terms) == (1, 3)
    assert one.config.sources["factor0"] == more.config.sources["factor0"] == Given(shared=True)
    shared = more.config.sources["term0.split0.factor1"]
    assert isinstance(shared, Scaled)
    assert shared.of == Given(shared=True)
    rest = more.config.sources["factor1"]
    assert isinstance(rest, Scaled)
    assert rest.of == Tied("term0.split0.factor1")
    assert more.num_parameters == 2 * 3 * (3 + 8)
    assert sorted(more.given) == ["group0.term0.split0.factor0", "group0.term0.split0.factor1",
                                  "group0.term1.split0.factor0", "group0.term2.split0.factor0"]  # fmt: skip


def test_randlora_on_tall_and_wide_weights_trains_what_peft_trains(tmp_path: Path) -> None:
    make, shapes = CASES["randlora"]
    wrapped = peft.get_peft_model(model(shapes), make())
    theirs(tmp_path / "a", make(), shapes)
    found = tna.convert(tmp_path / "a", base=shapes)
    assert found.file is not None
    count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    # The weight of 8 rows has three bases and the others four: its fourth is zeros.
    assert found.file.num_parameters == count + 3 + 8
    assert "weights with more rows than columns and others: each stores its own bases" in str(found)


def test_positions_are_a_seed(tmp_path: Path) -> None:
    for name, projection in (
        ("fourierft, patterns", (tna.maps.TorchScatter(30, seed=5), "dft2")),
        ("shira", tna.maps.TorchScatter(72)),
        ("shira, seeded", tna.maps.TorchScatter(72, seed=4)),
        ("waveft, unequal", (tna.maps.TorchScatter(30, seed=5), tna.maps.CenteredWavelet("db2"))),
        ("waveft, no transform", tna.maps.TorchScatter(30, seed=777)),
    ):
        make, shapes = CASES[name]
        theirs(tmp_path / name, make(), shapes)
        file = tna.convert(tmp_path / name, base=shapes).file
        assert file is not None
        assert file.config.projection == projection
        assert file.num_parameters == 3 * file.arrays["group0.split0.dense"].size


def test_positions_of_a_mask_of_one_s_own(tmp_path: Path) -> None:
    def mask(layer: Any, r: int, **_: Any) -> Any:
        found = torch.zeros_like(layer.weight)
        found.view(-1)[-r * sum(layer.weight.shape) :] = 1.0
        return found

    config = peft.ShiraConfig(r=2, target_modules=TARGETS, mask_type="mine")
    config.mask_fn = mask
    expected = theirs(tmp_path / "a", config, SHAPES)
    found = check(tmp_path / "a", SHAPES, expected)
    assert found.file is not None
    projection = found.file.config.projection
    assert isinstance(projection, tna.maps.Scatter)
    assert found.file.num_parameters == projection.size == 2 * sum(sum(shape) for shape in SHAPES.values())
    tna.convert(tmp_path / "a", tmp_path / "b", to="peft-shira", base=SHAPES)
    for path, delta in loaded(tmp_path / "b", SHAPES).items():
        assert error(delta, expected[path]) <= TOLERANCE, path
    config = peft.ShiraConfig(r=2, target_modules=["q", "v"], mask_type="mine")
    config.mask_fn = mask
    found = check(tmp_path / "d", ALIKE, theirs(tmp_path / "d", config, ALIKE))
    assert found.file is not None
    assert found.file.config.projection == tna.maps.Scatter(positions=tuple(range(56, 96)))
    assert found.file.config.on == "weight"
    large: Shapes = {"a.q": (120, 120)}
    config = peft.ShiraConfig(r=50, target_modules=["q"], mask_type="mine")
    config.mask_fn = mask
    found = check(tmp_path / "c", large, theirs(tmp_path / "c", config, large))
    assert found.notes == ("stored dense: no seed gives its 12000 positions, and a config cannot list them",)


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_it_attaches_and_trains_what_peft_trains(name: str, tmp_path: Path) -> None:
    import tnadapt.torch

    make, shapes = CASES[name]
    expected = theirs(tmp_path / "theirs", make(), shapes)
    tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=shapes)
    ours, plain = model(shapes), model(shapes)
    adapter = tnadapt.torch.load(ours, tmp_path / "ours.safetensors")
    file = tna.load(tmp_path / "ours.safetensors")
    assert adapter.num_parameters == file.num_parameters
    for path, delta in expected.items():
        x = torch.randn(4, shapes[path][1])
        found = (ours.get_submodule(path)(x) - plain.get_submodule(path)(x)).detach()
        assert error(found, x.double() @ torch.as_tensor(delta).T) <= 3e-6, path


def test_what_no_config_has_is_noted(tmp_path: Path) -> None:
    notes = {
        "unilora, many": "stored as LoRA of the same rank, as it has 90 trained numbers for 60 elements: 90 trained",
        "vblora": "stored as LoRA of the same rank, as no config has mixtures",
        "tinylora, many": "the r × r matrix of each weight is stored as trained, as it has fewer elements than its",
        "waveft, dense": "stored dense: a config has one number of coefficients, and 200 are more than a weight has",
        "randlora, wide": "weights whose smaller sides differ: PEFT pairs the bases differently, and each stores",
        "c3a, patterns": r"stored dense: a config has one size of block, and there are [2, 6]",
        "fourierft, dense": "stored dense: a config has one number of entries, and 200 are more than a weight has",
    }  # fmt: skip
    for name, note in notes.items():
        make, shapes = CASES[name]
        theirs(tmp_path / name, make(), shapes)
        assert note in str(tna.convert(tmp_path / name, base=shapes)), name


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("name", ["vera", "unilora", "tinylora", "tinylora, low", "vblora"])
def test_low_rank_is_served_as_lora(name: str, tmp_path: Path) -> None:
    make, shapes = CASES[name]
    expected = theirs(tmp_path / "theirs", make(), shapes)
    file = tna.convert(tmp_path / "theirs", base=shapes).file
    assert file is not None
    for source in (file, tmp_path / "theirs"):
        found = tna.convert(source, tmp_path / "lora", to="peft-lora", base=shapes, overwrite=True)
        assert found.exact
        assert found.error <= TOLERANCE
        assert found.config is not None
        assert found.config["r"] == file.config.rank
        for path, delta in loaded(tmp_path / "lora", shapes).items():
            assert error(delta, expected[path]) <= TOLERANCE, path


def test_weights_stored_as_in_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = conv(12, 8), conv(8, 8)

    shapes = {"q": (8, 12), "v": (8, 8)}
    for config in (
        peft.VeraConfig(r=5, target_modules=["q", "v"]),
        peft.RandLoraConfig(r=3, target_modules=["q", "v"]),
        peft.FourierFTConfig(n_frequency=30, target_modules=["q", "v"]),
        peft.WaveFTConfig(n_frequency=30, target_modules=["q", "v"]),
        peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=["q", "v"]),
        peft.TinyLoraConfig(r=3, u=7, target_modules=["q", "v"]),
        peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, target_modules=["q", "v"]),
    ):
        folder = tmp_path / config.peft_type.value
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(Model(), config)
        fill((p for _, p in wrapped.named_parameters() if p.requires_grad), 1)
        wrapped.save_pretrained(folder)
        expected = merged(wrapped, shapes)
        found = check(folder, shapes, expected)
        assert found.file is not None
        assert all(target.transposed for target in found.file.targets)
        if found.origin in ("peft-vera", "peft-fourierft"):
            tna.convert(folder, tmp_path / "again", to=found.origin, base=shapes, overwrite=True)
            back = merged(peft.PeftModel.from_pretrained(Model(), tmp_path / "again"), shapes)
            for path, delta in expected.items():
                assert error(back[path], delta) <= TOLERANCE


def test_what_was_trained_alongside_is_kept(tmp_path: Path) -> None:
    shapes: Shapes = {"a.q": (12, 8), "head": (4, 12)}
    for config in (
        peft.VeraConfig(r=5, target_modules=["q"], modules_to_save=["head"]),
        peft.MissConfig(r=4, target_modules=["q"], modules_to_save=["head"]),
    ):
        wrapped = peft.get_peft_model(model(shapes), config)
        fill((p for _, p in wrapped.named_parameters() if p.requires_grad), 1)
        folder = tmp_path / config.peft_type.value
        wrapped.save_pretrained(folder)
        found = tna.convert(folder, base=shapes)
        assert found.file is not None
        head = wrapped.base_model.model.head.modules_to_save["default"].weight.detach().numpy()
        assert np.array_equal(found.file.kept["head.weight"], head)
        tna.convert(found.file, tmp_path / "again", to=found.origin, overwrite=True)
        again = peft.PeftModel.from_pretrained(model(shapes), tmp_path / "again")
        assert np.array_equal(again.base_model.model.head.modules_to_save["default"].weight.detach().numpy(), head)


# -- Where PEFT errs ------------------------------------------------------------------------------


def test_fault_randlora_pairs_columns_of_different_bases() -> None:
    """The paper's update is ``sum_n B_n Λ_n A Γ_n``; PEFT flattens the two stacks in different orders."""
    wrapped = peft.get_peft_model(model(TALL), peft.RandLoraConfig(r=3, target_modules=["q"], randlora_alpha=3))
    fill((p for _, p in wrapped.named_parameters() if p.requires_grad), 1)
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


def test_fault_randlora_stores_its_shared_bases_for_every_weight(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    theirs(tmp_path / "a", CASES["randlora"][0](), SHAPES)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    copies = [name for name in stored if name.endswith("randlora_B")]
    assert len(copies) == 1 + len(SHAPES)
    for name in copies:
        assert np.array_equal(stored[name], stored["base_model.randlora_B"])


def test_fault_shira_without_a_seed_draws_the_same_positions_every_time() -> None:
    """PEFT means them to be random without a ``random_seed``; a new ``torch.Generator`` always has the same seed."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model(ALIKE), peft.ShiraConfig(r=1, target_modules=["q", "v"]))
        found += [wrapped.base_model.model.a.get_submodule(name).shira_indices["default"] for name in "qv"]
    assert all(torch.equal(one, found[0]) for one in found)


def test_fault_unilora_is_loaded_silently_onto_modules_in_another_order(tmp_path: Path) -> None:
    """Its file names no module: the indices depend on the order in which the model has them."""
    expected = theirs(tmp_path / "a", peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=["q", "v"]), ALIKE)
    turned = {path: ALIKE[path] for path in reversed(ALIKE)}
    found = loaded(tmp_path / "a", turned)
    assert error(found["a.q"], expected["a.q"]) > 0.5
    ours = tna.convert(tmp_path / "a", base=turned).file
    assert ours is not None
    for path, delta in found.items():
        assert error(updates(ours)[path], delta) <= TOLERANCE


def test_the_settings_that_are_written(tmp_path: Path) -> None:
    tna.convert(our_file(tna.presets.c3a(6), SIXES), tmp_path / "c3a", to="peft-c3a")
    assert json.loads((tmp_path / "c3a" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": None,
        "block_size": 6,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": "C3A",
        "target_modules": sorted(SIXES),
        "task_type": None,
    }
