"""The resolver against vLLM's own classes where it is installed, and against its interface everywhere."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import logging
import sys
import tomllib
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.serving import ServedFolder, register_vllm_resolver, vllm_resolver

from .adapters import SHAPES, adapter, complete, saved_model, tiny

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Request:
    """The fields of vLLM's LoRARequest that are used."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class Resolver(abc.ABC):
    """vLLM's interface."""

    @abc.abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Request | None: ...


class Registered:
    """vLLM's registry of resolvers."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Resolver] = {}

    def register_resolver(self, resolver_name: str, resolver: Resolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Registered:
    """vLLM's modules, with nothing in them but the interface."""
    registry = Registered()
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": Resolver, "LoRAResolverRegistry": registry},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return registry


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    saved_model(tmp_path / "base")
    tna.save(tmp_path / "adapters" / "tiny.safetensors", tiny())
    tna.save(tmp_path / "adapters" / "wide.safetensors", adapter(tna.presets.dense()))
    return tmp_path


def resolved(place: Path, name: str) -> Any:
    resolver = vllm_resolver(ServedFolder(place / "adapters", place / "cache"))
    return asyncio.run(resolver.resolve_lora(str(place / "base"), name))


def test_it_answers_with_a_folder_of_peft(interface: Registered, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = resolved(place, "tiny")
    assert isinstance(request, Request)
    assert (request.lora_name, request.lora_int_id > 0) == ("tiny", True)
    assert Path(request.lora_path, "adapter_config.json").is_file()
    assert resolved(place, "tiny") == request
    tna.save(place / "adapters" / "users.safetensors", tna.PopulationFile.from_members([tiny()], ["user@example.com"]))
    assert resolved(place, "user@example.com") == dataclasses.replace(request, lora_name="user@example.com")
    assert resolved(place, "nobody") is None
    assert resolved(place, "../base/model") is None
    with caplog.at_level(logging.ERROR):
        assert resolved(place, "wide") is None
    assert "the adapter 'wide' cannot be served as LoRA: the update of 'model.layers.0.self_attn.q_proj'" in caplog.text


def test_it_is_registered_only_if_a_folder_is_named(
    interface: Registered, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TNADAPT_VLLM_ADAPTERS", raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vllm", None)  # its import would fail
        register_vllm_resolver()
    assert interface.resolvers == {}
    monkeypatch.setenv("TNADAPT_VLLM_ADAPTERS", str(place / "adapters"))
    monkeypatch.setenv("TNADAPT_VLLM_BASE", str(place / "base"))
    monkeypatch.delenv("TNADAPT_VLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "user"))
    for _ in range(2):  # vLLM may load plug-ins several times
        register_vllm_resolver()
    (resolver,) = interface.resolvers.values()
    found = asyncio.run(resolver.resolve_lora("org/model", "tiny"))
    assert found is not None
    assert Path(found.lora_path).parent == place / "user" / "tnadapt" / "vllm"
    monkeypatch.setenv("TNADAPT_VLLM_ADAPTERS", str(place / "nowhere"))
    with pytest.raises(tna.FileError, match="nowhere is not a folder: create it"):
        register_vllm_resolver()


def test_vllm_finds_it_by_its_entry_point() -> None:
    pyproject = ROOT / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("the project's own files are not in this copy")
    points = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points["vllm.general_plugins"] == {"tnadapt": "tnadapt.serving:register_vllm_resolver"}


def vllm(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"vllm.{module}", exc_type=ImportError)


def test_vllms_server_asks_the_resolver_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The class behind vLLM's routes, with an engine that only notes what it is given."""
    resolver_module, serving = vllm("lora.resolver"), vllm("entrypoints.openai.models.serving")
    request_module = vllm("lora.request")
    monkeypatch.setenv("TNADAPT_VLLM_ADAPTERS", str(place / "adapters"))
    monkeypatch.setenv("TNADAPT_VLLM_CACHE", str(place / "cache"))
    registry = resolver_module.LoRAResolverRegistry
    monkeypatch.setattr(registry, "resolvers", {})
    register_vllm_resolver()
    assert registry.get_supported_resolvers() == {"tnadapt"}
    loaded: list[Any] = []

    async def add_lora(request: Any) -> bool:
        loaded.append(request)
        return True

    engine = types.SimpleNamespace(
        model_config=types.SimpleNamespace(model=str(place / "base"), max_model_len=8), renderer=None,
        input_processor=None, add_lora=add_lora,
    )  # fmt: skip
    models = serving.OpenAIServingModels(engine, [])

    async def ask() -> list[Any]:
        return [await models.resolve_lora(name) for name in ("tiny", "tiny", "wide", "nobody")]

    first, again, wide, nobody = asyncio.run(ask())
    assert first is again
    assert isinstance(first, request_module.LoRARequest)
    assert [Path(request.lora_path).parent for request in loaded] == [place / "cache"]
    assert [one.error.code for one in (wide, nobody)] == [404, 404]
    assert "the adapter 'wide' cannot be served as LoRA" in caplog.text


@pytest.mark.parametrize("config", [None, tna.presets.lora(3, alpha=5), tna.presets.lotr(2, groups="role")])
def test_vllm_itself_loads_what_is_resolved(
    config: tna.Config | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper_module, model_module = vllm("lora.peft_helper"), vllm("lora.lora_model")
    config_module = vllm("config.lora")
    monkeypatch.setattr(model_module, "PIN_MEMORY", False, raising=False)  # pages are locked for a GPU alone
    file = tiny() if config is None else adapter(config)
    tna.save(place / "adapters" / "own.safetensors", file)
    found = resolved(place, "own")
    helper = helper_module.PEFTHelper.from_local_dir(found.lora_path, None)
    helper.validate_legal(config_module.LoRAConfig(max_lora_rank=8))
    model = model_module.LoRAModel.from_local_checkpoint(
        found.lora_path, {"q_proj", "v_proj"}, helper, lora_model_id=found.lora_int_id, device="cpu"
    )
    assert set(model.loras) == set(SHAPES)
    for target, delta in zip(file.targets, complete(file).deltas(), strict=True):
        own = model.loras[target.module]
        assert own.rank == 8
        got = own.scaling * own.lora_b.double().numpy() @ own.lora_a.double().numpy()
        np.testing.assert_allclose(got, delta, rtol=0, atol=1e-6 * float(np.abs(delta).max()))


def test_vllm_itself_loads_an_embedding(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper_module, model_module = vllm("lora.peft_helper"), vllm("lora.lora_model")
    monkeypatch.setattr(model_module, "PIN_MEMORY", False, raising=False)
    target = tna.Target("model.embed_tokens", (48, 40), "embedding")
    plan = tna.UpdatePlan(tna.presets.lora(2, alpha=3), [target.shape])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    tna.convert(tna.AdapterFile(plan.config, [target], arrays), place / "out", to="vllm")
    model = model_module.LoRAModel.from_local_checkpoint(
        str(place / "out"), {"embed_tokens"}, helper_module.PEFTHelper.from_local_dir(str(place / "out"), None),
        lora_model_id=1, device="cpu", model_vocab_size=48,
    )  # fmt: skip
    own = model.loras["model.embed_tokens"]
    # Its layer looks tokens up in the transpose of lora_a, and multiplies by lora_b.
    got = own.scaling * own.lora_a.double().numpy().T @ own.lora_b.double().numpy().T
    delta = plan.delta({name: array.astype("f8") for name, array in arrays.items()}, 0)
    np.testing.assert_allclose(got, delta, rtol=0, atol=1e-6 * float(np.abs(delta).max()))
