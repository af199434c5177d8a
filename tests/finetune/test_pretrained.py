"""User models, built here from configs: a local folder or GGUF file through transformers, and timm."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

from safetensors import torch as safetensors_torch

import tnadapt as tna
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Choice, Spec, Study, Training, open_problem, predict
from tnadapt.finetune.data import Samples, first_line

from . import tiny_models as tiny
from .internals import model_inputs

CPU = torch.device("cpu")
CHOICE = Choice(presets=("superlora",), ranks=(1,))
Images = model_inputs.Images


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.bert(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.vit(tmp_path_factory.mktemp("models") / "vit"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.classes(tmp_path_factory.mktemp("data") / "films.jsonl"))


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.shades(tmp_path_factory.mktemp("data") / "shades.npz"))


def opened(model: object, data: object, **options: Any) -> Any:
    return open_problem(Spec(model=str(model), data=str(data), **options))


def run(out: Path, model: object, data: object, epochs: int = 2, rate: float = 0.02, **options: Any) -> Any:
    spec = Spec(model=str(model), data=str(data), **options)
    outcome = Study(spec, CHOICE, Training(epochs, batch=8), (rate,)).run(out, jobs=1)
    assert outcome.proof.holds
    return outcome


def test_a_text_model(bert: Path, table: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path, bert, table, epochs=20, rate=0.01)
    assert outcome.best.records[0]["validation"] > 0.5
    assert outcome.points[1].parameters == 2 * (int((4 * 256 - 1) ** 0.5) + 1)
    assert outcome.points[0].kept == 2 * 16 + 2


def test_a_text_model_keeps_its_padding_out(bert: Path, table: Path) -> None:
    problem = opened(bert, table)
    model, part = problem.build(0).eval(), problem.parts["training"]
    short, long = int(part.lengths.argmin()), int(part.lengths.argmax())
    together = problem.logits(model, part.batch(torch.tensor([short, long]), CPU))
    torch.testing.assert_close(together[:1], problem.logits(model, part.batch(torch.tensor([short]), CPU)))
    assert problem.keep_trainable == ("classifier",)


@pytest.mark.parametrize("size", [None, 24])
def test_an_image_model_at_its_own_size_and_another(vit: Path, shades: Path, tmp_path: Path, size: int | None) -> None:
    outcome = run(tmp_path, vit, shades, image_size=size)
    assert outcome.best.records[0]["validation"] > 0.5
    assert outcome.points[1].parameters == 2 * (int((4 * 256 - 1) ** 0.5) + 1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ViT checkpoint with a head of five classes."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, initializer_range=0.3, **tiny.SIZES)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_the_checkpoints_own_head_is_cut_and_frozen(classifier: Path, shades: Path, tmp_path: Path) -> None:
    problem = opened(classifier, shades, head_rows=(4, 1))
    whole = transformers.ViTForImageClassification.from_pretrained(classifier)
    cut = problem.build(3)
    assert torch.equal(cut.classifier.weight, whole.classifier.weight[[4, 1]])
    assert torch.equal(cut.classifier.bias, whole.classifier.bias[[4, 1]])
    assert problem.keep_trainable == problem.drawn == ()
    alone, adapted = run(tmp_path, classifier, shades, head_rows=(4, 1)).points
    assert (alone.kept, adapted.kept) == (0, 0)
    assert not alone.diverged, "nothing to train, and nothing that went wrong"
    assert adapted.parameters > 0


def test_images_are_normalized_as_the_model_or_the_training_images_say(vit: Path, shades: Path, tmp_path: Path) -> None:
    problem = opened(vit, shades, limit=20)
    assert sum(len(part.labels) for part in problem.parts.values()) == 20
    batch = problem.parts["test"].batch(torch.arange(2), CPU)
    assert batch.shape == (2, 3, 16, 16)
    assert -2 <= float(batch.min()) < float(batch.max()) <= 2
    silent = shutil.copytree(vit, tmp_path / "vit")
    (silent / "preprocessor_config.json").unlink()
    part = opened(silent, shades).parts["training"]
    batch = part.batch(torch.arange(len(part.labels)), CPU)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "image",
    [
        np.full((9, 6), 0.5, np.float32), np.full((6, 9, 1), 128, np.uint8), np.full((6, 9, 3), 128, np.uint8),
        np.full((6, 9, 4), 128, np.uint8), np.full((4, 4, 3), 128, np.uint8),
    ],
    ids=["grey floats", "one channel", "colour", "with alpha", "as wanted"],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_sort(image: Any, channels: int) -> None:
    samples = Samples([image, image], np.zeros(2, np.int64))
    batch = Images(samples, 4, channels, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))).batch(torch.tensor([1]), CPU)
    torch.testing.assert_close(batch, torch.full((1, channels, 4, 4), 128 / 255))


def test_images_that_are_too_many_to_keep_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    samples, some = Samples(pictures, np.zeros(6, np.int64)), torch.tensor([4, 1])
    kept = Images(samples, 4, 3)
    monkeypatch.setattr(model_inputs, "KEPT_BYTES", 10)
    read = Images(samples, 4, 3)
    assert kept.pixels is not None
    assert read.pixels is None
    torch.testing.assert_close(read.batch(some, CPU), kept.batch(some, CPU))


def test_sixteen_bits_a_pixel_and_images_that_cannot_be_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    numbers = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    (pixels,) = Images(Samples([image.fromarray(numbers)], np.zeros(1, np.int64)), 8, 1).pixels
    np.testing.assert_allclose(pixels[0], numbers / 257, atol=0.5)
    with pytest.raises(FileError, match=r"the pixels of an image go from 0 to 0\.5; expected integers of 8 or 16 bits"):
        Images(Samples([image.fromarray(np.float32([[0, 0.5]]))], np.zeros(1, np.int64)), 1, 1)
    (tmp_path / "a.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(FileError, match=r"cannot read the image .*a\.png"):
        Images(Samples([tmp_path / "a.png"], np.zeros(1, np.int64)), 4, 3)


def test_a_new_head_is_kept_whatever_else_is(bert: Path, table: Path) -> None:
    problem = opened(bert, table, keep_trainable=("pooler",))
    assert (problem.keep_trainable, problem.drawn) == (("pooler", "classifier"), ("classifier",))


def test_studies_differ_by_data_and_base(bert: Path, table: Path, vit: Path, shades: Path, tmp_path: Path) -> None:
    def digests(model: Path, data: Path, **options: Any) -> tuple[str, str]:
        spec = Spec(model=str(model), data=str(data), **options)
        settings = Study(spec, CHOICE, Training(epochs=1, batch=8), (0.02,)).settings()
        return settings["base_digest"], settings["data_digest"]

    def same(one: tuple[str, str], other: tuple[str, str]) -> tuple[bool, bool]:
        return one[0] == other[0], one[1] == other[1]

    before = digests(bert, table)
    assert same(digests(bert, table, limit=30), before) == (True, False)
    other = shutil.copytree(bert, tmp_path / "bert")
    model = transformers.BertModel.from_pretrained(bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(other)
    assert same(digests(other, table), before) == (False, True)
    # Nor is what a model does all in its weights.
    config = json.loads((bert / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "attention_probs_dropout_prob": 0.5}))
    (other / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    assert same(digests(other, table), before) == (False, True)
    # Of images, also by how they are normalized.
    other = shutil.copytree(vit, tmp_path / "vit")
    settings = json.loads((vit / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4] * 3}))
    assert same(digests(other, shades), digests(vit, shades)) == (True, False)


# -- What a user gets wrong --------------------------------------------------------------------


@pytest.fixture
def damaged(bert: Path, tmp_path: Path) -> dict[str, Path]:
    """Return folders with what is no model, or only a part of one, by what they are."""
    folders = {name: tmp_path / name for name in ("empty", "odd", "bare", "strange", "larger")}
    for name in ("empty", "odd"):
        folders[name].mkdir()
    (folders["odd"] / "config.json").write_text("{}")
    for name in ("bare", "strange", "larger"):
        shutil.copytree(bert, folders[name])
        (folders[name] / "tokenizer.json").unlink()
    for path in folders["bare"].glob("tokenizer*"):
        path.unlink()
    # A checkpoint with other names, and the tokenizer of another model.
    weights = safetensors_torch.load_file(bert / "model.safetensors")
    renamed = {f"my.{name}": weight for name, weight in weights.items()}
    safetensors_torch.save_file(renamed, folders["strange"] / "model.safetensors")
    words = [*tiny.WORDS[:5], *(f"more{index}" for index in range(40)), *tiny.WORDS[5:]]
    larger = transformers.BertTokenizerFast({word: place for place, word in enumerate(words)})
    larger.save_pretrained(folders["larger"])
    return folders


NOT_THERE = "--keep-trainable nothing: the model has no such parameter or module; "
PATCHES = "is not a multiple of the model's patches of 8 pixels; give"


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("./nowhere", "table", {}, "no model at ./nowhere: there is no such folder"),
        ("empty", "table", {}, "the folder has no config.json"),
        ("table", "table", {}, "expected a folder with a config.json, a .gguf file or a hub name"),
        ("odd", "table", {}, "cannot load .* for texts through transformers"),
        ("timm:vit_tiny_patch16_224", "table", {}, "is an image model, but films.jsonl has texts"),
        ("bare", "table", {}, "bare' has no tokenizer, or one that knows no word of the texts; give a folder or hub n"),
        ("strange", "table", {}, "has none of the weights of BertForSequenceClassification"),
        ("larger", "table", {}, r"the tokenizer returned token \d+, but the model has only 22"),
        ("vit", "table", {}, "Unrecognized .*ViTConfig.* for .*AutoModelForSequenceClassification"),
        ("bert", "shades", {}, "Unrecognized .*BertConfig.* for .*AutoModelForImageClassification"),
        ("bert", "table", {"keep_trainable": ("nothing",)}, NOT_THERE + "its top-level parts are 'bert', 'clas"),
        ("bert", "table", {"max_length": 1000}, "--max-length must be from 3 to 32 .*; got 1000"),
        ("bert", "table", {"max_length": 2}, "--max-length must be from 3 to 32 .*; got 2"),
        ("vit", "shades", {"image_size": 4}, f"^--image-size 4 {PATCHES} 8$"),
        ("vit", "shades", {"image_size": 20}, f"^--image-size 20 {PATCHES} 16 or 24$"),
        ("classifier", "shades", {"head_rows": (4,)}, "needs 2 of the 5"),
        ("classifier", "shades", {"head_rows": (4, 5)}, "got"),
        ("classifier", "shades", {"head_rows": (4, -1)}, "got"),
        # A head that the checkpoint does not bring.
        ("vit", "shades", {"head_rows": (0, 1)}, "has no linear head"),
        ("timm:resnet18", "shades", {"head_rows": (0, 1)}, "transformers loads"),
    ],
)  # fmt: skip
def test_models_and_data_that_are_refused(
    model: str, data: str, options: dict[str, Any], message: str, damaged: dict[str, Path],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    whole = ("bert", "vit", "classifier", "table", "shades")
    places = damaged | {name: request.getfixturevalue(name) for name in whole}
    with pytest.raises(TnadaptError, match=message) as caught:
        opened(places.get(model, model), places[data], **options)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*given: Any, **settings: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nand much more")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    message = r"cannot load 'some/name' for texts .*: We couldn't connect to the hub; no such folder is here: check"
    with pytest.raises(TnadaptError, match=message):
        opened("some/name", table)


# -- Tokenizers: which settings they are loaded with, and that none of their code is run --------

END = "<|end|>"


def byte_level(folder: Path) -> str:
    """Write a byte-level tokenizer without merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    places = {one: place for place, one in enumerate([*alphabet, END])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=places, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": END, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("task", ["classification", "causal-lm", "token-classification"])
def test_only_token_classification_adds_a_space_before_each_text(tmp_path: Path, task: str) -> None:
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    byte_level(folder)
    write = {"classification": tiny.classes, "causal-lm": tiny.completions, "token-classification": tiny.tags}[task]
    problem = open_problem(Spec(model=str(folder), data=write(tmp_path / "a.jsonl")))
    assert problem.task.name == task
    tokens = problem.parts["training"].tokens[0].tolist()
    text = "".join(model_inputs.tokenizer_of(str(folder), transformers).convert_ids_to_tokens(tokens))
    # Words that are split already are told apart by the space before each.
    assert text.startswith("Ġ") == (task == "token-classification")
    assert "Ġfilm" in text


@pytest.mark.parametrize("config", [None, {"model_type": "unknown"}, {"model_type": "gpt2"}])
@pytest.mark.parametrize("split_words", [False, True])
def test_no_code_of_a_tokenizer_is_run(
    tmp_path: Path, config: dict[str, str] | None, split_words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "own", tmp_path / "ran"
    byte_level(folder)
    settings = {
        "tokenizer_class": "Own", "eos_token": END, "add_prefix_space": False,
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    # Without trust_remote_code=False, transformers asks, and this is the answer.
    monkeypatch.setattr("builtins.input", lambda question: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        model_inputs.tokenizer_of(str(folder), transformers, split_words=split_words)
    except TnadaptError as error:
        assert "no tokenizer in" in str(error)  # noqa: PT017
    assert not ran.exists()


def test_a_folder_without_a_tokenizer_says_so_in_whole(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(TnadaptError) as caught:
        model_inputs.tokenizer_of(str(tmp_path), transformers)
    text = str(caught.value)
    assert text.startswith(
        f"no tokenizer in {str(tmp_path)!r} that transformers can open (the folder has no tokenizer.json): "
    )
    assert text.endswith("; give a folder or hub name that has one with --tokenizer")
    assert ":;" not in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one of: \n(1) this or \n\n(2) that.\nOr so.", "one of: (1) this or (2) that. Or so."),
        ("\n it failed \ndetails", "it failed"),
        ("", "ValueError"),
        (1000 * "a", 300 * "a"),
        ("one:\n" + 1000 * "a", "one: " + 495 * "a"),
    ],
)
def test_messages_of_libraries_become_one_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer_class": "RagTokenizer"},
            "tokenizer of .* is a RagTokenizer, not one for texts; give a folder",
        ),
        ({"model_max_length": "many"}, "model_max_length of the tokenizer of .* must be a number from 1; got 'many'"),
        ({"model_max_length": 0}, "must be a number from 1; got 0"),
        ({"model_max_length": True}, "must be a number from 1; got True"),
        ({"tokenizer_class": ["a"]}, "no tokenizer in .* that transformers can open: .*; give a folder or hub name"),
    ],
    ids=str,
)
def test_odd_settings_of_a_tokenizer_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    folder = tmp_path / "words"
    tiny.words(folder)
    if settings == {"tokenizer_class": "RagTokenizer"}:
        transformers.RagConfig.from_question_encoder_generator_configs(
            transformers.BertConfig(), transformers.BertConfig()
        ).save_pretrained(folder)
        for part in ("question_encoder_tokenizer", "generator_tokenizer"):
            tiny.words(folder / part)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(TnadaptError, match=message):
        model_inputs.tokenizer_of(str(folder), transformers)


# -- Models in GGUF files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate")
    pytest.importorskip("gguf")
    return Path(tiny.gguf(tmp_path_factory.mktemp("gguf")))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 20]])).logits


@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_a_language_model_in_gguf(whole: bool, model: Path, tmp_path: Path) -> None:
    data = tiny.completions(tmp_path / "a.jsonl")
    problem = open_problem(Spec(model=str(model.parent if whole else model), data=data))
    assert (problem.task.name, type(problem.build(0)).__name__) == ("causal-lm", "LlamaForCausalLM")
    inputs = problem.parts["training"].batch(torch.arange(1), torch.device("cpu"))["input_ids"]
    assert problem.logits(problem.build(0), {"input_ids": inputs}).shape[:2] == inputs.shape
    file = tiny.untrained(tmp_path / "a.safetensors", str(model), data)
    about = tna.load(file).pretrained
    assert (about.name, about.file, about.task) == (str(model.parent), model.name, "text-generation")
    found = predict(file, data, limit=3, new_tokens=2)
    assert [set(row) for row in found.rows] == [{"prompt", "completion", "prediction", "loss", "perplexity"}] * 3
    assert torch.equal(logits(tna.torch.load_pretrained(file)), logits(problem.build(0)))
    tokenizer = tna.torch.load_processor(file)
    assert tokenizer.decode(tokenizer(" the film")["input_ids"]) == " the film"


def test_a_gguf_file_beside_others_is_recorded(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(model, folder / name)
    (folder / "config.json").write_text("{}")
    data = tiny.completions(tmp_path / "a.jsonl")
    file = tiny.untrained(tmp_path / "a.safetensors", str(folder / "b.gguf"), data)
    about = tna.load(file).pretrained
    assert about.file == "b.gguf"
    expected = predict(file, data, limit=2, new_tokens=2)
    # The same base elsewhere, by its file or its folder.
    for base in (model, model.parent):
        assert predict(file, data, base=str(base), limit=2, new_tokens=2) == expected
    (folder / "b.gguf").unlink()
    with pytest.raises(TnadaptError, match=r"no tokenizer in '.*b\.gguf'|cannot load its base model"):
        predict(file, data, limit=2)


def test_what_is_no_model_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.completions(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    images = tiny.shades(tmp_path / "a.npz")
    for name, samples, message in (
        (tmp_path / "none.gguf", data, r"no model at .*/none\.gguf: there is no such file"),
        (tmp_path / "empty", data, r"has no config\.json and no \.gguf file"),
        (model, images, "is a GGUF file, of which transformers makes language models"),
        (tmp_path / "broken.gguf", data, r"cannot load '.*broken\.gguf' for texts through transformers: "),
    ):
        with pytest.raises(TnadaptError, match=message):
            open_problem(Spec(model=str(name), data=samples))
    file = tiny.untrained(tmp_path / "a.safetensors", str(model), data)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    for load in (
        lambda: open_problem(Spec(model=str(model), data=data)), lambda: tna.torch.load_pretrained(file),
        lambda: tna.torch.load_processor(file), lambda: predict(file, data),
    ):  # fmt: skip
        with pytest.raises(
            TnadaptError, match=r"is a GGUF file, which needs the package gguf: pip install 'tnadapt\[g"
        ):
            load()
