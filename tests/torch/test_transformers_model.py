"""What transformers' models do with adapters: saving as a whole, and what the Trainer asks of quantized ones."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tnadapt.torch import adapters, attach

from .small import stir


@pytest.fixture
def hf() -> Any:
    return importlib.import_module(".hugging_face", __package__)


def test_saving_a_model_whole_warns_and_says_what_to_do(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    attach(model, name="words")
    with pytest.warns(UserWarning, match="save_pretrained writes the whole") as caught:
        model.save_pretrained(tmp_path)
    (warning,) = caught
    assert str(warning.message) == (
        "save_pretrained writes the whole BertForSequenceClassification, with the arrays of adapter 'words' beside the "
        "unchanged base: from_pretrained will load the base without its effect. To save the adapter alone, call "
        "tnadapt.torch.adapters(model)['words'].save_pretrained(folder). To save the changed model, call merge() of "
        "the adapter first. For a Trainer's checkpoints, call tnadapt.torch.adapter_checkpoints(trainer) before train()"
    )
    assert warning.filename == __file__
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_merged_model_or_its_copy_is_saved_as_an_ordinary_one(hf: Any, tmp_path: Path, copied: Any) -> None:
    model, words = hf.bert().eval(), torch.arange(4, 12).view(1, 8)
    names, base = list(model.state_dict()), model(words).logits
    attach(model)
    other = copied(model)
    adapter = adapters(other)["default"]
    stir(adapter, 0.1)
    adapter.merge()
    other.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(loaded(words).logits, other(words).logits)
    adapter.unmerge()
    if other is not model:
        assert torch.equal(model(words).logits, base)


def test_without_adapters_nothing_is_left_and_with_them_a_quantized_model_is_trained(hf: Any, tmp_path: Path) -> None:
    validate = pytest.importorskip("transformers.trainer_utils").validate_quantization_for_training
    model = hf.bert()
    # As the model of a GGUF file is: its weights are dequantized, and it counts as quantized.
    model.is_quantized = True
    before = set(model.__dict__)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate(model)
    one = attach(model, name="a")
    validate(model)
    # It is not saved in PEFT's format.
    with pytest.warns(UserWarning, match="from_pretrained will load the base without its effect"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "adapter_config.json").exists()
    validate(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    other = attach(model, name="b")
    one.detach()
    assert "save_pretrained" in model.__dict__
    validate(model)
    other.detach()
    assert set(model.__dict__) == before
    for twin in twins:
        validate(twin)
        adapters(twin)["a"].detach()
    for bare in (model, *twins):
        with pytest.raises(ValueError, match="attach trainable adapters"):
            validate(bare)
        bare.save_pretrained(tmp_path)  # without a warning
    # The mark of transformers' own adapters stays, and a method of the instance is left alone.
    model._hf_peft_config_loaded = True
    attach(model).detach()
    assert model._hf_peft_config_loaded
    own = model.save_pretrained = lambda folder: None
    attach(model).detach()
    assert model.save_pretrained is own
