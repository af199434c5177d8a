"""LoRA of experts, which PEFT calls target_parameters, and of embeddings, compared with PEFT's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import tnadapt.torch as tt
from tests.torch.test_experts import EXPERTS, IDS, MODELS, made

from .conversions import adapter_on, converted, fill, trained_by_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # It does not count parameters, though it applies the pattern to them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

P = tna.presets
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def saved_by_peft(name: str, folder: Path, **settings: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": [], "target_parameters": BOTH, **settings})
    return trained_by_peft(folder, made(name), config)


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_saved_gives_its_outputs(name: str, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"experts.down_proj": 2}, "target_modules": ["q_proj"]}
    theirs = saved_by_peft(name, tmp_path / "theirs", **settings)
    made(name).save_pretrained(tmp_path / "base")
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert found.exact
    model = made(name)
    base = model(IDS).logits
    adapter = tt.load(model, tmp_path / "ours.safetensors")
    assert sum(target.index is not None for target in adapter.targets) == 16
    assert not torch.allclose(model(IDS).logits, base, atol=1e-2)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    assert tna.convert(tmp_path / "theirs", base=shapes_of(made(name))).file.targets == found.file.targets


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_gives_our_outputs(name: str, tmp_path: Path) -> None:
    model = made(name)
    adapter = tt.attach(model, {EXPERTS: P.lora(3, alpha=5), "qv": P.lora(2)})
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.errors.keys() == {target.name if target.index is None else target.label for target in adapter.targets}
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path / "theirs")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    again = tna.convert(tmp_path / "theirs").file  # by the shapes in the record
    assert {target.label for target in again.targets} == {target.label for target in adapter.targets}


def test_some_experts_of_one_parameter_with_ranks_of_their_own(tmp_path: Path) -> None:
    model = made("mixtral")
    every = tt.find_targets(model, ["layers.1.mlp.experts.down_proj"])
    adapter = tt.attach(model, tna.CompositeConfig([(P.lora(1), 1), (P.lora(3, alpha=2), 1)]), [every[3], every[0]])
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.config is not None
    assert found.config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert found.config["r"] == 3
    theirs = peft.PeftModel.from_pretrained(made("mixtral"), tmp_path / "theirs")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_module_that_peft_takes_for_the_other_order(tmp_path: Path) -> None:
    """Llama 4 stores (in, out) and does not say so: PEFT's factors of it are those of the transposes."""
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 6))
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))
    base = shapes_of(model)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    merged = trained_by_peft(tmp_path, model, config).merge_and_unload().experts.gate_up_proj
    file = converted(tmp_path, base=base)
    assert [(target.index, target.transposed) for target in file.targets] == [(0, True), (1, True)]
    for delta, stored in zip(file.deltas(), merged, strict=True):
        torch.testing.assert_close(torch.tensor(delta), stored.detach().T, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    saved_by_peft("mixtral", tmp_path)
    model = made("mixtral")
    message = r"target_parameters=.* does not store which .* give base= \(--base\), a folder"
    with pytest.raises(tna.FileError, match=message):
        tna.convert(tmp_path)
    with pytest.raises(tna.FileError, match=r"names 'experts\.\w+', .* base has no experts of that name"):
        tna.convert(tmp_path, base={"fc.weight": (3, 4)})
    wrong = {**shapes_of(model), "model.layers.0.mlp.experts.down_proj": (4, 16, 40)}
    wrong["model.layers.0.mlp.experts.gate_up_proj"] = (4, 80, 16)
    with pytest.raises(tna.FileError, match=r"up_proj' has the shape .* in base have \(80, 16\): this is another"):
        tna.convert(tmp_path, base=wrong)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    less = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.base_layer" not in name}
    save_file(less, path)
    with pytest.raises(tna.FileError, match=r"experts' has factors for 1 parameters, and target_parameters names"):
        tna.convert(tmp_path, base=shapes_of(model))
    for name in tensors:
        if "layers.0.mlp.experts.lora_" in name:
            tensors[name] = (tensors[name][:, :6] if "_B" in name else tensors[name][:6]).contiguous()
    save_file(tensors, path)
    with pytest.raises(tna.FileError, match=r"down_proj' have 6 rows and 6 columns, and there are 4 experts"):
        tna.convert(tmp_path, base=shapes_of(model))


def expert(parameter: str = "down_proj", index: int = 1) -> tna.Target:
    return tna.Target("experts", (2, 6, 4), parameter=parameter, index=index)


def test_a_format_alone_takes_lora() -> None:
    found = tna.convert(adapter_on([expert(index=0), expert()], P.lora(1)), to="peft")
    assert (found.kind, found.exact) == ("peft-lora", True)


EMBEDDING, TIED = (tna.Target("embed", (12, 6), "embedding", tied=tied) for tied in ((), ("head.table",)))
NOT_OF_EMBEDDINGS = r"'embed' is an embedding, and apply=.* of it is not written for PEFT"


@pytest.mark.parametrize(
    ("targets", "config", "to", "message"),
    [
        *(
            ([expert()], P.lora(1), to, r"experts\.down_proj\[1\] cannot be converted.*one of the 2 matrices")
            for to in ("peft-lokr", "vllm-lora", "lycoris-lora")
        ),
        ([expert()], P.dora(1), "peft-lora", r"proj\[1\]' is one of the matrices .* apply='magnitude' of it is not"),
        ([expert("weight")], P.lora(1), "peft-lora", "'experts' has parameters weight, and it is unknown in which ord"),
        (
            [expert("up_proj", 0), tna.Target("fc", (4, 6), transposed=True)], P.lora(1), "peft-lora",
            r"'fc' is stored as \(in, out\), which PEFT .* refuses for experts",
        ),
        *(
            ([EMBEDDING], P.lora(2), to, "'embed' is an embedding, and .* has no .* of such a layer: convert to")
            for to in ("peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full")
        ),
        ([EMBEDDING], P.dora(2), "peft-lora", NOT_OF_EMBEDDINGS),
        ([EMBEDDING], P.hira(2), "peft-lora", NOT_OF_EMBEDDINGS),
        ([TIED], P.lora(2), "peft-lora", r"embed\.weight .* updated together with head\.table, to which it is tied"),
    ],
)  # fmt: skip
def test_experts_and_embeddings_that_cannot_be_written_are_named(
    targets: list[tna.Target], config: tna.Config, to: str, message: str
) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(adapter_on(targets, config), to=to)


TOKENS = torch.tensor([[3, 0, 11, 3], [7, 2, 3, 9]])


def test_fan_in_fan_out_is_not_said_of_embeddings_and_convolutions(tmp_path: Path) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(12, 6), transformers.pytorch_utils.Conv1D(8, 6)
            self.conv = torch.nn.Conv1d(8, 8, 2)

        def forward(self, ids: Any) -> Any:
            return self.conv(self.fc(self.embed(ids)).mT)

    config = peft.LoraConfig(r=3, target_modules=["embed", "fc", "conv"], fan_in_fan_out=True)
    theirs = trained_by_peft(tmp_path / "theirs", Mixed(), config)
    base = {"embed": (12, 6), "fc": (6, 8), "conv": (8, 8, 2)}
    for known in (None, base):
        file = converted(tmp_path / "theirs", tmp_path / "ours.safetensors", base=known, overwrite=True)
        transposed = {target.module: target.transposed for target in file.targets}
        assert transposed == {"embed": False, "fc": True, "conv": False}
        model = Mixed()
        tt.load(model, tmp_path / "ours.safetensors")
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-5, atol=1e-5)
    # And back, where PEFT's one setting is that of the Conv1D.
    back = tna.convert(tmp_path / "ours.safetensors", tmp_path / "back", to="peft-lora")
    assert back.config is not None
    assert back.config["fan_in_fan_out"] is True
    assert {target.module: target.transposed for target in converted(tmp_path / "back").targets} == transposed
