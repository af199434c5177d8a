"""Adapters of llama.cpp: fields, names, permuted rows, and the same update on a real model."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import ConfigError, FileError, Target

from .conversions import TOLERANCE, adapter_on, assert_same_updates, converted, error, made, updates
from .internals import GgufBase

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, WIDTH = 4, 2, 10
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (24, WIDTH),
        "self_attn.k_proj": (12, WIDTH),
        "self_attn.v_proj": (12, WIDTH),
        "mlp.down_proj": (WIDTH, 16),
    }.items()
}
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with the config and the weights of a model."""
    folder = tmp_path / "llama"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{path}.weight": np.zeros(shape, "f4") for path, shape in SHAPES.items()}, folder / "model.safetensors")
    return folder


def stored(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize(
    "config", [tna.presets.lora(2, alpha=3), tna.presets.lotr(2, groups="weight"), tna.presets.vera(rank=3)]
)
def test_llama_cpp_finds_the_update_of_its_own_weights(config: tna.Config, llama: Path, tmp_path: Path) -> None:
    """Its rows of queries and keys are in another order, from which transformers' own code gets them back."""
    pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    file, out = made(config, SHAPES), tmp_path / "adapter.gguf"
    found = tna.convert(file, out, to="gguf-lora", base=llama)
    assert found.exact
    fields, tensors = stored(out)
    about = fields["general.type"], fields["adapter.type"], fields["general.architecture"]
    assert about == ("adapter", "lora", "llama")
    assert len(tensors) == 2 * len(SHAPES)
    for path, delta in updates(file).items():
        layer, last = path.split(".")[2], path.rpartition(".")[2]
        name = f"blk.{layer}.{NAMES[last]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert (a.shape[1], b.shape[0], a.shape[0]) == (delta.shape[1], delta.shape[0], b.shape[1])
        scale = fields["adapter.lora.alpha"] / b.shape[1]  # llama.cpp's own
        change, heads = scale * b.astype("f8") @ a.astype("f8"), {"q_proj": HEADS, "k_proj": KV_HEADS}.get(last)
        if heads:
            change = LlamaTensorProcessor()._reverse_permute_weights(change, heads, heads)
        assert error(change, delta) <= TOLERANCE
    assert tna.convert(out).origin == "gguf-lora"
    assert_same_updates(converted(out), file)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_the_dtype_is_one_that_llama_cpp_has(kind: str, dtype: str, llama: Path, tmp_path: Path) -> None:
    file, out = made(tna.presets.lora(2), SHAPES), tmp_path / "out.gguf"
    tna.convert(file, out, to="gguf", base=llama, dtype=dtype)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == {kind}
    assert converted(out).dtype == dtype
    with pytest.raises(ConfigError, match=r"llama.cpp does not compute in float64: give dtype='float32'"):
        tna.convert(file, to="gguf", base=llama, dtype="float64")


QWEN = {"model_type": "qwen3", "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("config", "target", "name"),
    [
        (QWEN, Target("model.layers.0.self_attn.q_proj", (8, 6)), "attn_q"),
        (QWEN, Target("model.layers.0.self_attn.k_proj", (8, 6)), "attn_k"),
        # llama.cpp has it as (out, in).
        (GPT2, Target("transformer.h.0.attn.c_attn", (6, 18), transposed=True), "attn_qkv"),
    ],
)
def test_other_architectures_keep_their_rows(config: Any, target: Target, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"{target.module}.weight": np.zeros(target.stored, "f4")}, tmp_path / "m.safetensors")
    file = adapter_on([target], tna.presets.lora(2))
    tna.convert(file, tmp_path / "out.gguf", to="gguf", base=tmp_path / "m.safetensors")
    tensors = stored(tmp_path / "out.gguf")[1]
    a, b = (tensors[f"blk.0.{name}.weight.lora_{which}"] for which in "ab")
    assert error(b @ a, file.deltas()[0]) <= TOLERANCE
    assert converted(tmp_path / "out.gguf").targets[0].transposed == target.transposed


def test_it_needs_the_model(llama: Path) -> None:
    file = made(tna.presets.lora(2), SHAPES)
    config = llama / "config.json"
    for content, base, message in (
        (None, None, r"gguf-lora needs the model's architecture and heads: give base= \(--base\), a folder"),
        (None, SHAPES, r"got {'model\.layers"),
        (
            {"model_type": "mamba"},
            llama,
            "model_type of the base is 'mamba', and how llama.cpp stores its weights is k",
        ),
        ({"model_type": "llama"}, llama, "config.json of the base has no number num_hidden_layers or n_layer"),
        ("", llama, "has no config.json next to it"),
    ):
        if content == "":
            config.unlink()
        elif content:
            config.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            tna.convert(file, to="gguf-lora", base=base)


@pytest.mark.parametrize(
    ("path", "rows", "why"),
    [
        ("model.layers.0.router", 4, "architecture 'llama' of 2 blocks has no weight for 'model.layers.0.router'"),
        ("lm_head.proj.layers", 4, "has no weight for 'lm_head.proj.layers'"),
        ("lm_head", 4, "'lm_head' is output in llama.cpp, and only weights of its blocks"),
        ("model.layers.0.self_attn.q_proj", 10, "has 10 rows, which are not 4 heads of two halves"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(path: str, rows: int, why: str, llama: Path) -> None:
    save_file({f"{path}.weight": np.zeros((rows, 6), "f4")}, llama / "model.safetensors")
    with pytest.raises(ConfigError, match=why):
        tna.convert(adapter_on([Target(path, (rows, 6))], tna.presets.lora(1)), to="gguf", base=llama)


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    for name, kind, alpha, why in (
        ("model", "model", 1.0, "is a GGUF file of the type 'model', and no LoRA adapter"),
        ("theirs", "adapter", 1.0, "is an adapter of llama.cpp that does not say the model's own names and heads"),
        ("infinite", "adapter", math.inf, "its adapter.lora.alpha must be a finite number; it is inf"),
    ):
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type(kind)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2, 3), "f4"))
        written(writer)
        with pytest.raises(FileError, match=why):
            tna.convert(path)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:40])
    with pytest.raises(FileError, match="is not a valid GGUF file"):
        tna.convert(tmp_path / "cut.gguf")


def written(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    """An adapter in GGUF."""
    tna.convert(made(tna.presets.lora(2), SHAPES), tmp_path / "adapter.gguf", to="gguf", base=llama)
    return tmp_path / "adapter.gguf"


def seven_heads(content: bytes) -> bytes:
    heads = re.search(rb"false, ?(\d)\]", content)
    assert heads is not None
    return content[: heads.start(1)] + b"7" + content[heads.end(1) :]


def no_heads(content: bytes) -> bytes:
    heads = re.search(rb", ?false, ?\d\]", content)
    assert heads is not None
    return content[: heads.start()] + b"]".rjust(heads.end() - heads.start()) + content[heads.end() :]


def no_elements(content: bytes) -> bytes:
    name = b"blk.0.attn_q.weight.lora_b"
    sizes = content.rindex(name) + len(name) + 4
    return content[:sizes] + bytes(8) + content[sizes + 8 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (seven_heads, "rows, which are not those of 7 heads in halves"),
        (no_heads, "is an adapter of llama.cpp that does not say the model's own names and heads"),
        (no_elements, r"the factors of 'blk\.0\.attn_q\.weight' must be matrices; they are .* \(24, 0\)"),
        # A signaling NaN, of which NumPy would warn.
        (lambda content: content[:-4] + b"\0\0\xa0\x7f", "has numbers that are not finite in float32"),
    ],
)
def test_fields_and_tensors_that_do_not_fit_are_refused(
    change: Callable[[bytes], bytes], message: str, adapter: Path
) -> None:
    adapter.write_bytes(change(adapter.read_bytes()))
    with pytest.raises(FileError, match=message):
        tna.convert(adapter)


@pytest.mark.parametrize(("factor", "shapes"), [("a", r"\(20,\) and \(24, 2\)"), ("b", r"\(2, 10\) and \(48,\)")])
def test_factors_of_one_axis_are_refused(
    factor: str, shapes: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(writer: Any, name: str, array: np.ndarray) -> None:
        add(writer, name, array.reshape(-1) if name == f"blk.0.attn_q.weight.lora_{factor}" else array)

    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", flat)
    with pytest.raises(FileError, match=r"'blk\.0\.attn_q\.weight' must be matrices; they are " + shapes):
        tna.convert(made(tna.presets.lora(2), SHAPES), to="gguf", base=llama)


def test_a_damaged_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "model.gguf"
    base.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(FileError, match=r"model\.gguf is not a valid GGUF file"):
        tna.convert(made(tna.presets.lora(2), SHAPES), tmp_path / "adapter.gguf", to="gguf", base=base)

    def fail(path: str) -> None:
        raise ValueError("x" * 300)

    monkeypatch.setattr(gguf, "GGUFReader", fail)
    with pytest.raises(FileError, match=r"is not a valid GGUF file: ValueError: x{200}$"):
        tna.convert(made(tna.presets.lora(2), SHAPES), tmp_path / "adapter.gguf", to="gguf", base=base)


def gguf_model(path: Path, **fields: Any) -> Path:
    """Write a model of two weights in GGUF, with other values of some fields."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    values = {"block_count": 2, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, **fields}
    for name, value in values.items():
        kind = gguf.GGUFValueType.UINT64 if isinstance(value, int) and value >= 1 << 31 else None
        writer.add_key_value(f"llama.{name}", value, kind or gguf.GGUFValueType.get_type(value))
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight"):
        writer.add_tensor(name, np.zeros((24 if "q" in name else 12, WIDTH), "f4"))
    written(writer)
    return path


#: An adapter on a weight of that model.
KEYS = made(tna.presets.lora(2), {"model.layers.1.self_attn.k_proj": (12, WIDTH)})


BAD_NUMBERS = [0, -2, "two", 2.0, True, [2, 2], 4 * 10**9]


@pytest.mark.parametrize("field", ["block_count", "attention.head_count", "attention.head_count_kv"])
def test_numbers_of_a_gguf_model_are_checked(field: str, tmp_path: Path) -> None:
    for place, value in enumerate(BAD_NUMBERS):
        path = gguf_model(tmp_path / f"{place}.gguf", **{field: value})
        with pytest.raises(FileError, match=rf"llama\.{field} of .*{place}\.gguf must be "):
            tna.convert(KEYS, to="gguf-lora", base=path)
    first = made(tna.presets.lora(2), {"model.layers.0.self_attn.q_proj": (24, WIDTH)})
    assert tna.convert(first, to="gguf-lora", base=gguf_model(tmp_path / "least.gguf", **{field: 1})).exact


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
def test_numbers_of_a_config_are_checked(field: str, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    for value in (*BAD_NUMBERS, 10**12, 10**400):
        (llama / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ConfigError, match=f"^{field} in the base's config.json must be "):
            tna.convert(made(tna.presets.lora(2), SHAPES), to="gguf-lora", base=llama)
    (llama / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None, "num_attention_heads": 2}))
    assert tna.convert(made(tna.presets.lora(2), SHAPES), to="gguf-lora", base=llama).exact


def test_a_gguf_model_says_its_heads_and_shapes(llama: Path, tmp_path: Path) -> None:
    path = gguf_model(tmp_path / "model.gguf")
    found, expected = (tna.convert(KEYS, to="gguf-lora", base=base) for base in (path, llama))
    assert found.content == expected.content
    for module, message in (
        ("layers.0.self_attn.q_proj", r"blk.0.attn_q.weight of base has the shape \(24, 10\): this is another"),
        ("layers.1.mlp.up_proj", r"blk.1.ffn_up.weight of base has no such tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            tna.convert(made(tna.presets.lora(2), {f"model.{module}": (24, 16)}), to="gguf-lora", base=path)
    # Names are made for the weights of the adapter, however many blocks a file claims.
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    start = time.process_time()
    for base in (llama, gguf_model(tmp_path / "model.gguf", block_count=10**6)):
        assert tna.convert(KEYS, to="gguf-lora", base=base).exact
    assert time.process_time() - start < 2


def test_names_are_those_of_the_gguf_package() -> None:
    for number, architecture in gguf.MODEL_ARCH_NAMES.items():
        if architecture in {"gpt2", "llama", "qwen3", "phi3", "gemma3"}:
            table = gguf.get_tensor_name_map(number, 12)
            base = GgufBase(architecture, 12, HEADS, KV_HEADS)
            for path, (_, name) in table.mapping.items():
                if name.startswith("blk.") and not path.startswith("blk."):
                    assert base.tensor_of(path, (1, 1)) == f"{name}.weight", path
    with pytest.raises(ConfigError, match=r"of 12 blocks has no weight for 'model\.layers\.12\.self_attn\.q_proj'"):
        base.tensor_of("model.layers.12.self_attn.q_proj", (1, 1))
