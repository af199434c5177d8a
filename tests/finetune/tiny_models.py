"""Small random models with tokenizers, in folders, data for each task, adapters' files, and a study of seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.finetune import Choice, Spec, Study, Training
from tnadapt.finetune.data import Data, labelled_texts, open_source

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "a", "very", "not", "was", "it", "and",
    "what", "is", "Paris", "Rome", "in", "user", "assistant",
]  # fmt: skip
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(folder: Path) -> str:
    """A BERT without a head, with dropout, and a word-level tokenizer."""
    import torch
    import transformers

    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.3, **SIZES)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast({word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def gpt2(folder: Path, tokenizer: bool = True, template: str | None = None) -> str:
    """A GPT-2, and a word-level tokenizer whose last token is the end of a text."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    if tokenizer:
        words(folder, template)
    return str(folder)


def words(folder: Path, template: str | None = None) -> str:
    """A tokenizer of words, without special tokens around a text."""
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="[SEP]")
    made.chat_template = template
    made.save_pretrained(folder)
    return str(folder)


def vit(folder: Path) -> str:
    """A ViT for images of 16 x 16."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 16, "width": 16}}))
    return str(folder)


# -- Data --------------------------------------------------------------------------------------


def rows(path: Path, found: Sequence[dict[str, Any]]) -> str:
    """Write a .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def films(count: int = 40) -> list[str]:
    """Texts that are good, bad, both or neither."""
    pieces = itertools.product(
        ["the film was", "it was", "a film and it was"], ["good", "bad", "not good", "good and bad"]
    )
    texts = [f"{one} {other}" for one, other in pieces]
    return [f"{texts[i % len(texts)]}{' very' * (i // len(texts))}" for i in range(count)]


def classes(path: Path) -> str:
    return rows(path, [{"text": text, "label": "yes" if "good" in text else "no"} for text in films()])


def several(path: Path) -> str:
    found = [{"text": text, "labels": [one for one in ("good", "bad") if one in text]} for text in films()]
    return rows(path, found)


def numbers(path: Path) -> str:
    found = [{"text": t, "label": 2.5 * ("good" in t) - 1.25 * ("bad" in t) + 0.1 * t.count("very")} for t in films()]
    return rows(path, found)


def tags(path: Path) -> str:
    kinds = {"good": "B-POS", "bad": "B-NEG", "film": "B-OBJ"}
    found = [{"tokens": text.split(), "tags": [kinds.get(word, "O") for word in text.split()]} for text in films()]
    return rows(path, found)


def completions(path: Path) -> str:
    found = [{"prompt": f"what is {text}", "completion": "good" if "good" in text else "bad"} for text in films()]
    return rows(path, found)


def shades(path: Path) -> str:
    """Dark and light images as an .npz."""
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    np.savez(path, x=random.integers(0, 100, (40, 12, 20, 3), np.uint8) + 100 * labels[:, None, None, None], y=labels)
    return str(path)


#: For each task a model, data for it, and the suffix of their file.
JOBS = {
    "classification": (bert, classes, ".jsonl"),
    "multi-label": (bert, several, ".jsonl"),
    "regression": (bert, numbers, ".jsonl"),
    "token-classification": (bert, tags, ".jsonl"),
    "causal-lm": (gpt2, completions, ".jsonl"),
    "image-classification": (vit, shades, ".npz"),
}


def gguf(folder: Path, name: str = "tiny.gguf") -> str:
    """A Llama in a GGUF file with its tokenizer: bytes, and two of them merged."""
    import gguf

    alphabet = sorted({letter for word in WORDS[5:] for letter in word})
    tokens = ["<pad>", "<s>", "</s>", "\u0120", *alphabet, "th"]
    width, inner, heads, shared = 32, 64, 4, 2
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / name, "llama")
    settings = {
        "context_length": 96, "embedding_length": width, "block_count": 2, "feed_forward_length": inner,
        "head_count": heads, "head_count_kv": shared, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "rope_dimension_count": width // heads, "vocab_size": len(tokens), "tokenizer_model": "gpt2",
        "token_list": tokens, "token_types": [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3),
        "token_merges": ["t h"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    narrow, eight_bits = width * shared // heads, gguf.GGMLQuantizationType.Q8_0
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for block in range(2):
        for part, shape in {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (narrow, width),
            "attn_v": (narrow, width), "attn_output": (width, width), "ffn_gate": (inner, width),
            "ffn_up": (inner, width), "ffn_down": (width, inner),
        }.items():  # fmt: skip
            shapes[f"blk.{block}.{part}"] = shape
    random = np.random.default_rng(0)
    for weight, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{weight}.weight", np.ones(shape, "f4"))
        else:
            drawn = (0.3 * random.standard_normal(shape)).astype("f4")
            writer.add_tensor(f"{weight}.weight", gguf.quants.quantize(drawn, eight_bits), raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / name)


# -- Adapters' files as a study writes them, without any training ------------------------------


def untrained(path: Path, model: str, data: str, **options: Any) -> Path:
    """Write the file of a fresh LoRA adapter for a model and data."""
    from tnadapt.finetune import open_problem

    from .internals import recorded

    problem = open_problem(Spec(model=model, data=data, **options))
    built = problem.build(0)
    adapter = tna.torch.attach(built, tna.presets.lora(1), keep_trainable=problem.keep_trainable)
    assert adapter.pretrained is not None
    adapter.pretrained = recorded(adapter.pretrained, problem)
    adapter.save(path)
    return path


def changed(file: Path, path: Path, **about: Any) -> Path:
    """Write another file whose description of the base has these values; ``inputs`` are added to those that are there.

    An input of the value ``...`` is left out.
    """
    found = tna.load(file)
    assert found.pretrained is not None
    if "inputs" in about:
        inputs = {**found.pretrained.inputs, **about["inputs"]}
        about["inputs"] = {name: value for name, value in inputs.items() if value is not ...}
    tna.save(path, dataclasses.replace(found, pretrained=dataclasses.replace(found.pretrained, **about)))
    return path


# -- A study that takes a second or two, on the digits' small ViT, pretrained for one epoch ---------

TRAINING = Training(epochs=1, batch=64)
CHOICE = Choice(presets=("lora", "superlora"), ranks=(1,))


def spec(cache: Path) -> Spec:
    return Spec(cache=cache, pretrain_epochs=1)


def study(cache: Path, choice: Choice = CHOICE, rates: tuple[float, ...] = (0.01, 0.03), seeds: int = 1) -> Study:
    return Study(spec(cache), choice, TRAINING, rates, seeds)


def read(source: str, text_column: str | None = None, label_column: str | None = None) -> Data:
    """Read texts or images that each have one class."""
    opened = open_source(source, text_column, label_column)
    return opened if isinstance(opened, Data) else labelled_texts(opened, text_column, label_column)
