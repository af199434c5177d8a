"""Folders of PEFT's methods that cannot be read, and configs that cannot be written as them, are refused in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import ConfigError, FileError, TargetError
from tnadapt.maps import Circulant, Tile, TorchScatter, Wavelet
from tnadapt.sources import Given, Scaled

from .conversions import adapter_on, converted, made

RNG = np.random.default_rng(0)
Q = "base_model.model.a.q."
SHAPES: dict[str, tuple[int, ...]] = {"a.q": (6, 8)}


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("f4")


def integers(*rows: Any) -> np.ndarray:
    return np.array(rows, "i4")


# One small adapter of each method on a weight of 6 × 8.
CONTENT: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "VERA": ({"r": 2}, {
        f"{Q}vera_lambda_b": floats(6), f"{Q}vera_lambda_d": floats(2),
        "base_model.vera_A": floats(2, 8), "base_model.vera_B": floats(6, 2),
    }),
    "RANDLORA": ({"r": 4, "randlora_alpha": 8}, {
        f"{Q}randlora_lambda": floats(4, 2), f"{Q}randlora_gamma": floats(2, 6),
        "base_model.randlora_A": floats(4, 1, 6), "base_model.randlora_B": floats(8, 2, 4),
    }),
    "FOURIERFT": ({}, {f"{Q}fourierft_spectrum": floats(5)}),
    "WAVEFT": ({}, {f"{Q}waveft_spectrum": floats(5)}),
    "C3A": ({"block_size": 2}, {f"{Q}c3a_kernel": floats(3, 4, 2)}),
    "SHIRA": ({"r": 1}, {f"{Q}shira_weight": floats(14), f"{Q}shira_indices": integers(range(6), range(6))}),
    "MISS": ({"r": 3}, {f"{Q}miss_block": floats(3, 6)}),
    "UNILORA": ({"r": 2}, {
        "base_model.unilora_theta_d": floats(9),
        f"{Q}unilora_indices_A": RNG.integers(0, 9, (2, 8)), f"{Q}unilora_indices_B": RNG.integers(0, 9, (6, 2)),
        f"{Q}unilora_scales_A": floats(2, 8), f"{Q}unilora_scales_B": floats(6, 2),
    }),
    "TINYLORA": ({"r": 2, "u": 3}, {
        f"{Q}tinylora_A": floats(2, 8), f"{Q}tinylora_B": floats(6, 2), f"{Q}tinylora_P": floats(3, 2, 2),
        "base_model.tinylora_v.0": floats(3),
    }),
    "VBLORA": ({"r": 2}, {
        f"{Q}vblora_logits_A": floats(2, 4, 5), f"{Q}vblora_logits_B": floats(3, 2, 5),
        "base_model.vblora_vector_bank": floats(5, 2),
    }),
}  # fmt: skip
# TRAINABLE_TOKENS needs the numbers of the base, not its shapes alone: see test_peft_kept.py.
PLACES = np.sort(RNG.permutation(48)[:14])
CONTENT["SHIRA"][1][f"{Q}shira_indices"] = integers(*np.divmod(PLACES, 8))


def folder(
    path: Path, method: str, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
) -> Path:
    """A folder of a method, with some settings and tensors changed, or removed by None."""
    path.mkdir(exist_ok=True)
    fields, arrays = CONTENT[method]
    merged = {name: array for name, array in {**arrays, **(tensors or {})}.items() if array is not None}
    save_file({name: np.ascontiguousarray(array) for name, array in merged.items()}, path / "adapter_model.safetensors")
    text = json.dumps({"peft_type": method, "target_modules": ["q"], **fields, **(config or {})})
    (path / "adapter_config.json").write_text(text)
    return path


@pytest.mark.parametrize("method", CONTENT)
def test_these_are_read(method: str, tmp_path: Path) -> None:
    found = tna.convert(folder(tmp_path / "a", method), base=SHAPES)
    assert (found.exact, found.origin) == (True, f"peft-{method.lower()}")
    assert found.file is not None
    assert [target.shape for target in found.file.targets] == [(6, 8)]


@pytest.mark.parametrize(
    ("given", "start"), [(0.3, 0.3), (-1, -1.0), (0, 0.1), (1.5, 0.1), (True, 0.1), ("0.3", 0.1), (None, 0.1)]
)
def test_vera_starts_another_training_at_a_small_diagonal(given: Any, start: float, tmp_path: Path) -> None:
    found = converted(folder(tmp_path / "a", "VERA", {"d_initial": given}), base=SHAPES)
    assert found.config.sources == {
        "factor0": Scaled(Given(shared=True), start=0.0),
        "factor1": Scaled(Given(shared=True), size=False, rank=True, start=start),
    }


def test_positions_from_windows_are_floating_point_numbers(tmp_path: Path) -> None:
    name = f"{Q}shira_indices"
    turned = {name: CONTENT["SHIRA"][1][name].astype("f4")}
    whole, found = (
        converted(folder(tmp_path / "a", "SHIRA", {}, tensors), base=SHAPES).deltas()[0] for tensors in ({}, turned)
    )
    assert np.array_equal(found, whole)


NO_SHAPE = r"does not store the shapes of the weights, and 'a.q' needs one: give base= \(--base\), a folder or"
SEED = "must be an integer that torch takes as a seed; got"


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize(
    ("method", "config", "tensors", "message"),
    [
        (method, {"magic": 3}, {}, "magic=3 of adapter_config.json cannot be converted: this field is not known here")
        for method in CONTENT
    ]
    + [
        # With a name such as Uni-LoRA.
        (method, {}, {f"{Q}other": floats(2)}, f"belong to a (?i:{method[:-4]}-?{method[-4:]}) adapter: '{Q}other'")
        for method in CONTENT
    ]
    + [
        (method, {}, {next(name for name, array in arrays.items() if array.dtype.kind == "f"): floats(1, 1, 1, 1)},
         "axes, none of them empty")
        for method, (_, arrays) in CONTENT.items()
    ]
    + [
        (method, {}, {next(iter(arrays)): np.full_like(next(iter(arrays.values())), np.nan)}, "holds NaN or infinity")
        for method, (_, arrays) in CONTENT.items()
    ]
    + [
        ("VERA", {}, {f"{Q}vera_lambda_d": None}, "'a.q' has vera_lambda_b, and lacks vera_lambda_d"),
        ("VERA", {}, {f"{Q}vera_lambda_d": floats(3)}, r"vera_lambda_d must have r = 2 elements; they are vera"),
        ("VERA", {}, {f"{Q}vera_lambda_b": floats(7)}, "it has 7 rows, and the weight is 6 × 8"),
        ("VERA", {}, {"base_model.vera_A": None}, "lacks base_model.vera_A, .*: save it with save_projection=True"),
        ("VERA", {}, {"base_model.vera_A": floats(2, 7)}, r"vera_A must be \(2, 8\) and vera_B \(6, 2\), or larger"),
        ("VERA", {"r": 0}, {}, "r must be an integer of at least 1"),
        ("VERA", {"save_projection": False, "projection_prng_key": "a"},
         {"base_model.vera_A": None, "base_model.vera_B": None}, f"projection_prng_key {SEED} 'a'"),
        ("RANDLORA", {}, {f"{Q}randlora_gamma": floats(2, 9)}, "randlora_lambda must be .* N = ⌈side / r⌉"),
        ("RANDLORA", {}, {f"{Q}randlora_gamma": floats(2, 5)}, "its smaller side is 5, and the weight is 6 × 8"),
        ("RANDLORA", {}, {"base_model.randlora_B": None}, "lacks base_model.randlora_B"),
        ("RANDLORA", {}, {"base_model.randlora_B": floats(7, 2, 4)}, r"randlora_B \(8, 2, 4\), or larger; they are"),
        ("RANDLORA", {}, {"base_model.randlora_B": floats(8, 1, 4)}, "randlora_B has 1 bases, and that is too few"),
        ("RANDLORA", {}, {f"{Q}randlora_B": floats(8, 2, 4)}, "differs from base_model.randlora_B, of which PEFT st"),
        ("RANDLORA", {"randlora_alpha": "a"}, {}, "randlora_alpha must be a finite number"),
        ("FOURIERFT", {}, {f"{Q}fourierft_spectrum": floats(49)}, "it has 49 values, as a config has"),
        ("FOURIERFT", {"scaling": None}, {}, "scaling must be a finite number; got None"),
        ("FOURIERFT", {"random_loc_seed": 1.5}, {}, f"random_loc_seed {SEED} 1.5"),
        ("WAVEFT", {"wavelet_family": "sym4"}, {}, "wavelet_family='sym4' cannot be converted: only db1 to db10"),
        ("WAVEFT", {}, {f"{Q}waveft_spectrum": floats(49)}, "it has 49 values, as a config has"),
        ("SHIRA", {}, {f"{Q}shira_weight": floats(13)}, "shira_indices a row and a column for each"),
        ("SHIRA", {"r": 2}, {}, "rows and columns must sum to 7, and the weight is 6 × 8"),
        ("SHIRA", {}, {f"{Q}shira_indices": integers(*np.divmod(PLACES, 8)) + 6}, "a position outside"),
        ("SHIRA", {}, {f"{Q}shira_indices": integers([0] * 14, [0] * 14)}, "shira_indices has a position twice"),
        ("SHIRA", {}, {f"{Q}shira_indices": integers(*np.divmod(PLACES, 8)) + 0.5}, "must hold integers; it is F64"),
        ("MISS", {"init_weights": "bat"}, {}, "init_weights='bat' cannot be converted: its update depends on"),
        ("MISS", {"r": 4}, {}, r"miss_block must be \(4, rows\)"),
        ("MISS", {"init_weights": "mini", "mini_r": 2}, {}, r"miss_block must be \(3, 2\)"),
        ("MISS", {}, {f"{Q}miss_block": floats(3, 5)}, "it must have 5 rows, and 3 columns or more, and the weight"),
        ("MISS", {"init_weights": "mini", "mini_r": 4}, {f"{Q}miss_block": floats(3, 4)}, "have 4 rows or a mul"),
        ("C3A", {}, {f"{Q}c3a_kernel": floats(3, 3, 2)}, r"has the shape \(6, 6\), and the weight in base has"),
        ("UNILORA", {}, {"base_model.unilora_theta_d": None}, "lacks base_model.unilora_theta_d"),
        ("UNILORA", {}, {f"{Q}unilora_indices_A": np.full((2, 8), 9)}, "an index is outside the 9 elements"),
        ("UNILORA", {}, {f"{Q}unilora_scales_A": floats(2, 7)}, "indices and scales must be"),
        ("UNILORA", {"r": 3}, {}, r"unilora_indices_A must be \(r, columns\), r = 3"),
        ("TINYLORA", {}, {"base_model.tinylora_v.0": None}, "lacks base_model.tinylora_v.0"),
        ("TINYLORA", {}, {"base_model.tinylora_v.7": floats(3)}, "lacks base_model.tinylora_v.1"),
        ("TINYLORA", {}, {f"{Q}tinylora_B": floats(6, 3)}, r"tinylora_A must be \(r, columns\)"),
        ("TINYLORA", {}, {f"{Q}tinylora_P": floats(3, 2, 3)}, r"tinylora_P must be \(3, 2, 2\)"),
        ("TINYLORA", {}, {f"{Q}tinylora_P": None}, "and lacks tinylora_P"),
        ("TINYLORA", {"save_projection": False}, {f"{Q}tinylora_P": None}, "and lacks tinylora_P"),
        ("VBLORA", {}, {f"{Q}vblora_logits_A": floats(3, 4, 5)}, r"A must have \(r, parts\) mixtures"),
        ("VBLORA", {}, {f"{Q}vblora_logits_A": floats(2, 4, 4)}, "must have a logit for each of the 5 vectors"),
        ("VBLORA", {}, {f"{Q}vblora_logits_A": np.ones((2, 4, 5), "f4")}, "has equal logits, of which topk=2 takes"),
        ("VBLORA", {"topk": 6}, {}, "must have a logit for each of the 5 vectors, topk of them"),
        ("VBLORA", {}, {f"{Q}vblora_logits_A_topk_indices": np.full((2, 4, 2), 5),
                        f"{Q}vblora_logits_A_topk_weights": floats(2, 4, 1)}, "topk_indices must name 5 vectors"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(
    method: str, config: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = folder(tmp_path / "a", method, config, tensors)
    with pytest.raises((FileError, TargetError), match=message):
        tna.convert(place, base=SHAPES)


@pytest.mark.parametrize("method", ["VERA", "RANDLORA", "FOURIERFT", "WAVEFT", "SHIRA", "MISS"])
def test_shapes_that_are_not_stored(method: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "a", method)
    for base in (None, ["a.q"]):
        with pytest.raises(FileError, match=NO_SHAPE):
            tna.convert(place, base=base)
    with pytest.raises(FileError, match=r"'a.q' is a weight of 4 axes in base, and .* adapts matrices"):
        tna.convert(place, base={"a.q": (6, 2, 2, 2)})
    with pytest.raises(FileError, match=r"base has no module 'a.q'"):
        tna.convert(place, base={"a.k": (6, 8)})


def test_the_order_of_modules_that_is_not_stored(tmp_path: Path) -> None:
    bare = dict.fromkeys(name for name in CONTENT["UNILORA"][1] if name.startswith(Q))
    place = folder(tmp_path / "a", "UNILORA", {}, bare)
    names = r"nor the names of its weights, and .*: save it with save_indices=True"
    save_file({"a.q.weight": floats(6, 8)}, tmp_path / "model.safetensors")
    for base in (None, tmp_path / "model.safetensors", ["a.q"]):
        with pytest.raises(FileError, match=r"in the order of the model's modules: save it with save_indices=True, or"):
            tna.convert(place, base=base)
    assert tna.convert(place, base=SHAPES).exact
    for field, message in (
        ({"layers_to_transform": [1]}, names),
        ({"target_modules": "all-linear"}, names),
        ({"target_modules": None}, names),
        ({"target_modules": ["nothing"]}, r"target_modules=\['nothing'\] matches no matrix of base"),
        ({"target_modules": "a.*q"}, names),
    ):
        folder(tmp_path / "a", "UNILORA", field, bare)
        with pytest.raises(FileError, match=message):
            tna.convert(place, base=SHAPES)
    two = {name.replace("a.q", "a.v"): array for name, array in CONTENT["TINYLORA"][1].items() if "a.q" in name}
    folder(tmp_path / "a", "TINYLORA", {}, two)
    assert tna.convert(place).exact  # one v for all
    folder(tmp_path / "a", "TINYLORA", {}, {**two, "base_model.tinylora_v.1": floats(3)})
    with pytest.raises(FileError, match=r"the order of the modules in the model decides which of its vectors v is a"):
        tna.convert(place)
    assert tna.convert(place, base={"a.v": (6, 8), "a.q": (6, 8)}).exact


# -- Writing -------------------------------------------------------------------------------------


P = tna.presets


def few(projection: Any, **changes: Any) -> tna.Config:
    config = tna.Config.from_dict({"order": 1, "format": "dense", "rank": 1, "on": "weight", **changes})
    return config.replace(projection=projection)


def on_theta(before: str, **changes: Any) -> tna.Config:
    return P.lora(2, before=before, parameters=5, offset=False, **changes)


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (P.lora(2), "vera", "it needs order=2, format='cp', and both factors frozen, shared by all"),
        (
            P.tied_lora(2),
            "vera",
            r"as presets.vera has them; convert to 'peft-lora' \(--to peft-lora\), which is exa",
        ),
        (P.unilora(9, 2), "vera", "its arrays are made from θ by before='one-hot'"),
        (P.superlora(2, groups=1), "vera", "several weights are one group"),
        (P.fourierft(5), "fourierft", "which is not what these are: train with maps.TorchScatter"),
        (P.loca(5), "fourierft", r"it needs projection=\[maps.Scatter\(…\), 'dft2'\]"),
        (P.lora(2), "randlora", "it needs ⌈smaller side / rank⌉ terms for every weight, with frozen factors"),
        (P.randlora(4, rows=6, cols=4), "randlora", "it needs ⌈smaller side / rank⌉ terms for every weight"),
        (P.krona(), "randlora", "as presets.randlora has them"),
        (P.lora(2), "fourierft", "it needs one trained vector for each weight"),
        (P.waveft(5), "waveft", r"it needs projection=\[maps.TorchScatter\(size, seed\), maps.CenteredWavelet"),
        (few([TorchScatter(3), Wavelet("db2")]), "waveft", "and places the coefficients otherwise than presets"),
        (P.unilora(9, 2), "unilora", "and here they start at other numbers: set offset=False"),
        (P.lora(2), "unilora", "it needs one θ for all factors of LoRA, and one weight per group"),
        (P.unilora(9, 2, scope="group"), "unilora", "it needs one θ for all factors of LoRA"),
        (
            on_theta("one-hot", fold="hypercube"),
            "unilora",
            "it needs one θ for all factors of LoRA, and one weight per",
        ),
        (on_theta("normal"), "unilora", "before='normal' adds several elements of θ up"),
        (P.c3a(2), "miss", r"it needs projection=maps.Tile\(cols=…\) alone"),
        (P.miss(2), "c3a", r"it needs projection=maps.Circulant\(…\) alone"),
        (few(Tile(2)), "miss", r"it needs projection=maps.Tile\(cols=…\) alone"),
        (few(Tile(4, 2)), "miss", "mini_r=4 must divide the 6 rows of a.q there"),
        (P.shira(48), "shira", r"PEFT trains r \(rows \+ cols\) elements of each weight, r = 4 here"),
        (P.fourierft(5), "shira", r"it needs projection=maps.Scatter\(…\) alone"),
        (few(TorchScatter(3), on="vector", groups=1, fold="hypercube"), "shira", ""),
        (few([Circulant(2), "dct2"]), "c3a", "it needs projection=maps.Circulant"),
    ],
)
def test_what_cannot_be_written(config: tna.Config, to: str, message: str) -> None:
    file = made(config, {"a.q": (6, 8), "a.v": (6, 8)})
    if not message:
        assert tna.convert(file, to=f"peft-{to}").exact
        return
    with pytest.raises(ConfigError, match=rf"cannot be written as PEFT's .*{message}"):
        tna.convert(file, to=f"peft-{to}")


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        ((4, 3, 2, 2), {}, r"is stored in 4 axes, and PEFT has MiSS for matrices \(out"),
        ((6, 8), {"transposed": True}, r"is stored as \(in, out\), and PEFT has MiSS for matrices \(out"),
        ((12, 8), {"rows": (6, 6, 12, 1)}, "is updated in some of its rows, and PEFT has MiSS for whole modules"),
    ],
)
def test_weights_that_peft_does_not_adapt_so(stored: tuple[int, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"'a' {message}"):
        tna.convert(adapter_on([tna.Target("a", stored, **settings)], P.miss(2)), to="peft-miss")
