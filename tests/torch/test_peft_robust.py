"""The PEFT plug-in under interrupts, failing merges, unusable names, and with handles that PEFT manages."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from torch import nn

import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tnadapt.errors import ConfigError, TargetError
from tnadapt.torch.peft import TnadaptConfig

from .interrupts import interrupted, moments

#: The modules in which PEFT's calls are interrupted; what the handles do otherwise is in test_interrupted.py.
TUNER, REGISTRY, HANDLE = (
    str(Path(tt.__file__).with_name("peft") / "_tuner.py"),
    *(str(Path(tt.__file__).with_name(name)) for name in ("_registry.py", "_adapter.py")),
)

plugin.register()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q_proj, self.v_proj, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.q_proj(x)) + self.v_proj(x))


def config(**more: Any) -> TnadaptConfig:
    return TnadaptConfig(**{"target_modules": ["q_proj", "v_proj"], "init_weights": False, **more})


def made(*names: str, **more: Any) -> PeftModel:
    """Return a model with these adapters, which have different updates."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(Net(), config(**more), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config(**more))
    return model


X = torch.linspace(-1, 1, 24).view(3, 8)


def run(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(X)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# -- Deletion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["b", "default"])
def test_deletion_and_an_unknown_name_freeze_and_unfreeze_nothing(active: str) -> None:
    model = made("b")
    model.add_adapter("default", config(modules_to_save=["head"]))
    model.add_adapter("c", config())
    model.set_adapter(active)
    before = trainable(model)
    assert any("modules_to_save.default" in name for name in before) == (active == "default")
    with pytest.raises(TargetError, match="no tnadapt adapter 'd' on this model; there are: 'b', 'default', 'c'"):
        model.base_model.set_adapter("d")
    assert trainable(model) == before
    arrays = model.base_model.tnadapt.tnadapt_arrays["c"]
    assert len(arrays) == 2
    model.delete_adapter("c")
    assert trainable(model) == before
    # It leaves no name in its dictionary.
    assert len(arrays) == len(list(arrays.parameters())) == 0
    # The last one gives back what was trainable.
    model = made("b", "c")
    for name in "cb":
        model.delete_adapter(name)
    assert trainable(model.base_model.model) == [name for name, _ in Net().named_parameters()]


# -- Merging ---------------------------------------------------------------------------------------


def both() -> PeftModel:
    model = made("default", "b")
    model.base_model.set_adapter(["default", "b"])
    return model


@pytest.mark.parametrize("progressbar", [False, True])
def test_merging_shows_its_progress_if_asked(progressbar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    made("default").merge_and_unload(progressbar=progressbar)
    assert ("Unloading and merging model" in capsys.readouterr().err) == progressbar


@pytest.mark.parametrize("way", ["merge_adapter", "unmerge_adapter"])
def test_interrupted_at_any_line_a_merge_did_not_happen_and_an_unmerge_can_be_repeated(way: str) -> None:
    def prepared() -> PeftModel:
        model = both()
        if way == "unmerge_adapter":
            model.merge_adapter()
        return model

    weight, expected = both().get_base_model().q_proj.weight, run(both())
    for stop in moments(getattr(prepared(), way), TUNER):
        model = prepared()
        interrupted(getattr(model, way), stop, TUNER)
        if model.base_model.tnadapt.merged:
            assert way == "unmerge_adapter"
            model.unmerge_adapter()
        assert torch.equal(model.get_base_model().q_proj.weight, weight), stop
        assert torch.equal(run(model), expected), stop


# -- Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        *(
            (name, {}, f"cannot be called '{name}': its arrays are kept in an nn.ModuleDict")
            for name in ("keys", "items", "values", "type", "training", "forward", "_modules", "v1.0")
        ),
        ("b", {"trained": ["group9.core"]}, r"'group9.core'\] of the config are not arrays of adapter 'b', which has"),
    ],
)
def test_what_cannot_be_added_is_refused(name: str, settings: dict[str, Any], text: str) -> None:
    error = ConfigError if name == "b" else TargetError
    model = made("default")
    before, expected, state = trainable(model), run(model), list(model.state_dict())
    with pytest.raises(error, match=text):
        model.add_adapter(name, config(**settings))
    assert list(model.peft_config) == list(tt.adapters(model)) == list(model.base_model.tnadapt.handles) == ["default"]
    assert torch.equal(run(model), expected)
    assert (trainable(model), list(model.state_dict())) == (before, state)
    assert type(model.get_base_model().head) is nn.Linear
    net = Net()
    with pytest.raises(error, match=text):
        get_peft_model(net, config(**settings), adapter_name=name)
    assert trainable(net) == list(net.state_dict()) == list(Net().state_dict())


# -- Interrupts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [TUNER, REGISTRY, HANDLE], ids=["tuner", "registry", "handle"])
def test_adding_an_adapter_interrupted_at_any_line_adds_it_or_nothing(below: str) -> None:
    def add(model: PeftModel) -> None:
        model.add_adapter("b", config())

    first = made("default")
    before, expected, state = trainable(first), run(first), list(first.state_dict())
    stops = moments(lambda: add(made("default")), below)
    if below == TUNER:
        stops = stops[3:]  # until the tuner is in its try block, the name that PEFT has entered stays
    for stop in stops:
        model = made("default")
        interrupted(functools.partial(add, model), stop, below)
        assert torch.equal(run(model), expected)
        assert trainable(model) == before, stop
        layer = model.base_model.tnadapt
        names = list(model.peft_config)
        assert names == list(tt.adapters(model)) == list(layer.handles) == list(layer.tnadapt_arrays), stop
        if names == ["default"]:
            assert list(model.state_dict()) == state, stop
            add(model)
        model.set_adapter("b")
        model(X).sum().backward()
        assert all(array.grad is not None for array in tt.adapters(model)["b"].parameters()), stop


# -- Handles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["detach", "bake"])
def test_a_handle_is_not_taken_off_behind_the_back_of_peft(way: str) -> None:
    model = made("default", "b")
    expected = run(model)
    handle = tt.adapters(model)["default"]
    text = (
        rf"{way}\(\) is refused: they belong to a PEFT model; call its delete_adapter\('default'\), unload\(\) or merge"
    )
    with pytest.raises(TargetError, match=text):
        getattr(handle, way)()
    assert not handle.merged
    assert torch.equal(run(model), expected)
    assert "attached" in repr(model)
    model.set_adapter("b")
    model.delete_adapter("default")
    assert list(tt.adapters(model)) == ["b"]
    with pytest.raises(TargetError, match="no longer attached to its model"):
        getattr(handle, way)()


# -- What is trained -------------------------------------------------------------------------------


def test_what_set_trainable_chose_is_in_the_files(tmp_path: Path) -> None:
    model = made("default")
    handle = tt.adapters(model)["default"]
    handle.set_trainable(arrays="factor1")
    expected = run(model)
    model.save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["trained"] == list(handle.trained or ())
    assert "next" not in (tmp_path / "one/adapter_config.json").read_text()
    assert model.peft_config["default"].trained is None
    for low in (False, True):
        again = PeftModel.from_pretrained(Net(), tmp_path / "one", is_trainable=True, low_cpu_mem_usage=low)
        assert tt.adapters(again)["default"].trained == handle.trained
        assert torch.equal(run(again), expected)
        assert trainable(again) == trainable(model)
    tt.adapters(again)["default"].set_trainable()
    again.save_pretrained(tmp_path / "all")
    assert "trained" not in json.loads((tmp_path / "all/adapter_config.json").read_text())
    last = PeftModel.from_pretrained(Net(), tmp_path / "all", is_trainable=True)
    assert tt.adapters(last)["default"].trained is None


@pytest.mark.parametrize("array", ["group0.split0.factor0", "group0.split0.factor1"])
def test_a_fresh_adapter_with_chosen_arrays_can_learn(array: str) -> None:
    model = get_peft_model(Net(), config(init_weights=True, trained=[array]))
    assert torch.equal(run(model), run(Net()))
    model(X).sum().backward()
    (parameter,) = tt.adapters(model)["default"].parameters()
    assert parameter.grad is not None
    assert parameter.grad.any()
