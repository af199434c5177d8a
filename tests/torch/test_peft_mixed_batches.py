"""PEFT's ``adapter_names=`` with the plug-in: forward, generate with caches and beams, saved modules, PEFT's checks."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.torch.peft import TnadaptConfig

from .test_peft import LORA, SUPERLORA, adapted, ids, llama, seeded, stir

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NAMES = ["default", "__base__", "other", "default"]
#: Settings of the second adapter, next to the first with a map F.
OTHERS: dict[str, dict[str, Any]] = {
    "lora": LORA, "superlora": SUPERLORA, "lokr": {"preset": "lokr", "settings": {"rank": 2}},
    "dora": {"preset": "dora", "settings": {"rank": 2}}, "hira": {"preset": "hira", "settings": {"rank": 2}},
}  # fmt: skip


def two(kind: str, other: str = "lora", model: Any = None, task: str = "CAUSAL_LM") -> Any:
    made = stir(adapted(kind, model, **LORA), 1)
    made.add_adapter("other", TnadaptConfig(task_type=task, **OTHERS[other]))
    return stir(made, 2, "other").eval()


@torch.no_grad()
def alone(model: Any, name: str, call: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    return call(model)


@pytest.mark.parametrize("other", OTHERS)
def test_forward(other: str) -> None:
    model = two("llama", other)
    with torch.no_grad():
        found = model(input_ids=ids(), adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda model: model(input_ids=ids()).logits)
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], alone(model, "other", lambda model: model(input_ids=ids()).logits)[0])


def test_the_weights_of_active_and_inactive_adapters() -> None:
    model = two("llama")
    handles = tt.adapters(model)
    handles["default"].set_weight(0.5)
    expected = alone(model, "default", lambda model: model(input_ids=ids()).logits)
    model.set_adapter("other")
    with torch.no_grad():
        found = model(input_ids=ids(), adapter_names=["default", "other"] * 2).logits
    torch.testing.assert_close(found[::2], expected[::2], rtol=1e-4, atol=1e-5)


def test_saved_modules() -> None:
    """Each sample has its adapter's own classifier."""
    model = two("bert", task="SEQ_CLS")
    with torch.no_grad():
        found = model(input_ids=ids(), adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda model: model(input_ids=ids()).logits)
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "no cache", "sequences"],
)
def test_generate(settings: dict[str, Any]) -> None:
    model = two("llama", "superlora")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    mask = torch.ones_like(ids())

    def call(model: Any, **more: Any) -> Any:
        return model.generate(input_ids=ids(), attention_mask=mask, **settings, **more)

    found = call(model, adapter_names=NAMES).unflatten(0, (4, -1))
    several = {name: alone(model, name, call).unflatten(0, (4, -1)) for name in dict.fromkeys(NAMES)}
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], several[name][row])
    assert len({several[name][0].tolist().__repr__() for name in several}) == 3


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_of_an_encoder_and_a_decoder(beams: int) -> None:
    """With beams the encoder sees each sample once, and the decoder every beam."""
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = BartConfig(
        **sizes, **layers, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    base = seeded(0, lambda: BartForConditionalGeneration(config))
    model = two("llama", "superlora", base, "SEQ_2_SEQ_LM")
    for seed in range(20):
        stir(stir(model, seed), 100 + seed, "other")

    def call(model: Any, **more: Any) -> Any:
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, num_beams=beams, **more,
        )  # fmt: skip

    found = call(model, adapter_names=NAMES)
    several = {name: alone(model, name, call) for name in dict.fromkeys(NAMES)}
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], several[name][row])
    assert not torch.equal(several["default"], several["other"])


def test_rows_of_a_model_without_peft() -> None:
    """``tnadapt.torch.rows`` around ``generate``, for GPT-2, whose fused weight is stored transposed."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=50, bos_token_id=1, eos_token_id=2)
    model = seeded(0, lambda: GPT2LMHeadModel(config))
    generator = torch.Generator().manual_seed(0)
    for name, preset in (("a", tna.presets.lora(2)), ("b", tna.presets.superlora(2))):
        with torch.no_grad():
            for parameter in tt.attach(model, preset, name=name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    names: list[str | None] = ["a", None, "b", "b"]

    def call(number: int = 1) -> Any:
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, min_new_tokens=6,
            pad_token_id=0, num_beams=number, num_return_sequences=number,
        )  # fmt: skip

    for number in (1, 2):
        with tt.rows(model, names):
            found = call(number).unflatten(0, (4, -1))
        for row, name in enumerate(names):
            tt.mix(model, {} if name is None else {name: 1.0})
            assert torch.equal(found[row], call(number).unflatten(0, (4, -1))[row])


def test_it_is_peft_s_own_mixed_batch() -> None:
    """The same arrays give the outputs of PEFT's LoRA for the same ``adapter_names``."""
    theirs = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    theirs.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    ours = two("llama")
    for name, handle in tt.adapters(ours).items():
        for index, target in enumerate(handle.targets):
            layer = theirs.base_model.model.get_submodule(target.module)
            with torch.no_grad():
                arrays = handle.arrays()
                layer.lora_B[name].weight.copy_(arrays[f"group{index}.split0.factor0"])
                layer.lora_A[name].weight.copy_(arrays[f"group{index}.split0.factor1"].T)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids(), adapter_names=NAMES).logits
        torch.testing.assert_close(ours(input_ids=ids(), adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["default"] * 3, "Length of `adapter_names` should be the same as the number of inputs, but got 3 and 4"),
        (["default", "x", "y", "x"], r"Trying to infer with non-existing adapter\(s\): x, y"),
        ("default", "adapter_names must be a list with a name for each sample; got 'default'"),
        ([None] * 4, r"non-existing adapter\(s\): None"),
    ],
)
def test_names_that_peft_refuses(names: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        two("llama")(input_ids=ids(), adapter_names=names)


def test_training_and_merged_adapters_are_refused_as_by_peft() -> None:
    model = two("llama")
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(input_ids=ids(), adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(input_ids=ids(), adapter_names=NAMES)
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():
        # PEFT ignores names while adapters are disabled.
        assert torch.equal(model(input_ids=ids(), adapter_names=NAMES).logits, model(input_ids=ids()).logits)
