"""User models, built here from configs: a local folder through transformers, and timm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

from safetensors import torch as safetensors_torch

from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Choice, Spec, Study, Training, open_problem
from tnadapt.finetune import _inputs as _image_inputs
from tnadapt.finetune._inputs import Images
from tnadapt.finetune.data import Samples

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["good", "bad", "film", "the", "a", "very", "not", "was", "it", "and"]
CHOICE = Choice(presets=("superlora",), ranks=(1,))


def tokenizer_of(folder: Path, words: list[str] = WORDS) -> None:
    transformers.BertTokenizerFast({word: number for number, word in enumerate(words)}).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer_of(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 16, "width": 16}}))
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "films.csv"
    lines = ["text,label"]
    for index in range(20):
        lines += [f"the film was {'very ' * (index % 5)}good,yes", f"it was not {'very ' * (index % 4)}bad film,no"]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "shades.npz"
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    np.savez(path, x=random.integers(0, 100, (40, 12, 20, 3), np.uint8) + 100 * labels[:, None, None, None], y=labels)
    return path


def run(spec: Spec, out: Path, epochs: int = 2, rate: float = 0.02) -> Any:
    return Study(spec, CHOICE, Training(epochs, batch=8), (rate,)).run(out, jobs=1)


def check(outcome: Any, targets: int) -> None:
    assert outcome.proof is not None
    assert outcome.proof.holds
    assert outcome.best.records[0]["validation"] > 0.5
    assert outcome.points[1].parameters == 2 * (int((targets * 256 - 1) ** 0.5) + 1)


def test_a_text_model(bert: Path, table: Path, tmp_path: Path) -> None:
    outcome = run(Spec(model=str(bert), data=str(table)), tmp_path, epochs=20, rate=0.01)
    check(outcome, targets=4)
    assert outcome.points[0].kept == 2 * 16 + 2


def test_a_text_model_keeps_its_padding_out(bert: Path, table: Path) -> None:
    problem = open_problem(Spec(model=str(bert), data=str(table)))
    model = problem.build(0).eval()
    part = problem.parts["training"]
    assert part.lengths is not None
    short, long = int(part.lengths.argmin()), int(part.lengths.argmax())
    together = problem.logits(model, part.batch(torch.tensor([short, long]), torch.device("cpu")))
    alone = problem.logits(model, part.batch(torch.tensor([short]), torch.device("cpu")))
    torch.testing.assert_close(together[:1], alone)
    assert problem.keep_trainable == ("classifier",)


def test_a_decoder_without_a_padding_token(tmp_path: Path, table: Path) -> None:
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=24)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt")
    tokenizer_of(tmp_path / "gpt")
    settings = json.loads((tmp_path / "gpt" / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("pad_token", "added_tokens_decoder")}
    settings |= {"pad_token": None, "eos_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "gpt" / "tokenizer_config.json").write_text(json.dumps(settings))
    outcome = run(Spec(model=str(tmp_path / "gpt"), data=str(table)), tmp_path / "out")
    assert outcome.proof.holds
    assert outcome.points[0].kept == 2 * 16


@pytest.mark.parametrize("size", [None, 24])
def test_an_image_model_at_its_own_size_and_another(vit: Path, shades: Path, tmp_path: Path, size: int | None) -> None:
    outcome = run(Spec(model=str(vit), data=str(shades), image_size=size), tmp_path)
    check(outcome, targets=4)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ViT checkpoint with a head of five classes."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_the_checkpoints_own_head_is_cut_and_frozen(classifier: Path, shades: Path, tmp_path: Path) -> None:
    spec = Spec(model=str(classifier), data=str(shades), head_rows=(4, 1))
    problem = open_problem(spec)
    whole = transformers.ViTForImageClassification.from_pretrained(classifier)
    cut = problem.build(3)
    assert torch.equal(cut.classifier.weight, whole.classifier.weight[[4, 1]])
    assert torch.equal(cut.classifier.bias, whole.classifier.bias[[4, 1]])
    assert problem.keep_trainable == problem.drawn == ()
    outcome = run(spec, tmp_path)
    alone, adapted = outcome.points
    assert (alone.kept, adapted.kept) == (0, 0)
    assert not alone.diverged, "nothing to train, and nothing that went wrong"
    assert adapted.parameters > 0
    assert outcome.proof.holds


@pytest.mark.parametrize(("rows", "message"), [((4,), "needs 2 of the 5"), ((4, 5), "got"), ((4, -1), "got")])
def test_other_rows_than_the_head_has_are_refused(
    classifier: Path, shades: Path, rows: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TnadaptError, match=message):
        open_problem(Spec(model=str(classifier), data=str(shades), head_rows=rows))


def test_a_head_that_the_checkpoint_does_not_bring_is_not_cut(vit: Path, shades: Path) -> None:
    with pytest.raises(TnadaptError, match="has no linear head"):
        open_problem(Spec(model=str(vit), data=str(shades), head_rows=(0, 1)))
    with pytest.raises(TnadaptError, match="transformers loads"):
        open_problem(Spec(model="timm:resnet18", data=str(shades), head_rows=(0, 1)))


def test_images_are_normalized_as_the_model_says(vit: Path, shades: Path) -> None:
    problem = open_problem(Spec(model=str(vit), data=str(shades), limit=20))
    assert sum(len(part.labels) for part in problem.parts.values()) == 20
    batch = problem.parts["test"].batch(torch.arange(2), torch.device("cpu"))
    assert batch.shape == (2, 3, 16, 16)
    assert -2 <= float(batch.min()) < float(batch.max()) <= 2


def test_images_are_normalized_by_the_training_images_where_it_does_not(
    vit: Path, shades: Path, tmp_path: Path
) -> None:
    for path in vit.iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    problem = open_problem(Spec(model=str(tmp_path), data=str(shades)))
    part = problem.parts["training"]
    batch = part.batch(torch.arange(len(part.labels)), torch.device("cpu"))
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "image",
    [
        np.full((9, 6), 0.5, np.float32),
        np.full((6, 9, 1), 128, np.uint8),
        np.full((6, 9, 3), 128, np.uint8),
        np.full((6, 9, 4), 128, np.uint8),
        np.full((4, 4, 3), 128, np.uint8),
    ],
    ids=["grey floats", "one channel", "colour", "with alpha", "as wanted"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_sort(image: Any, channels: int) -> None:
    images = Images(
        Samples([image, image], np.zeros(2, np.int64)), 4, channels, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    )
    batch = images.batch(torch.tensor([1]), torch.device("cpu"))
    torch.testing.assert_close(batch, torch.full((1, channels, 4, 4), 128 / 255))


def test_images_that_are_too_many_to_keep_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnadapt.finetune import _inputs as encode

    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    samples = Samples(pictures, np.zeros(6, np.int64))
    kept = Images(samples, 4, 3)
    monkeypatch.setattr(encode, "KEPT_BYTES", 10)
    read = Images(samples, 4, 3)
    assert kept.pixels is not None
    assert read.pixels is None
    some = torch.tensor([4, 1])
    torch.testing.assert_close(read.batch(some, torch.device("cpu")), kept.batch(some, torch.device("cpu")))


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(FileError, match=r"cannot read the image .*a\.png"):
        Images(Samples([tmp_path / "a.png"], np.zeros(1, np.int64)), 4, 3)


def test_a_timm_model(shades: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def untrained(name: str, pretrained: bool, **settings: Any) -> Any:
        assert pretrained
        small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        return create(name, pretrained=False, **{**small, **settings})

    monkeypatch.setattr(timm, "create_model", untrained)
    # Its weights are drawn from the seed of the head here; a checkpoint's would not be.
    spec = Spec(model="timm:vit_tiny_patch16_224", data=str(shades), image_size=32)
    with pytest.raises(TnadaptError, match=r"^--image-size 40 is not .* patches of 16 pixels; give 32 or 48$"):
        open_problem(dataclasses.replace(spec, image_size=40))
    problem = open_problem(spec)
    assert problem.keep_trainable == ("head",)
    study = Study(spec, CHOICE, Training(epochs=1, batch=8), (0.02,))
    assert len(study.targets) == 4
    assert problem.parts["test"].batch(torch.arange(1), torch.device("cpu")).shape == (1, 3, 32, 32)


# -- What a user gets wrong --------------------------------------------------------------------


def test_no_such_models(table: Path, tmp_path: Path, bert: Path) -> None:
    def refused(model: str, message: str, data: Path = table) -> None:
        with pytest.raises(TnadaptError, match=message) as caught:
            open_problem(Spec(model=model, data=str(data)))
        assert "\n" not in str(caught.value)

    refused("./nowhere", "no model at ./nowhere: there is no such folder")
    refused(str(tmp_path), "the folder has no config.json")
    refused(str(table), "expected a folder with a config.json, a .gguf file or a hub name")
    (tmp_path / "config.json").write_text("{}")
    refused(str(tmp_path), "cannot load .* for texts through transformers")
    refused("timm:vit_tiny_patch16_224", "is an image model, but films.csv has texts")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((bert / name).read_bytes())
    refused(str(bare), "bare' has no tokenizer, or one that knows no word of the texts; give a folder or hub name")


def test_a_hub_that_cannot_be_reached(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*given: Any, **settings: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nand much more")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    with pytest.raises(
        TnadaptError,
        match=r"cannot load 'some/name' for texts .*: We couldn't connect to the hub; no such folder is here: check",
    ):
        open_problem(Spec(model="some/name", data=str(table)))


def test_a_model_of_another_kind(vit: Path, table: Path, bert: Path, shades: Path) -> None:
    found = r"has a ViTConfig, for which transformers has no AutoModelForSequenceClassification; the task is class"
    with pytest.raises(TnadaptError, match=found):
        open_problem(Spec(model=str(vit), data=str(table)))
    found = r"has a BertConfig, for which transformers has no AutoModelForImageClassification; the task is image-"
    with pytest.raises(TnadaptError, match=found):
        open_problem(Spec(model=str(bert), data=str(shades)))


def test_a_name_to_train_that_is_not_there(table: Path, bert: Path) -> None:
    found = "--keep-trainable nothing: the model has no such parameter or module; its top-level parts are 'bert', 'clas"
    with pytest.raises(TnadaptError, match=found):
        open_problem(Spec(model=str(bert), data=str(table), keep_trainable=("nothing",)))


def test_a_tokenizer_of_another_model(bert: Path, table: Path, tmp_path: Path) -> None:
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    tokenizer_of(tmp_path, [*WORDS[:5], *(f"more{index}" for index in range(40)), *WORDS[5:]])
    with pytest.raises(TnadaptError, match=r"the tokenizer returned token \d+, but the model has only 15"):
        open_problem(Spec(model=str(tmp_path), data=str(table)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 1000}, "--max-length must be from 3 to 24 .*; got 1000"),
        ({"max_length": 2}, "--max-length must be from 3 to 24 .*; got 2"),
    ],
)
def test_lengths_that_cannot_be(bert: Path, table: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        open_problem(Spec(model=str(bert), data=str(table), **given))


@pytest.mark.parametrize(("size", "near"), [(4, "8"), (20, "16 or 24")])
def test_images_that_are_no_whole_patches(vit: Path, shades: Path, size: int, near: str) -> None:
    message = f"^--image-size {size} is not a multiple of the model's patches of 8 pixels; give {near}$"
    with pytest.raises(TnadaptError, match=message):
        open_problem(Spec(model=str(vit), data=str(shades), image_size=size))


def test_images_that_the_model_does_not_take(vit: Path, shades: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_image_inputs, "require_whole_patches", lambda size, patch: None)
    with pytest.raises(TnadaptError, match=r"does not take the samples of shades.npz: ") as caught:
        open_problem(Spec(model=str(vit), data=str(shades), image_size=4))  # the patch is 8
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_names_brings_nothing(bert: Path, table: Path, tmp_path: Path) -> None:
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors_torch.load_file(bert / "model.safetensors")
    safetensors_torch.save_file({f"my.{name}": one for name, one in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(TnadaptError, match="has none of the weights of BertForSequenceClassification"):
        open_problem(Spec(model=str(tmp_path), data=str(table)))


def test_a_new_head_is_kept_whatever_else_is(bert: Path, table: Path, tmp_path: Path) -> None:
    spec = Spec(model=str(bert), data=str(table), keep_trainable=("pooler",))
    problem = open_problem(spec)
    assert (problem.keep_trainable, problem.drawn) == (("pooler", "classifier"), ("classifier",))
    assert run(spec, tmp_path).proof.holds


def test_sixteen_bits_a_pixel() -> None:
    image = pytest.importorskip("PIL.Image")
    numbers = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    (one,) = Images(Samples([image.fromarray(numbers)], np.zeros(1, np.int64)), 8, 1).pixels
    np.testing.assert_allclose(one[0], numbers / 257, atol=0.5)
    with pytest.raises(FileError, match=r"the pixels of an image go from 0 to 0\.5; expected integers of 8 or 16 bits"):
        Images(Samples([image.fromarray(np.float32([[0, 0.5]]))], np.zeros(1, np.int64)), 1, 1)


def test_the_study_is_told_apart_by_data_and_base(bert: Path, table: Path, tmp_path: Path) -> None:
    one = Spec(model=str(bert), data=str(table))
    training = Training(epochs=1, batch=8)
    settings = Study(one, CHOICE, training, (0.02,)).settings()
    limited = Study(dataclasses.replace(one, limit=30), CHOICE, training, (0.02,)).settings()
    assert settings["base_digest"] == limited["base_digest"]
    assert settings["data_digest"] != limited["data_digest"]
    model = transformers.BertModel.from_pretrained(bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    tokenizer_of(tmp_path)
    other = Study(Spec(model=str(tmp_path), data=str(table)), CHOICE, training, (0.02,)).settings()
    assert settings["base_digest"] != other["base_digest"]
    assert settings["data_digest"] == other["data_digest"]
    # Nor is what a model does all in its weights.
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_probs_dropout_prob": 0.5}))
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    other = Study(Spec(model=str(tmp_path), data=str(table)), CHOICE, training, (0.02,)).settings()
    assert settings["base_digest"] != other["base_digest"]


def test_the_study_is_told_apart_by_the_image_settings(vit: Path, shades: Path, tmp_path: Path) -> None:
    for path in vit.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((vit / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4] * 3}))
    one, other = (
        Study(Spec(model=str(folder), data=str(shades)), CHOICE, Training(1, 8), (0.02,)).settings()
        for folder in (vit, tmp_path)
    )
    assert one["base_digest"] == other["base_digest"]
    assert one["data_digest"] != other["data_digest"]
