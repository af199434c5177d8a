"""Tokenizers: which settings they are loaded with, and that none of their code is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from tnadapt.errors import TnadaptError
from tnadapt.finetune import Spec, open_problem
from tnadapt.finetune._inputs import tokenizer_of
from tnadapt.finetune.data import first_line

from . import tiny_models as tiny

END = "<|end|>"


def byte_level(folder: Path) -> str:
    """Write a byte-level tokenizer without merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    places = {one: place for place, one in enumerate([*alphabet, END])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=places, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": END, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_texts_get_no_space_before_them(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "bytes")
    plain, split = (tokenizer_of(folder, transformers, split_words=value) for value in (False, True))
    assert plain.convert_ids_to_tokens(plain("Hi")["input_ids"]) == ["H", "i"]
    # Words that are split already are told apart by the space before each.
    found = split([["a", "bc"]], is_split_into_words=True)
    assert split.convert_ids_to_tokens(found["input_ids"][0]) == ["Ġ", "a", "Ġ", "b", "c"]
    assert found.word_ids(0) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("task", ["classification", "causal-lm", "token-classification"])
def test_only_token_classification_adds_the_space(tmp_path: Path, task: str) -> None:
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    byte_level(folder)
    write = {"classification": tiny.classes, "causal-lm": tiny.completions, "token-classification": tiny.tags}[task]
    problem = open_problem(Spec(model=str(folder), data=write(tmp_path / "a.jsonl")))
    assert problem.task.name == task
    tokens = problem.parts["training"].tokens[0].tolist()
    spaced = tokenizer_of(str(folder), transformers).convert_ids_to_tokens(tokens)[0] == "Ġ"
    assert spaced == (task == "token-classification")


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
        tokenizer_of(str(folder), transformers, split_words=split_words)
    except TnadaptError as error:
        assert "no tokenizer in" in str(error)  # noqa: PT017
    assert not ran.exists()


def test_a_folder_without_a_tokenizer_says_so_in_whole(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(TnadaptError) as caught:
        tokenizer_of(str(tmp_path), transformers)
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


def test_a_revision_is_that_of_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = byte_level(tmp_path / "bytes"), []
    made = transformers.AutoTokenizer.from_pretrained(folder)

    def from_pretrained(name: str, **settings: object) -> object:
        seen.append((name, settings))
        return made

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizer_of("some/name", transformers, split_words=True, revision="abc123")
    known = {"trust_remote_code": False, "revision": "abc123"}
    assert seen == [("some/name", known), ("some/name", {**known, "add_prefix_space": True})]
    seen.clear()
    tokenizer_of("some/name", transformers)
    assert seen == [("some/name", {"trust_remote_code": False})]


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
        tokenizer_of(str(folder), transformers)
