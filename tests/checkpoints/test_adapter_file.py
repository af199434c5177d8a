"""The content of an adapter file as an object: inconsistent parts are rejected."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt import AdapterFile, BackendError, Config, ConfigError, ShapeError, SuperLoRA, Target
from tnadapt.checkpoints.adapter_file import _arrays_of_group
from tnadapt.checkpoints.fingerprint import fingerprint

TARGETS = (
    Target("a.q", (6, 4), "q", layer="a"),
    Target("a.v", (5, 4), "v", layer="a"),
    Target("b.q", (6, 4), "q", layer="b"),
)
SHAPES = [target.shape for target in TARGETS]
LORA = Config(rank=2)


def arrays_of(config: Config, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Trained arrays: no start, and no zeros."""
    rng = np.random.default_rng(seed)
    plan = SuperLoRA(config, SHAPES, layers=["a", "a", "b"], roles="qvq")
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in plan.param_shapes.items()}


def made(config: Any = LORA, **fields: Any) -> AdapterFile:
    if "arrays" not in fields:
        fields["arrays"] = arrays_of(config)
    return AdapterFile(**{"config": config, "targets": TARGETS, **fields})


CONFIGS = {
    "lora": tna.presets.lora(2),
    "lokr": tna.presets.lokr(2),
    "loha": tna.presets.loha(2),
    "lonkr": tna.presets.lonkr(splits=3, groups=2),
    "lorta": tna.presets.lorta(2, order=3),
    "tt": Config(rank=2, order=4, groups=1, fold="balanced", format="tt", splits=2, split_size=2, leading="same"),
    "weighted": Config(rank=3, groups=3, fold="hypercube", format="cp-weighted", terms=2),
    "partial": Config(rank=(None, 2, 2), order=3, groups=1, fold=(5, 4, 4), format="tucker"),
    "vector": Config(order=1, format="tt", groups=2, fold="hypercube"),
    "layers": Config(rank=1, groups="layer", fold="hypercube"),
    "roles": Config(rank=1, groups="role", fold="hypercube"),
    "names": tna.presets.lotr(2, groups="role"),
    "names, balanced": tna.presets.lotr(1, groups="role", splits=2),
    "explicit": Config(rank=1, groups=[[0, 2], [1]], splits=2, terms=3),
    "linear": tna.presets.superlora(2, projection="linear", ratio=0.5, seed=7),
    "own F": Config(rank=1, groups=2, fold="hypercube", projection="shuffle", shared=False),
    "nonlinear": tna.presets.superlora(2, groups=2, projection="nonlinear_v2", ratio=0.7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_holds_any_config(name: str) -> None:
    config = CONFIGS[name]
    file = made(config)
    plan = SuperLoRA(config, SHAPES, layers=["a", "a", "b"], roles="qvq")
    assert file.plan.param_shapes == plan.param_shapes
    assert file.plan is file.plan
    assert len(plan.param_shapes) == plan.num_groups * _arrays_of_group(config)[1]
    assert file.num_parameters == plan.num_parameters
    for found, expected in zip(file.deltas(), plan.deltas(file.arrays), strict=True):
        assert np.array_equal(found, expected)
    # A layer says nothing where groups are not layers.
    assert {target.layer for target in file.targets} == ({"a", "b"} if name == "layers" else {""})


def test_it_is_a_plain_object() -> None:
    head = np.ones((3, 2))
    file = made(kept={"head.weight": head}, model="ViT", activation=None)
    assert repr(file) == "AdapterFile(58 parameters in 6 arrays, 3 targets, 1 kept)"
    assert isinstance(file.targets, tuple)
    assert file.kept["head.weight"] is head
    assert [name for name, _ in file.tensors()] == [*file.arrays, "kept.head.weight"]
    assert file.dtype == "float32"
    with pytest.raises(dataclasses.FrozenInstanceError):
        file.model = "other"  # type: ignore[misc]
    for copied in (copy.deepcopy(file), pickle.loads(pickle.dumps(file))):
        assert copied.targets == file.targets
        assert all(np.array_equal(copied.arrays[name], array) for name, array in file.arrays.items())
        assert copied.plan.num_parameters == file.num_parameters
    assert repr(dataclasses.replace(file, kept={}))[-7:] == "0 kept)"


# -- dtypes -------------------------------------------------------------------------------------


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_dtypes_are_kept(dtype: str) -> None:
    arrays = arrays_of(LORA, dtype)
    swapped = {name: array.astype(array.dtype.newbyteorder("S")) for name, array in arrays.items()}
    for given in (arrays, swapped):
        file = made(arrays=given)
        assert file.dtype == dtype
        for name, array in file.arrays.items():
            assert array.dtype == np.dtype(dtype)
            assert np.array_equal(array, arrays[name])


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded, in a simple way, to what bfloat16 holds."""
    return (array.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def test_bfloat16_is_kept_as_float32() -> None:
    arrays = {name: round_to_bfloat16(array) for name, array in arrays_of(LORA).items()}
    file = made(arrays=arrays, dtypes=dict.fromkeys(arrays, "bfloat16"))
    assert file.dtype == "bfloat16"
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    head = np.array(1.5, ml_dtypes.bfloat16)
    copied = made(arrays=theirs, kept={"head": head})
    assert copied.dtypes == {**file.dtypes, "kept.head": "bfloat16"}
    assert all(np.array_equal(copied.arrays[name], array) for name, array in arrays.items())
    assert (copied.kept["head"].dtype, copied.kept["head"].item()) == (np.float32, 1.5)


def test_a_nonlinear_update_in_bfloat16_begins_at_nothing() -> None:
    # The start was rounded to bfloat16 when training began; NumPy, which computes in float32, must know.
    config = CONFIGS["nonlinear"]
    plan = SuperLoRA(config, SHAPES)
    start = {}
    for group in plan.groups:
        start.update({full: group.start.make((name, "bfloat16")) for name, full in group.names.items()})
    dtypes = dict.fromkeys(start, "bfloat16")
    for delta in made(config, arrays=start, dtypes=dtypes).deltas():
        assert not delta.any()
    rng = np.random.default_rng(5)
    moved = {name: round_to_bfloat16(array + 0.1 * rng.standard_normal(array.shape)) for name, array in start.items()}
    wide = [
        plan.deltas({name: array.astype(np.float64) for name, array in arrays.items()}) for arrays in (moved, start)
    ]
    for found, now, then in zip(made(config, arrays=moved, dtypes=dtypes).deltas(), *wide, strict=True):
        assert relative_error(found, now - then) < 1e-5


# -- Draws --------------------------------------------------------------------------------------


@pytest.mark.law("draws-digest")
def test_draws_are_those_of_f_and_its_start() -> None:
    assert made().draws is None
    projection = "linear"
    config = Config(rank=1, groups=3, fold="hypercube", projection=projection, ratio=0.5)
    file = made(config)
    # Two lengths, and so two F.
    digests = [tna.Projection(projection, -(-size // 2), size).digest for size in (23, 22)]
    assert [group.size for group in file.plan.groups] == [23, 23, 22]
    assert file.draws == hashlib.sha256("".join(digests).encode()).hexdigest()

    config = config.replace(projection="nonlinear")
    file = made(config)
    total = hashlib.sha256()
    for size in (23, 22):
        total.update(tna.Projection("nonlinear", -(-size // 2), size).digest.encode())
    start = SuperLoRA(config, SHAPES).init()
    for array in start.values():
        total.update(array.astype("<f4").tobytes())
    assert file.draws == total.hexdigest()
    # It is of what is drawn, and not of what was trained.
    assert made(config, arrays=arrays_of(config, seed=1)).draws == file.draws
    assert made(config.replace(seed=1)).draws != file.draws
    assert made(config.replace(shared=False)).draws != file.draws


def test_of_very_many_f_a_few_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def digest(projection: tna.Projection) -> str:
        drawn.append(projection.group)
        return "digest"

    monkeypatch.setattr(tna.Projection, "digest", property(digest))
    config = Config(rank=1, groups=34, fold="hypercube", projection="shuffle", shared=False)
    assert made(config).draws is not None
    assert drawn == [*range(8), *range(26, 34)]
    drawn.clear()
    assert made(config.replace(groups=16)).draws is not None
    assert len(drawn) == 14  # 68 elements in pieces of ceil(68 / 16)


# -- Bad input ----------------------------------------------------------------------------------


def without(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {other: array for other, array in arrays.items() if other != name}


ARRAYS = arrays_of(LORA)
FIRST = "group0.split0.factor0"


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"config": {"rank": 2}, "arrays": ARRAYS}, ConfigError, r"config must be a tnadapt\.Config; got dict"),
        ({"targets": "blocks"}, ConfigError, "targets must be a list of Target; got 'blocks'"),
        ({"targets": 3}, ConfigError, "targets must be a list of Target; got 3"),
        ({"targets": [TARGETS[0], (6, 4)]}, ConfigError, r"must be a list of Target; got \(6, 4\) among them"),
        ({"targets": ()}, ConfigError, "targets is empty: an adapter updates at least one weight"),
        ({"targets": TARGETS[:2]}, ShapeError, r"missing: none; unknown: 'group2\.split0\.factor0', "),
        ({"arrays": None}, ShapeError, "arrays must be a mapping of names to arrays; got NoneType"),
        (
            {"arrays": dict(list(ARRAYS.items())[4:])},
            ShapeError,
            r"missing: 'group0\.split0\.factor0', \S+, \S+, \S+; unknown: none",
        ),
        (
            {"arrays": dict(list(ARRAYS.items())[5:])},
            ShapeError,
            r", 'group1\.split0\.factor1' and 1 more; unknown: none",
        ),
        ({"arrays": {}}, ShapeError, r"missing: 'group0\.split0\.factor0', .* and 2 more; unknown: none"),
        ({"arrays": without(ARRAYS, FIRST)}, ShapeError, rf"missing: '{FIRST}'; unknown: none"),
        ({"arrays": {**ARRAYS, "more": np.ones(2, "f4")}}, ShapeError, "missing: none; unknown: 'more'"),
        (
            {"arrays": {**without(ARRAYS, FIRST), "x": ARRAYS[FIRST]}},
            ShapeError,
            f"missing: '{FIRST}'; unknown: 'x'",
        ),
        (
            {"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].T}},
            ShapeError,
            rf"{FIRST} has shape \(2, 6\); config and targets require \(6, 2\)",
        ),
        ({"arrays": {**ARRAYS, FIRST: [[1.0]]}}, ShapeError, "must be a NumPy array; got list"),
        ({"arrays": {**ARRAYS, FIRST: np.ma.masked_array(ARRAYS[FIRST])}}, ShapeError, "got MaskedArray"),
        ({"arrays": {**ARRAYS, 3: np.ones(2)}}, ShapeError, "arrays must be named by strings; got 3"),
        ({"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].astype(int)}}, BackendError, "has dtype int64; expected one of"),
        ({"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].astype("f8")}}, BackendError, "one dtype; got float32 and float64"),
        ({"dtypes": ["bfloat16"]}, BackendError, "dtypes must be a mapping of names to dtypes; got list"),
        ({"dtypes": {FIRST: "bfloat16"}}, BackendError, "has values that bfloat16 cannot represent; round them"),
        ({"dtypes": {FIRST: "float16"}}, BackendError, "which float32 arrays are stored as 'bfloat16'; got 'float16'"),
        ({"dtypes": {"head": "bfloat16"}}, BackendError, "dtypes names 'head', which is not an array of the file"),
        (
            {"kept": {"head": np.ones(2)}, "dtypes": {"kept.head": "bfloat16"}},
            BackendError,
            "got 'bfloat16' for 'kept.head', which is float64",
        ),
        (
            {"arrays": {**ARRAYS, FIRST: 0 * ARRAYS[FIRST]}, "dtypes": {FIRST: "bfloat16"}},
            BackendError,
            "one dtype; got bfloat16 and float32",
        ),
        ({"kept": {"": np.ones(2)}}, ShapeError, "kept must be named by strings; got ''"),
        ({"kept": {"head": np.ones(2, complex)}}, BackendError, "has dtype complex128; expected one of"),
        ({"kept": {"head": np.array([None])}}, BackendError, "has dtype object; expected one of"),
        ({"kept": {"\ud800": np.ones(2)}}, ConfigError, r"'\\ud800' has half a surrogate pair"),
        ({"model": "\ud800"}, ConfigError, "has half a surrogate pair"),
        ({"targets": [*TARGETS[:2], Target("\ud800", (6, 4))]}, ConfigError, "has half a surrogate pair"),
        ({"model": None}, ConfigError, "model must be the name of a class; got None"),
        ({"trained": FIRST}, ConfigError, "trained must be a list of names of arrays, or None for all; got 'group0"),
        (
            {"trained": [FIRST, 3]},
            ConfigError,
            "trained must be a list of names of arrays, or None for all; got \\['group0",
        ),
        ({"trained": {FIRST}}, ConfigError, "trained must be a list of names of arrays, or None for all; got {"),
        ({"trained": []}, ConfigError, "each once; unknown: none; there are 'group0"),
        ({"trained": [FIRST, FIRST]}, ConfigError, "each once; unknown: none; there are 'group0"),
        ({"trained": [FIRST, "x"]}, ConfigError, "each once; unknown: 'x'; there are 'group0"),
        ({"activation": "sine"}, ConfigError, "activation must be None or one of relu, gelu, tanh, silu; got 'sine'"),
        ({"base": "0" * 64}, ConfigError, "base must be a Fingerprint or None; got str"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        made(**fields)


def test_numbers_that_are_none_are_named() -> None:
    made().check_finite()
    with pytest.raises(ShapeError, match=rf"'{FIRST}' holds NaN or infinity"):
        made(arrays={**ARRAYS, FIRST: np.full_like(ARRAYS[FIRST], np.nan)}).check_finite()
    with pytest.raises(ShapeError, match=r"'kept\.head' holds NaN or infinity"):
        made(kept={"head": np.array(np.inf)}).check_finite()


def test_an_activation_has_no_update() -> None:
    file = made(activation="relu", base=fingerprint([np.ones((2, 2))], "float64"))
    with pytest.raises(ConfigError, match="activation='relu' does not update weights"):
        file.deltas()


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ("group0.split0.factor0", "trained must be a list of names of arrays, or None for all; got 'group0"),
        ([0], r"trained must be a list of names of arrays, or None for all; got \[0\]"),
        (3, "trained must be a list of names of arrays, or None for all; got 3"),
        ([], "trained must name some of the arrays, each once; unknown: none; there are 'group0.split0.factor0'"),
        (["group0.split0.factor0"] * 2, "trained must name some of the arrays, each once; unknown: none"),
        (["factor0"], "trained must name some of the arrays, each once; unknown: 'factor0'; there are"),
    ],
)
def test_trained_names_arrays(trained: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(trained=trained)


def test_all_arrays_trained_is_the_default() -> None:
    names = list(made().arrays)
    assert made(trained=names).trained is None
    assert made(trained=names[::-1][1:]).trained == tuple(names[:-1])


# -- Ties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ties",
    [{"head.weight": ["embed.weight", "other.weight"]}, {"head.weight": []}, {"a.q.weight": ()}, {}],
)
def test_ties_are_kept_in_a_file(ties: dict[str, Any], tmp_path: Path) -> None:
    file = made(kept={"head.weight": np.ones((3, 2), np.float32)}, ties=ties)
    assert file.ties == {name: tuple(others) for name, others in ties.items()}
    tna.save(tmp_path / "a.safetensors", file)
    assert tna.load(tmp_path / "a.safetensors").ties == file.ties


@pytest.mark.parametrize(
    ("ties", "match"),
    [
        (3, "ties must be a mapping of names to lists of names; got int"),
        ({"head.weight": "embed"}, "ties of 'head.weight' must be a list of dotted paths; got 'embed'"),
        ({"head.weight": [""]}, "ties of 'head.weight' must be a list of dotted paths; got"),
        ({"head.weight": ["head.weight"]}, "ties of 'head.weight' must be different names; got"),
        ({"head.weight": ["a", "a"]}, "ties of 'head.weight' must be different names; got"),
        ({"other": []}, "ties names 'other', which is neither a kept parameter nor a target without ties"),
        ({"a.q.weight": ["b"]}, "ties names 'a.q.weight', which is neither a kept parameter nor a target without ties"),
        ({"head.weight": ["\ud800"]}, "has half a surrogate pair"),
    ],
)
def test_ties_that_cannot_be_are_named(ties: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        made(kept={"head.weight": np.ones((3, 2), np.float32)}, ties=ties)
