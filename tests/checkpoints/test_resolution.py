"""Weights of a model in a checkpoint: found by names, with a prefix, by role, under transformers' names, or not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.depth import LONG
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.targets.prefixes import Prefix, renamed_targets

from .internals import stored_weights

ModuleNames, resolve = stored_weights.ModuleNames, stored_weights.resolve

P, T = tna.presets, tna.Target


def stored(folder: Path, names: dict[str, tuple[int, ...]]) -> Path:
    return cp.write(folder, {name: ("F32", np.ones(shape, "<f4")) for name, shape in names.items()})


def targets_of(*modules: str, role: str = "q") -> list[tna.Target]:
    return [T(module, (6, 4), role) for module in modules]


def test_one_prefix_more_or_less_is_found_and_an_exact_name_goes_before_it(tmp_path: Path) -> None:
    base = stored(tmp_path, {"q.weight": (6, 4), "model.q.weight": (6, 4), "model.v.weight": (6, 4)})
    for module, name, renamed in (
        ("q", "q.weight", False),
        ("v", "model.v.weight", True),
        ("base.model.v", "model.v.weight", True),
    ):
        file = cp.adapter(P.lora(1), targets_of(module))
        found = resolve(open_checkpoint(base), file)
        assert [(t.name, t.role, t.stored) for t in found.targets] == [(name, "q", (6, 4))]
        assert bool(found.how) == renamed
    names = {f"{side}.{n}.attn.q.weight": (6, 4) for side in ("enc", "dec") for n in (0, 1)}
    with pytest.raises(tna.FileError, match=r"'dec.0.attn.q.weight', 'enc.0.attn.q.weight'.* it is unclear which"):
        resolve(
            open_checkpoint(stored(tmp_path / "two", names)), cp.adapter(P.lora(1), targets_of("0.attn.q", "1.attn.q"))
        )


def test_a_parameter_of_the_model_itself(tmp_path: Path) -> None:
    file = cp.adapter(P.lora(1), [T("", (6, 4), "q", parameter="in_proj_weight")])
    base = stored(tmp_path, {"attn.in_proj_weight": (6, 4)})
    target = resolve(open_checkpoint(base), file).targets[0]
    assert (target.module, target.parameter) == ("attn", "in_proj_weight")


@pytest.mark.law("renamed-modules")
def test_renamed_modules_are_taken_in_order_all_or_none(tmp_path: Path) -> None:
    targets = [T(f"layers.{n}.attention.{role}_proj", (6, 4), role, layer=str(n)) for n in range(11) for role in "qv"]
    file = cp.adapter(P.superlora(2, groups="layer"), targets)
    old = {"q": "query", "v": "value"}
    names = {
        f"encoder.layer.{n}.attention.attention.{name}.weight": (6, 4) for n in range(11) for name in old.values()
    }  # fmt: skip
    found = resolve(open_checkpoint(stored(tmp_path / "old", names)), file)
    assert [target.name for target in found.targets] == [
        f"encoder.layer.{n}.attention.attention.{old[role]}.weight" for n in range(11) for role in "qv"
    ]
    assert [target.layer for target in found.targets] == [target.layer for target in targets]
    assert found.how == "weights of the same roles and shapes under other names"
    for name, change in ((min(names), (6, 5)), (max(names), None)):
        fewer = {**names, name: change} if change else {key: shape for key, shape in names.items() if key != name}
        with pytest.raises(tna.FileError, match="lacks 22 of the adapter's 22 weights"):
            resolve(open_checkpoint(stored(tmp_path / f"not {change}", fewer)), file)


def test_a_trained_part_goes_where_the_weights_went(tmp_path: Path) -> None:
    kept = {"bert.norm.weight": np.ones(4, np.float32), "head.weight": np.ones((2, 4), np.float32)}
    file = cp.adapter(P.lora(1), targets_of("bert.q"), kept=kept)
    found = resolve(open_checkpoint(stored(tmp_path / "a", {"q.weight": (6, 4), "norm.weight": (4,)})), file)
    assert found.kept == {"bert.norm.weight": "norm.weight"}
    assert found.added == {"head.weight": "head.weight"}
    names = {"bert.q.weight": (6, 4), "bert.norm.weight": (4,), "head.weight": (2, 4)}
    found = resolve(open_checkpoint(stored(tmp_path / "b", names)), file)
    assert (found.kept, found.added) == ({name: name for name in kept}, {})
    # In a model that has it inside of another one.
    inner = {"x.bert.q.weight": (6, 4), "x.bert.norm.weight": (4,)}
    found = resolve(open_checkpoint(stored(tmp_path / "c", inner)), file)
    assert found.kept == {"bert.norm.weight": "x.bert.norm.weight"}
    assert found.added == {"head.weight": "x.head.weight"}


def test_a_config_that_cannot_be_read_is_said_only_where_it_is_needed(tmp_path: Path) -> None:
    base = stored(tmp_path, {"q.weight": (6, 4)})
    (base / "config.json").write_text(json.dumps({"limit": float("inf")}))
    assert resolve(open_checkpoint(base), cp.adapter(P.lora(1), targets_of("q"))).how == ""


without_warnings = pytest.mark.filterwarnings("ignore")


VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
QUERY = "vit.layers.0.attention.q_proj"
ON_DISK = "vit.encoder.layer.0.attention.attention.query"


def names_stored(folder: Path, names: dict[str, tuple[int, ...]]) -> Path:
    (stored(folder, names) / "config.json").write_text(json.dumps(VIT))
    return folder


@without_warnings
def test_other_names_are_taken_if_exactly_one_choice_fits() -> None:
    targets = [tna.Target("a", (4, 4)), tna.Target("b", (4, 6))]
    others = {"a.weight": ["x.weight", "y.weight"], "b.weight": ["z.weight"]}

    def names(name: str) -> list[str]:
        return [name, *others.get(name, [])]

    both = {"x.weight": (4, 4), "z.weight": (4, 6)}
    found = renamed_targets(targets, both, names)
    assert found is not None
    assert ([target.name for target in found[0]], found[1]) == (["x.weight", "z.weight"], Prefix())
    found = renamed_targets(targets, {f"model.{name}": shape for name, shape in both.items()}, names)
    assert found is not None
    assert found[1] == Prefix(given="model.")
    assert renamed_targets(targets, {**both, "y.weight": (4, 4)}, names) is None  # either may be a
    assert renamed_targets(targets, {**both, "y.weight": (5, 4)}, names) is not None  # of another shape
    assert renamed_targets(targets, {"x.weight": (4, 4)}, names) is None
    twice = {f"{side}.{name}": shape for side in ("enc", "dec") for name, shape in both.items()}
    assert renamed_targets(targets, twice, names) is None


@without_warnings
@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": 3, "architectures": [None]}, {"architectures": 5}, {"a": [{"model_type": "vit"}]}],
)
def test_a_config_that_names_no_model_has_no_other_names(config: Any) -> None:
    assert ModuleNames(config).of("layers.0.q.weight") == ["layers.0.q.weight"]


@without_warnings
def test_deep_configs_and_names_take_no_time() -> None:
    config: dict[str, Any] = dict(VIT)
    for _ in range(10_000):
        config = {"part": config, "other": {}}
    assert ModuleNames(config).of("a") == ["a"]
    pytest.importorskip("transformers")
    long = ".".join(["layers"] * 10_000)
    assert ModuleNames(VIT).of(long) == [long]


@without_warnings
def test_without_transformers_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "_installed", lambda: False)
    base = names_stored(tmp_path, {f"{ON_DISK}.weight": (6, 4)})
    file = cp.adapter(tna.presets.lora(1), [tna.Target("vit.layers.0.mlp.fc1", (6, 4))])
    with pytest.raises(tna.FileError, match=r"'vit\.layers\.0\.mlp\.fc1\.weight'.*install transformers, whose table"):
        resolve(open_checkpoint(base), file)
    with pytest.raises(tna.TargetError, match=r"no module 'vit\.layers\.0\.mlp\.fc1'; it has .*install transformers"):
        tna.convert(file, to="peft-lora", base=base)


@without_warnings
def test_vit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    names = ModuleNames(VIT)
    assert f"{ON_DISK}.weight" in names.of(f"{QUERY}.weight")
    assert names.inverse([f"{QUERY}.weight"])[f"{ON_DISK}.weight"] == [f"{QUERY}.weight"]
    fc = ("vit.layers.0.mlp.fc1", "encoder.layer.0.intermediate.dense")
    there = {
        "encoder.layer.0.attention.attention.query.weight": (6, 4),
        f"{fc[1]}.weight": (8, 6),
        f"{fc[1]}.bias": (8,),
    }
    base = names_stored(tmp_path, there)
    kept = {f"{fc[0]}.bias": np.zeros(8, np.float32)}
    targets = [tna.Target(QUERY, (6, 4), "q"), tna.Target(fc[0], (8, 6))]
    found = resolve(open_checkpoint(base), cp.adapter(tna.presets.lora(1), targets, kept=kept))
    assert [target.name for target in found.targets] == list(there)[:2]
    assert (found.kept, found.added) == ({f"{fc[0]}.bias": f"{fc[1]}.bias"}, {})
    assert found.how == "weights under the names that transformers gives them on disk"


@without_warnings
def test_of_two_checkpoints_either_may_have_the_names_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    paths = {name: names_stored(tmp_path / name, {f"{name}.weight": (6, 4)}) for name in (QUERY, ON_DISK)}
    for base, tuned in itertools.permutations(paths):
        found = tna.extract(paths[base], paths[tuned], P.dense(), [tuned])
        assert [target.module for target in found.file.targets] == [tuned]
        assert not found.file.deltas()[0].any()


FEW = {"ViTForImageClassification", "LlavaForConditionalGeneration", "SiglipModel", "Dinov2Model", "BertModel"}


def architectures() -> Iterator[tuple[str, str]]:
    """The types and classes of all models that transformers lists, at most two for one type."""
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    tables = [table for name, table in vars(auto).items() if name.endswith("_MAPPING_NAMES")]
    for kind in dict.fromkeys(itertools.chain.from_iterable(tables)):
        names = dict.fromkeys(table[kind] for table in tables if isinstance(table.get(kind), str))
        yield from ((kind, name) for name in (list(names)[:2] if LONG else FEW & names.keys()))


def shallow(config: Any) -> Any:
    """A config with two layers instead of many, so that building takes less time."""
    for name, value in vars(config).items():
        if name.endswith("layers") and isinstance(value, int) and value > 2:
            setattr(config, name, 2)
        elif hasattr(value, "model_type"):
            shallow(value)
    return config


@without_warnings
def test_every_architecture_is_found_as_transformers_saves_it() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    saved_as = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion
    renamed = found = built = 0
    for kind, class_name in architectures():
        try:
            model_class = getattr(transformers, class_name)
            config = shallow(model_class.config_class())
            with torch.device("meta"):
                model = model_class(config)
        except Exception:  # needs another library, or more than a config
            continue
        built += 1
        inside = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
        saved = saved_as(model, dict(inside))
        names = {id(parameter): name for name, parameter in saved.items()}
        table = ModuleNames({**config.to_dict(), "model_type": kind, "architectures": [class_name]})
        for name, parameter in inside.items():
            place = names.get(id(parameter), name)
            if place == name:
                continue
            renamed += 1
            fits = [other for other in table.of(name) if other in saved and saved[other].shape == parameter.shape]
            assert fits in ([], [place]), class_name
            found += len(fits)
    assert built >= (500 if LONG else len(FEW))
    # Of those that are left, the inner model has a class that neither a table nor its config names.
    assert found >= (0.95 * renamed if LONG else renamed) > 0
