"""What a Trainer with adapter_checkpoints uploads to the hub, with the hub's functions replaced."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tnadapt as tna
import tnadapt.torch as tt

# The functions of transformers that reach the hub.
HUB = importlib.import_module("transformers.trainer")


@pytest.fixture
def hf() -> Any:
    return importlib.import_module(".hugging_face", __package__)


class Hub:
    """Keeps a copy of each upload."""

    def __init__(self, root: Path) -> None:
        self.root, self.uploads = root, 0

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: str, ignore_patterns: Any = None, **settings: Any) -> Any:
        self.uploads += 1
        shutil.copytree(folder_path, self.root / str(self.uploads), ignore=shutil.ignore_patterns("checkpoint-*"))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(HUB, "hf_api", lambda *args, **kwargs: made)
    return made


def trainer_of(hf: Any, folder: Path, **settings: Any) -> Any:
    """Return a Trainer for a BERT that comes from a folder."""
    hf.bert().save_pretrained(folder / "secret" / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "secret" / "base")
    tt.attach(model, "lora", rank=2, keep_trainable="classifier")
    made = hf.trainer_of(model, folder / "out", max_steps=2, save_strategy="steps", save_steps=1, **settings)
    tt.adapter_checkpoints(made)
    return made


def test_the_end_of_training(hf: Any, hub: Hub, tmp_path: Path) -> None:
    trainer = trainer_of(hf, tmp_path, hub_model_id="user/mine")
    trainer.train()
    trainer.push_to_hub(dataset_tags="imdb", license="mit")
    uploaded = hub.root / str(hub.uploads)
    file = tna.load(uploaded / "adapter.safetensors")
    assert not any("secret" in path.read_bytes().decode(errors="replace") for path in uploaded.glob("adapter*"))
    assert file.pretrained is not None
    assert (file.pretrained.name, file.pretrained.task) == ("", "text-classification")
    card = (uploaded / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    assert "library_name: tnadapt\n" in head
    assert "license: mit\n" in head
    assert "- imdb\n" in head
    assert "tags:\n- tnadapt\n- generated_from_trainer\n" in head
    assert 'tnadapt.torch.load_pretrained("user/mine", base="…")' in body
    assert "### Training hyperparameters" in body
    assert "This model is" not in body
    assert "secret" not in card


def test_several_adapters_during_training(hf: Any, hub: Hub, tmp_path: Path) -> None:
    trainer = trainer_of(hf, tmp_path, hub_model_id="user/mine", push_to_hub=True, hub_strategy="every_save")
    tt.attach(trainer.model, "lora", rank=1, name="b")
    trainer.train()
    assert hub.uploads == 2
    for name in ("default", "b"):
        first, last = (tna.load(hub.root / number / name / "adapter.safetensors") for number in "12")
        array = next(iter(first.arrays))
        assert (first.arrays[array] != last.arrays[array]).any()
    assert {path.parent.name for path in (hub.root / "2").rglob("*.safetensors")} == {"default", "b"}


def test_cards_of_others(hf: Any, tmp_path: Path) -> None:
    """That of somebody else stays; without an adapter it is the Trainer's."""
    trainer = trainer_of(hf, tmp_path)
    card = tmp_path / "out" / "README.md"
    card.parent.mkdir(exist_ok=True)
    card.write_text("# mine\n")
    trainer.save_model()
    assert card.read_text() == "# mine\n"
    card.unlink()
    trainer.save_model()
    assert "library_name: tnadapt" in card.read_text()
    tt.adapters(trainer.model)["default"].detach()
    trainer.create_model_card(model_name="mine")
    assert "library_name: transformers" in card.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*attention implementation.*:UserWarning")
def test_a_card_of_trl(hf: Any, hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tiny = importlib.import_module(".tiny_language_model", __package__)
    model = tiny.llama()
    tt.attach(model, "lora", rank=2)
    arguments = trl.SFTConfig(**tiny.settings(tmp_path / "out", hub_model_id="user/mine", save_strategy="steps"))
    data = datasets.Dataset.from_list([{"text": "w1 w2 w3"}] * 4)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tiny.tokenizer())
    tt.adapter_checkpoints(trainer)
    trainer.train()
    trainer.push_to_hub()
    card = (hub.root / "1" / "README.md").read_text()
    assert "library_name: tnadapt\n" in card
    assert "- sft\n" in card
    assert "pipeline(" not in card
    assert "This model was trained with SFT." in card
    assert (
        tt.adapters(model)["default"].num_parameters == tna.load(hub.root / "1" / "adapter.safetensors").num_parameters
    )
