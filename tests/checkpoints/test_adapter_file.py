"""The content of adapter files: what is inconsistent is rejected; starts, sources of arrays, and several configs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tnadapt as tna
from tests.conftest import relative_error
from tests.support import forge
from tests.support.array_presets import P
from tnadapt import AdapterFile, BackendError, Config, ConfigError, ShapeError, Target, TargetError, UpdatePlan
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.sources import Given, Scaled, Seeded, Tied

# -- The content of an adapter file as an object: inconsistent parts are rejected --------------------------------------


TARGETS = (
    Target("a.q", (6, 4), "q", layer="a"),
    Target("a.v", (5, 4), "v", layer="a"),
    Target("b.q", (6, 4), "q", layer="b"),
)
SHAPES = [target.shape for target in TARGETS]
LORA = Config(rank=2)


def arrays_of(
    config: Config, dtype: str = "float32", seed: int = 0, targets: Sequence[Target] = TARGETS
) -> dict[str, np.ndarray]:
    """Trained arrays: no start, and no zeros."""
    rng = np.random.default_rng(seed)
    plan = UpdatePlan(config, [t.shape for t in targets], [t.layer for t in targets], [t.role for t in targets])
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


def reloaded(file: AdapterFile, folder: Path) -> AdapterFile:
    tna.save(folder / "adapter.safetensors", file)
    return tna.load(folder / "adapter.safetensors")


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
    plan = UpdatePlan(config, SHAPES)
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


@pytest.mark.law("draws-digest")
def test_draws_are_those_of_f_and_its_start() -> None:
    assert made().draws is None
    config = Config(rank=1, groups=3, fold="hypercube", projection="linear", ratio=0.5)
    file = made(config)
    # Two lengths, and so two F.
    digests = [tna.Projection("linear", -(-size // 2), size).digest for size in (23, 22)]
    assert [group.size for group in file.plan.groups] == [23, 23, 22]
    assert file.draws == hashlib.sha256("".join(digests).encode()).hexdigest()
    # Of very many F, the first and last eight.
    for groups, numbers in ((34, [*range(8), *range(26, 34)]), (16, range(14))):
        file = made(Config(rank=1, groups=groups, fold="hypercube", projection="shuffle", shared=False))
        sizes = [group.size for group in file.plan.groups]
        digests = [tna.Projection("shuffle", sizes[n], sizes[n], group=n).digest for n in numbers]
        assert file.draws == hashlib.sha256("".join(digests).encode()).hexdigest()

    config = config.replace(projection="nonlinear")
    file = made(config)
    total = hashlib.sha256()
    for size in (23, 22):
        total.update(tna.Projection("nonlinear", -(-size // 2), size).digest.encode())
    start = UpdatePlan(config, SHAPES).init()
    for array in start.values():
        total.update(array.astype("<f4").tobytes())
    assert file.draws == total.hexdigest()
    # It is of what is drawn, and not of what was trained.
    assert made(config, arrays=arrays_of(config, seed=1)).draws == file.draws
    assert made(config.replace(seed=1)).draws != file.draws
    assert made(config.replace(shared=False)).draws != file.draws


def without(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {other: array for other, array in arrays.items() if other != name}


ARRAYS = arrays_of(LORA)
FIRST = "group0.split0.factor0"
HEAD = {"head.weight": np.ones((3, 2), np.float32)}
NOT_TIED = "which is neither a kept parameter nor a target without ties"

REFUSED: dict[type[Exception], list[tuple[dict[str, Any], str]]] = {
    ConfigError: [
        ({"config": {"rank": 2}, "arrays": ARRAYS}, r"config must be a Config; got \{'rank': 2\}"),
        ({"targets": ()}, "targets is empty: an adapter updates at least one weight"),
        ({"targets": np.array([])}, "targets is empty: an adapter updates at least one weight"),
        ({"kept": {"\ud800": np.ones(2)}}, r"'\\ud800' has half a surrogate pair"),
        ({"model": "\ud800"}, "has half a surrogate pair"),
        ({"targets": [*TARGETS[:2], Target("\ud800", (6, 4))]}, "has half a surrogate pair"),
        ({"dtypes": ["bfloat16"]}, "dtypes must be a mapping of strings to strings; got"),
        ({"model": None}, "model must be a string; got None"),
        ({"trained": FIRST}, "trained must be a sequence of strings or None; got 'group0"),
        ({"trained": [FIRST, 3]}, "trained must be a sequence of strings or None; got \\['group0"),
        ({"trained": []}, "each once; unknown: none; there are 'group0"),
        ({"trained": [FIRST, FIRST]}, "each once; unknown: none; there are 'group0"),
        ({"trained": [FIRST, "x"]}, "each once; unknown: 'x'; there are 'group0"),
        ({"activation": "sine"}, "activation must be None or one of relu, gelu, tanh, silu; got 'sine'"),
        ({"base": "0" * 64}, "base must be a Fingerprint or None; got '0000"),
        ({"pretrained": {}}, r"pretrained must be a Pretrained or None; got \{\}"),
        ({"ties": 3}, "ties must be a mapping of strings to sequences of strings; got 3"),
        *(
            ({"kept": HEAD, "ties": ties}, why)
            for ties, why in (
                ({"head.weight": "embed"}, "ties must be a mapping of strings to sequences of strings; got"),
                ({"head.weight": [""]}, "ties of 'head.weight' must be a list of dotted paths; got"),
                ({"head.weight": ["head.weight"]}, "ties of 'head.weight' must be different names; got"),
                ({"head.weight": ["a", "a"]}, "ties of 'head.weight' must be different names; got"),
                ({"other": []}, f"ties names 'other', {NOT_TIED}"),
                ({"a.q.weight": ["b"]}, f"ties names 'a.q.weight', {NOT_TIED}"),
                ({"head.weight": ["\ud800"]}, "has half a surrogate pair"),
            )
        ),
    ],
    ShapeError: [
        ({"kept": {"head": np.array([None])}}, "kept must be a mapping of strings to arrays of numbers; got"),
        ({"targets": TARGETS[:2]}, r"missing: none; unknown: 'group2\.split0\.factor0', "),
        ({"arrays": None}, "arrays must be a mapping of strings to arrays of numbers; got None"),
        (
            {"arrays": dict(list(ARRAYS.items())[4:])},
            r"missing: 'group0\.split0\.factor0', \S+, \S+, \S+; unknown: none",
        ),
        ({"arrays": dict(list(ARRAYS.items())[5:])}, r", 'group1\.split0\.factor1' and 1 more; unknown: none"),
        ({"arrays": {}}, r"missing: 'group0\.split0\.factor0', .* and 2 more; unknown: none"),
        ({"arrays": without(ARRAYS, FIRST)}, rf"missing: '{FIRST}'; unknown: none"),
        ({"arrays": {**ARRAYS, "more": np.ones(2, "f4")}}, "missing: none; unknown: 'more'"),
        ({"arrays": {**without(ARRAYS, FIRST), "x": ARRAYS[FIRST]}}, f"missing: '{FIRST}'; unknown: 'x'"),
        (
            {"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].T}},
            rf"{FIRST} has shape \(2, 6\); config and targets require \(6, 2\)",
        ),
        ({"arrays": {**ARRAYS, FIRST: [[1.0]]}}, "arrays must be a mapping of strings to arrays of numbers; got"),
        ({"arrays": {**ARRAYS, FIRST: np.ma.masked_array(ARRAYS[FIRST])}}, "got MaskedArray"),
        ({"arrays": {**ARRAYS, 3: np.ones(2)}}, "arrays must be a mapping of strings to arrays of numbers; got"),
        ({"kept": {"": np.ones(2)}}, "kept must be named by strings that are not empty"),
    ],
    BackendError: [
        ({"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].astype(int)}}, "has dtype int64; expected one of"),
        ({"arrays": {**ARRAYS, FIRST: ARRAYS[FIRST].astype("f8")}}, "one dtype; got float32 and float64"),
        ({"dtypes": {FIRST: "bfloat16"}}, "has values that bfloat16 cannot represent; round them"),
        ({"dtypes": {FIRST: "float16"}}, "which float32 arrays are stored as 'bfloat16'; got 'float16'"),
        ({"dtypes": {"head": "bfloat16"}}, "dtypes names 'head', which is not an array of the file"),
        (
            {"kept": {"head": np.ones(2)}, "dtypes": {"kept.head": "bfloat16"}},
            "got 'bfloat16' for 'kept.head', which is float64",
        ),
        (
            {"arrays": {**ARRAYS, FIRST: 0 * ARRAYS[FIRST]}, "dtypes": {FIRST: "bfloat16"}},
            "one dtype; got bfloat16 and float32",
        ),
        ({"kept": {"head": np.ones(2, complex)}}, "has dtype complex128; expected one of"),
    ],
    TargetError: [
        ({"targets": "blocks"}, "targets must be a sequence of Targets; got 'blocks'"),
        ({"targets": 3}, "targets must be a sequence of Targets; got 3"),
        ({"targets": [TARGETS[0], (6, 4)]}, "targets must be a sequence of Targets; got"),
    ],
}


@pytest.mark.parametrize(("error", "fields", "why"), [(error, *row) for error, rows in REFUSED.items() for row in rows])
def test_what_does_not_fit_is_refused(error: type[Exception], fields: dict[str, Any], why: str) -> None:
    with pytest.raises(error, match=why):
        made(**fields)


def test_an_activation_has_no_update() -> None:
    file = made(activation="relu", base=fingerprint([np.ones((2, 2))], "float64"))
    with pytest.raises(ConfigError, match="activation='relu' does not update weights"):
        file.deltas()


def test_all_arrays_trained_is_the_default() -> None:
    names = list(made().arrays)
    assert made(trained=names).trained is None
    assert made(trained=names[::-1][1:]).trained == tuple(names[:-1])


@pytest.mark.parametrize(
    "ties",
    [{"head.weight": ["embed.weight", "other.weight"]}, {"head.weight": []}, {"a.q.weight": ()}, {}],
)
def test_ties_are_kept_in_a_file(ties: dict[str, Any], tmp_path: Path) -> None:
    file = made(kept=HEAD, ties=ties)
    assert file.ties == {name: tuple(others) for name, others in ties.items()}
    assert reloaded(file, tmp_path).ties == file.ties


# -- Adapter files whose updates are differences to a start: what is stored, and what is computed again ----------------


START_TARGETS = [tna.Target("q", (12, 8), "q"), tna.Target("v", (12, 8), "v")]
START_SHAPES = [target.shape for target in START_TARGETS]
LEFT, RIGHT = "group0.split0.factor0", "group0.split0.factor1"


START_BASE = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(START_SHAPES)]


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def plan_of(config: tna.Config) -> tna.UpdatePlan:
    plan = tna.UpdatePlan(config, START_SHAPES).with_base(START_BASE)
    return plan.with_start(drawn(plan.array_shapes, 0)) if plan.point.brought else plan


def file_of(plan: tna.UpdatePlan, **fields: Any) -> AdapterFile:
    fields = {"arrays": drawn(plan.param_shapes, 1), "given": plan.given, **fields}
    return AdapterFile(plan.config, START_TARGETS, **fields)


START_CONFIGS = {
    "lora": tna.presets.lora(3, alpha=5, start="given"),
    "lokr": tna.presets.lokr(2, start="given"),
    "linear": tna.presets.superlora(2, projection="linear", ratio=0.4, start="given"),
    "nonlinear": tna.presets.superlora(2, projection="nonlinear", start="given"),
    "θ": tna.presets.unilora(7, rank=2, start="given"),
    "vera": tna.presets.vera(3, start="given"),
    **{start: tna.presets.lora(3, alpha=5, start=start) for start in ("pissa", "milora", "olora")},
}


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize("name", START_CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    plan, path = plan_of(START_CONFIGS[name]), tmp_path / "a.safetensors"
    file = file_of(plan)
    tna.save(path, file)
    found = tna.load(path)
    assert found.config == file.config
    assert found.given.keys() == plan.given.keys()
    assert all(map(np.array_equal, found.deltas(), file.deltas()))
    tna.save(tmp_path / "b.safetensors", found)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    told = tna.info(path)
    assert told["start"] == {"name": START_CONFIGS[name].start, "stored": len(plan.start_shapes)}
    assert told["draws_here"] in (True, None)
    json.dumps(told)


@pytest.mark.parametrize("start", ["pissa", "milora", "olora"])
def test_what_the_base_gives_is_not_stored(start: str, tmp_path: Path) -> None:
    plan = plan_of(START_CONFIGS[start])
    found = reloaded(file_of(plan, given={}), tmp_path)
    assert not found.complete
    assert found.draws is None
    with pytest.raises(ConfigError, match=r"the start of 'group0.split0.factor0' is computed from the base weights"):
        found.deltas()
    whole = found.with_base(START_BASE)
    assert all(map(np.array_equal, whole.deltas(), file_of(plan).deltas()))


def test_what_is_not_brought_is_drawn_again(tmp_path: Path) -> None:
    # One array of six is brought, the others are in the digest of the draws.
    whole = tna.UpdatePlan(tna.presets.lora(3, start="given"), START_SHAPES)
    plan = whole.with_start({RIGHT: np.ones((8, 3))})
    file = file_of(plan)
    found = reloaded(file, tmp_path)
    assert found.given.keys() == {f"start.{RIGHT}"}
    assert found.draws == file.draws
    assert None is not file.draws != file_of(whole).draws
    other = file_of(whole.with_start({RIGHT: np.full((8, 3), 2.0)}))
    assert other.draws == file.draws  # of another start, the same is drawn


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "float16"])
def test_the_start_is_stored_in_float32(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = plan_of(tna.presets.lora(3, start="given"))
    made = plan.init("torch", kind)
    host = {n: a.float().numpy() if kind == "bfloat16" else a.numpy() for n, a in made.items()}
    dtypes = dict.fromkeys(host, kind) if kind == "bfloat16" else {}
    found = reloaded(file_of(plan, arrays=host, dtypes=dtypes), tmp_path)
    assert {array.dtype.name for array in found.given.values()} == {"float32"}
    assert not any(delta.any() for delta in found.deltas())
    assert isinstance(made[LEFT], torch.Tensor)


def test_frozen_arrays_are_stored_where_there_is_a_start(tmp_path: Path) -> None:
    plan = plan_of(tna.presets.lora(3, start="pissa"))
    file = file_of(plan, arrays=plan.init(), trained=[LEFT])
    assert file.left_out == ()
    assert reloaded(file, tmp_path).trained == (LEFT,)


@pytest.mark.law("bad-tensors")
def test_arrays_of_a_start_that_do_not_belong() -> None:
    plan = plan_of(tna.presets.lora(3, start="given"))
    usual = tna.UpdatePlan(tna.presets.lora(3), START_SHAPES)
    with pytest.raises(tna.ShapeError, match=r"unknown: 'start.group0.split0.factor0'"):
        file_of(usual, given={f"start.{LEFT}": np.ones((12, 3), np.float32)})
    with pytest.raises(tna.ShapeError, match=r"start.group0.split0.factor0 has shape \(3, 12\)"):
        file_of(plan, given={f"start.{LEFT}": np.ones((3, 12), np.float32)})
    with pytest.raises(ConfigError, match="activation='tanh' depends on the input, so that the update of a start ca"):
        file_of(plan, activation="tanh")


# -- Files of adapters whose numbers come from elsewhere: small ones cannot ask for much work; what is wrong is named


SOURCE_TARGETS = [tna.Target("m", (6, 4))]
VERSION_TWO = "2ffc9698515f91e310447dd50640563f6c2db5c4050d7908f05933cd22e67b02"
THETA = {"theta": np.ones(3, np.float32)}


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("before", ["one-hot", "signed-one-hot", "normal", "linear"])
@pytest.mark.parametrize("projection", ["identity", "nonlinear"])
def test_a_file_of_theta_is_read_without_forming_what_it_makes(before: str, projection: str, tmp_path: Path) -> None:
    config = tna.Config(rank=1 << 30, projection=projection, before=before, parameters=3)
    began = time.perf_counter()
    assert reloaded(tna.AdapterFile(config, SOURCE_TARGETS, THETA), tmp_path).num_parameters == 3
    assert time.perf_counter() - began < 20.0


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize(
    "settings",
    [
        {"before": "one-hot", "parameters": 3},
        {"sources": {f"factor{m}": Tied(f"term0.split0.factor{m}") for m in range(2)}},
    ],
)
def test_a_small_file_cannot_ask_for_many_arrays(settings: dict[str, Any]) -> None:
    config = tna.Config(rank=1, terms=1 << 15, **settings)
    with pytest.raises(tna.ShapeError, match=r"make 65536 arrays; at most \d+ can come from so few that are stored"):
        tna.AdapterFile(config, SOURCE_TARGETS, THETA)


@pytest.mark.law("allocation-limit")
def test_sources_nested_in_a_file(tmp_path: Path) -> None:
    file = tna.AdapterFile(
        tna.Config(rank=1, sources={"factor1": Scaled(Seeded("normal"), start=1.0)}),
        SOURCE_TARGETS,
        {"group0.split0.factor0": np.zeros((6, 1), np.float32), "group0.split0.factor1.size": np.ones(4, np.float32)},
    )
    tna.save(tmp_path / "adapter.safetensors", file)
    recipe, tensors = forge.parsed((tmp_path / "adapter.safetensors").read_bytes())
    (source,) = recipe["config"]["sources"].values()
    assert source["of"] == {"distribution": "normal", "scale": None, "shared": True, "source": "seeded"}
    for _ in range(40):
        source["of"] = {"of": source["of"], "source": "scaled"}
    (tmp_path / "adapter.safetensors").write_bytes(forge.adapter(recipe, tensors))
    with pytest.raises(tna.FileError, match=r"nested more than 4 deep|nested|deep"):
        tna.load(tmp_path / "adapter.safetensors")


def test_given_arrays_in_a_file(tmp_path: Path) -> None:
    config = tna.Config(rank=1, sources={"factor1": Given()})
    arrays = {"group0.split0.factor0": np.ones((6, 1), np.float64)}
    brought = {"group0.split0.factor1": np.arange(4.0).reshape(4, 1)}
    found = reloaded(tna.AdapterFile(config, SOURCE_TARGETS, arrays, given=brought), tmp_path)
    assert found.given["group0.split0.factor1"].dtype == np.float32
    assert found.arrays["group0.split0.factor0"].dtype == np.float64
    np.testing.assert_array_equal(found.deltas()[0], np.ones((6, 1)) @ np.arange(4.0)[None])
    assert tna.info(tmp_path / "adapter.safetensors")
    with pytest.raises(tna.ShapeError, match=r"missing: 'group0.split0.factor1'"):
        tna.AdapterFile(config, SOURCE_TARGETS, arrays)
    with pytest.raises(tna.ShapeError, match=r"unknown: 'group0.split0.factor0.size'"):
        tna.AdapterFile(config, SOURCE_TARGETS, {**arrays, "group0.split0.factor0.size": np.ones(6)}, given=brought)


# -- Adapter files of several configs: format version 2 ----------------------------------------------------------------


COMPOSITE_TARGETS = [
    tna.Target("a.q", (6, 4), "q", layer="a"), tna.Target("a.v", (5, 4), "v", layer="a"),
    tna.Target("b.q", (6, 4), "q", layer="b"), tna.Target("b.up", (8, 4), "linear", layer="b"),
]  # fmt: skip
CONFIG = CompositeConfig([(P.superlora(2, groups="layer", projection="nonlinear"), 3), (P.lora(3, alpha=6, seed=9), 1)])


def composite(**fields: Any) -> AdapterFile:
    return made(CONFIG, targets=COMPOSITE_TARGETS, arrays=arrays_of(CONFIG, targets=COMPOSITE_TARGETS), **fields)


@pytest.mark.law("file-round-trip", "file-bytes")
def test_a_file_of_several_configs(tmp_path: Path) -> None:
    file, path = composite(model="Net"), tmp_path / "adapter.safetensors"
    tna.save(path, file)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == VERSION_TWO
    found = tna.load(path)
    assert found.config == CONFIG
    # The layers of the part that has groups of layers, and of no other.
    assert [target.layer for target in found.targets] == ["a", "a", "b", ""]
    assert all(np.array_equal(array, found.arrays[name]) for name, array in file.arrays.items())
    assert all(map(np.array_equal, found.deltas(), file.deltas()))
    tna.save(tmp_path / "again.safetensors", found)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    recipe, _ = forge.parsed(path.read_bytes())
    assert (recipe["version"], "config" in recipe) == (2, False)
    assert recipe["parts"] == [
        [{"fold": "hypercube", "groups": "layer", "projection": "nonlinear", "rank": 2}, 3],
        [{"alpha": 6.0, "rank": 3, "seed": 9}, 1],
    ]
    told = tna.info(path)
    assert told["version"] == 2
    assert CompositeConfig.from_dict(told["config"]) == CONFIG
    assert json.loads(json.dumps(told))["config"] == told["config"]


@pytest.mark.law("independent-readers")
def test_parts_are_adapters_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    file = composite()
    tna.save(path, file)
    stored, found, first, group = load_file(path), [], 0, 0
    for settings, count in forge.parsed(path.read_bytes())[0]["parts"]:
        targets = COMPOSITE_TARGETS[first : first + count]
        plan = tna.UpdatePlan(tna.Config.from_dict(settings), [t.shape for t in targets], [t.layer for t in targets])
        arrays = {}
        for name in plan.param_shapes:
            number, rest = re.fullmatch(r"group(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            arrays[name] = stored[f"group{int(number) + group}.{rest}"]
        found += plan.deltas(arrays)
        first, group = first + count, group + plan.num_groups
    assert all(map(np.array_equal, found, file.deltas()))
