"""Adapters that cannot be converted are rejected by name before anything is written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save_file

import tnadapt as tna
from tests.checkpoints.merge.merge_scene import content
from tests.support import checkpoint_files as cp
from tnadapt import FileError

from .conversions import converted, made

PREFIX = "base_model.model."
RNG = np.random.default_rng(0)


def lora(rank: int = 2) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}a.q.lora_A.weight": RNG.standard_normal((rank, 8)).astype("f4"),
        f"{PREFIX}a.q.lora_B.weight": RNG.standard_normal((6, rank)).astype("f4"),
    }


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


def folder(path: Path, tensors: Mapping[str, np.ndarray] | None = None, config: Any = None) -> Path:
    path.mkdir()
    save_file(dict(lora() if tensors is None else tensors), path / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps(CONFIG if config is None else config)
    (path / "adapter_config.json").write_text(text)
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {**CONFIG, **fields}


def tensors(**fields: Any) -> dict[str, np.ndarray]:
    found = lora()
    for name, array in fields.items():
        key = PREFIX + name.replace("__", ".")
        if array is None:
            del found[key]
        else:
            found[key] = np.asarray(array)
    return found


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(peft_type="IA3"), "peft_type is 'IA3'; only LORA, LOKR, LOHA, HIRA"),
        ({"r": 2}, "peft_type is None"),
        ("[1]", "must be a JSON object"),
        ("{", "is not JSON"),
        ('{"r": 2, "r": 3}', "has the key 'r' twice"),
        ("\udcff", "is not UTF-8"),
        ("[" * 100_000, "nested too deep"),
        (changed(use_dora=True), "is true, and these lack a magnitude or factors, or are embeddings"),
        (changed(peft_type="HIRA"), "has tensors that do not belong to a HiRA adapter"),
        (changed(layer_replication=[[0, 2]]), "layer_replication="),
        (changed(use_qalora=True), "use_qalora=True"),
        (changed(alora_invocation_tokens=[1]), "aLoRA"),
        (changed(arrow_config={"top_k": 3}), "Arrow"),
        (changed(kasa_config={"a": 1}), "KaSA"),
        (changed(monteclora_config={"a": 1}), "MonteCLoRA"),
        (changed(use_bdlora={"a": 1}), "block-diagonal"),
        (changed(lora_bias=True), "it adds to the layer's bias"),
        (changed(target_parameters=["a"]), "does not store which parameter"),
        (changed(use_tomorrow=1), "this field is not known here"),
        (changed(init_lora_weights="pissa_niter_4"), "whose weights it has changed"),
        (changed(init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
        (changed(bias="some"), "bias must be"),
        (changed(r=0), "r must be an integer of at least 1; got 0"),
        (changed(r="2"), "r must be an integer"),
        (changed(r=True), "r must be an integer"),
        (changed(r=3), "'a.q' has factors of rank 2, and adapter_config.json says 3"),
        (changed(lora_alpha="4"), "alpha must be a finite number"),
        (changed(lora_alpha=None), "alpha must be a finite number"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "not finite"),
        (changed(rank_pattern=[1]), "rank_pattern must be an object"),
        (changed(rank_pattern={"q": "a"}), "the rank of a.q must be an integer"),
        (changed(alpha_pattern={"(": 2}), "alpha_pattern has the pattern '('"),
        (changed(rank_pattern={"(a+)+": "a", "(q+)+": True}), "the rank of a.q must be an integer"),
        (changed(modules_to_save="q"), "modules_to_save must be a list"),
        (changed(peft_type="LOKR"), "has tensors that do not belong to a LoKr adapter"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_settings_of_peft(config: Any, message: str, tmp_path: Path) -> None:
    where = folder(tmp_path / "theirs")
    text = config if isinstance(config, str) else json.dumps(config)
    (where / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(where, message)


@pytest.mark.parametrize(
    ("stored", "to", "message"),
    [
        ((4, 2, 1, 2, 1, 1), "peft-lora", "of 4 dimensions, and PEFT has lora only for up to 3"),
        ((4, 2, 1, 2, 1), "peft-loha", "of 3 dimensions, and PEFT has loha only for up to 2"),
        ((4, 2, 1, 2, 1, 1), "lycoris-full", "4 dimensions, and LyCORIS has full only for up to 3"),
    ],
)
def test_what_a_library_has_no_adapter_for(stored: tuple[int, ...], to: str, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.convert(made(tna.presets.lora(1), {"a.0": stored}), to=to)
    assert tna.convert(made(tna.presets.lora(1), {"a.0": stored[:-1]}), to=to).exact


def test_modules_that_would_have_one_name() -> None:
    file = made(tna.presets.lora(1), {"a.b": (4, 4), "a_b.c": (4, 4), "a.b_c": (4, 4)})
    with pytest.raises(tna.ConfigError, match=r"'a\.b_c' and 'a_b\.c' would have one name"):
        tna.convert(file, to="lycoris-full")


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_what_was_trained_beside_the_adapter_is_finite(dtype: str, tmp_path: Path) -> None:
    where = folder(tmp_path / "theirs", config=changed(modules_to_save=["head"]))
    bits = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}[dtype]
    for value, fine in ((1.5, True), (np.inf, False), (np.nan, False)):
        single = np.full((2, 3), value, np.float32)
        head = (single.view(np.uint32) >> 16).astype(bits) if dtype == "BF16" else single.astype(bits)
        both = {name: ("F32", array) for name, array in lora().items()} | {f"{PREFIX}head.weight": (dtype, head)}
        (where / "adapter_model.safetensors").unlink()
        cp.write_file(where / "adapter_model.safetensors", both)
        if fine:
            assert np.array_equal(converted(where).kept["head.weight"], single)
        else:
            refused(where, f"'{PREFIX}head.weight' holds NaN or infinity")


def refused(source: Path, message: str, **more: Any) -> None:
    out = source.parent / "out"
    with pytest.raises(FileError, match=re.escape(message)) as raised:
        tna.convert(source, out, **more)
    assert str(raised.value).startswith((str(source), "base"))
    assert not out.exists()
    assert not [name for name in os.listdir(source.parent) if name.endswith(".tmp")]


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tensors(a__q__lora_A__weight=None), "has lora_up, and lacks lora_down"),
        (tensors(a__q__lora_A__weight=np.zeros((3, 8), "f4")), "the ranks of the two factors differ"),
        (tensors(a__q__lora_A__weight=np.zeros(8, "f4")), "lora_down must have 2 axes or more"),
        (tensors(a__q__lora_A__weight=np.zeros((0, 8), "f4")), "none of them empty"),
        (tensors(a__q__lora_A__weight=np.zeros((2, 8), "i4")), "is I32; the tensors of an adapter are floating-point"),
        (tensors(a__q__lora_A__weight=np.full((2, 8), np.nan, "f4")), "holds NaN or infinity"),
        (tensors(a__q__lora_B__weight=np.zeros((6, 2, 2, 1), "f4")), "lora_up must be a matrix"),
        (tensors(a__q__lora_magnitude_vector=np.ones(6, "f4")), "has a magnitude of DoRA, and use_dora of"),
        (tensors(a__q__lora_B__bias=np.ones(6, "f4")), "do not belong to a LoRA adapter"),
        (
            tensors(a__q__lora_embedding_A=np.ones((2, 6), "f4")),
            "'a.q' has tensors of an embedding next to those of another layer",
        ),
        (
            tensors(head__weight=np.ones((2, 6), "f4")),
            "do not belong to a LoRA adapter: 'base_model.model.head.weight'",
        ),
        (tensors(a__q__lokr_w1=np.ones((2, 2), "f4")), "do not belong to a LoRA adapter"),
        (tensors(a__q__lora_A__default__weight=np.ones((2, 8), "f4")), "do not belong to a LoRA adapter"),
        ({"a.q.lora_A.weight": np.zeros((2, 8), "f4")}, "do not belong to a LoRA adapter"),
        *(
            ({**lora(), f"{PREFIX}{name}": np.zeros(2, "f4")}, f"do not belong to a LoRA adapter: '{PREFIX}{name}'")
            for name in (
                "b.q.base_layer.weight",
                "a.q",
                "a.q.base_layer",
                "a.q.base_layer.scale",
                "a.q.base_layer.a.bias",
            )
        ),
        (
            {
                f"{PREFIX}attn.base_layer.out_proj.lora_A.weight": np.ones((2, 8), "f4"),
                f"{PREFIX}attn.base_layer.out_proj.lora_B.weight": np.ones((8, 2), "f4"),
            },
            "PEFT's LoRA on nn.MultiheadAttention",
        ),
        ({}, "has no adapted weight"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_tensors_of_peft(given: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    refused(folder(tmp_path / "theirs", given), message)


def kohya(**more: Any) -> dict[str, np.ndarray]:
    found = {
        "lora_unet_a_q.lora_up.weight": np.ones((6, 2), "f4"),
        "lora_unet_a_q.lora_down.weight": np.ones((2, 8), "f4"),
        "lora_unet_a_q.alpha": np.asarray(2, "f4"),
    }
    for name, array in more.items():
        found[name.replace("__", ".")] = np.asarray(array)
    return found


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (
            kohya(),
            {"base": None},
            "give base= (--base), a safetensors file, an index or a folder; or, in Python, the model itself",
        ),
        (kohya(), {"base": ["a.k"]}, "base has no module for the name 'a_q'; it has 'a_k', 1 in all"),
        (kohya(), {"base": ["a.q", "a_q"]}, "the name 'a_q' may be 'a.q' or 'a_q'"),
        (kohya(), {"base": {"a.q": (6, 9)}}, "of 'a.q' has the shape (6, 8), and the weight in base has (6, 9)"),
        (kohya(), {"base": {"a.q": (8, 6)}}, "and the weight in base has (8, 6): this is another model"),
        (kohya(), {"base": {"a.q": (6, 2, 2, 3)}}, "and the weight in base has (6, 2, 2, 3)"),
        (kohya(), {"base": 5}, "base must be the path of a safetensors file"),
        (kohya(), {"base": [5]}, "base must be the path of a safetensors file"),
        (kohya(), {"base": {"a.q": "x"}}, "base must be the path of a safetensors file"),
        (kohya(), {"base": "no/such/file"}, "base: no/such/file: No such file or directory"),
        (kohya(), {"part": "lora_te"}, "has no part 'lora_te'; its parts are lora_unet"),
        (kohya(lora_te_x__diff=np.ones((2, 2), "f4")), {}, "has adapters of several models: lora_te, lora_unet"),
        (kohya(lora_unet_a_q__dora_scale=np.ones((6, 1), "f4")), {}, "DoRA"),
        (kohya(lora_unet_a_q__diff_b=np.ones(6, "f4")), {}, "the change of a bias"),
        (kohya(lora_unet_n__w_norm=np.ones(6, "f4")), {}, "the change of a normalization"),
        (
            kohya(lora_unet_a_q__oft_blocks=np.ones(6, "f4")),
            {},
            "do not belong to a LoRA, LoKr, LoHa or full difference",
        ),
        (kohya(lora_unet_a_q__alpha=np.ones(2, "f4")), {}, "alpha of 'a.q' must be one number"),
        (kohya(lora_unet_a_q__alpha=np.asarray(np.inf, "f4")), {}, "holds NaN or infinity"),
        (kohya(lora_unet_a_q__lora_mid__weight=np.ones((3, 2, 3, 3), "f4")), {}, "lora_mid must be (rank, rank"),
        (kohya(lora_unet_a_q__diff=np.ones((6, 8), "f4")), {}, "has tensors of lora and dense"),
        (kohya(lycoris_b__lokr_w1=np.ones((2, 2), "f4")), {"part": "lycoris", "base": ["b"]}, "and lacks lokr_w2_a"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_files_of_kohya(given: dict[str, np.ndarray], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(given, tmp_path / "kohya.safetensors")
    refused(tmp_path / "kohya.safetensors", message, **{"base": {"a.q": (6, 8)}, **more})


def test_a_bias_that_has_not_moved_is_none(tmp_path: Path) -> None:
    given = {"lycoris_x.diff": np.ones((2, 2), "f4"), "lycoris_x.diff_b": np.zeros(2, "f4")}
    save_file(given, tmp_path / "full.safetensors")
    assert tna.convert(tmp_path / "full.safetensors").exact


def lycoris(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Tensors of one module of these shapes."""
    ends = {name: f"{name}.weight" if name.startswith("lora") else name for name in shapes}
    return {f"lycoris_b.{ends[name]}": RNG.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


LOHA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}
CORES = {"hada_w1_a": (2, 8), "hada_w1_b": (2, 6), "hada_w2_a": (2, 8), "hada_w2_b": (2, 6)}
CORES |= {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
W1, W2 = {"lokr_w1": (2, 2)}, {"lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**LOHA, "hada_w2_a": (8, 3), "hada_w2_b": (3, 6)}, "its two halves are of different shapes or ranks"),
        ({**LOHA, "hada_w2_a": (9, 2)}, "its two halves are of different shapes or ranks"),
        ({**LOHA, "hada_w2_b": (2, 7)}, "its two halves are of different shapes or ranks"),
        ({**LOHA, "hada_w1_b": (3, 6)}, "the ranks of hada_w1_a and hada_w1_b differ"),
        ({**LOHA, "hada_w1_b": (2,)}, "hada_w1_b must have 2 axes or more, none of them empty"),
        ({**LOHA, "hada_w1_a": (8, 2, 1)}, "hada_w1_a must have 2 axes or more, none of them empty"),
        ({**LOHA, "hada_w2_b": (2, 0)}, "hada_w2_b must have 2 axes or more, none of them empty"),
        ({**CORES, "hada_t1": (2, 3, 3, 3)}, "hada_t1 must be (rank, rank, kernel …) with the ranks of hada_w1_a and"),
        ({**CORES, "hada_w2_b": (2, 6, 1)}, "hada_t2 must be (rank, rank, kernel …) with the ranks of hada_w2_a and"),
        ({**CORES, "hada_t2": (2, 2, 3, 1)}, "its two halves are of different shapes or ranks"),
        ({**W1, **W2, "lokr_w1_a": (2, 1)}, "lokr_w1 is there full and in two factors"),
        ({**W1, "lokr_w2": (3, 4), "lokr_w2_b": (2, 4)}, "lokr_w2 is there full and in two factors"),
        ({**W1, "lokr_w2": (3, 4), "lokr_t2": (2, 2, 3)}, "lokr_t2 belongs to two factors of W2, which is"),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), **W2}, "W1 and W2 have different ranks"),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (2, 2), **W2}, "the ranks of lokr_w1_a and lokr_w1_b differ"),
        ({**W1, "lokr_w2_a": (3, 2), "lokr_w2_b": (3, 4)}, "the ranks of lokr_w2_a and lokr_w2_b differ"),
        ({**W1, **W2, "lokr_t2": (2, 3, 3)}, "lokr_t2 must be (rank, rank, kernel …) with the ranks of"),
        ({**W1, **W2, "lokr_t2": (3, 3, 3)}, "lokr_t2 must be (rank, rank, kernel …) with the ranks of"),
        ({**W2, "lokr_w1": (2, 2, 1)}, "lokr_w1 must have 2 axes or more"),
        ({**W2, "lokr_w1": (2, 0)}, "lokr_w1 must have 2 axes or more, none of them empty"),
        ({"lora_up": (4, 2, 2, 1), "lora_down": (2, 3)}, "lora_up must be a matrix, or a kernel of size 1"),
        ({"lora_up": (4, 2), "lora_down": (3, 3)}, "the ranks of the two factors differ"),
        (
            {"lora_up": (4, 2), "lora_down": (2, 6), "lora_mid": (3, 2, 3)},
            "lora_mid must be (rank, rank, kernel …), and lora_down a kernel of size 1",
        ),
        (
            {"lora_up": (4, 2), "lora_down": (2, 6, 3), "lora_mid": (2, 2, 3)},
            "lora_mid must be (rank, rank, kernel …), and lora_down a kernel of size 1",
        ),
    ],
)
def test_tensors_that_do_not_fit_together(shapes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(lycoris(**shapes), tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"the tensors of 'b' do not fit together: {message}", base=["b"])


@pytest.mark.law("pickle-refused")
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora.bin", "x.pt", "x.safetensors"])
def test_a_pickle_is_not_opened(name: str, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Callable, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(pickle.dumps(Harm()))
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path / "in" / name, "pickle, which can run arbitrary code when opened, so it was not opened")
    if name == "adapter_model.bin":
        refused(tmp_path / "in", "pickle, which can run arbitrary code when opened, so it was not opened")
    assert not (tmp_path / "harm").exists()


def test_paths_that_lead_to_an_adapter(tmp_path: Path) -> None:
    where = folder(tmp_path / "theirs")
    for source in (where, str(where), f"{where}/", os.fsencode(where), where / "adapter_model.safetensors"):
        assert tna.convert(source).origin == "peft-lora"  # type: ignore[arg-type]
    (tmp_path / "ours").mkdir()
    tna.save(tmp_path / "ours" / "adapter.safetensors", made(tna.presets.lora(1)))
    assert tna.convert(tmp_path / "ours").origin == "tnadapt"
    assert tna.convert(tna.load(tmp_path / "ours" / "adapter.safetensors")).origin == "tnadapt"
    with pytest.raises(FileError, match=r"like an adapter of PEFT: .*tnadapt\.convert .* converts it"):
        tna.load(where / "adapter_model.safetensors")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "No such file or directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is a folder with neither adapter_config.json nor adapter.safetensors")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path / "half", "has adapter_config.json and no adapter_model.safetensors")
    save_file(lora(), tmp_path / "half" / "other.safetensors")
    refused(tmp_path / "half" / "other.safetensors", "which cannot be read without adapter_config.json")
    save_file({"x": np.ones(2, "f4")}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "has no entry 'tnadapt'")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"to": "lora"}, "to (--to) must be one of tnadapt, peft, peft-lora"),
        ({"to": ["peft-lora"]}, "to must be a string; got ['peft-lora']"),
        ({"to": "khoya"}, "; got 'khoya'; did you mean 'kohya'"),
        ({"to": "peft_lora"}, "; got 'peft_lora'; did you mean 'peft-lora' or 'peft-lokr'?"),
        ({"to": "gguf-lore"}, "; got 'gguf-lore'; did you mean 'gguf-lora'"),
        ({"to": "peft-vblora"}, "tnadapt, peft, peft-lora, peft-lokr, peft-loha, peft-vera"),
        ({"to": "peft-miss", "rank": 2}, "LoRA, LoKr and LoHa only; 'peft-miss' has no rank to choose"),
        ({"to": "peft-lora", "rank": 0}, "rank must be at least 1"),
        ({"to": "peft-lora", "rank": 2.0}, "rank must be an integer"),
        ({"rank": 2}, "rank=2 (--rank) applies to LoRA, LoKr and LoHa only"),
        ({"to": "peft-lora", "max_error": -1}, "max_error (--max-error) must be a number from 0 to 1"),
        ({"to": "peft-lora", "max_error": float("nan")}, "max_error (--max-error) must be a number from 0 to 1"),
        ({"dtype": "int8"}, "dtype (--dtype) must be one of float32"),
        ({"to": "peft-lora", "rank": 1}, "the conversion to peft-lora would change the updates by a relative error of"),
        (
            {"to": "peft-lora", "rank": 1, "max_error": 0.1},
            "and max_error=0.1 (--max-error) is allowed: give a larger rank or a wider dtype",
        ),
        ({"to": "lycoris-full", "dtype": "float16", "max_error": 0.0}, "give a wider dtype"),
    ],
)
def test_wishes_that_cannot_be(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = made(tna.presets.lora(2))
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.convert(file, tmp_path / "out", **more)
    assert not os.listdir(tmp_path)


def test_what_acts_on_activations_is_no_update(tmp_path: Path) -> None:
    file = dataclasses.replace(made(tna.presets.lora(2)), activation="gelu")
    with pytest.raises(tna.ConfigError, match="does not update weights"):
        tna.convert(file, to="lycoris-full")
    conversion = tna.convert(file, dtype="float16")
    assert (conversion.exact, conversion.error) == (True, 0.0)
    assert converted(file, dtype="float16").activation == "gelu"
    broken = made(tna.presets.lora(2))
    broken.arrays["group0.split0.factor0"][0, 0] = np.nan
    with pytest.raises(tna.ShapeError, match="holds NaN or infinity"):
        tna.convert(broken, to="peft-lora")


def test_an_update_that_no_memory_holds(tmp_path: Path) -> None:
    side = 1000
    given = {"lycoris_x.lokr_w1": np.ones((side, side), "f2"), "lycoris_x.lokr_w2": np.ones((side, side), "f2")}
    save_file(given, tmp_path / "huge.safetensors")
    # Of 8 terabytes, which need not be formed.
    assert tna.convert(tmp_path / "huge.safetensors").error == 0.0
    for options in ({"to": "lycoris-full"}, {"to": "peft-lora", "rank": 1, "max_error": 1.0}):
        with pytest.raises(tna.TnadaptError, match="memory for"):
            tna.convert(tmp_path / "huge.safetensors", **options)  # type: ignore[arg-type]


# -- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["tnadapt", "peft-lora", "lycoris-lora"])
def test_what_is_there_stays_unless_asked(to: str, tmp_path: Path) -> None:
    one, two = made(tna.presets.lora(1)), made(tna.presets.lora(2))
    out = tmp_path / "out"
    tna.convert(one, out, to=to)
    before = content(tmp_path)
    with pytest.raises(FileError, match=r"exists; give another path, or overwrite=True \(--overwrite\)"):
        tna.convert(two, out, to=to)
    assert content(tmp_path) == before
    tna.convert(two, out, to=to, overwrite=True)
    assert os.listdir(tmp_path) == [out.name]
    assert tna.convert(out).file.config.rank == 2  # type: ignore[union-attr]
    with pytest.raises(FileError, match=r"the folder .* does not exist; make it first"):
        tna.convert(one, tmp_path / "no" / "such", to=to)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_a_model_takes_no_adapter(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(FileError, match=r"is the folder of a model, as it has a config.json; give another folder"):
        tna.convert(made(tna.presets.lora(1)), tmp_path, to="peft-lora", overwrite=overwrite)
    assert content(tmp_path) == before


def test_a_folder_with_other_things_takes_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    tna.convert(made(tna.presets.lora(1)), tmp_path / "out", to="peft-lora")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="is a file; an adapter of PEFT is a folder"):
        tna.convert(made(tna.presets.lora(1)), tmp_path / "file", to="peft-lora", overwrite=True)


@pytest.mark.law("full-disk")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("to", ["tnadapt", "peft-lora", "lycoris-lora"])
def test_a_full_disk_changes_nothing(to: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    if there:
        tna.convert(made(tna.presets.lora(1)), out, to=to)
    before = content(tmp_path)
    synchronize, calls = os.fsync, []

    def full(handle: int) -> None:
        # The second file of PEFT's two is the one that no longer fits.
        calls.append(handle)
        if len(calls) >= (2 if to == "peft-lora" else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronize(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left on device"):
        tna.convert(made(tna.presets.lora(2)), out, to=to, overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path) == before
    assert out.exists() == there


@pytest.mark.parametrize("to", ["peft-lora", "peft-lokr", "lycoris-lora", "lycoris-full"])
def test_the_same_content_gives_the_same_bytes_which_safetensors_reads(to: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.q": (5, 7), "ä.0": (3, 3)}
    first, second = (tna.convert(made(tna.presets.lora(2, alpha=3), shapes), to=to) for _ in range(2))
    assert first.files == second.files
    content = next(iter(first.files.values()))
    found = load(content)
    assert found.keys() == first.tensors.keys()
    for name, array in first.tensors.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    # Tensors begin at a multiple of eight bytes, with as few spaces as that takes.
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip(b" ")
    assert size % 8 == 0
    assert header.endswith(b"}")
    assert size - len(header) < 8


def test_the_error_is_in_the_file(tmp_path: Path) -> None:
    found = tna.convert(made(tna.presets.lora(4)), tmp_path / "out", to="peft-lora", rank=2, max_error=0.9)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "numpy") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pt"  # which some loaders insist on
    record = json.loads(metadata["tnadapt.convert"])
    assert record["error"] == pytest.approx(found.error, rel=1e-2)
    assert (record["exact"], record["from"], record["to"]) == (False, "tnadapt", "peft-lora")
    assert tna.Config.from_dict(record["config"]) == tna.presets.lora(4)


@pytest.mark.parametrize("to", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, to: str) -> None:
    tna.convert(made(tna.presets.lora(1), {"a.q": (3, 4)}), to="peft-lora").save(tmp_path / "peft")
    (tmp_path / "peft" / to).unlink()
    os.mkfifo(tmp_path / "peft" / to)
    with pytest.raises(FileError, match=r"is not a file|is neither a file nor a folder"):
        tna.convert(tmp_path / "peft")


LARGE = np.float32(1e38)
OVERFLOWS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "factors": ({}, tensors(a__q__lora_A__weight=np.full((2, 8), LARGE), a__q__lora_B__weight=np.full((6, 2), LARGE))),
    "alpha": ({"lora_alpha": 1e38}, tensors(a__q__lora_A__weight=np.full((2, 8), 1e4, "f4"))),
    "alpha of float64": ({"lora_alpha": 1e38}, {n: array.astype("f8") * 1e140 for n, array in lora().items()}),
    **{
        method: (
            {"peft_type": method.upper(), "alpha": 2},
            {f"{PREFIX}a.q.{name}": np.full(shape, LARGE) for name, shape in parts.items()},
        )
        for method, parts in {
            "HiRA": {"hira_A": (2, 8), "hira_B": (6, 2)},
            "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (3, 4)},
            "LoHa": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
        }.items()
    },
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_updates_that_are_not_finite(name: str, tmp_path: Path) -> None:
    config, arrays = OVERFLOWS[name]
    where = folder(tmp_path / "a", arrays, {**CONFIG, **config} if "peft_type" not in config else {"r": 2, **config})
    dtype = "float64" if name.endswith("float64") else "float32"
    says = (
        rf"/a: the update of 'a\.q\.weight' has numbers that are not finite in {dtype}: the adapter is damaged, or its"
    )
    for to in ("tnadapt", "peft-lora", "lycoris-full"):
        with pytest.raises(FileError, match=says):
            tna.convert(where, to=to)


LONG, SQUARE = np.full((100_000, 1), 1e19, "f4"), np.full((400, 400), 1e19, "f4")
# The large column of one factor meets the small one of the other.
CROSSED = np.hstack([3 * LONG, np.full_like(LONG, 1e-19)])
LARGE_UPDATES: dict[str, tuple[dict[str, np.ndarray], str | None]] = {
    "LoRA": ({"lora_up.weight": LONG, "lora_down.weight": 10 * LONG.T}, "has numbers that are not finite in float32"),
    "LoKr": ({"lokr_w1": SQUARE, "lokr_w2": 10 * SQUARE}, "has numbers that are not finite in float32"),
    # Its numbers are zero.
    "LoRA of rank 2": (
        {"lora_up.weight": LONG * np.ones((1, 2), "f4"), "lora_down.weight": 10 * np.hstack([LONG, -LONG]).T},
        "may have numbers that are not finite in float32, and was not checked, as 100000 × 100000 numbers are too many",
    ),
    "crossed": ({"lora_up.weight": CROSSED, "lora_down.weight": CROSSED[:, ::-1].T}, None),
}


@pytest.mark.parametrize("name", LARGE_UPDATES)
def test_the_numbers_of_huge_updates_are_finite(name: str, tmp_path: Path) -> None:
    tensors, message = LARGE_UPDATES[name]
    place = tmp_path / "a.safetensors"
    save_file({f"lora_unet_x.{end}": np.ascontiguousarray(array) for end, array in tensors.items()}, place)
    if message is None:
        assert tna.convert(place, base=["x"]).exact
        return
    with pytest.raises(FileError, match=rf"the update of 'x\.weight' {message}.*: "):
        tna.convert(place, base=["x"])


def test_an_array_that_its_scale_makes_infinite(tmp_path: Path) -> None:
    """The scale is multiplied into W1, while the other factor keeps the update in range."""
    sizes = {"lokr_w1": ((2, 2), 1e10), "lokr_w2_a": ((3, 1), 1e-10), "lokr_w2_b": ((1, 4), 1e-10)}
    small = {f"{PREFIX}a.q.{name}": np.full(shape, value, "f4") for name, (shape, value) in sizes.items()}
    where = folder(tmp_path / "a", small, changed(peft_type="LOKR", r=1, alpha=1e32))
    message = r"/a: the scale of 'a\.q\.weight' makes numbers that are too large for float32"
    with pytest.raises(FileError, match=message):
        tna.convert(where)
    # What the file format holds is held, whatever a base in half precision can.
    scaled = {path: array.astype("f8") for path, array in lora().items()}
    scaled[f"{PREFIX}a.q.lora_A.weight"] *= 1e100
    assert tna.convert(folder(tmp_path / "b", scaled)).error == 0.0


@pytest.mark.parametrize("to", ["tnadapt", "peft-lora", "lycoris-full"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_of_ours_that_are_not_finite(dtype: str, to: str) -> None:
    file = made(tna.presets.lora(2), {"a.q": (6, 8)}, dtype=dtype)
    arrays = {name: np.full_like(array, np.finfo(dtype).max) for name, array in file.arrays.items()}
    with pytest.raises(FileError, match=rf"the update of 'a\.q\.weight' has numbers that are not finite in {dtype}"):
        tna.convert(dataclasses.replace(file, arrays=arrays), to=to)


@pytest.mark.parametrize(
    ("form", "name", "shape"),
    [
        ("lycoris-full", "diff", (6, 9)),
        ("lycoris-full", "diff", (6, 2, 4)),
        ("lycoris-full", "diff", (3, 16)),
        ("lycoris-lora", "lora_up.weight", (5, 2)),
    ],
)
def test_tensors_that_contradict_the_record(form: str, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tna.convert(made(tna.presets.lora(2), {"a.q": (6, 8)}), path, to=form)
    with safe_open(path, "np") as stored:
        metadata, found = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    found[f"lycoris_a_q.{name}"] = np.ones(shape, "f4")
    save_file(found, path, metadata)
    says = "the tensors of 'a.q' make an update of (*), and the file's own record says (6, 8)"
    with pytest.raises(FileError, match=re.escape(says).replace(r"\*", ".*")):
        tna.convert(path)
