"""Names that transformers gives modules on disk: as it saves them, for every architecture, and only if they exist."""

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
from tnadapt.checkpoints import stored_weights
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.stored_weights import ModuleNames, resolve
from tnadapt.targets.prefixes import Prefix, renamed_targets

pytestmark = pytest.mark.filterwarnings("ignore")

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
QUERY = "vit.layers.0.attention.q_proj"
ON_DISK = "vit.encoder.layer.0.attention.attention.query"


def stored(folder: Path, names: dict[str, tuple[int, ...]]) -> Path:
    cp.write(folder, {name: ("F32", np.ones(shape, "<f4")) for name, shape in names.items()})
    (folder / "config.json").write_text(json.dumps(VIT))
    return folder


def known(**names: list[str]) -> Any:
    return lambda name: [name, *(f"{other}.weight" for other in names.get(name.removesuffix(".weight"), []))]


def test_other_names_are_taken_if_exactly_one_choice_fits() -> None:
    targets = [tna.Target("a", (4, 4)), tna.Target("b", (4, 6))]
    names = known(a=["x", "y"], b=["z"])
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


@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": 3, "architectures": [None]}, {"architectures": 5}, {"a": [{"model_type": "vit"}]}],
)
def test_a_config_that_names_no_model_has_no_other_names(config: Any) -> None:
    assert ModuleNames(config).of("layers.0.q.weight") == ["layers.0.q.weight"]


def test_deep_configs_and_names_take_no_time() -> None:
    config: dict[str, Any] = dict(VIT)
    for _ in range(10_000):
        config = {"part": config, "other": {}}
    assert ModuleNames(config).of("a") == ["a"]
    pytest.importorskip("transformers")
    long = ".".join(["layers"] * 10_000)
    assert ModuleNames(VIT).of(long) == [long]


def test_without_transformers_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "_installed", lambda: False)
    base = stored(tmp_path, {f"{ON_DISK}.weight": (6, 4)})
    file = cp.adapter(tna.presets.lora(1), [tna.Target("vit.layers.0.mlp.fc1", (6, 4))])
    with pytest.raises(tna.FileError, match=r"'vit\.layers\.0\.mlp\.fc1\.weight'.*install transformers, whose table"):
        resolve(open_checkpoint(base), file)
    with pytest.raises(tna.TargetError, match=r"no module 'vit\.layers\.0\.mlp\.fc1'; it has .*install transformers"):
        tna.convert(file, to="peft-lora", base=base)


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
    base = stored(tmp_path, there)
    kept = {f"{fc[0]}.bias": np.zeros(8, np.float32)}
    targets = [tna.Target(QUERY, (6, 4), "q"), tna.Target(fc[0], (8, 6))]
    found = resolve(open_checkpoint(base), cp.adapter(tna.presets.lora(1), targets, kept=kept))
    assert [target.name for target in found.targets] == list(there)[:2]
    assert (found.kept, found.added) == ({f"{fc[0]}.bias": f"{fc[1]}.bias"}, {})
    assert found.how == "weights under the names that transformers gives them on disk"


def test_the_table_is_read_once_for_all_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets have the names on disk, and the checkpoints those of the modules."""
    pytest.importorskip("transformers")
    here = [QUERY.replace("0", str(layer)) for layer in range(20)]
    targets = [tna.Target(ON_DISK.replace("0", str(layer)), (6, 4), "q") for layer in range(20)]
    asked = list[str]()
    names_of = ModuleNames.of
    monkeypatch.setattr(ModuleNames, "of", lambda self, name: asked.append(name) or names_of(self, name))
    base = stored(tmp_path, {f"{path}.weight": (6, 4) for path in here})
    found = tna.extract(base, base, tna.presets.lora(1), targets)
    assert found.file.targets == tuple(targets)
    assert len(asked) <= 4 * len(targets)


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
